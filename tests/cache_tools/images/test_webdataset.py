"""Tar shards: the same samples as the folder's, an index that is refreshed for changed shards only, and bad shards."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from cache_tools.errors import DataError, RecipeError
from cache_tools.files import cache_home
from cache_tools.images import open_images, shard_files, webdataset
from cache_tools.images.image_set import sample_key
from cache_tools.images.index import FOLDER
from cache_tools.images.kinds import source_at
from cache_tools.images.recipe import DatasetRecipe, as_received
from cache_tools.images.shard_files import expand_braces, shard_place, split_of
from cache_tools.images.tar_samples import read_samples
from cache_tools.images.webdataset import ShardImages
from cache_tools.storage import open_place
from cache_tools.system import named
from tests.support import shards, tiny_run
from tests.support.s3_server import has_loopback, new_bucket
from tests.support.turns import turns

Reads = list[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(webdataset, "YOUNG_NS", 0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return tiny_run.write_pictures(tmp_path / "pictures", train=9, test=4)


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    """Three shards of the training pictures and one of the test pictures."""
    shards.write(pictures / "train", tmp_path / "shards", "train", count=3)
    shards.write(pictures / "test", tmp_path / "shards", "test")
    return tmp_path / "shards"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """The shards that are read."""
    names: Reads = []

    def counted(file: Any, size: int, where: str, **options: Any) -> Any:
        names.append(Path(where).name)
        return read_samples(file, size, where, **options)

    monkeypatch.setattr(webdataset, "read_samples", counted)
    return names


def recipe_of(place: Path | str, **settings: Any) -> DatasetRecipe:
    return DatasetRecipe(name="webdataset", data_dir=Path(place), image_size=tiny_run.SIDE, **settings)


def opened(place: Path | str, split: str | None = None, **settings: Any) -> ShardImages:
    images = open_images(recipe_of(place, **settings), split)
    assert isinstance(images, ShardImages)
    return images


def same(found: ShardImages, pictures: Path, split: str = "train") -> None:
    wanted = open_images(tiny_run.dataset(pictures), split)
    assert found.content_digest == wanted.content_digest
    assert np.array_equal(found.load(slice(None)), wanted.load(slice(None)))


# What is read


@pytest.mark.parametrize("label", ["cls", "json"])
def test_shards_of_a_folder_are_the_folder(pictures: Path, tmp_path: Path, label: Any) -> None:
    for split in ("train", "test"):
        shards.write(pictures / split, tmp_path / "s", split, count=2, label=label)
    for split in ("train", "test"):
        same(opened(tmp_path / "s", split), pictures, split)
    part = opened(tmp_path / "s", "train[1::3]")
    assert np.array_equal(part.keys, open_images(tiny_run.dataset(pictures), "train[1::3]").keys)
    again: ShardImages = pickle.loads(pickle.dumps(part))
    assert np.array_equal(again.load(np.array([2, 0])), part.load(np.array([2, 0])))
    assert part.place_of(0) == f"{tmp_path}/s/train-000000.tar/{part.columns['name'][0]}"


@pytest.mark.parametrize(
    "pattern",
    ["train-*.tar", "train-{000000..000002}.tar", "train-00000?.tar", "{train,none}-*.tar", "train-00000{0,1,2}.tar"],
)
def test_patterns_of_shards(pictures: Path, folder: Path, pattern: str) -> None:
    same(opened(folder / pattern, test_split=None), pictures)
    recipe = recipe_of(folder, test_split="test-*.tar", split=pattern)
    assert len(open_images(recipe)) == 9
    assert len(open_images(recipe, "test-*.tar[1:]")) == 3


def test_a_pattern_of_shards_has_no_test_split_of_its_own(pictures: Path, folder: Path) -> None:
    """A word as the test split would test on the training shards."""
    recipe = recipe_of(folder / "train-*.tar")
    assert len(open_images(recipe)) == 9
    with pytest.raises(DataError, match=r"a pattern of shards is one split.*test_split=test.*test-\*\.tar"):
        open_images(recipe, "test")
    assert len(open_images(recipe, "train[:3]")) == 3


def test_shards_may_be_in_folders_of_their_split(pictures: Path, folder: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "nested" / split).mkdir(parents=True)
        for file in folder.glob(f"{split}-*"):
            file.rename(tmp_path / "nested" / split / file.name.removeprefix(f"{split}-"))
    same(opened(tmp_path / "nested"), pictures)
    assert source_at(tmp_path / "nested", "folder") == "webdataset"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000017.tar", "train"), ("train/000017.tar", "train"), ("0001.tar", "train"), ("val.tar", "val"),
        ("imagenet-train-0001.tar", "imagenet-train"), ("train_07-of-12.tar", "train"), ("a/b/test-1.tar", "test"),
    ],
)  # fmt: skip
def test_the_split_of_a_shard(name: str, split: str) -> None:
    assert split_of(name) == split


def test_labels_may_be_numbers_of_named_classes(pictures: Path, tmp_path: Path) -> None:
    shards.write(pictures / "train", tmp_path / "s", "train", label="number")
    assert opened(tmp_path / "s", test_split=None).class_names == ("0", "1", "2")
    same(opened(tmp_path / "s", test_split=None, class_order=tiny_run.CLASSES), pictures)
    (tmp_path / "s/classes.json").write_text('["blue", "green", "red"]')
    same(opened(tmp_path / "s", test_split=None), pictures)
    (tmp_path / "s/classes.json").write_text('["blue", "blue", "red"]')
    with pytest.raises(DataError, match=r"damaged list of class names .*classes.json"):
        opened(tmp_path / "s")


def write_members(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            shards.add(tar, name, data)
    return path


def png(number: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_and_labels_are_chosen_where_several_may_be_meant(tmp_path: Path) -> None:
    members = {
        "a.jpg": png(1), "a.seg.png": png(2), "a.kind.txt": b" x ", "a.json": b'{"label": 7, "colour": "red"}',
        "b.jpg": png(3), "b.seg.png": png(4), "b.kind.txt": b"y", "b.json": b'{"label": 9, "colour": "blue"}',
    }  # fmt: skip
    path = write_members(tmp_path / "s/train.tar", members)
    with pytest.raises(DataError, match=r"several images .*a.jpg, a.seg.png.*dataset.image_column=jpg"):
        opened(path, test_split=None)
    settings: Any = {"test_split": None, "image_column": "seg.png"}
    found = opened(path, **settings)
    assert (found.class_names, found.keys[1].tobytes()) == (("7", "9"), sample_key(png(4)))
    assert opened(path, label_column="colour", **settings).class_names == ("blue", "red")
    assert opened(path, label_column="kind.txt", **settings).class_names == ("x", "y")
    table = pl.concat(
        pl.read_parquet(file).select("height", "width") for file in (cache_home() / FOLDER).iterdir()
    )  # of each choice one
    assert set(table.rows()) == {(6, 8)}


def test_what_is_no_sample_is_listed(pictures: Path, tmp_path: Path) -> None:
    path = write_members(
        tmp_path / "train.tar",
        {"dir/a.png": png(1), "dir/a.cls": b"x", "._a.png": b"junk", "b.cls": b"y", "readme.md": b"text"},
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "dir/a.png"
        tar.addfile(link)
    found = opened(path, test_split=None)
    assert len(found) == 1
    [note] = found.notes()
    assert "3 files of 4 left out" in note
    assert "2 a sample without an image (train.tar/b.cls, train.tar/readme.md)" in note
    assert "1 a link or special file in a shard (train.tar/c.png)" in note
    assert opened(path, test_split=None).notes() == [note]  # from the index


# The index


def test_only_changed_shards_are_read_again(pictures: Path, folder: Path, tmp_path: Path, reads: Reads) -> None:
    opened(folder)
    assert sorted(reads) == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    data = (folder / "train-000001.tar").read_bytes()
    steps: list[tuple[Callable[[], Any], Reads]] = [
        (lambda: None, []),
        (lambda: os.utime(folder / "train-000001.tar", (1, 1)), ["train-000001.tar"]),
        (lambda: write_members(folder / "train-000003.tar", {"x.png": png(9), "x.cls": b"red"}), ["train-000003.tar"]),
        (lambda: (folder / "train-000003.tar").unlink(), []),
        (lambda: (folder / "train-000001.tar").write_bytes(data), ["train-000001.tar"]),
    ]
    for change, expected in steps:
        change()
        reads.clear()
        found = opened(folder)
        assert reads == expected
        opened(folder)
        assert reads == expected
    same(found, pictures)
    names = {file.name for file in (cache_home() / FOLDER).iterdir()}
    assert len(names) == 1


def test_young_shards_are_read_again(folder: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "YOUNG_NS", 3_600_000_000_000)
    opened(folder)
    opened(folder)
    assert len(reads) == 6


@pytest.mark.parametrize("damage", ["text", "columns", "negative"])
def test_a_damaged_index_is_made_again(pictures: Path, folder: Path, reads: Reads, damage: str) -> None:
    opened(folder)
    [path] = (cache_home() / FOLDER).iterdir()
    table = pl.read_parquet(path)
    if damage == "text":
        path.write_text("no parquet")
    else:
        wrong = table.drop("size") if damage == "columns" else table.with_columns(offset=pl.col("offset") * 0 - 1)
        wrong.write_parquet(path)
    reads.clear()
    same(opened(folder), pictures)
    assert len(reads) == 3


def test_an_index_of_other_places_in_the_shard_gives_no_wrong_image(folder: Path) -> None:
    opened(folder)
    [path] = (cache_home() / FOLDER).iterdir()
    table = pl.read_parquet(path)
    table.with_columns(offset=pl.col("offset") + 512).write_parquet(path)
    with pytest.raises(DataError, match="image changed since"):
        opened(folder).load(slice(0, 1))
    table.with_columns(size=pl.col("size") + (1 << 50)).write_parquet(path)
    with pytest.raises(DataError, match=r"shorter than its index says"):
        opened(folder).load(slice(0, 1))


def test_a_shard_that_is_replaced_while_it_is_read_is_noticed(folder: Path) -> None:
    found = opened(folder)
    for shard in folder.glob("train-*"):
        shard.write_bytes(b"")
    with pytest.raises(DataError, match="a shard is shorter than before"):
        found.load(slice(0, 1))


def test_many_samples_are_columns(tmp_path: Path) -> None:
    import tracemalloc

    count, data = 3000, png(1)
    write_members(
        tmp_path / "train.tar",
        {f"{number:06}.{end}": data if end == "png" else b"x" for number in range(count) for end in ("png", "cls")},
    )
    opened(tmp_path / "train.tar", test_split=None)
    tracemalloc.start()
    try:
        images = opened(tmp_path / "train.tar", test_split=None)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(images) == count
    assert held < 200_000 + 40 * count  # keys and labels; the other columns are Arrow's


# Bad shards


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:700], "a damaged shard"),
        (lambda data: data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512), "a shard without an end"),
        (lambda data: b"", "a damaged shard, or no tar file"),
        (lambda data: b"x" * 2000, "a damaged shard, or no tar file"),
        (lambda data: data[:156] + b"\xff" * 20 + data[176:], "a damaged shard, or no tar file"),
        (gzip.compress, r"a compressed shard.*gzip"),
    ],
)
def test_a_damaged_shard_is_one_error(folder: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = folder / "train-000001.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        opened(folder)
    assert "train-000001.tar" in str(caught.value)


@pytest.mark.turns
def test_flipped_bits_are_an_error_or_other_images(pictures: Path, tmp_path: Path) -> None:
    [path] = shards.write(pictures / "test", tmp_path / "s", "train", label="json")
    data, rng, refused = path.read_bytes(), random.Random(7), 0
    for _ in range(turns(40, 2000)):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.randrange(len(data)) if rng.random() < 0.2 else None])
        try:
            found = opened(path, test_split=None)
            keys = [sample_key(found.read(row)) for row in range(len(found))]
            assert keys == [key.tobytes() for key in found.keys]
            found.load(slice(None))
        except DataError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"p", "b.png": b"q", "b.cls": b"x"}, r"1 sample of 2 without a label .*a.png.*dataset.label_column"),
        ({"a.png": b"p", "a.cls": b"  "}, "1 sample of 1 without a label"),
        ({"a.png": b"p", "a.json": b'{"other": 1}'}, "1 sample of 1 without a label"),
        ({"a.png": b"p", "a.json": b"[1]"}, "a file of labels without fields"),
        ({"a.png": b"p", "a.json": b"{"}, "a damaged file of labels"),
        ({"a.png": b"p", "a.json": b'{"label": [1, 2]}'}, "no name and no number"),
        ({"a.png": b"p", "a.cls": b"\xff\xfe"}, "a label that is not UTF-8"),
        ({"a.txt": b"p"}, "shards without an image"),
    ],
)
def test_samples_that_cannot_be_used_are_one_error(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(write_members(tmp_path / "train.tar", members), test_split=None)


def test_damaged_images_are_listed_by_shard_and_name(folder: Path) -> None:
    from cache_tools.images.check import check_images

    write_members(folder / "train-000003.tar", {"x.png": png(9)[:-20], "x.cls": b"red", "y.png": b"", "y.cls": b"red"})
    found = opened(folder)
    with pytest.raises(DataError, match=r"2 damaged images.*an empty file") as caught:
        check_images(found)
    assert "train-000003.tar/x.png" in str(caught.value)
    assert len(opened(folder, on_bad_image="skip")) == 9


def test_missing_shards_and_splits_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such split .*expected files dev-….tar.*found the splits test, train"):
        opened(folder, "dev")
    with pytest.raises(DataError, match=r"2 of 5 shards are missing .*no train-000003.tar, train-000004.tar"):
        opened(folder / "train-{000000..000004}.tar", test_split=None)
    with pytest.raises(DataError, match=r"no shards .*none-\*.tar"):
        opened(folder / "none-*.tar", test_split=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no shards .*no tar file in this folder"):
        opened(tmp_path / "empty")
    with pytest.raises(DataError, match=r"no shards"):
        opened(tmp_path / "gone")


@pytest.mark.parametrize("braces", ["{a}", "{3..1}", "{0..99999999}", "{", "a}"])
def test_braces_without_a_meaning_are_refused(braces: str) -> None:
    with pytest.raises(DataError, match="cannot read the braces"):
        expand_braces(f"s-{braces}.tar", "place")


def test_braces_as_a_shell_has_them() -> None:
    assert expand_braces("{a,b}-{8..10}.tar", "") == [f"{a}-{n}.tar" for a in "ab" for n in (8, 9, 10)]
    assert expand_braces("{008..010}.tar", "") == ["008.tar", "009.tar", "010.tar"]
    assert expand_braces("plain.tar", "") == ["plain.tar"]


def test_a_folder_with_an_archive_beside_its_classes_is_a_folder(pictures: Path, folder: Path) -> None:
    (folder / "train-000000.tar").rename(pictures / "train.tar")
    assert source_at(pictures, "folder") == "folder"
    assert len(open_images(tiny_run.dataset(pictures))) == 9
    assert source_at(folder, "folder") == "webdataset"


# Object stores


@pytest.mark.medium
@pytest.mark.parametrize("how", ["copy", "read"])
def test_shards_of_a_bucket(server: str, pictures: Path, folder: Path, reads: Reads, how: str) -> None:
    url = f"s3://{new_bucket()}/data/set"
    place = open_place(url)
    for file in folder.iterdir():
        place.put(file.name, file.read_bytes())
    settings: Any = {"remote_shards": how}
    for split in ("train", "test"):
        same(opened(url, split, **settings), pictures, split)
    assert len(reads) == 4
    copies = list((cache_home() / shard_files.COPIES).glob("*.tar"))
    assert len(copies) == (4 if how == "copy" else 0)
    same(opened(f"{url}/train-{{000000..000002}}.tar", test_split=None, **settings), pictures)
    reads.clear()
    found = opened(url, **settings)
    assert reads == []  # from the index
    assert pickle.loads(pickle.dumps(found)).read(3) == found.read(3)
    assert found.folder_contents()["folder"] == url
    assert found.place_of(0) == f"{url}/train-000000.tar/{found.columns['name'][0]}"
    place.put("train-000001.tar", (folder / "test-000000.tar").read_bytes())
    assert len(opened(url, **settings)) == 10
    assert reads == ["train-000001.tar"]
    with pytest.raises(DataError, match=r"1 of 2 shards are missing .*no train-000009.tar"):
        opened(f"{url}/train-00000{{0,9}}.tar", test_split=None, **settings)


class FilesWithRanges(SimpleHTTPRequestHandler):
    """Files of a folder, whole or in parts, as web servers give them."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        if self.headers["Range"] is None:
            super().do_GET()
            return
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
        part = data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Last-Modified", self.date_time_string())
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web_server(folder: Path) -> Iterator[str]:
    pytest.importorskip("obstore")
    if not has_loopback():
        pytest.skip("needs the loopback interface")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(FilesWithRanges, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("how", ["copy", "read"])
def test_shards_of_a_web_server(web_server: str, pictures: Path, how: Any) -> None:
    """Which cannot be listed: braces name the shards."""
    url = f"{web_server}/train-{{000000..00000N}}.tar"
    same(opened(url.replace("N", "2"), test_split=None, remote_shards=how), pictures)
    with pytest.raises(DataError, match=r"2 of 5 shards are missing"):
        opened(url.replace("N", "4"), test_split=None, remote_shards=how)


def test_a_url_stays_one_in_recipes() -> None:
    recipe = recipe_of("s3://bucket/a/b")
    assert recipe.model_dump(mode="json")["data_dir"] == "s3://bucket/a/b"
    assert recipe.absolute() == recipe
    assert recipe.title == "b"
    assert str(shard_place(recipe.data_dir or "", "train")) == "s3://bucket/a/b/train-*.tar"
    assert shard_place("https://host/x/t-{0..3}.tar", "t").folder == "https://host/x"
    assert recipe_of("s3://bucket/a/t-{0..3}.tar").title == "a"
    assert source_at(Path("s3://bucket/a"), "folder") == "webdataset"


def test_a_received_file_does_not_choose_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    received = recipe_of("s3://strange-bucket/set/train-*.tar")
    for dataset in (received, recipe_of(tmp_path, test_split="s3://strange-bucket/set/x-{0..1}.tar")):
        with pytest.raises(DataError, match=r"object store that you have not named .*--data-dir s3://strange-bucket"):
            as_received(dataset, "cache")
    named.remember("stores", "s3://strange-bucket/set")
    assert as_received(received, "cache") == received


def test_a_store_needs_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(Exception, match="object stores need the package obstore"):
        opened("s3://bucket/set")
    with pytest.raises((RecipeError, DataError), match=r"no shards|not a URL"):
        opened("/nowhere/set-*.tar", test_split=None)
