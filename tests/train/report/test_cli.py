"""The `report-students` command."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.run_folders import write_run, write_sweep
from train.report.cli import app

ROOT = Path(__file__).parents[3]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_page_of_one_run_is_in_its_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    done = invoke(run)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(f"{run / 'report.html'}: ")
    assert "<h1>resnet8 on digits</h1>" in (run / "report.html").read_text()


def test_the_page_of_several_runs_is_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        write_run(tmp_path / str(seed), seed=seed, student=student) for seed, student in enumerate(("vgg8", "vgg13"))
    ]
    monkeypatch.chdir(tmp_path)
    assert invoke(*runs).exit_code == 0
    assert "<h1>2 students on digits</h1>" in (tmp_path / "report.html").read_text()


def test_a_sweep_and_a_run_with_a_title(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", {"resnet8": 0.9}, seeds=2)
    run = write_run(tmp_path / "run", student="vgg8")
    done = invoke(sweep, run, "--out", tmp_path / "new" / "page.html", "--title", "Both & more")
    assert done.exit_code == 0, done.stderr
    text = (tmp_path / "new" / "page.html").read_text()
    assert "<h1>Both &amp; more</h1>" in text
    assert "vgg8" in text
    assert "tried to allocate 2.00 GiB" in text


def test_open_opens_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", opened.append)
    run = write_run(tmp_path / "run")
    assert invoke(run, "--open").exit_code == 0
    assert opened == [(run / "report.html").as_uri()]


@pytest.mark.parametrize("what", ["nowhere", "empty", "file"])
def test_errors_are_one_line_and_exit_code_2(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    failed = invoke(write_run(tmp_path / "run"), tmp_path / what)
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: no run of train-student here")
    assert len(failed.stderr.strip().splitlines()) == 1
    assert failed.stdout == ""


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    failed = invoke(write_run(tmp_path / "run"), "--out", tmp_path / "file" / "page.html")
    assert failed.exit_code == 2
    assert "cannot write" in failed.stderr
