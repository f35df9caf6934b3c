"""`cache-tools pack-images`: the same samples as the folder's, in tar files that anybody can read."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from typer.testing import CliRunner

from cache_tools.cli import app
from cache_tools.errors import DataError, RecipeError, StorageError
from cache_tools.images import open_images, webdataset
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.image_set import sample_key
from cache_tools.images.own_folder import read_own_folder
from cache_tools.images.pack import Pack, pack_images
from cache_tools.images.recipe import DatasetRecipe
from tests.support import hf_files, tiny_run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return tiny_run.write_pictures(tmp_path / "pictures", train=9, test=4)


def opened(place: Path, split: str = "train", name: str = "webdataset", **settings: Any) -> EncodedImages:
    images = open_images(DatasetRecipe(name=name, data_dir=place, image_size=tiny_run.SIDE, **settings), split)
    assert isinstance(images, EncodedImages)
    return images


def packed(folder: Path, out: Path, **settings: Any) -> Pack:
    return pack_images(folder, out, **settings)


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_a_pack_of_files_as_they_are_is_the_folder(pictures: Path, tmp_path: Path, shard_bytes: int) -> None:
    pack = packed(pictures, tmp_path / "pack", shard_bytes=shard_bytes)
    assert len(pack.splits["train"].shards) == (9 if shard_bytes == 1 else 1)
    for split in ("train", "test"):
        found, wanted = opened(tmp_path / "pack", split), opened(pictures, split, "folder")
        assert found.content_digest == wanted.content_digest
        assert np.array_equal(found.load(slice(None)), wanted.load(slice(None)))
        assert [found.read(row) for row in range(len(found))] == [wanted.read(row) for row in range(len(wanted))]
        assert found.identity().reduced is None
    own = read_own_folder(tmp_path / "pack").dataset
    assert (own["name"], own["split"], own["test_split"]) == ("webdataset", "train", "test")


def test_a_pack_or_a_list_in_place_of_a_folder_is_named(pictures: Path, tmp_path: Path) -> None:
    packed(pictures, tmp_path / "pack")
    (tmp_path / "list.csv").write_text("path,label\n")
    for place, message in (("pack", "tar shards, not .*name=webdataset"), ("list.csv", "lists .*, not .*name=csv")):
        with pytest.raises(DataError, match=message):
            opened(tmp_path / place, name="folder")


def test_a_damaged_shard_does_not_ask_for_patience_alone(pictures: Path, tmp_path: Path) -> None:
    packed(pictures, tmp_path / "pack")
    shard = tmp_path / "pack" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1  # in the first image, behind its header
    shard.write_bytes(data)
    with pytest.raises(DataError, match="tar shard differs from the index"):
        opened(tmp_path / "pack").load(slice(0, 1))


def test_opening_a_pack_reads_no_shard(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(pictures, tmp_path / "pack")
    monkeypatch.setattr(webdataset, "read_samples", None)
    with_index = opened(tmp_path / "pack")
    monkeypatch.undo()
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "other-home"))
    (tmp_path / "pack/index.parquet").unlink()
    without = opened(tmp_path / "pack")
    assert with_index.content_digest == without.content_digest
    assert with_index.columns.equals(without.columns)  # type: ignore[attr-defined]


def test_an_index_beside_other_shards_is_not_believed(pictures: Path, tmp_path: Path) -> None:
    packed(pictures, tmp_path / "pack", shard_bytes=1)
    [one, two] = [tmp_path / f"pack/train-00000{number}.tar" for number in (3, 4)]
    two.write_bytes(one.read_bytes() + bytes(10240))
    found = opened(tmp_path / "pack")
    assert found.keys[4].tobytes() == found.keys[3].tobytes()
    assert found.load(slice(None)).shape[0] == 9


def test_tar_reads_a_pack(pictures: Path, tmp_path: Path) -> None:
    """As WebDataset has it: consecutive files with one key, the image and the number of its class."""
    packed(pictures, tmp_path / "pack")
    listing = subprocess.run(
        ["tar", "-tf", str(tmp_path / "pack/train-000000.tar")], capture_output=True, text=True, check=True
    ).stdout.split()
    assert listing == [
        f"{file.parent.name}/{file.stem}.{end}"
        for file in sorted((pictures / "train").glob("*/*"))
        for end in ("png", "cls")
    ]
    index = pl.read_parquet(tmp_path / "pack/index.parquet").filter(pl.col("shard") == "train-000000.tar")
    assert json.loads((tmp_path / "pack/classes.json").read_text()) == list(tiny_run.CLASSES)
    with tarfile.open(tmp_path / "pack/train-000000.tar") as tar:
        images = [member for member in tar if member.name.endswith(".png")]
        for member, row in zip(images, index.iter_rows(named=True), strict=True):
            data = tar.extractfile(member).read()
            label = tar.extractfile(member.name.replace(".png", ".cls")).read().decode()
            assert (member.offset_data, member.size, member.name) == (row["offset"], row["size"], row["name"])
            assert sample_key(data) == b"".join(row[half].to_bytes(8, "big") for half in ("key_high", "key_low"))
            assert tiny_run.CLASSES[int(label)] == member.name.partition("/")[0]
            assert (label, row["height"], row["width"]) == (row["label"], tiny_run.SIDE, tiny_run.SIDE)


def test_names_that_tar_samples_cannot_have(tmp_path: Path) -> None:
    names = ["a.b.png", "a_b.png", "a_b.jpg", "none", "ü" * 60 + ".png", "deep/" + "d" * 120 + "/x.PNG"]
    for number, name in enumerate(names):
        for label in ("c.1", "d"):
            path = tmp_path / "photos" / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8 + number), (number, 9, 9)).save(path, "PNG")
    packed(tmp_path / "photos", tmp_path / "pack", sub_folders="merge")
    found = opened(tmp_path / "pack", test_split=None)
    wanted = opened(tmp_path / "photos", "train", "folder", test_split=None, sub_folders="merge")
    assert len(found) == 12
    assert found.content_digest == wanted.content_digest
    assert found.class_names == ("c.1", "d")


def test_smaller_images_are_another_data_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, size in enumerate([(64, 32), (20, 20), (30, 300), (16, 40)]):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    pack = packed(tmp_path / "photos", tmp_path / "pack", max_side=32, quality=80)
    assert (pack.splits["train"].reduced, pack.splits["train"].samples) == (3, 4)
    found = opened(tmp_path / "pack", test_split=None)
    wanted = opened(tmp_path / "photos", "train", "folder", test_split=None)
    assert found.identity().reduced == (32, 80)
    assert "reduced" not in wanted.identity().model_dump(mode="json")
    sizes = []
    for row in range(4):
        with Image.open(io.BytesIO(found.read(row))) as small, Image.open(io.BytesIO(wanted.read(row))) as large:
            sizes.append(small.size)
            if max(large.size) <= 32:
                assert found.read(row) == wanted.read(row)
                continue
            buffer = io.BytesIO()
            scale = 32 / max(large.size)
            small_size = tuple(max(1, round(side * scale)) for side in large.size)
            large.resize(small_size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)  # type: ignore[arg-type]
            assert found.read(row) == buffer.getvalue()
    assert sorted(sizes) == [(3, 32), (13, 32), (20, 20), (32, 16)]


def test_the_same_pack_again_writes_nothing(pictures: Path, tmp_path: Path) -> None:
    packed(pictures, tmp_path / "pack")
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in (tmp_path / "pack").iterdir()}
    assert packed(pictures, tmp_path / "pack").existed
    assert {file.name: (file.stat().st_ino, file.read_bytes()) for file in (tmp_path / "pack").iterdir()} == before
    for change in ({"max_side": 8}, {"class_order": "reversed"}):
        with pytest.raises(StorageError, match="something else is where the pack should be"):
            packed(pictures, tmp_path / "pack", **change)
    (tmp_path / "pack/train-000000.tar").write_bytes(b"")
    with pytest.raises(StorageError, match="something else"):
        packed(pictures, tmp_path / "pack")
    assert {path.name for path in tmp_path.iterdir()} <= {"pack", "pictures", "home"}


def test_equal_folders_give_equal_packs(pictures: Path, tmp_path: Path) -> None:
    packed(pictures, tmp_path / "one")
    os.utime(pictures / "train/red/002.png")
    packed(pictures, tmp_path / "two")
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two


def test_a_full_disk_leaves_nothing(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cache_tools.images import pack

    def fail(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack, "_add", fail)
    with pytest.raises(OSError, match="No space"):
        packed(pictures, tmp_path / "pack")
    assert {path.name for path in tmp_path.iterdir()} <= {"pictures", "home"}


def test_a_hugging_face_data_set_can_be_packed(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    hf_files.save_to_disk(hf_files.folder_tables(pictures), tmp_path / "saved")
    pack = packed(tmp_path / "saved", tmp_path / "pack")
    assert {name: split.samples for name, split in pack.splits.items()} == {"train": 9, "test": 4}
    for split in ("train", "test"):
        wanted = opened(tmp_path / "saved", split, "hf")
        assert opened(tmp_path / "pack", split).content_digest == wanted.content_digest


def test_what_cannot_be_packed_is_one_error(pictures: Path, tmp_path: Path) -> None:
    packed(pictures, tmp_path / "pack")
    with pytest.raises(DataError, match=r"can be packed .*webdataset files"):
        packed(tmp_path / "pack", tmp_path / "again")
    (pictures / "train/red/bad.png").write_bytes((pictures / "train/red/002.png").read_bytes()[:-30])
    (pictures / "train/red/worse.png").write_bytes(b"no image at all")
    kept = packed(pictures, tmp_path / "kept")  # as they are
    assert (kept.splits["train"].samples, kept.splits["train"].unreadable) == (11, 1)
    with pytest.raises(DataError, match=r"2 damaged images.*bad.png"):
        packed(pictures, tmp_path / "small", max_side=8)
    nested = tmp_path / "nested"
    for name in ("a/x", "a/y", "b/z"):
        (nested / name).mkdir(parents=True)
        (nested / name / "1.png").write_bytes((pictures / "train/red/002.png").read_bytes())
    with pytest.raises(DataError, match="look like classes of their own"):
        packed(nested, tmp_path / "n")
    assert len(packed(nested, tmp_path / "n", sub_folders="classes").splits["train"].shards) == 1
    (tmp_path / "c.zarr").mkdir()
    (tmp_path / "c.zarr/zarr.json").write_text("{}")
    with pytest.raises(RecipeError, match="cache and no folder of images"):
        packed(tmp_path / "c.zarr", tmp_path / "x")


def test_the_command(pictures: Path, tmp_path: Path) -> None:
    command = ("pack-images", str(pictures), str(tmp_path / "pack"))
    result = CliRunner().invoke(app, command)
    text = result.output
    assert result.exit_code == 0, text
    assert "train: 9 images in 1 shard" in text
    assert f"next: build-cache {tmp_path}/pack --teacher …" in text
    report = json.loads(CliRunner().invoke(app, (*command, "--json")).output)
    assert (report["existed"], report["splits"]["test"]["samples"]) == (True, 4)
    for options in (["--quality", "80"], ["--shard-size", "10"], ["--sub-folders", "x"]):
        result = CliRunner().invoke(app, (*command, *options))
        assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output


def test_several_labels_are_refused(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow as pa

    images = [file.read_bytes() for file in sorted(pictures.glob("train/*/*"))]
    table = hf_files.image_table(images, [0] * len(images), ["a", "b"])
    table = table.set_column(1, "label", pa.array([["a", "b"]] * len(images))).replace_schema_metadata(None)
    hf_files.save_one(table, tmp_path / "m", "train")
    with pytest.raises(RecipeError, match="only images with one label each"):
        packed(tmp_path / "m", tmp_path / "pack")


@pytest.mark.parametrize("max_side", [None, 8])
def test_damaged_images_can_be_left_out(pictures: Path, tmp_path: Path, max_side: int | None) -> None:
    """The pack holds what `on_bad_image: skip` would use of the folder, and names what is missing."""
    damaged = [pictures / "train" / "red" / "002.png", pictures / "test" / "blue" / "000.png"]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:200])
    command = ["pack-images", str(pictures), str(tmp_path / "pack"), *(["--max-side", "8"] if max_side else [])]
    if max_side is not None:
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code == 2
        assert all(path.name in refused.stderr for path in damaged)
        assert "--on-bad-image skip" in refused.stderr
    done = CliRunner().invoke(app, [*command, "--on-bad-image", "skip"])
    assert done.exit_code == 0, done.stderr
    assert all(path.name in done.stdout for path in damaged)
    assert "train: 8 images" in done.stdout
    if max_side is None:
        found, wanted = opened(tmp_path / "pack"), opened(pictures, name="folder", on_bad_image="skip")
        assert found.content_digest == wanted.content_digest
    assert CliRunner().invoke(app, [*command, "--on-bad-image", "hide"]).exit_code == 2
