"""Teachers whose outputs are not the dataset's classes in their order: the chosen logits are the teacher's own.

A cache of a 1000-class teacher for some of its classes holds the teacher's own logits at those outputs, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache_tools import fusion
from cache_tools.errors import MismatchError, RecipeError, WeightsError
from cache_tools.format.recipe import Preprocessing, TeacherIdentity
from cache_tools.images import open_images
from cache_tools.preprocess import prepare
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from pipeline.networks.class_words import imagenet_ids
from pipeline.networks.stored import load_stored_ensemble
from pipeline.networks.teachers import Teacher, load_teacher
from pipeline.recipe import BuildRecipe, TeacherSpec
from tests.support import fitted_teacher, tiny_build
from train.students import create_student

CPU = torch.device("cpu")
NORMALISATION = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
MANY = tuple(f"thing {number}" for number in range(1000))
PIXELS = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def write(path: Path, outputs: int, architecture: str = "resnet8", **beside: Any) -> Path:
    torch.manual_seed(0)
    torch.save({"state_dict": create_student(architecture, outputs).state_dict(), **beside}, path)
    return path


def load(names: tuple[str, ...], **spec: Any) -> Teacher:
    return load_teacher(TeacherSpec(**{"name": "resnet8"} | spec), names, CPU, (16, 16), NORMALISATION)


def own_logits(path: Path, outputs: int, architecture: str = "resnet8") -> torch.Tensor:
    """What the teacher's own forward pass gives for `PIXELS`, without our class."""
    network = create_student(architecture, outputs).eval()
    network.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    mean, std = NORMALISATION
    with torch.no_grad():
        return network(prepare(PIXELS, Preprocessing(mean=mean, std=std)))


@pytest.mark.parametrize("number", [2, 17, 100, 999])
def test_some_classes_of_a_thousand_bit_for_bit(tmp_path: Path, number: int) -> None:
    path = write(tmp_path / "t.pth", 1000)
    chosen = np.random.default_rng(number).permutation(1000)[:number]
    names = tuple(MANY[output] for output in chosen)
    teacher = load(names, weights=str(path), classes=MANY)
    assert torch.equal(teacher(PIXELS).logits, own_logits(path, 1000)[:, chosen])
    assert teacher.identity.outputs == tuple(chosen.tolist())
    assert teacher.head is not None
    weight, bias = teacher.head
    assert weight.shape == (number, 64)
    torch.testing.assert_close(fusion.linear_logits(teacher(PIXELS).features, weight, bias), teacher(PIXELS).logits)
    assert teacher.notes == (
        f"resnet8 has 1000 classes, and its outputs for the {number} of the dataset are used (teacher.classes)",
    )


def test_all_outputs_in_their_order_need_no_choice(tmp_path: Path) -> None:
    path = write(tmp_path / "t.pth", 5)
    names = ("ant", "bee", "cat", "dog", "elk")
    plain, named = load(names, weights=str(path)), load(names, weights=str(path), classes=names)
    assert named.identity == plain.identity
    assert "outputs" not in plain.identity.model_dump(mode="json")  # fingerprints of earlier caches stay
    assert named.notes == ()


@pytest.mark.parametrize(
    "beside",
    [
        {"class_to_idx": {"elk": 0, "ant": 1, "dog": 2}},
        {"classes": ["elk", "ant", "dog"]},
        {"args": {"class_names": ["elk", "ant", "dog"]}},
    ],
)
def test_names_in_the_checkpoint_set_the_order(tmp_path: Path, beside: dict[str, Any]) -> None:
    path = write(tmp_path / "t.pth", 3, **beside)
    teacher = load(("ant", "dog", "elk"), weights=str(path))
    assert torch.equal(teacher(PIXELS).logits, own_logits(path, 3)[:, [1, 2, 0]])
    [note] = teacher.notes
    assert note.startswith("resnet8 has its classes in another order, and its outputs are put in the dataset's order")
    given = load(("ant", "dog", "elk"), weights=str(path), classes=["dog", "ant", "elk"])
    assert given.identity.outputs == (1, 0, 2)  # the recipe knows better


def test_names_beside_the_checkpoint_set_the_order(tmp_path: Path) -> None:
    path = write(tmp_path / "t.pth", 12)
    names = tuple(sorted(map(str, range(12))))
    assert load(names, weights=str(path)).identity.outputs is None
    (tmp_path / "config.json").write_text(json.dumps({"label_names": list(map(str, range(12)))}))
    assert load(names, weights=str(path)).identity.outputs == (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)


def test_a_run_of_ours_has_its_order_with_it(tmp_path: Path) -> None:
    tiny_build.write_teacher(tmp_path / "run.safetensors", ("red", "blue", "green"))
    teacher = load(("blue", "green", "red"), name=str(tmp_path / "run.safetensors"))
    assert teacher.identity.outputs == (1, 2, 0)
    some = load(("green", "red"), name=str(tmp_path / "run.safetensors"))
    assert some.identity.outputs == (2, 0)
    with pytest.raises(
        WeightsError, match=r"other classes.*expected a class 'black'; found 3 classes: red, blue, green"
    ):
        load(("black", "green", "red"), name=str(tmp_path / "run.safetensors"))


def test_a_folder_of_timm_has_its_names_in_the_config(tmp_path: Path) -> None:
    import timm

    names = ("n02123045", "n01440764", "n01443537")
    network = timm.create_model("resnet10t", num_classes=3)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 3, "label_names": list(names)}
    config["pretrained_cfg"] = {
        "input_size": [3, 32, 32],
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = load(("n01440764", "n01443537", "n02123045"), name=f"local-dir:{tmp_path}")
    assert teacher.identity.outputs == (1, 2, 0)
    assert load(names[:2], name=f"local-dir:{tmp_path}").identity.outputs == (0, 1)


def test_wordnet_ids_name_the_outputs_of_an_imagenet_teacher(tmp_path: Path) -> None:
    path = write(tmp_path / "t.pth", 1000)
    names = tuple(imagenet_ids()[place] for place in (7, 3, 500))
    teacher = load(names, weights=str(path))
    assert torch.equal(teacher(PIXELS).logits, own_logits(path, 1000)[:, [7, 3, 500]])
    assert "imagenet-1k" in teacher.notes[0]
    assert load(names, weights=str(path), classes="imagenet-1k").identity.outputs == (7, 3, 500)


def test_a_head_that_is_not_linear_is_chosen_from_too(tmp_path: Path) -> None:
    class Doubled(torch.nn.Module):
        """Logits that are not a linear function of the features."""

        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 5)

        def forward_features(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            pooled = features.mean((2, 3))
            return pooled if pre_logits else self.head(pooled).square()

        def get_classifier(self) -> torch.nn.Module:
            return self.head

    identity = TeacherIdentity(
        architecture="own",
        weights_digest="0",
        feature_dim=3,
        linear_head=False,
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3),
        outputs=(4, 0),
    )
    network = Doubled()
    whole = Teacher(network, identity.model_copy(update={"outputs": None}))(PIXELS).logits
    chosen = Teacher(network, identity)
    assert torch.equal(chosen(PIXELS).logits, whole[:, [4, 0]])
    assert chosen.head is None


def test_errors_of_given_classes(tmp_path: Path) -> None:
    path = str(write(tmp_path / "t.pth", 5))
    with pytest.raises(
        WeightsError, match=r"does not have a name for each output.*expected 5 names; found 3\. Name all"
    ):
        load(("ant", "bee"), weights=path, classes=["ant", "bee", "cat"])
    with pytest.raises(RecipeError, match=r"teacher\.classes lacks classes.*without bee"):
        load(("ant", "bee"), weights=path, classes=["ant", "b", "cat", "dog", "elk"])
    with pytest.raises(
        WeightsError, match=r"another class count.*expected 2 classes; found 5.*teacher\.classes, a file"
    ):
        load(("ant", "bee"), weights=path)


# Whole caches


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of six classes, a perfect teacher of twelve classes in another order, and the list of these."""
    root = tmp_path_factory.mktemp("outputs")
    fitted_teacher.write_pictures(root / "data", ("ant", "bee", "cat", "dog", "eel", "fox"))
    own = ("x0", "fox", "x1", "ant", "bee", "x2", "dog", "x3", "cat", "x4", "eel", "x5")
    torch.save(fitted_teacher.fitted_weights(root / "data", own), root / "t.pth")
    (root / "classes of t.txt").write_text("\n".join(own))
    return root


def build(root: Path, out: Path, **changes: Any) -> TeacherCache:
    data: dict[str, Any] = {
        "name": "outputs",
        "dataset": {"name": "folder", "data_dir": root / "data", "image_size": fitted_teacher.SIDE},
        "views": {"ops": ["flip"]},
        "num_views": 2,
        "teacher": {"name": "resnet8", "weights": str(root / "t.pth"), "classes": str(root / "classes of t.txt")},
        "clip": {"name": "local-dir:package:digits-clip"},
        "fusion": {"feature_dim": 16, "teacher_weight": 1.0, "feature_weight": 1.0},
        "codec": "float32",
        "batch_size": 16,
        "device": "cpu",
        "out": out,
    }
    return TeacherCache.open(build_cache(BuildRecipe.model_validate(data | changes)).path)


OUTPUTS = [3, 4, 8, 6, 10, 1]


def teachers_own(root: Path, cache: TeacherCache, view: int, batch: int = 16) -> torch.Tensor:
    """The teacher's own logits of a view at the outputs of the dataset's classes."""
    images = open_images(cache.manifest.dataset)
    network = create_student("resnet8", 12).eval()
    network.load_state_dict(torch.load(root / "t.pth", weights_only=True))
    mean, std = cache.manifest.dataset.normalisation
    rows = []
    with torch.no_grad():
        for start in range(0, len(images), batch):
            index = np.arange(start, min(start + batch, len(images)))
            pixels = cache.recipe.views.apply(torch.from_numpy(images.load(index)), index, view)
            rows.append(network(prepare(pixels, Preprocessing(mean=mean, std=std)))[:, OUTPUTS])
    return torch.cat(rows)


@pytest.mark.medium
def test_a_cache_holds_the_teachers_own_logits_bit_for_bit(root: Path, tmp_path: Path) -> None:
    cache = build(root, tmp_path / "fused.zarr")
    assert cache.manifest.preflight is not None
    assert cache.manifest.preflight["teacher_top1"] == 1.0
    for view in range(2):
        stored = cache.load_view(view).logits(torch.arange(cache.num_samples))
        assert torch.equal(stored, fusion.centre_rows(teachers_own(root, cache, view)))
    again = load_stored_ensemble(cache.manifest, open_images(cache.manifest.dataset), CPU, where=cache.path)
    assert again.teachers[0].identity.outputs == tuple(OUTPUTS)


@pytest.mark.medium
def test_components_hold_the_rows_of_the_head(root: Path, tmp_path: Path) -> None:
    """Their logits are computed again from the features, with the head of six rows: equal up to rounding."""
    cache = build(root, tmp_path / "components.zarr", store="components")
    logits = cache.load_view(0).logits(torch.arange(cache.num_samples))
    torch.testing.assert_close(logits, fusion.centre_rows(teachers_own(root, cache, 0)), rtol=1e-5, atol=1e-4)
    state = torch.load(root / "t.pth", weights_only=True)
    stored = cache.constant("teacher_head_weight")
    assert np.array_equal(stored, state["fc.weight"].numpy()[OUTPUTS])


@pytest.mark.medium
def test_a_replay_does_not_need_the_list_of_classes(root: Path, tmp_path: Path) -> None:
    (root / "classes.txt").write_text((root / "classes of t.txt").read_text())
    try:
        cache = build(
            root, tmp_path / "b.zarr", teacher={"name": "resnet8", "weights": str(root / "t.pth")}, num_views=1
        )
    finally:
        (root / "classes.txt").unlink()
    again = load_stored_ensemble(cache.manifest, open_images(cache.manifest.dataset), CPU, where=cache.path)
    assert again.teachers[0].identity.outputs == tuple(OUTPUTS)


@pytest.mark.medium
def test_other_outputs_are_another_cache(root: Path, tmp_path: Path) -> None:
    cache = build(root, tmp_path / "a.zarr", num_views=1)
    swapped = ["x0", "ant", "x1", "fox", "bee", "x2", "dog", "x3", "cat", "x4", "eel", "x5"]
    teacher = {"name": "resnet8", "weights": str(root / "t.pth"), "classes": swapped}
    with pytest.raises(MismatchError):
        build(root, tmp_path / "a.zarr", num_views=1, teacher=teacher, preflight_samples=0)
    assert TeacherCache.open(tmp_path / "a.zarr").manifest.fingerprint == cache.manifest.fingerprint
