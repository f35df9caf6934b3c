"""`cache-tools import`: files of other tools become caches, train students, and are refused where they do not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cache_tools.errors import CacheError, MismatchError
from cache_tools.exchange.plain_pickle import PlainDataError, plain_data
from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from teacher_cache import CachedDataset
from tests.support import tiny_run
from tests.support.in_process import invoke
from tests.support.other_tools import teacher_probabilities, write_ml_dr, write_tinyvit

pytestmark = pytest.mark.medium

COUNT, CLASSES = 30, 3
OF_PICTURES = ("--set", "dataset.image_size=16", "--block-rows", "8")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_pictures(tmp_path_factory.mktemp("data") / "pictures", train=COUNT, test=6)


@pytest.fixture(scope="module")
def labels(pictures: Path) -> np.ndarray:
    return open_images(DatasetRecipe(name="folder", data_dir=pictures, image_size=16)).labels


@pytest.fixture(scope="module")
def names(pictures: Path) -> list[str]:
    """Of the samples in their order, below `train`."""
    root = pictures / "train"
    return [str(file.relative_to(root)) for file in sorted(root.rglob("*.png"))]


def run_import(kind: str, source: Path, dataset: Path | str, out: Path, *options: object) -> Any:
    of_dataset = OF_PICTURES if isinstance(dataset, Path) else ()
    return invoke("cache-tools", "import", kind, source, "--dataset", dataset, *of_dataset, "--out", out, *options)


def imported(kind: str, source: Path, dataset: Path | str, out: Path, *options: object) -> TeacherCache:
    done = run_import(kind, source, dataset, out, *options)
    assert done.exit_code == 0, done.stderr
    return TeacherCache.open(out)


def centred(logits: np.ndarray) -> np.ndarray:
    return logits - logits.mean(axis=-1, keepdims=True)


def written(kind: str, root: Path, labels: np.ndarray, views: int = 3, **options: Any) -> tuple[Path, np.ndarray]:
    p = teacher_probabilities(labels, CLASSES, views)
    if kind == "tinyvit":
        write_tinyvit(root, p, [str(number) for number in range(len(labels))], top=2)
    else:
        write_ml_dr(root, p, top=2, **options)
    return root, p


def filled(p: np.ndarray, top: int) -> np.ndarray:
    """The `top` largest of each row, and the rest of the mass in equal parts for the others: the slow reference."""
    found = np.empty_like(p)
    for place in np.ndindex(p.shape[:-1]):
        kept = np.argsort(-p[place])[:top]
        found[place] = (1 - p[place][kept].sum()) / (p.shape[-1] - top)
        found[place][kept] = p[place][kept]
    return found


# Logits by name


@pytest.mark.parametrize("form", ["path", "with the split", "stem", "parquet", "index", "keys", "order"])
def test_rows_go_to_their_images(form: str, pictures: Path, names: list[str], tmp_path: Path) -> None:
    images = open_images(DatasetRecipe(name="folder", data_dir=pictures, image_size=16))
    logits = np.random.default_rng(0).normal(0, 3, (COUNT, CLASSES)).astype(np.float32)
    order = np.arange(COUNT) if form == "order" else np.random.default_rng(1).permutation(COUNT)
    shuffled = [names[sample] for sample in order]
    classes = {"classes": np.array([images.class_names[number] for number in (2, 0, 1)])}
    columns: dict[str, Any] = {"logits": logits[order][:, [2, 0, 1]], **classes}
    columns |= {
        "path": {"names": np.array(shuffled)},
        "with the split": {"files": np.array([f"train/{name}" for name in shuffled])},
        "stem": {"name": np.array([Path(name).stem for name in shuffled])},
        "index": {"index": order},
        "keys": {"keys": images.keys[order]},
    }.get(form, {})
    file = tmp_path / "logits.npz"
    if form == "parquet":
        file = tmp_path / "logits.parquet"
        pl.DataFrame({"name": shuffled, "logits": logits[order].tolist()}).write_parquet(file)
    else:
        (np.savez_compressed if form == "path" else np.savez)(file, **columns)
    cache = imported("logits-npz", file, pictures, tmp_path / "a.zarr", "--teacher", "my-vit")
    assert cache.recipe.teacher.architecture == "my-vit"
    assert cache.manifest.num_blocks == 4
    np.testing.assert_allclose(cache.read_array("fused_logits", 0), centred(logits), atol=4e-3)
    assert cache.class_names == images.class_names
    dataset = CachedDataset(cache)
    assert dataset[4]["pixel_values"].shape == (3, 16, 16)
    np.testing.assert_allclose(dataset[4]["teacher_logits"], centred(logits)[4], atol=4e-3)


def test_probabilities_and_views_of_our_own(pictures: Path, labels: np.ndarray, tmp_path: Path) -> None:
    p = teacher_probabilities(labels, CLASSES, 2)
    np.savez(tmp_path / "p.npz", logits=p)
    views = ("--values", "probabilities", "--set", "views.ops=[flip]", "--codec", "float32")
    cache = imported("logits-npz", tmp_path / "p.npz", pictures, tmp_path / "p.zarr", *views)
    assert cache.num_views == 2
    for view in range(2):
        np.testing.assert_allclose(
            torch.softmax(torch.tensor(cache.read_array("fused_logits", view)), 1), p[view], atol=1e-6
        )
    assert len(cache.manifest.canaries) > 0, "the pixels of stated views are checked before training"


def _changed(change: str, names: list[str]) -> dict[str, Any]:
    logits = np.random.default_rng(0).normal(0, 3, (COUNT, CLASSES)).astype(np.float32)
    arrays: dict[str, Any] = {"logits": logits, "names": np.array(names)}
    if change == "unknown name":
        arrays["names"] = np.array(["no/such.png", *names[1:]])
    elif change == "missing row":
        arrays = {name: array[1:] for name, array in arrays.items()}
    elif change == "twice":
        arrays["names"] = np.array([names[1], *names[1:]])
    elif change == "too few classes":
        arrays["logits"] = logits[:, :2]
    elif change == "other classes":
        arrays["classes"] = np.array(["a", "b", "c"])
    elif change == "NaN":
        logits[3, 1] = np.nan
    elif change == "probabilities":
        arrays["logits"] = np.full_like(logits, 1 / 3)
    elif change == "pickled":
        arrays["names"] = np.array([{"name": name} for name in names], dtype=object)
    elif change == "fewer without names":
        arrays = {"logits": logits[:7]}
    elif change == "several views":
        arrays["logits"] = np.stack([logits, logits])
    return arrays


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("unknown name", "1 of 30 names are not images of the dataset"),
        ("missing row", "1 of 30 images have no row"),
        ("twice", "1 of 30 images have no row"),
        ("too few classes", "another number of classes"),
        ("other classes", "other class names"),
        ("NaN", "a number is not finite"),
        ("probabilities", "--values probabilities"),
        ("pickled", "objects are never unpickled"),
        ("fewer without names", "fewer rows than images"),
        ("several views", "several views need a recipe"),
    ],
)
def test_one_clear_error(change: str, words: str, pictures: Path, names: list[str], tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **_changed(change, names))
    done = run_import("logits-npz", tmp_path / "bad.npz", pictures, tmp_path / "bad.zarr")
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stderr.count("error:") == 1
    assert not (tmp_path / "bad.zarr").exists()


def test_other_files_are_refused(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1]))
    done = run_import("logits-npz", tmp_path / "a.pkl", pictures, tmp_path / "x.zarr")
    assert done.exit_code == 2
    assert "found a pickle" in done.stderr
    np.savez(tmp_path / "cut.npz", logits=np.zeros((COUNT, CLASSES)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-60])
    assert run_import("logits-npz", tmp_path / "cut.npz", pictures, tmp_path / "x.zarr").exit_code == 2


# TinyViT


def test_tinyvit_views_keep_probabilities_and_seeds(pictures: Path, labels: np.ndarray, tmp_path: Path) -> None:
    p = teacher_probabilities(labels, CLASSES, 2)
    seeds = write_tinyvit(tmp_path / "tv", p, [str(number) for number in range(COUNT)], top=2)
    cache = imported("tinyvit", tmp_path / "tv", pictures, tmp_path / "tv.zarr", "--targets", "views")
    assert cache.targets["fused_logits"].codec.codec == "top-k"
    for view in range(2):
        stored = torch.softmax(torch.tensor(cache.read_array("fused_logits", view)).double(), 1).numpy()
        np.testing.assert_allclose(stored, filled(p[view], 2), atol=8e-3)
        np.testing.assert_array_equal(cache.view_seeds(view), seeds[view])
    copy = tmp_path / "copy.zarr"
    assert invoke("cache-tools", "recode", cache.path, "--codec", "float16", "--out", copy).exit_code == 0
    np.testing.assert_array_equal(TeacherCache.open(copy).view_seeds(1), seeds[1])
    assert invoke("cache-tools", "verify", copy).exit_code == 0


@pytest.mark.parametrize("kind", ["tinyvit", "ml-dr"])
def test_the_mean_over_the_views(kind: str, pictures: Path, labels: np.ndarray, tmp_path: Path) -> None:
    mixed: dict[str, Any] = {} if kind == "tinyvit" else {"mixed": (1,)}
    root, p = written(kind, tmp_path / "files", labels, **mixed)
    expected = filled(p, 2)[[0, 1, 2] if kind == "tinyvit" else [0, 2]].mean(axis=0)
    options = ["--codec", "float32", *(["--unmixed"] if kind == "tinyvit" else [])]
    cache = imported(kind, root, pictures, tmp_path / "mean.zarr", *options)
    assert (cache.num_views, cache.recipe.imported.averaged) == (1, 3)
    mean = torch.softmax(torch.tensor(cache.read_array("fused_logits", 0)).double(), 1)
    np.testing.assert_allclose(mean, expected, atol=1e-3 if kind == "tinyvit" else 1e-6)


@pytest.mark.parametrize("kind", ["tinyvit", "ml-dr"])
def test_a_student_learns_from_the_mean_and_is_refused_the_views(
    kind: str, pictures: Path, labels: np.ndarray, tmp_path: Path
) -> None:
    root, _ = written(kind, tmp_path / "files", labels)
    unmixed = ["--unmixed"] if kind == "tinyvit" else []
    mean = imported(kind, root, pictures, tmp_path / "mean.zarr", *unmixed)
    train = ["--student", "resnet8", "--loss", "kd", "--set", "temperature=1", "--set", "loggers=[]", "--epochs", 1]
    train += ["--set", "compare_with_labels=false", "--device", "cpu"]
    done = invoke("train-student", "--cache", mean.path, *train, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["last"]["top1"] <= 1

    views = imported(kind, root, pictures, tmp_path / "views.zarr", "--targets", "views")
    refused = invoke("train-student", "--cache", views.path, *train, "--out", tmp_path / "no")
    assert refused.exit_code == 2
    assert "the pixels that the teachers saw in these views cannot be made again" in refused.stderr
    assert "--targets mean" in refused.stderr
    assert not (tmp_path / "no").exists()
    with pytest.raises(MismatchError, match="cannot be made again"):
        CachedDataset(views)
    with pytest.raises(MismatchError, match="cannot be made again"):
        views.recipe.views.apply(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), [0], 0)
    assert "cannot be made again" in invoke("cache-tools", "show", views.path).stderr
    assert "not for training" in invoke("cache-tools", "info", views.path).stdout
    assert invoke("cache-tools", "stats", views.path).exit_code == 0
    with pytest.raises(CacheError, match="logits alone"):
        CachedDataset(mean, features=True)


def test_tinyvit_that_may_be_mixed_is_refused(pictures: Path, labels: np.ndarray, tmp_path: Path) -> None:
    root, _ = written("tinyvit", tmp_path / "files", labels)
    done = run_import("tinyvit", root, pictures, tmp_path / "a.zarr")
    assert done.exit_code == 2
    assert "--unmixed" in done.stderr


@pytest.mark.parametrize("damage", ["cut", "class", "key", "half an epoch"])
def test_damaged_tinyvit_files_are_refused(damage: str, pictures: Path, labels: np.ndarray, tmp_path: Path) -> None:
    root, _ = written("tinyvit", tmp_path / "files", labels)
    values = root / "logits_top2_epoch1" / "rank0-values.bin"
    data = bytearray(values.read_bytes())
    if damage == "cut":
        values.write_bytes(data[:-3])
    elif damage == "class":
        data[4:6] = np.int16(CLASSES).tobytes()
        values.write_bytes(data)
    elif damage == "key":
        keys = values.with_name("rank0-keys.txt")
        keys.write_text(keys.read_text().replace("4\n", "4000\n", 1))
    else:
        values.unlink()
    done = run_import("tinyvit", root, pictures, tmp_path / "a.zarr", "--targets", "views")
    assert done.exit_code == 2
    assert "logits_top2_epoch1" in done.stderr
    assert not (tmp_path / "a.zarr").exists()


def test_an_interrupted_import_goes_on(pictures: Path, labels: np.ndarray, tmp_path: Path) -> None:
    root, _ = written("tinyvit", tmp_path / "files", labels)
    cache = imported("tinyvit", root, pictures, tmp_path / "a.zarr", "--targets", "views")
    before = cache.read_array("fused_logits", 2)
    for commit in sorted((cache.path / "commits").glob("c.*"))[5:]:
        commit.unlink()
    done = run_import("tinyvit", root, pictures, tmp_path / "a.zarr", "--targets", "views")
    assert "7 blocks imported, 5 already there" in done.stdout
    np.testing.assert_array_equal(TeacherCache.open(cache.path).read_array("fused_logits", 2), before)
    other = run_import("tinyvit", root, pictures, tmp_path / "a.zarr", "--unmixed")
    assert other.exit_code == 2
    assert "the cache of another recipe is here" in other.stderr


# ml-dr


class _Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_code_in_files_of_ml_dr_never_runs(pictures: Path, labels: np.ndarray, tmp_path: Path) -> None:
    root, _ = written("ml-dr", tmp_path / "files", labels)
    torch.save((3, [_Evil(tmp_path / "ran")]), root / "3.pth.tar", pickle_protocol=4)
    done = run_import("ml-dr", root, pictures, tmp_path / "a.zarr")
    assert done.exit_code == 2
    assert "nothing else is unpickled" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_data(protocol: int) -> None:
    data = [None, True, -3, 1 << 40, 0.5, "é" * 60, (1, 2), [], {}, {"a": [(1, 2.0, None)] * 300}, list(range(70_000))]
    assert plain_data(pickle.dumps(data, protocol)) == data


@pytest.mark.parametrize(
    "data",
    [
        *(pickle.dumps(value, 4) for value in (print, {1}, b"bytes", bytearray(9), np.zeros(2), 1j)),
        b"\x80\x04r\xff\xff\xff\x7f.",  # a memo of two thousand million entries
        b"\x80\x04\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # an array of 2⁴⁰ bytes
        b"\x80\x04]",
        b"",
        b"\x80\x04.",
    ],
)
def test_what_is_no_plain_data_is_refused(data: bytes) -> None:
    with pytest.raises(PlainDataError):
        plain_data(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "not a reinforced dataset of these images"),
        ("joblib", "stored with joblib"),
        ("MobileCLIP", "without classes or logits"),
        ("archive", "Unpack it first"),
        ("number", "expected the number 4"),
        ("all mixed", "every view of an image mixes in another image"),
    ],
)
def test_other_folders_are_refused(change: str, words: str, pictures: Path, labels: np.ndarray, tmp_path: Path) -> None:
    root, _ = written("ml-dr", tmp_path / "files", labels, mixed=(0, 1, 2) if change == "all mixed" else ())
    if change == "missing":
        (root / "7.pth.tar").unlink()
    elif change == "joblib":
        (root / "0.pth.tar").rename(root / "0.jb")
    elif change == "MobileCLIP":
        (root / "00000000.tar").write_bytes(b"")
    elif change == "archive":
        root = tmp_path / "reinforced_data.tar.gz"
        root.write_bytes(b"")
    elif change == "number":
        (root / "4.pth.tar").write_bytes((root / "5.pth.tar").read_bytes())
    done = run_import("ml-dr", root, pictures, tmp_path / "a.zarr")
    assert done.exit_code == 2
    assert words in done.stderr


def test_targets_of_other_images_are_pointed_out(tmp_path: Path) -> None:
    labels = open_images(DatasetRecipe(name="digits")).labels
    logits = np.eye(10, dtype=np.float32)[(labels + 1) % 10] * 9
    np.savez(tmp_path / "wrong.npz", logits=logits)
    done = run_import("logits-npz", tmp_path / "wrong.npz", "digits", tmp_path / "a.zarr")
    assert done.exit_code == 0
    assert "only 0.0% of the targets agree with the labels" in done.stdout
