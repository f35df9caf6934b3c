"""Which files of a folder are images, which are left out and why, and class names that cannot be used."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_tools.errors import DataError
from cache_tools.images import open_images
from cache_tools.images.check import check_new_images
from cache_tools.images.folder import FolderImages
from cache_tools.images.formats import Content, identify, is_decodable
from cache_tools.images.summary import HIDDEN
from tests.support.pictures import photo, recipe_for


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    photo(24, 20).save(buffer, kind)
    return buffer.getvalue()


JPEG = encoded("JPEG")


def make(root: Path, files: dict[str, bytes], split: str = "train") -> FolderImages:
    """Write files below `root/split` and open them."""
    for name, data in files.items():
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    images = open_images(recipe_for(root, test_split=None), split)
    assert isinstance(images, FolderImages)
    return images


def names(images: FolderImages) -> list[str]:
    return [str(path.relative_to(images.summary.root)) for path in images.files]


def media(brand: bytes, *compatible: bytes) -> bytes:
    body = b"ftyp" + brand + b"\0\0\0\0" + b"".join(compatible)
    return (4 + len(body)).to_bytes(4, "big") + body + bytes(64)


ENDINGS = ["1.jfif", "2.jpe", "3.JPG", "4", "5.jpg_large", "6.dat", "7.png"]


def test_content_decides_not_the_ending(tmp_path: Path) -> None:
    """Seven JPEGs with seven endings, one without, one that says PNG."""
    images = make(tmp_path, {f"cat/{name}": JPEG for name in ENDINGS} | {"dog/a": JPEG})
    assert names(images) == [f"cat/{name}" for name in sorted(ENDINGS)] + ["dog/a"]
    pixels = images.load(slice(None))
    assert (pixels == pixels[0]).all()
    assert images.notes() == []


@pytest.mark.parametrize(
    "kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "QOI", "ICO", "SGI", "DDS"]
)
def test_every_format_is_known_by_its_first_bytes(tmp_path: Path, kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip("this PIL cannot write it")
    data = encoded(kind)
    assert identify(data[:1024]) == Content({"PPM": "PNM"}.get(kind, kind), True)
    images = make(tmp_path, {"a/picture": data, "b/other": JPEG})
    assert names(images) == ["a/picture", "b/other"]
    assert images.load(slice(0, 1)).std() > 10


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"a photo of a cat\n", "text"),
        ("naïve café\n".encode("latin1") * 9, "text"),
        (b'{"label": 3}', "text"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<!DOCTYPE html>\n<html>", "HTML page"),
        (b"%PDF-1.7\n", "PDF"),
        (b"", "empty"),
        (b"PK\3\4" + bytes(9), "archive"),
        (b"\xd0\xcf\x11\xe0" + bytes(99), "thumbnail database"),
        (b"\x93NUMPY\1\0", "NumPy array"),
        (media(b"isom", b"mp41"), "video"),
        (media(b"qt  "), "video"),
        (media(b"crx "), "camera raw"),
        (bytes(200), "unknown format"),
        (b"BMW is a maker of cars", "text"),
        (b"P3 is the third paragraph", "text"),
        (b"RIFF\0\0\0\0AVI LIST", "video or sound"),
    ],
)
def test_other_files_are_named(data: bytes, name: str) -> None:
    assert identify(data) == Content(name, False)


def test_images_without_a_decoder_are_named(tmp_path: Path) -> None:
    assert identify(media(b"heic")) == identify(media(b"mif1", b"heic")) == Content("HEIC", True)
    assert identify(media(b"avif")) == identify(media(b"mif1", b"miaf", b"avif")) == Content("AVIF", True)
    assert identify(b"\0\0\0\x0cJXL \r\n\x87\n") == Content("JPEG XL", True)
    assert not is_decodable("JPEG XL")
    images = make(tmp_path, {"a/1.jpg": JPEG, "a/2.jxl": b"\xff\x0a" + bytes(40), "b/1.jpg": JPEG, "b/3.NEF": b"II*\0"})
    assert images.summary.left_out == {"a/2.jxl": "JPEG XL (no decoder)", "b/3.NEF": "camera raw (no decoder)"}
    if is_decodable("HEIC"):
        pytest.skip("pillow-heif is installed")
    images = make(tmp_path, {"a/phone.heic": media(b"heic"), "b/phone.jpg": media(b"mif1", b"heic")})
    assert images.notes() == [
        f"{tmp_path}/train: 4 files of 6 left out: 2 HEIC (no decoder) (a/phone.heic, b/phone.jpg); "
        "1 JPEG XL (no decoder) (a/2.jxl); 1 camera raw (no decoder) (b/3.NEF)",
        f"{tmp_path}/train: to read HEIC images, install pillow-heif",
    ]


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    images = make(
        tmp_path,
        {
            "cat/1.jpg": JPEG,
            "cat/notes.txt": b"two cats\n",
            "cat/labels.csv": b"file,label\n1.jpg,cat\n",
            "cat/._1.jpg": b"\0\5\x16\7",
            "cat/.DS_Store": b"\0\0\0\1Bud1",
            "cat/Thumbs.db": b"\xd0\xcf\x11\xe0",
            "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg": JPEG,
            "cat/.thumbnails/1.jpg": JPEG,
            "__MACOSX/cat/._1.jpg": b"\0\5\x16\7",
            "cat/clip.mp4": media(b"isom"),
            "dog/1.jpg": JPEG,
            "dog/empty": b"",
            "README.md": b"Pets\n",
        },
    )
    assert images.class_names == ("cat", "dog")
    assert names(images) == ["cat/1.jpg", "dog/1.jpg"]
    reasons = images.summary.left_out
    assert sorted(reasons.values()).count("hidden or made by a system") == 5  # and __MACOSX is no class
    assert {name: reason for name, reason in reasons.items() if "hidden" not in reason} == {
        "README.md": "text",
        "cat/clip.mp4": "video",
        "cat/labels.csv": "text",
        "cat/notes.txt": "text",
        "dog/empty": "empty",
    }
    assert images.notes() == [
        f"{tmp_path}/train: 10 files of 12 left out: 5 hidden or made by a system (cat/.DS_Store, "
        "cat/._1.jpg, cat/.thumbnails/1.jpg and 2 more); 3 text (README.md, cat/labels.csv, cat/notes.txt); "
        "1 video (cat/clip.mp4); 1 empty (dog/empty)"
    ]
    contents = images.folder_contents()
    assert (contents["images"], len(contents["left_out"])) == (2, 10)


# --- what our own commands wrote ---


def flat(root: Path, files: dict[str, bytes]) -> FolderImages:
    """A training split whose class folders lie directly in `root`."""
    make(root, {"cat/1.jpg": JPEG, "dog/1.jpg": JPEG} | files, split=".")
    images = open_images(recipe_for(root, test_split=None))
    assert isinstance(images, FolderImages)
    return images


@pytest.mark.parametrize(
    ("files", "left_out", "note"),
    [
        (
            ["runs/x/run.json", "runs/x/curves.png"],
            {"runs/x": "run of train-student"},
            "1 run of train-student (runs/x)",
        ),
        (
            ["runs/x/run.json", "runs/y/run.json", "runs/y/1.jpg", "runs/.DS_Store", "runs/log.txt"],
            {"runs/x": "run of train-student", "runs/y": "run of train-student"},
            "2 runs of train-student (runs/x, runs/y)",
        ),
        (["mine/run.json", "mine/curves.png"], {"mine": "run of train-student"}, "1 run of train-student (mine)"),
        (
            ["out/s/sweep.yaml", "out/s/a/run.json", "out/s/a/curves.png"],
            {"out/s": "sweep of sweep-students"},
            "1 sweep of sweep-students (out/s)",
        ),
        (
            ["a/b/evaluation.json", "a/b/confusion.png"],
            {"a/b": "evaluation of a student"},
            "1 evaluation of a student (a/b)",
        ),
        (
            ["runs/pets-stats/stats.json", "runs/pets-stats/views/0.parquet", "runs/pets-stats/quadrants.png"],
            {"runs/pets-stats": "analysis of a cache"},
            "1 analysis of a cache (runs/pets-stats)",
        ),
        (["pets.zarr/zarr.json", "pets.zarr/c/0"], {"pets.zarr": "cache"}, "1 cache (pets.zarr)"),
        (
            ["dog/old/run.json", "dog/old/1.png"],
            {"dog/old": "run of train-student"},
            "1 run of train-student (dog/old)",
        ),
    ],
)
def test_our_own_folders_are_no_classes(tmp_path: Path, files: list[str], left_out: dict[str, str], note: str) -> None:
    before = flat(tmp_path, {})
    after = flat(tmp_path, {name: JPEG if name.endswith(("png", "jpg")) else b"{}" for name in files})
    assert after.class_names == ("cat", "dog")
    assert after.content_digest == before.content_digest
    outputs = {name: reason for name, reason in after.summary.left_out.items() if reason not in ("text", HIDDEN)}
    assert outputs == left_out
    assert after.notes()[-1] == f"{tmp_path}: left out: {note}"


def test_a_class_with_a_run_and_an_image_stays_a_class(tmp_path: Path) -> None:
    images = flat(tmp_path, {"owl/runs/x/run.json": b"{}", "owl/1.jpg": JPEG})
    assert images.class_names == ("cat", "dog", "owl")
    with pytest.raises(DataError, match=r"without an image.*1 video"):
        flat(tmp_path, {"yak/runs/x/run.json": b"{}", "yak/1.mp4": media(b"isom")})


def test_a_folder_of_runs_only_has_no_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder of class folders"):
        make(tmp_path, {"runs/x/run.json": b"{}", "runs/x/curves.png": JPEG})


# --- sub-folders ---


def test_images_in_sub_folders_are_merged_with_a_note(tmp_path: Path) -> None:
    images = make(tmp_path, {"cat/1.jpg": JPEG, "cat/old/2.jpg": JPEG, "cat/old/3.jpg": JPEG, "dog/x/y/4.jpg": JPEG})
    assert images.labels.tolist() == [0, 0, 0, 1]
    assert images.notes() == [f"{tmp_path}/train: 3 images in sub-folders of the class folders"]
    check_new_images(images)


@pytest.mark.parametrize(
    "files",
    [
        ["n01/images/1.jpg", "n01/images/2.jpg", "n02/images/1.jpg"],  # Tiny ImageNet
        ["cat/indoor/1.jpg", "cat/outdoor/1.jpg", "dog/indoor/1.jpg", "dog/outdoor/1.jpg"],
        ["cat/a/1.jpg", "cat/b/1.jpg", "dog/1.jpg"],
    ],
)
def test_sub_folders_that_are_no_classes(tmp_path: Path, files: list[str]) -> None:
    images = make(tmp_path, dict.fromkeys(files, JPEG))
    check_new_images(images)
    assert len(images.class_names) == 2


def test_sub_folders_that_look_like_classes_ask_for_a_choice(tmp_path: Path) -> None:
    files = ["animals/cat/1.jpg", "animals/dog/1.jpg", "vehicles/bus/1.jpg", "vehicles/car/a/2.jpg"]
    images = make(tmp_path, dict.fromkeys(files, JPEG))
    with pytest.raises(
        DataError, match=r"animals \(cat, dog\); vehicles \(bus, car\).*sub_folders=classes \(4 classes\)"
    ):
        check_new_images(images)
    merged = open_images(recipe_for(tmp_path, test_split=None, sub_folders="merge"))
    check_new_images(merged)
    assert merged.identity() == images.identity()
    split = open_images(recipe_for(tmp_path, test_split=None, sub_folders="classes"))
    check_new_images(split)
    assert split.class_names == ("a", "bus", "cat", "dog")
    assert [split.class_names[label] for label in split.labels] == ["a", "bus", "cat", "dog"]


def test_classes_of_one_name_in_two_folders_have_their_path(tmp_path: Path) -> None:
    for name in ("left/front/1.jpg", "left/back/1.jpg", "right/front/1.jpg", "right/3.jpg"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(JPEG)
    images = open_images(recipe_for(tmp_path, test_split=None, sub_folders="classes"))
    assert images.class_names == ("back", "left/front", "right", "right/front")


def test_the_folder_above_the_classes_is_refused(tmp_path: Path) -> None:
    images = make(tmp_path, {"images/1.jpg": JPEG, "images/2.jpg": JPEG})
    with pytest.raises(DataError, match=r"only one class.*images"):
        check_new_images(images)


def test_layouts_that_are_not_class_folders(tmp_path: Path) -> None:
    for name in ("1.jpg", "2", "3.png"):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(JPEG)
    with pytest.raises(
        DataError, match=r"the image 1\.jpg and 2 more beside no sub-folder.*Make a folder for each class"
    ):
        open_images(recipe_for(tmp_path))
    other = tmp_path / "other"
    for name in ("Training/a", "Training/b", "val/a", "val/b"):
        (other / name).mkdir(parents=True)
        (other / name / "1.jpg").write_bytes(JPEG)
    with pytest.raises(DataError, match=r"the folders Training, val.*dataset\.split=Training"):
        open_images(recipe_for(other))
    with pytest.raises(DataError, match=r"dataset\.test_split=val"):
        open_images(recipe_for(other, split="Training"), "test")
    with pytest.raises(DataError, match=r"dataset\.test_split=null"):
        open_images(recipe_for(other / "val"))


def test_an_empty_class_folder_is_an_error_in_training_only(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / "cat" / "1.jpg").write_bytes(JPEG)
        (tmp_path / split / "dog" / "movie.mp4").write_bytes(media(b"isom"))
    with pytest.raises(
        DataError, match=r"without an image.*dog.*found 1 video \(dog/movie\.mp4\).*Fill it, or remove it"
    ):
        open_images(recipe_for(tmp_path))
    assert open_images(recipe_for(tmp_path), "test").class_names == ("cat",)


# --- names ---


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", b"Stra\xdfe", "日本".encode("shift_jis")])
def test_class_names_that_are_not_utf8_are_refused(tmp_path: Path, name: bytes) -> None:
    make(tmp_path, {"eau/1.jpg": JPEG})
    folder = os.path.join(os.fsencode(tmp_path), b"train", name)
    os.makedirs(folder)
    Path(os.fsdecode(folder), "1.jpg").write_bytes(JPEG)
    with pytest.raises(DataError, match=r"not UTF-8.*convmv") as caught:
        open_images(recipe_for(tmp_path, test_split=None))
    assert ascii(name)[1:] in str(caught.value).replace("\\\\", "\\")


def test_file_names_may_be_anything(tmp_path: Path) -> None:
    wanted = [b"caf\xe9.jpg", b"two\nlines.jpg", b" blank .jpg", b"tab\t.jpg", b"x" * 250 + b".jpg", "é.jpg".encode()]
    for folder in (b"cat", b"dog"):
        os.makedirs(os.path.join(os.fsencode(tmp_path), b"train", folder))
        for name in wanted:
            Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"train", folder, name))).write_bytes(JPEG)
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"train", b"cat", b"not\xe9s.txt"))).write_bytes(b"text")
    images = open_images(recipe_for(tmp_path, test_split=None))
    assert len(images) == 2 * len(wanted)
    check_new_images(images)
    assert "not\\udce9s.txt" in images.notes()[0]  # escaped: printable anywhere
    assert images.load(slice(None)).shape == (12, 3, 32, 32)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("cat\n", "dog"), r"control character.*'cat\\n'"),
        (("a\tb", "dog"), r"control character"),
        (("caf\u00e9", "cafe\u0301"), r"look the same.*'cafe\\u0301' and 'caf\\xe9'"),
        (("cat", "cat "), r"look the same.*'cat' and 'cat '"),
        (("red  fox", "red fox"), r"look the same"),
    ],
)
def test_class_names_that_nobody_can_read(tmp_path: Path, names: tuple[str, str], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        make(tmp_path, {f"{name}/1.jpg": JPEG for name in names})


def test_odd_class_names_that_work(tmp_path: Path) -> None:
    odd = ["A", "a", "cafe\u0301", "x" * 200, "日本", "it's; a $test", "-dash"]
    images = make(tmp_path, {f"{name}/1.jpg": JPEG for name in odd})
    assert images.class_names == tuple(sorted(odd))


def test_a_data_dir_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    root = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9"))
    for name in ("cat", "dog"):
        Path(root, "train", name).mkdir(parents=True)
        Path(root, "train", name, "1.jpg").write_bytes(JPEG)
    with pytest.raises(DataError, match=r"not UTF-8.*caf\\udce9"):
        open_images(recipe_for(Path(root), test_split=None))
    (tmp_path / "link").symlink_to(root)
    assert len(open_images(recipe_for(tmp_path / "link", test_split=None))) == 2


def test_the_keys_of_ordinary_folders_have_not_changed(tmp_path: Path) -> None:
    """The digest that version 0.1 stored for these files."""
    files = {f"{c}/{i}.ppm": b"P6 2 2 255\n" + bytes([i, c == "dog"] * 6) for c in ("cat", "dog") for i in range(3)}
    images = make(tmp_path, files)
    assert images.content_digest == "aabd3d213d1f16c6151bd786268cc4ad"
    assert np.array_equal(images.labels, [0, 0, 0, 1, 1, 1])
