"""The text of the page: it has every figure, is valid HTML, loads nothing, and escapes hostile names."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cache_tools.errors import DataError, NotFoundError
from tests.support import tiny_run
from tests.support.run_folders import write_run, write_sweep
from train.report.html import write_report
from train.report.spread import interval_factor
from train.report.trials import read_table
from train.run import train_student

VOID = {"meta", "input", "br", "link", "img", "hr"}
LOADING = {"src", "srcset", "poster", "data", "action", "formaction", "background", "ping"}


class Page(HTMLParser):
    """A parsed page: elements as (tag, attributes), texts, scripts. Fails on tags that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, text: str) -> None:
        if self._open and self._open[-1] in {"script", "style"}:
            key = next(
                attributes.get("id") or "" for tag, attributes in reversed(self.elements) if tag == self._open[-1]
            )
            self.scripts[f"{self._open[-1]} {key}".strip()] = text
        elif text.strip():
            self.texts.append(text.strip())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts["script data"])


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = write_sweep(tmp_path_factory.mktemp("sweep") / "s", {"resnet8": 0.85, "vgg8": 0.93}, losses=("kd", "ce"))
    return page(write_report([], folder / "report.html", trials=read_table(folder), title="A sweep"))


def test_every_figure_of_every_run_is_in_the_page(tmp_path: Path) -> None:
    runs = {f"run-{seed}": write_run(tmp_path / f"run-{seed}", seed=seed, top1=0.9 + 0.01 * seed) for seed in range(3)}
    other = write_run(tmp_path / "other", student="resnet20", top1=0.8, parameters=272_474)
    found = page(write_report([*runs.values(), other], tmp_path / "report.html"))
    for folder in (*runs.values(), other):
        result = json.loads((folder / "result.json").read_text())
        last = result["last"]
        for text in (
            f"{100 * last['top1']:.2f}",
            f"{100 * last['top5']:.2f}",
            f"{last['nll']:.4f}",
            f"{last['ece']:.4f}",
        ):
            assert text in found.texts, text
        assert f"{result['parameters']:,}" in found.texts
        assert result["command"] in found.texts
        assert str(folder) in found.texts
    std, half = 0.01, 0.01 * interval_factor(3)
    assert f"±\u202f{100 * std:.2f}" in found.texts
    assert f"{100 * (0.91 - half):.2f} – {100 * (0.91 + half):.2f}" in found.texts
    assert {"93.00 %", "81.00 %", "94.00 %"} <= set(found.texts), "teacher, CLIP, fusion"
    recipe = (other / "recipe.yaml").read_text().rstrip()
    assert recipe in found.texts


def test_failed_and_stopped_trials_show_their_reason(sweep: Page) -> None:
    assert "CUDA out of memory: tried to allocate 2.00 GiB" in sweep.texts
    assert "not among the best half" in sweep.texts
    assert "Of 14 runs, 1 stopped, 1 failed: not in means, intervals and Pareto fronts." in sweep.texts


def facts(found: Page) -> dict[str, tuple[str, str]]:
    """The key figures: name → (figure, note)."""
    text = found.texts[: found.texts.index("Leaderboard")]
    return {name: (text[place + 1], text[place + 2]) for place, name in enumerate(text[:-2])}


def test_key_figures_compare_with_a_finished_twin_only(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", top1=0.9)
    twins = {
        ended: write_run(tmp_path / f"twin-{ended}", loss="ce", top1=0.8, finished=ended) for ended in (True, False)
    }
    for ended, twin in twins.items():
        shown = facts(page(write_report([run, twin], tmp_path / "report.html")))
        assert shown["Student, top-1"] == ("90.00 %", "kd")
        assert ("Distilled − labels alone" in shown, "On labels alone, top-1" in shown) == (ended, ended)


@pytest.mark.parametrize(
    ("distilled", "labels", "difference"),
    [(0.9, 0.8, "+10.00"), (0.665, 0.7325, "-6.75"), (0.5, 0.5, "+0.00"), (0.7, 0.9975, "-29.75")],
)
def test_the_headline_is_the_distilled_student_also_where_labels_alone_are_better(
    tmp_path: Path, distilled: float, labels: float, difference: str
) -> None:
    run = write_run(tmp_path / "run", top1=distilled)
    write_run(run / "labels-only", loss="ce", top1=labels)
    found = page(write_report([run], tmp_path / "report.html"))
    shown = facts(found)
    assert shown["Student, top-1"] == (f"{100 * distilled:.2f} %", "kd")
    assert shown["On labels alone, top-1"][0] == f"{100 * labels:.2f} %"
    assert shown["Distilled − labels alone"] == (difference, "points of top-1, one seed")
    assert difference in found.texts[found.texts.index("Leaderboard") :], "the same figure in the table"
    results = [
        json.loads((folder / "result.json").read_text())["last"]["top1"] for folder in (run, run / "labels-only")
    ]
    assert f"{100 * (results[0] - results[1]):+.2f}" == difference
    (gain,) = [setting["gain"] for setting in found.data["settings"] if setting["gain"]]
    assert gain["mean"] == pytest.approx(results[0] - results[1])


def test_the_headline_of_a_sweep_is_the_best_distilled_student_with_its_paired_gain(tmp_path: Path) -> None:
    """Differences by seed +2, -1, +3 points: mean 4/3, standard deviation 2.0817, t(0.975, 2) = 4.3027."""
    tops = {"kd": (0.90, 0.92, 0.97), "ce": (0.88, 0.93, 0.94)}
    runs = [
        write_run(tmp_path / f"{student}-{loss}-{seed}", student=student, loss=loss, seed=seed, top1=top1 - lost)
        for student, lost in (("vgg8", 0.0), ("resnet8", 0.3))
        for loss, values in tops.items()
        for seed, top1 in enumerate(values)
    ]
    runs.append(write_run(tmp_path / "better", student="resnet20", loss="ce", top1=0.99))
    found = page(write_report(runs, tmp_path / "report.html"))
    shown = facts(found)
    assert shown["Best distilled student, top-1"] == ("93.00 %", "vgg8 · kd, mean of 3 seeds")
    assert shown["On labels alone, top-1"][0] == "91.67 %"
    half = 4.30265 * 2.081666 / 3**0.5
    between = f"{4 / 3 - half:+.2f} to {4 / 3 + half:+.2f}"
    assert shown["Distilled − labels alone"] == (
        "+1.33", f"points of top-1, mean of 3 seeds, 95 % interval {between}",
    )  # fmt: skip
    assert found.texts.count(between) == 2, "a row for each student"
    assert "±\u202f2.08" in found.texts


def test_a_gain_over_fewer_seeds_says_so(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"kd-{seed}", seed=seed, top1=0.9 + 0.01 * seed) for seed in range(4)]
    runs += [write_run(tmp_path / f"ce-{seed}", loss="ce", seed=seed, top1=0.88) for seed in (1, 3)]
    found = page(write_report(runs, tmp_path / "report.html"))
    half = 12.7062 * 2**0.5 / 2**0.5  # the differences are 3 and 5 points
    assert f"{4 - half:+.2f} to {4 + half:+.2f} (2 pairs)" in found.texts


def test_without_runs_on_labels_alone_there_is_no_gain(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), seed=seed) for seed in range(2)]
    found = page(write_report(runs, tmp_path / "report.html"))
    assert not [text for text in found.texts if "Gain" in text or "labels alone" in text]
    assert [setting["gain"] for setting in found.data["settings"]] == [None]


@pytest.mark.parametrize(("nll", "text"), [(3.8e22, "3.80e+22"), (1234.5, "1.23e+03"), (99.5, "99.5000")])
def test_the_likelihood_of_a_student_that_diverged_does_not_widen_the_table(
    tmp_path: Path, nll: float, text: str
) -> None:
    run = write_run(tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    result["last"]["nll"] = nll
    (run / "result.json").write_text(json.dumps(result))
    texts = page(write_report([run], tmp_path / "report.html")).texts
    assert text in texts[texts.index("Leaderboard") :]


def test_the_page_has_the_data_of_the_plots(sweep: Page) -> None:
    settings = sweep.data["settings"]
    assert [setting["label"] for setting in settings[:2]] == ["vgg8 · kd", "vgg8 · labels alone"]
    best = settings[0]
    assert best["top1"]["mean"] == pytest.approx(0.925)
    assert best["costs"]["flops"] == pytest.approx(3.3e6)
    assert [len(trial["curves"]["test_top1"][0]) for trial in best["trials"]] == [20, 20, 20]
    assert best["trials"][1]["curves"]["test_top1"][1][-1] == pytest.approx(best["trials"][1]["top1"], abs=1e-4)
    assert sum(best["reliability"]["count"]) == 3 * 400
    assert sum(sweep.data["classes"]["counts"]) == 400
    mean = sum(a * n for a, n in zip(best["classes"], sweep.data["classes"]["counts"], strict=True)) / 400
    assert mean == pytest.approx(0.925, abs=0.01)  # each seed has other labels
    assert [one["label"] for one in sweep.data["references"]] == ["teacher", "CLIP", "fusion"]


def test_costs_in_the_data_are_exact(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / student, student=student, top1=0.9, parameters=parameters)
        for student, parameters in (("resnet8", 1_234_567), ("resnet20", 1_234_599))
    ]
    settings = page(write_report(runs, tmp_path / "report.html")).data["settings"]
    assert sorted(setting["costs"]["parameters"] for setting in settings) == [1_234_567, 1_234_599]


def test_every_column_sorts(sweep: Page) -> None:
    heads = [attributes for tag, attributes in sweep.elements if (tag, attributes.get("scope")) == ("th", "col")]
    assert all("data-key" in head for head in heads)
    assert "interval" in [head["data-key"] for head in heads]


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    found = page(write_report([write_run(tmp_path / "run", epochs=1000)], tmp_path / "report.html"))
    epochs, values = found.data["settings"][0]["trials"][0]["curves"]["test_top1"]
    assert (epochs[0], epochs[-1], len(epochs), len(values)) == (1, 1000, 160, 160)
    assert epochs == sorted(set(epochs))


def test_the_page_loads_nothing(sweep: Page) -> None:
    for tag, attributes in sweep.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "audio", "video", "source", "base"}, tag
        assert not LOADING & attributes.keys(), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "http" not in sweep.scripts["script"] + sweep.scripts["style"]
    assert "url(" not in sweep.scripts["style"]
    assert "@import" not in sweep.scripts["style"]


def test_the_policy_allows_only_the_script_of_the_page(sweep: Page) -> None:
    (policy,) = [
        attributes["content"] for tag, attributes in sweep.elements if attributes.get("http-equiv") and tag == "meta"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    digest = base64.b64encode(hashlib.sha256(sweep.scripts["script"].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [attributes for _, attributes in sweep.elements if any(name.startswith("on") for name in attributes)]


def test_tables_and_landmarks_are_labelled(sweep: Page) -> None:
    tags = [tag for tag, _ in sweep.elements]
    assert {"header", "nav", "main", "footer", "caption", "h1"} <= set(tags)
    assert tags.count("h1") == tags.count("main") == 1
    assert all("scope" in attributes for tag, attributes in sweep.elements if tag == "th")
    ids = [attributes["id"] for _, attributes in sweep.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = re.findall(r'(?:aria-labelledby|aria-controls)="([^"]*)"', " ".join(map(str, sweep.elements)))
    assert {name for names in pointed for name in names.split()} <= set(ids)
    links = {(attributes.get("href") or "#content")[1:] for tag, attributes in sweep.elements if tag == "a"}
    assert links <= set(ids)


HOSTILE = """</script><img src=x onerror="alert(1)"> {{script}} <!-- & ' " \\u003c $& \u2028 ${x}"""


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    names = tuple(f"{HOSTILE} {label}" for label in range(10))
    runs = [
        write_run(tmp_path / "a", command=f"train-student {HOSTILE}", class_names=names),
        write_run(tmp_path / "b", student=f"timm:{HOSTILE}", top1=0.7, class_names=names),
    ]
    found = page(write_report(runs, tmp_path / "report.html", title=HOSTILE))
    shown = HOSTILE.replace("\u2028", "\\u2028")
    tags = {tag for tag, _ in found.elements}
    assert "img" not in tags
    assert [tag for tag, _ in found.elements].count("script") == 2
    assert found.texts.count(shown) == 2, "in title and heading"
    assert f"train-student {shown}" in found.texts
    assert found.data["classes"]["names"] == [f"{shown} {label}" for label in range(10)]
    assert found.data["settings"][1]["label"] == f"timm:{shown}"


def test_nan_and_infinity_are_left_out_of_the_data(tmp_path: Path) -> None:
    import polars as pl

    run = write_run(tmp_path / "run", finished=False)
    table = pl.read_parquet(run / "metrics.parquet")
    table.with_columns(loss=pl.lit(float("nan")), test_top1=pl.lit(float("inf"))).write_parquet(run / "metrics.parquet")
    found = page(write_report([run], tmp_path / "report.html"))
    assert found.data["settings"][0]["trials"][0]["curves"].keys().isdisjoint({"loss", "test_top1"})


def test_runs_without_predictions(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", predictions=False)
    found = page(write_report([run], tmp_path / "report.html"))
    assert found.data["classes"] is None
    assert found.data["settings"][0]["reliability"] is None
    assert "90.00" in found.texts


def test_without_a_test_split(tmp_path: Path) -> None:
    pictures = tiny_run.write_pictures(tmp_path / "pictures")
    dataset = tiny_run.dataset(pictures).model_dump() | {"test_split": None}
    recipe = tiny_run.recipe(tmp_path, tmp_path / "run", loss={"kind": "ce"}, dataset=dataset, epochs=1)
    train_student(recipe)
    found = page(tmp_path / "run" / "report.html")
    assert found.data["settings"][0]["top1"] is None
    assert "loss" in found.data["settings"][0]["trials"][0]["curves"]


@pytest.mark.medium
def test_train_student_writes_the_page_of_its_run_and_its_twin(tmp_path: Path) -> None:
    pictures = tiny_run.write_pictures(tmp_path / "pictures")
    cache = tiny_run.write_cache(tmp_path / "tiny.zarr", pictures)
    recipe = tiny_run.recipe(cache, tmp_path / "run", epochs=2, compare_with_labels=True)
    result = train_student(recipe)
    found = page(tmp_path / "run" / "report.html")
    assert result.last is not None
    assert result.labels_only is not None
    assert result.labels_only.last is not None
    assert {f"{100 * one.top1:.2f}" for one in (result.last, result.labels_only.last)} <= set(found.texts)
    assert sorted(setting["label"] for setting in found.data["settings"]) == ["kd", "labels alone"]
    assert all(sum(setting["reliability"]["count"]) == 21 for setting in found.data["settings"])
    assert found.data["classes"]["names"] == list(tiny_run.CLASSES)

    (tmp_path / "run" / "report.html").unlink()
    train_student(recipe)
    assert (tmp_path / "run" / "report.html").exists(), "a finished run gets its page when the command runs again"


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no trials"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(NotFoundError, match="no run of train-student here"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
