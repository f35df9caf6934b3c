"""The preflight: figures of the networks, refusals that say what to do, and notes where the sample is small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.errors import DataError, PreflightError, RecipeError
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import Preprocessing
from cache_tools.images import open_images
from cache_tools.preprocess import prepare
from pipeline.build.cache import build_cache
from pipeline.build.preflight import Preflight, run_preflight
from pipeline.build.verdict import Sample, judge_networks
from pipeline.networks.clip import ClipOutput
from pipeline.networks.ensemble import EnsembleOutput
from pipeline.networks.teachers import TeacherOutput
from pipeline.recipe import BuildRecipe
from tests.support import fitted_teacher
from train.evaluate.canvas import evaluation_preprocessing
from train.evaluate.metrics import predict
from train.students import create_student

DIGITS = tuple(map(str, range(12)))


class Stub:
    """An object with these attributes."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def judged(
    predictions: list[np.ndarray],
    labels: np.ndarray,
    names: tuple[str, ...],
    *,
    teachers: int = 1,
    outputs: tuple[int, ...] | None = None,
    source: str = "folder",
    **fusion: Any,
) -> list[str]:
    """`judge_networks` for predictions of some teachers, then of some CLIPs."""
    clips = len(predictions) - teachers
    weights: dict[str, Any] = {"teacher_weight": 0.7, "feature_weight": 0.7} | fusion
    weights |= {"clip_scales": (1.0,) * clips, "prompt_ensemble": "embedding"}
    weights = {
        "teacher_weights": (1 / max(teachers, 1),) * teachers,
        "clip_weights": (1 / max(clips, 1),) * clips,
    } | weights
    identity = Stub(architecture="net", outputs=outputs)
    clip = Stub(architecture="clip", templates=("a photo of a {}",), class_names=names)
    ensemble: Any = Stub(
        teachers=[Stub(identity=identity)] * teachers, clips=[Stub(identity=clip)] * clips, fusion=Fusion(**weights)
    )
    images: Any = Stub(class_names=names, name=source)
    return list(judge_networks(ensemble, Sample(images, labels), np.array(predictions)))


LABELS = np.repeat(np.arange(12), 10)
NAMES = tuple(sorted(DIGITS))
NATURAL = np.array([DIGITS.index(NAMES[label]) for label in LABELS])  # of a perfect teacher in natural order


def test_another_order_is_refused_with_both_figures_and_the_setting() -> None:
    with pytest.raises(
        PreflightError,
        match=r"classes in another order than it is used in \(net\); expected 100\.0% right on 120 images of 12 "
        r"classes, with its outputs in natural order.*found 16\.7% as they are\. Set teacher\.classes=natural, or "
        r"dataset\.class_order=natural",
    ):
        judged([NATURAL, LABELS], LABELS, NAMES)


def test_every_teacher_has_its_own_order() -> None:
    with pytest.raises(
        PreflightError, match=r"net, teacher 2 of 2.*Set teacher\.1\.classes=natural; `--set pre"
    ) as caught:
        judged([LABELS, NATURAL, LABELS], LABELS, NAMES, teachers=2)
    assert "class_order" not in str(caught.value)  # it would be wrong for the first teacher
    with pytest.raises(PreflightError, match=r"Set teacher\.classes=natural; `--set") as caught:
        judged([NATURAL], LABELS, NAMES, source="cifar10")


def test_a_wrong_setting_is_found_too() -> None:
    outputs = tuple(DIGITS.index(name) for name in NAMES)
    used = np.array([outputs.index(label) for label in LABELS])
    with pytest.raises(PreflightError, match=r"in sorted order; found 16\.7%.*teacher\.classes=sorted"):
        judged([used], LABELS, NAMES, outputs=outputs)


def test_an_order_of_ones_own_is_refused_with_advice() -> None:
    shuffled = np.random.default_rng(3).permutation(12)[LABELS]
    with pytest.raises(
        PreflightError, match=r"no better than chance.*best order it has 100\.0% right.*teacher\.classes=FILE"
    ):
        judged([shuffled], LABELS, NAMES)


def test_a_guessing_teacher_is_refused_with_a_figure_that_can_be_reached() -> None:
    guesses = np.random.default_rng(0).integers(0, 12, 120)
    with pytest.raises(
        PreflightError, match=r"top-1 of at least (\d+\.\d)% on 120 images.*chance gives .*mean and std"
    ):
        judged([guesses], LABELS, NAMES)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [1], [0, 0, 0]])
def test_perfect_networks_pass_small_samples(labels: list[int]) -> None:
    right = np.array(labels)
    notes = judged([right, right], right, ("ant", "bee"))
    assert all("so few images cannot tell" in note for note in notes)


def test_small_samples_decide_nothing_and_say_so() -> None:
    labels = np.array([0, 0, 1, 1])
    assert judged([1 - labels[[0, 2, 1, 3]], labels], labels, ("ant", "bee")) == [
        "the teacher has 2 of 4 images of 2 classes right, which so few images cannot tell from chance (50.0%)",
        "CLIP has 4 of 4 images of 2 classes right, which so few images cannot tell from chance (50.0%)",
    ]


def test_clip_is_judged_as_the_teacher_is() -> None:
    useless = np.arange(1200) % 2
    labels = np.repeat(np.arange(12), 100)
    with pytest.raises(
        PreflightError,
        match=r"CLIP is no better than chance.*\(clip\).*chance gives 8\.3%; found 8\.3%, with prompts such as "
        r"'a photo of a 0'\. Give it English words.*clip\.class_names.*clip: null",
    ):
        judged([labels, useless], labels, NAMES)
    with pytest.raises(PreflightError, match=r"clip, CLIP 2 of 2.*clip\.1\.class_names"):
        judged([labels, labels, useless], labels, NAMES)


@pytest.mark.parametrize(("place", "who", "step"), [(0, "the teacher", "mean and std"), (1, "CLIP", "its tokenizer")])
def test_a_network_that_always_says_the_same_is_called_so(place: int, who: str, step: str) -> None:
    labels = np.repeat(np.arange(12), 100)
    predictions = [labels, labels]
    predictions[place] = np.full(1200, 3)
    with pytest.raises(PreflightError, match=f"{who} gives the same class for every image.*found '{NAMES[3]}'.*{step}"):
        judged(predictions, labels, NAMES)


@pytest.mark.parametrize(
    ("fusion", "refused"),
    [
        ({"teacher_weight": 1.0, "feature_weight": 1.0}, False),
        ({"teacher_weight": 1.0, "feature_weight": 0.9}, True),
        ({"teacher_weight": 0.9, "feature_weight": 1.0}, True),
        ({"clip_weights": (1.0, 0.0)}, False),
    ],
)
def test_networks_without_weight_are_not_judged(fusion: dict[str, Any], refused: bool) -> None:
    labels = np.repeat(np.arange(12), 100)
    constant = np.zeros(1200, np.int64)
    predictions = [labels, labels, constant] if "clip_weights" in fusion else [labels, constant]
    if refused:
        with pytest.raises(PreflightError, match="CLIP gives the same class for every image"):
            judged(predictions, labels, NAMES, **fusion)
    else:
        assert judged(predictions, labels, NAMES, **fusion) == []


def test_a_teacher_without_weight_is_not_judged() -> None:
    labels = np.repeat(np.arange(12), 100)
    constant = np.zeros(1200, np.int64)
    assert judged([constant, labels], labels, NAMES, teacher_weight=0.0, feature_weight=0.0) == []


# What the networks are shown, and what they answer


class Shown:
    """A teacher and a CLIP of given outputs, which keep the pixels that they are shown."""

    device = torch.device("cpu")
    sources = ("teacher", "clip", "fusion")
    fusion = Fusion(
        teacher_weight=0.7,
        feature_weight=0.7,
        teacher_weights=(1.0,),
        clip_weights=(1.0,),
        clip_scales=(1.0,),
        prompt_ensemble="embedding",
    )

    def __init__(self, *, teacher: float = 0.0, clip: float = 0.0, precision: str = "float32") -> None:
        network = Stub(identity=Stub(architecture="net", outputs=None), precision=precision)
        self.teachers = self.clips = (network,)
        self.values, self.shown = (teacher, clip), list[torch.Tensor]()

    def outputs(self, pixels: torch.Tensor) -> EnsembleOutput:
        self.shown.append(pixels)
        teacher, clip = (torch.full((len(pixels), 3), value) for value in self.values)
        finite = torch.zeros(len(pixels), 3)
        return EnsembleOutput((TeacherOutput(finite, teacher),), (ClipOutput(clip, finite),))

    def source_logits(self, teachers: Any, clips: Any) -> list[torch.Tensor]:
        return [teachers[0].logits] * 3

    def scaled_logits(self, clips: Any) -> list[torch.Tensor]:
        return [clips[0].cosine]


class Noise:
    """Five images of 16 × 16 of three classes, in the interface that the preflight uses."""

    name, split, class_names, image_size = "noise", "train", ("a", "b", "c"), (16, 16)
    labels = np.array([0, 1, 2, 0, 1])
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)

    def __len__(self) -> int:
        return 5

    def load(self, rows: Any) -> np.ndarray:
        return self.pixels[rows]


def measure(ensemble: Any, tested: Preprocessing | None = None) -> Preflight:
    images: Any = Noise()
    return run_preflight(ensemble, images, 5, 2, tested)


@pytest.mark.parametrize(("view", "resized"), [((14, 14), None), ((12, 10), None), ((8, 8), (9, 9)), ((16, 16), None)])
def test_networks_see_the_part_of_the_canvas_that_students_are_tested_on(
    view: tuple[int, int], resized: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.build.preflight.judge_networks", lambda *_: iter(()))
    monkeypatch.setattr("pipeline.build.preflight.missing_notes", lambda _: ())
    tested, ensemble = evaluation_preprocessing(view, (16, 16), ((0.0,) * 3, (1.0,) * 3)), Shown()
    measure(ensemble, tested)
    seen = torch.cat(ensemble.shown)
    assert seen.dtype == torch.uint8
    assert seen.shape == (5, 3, *view)
    student = (prepare(torch.from_numpy(Noise.pixels), tested) * 255).round()
    np.testing.assert_array_equal(seen.numpy(), student.numpy())
    if view in ((14, 14), (16, 16)):
        edge = (16 - view[0]) // 2
        np.testing.assert_array_equal(seen.numpy(), Noise.pixels[:, :, edge : 16 - edge, edge : 16 - edge])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": np.nan}, r"the teacher's outputs are not finite \(net\).*found NaN\. Check the weights\.?$"),
        ({"clip": np.nan}, r"CLIP's outputs are not finite \(net\).*found NaN"),
        ({"clip": -np.inf, "precision": "float16"}, r"found infinity\. Check the weights, or .*--precision float32"),
    ],
)
def test_outputs_that_are_not_finite_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        measure(Shown(**values))


# Whole builds


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve classes named by numbers, and the weights of a perfect teacher with output i for class i."""
    root = tmp_path_factory.mktemp("orders")
    fitted_teacher.write_pictures(root / "data", DIGITS)
    torch.save(fitted_teacher.fitted_weights(root / "data", DIGITS), root / "natural.pth")
    return root


def recipe(root: Path, out: Path, **changes: Any) -> BuildRecipe:
    data: dict[str, Any] = {
        "name": "orders",
        "dataset": {"name": "folder", "data_dir": root / "data", "image_size": fitted_teacher.SIDE},
        "num_views": 1,
        "teacher": {"name": "resnet8", "weights": str(root / "natural.pth")},
        "clip": {"name": "local-dir:package:digits-clip"},
        "fusion": {"feature_dim": 16},
        "device": "cpu",
        "out": out,
    }
    return BuildRecipe.model_validate(data | changes)


@pytest.mark.medium
def test_a_build_stops_on_a_teacher_in_natural_order(root: Path, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"expected 100\.0% right on 72 images.*natural order.*found 16\.7%"):
        build_cache(recipe(root, tmp_path / "a.zarr"))
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.medium
def test_the_order_of_the_dataset_makes_it_right(root: Path, tmp_path: Path) -> None:
    dataset = {"name": "folder", "data_dir": root / "data", "image_size": fitted_teacher.SIDE, "class_order": "natural"}
    said: list[str] = []
    result = build_cache(recipe(root, tmp_path / "a.zarr", dataset=dataset), said.append)
    assert result.preflight is not None
    assert result.preflight.teacher_top1 == 1.0
    assert result.manifest.recipe.dataset.class_names == DIGITS


@pytest.mark.medium
def test_a_build_matches_the_classes_of_the_test_split(root: Path, tmp_path: Path) -> None:
    """A perfect teacher has 100 %, whichever classes the test split lacks; unknown ones are refused."""
    data = tmp_path / "data"
    fitted_teacher.write_pictures(data, ("ant", "bee", "cat", "dog"))
    torch.save(fitted_teacher.fitted_weights(data, ("ant", "bee", "cat", "dog")), tmp_path / "t.pth")
    for name in ("ant", "dog"):
        for file in (data / "test" / name).iterdir():
            file.unlink()
    (data / "test" / "dog").rmdir()
    teacher = {"name": "resnet8", "weights": str(tmp_path / "t.pth")}
    dataset = {"name": "folder", "data_dir": data, "image_size": fitted_teacher.SIDE}
    said: list[str] = []
    result = build_cache(recipe(root, tmp_path / "a.zarr", dataset=dataset, teacher=teacher), said.append)
    assert result.preflight is not None
    assert (result.preflight.teacher_top1, result.preflight.n) == (1.0, 12)
    assert result.preflight.notes[0] == "no test images of: ant, dog"
    assert "note: no test images of: ant, dog" in said
    assert json.loads(json.dumps(result.preflight.model_dump(mode="json")))["notes"][0] == "no test images of: ant, dog"
    (data / "test" / "cat").rename(data / "test" / "koala")
    with pytest.raises(DataError, match=r"the test split has classes that training does not know.*found koala"):
        build_cache(recipe(root, tmp_path / "b.zarr", dataset=dataset, teacher=teacher))


@pytest.mark.medium
def test_a_teacher_has_the_figure_of_a_student_with_its_weights(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.build.preflight.judge_networks", lambda *_: iter(()))
    crop = {"clean_first": False, "ops": [{"op": "random-resized-crop", "size": 9}]}
    build = recipe(root, tmp_path / "a.zarr", views=crop, dataset=fitted_teacher.dataset(root / "data").model_dump())
    found = build_cache(build).preflight
    network: Any = create_student("resnet8", 12).eval()
    network.load_state_dict(torch.load(root / "natural.pth"))
    images = open_images(build.dataset, "test")
    tested = evaluation_preprocessing((9, 9), images.image_size, build.dataset.normalisation)
    top1 = (predict(network, images, tested, torch.device("cpu")).argmax(1).numpy() == images.labels).mean()
    whole = evaluation_preprocessing(images.image_size, images.image_size, build.dataset.normalisation)
    other = (predict(network, images, whole, torch.device("cpu")).argmax(1).numpy() == images.labels).mean()
    assert isinstance(found, Preflight)
    assert found.teacher_top1 == pytest.approx(top1)
    assert top1 != other


def test_prompts_that_say_nothing_are_refused_before_any_network_is_loaded(root: Path, tmp_path: Path) -> None:
    clip = {"name": "local-dir:package:digits-clip", "class_names": ["one", "two"] * 6}
    with pytest.raises(RecipeError, match="cannot tell classes apart"):
        build_cache(recipe(root, tmp_path / "a.zarr", clip=clip, teacher={"name": "no such teacher"}))
