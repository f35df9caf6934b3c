"""Replay: an untouched cache passes with every codec, wrong numbers with right checksums do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cache_tools.cli import app
from cache_tools.codecs import Float32, Sampled, TopK
from cache_tools.codecs.presets import TargetCodecs, resolve_codecs
from cache_tools.derive.fuse import fuse
from cache_tools.derive.recode import recode
from cache_tools.errors import IncompleteError, NotFoundError, WeightsError
from cache_tools.home.registry import HOME_VARIABLE
from cache_tools.integrity.images import check_images
from cache_tools.integrity.local import verify
from cache_tools.integrity.replay import Replay
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from cache_tools.store.writer import CacheWriter
from pipeline.build.cache import build_cache
from pipeline.replay import Comparison, replay, tolerance_of
from tests.support import tiny_build
from tests.support.tiny_clip import make_folder
from tests.support.turns import some

pytestmark = pytest.mark.medium

SAMPLES, VIEWS = 48, 3
ROWS = SAMPLES * VIEWS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_build.prepare(tmp_path_factory.mktemp("replay"), train=SAMPLES)
    make_folder(root / "tiny-clip")
    return root


def recipe(root: Path, out: Path, **changes: Any) -> Any:
    return tiny_build.recipe(root, clip={"name": f"local-dir:{root / 'tiny-clip'}"}, out=out, block_rows=32, **changes)


@pytest.fixture(scope="module")
def built(root: Path) -> Callable[..., TeacherCache]:
    """Build a cache with these settings, once per setting."""
    made: dict[str, TeacherCache] = {}

    def build(**settings: Any) -> TeacherCache:
        key = repr(settings)
        if key not in made:
            made[key] = TeacherCache(build_cache(recipe(root, root / f"cache-{len(made)}", **settings)).path)
        return made[key]

    return build


def again(cache: TeacherCache, count: int = ROWS, **options: Any) -> Replay:
    report, images = check_images(cache)
    assert report.sound
    assert images is not None
    return replay(cache, images, count, device="cpu", **options)


# What passes


@pytest.mark.parametrize(
    ("store", "codec"),
    some(
        [
            ("fused", "float16"),
            ("components", "compact"),
            ("fused", "top-k"),
            *(("fused", codec) for codec in ("float32", "compact")),
            *(("components", codec) for codec in ("float32", "float16", "top-k")),
        ],
        3,
    ),
)
def test_an_untouched_cache_passes(built: Callable[..., TeacherCache], store: str, codec: str) -> None:
    """The batches differ from those of the build, so nearly all bits are the same, but not all."""
    cache = built(store=store, codec=codec)
    found = again(cache)
    assert found.sound
    assert (found.rows, found.precision, found.device, found.built_on) == (ROWS, "float32", "cpu", "cpu")
    assert [target.target for target in found.targets] == list(cache.targets)
    for target in found.targets:
        assert target.identical > 0.99
        assert target.largest < 0.1 * target.spread
        assert target.spread > 0.0


@pytest.mark.parametrize("precision", some(["bfloat16", "float16"], 1))
def test_low_precision_is_replayed_in_low_precision(built: Callable[..., TeacherCache], precision: str) -> None:
    found = again(built(precision=precision), 100)
    assert found.sound
    assert {target.tolerance for target in found.targets} == {{"bfloat16": 0.5, "float16": 0.0625}[precision]}


def test_several_networks_and_prompts(root: Path, tmp_path: Path) -> None:
    tiny_build.write_teacher(root / "wide.safetensors", architecture="wrn_16_2")
    teachers = [
        {"name": str(root / f"{name}.safetensors"), "weight": w} for name, w in (("teacher", 0.3), ("wide", 0.7))
    ]
    clips = [
        {"name": "local-dir:package:digits-clip", "class_names": ("zero", "one", "two"), "weight": 0.6},
        {"name": f"local-dir:{root / 'tiny-clip'}", "templates": ["the {}", "a {}"], "weight": 0.4},
    ]
    for store in ("fused", "components"):
        settings = {"fusion": {"prompt_ensemble": "probabilities", "clip_scale": "match", "feature_dim": 16}}
        plan = tiny_build.recipe(
            root, teacher=teachers, clip=clips, store=store, out=tmp_path / store, num_views=1, **settings
        )
        cache = TeacherCache(build_cache(plan).path)
        found = again(cache, 20)
        assert found.sound
        assert [target.target for target in found.targets] == list(cache.targets)


def test_the_rows_are_drawn_by_the_seed(built: Callable[..., TeacherCache], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    cache = built()
    add = Comparison.add

    def record(self: Comparison, view: int, index: np.ndarray, *arrays: Any) -> None:
        if self._name == "fused_logits":
            drawn[-1] += [(view, int(sample)) for sample in index]
        add(self, view, index, *arrays)

    monkeypatch.setattr(Comparison, "add", record)
    for seed in (1, 1, 2):
        drawn.append([])
        assert again(cache, 40, seed=seed).rows == 40
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 40
    assert {view for view, _ in drawn[0]} == {0, 1, 2}
    drawn.append([])
    assert again(cache, 10_000).rows == len(set(drawn[3])) == ROWS


# Caches made from others


def test_a_fused_copy_is_replayed_through_its_source(built: Callable[..., TeacherCache], tmp_path: Path) -> None:
    """It has its own prompts and weight, and its source stores half-precision features."""
    source = built(store="components", codec="float16")
    choice = FusionChoice(teacher_weight=0.4, prompt_ensemble="logits")
    path = fuse(source, choice, templates=("a tinted {}", "{}"), codec="float32", out=tmp_path / "made").path
    found = again(TeacherCache(path))
    assert found.sound
    assert found.targets[0].largest < 1e-2 * found.targets[0].spread
    lied = forged(TeacherCache(path), tmp_path / "forged", swap_two)
    assert [target.wrong_rows for target in again(lied).targets] == [2, 0]


@pytest.mark.parametrize("codec", ["compact", "top-k", "row-step", "sampled:draws=64", "product:width=2"])
def test_a_converted_copy_is_replayed(built: Callable[..., TeacherCache], tmp_path: Path, codec: str) -> None:
    from cache_tools.derive.codec_spec import codecs_for

    source = built(store="fused", codec="float16")
    path = recode(source, codecs_for(codec, source.recipe), "other", tmp_path / "made").path
    assert again(TeacherCache(path)).sound


def test_constants_of_fitted_codecs_come_from_the_source(
    built: Callable[..., TeacherCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    original = built(store="components", codec="float32")
    steps = recode(original, resolve_codecs("compact", 3), "steps", tmp_path / "steps").path
    made = fuse(TeacherCache(steps), FusionChoice(), codec="float32", out=tmp_path / "made").path
    assert again(TeacherCache(made)).sound
    steps.rename(tmp_path / "elsewhere")
    with pytest.raises(NotFoundError, match=r"made from is missing \(.*steps\).*cache-tools pull"):
        again(TeacherCache(made))
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "elsewhere").rename(tmp_path / "home" / "found-by-fingerprint.zarr")
    assert again(TeacherCache(made)).sound


def test_a_derived_cache_without_a_recorded_source(built: Callable[..., TeacherCache], tmp_path: Path) -> None:
    cache = fuse(built(store="components"), FusionChoice(), out=tmp_path / "made")
    for provenance in ({}, {"source": {"name": "x"}}):
        silent = TeacherCache(cache.path)
        silent.manifest = silent.manifest.model_copy(update={"provenance": provenance})
        with pytest.raises(NotFoundError, match="does not record what it was made from"):
            again(silent)


# What does not pass


def forged(
    cache: TeacherCache, out: Path, change: Callable[[dict[str, np.ndarray]], None], **manifest: Any
) -> TeacherCache:
    """A copy of a cache with other numbers and commits that match them."""
    stored = cache.manifest.model_copy(update=manifest)
    writer = CacheWriter.create(
        out,
        stored,
        labels=cache.labels,
        sample_keys=cache.sample_keys,
        constants={
            name: cache.constant(name) for name in ("teacher_projection", "clip_projection", "class_embeddings")
        },
    )
    rows = {name: np.stack([cache.read_array(name, view) for view in range(cache.num_views)]) for name in cache.targets}
    change(rows)
    for view, block in writer.missing_blocks():
        part = stored.block(block)
        index = np.arange(part.start, part.stop)
        digest = cache.recipe.views.parameter_digest(index, view, cache.recipe.dataset.image_size)
        writer.write_block(view, block, {name: values[view, part] for name, values in rows.items()}, digest)
    assert verify(out).sound, "the bytes are what was committed"
    return TeacherCache(out)


def swap_two(rows: dict[str, np.ndarray]) -> None:
    rows["fused_logits"][1, [7, 40]] = rows["fused_logits"][1, [40, 7]]


def one_number(rows: dict[str, np.ndarray]) -> None:
    rows["fused_features"][2, 11, 3] += 0.05


def another_view(rows: dict[str, np.ndarray]) -> None:
    for values in rows.values():
        values[2] = values[1]


def one_per_cent(rows: dict[str, np.ndarray]) -> None:
    rows["fused_logits"] *= 1.01


@pytest.mark.parametrize(
    ("change", "target", "wrong"),
    [
        (swap_two, "fused_logits", 2),
        (one_number, "fused_features", 1),
        (another_view, "fused_logits", SAMPLES),
        (one_per_cent, "fused_logits", ROWS),
    ],
)
@pytest.mark.parametrize("codec", some(["float16", "float32"], 1))
def test_wrong_numbers_with_right_checksums_are_found(
    built: Callable[..., TeacherCache], tmp_path: Path, change: Any, target: str, wrong: int, codec: str
) -> None:
    found = again(forged(built(codec=codec), tmp_path / "forged", change))
    assert not found.sound
    by_name = {each.target: each for each in found.targets}
    assert by_name[target].wrong_rows == wrong
    if change is one_number:
        assert str(by_name[target].worst) == "view 2, sample 11, column 3"
        assert by_name[target].largest == pytest.approx(0.05, rel=0.05)
        assert by_name["fused_logits"].sound
    assert f"{target}: {wrong} row" in str(found)


def test_another_fusion_than_the_manifest_has_is_found(built: Callable[..., TeacherCache], tmp_path: Path) -> None:
    cache = built()
    scales = {"clip_scales": (cache.manifest.clip_scales[0] * 1.05,)}
    found = again(forged(cache, tmp_path / "forged", lambda rows: None, **scales))
    assert [target.sound for target in found.targets] == [False, True]


@pytest.mark.parametrize("codec", ["compact", "top-k", TargetCodecs(logits=Sampled(draws=64))])
def test_swapped_rows_are_found_through_a_coarse_codec(
    built: Callable[..., TeacherCache], root: Path, tmp_path: Path, codec: Any
) -> None:
    exact = forged(built(codec="float32"), tmp_path / "forged", swap_two)
    assert not again(TeacherCache(recode(exact, resolve_codecs(codec, 3), "coded", tmp_path / "coded").path)).sound


def test_other_weights_are_an_error(root: Path, built: Callable[..., TeacherCache]) -> None:
    cache = built(codec="float32")
    for file in (root / "teacher.safetensors", root / "tiny-clip" / "open_clip_model.safetensors"):
        good = file.read_bytes()
        try:
            metadata = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")]).get("__metadata__")
            tensors = load_file(file)
            name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.float32)
            tensors[name] = tensors[name] + 1e-6
            save_file(tensors, file, metadata)
            with pytest.raises(WeightsError, match="not the weights that the cache was built with"):
                again(cache)
            failed = CliRunner().invoke(app, ["verify", str(cache.path), "--replay", "5"])
            assert failed.exit_code == 2
            assert len(failed.stderr.strip().splitlines()) == 1
        finally:
            file.write_bytes(good)


def test_a_cache_without_a_build_recipe_is_an_error(built: Callable[..., TeacherCache]) -> None:
    cache = TeacherCache(built().path)
    cache.manifest = cache.manifest.model_copy(update={"build_recipe": {}})
    with pytest.raises(NotFoundError, match="does not record how its teachers were loaded"):
        again(cache)


def test_build_recipes_of_older_versions_are_read(built: Callable[..., TeacherCache]) -> None:
    cache = TeacherCache(built().path)
    old = {key: value for key, value in cache.manifest.build_recipe.items() if key != "codec"} | {"dtype": "float16"}
    cache.manifest = cache.manifest.model_copy(update={"build_recipe": old})
    assert again(cache, 5).sound


def test_rows_are_drawn_only_from_complete_views(built: Callable[..., TeacherCache], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(built().path, tmp_path / "cache"))
    (cache / "commits" / "c.1.0.0").unlink()
    found = again(TeacherCache(cache), ROWS)
    assert (found.rows, found.sound) == (2 * SAMPLES, True)
    for view in (0, 2):
        (cache / "commits" / f"c.{view}.1.0").unlink()
    with pytest.raises(IncompleteError, match="no view of the cache is complete"):
        again(TeacherCache(cache))


# The tolerance


def test_tolerances_follow_the_precision_of_the_networks() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert tolerance_of("float32", cpu, "cpu") == 1e-4
    for device, built_on in ((cuda, "cpu"), (cpu, "NVIDIA H100"), (cuda, "NVIDIA H100"), (cpu, None)):
        assert tolerance_of("float32", device, built_on) == 0.0625
    assert tolerance_of("float16", cpu, "cpu") == 0.0625
    assert tolerance_of("bfloat16", cpu, "cpu") == 0.5


def test_the_comparison_follows_its_docstring() -> None:
    """Computed again one number at a time, for rows with growing differences: some pass and some do not."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 2, (40, 6)).astype(np.float32)
    stored = values + (rng.normal(0, 1, (40, 6)) * np.geomspace(1e-3, 3, 40)[:, None]).astype(np.float32)
    plain = values + rng.normal(0, 0.01, (40, 6)).astype(np.float32)
    bound = np.abs(rng.normal(0, 0.01, (40, 6)))
    comparison, t = Comparison("logits", Float32()), 0.02
    for part in (slice(0, 7), slice(7, 40)):
        index = np.arange(40)[part]
        comparison.add(2, index, stored[part], values[part], values[part], plain[part], bound[part])
    found = comparison.verdict(t)
    numbers = [float(number) for row in values for number in row]
    spread = (sum((number - sum(numbers) / 240) ** 2 for number in numbers) / 240) ** 0.5
    wrong = 0
    for row in range(40):
        error = [
            b + max(abs(float(v) - float(p)) for v, p in zip(values[row], plain[row], strict=True)) for b in bound[row]
        ]
        off = [abs(float(s) - float(v)) for s, v in zip(stored[row], values[row], strict=True)]
        rms = (sum(x * x for x in off) / 6) ** 0.5
        fits = rms <= t * spread + 2 * (sum(e * e for e in error) / 6) ** 0.5
        wrong += not (fits and all(x <= 8 * t * spread + 2 * e for x, e in zip(off, error, strict=True)))
    assert found.wrong_rows == wrong
    assert 0 < wrong < 40
    assert found.spread == pytest.approx(spread)
    difference = np.abs(stored - values)
    assert found.largest == pytest.approx(float(difference.max()))
    assert found.mean == pytest.approx(float(difference.mean()), rel=1e-5)
    worst = np.unravel_index(difference.argmax(), difference.shape)
    assert (found.worst.view, found.worst.sample, found.worst.column) == (2, *map(int, worst))


def test_sparse_targets_are_compared_as_probabilities() -> None:
    comparison = Comparison("logits", TopK(temperature=2.0))
    rows = np.array([[0.0, 2.0, 4.0]], np.float32)
    comparison.add(0, np.array([5]), rows + 7, rows, rows, rows, np.zeros((1, 3)))
    assert comparison.verdict(1e-4).largest == pytest.approx(0.0, abs=1e-7)
    comparison.add(0, np.array([6]), rows[:, ::-1], rows, rows, rows, np.zeros((1, 3)))
    p = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
    assert comparison.verdict(1e-4).largest == pytest.approx(p[2] - p[0], rel=1e-5)


# The command


def run(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def test_the_command_prints_figures_and_exits_with_1(built: Callable[..., TeacherCache], tmp_path: Path) -> None:
    cache = built(codec="float32")
    output = run(cache.path, "--replay", 30, "--seed", 4).stdout.splitlines()
    assert output[0].startswith("sound: 6 of 6 blocks")
    same = "16 pairs of sample and view have the pixels that the teachers saw"
    assert output[1] == f"images: folder/train, {SAMPLES} samples in the order of the cache; {same}"
    assert output[2] == "replay: 30 rows computed again in float32 on cpu, built on cpu"
    assert output[3].strip().startswith("fused_logits: largest difference ")
    bad = forged(cache, tmp_path / "forged", swap_two)
    output = run(bad.path, "--replay", ROWS, code=1).stdout
    assert "fused_logits: 2 rows are not what the teachers compute, the worst at view 1, sample" in output
    found = json.loads(run(bad.path, "--replay", ROWS, "--json", code=1).stdout)
    assert (found["sound"], found["images"]["sound"], found["replay"]["sound"]) == (False, True, False)
    assert found["problems"] == []
    assert [target["wrong_rows"] for target in found["replay"]["targets"]] == [2, 0]
    assert json.loads(run(bad.path, "--json").stdout)["replay"] is None


def test_renamed_and_shuffled_images_are_found_by_content(
    built: Callable[..., TeacherCache], root: Path, tmp_path: Path
) -> None:
    cache = built(codec="float32")
    pictures = tmp_path / "pictures"
    for number, file in enumerate(sorted((root / "pictures").rglob("*.png"), reverse=True)):
        target = pictures / file.parent.relative_to(root / "pictures") / f"{(number * 37) % 1000:03}-{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    found = json.loads(run(cache.path, "--replay", 50, "--data-dir", pictures, "--json").stdout)
    assert found["images"]["same_order"] is False
    assert found["replay"]["sound"]
    assert "in another order, matched by their contents" in run(cache.path, "--images", "--data-dir", pictures).stdout


def test_other_images_are_reported_and_not_replayed(
    built: Callable[..., TeacherCache], root: Path, tmp_path: Path
) -> None:
    cache = built(codec="float32")
    pictures = Path(shutil.copytree(root / "pictures", tmp_path / "pictures"))
    victim, other = sorted((pictures / "train" / "red").iterdir())[:2]
    shutil.copy(other, victim)
    found = json.loads(run(cache.path, "--replay", 5, "--data-dir", pictures, "--json", code=1).stdout)
    assert "not the one the cache was built from" in found["images"]["problem"]
    assert found["replay"] is None
    assert "images: this dataset is not the one" in run(cache.path, "--images", "--data-dir", pictures, code=1).stdout
    assert "no such folder" in run(cache.path, "--images", "--data-dir", tmp_path / "nowhere", code=2).stderr


def test_drifted_pixels_are_reported(built: Callable[..., TeacherCache], tmp_path: Path) -> None:
    cache = built(codec="float32")
    canaries = tuple(canary.model_copy(update={"pixel_digest": "0" * 32}) for canary in cache.manifest.canaries)
    drifted = forged(cache, tmp_path / "drifted", lambda rows: None, canaries=canaries)
    assert "not the pixels that the teachers saw" in run(drifted.path, "--images", code=1).stdout


def test_damaged_bytes_are_reported_first(built: Callable[..., TeacherCache], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(built(codec="float32").path, tmp_path / "cache"))
    (cache / "fused_logits" / "c.1.0.0").unlink()
    output = run(cache, "--replay", 5, code=1).stdout
    assert "images and teachers were not checked: repair the cache first" in output
