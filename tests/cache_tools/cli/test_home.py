"""The commands on the cache home and other places."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cache_tools.cli import app
from cache_tools.cli.table import print_table
from cache_tools.home.registry import SUFFIX, CacheRecord
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.next_commands import commands_in
from tests.support.s3_server import new_bucket

pytestmark = pytest.mark.medium

IMAGES = tiny_images()
MANIFEST = tiny_manifest(IMAGES, name="digits")
NAME = f"digits-{MANIFEST.fingerprint[:12]}{SUFFIX}"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with one complete cache."""
    build(tmp_path / "home" / NAME, MANIFEST, IMAGES)
    return tmp_path / "home"


def run(home: Path, *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments), env={"TEACHER_CACHE_HOME": str(home), "COLUMNS": None})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stderr
    return result


def test_pushed_to_a_bucket_and_pulled_into_another_home(home: Path, server: str, tmp_path: Path) -> None:
    bucket = f"s3://{new_bucket()}/caches"
    pushed = json.loads(run(home, "push", "digits", bucket, "--json").stdout)
    assert pushed["target"] == f"{bucket}/{NAME}"
    assert pushed["blocks"] == 15
    assert "0 blocks copied, 15 already there, 0 B written" in run(home, "push", "digits", bucket).stdout
    other = tmp_path / "other"
    run(other, "pull", f"{bucket}/{NAME}")
    assert run(other, "path", "digits").stdout.strip() == str(other / NAME)
    assert "sound: 15 of 15 blocks" in run(other, "verify", "digits").stdout
    assert (
        run(other, "info", "digits").stdout.split("size:")[1].split()[0]
        == (run(home, "info", "digits").stdout.split("size:")[1].split()[0])
    )


def test_caches_of_a_bucket_are_listed_and_described(home: Path, server: str, tmp_path: Path) -> None:
    bucket, other = f"s3://{new_bucket()}/caches", tmp_path / "other"
    assert run(other, "ls", bucket).stdout == f"No caches in {bucket}. Run `build-cache` to make one.\n"
    run(home, "push", "digits", bucket)
    (record,) = json.loads(run(other, "ls", bucket, "--json").stdout)
    assert (record["url"], record["views_done"], record["complete"]) == (f"{bucket}/{NAME}", 3, True)
    header, line = run(other, "ls", bucket, "--complete", "--name", "dig").stdout.splitlines()
    assert header.split()[-1] == "modified"
    assert line.split()[:2] == ["digits", MANIFEST.fingerprint[:12]]
    assert "matches" in run(other, "ls", bucket, "--incomplete").stdout
    remote_info, local_info = run(other, "info", f"{bucket}/{NAME}").stdout, run(home, "info", "digits").stdout
    assert remote_info.splitlines()[0].endswith(f"{bucket}/{NAME}")
    assert remote_info.splitlines()[1:] == local_info.replace(" on disk", " in the store").splitlines()[1:]
    assert not other.exists(), "nothing was staged"


def test_leftovers_of_killed_commands_are_pruned(home: Path) -> None:
    old, young = (home / f".digits.zarr.{digits * 16}.partial" for digits in ("0a", "0b"))
    for folder in (old, young):
        folder.mkdir()
        (folder / "labels").write_bytes(bytes(1000))
    os.utime(old, (0, 0))
    assert f"would remove {old} (1.0 KB; left by a killed command)" in run(home, "prune", "--incomplete").stdout
    assert old.name not in run(home, "prune", "--older-than", "9999d", "--yes").stdout
    assert json.loads(run(home, "prune", "--incomplete", "--yes", "--json").stdout)["leftovers"] == [str(old)]
    assert not old.exists()
    assert (young / "labels").exists()


def test_an_interrupted_copy_is_not_pruned(home: Path) -> None:
    """Without zarr.json it may be anything. The other caches are pruned all the same."""
    (home / "cut.zarr" / "labels").mkdir(parents=True)
    shown = run(home, "prune", "--incomplete", "--keep-size", "0B", "--yes").stdout
    assert "keeping (not a cache: without zarr.json" in shown
    assert (home / "cut.zarr" / "labels").exists()
    assert not (home / NAME).exists()


def test_ls_and_info_show_that_a_cache_is_a_mirror(home: Path, server: str, tmp_path: Path) -> None:
    url, other = f"s3://{new_bucket()}/caches/{NAME}", tmp_path / "other"
    run(home, "push", "digits", url)
    run(other, "stats", url, "--view", "1")
    assert "1/3 staged" in run(other, "ls").stdout
    assert json.loads(run(other, "ls", "--json").stdout)[0]["origin"] == url
    text = run(other, "info", "digits").stdout
    assert f"mirror of:             {url}" in text
    assert "1 of 3 done, the others are staged when needed" in text
    run(other, "stats", "digits")
    assert "3/3" in run(other, "ls").stdout
    assert "staged" not in run(other, "ls").stdout
    run(other, "rm", "digits", "--yes")
    assert {path.name for path in other.iterdir()} <= {".sizes.json"}


def test_copied_to_a_folder_of_caches(home: Path, tmp_path: Path) -> None:
    run(home, "copy", str(home / NAME), str(tmp_path / "share"))
    assert "sound" in run(home, "verify", str(tmp_path / "share" / NAME)).stdout
    run(home, "copy", "digits", str(tmp_path / "one.zarr"))
    assert (tmp_path / "one.zarr" / "zarr.json").exists()


def test_pulled_into_a_folder_of_caches(home: Path, tmp_path: Path) -> None:
    """The cache goes into a subfolder, unless the folder is named like a cache or is one."""
    source, share = str(shutil.move(home / NAME, tmp_path / "source.zarr")), tmp_path / "share"
    (share / "other.zarr").mkdir(parents=True)
    run(home, "pull", source, "--out", str(share))
    assert {path.name for path in share.iterdir()} == {"other.zarr", NAME}
    assert "sound" in run(home, "verify", str(share / NAME)).stdout
    run(home, "pull", source, "--out", str(tmp_path / "one.zarr"))
    one = (tmp_path / "one.zarr").rename(tmp_path / "one")
    for command in (("pull", source, "--out", str(one)), ("push", source, str(one))):
        assert "0 blocks copied, 15 already there" in run(home, *command).stdout
    full = share.rename(tmp_path / "full.zarr")
    assert "the place is taken" in run(home, "pull", source, "--out", str(full), code=2).stderr


def test_the_current_folder_as_a_cache(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "share").mkdir()
    monkeypatch.chdir(home / NAME)
    run(home, "push", ".", str(tmp_path / "share"))
    assert {path.name for path in (tmp_path / "share").iterdir()} == {NAME}
    assert "sound" in run(home, "verify", ".").stdout
    run(home, "rm", ".", "--yes")
    assert not (home / NAME).exists()


def test_only_the_link_to_a_cache_is_removed(home: Path, tmp_path: Path) -> None:
    (home / "link.zarr").symlink_to(home / NAME, target_is_directory=True)
    assert "keeping (a link: the cache is elsewhere)" in run(home, "prune", "--older-than", "0s").stdout
    shown = run(home, "rm", str(home / "link.zarr"), "--yes").stdout
    line, after = shown.splitlines()
    assert line == f"removing the link {home / 'link.zarr'} (the cache stays where it is, in {home / NAME})"
    assert after == "next: cache-tools ls"
    assert not (home / "link.zarr").is_symlink()
    assert "sound" in run(home, "verify", "digits").stdout


def test_prune_reports_that_kept_caches_are_too_large(home: Path) -> None:
    (home / "cut.zarr").mkdir()
    (home / "cut.zarr" / "labels").write_bytes(bytes(3000))
    shown = run(home, "prune", "--keep-size", "2KB", "--yes").stdout
    assert "The cache home is still larger than --keep-size: the caches that were kept take 3.0 KB.\n" in shown
    assert not (home / NAME).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("push", "digits", "nosuch://bucket/x"), "not a URL of an object store"),
        (("push", "nosuch", "/nowhere"), "no such cache (nosuch)"),
        (("pull", "/nowhere/at/all"), "no cache here (/nowhere/at/all)"),
        (
            ("recode", "digits", "--codec", "compact", "--out", "s3://b/c"),
            "to a folder, not to an object store (s3://b/c)",
        ),
        (("prune", "--older-than", "soon"), "expected a time such as 30d"),
        (("prune", "--keep-size", "lots"), "expected a size such as 100GB"),
        (("ls", "/nowhere/at/all"), "no such folder (/nowhere/at/all)"),
        (("verify", "nosuch"), "no such cache (nosuch)"),
        (("rm", "nosuch", "--yes"), "no such cache (nosuch)"),
        (("rm", "s3://bucket/c.zarr"), "only caches on a local disk are removed (s3://bucket/c.zarr)"),
        (("path", "s3://bucket/c.zarr"), "`cache-tools pull s3://bucket/c.zarr` brings it"),
        (("push", "s3://bucket/c.zarr", "/nowhere"), "`cache-tools pull s3://bucket/c.zarr` brings it"),
    ],
)
def test_bad_input_is_one_clear_error(home: Path, arguments: tuple[str, ...], words: str) -> None:
    error = run(home, *arguments, code=2).stderr
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_nothing_is_removed_without_yes(home: Path) -> None:
    assert "Nothing was removed: add --yes." in run(home, "rm", "digits").stdout
    shown = run(home, "prune", "--keep-size", "0B").stdout
    assert f"would remove {home / NAME}" in shown
    assert "Add --yes to remove them." in shown
    assert "No rule given" in run(home, "prune").stdout
    assert (home / NAME).is_dir()
    found = json.loads(run(home, "prune", "--keep-size", "0B", "--yes", "--json").stdout)
    assert found["removed"]
    assert [each["record"]["name"] for each in found["caches"]] == ["digits"]
    assert {path.name for path in home.iterdir()} <= {".sizes.json"}


def test_a_damaged_block_is_found_dropped_and_restored(home: Path) -> None:
    cache = home / NAME
    good = shutil.copytree(cache, home.parent / "good")
    file = cache / "fused_logits" / "c.1.2.0"
    data = bytearray(file.read_bytes())
    data[20] ^= 4
    file.write_bytes(data)
    found = run(home, "verify", "digits", code=1).stdout
    assert "view 1, block 2" in found
    assert "1 problem: 15 of 15 blocks" in found
    assert json.loads(run(home, "verify", "digits", "--json", code=1).stdout)["sound"] is False
    assert "would drop 1 blocks" in run(home, "repair", "digits").stdout
    assert "dropped view 1, block 2" in run(home, "repair", "digits", "--yes").stdout
    assert "sound: 14 of 15 blocks" in run(home, "verify", "digits").stdout
    run(home, "copy", str(good), str(cache))
    assert "sound: 15 of 15 blocks" in run(home, "verify", "digits").stdout


def test_a_half_built_cache_is_copied_in_part(home: Path, tmp_path: Path) -> None:
    half = tiny_manifest(IMAGES, name="half", codec="float32")
    writer = create(home / "half.zarr", half, IMAGES)
    write(writer, tiny_targets(half), writer.missing_blocks()[:2])
    assert "13 blocks are not built yet" in run(home, "push", "half", str(tmp_path / "share")).stdout


def test_a_zarr_group_can_be_a_folder_of_caches(home: Path, tmp_path: Path) -> None:
    (tmp_path / "group").mkdir()
    (tmp_path / "group/zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    for _ in range(2):
        run(home, "copy", str(home / NAME), str(tmp_path / "group"))
    assert [path.name for path in (tmp_path / "group").glob("*.zarr")] == [NAME]


# The list on screens of several widths

TEACHER = "timm:mobilenetv4_conv_small_050.e2400_r224_in1k"


def listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, *names: str) -> list[str]:
    records = [
        CacheRecord(
            name=name, fingerprint=f"{place}" * 64, dataset="folder/train", teacher=TEACHER if place else "resnet8",
            clip="ViT-L-14-quickgelu", views_done=4, views_total=4, size_bytes=1_234_567, modified_s=0.0,
            used_s=time.time() - 3600 * 5, path=Path(name),
        )
        for place, name in enumerate(names)
    ]  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(records)
    return capsys.readouterr().out.splitlines()


def test_a_list_has_fewer_columns_on_a_narrower_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = listed(monkeypatch, capsys, 120, "photos")
    assert wide[0].split() == [
        "name", "fingerprint", "dataset", "teacher", "CLIP", "views", "size", "modified", "used",
    ]  # fmt: skip
    usual = listed(monkeypatch, capsys, 80, "photos")
    assert usual == [
        "name    fingerprint   dataset       teacher  views    size  used",
        "photos  000000000000  folder/train  resnet8    4/4  1.2 MB   5 h",
    ]


@pytest.mark.parametrize("width", [80, 60])
def test_nothing_of_a_list_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    names = ("photos", "flowers-of-the-garden-2024-v10", "a" * 30)
    lines = listed(monkeypatch, capsys, width, *names)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert {*names, "000000000000", "111111111111", TEACHER, "ViT-L-14-quickgelu", "folder/train", "4/4"} <= set(words)
    assert words.count("1.2") == words.count("MB") == 3


# Next commands


def test_commands_end_with_the_next_one(home: Path, tmp_path: Path) -> None:
    there, cache = tmp_path / "my share", str(home / NAME)
    assert commands_in(run(home, "push", "digits", str(there)).stdout) == [["cache-tools", "verify", str(there / NAME)]]
    assert commands_in(run(home, "copy", cache, str(there)).stdout) == [["cache-tools", "verify", str(there / NAME)]]
    other = tmp_path / "home 2"
    pulled = run(other, "pull", str(there / NAME)).stdout
    assert commands_in(pulled) == [["train-student", "--cache", str(other / NAME)]]
    assert commands_in(run(home, "verify", "digits").stdout) == [["train-student", "--cache", "digits"]]
    assert commands_in(run(home, "stats", "digits", "--view", "0").stdout) == [["train-student", "--cache", "digits"]]
    recoded = tmp_path / "re coded.zarr"
    text = run(home, "recode", "digits", "--codec", "float32", "--out", str(recoded)).stdout
    assert commands_in(text) == [["train-student", "--cache", str(recoded)]]


def test_a_list_and_a_page_name_the_next_command_beside_their_lines(home: Path, tmp_path: Path) -> None:
    """On standard error: scripts read the list line by line."""
    shown = run(home, "ls")
    assert "next:" not in shown.stdout
    assert commands_in(shown.stderr) == [["cache-tools", "info", "digits"]]
    page = run(home, "info", "digits")
    assert "next:" not in page.stdout
    assert "test split:" in page.stdout
    assert commands_in(page.stderr) == [["train-student", "--cache", "digits"]]
    there = tmp_path / "my share"
    run(home, "copy", "digits", str(there))
    assert commands_in(run(home, "ls", str(there)).stderr) == [["cache-tools", "info", str(there / NAME)]]
    (home / NAME / "commits" / "c.1.2.0").unlink()
    half = run(home, "info", "digits")
    assert "half-built: run the same build-cache command" in half.stdout
    assert commands_in(half.stderr) == []
    (home / NAME / "zarr.json").write_text("{}")
    assert commands_in(run(home, "ls").stderr) == [["cache-tools", "verify", str(home / NAME)]]


def test_removals_name_the_next_command(home: Path) -> None:
    assert commands_in(run(home, "rm", "digits").stdout) == [["cache-tools", "rm", "digits", "--yes"]]
    assert commands_in(run(home, "prune").stdout) == [["cache-tools", "prune", "--unused-for", "60d"]]
    assert commands_in(run(home, "prune", "--older-than", "9999d").stdout) == [["cache-tools", "ls"]]
    rules = ["--older-than", "0d", "--unused-for", "0d", "--keep-size", "0B", "--incomplete"]
    assert commands_in(run(home, "prune", *rules).stdout) == [["cache-tools", "prune", *rules, "--yes"]]
    assert commands_in(run(home, "rm", "digits", "--yes").stdout) == [["cache-tools", "ls"]]


@pytest.mark.parametrize(("place", "suffix"), [("unpacked-images", "arrow"), ("shards", "tar"), ("pixels", "pixels")])
def test_copies_of_images_that_nobody_reads_are_pruned(home: Path, place: str, suffix: str) -> None:
    folder = home / place
    folder.mkdir()
    names = (f"a.{suffix}", f"b.{suffix}", "notes.txt", f".a.{'0a' * 16}.partial")
    old, young, other, cut = (folder / name for name in names)
    for file in (old, young, other, cut):
        file.write_bytes(bytes(1000))
    for file in (old, other, cut):
        os.utime(file, (0, 0))
    assert old.name not in run(home, "prune", "--keep-size", "1GB", "--yes").stdout
    shown = run(home, "prune", "--unused-for", "60d").stdout
    assert f"would remove {old} (1.0 KB; a copy of images, not read for that long)" in shown
    assert "0 caches, 1.0 KB. Add --yes to remove them." in shown
    found = json.loads(run(home, "prune", "--unused-for", "60d", "--incomplete", "--yes", "--json").stdout)
    assert (found["image_copies"], found["leftovers"], found["bytes"]) == ([str(old)], [str(cut)], 2000)
    assert {file.name for file in folder.iterdir()} == {young.name, other.name}
    assert (home / NAME).is_dir()


def test_a_damaged_cache_is_repaired_next(home: Path) -> None:
    file = home / NAME / "fused_logits" / "c.1.2.0"
    file.write_bytes(file.read_bytes()[:-1])
    assert commands_in(run(home, "verify", "digits", code=1).stdout) == [["cache-tools", "repair", "digits"]]
