"""`build-cache --compile`: compiled networks, one program each for all batches, never mixed with plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from typer.testing import CliRunner

from cache_tools.cli import app as cache_tools
from cache_tools.errors import MismatchError, RecipeError
from cache_tools.format.manifest import has_compiled
from cache_tools.places import LocalPlace
from cache_tools.places.transfer import copy_cache
from cache_tools.reader import TeacherCache
from pipeline.build import blocks
from pipeline.build.cache import build_cache
from pipeline.cli import app
from pipeline.networks.compiled import CompiledNetwork
from tests.support import cache_factory, tiny_build
from tests.support.fake_cuda import fake_cuda
from tests.support.tiny_build import arrays_of
from tests.support.tiny_clip import make_folder

SAMPLES, ROWS, BATCH, VIEWS = 50, 32, 12, 2
TOLERANCE = 1e-5
"""Of the spread of a target: compiled networks in float32 sum in another order, and nothing else."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_build.prepare(tmp_path_factory.mktemp("compiled"), train=SAMPLES)
    make_folder(root / "tiny-clip")
    return root


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 8  # torch's default, which exports of earlier tests have raised
    yield
    torch._dynamo.config.recompile_limit = limit
    torch.compiler.reset()


def recipe(root: Path, out: Path, **changes: Any) -> Any:
    settings = {"num_views": VIEWS, "block_rows": ROWS, "batch_size": BATCH, "out": out, "compile": "model"}
    settings |= {"clip": {"name": f"local-dir:{root / 'tiny-clip'}"}}
    return tiny_build.recipe(root, **settings | changes)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """In place of a compiler: counts programs, and runs them operation by operation."""
    compiler, counter = torch.compile, CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=counter, **options))
    return counter


def rows(path: Path) -> dict[str, np.ndarray]:
    cache = TeacherCache.open(path)
    return {
        name: np.concatenate([cache.read_array(name, view, slice(0, SAMPLES)) for view in range(VIEWS)])
        for name in cache.targets
    }


@pytest.mark.slow
def test_a_compiled_build_equals_the_plain_one_but_for_rounding(root: Path, tmp_path: Path) -> None:
    """With the real compiler. Its cache also passes a replay by plain networks."""
    build_cache(recipe(root, tmp_path / "plain", compile="off"))
    said: list[str] = []
    build_cache(recipe(root, tmp_path / "compiled"), said.append)
    assert [line for line in said if line.startswith("networks compiled in ")]
    plain, compiled = rows(tmp_path / "plain"), rows(tmp_path / "compiled")
    for name, expected in plain.items():
        assert np.abs(compiled[name] - expected).max() <= TOLERANCE * expected.std(), name
    assert any((compiled[name] != plain[name]).any() for name in plain), "nothing was compiled"
    done = CliRunner().invoke(cache_tools, ["verify", str(tmp_path / "compiled"), "--replay", "100", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(cache_tools, ["info", str(tmp_path / "compiled")])
    assert "torch.compile" in shown.stdout


@pytest.mark.medium
@pytest.mark.parametrize("store", ["fused", "components"])
def test_a_network_is_one_program_for_all_batches(
    root: Path, tmp_path: Path, programs: CompileCounterWithBackend, store: str
) -> None:
    """50 rows in blocks of 32 and 18, and these in batches of 12, 12, 8 and 12, 6."""
    build_cache(recipe(root, tmp_path / "compiled", store=store))
    assert programs.frame_count == 2, "a teacher and a CLIP"
    build_cache(recipe(root, tmp_path / "plain", store=store, compile="off"))
    assert programs.frame_count == 2
    plain = rows(tmp_path / "plain")
    for name, found in rows(tmp_path / "compiled").items():  # a batch that is filled up is another batch
        assert np.abs(found - plain[name]).max() <= TOLERANCE * plain[name].std(), name
    manifest = TeacherCache.open(tmp_path / "compiled").manifest
    assert manifest.build_recipe["compile"] == "model"
    assert manifest.provenance["kernels"] == {"networks": "torch.compile"}
    assert "kernels" not in TeacherCache.open(tmp_path / "plain").manifest.provenance
    assert manifest.fingerprint == TeacherCache.open(tmp_path / "plain").manifest.fingerprint


@pytest.mark.medium
def test_many_networks_are_all_compiled(root: Path, tmp_path: Path, programs: CompileCounterWithBackend) -> None:
    """With a program each, because their inputs differ in size: more than torch keeps by default."""
    tiny_build.write_teacher(root / "other.safetensors", seed=1)
    names = ["teacher.safetensors", "other.safetensors"]
    teachers = [{"name": str(root / names[n % 2]), "size": 16 + 2 * n} for n in range(9)]
    settings = {"teacher": teachers, "clip": None, "num_views": 1, "store": "components"}
    assert len(teachers) > torch._dynamo.config.recompile_limit
    build_cache(recipe(root, tmp_path / "compiled", **settings))
    assert programs.frame_count == 9
    build_cache(recipe(root, tmp_path / "plain", **settings, compile="off"))
    compiled, plain = (TeacherCache.open(tmp_path / name) for name in ("compiled", "plain"))
    for name in plain.targets:
        found, expected = (cache.read_array(name, 0, slice(0, SAMPLES)) for cache in (compiled, plain))
        assert np.abs(found - expected).max() <= TOLERANCE * expected.std(), name


@pytest.mark.medium
def test_whoever_continues_a_cache_uses_its_kind_of_network(
    root: Path, tmp_path: Path, programs: CompileCounterWithBackend
) -> None:
    build_cache(recipe(root, tmp_path / "whole"))
    build_cache(recipe(root, tmp_path / "grown", num_views=1))
    before = programs.frame_count
    assert before == 2, "networks of the same architecture share a program"
    torch.compiler.reset()
    build_cache(recipe(root, tmp_path / "grown", compile="auto"))
    assert programs.frame_count == before + 2
    assert arrays_of(tmp_path / "grown") == arrays_of(tmp_path / "whole")
    (note,) = TeacherCache.open(tmp_path / "grown").manifest.provenance["grown"]
    assert note["kernels"] == {"networks": "torch.compile"}


@pytest.mark.medium
@pytest.mark.parametrize("begun", ["model", "off", "auto"])
def test_blocks_of_the_other_kind_are_refused_before_anything_changes(
    root: Path, tmp_path: Path, programs: CompileCounterWithBackend, begun: str
) -> None:
    other, kind = ("off", "compiled") if begun == "model" else ("model", "plain")
    build_cache(recipe(root, tmp_path / "c", num_views=1, compile=begun))
    before = (tmp_path / "c" / "zarr.json").read_bytes()
    with pytest.raises(
        MismatchError, match=rf"begun with {kind} networks.*found --compile {other}\. Use --compile auto"
    ):
        build_cache(recipe(root, tmp_path / "c", compile=other))
    assert (tmp_path / "c" / "zarr.json").read_bytes() == before
    build_cache(recipe(root, tmp_path / "c", num_views=1, compile=other))  # complete: there is nothing to mix


@pytest.mark.medium
def test_a_refused_build_does_not_make_the_cache_a_rolling_one(root: Path, tmp_path: Path) -> None:
    build_cache(recipe(root, tmp_path / "c", compile="off"))
    for commit in (tmp_path / "c" / "commits").glob("c.*"):
        commit.unlink()
    before = (tmp_path / "c" / "zarr.json").read_bytes()
    with pytest.raises(MismatchError, match="begun with plain networks"):
        build_cache(recipe(root, tmp_path / "c", keep_views=2))
    assert (tmp_path / "c" / "zarr.json").read_bytes() == before
    build_cache(recipe(root, tmp_path / "c", compile="off", keep_views=2))
    assert (tmp_path / "c" / "zarr.json").read_bytes() != before


@pytest.mark.medium
def test_batches_are_not_filled_up_beyond_the_rows_of_a_block(
    root: Path, tmp_path: Path, programs: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_for: list[int] = []
    begin = CompiledNetwork.__init__

    def counted(network: CompiledNetwork, function: Any, rows: int) -> None:
        compiled_for.append(rows)
        begin(network, function, rows)

    monkeypatch.setattr(CompiledNetwork, "__init__", counted)
    build_cache(recipe(root, tmp_path / "c", batch_size=256))
    assert compiled_for == [ROWS, ROWS], "a teacher and a CLIP, once each"


@pytest.mark.medium
def test_copies_do_not_mix_them(root: Path, tmp_path: Path, programs: CompileCounterWithBackend) -> None:
    build_cache(recipe(root, tmp_path / "compiled"))
    build_cache(recipe(root, tmp_path / "plain", compile="off"))
    with pytest.raises(MismatchError, match=r"built with compiled networks.*--compile off; found --compile model"):
        copy_cache(LocalPlace(tmp_path / "plain"), LocalPlace(tmp_path / "compiled"))


@pytest.mark.medium
def test_what_cannot_be_compiled_is_one_error_and_leaves_no_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*given: Any, **options: Any) -> Any:
        def fail(images: torch.Tensor) -> Any:
            raise torch._dynamo.exc.InternalTorchDynamoError("no working C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    words = (
        r"the networks cannot be compiled \(.*teacher\.safetensors.* on cpu, --compile model\).*no working C\+\+.*off"
    )
    with pytest.raises(RecipeError, match=words):
        build_cache(recipe(root, tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_a_mode_of_students_is_refused() -> None:
    done = CliRunner().invoke(app, ["digits", "--compile", "step", "--show-recipe"])
    assert done.exit_code == 2
    assert "(--compile); expected 'auto', 'off' or 'model'; found 'step'" in done.stderr


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("count", [4, 1])
def test_a_short_batch_is_filled_up_and_cut_again(monkeypatch: pytest.MonkeyPatch, count: int, on_gpu: bool) -> None:
    seen: list[torch.Tensor] = []

    def function(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(images)
        return images.float().mean((2, 3)), images.float().amax((2, 3))

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    network = CompiledNetwork(function, 4)
    images = torch.rand(4, 3, 6, 5).to(memory_format=torch.channels_last)[:count]
    if not on_gpu:
        for found, expected in zip(network(images), function(images), strict=True):
            torch.testing.assert_close(found, expected)  # another order in memory is summed in another order
        assert seen[0].is_contiguous()
        assert len(seen[0]) == 4
        with pytest.raises(AssertionError, match="5 images"):
            network(torch.rand(5, 3, 6, 5))
        return
    with fake_cuda() as gpu:
        images = torch.empty(count, 3, 6, 5, device=gpu.device)
        with gpu.watch() as watch:
            outputs = network(images)
        assert watch.transfers == []
        assert seen[0].is_contiguous(memory_format=torch.channels_last)
        assert [tuple(output.shape) for output in outputs] == [(count, 3), (count, 3)]


def test_the_build_loop_computes_with_compiled_networks_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.networks.ensemble import NetworkPixels
    from tests.pipeline.networks.test_pretended_gpu import make_ensemble

    calls: list[int] = []

    def compiler(function: Any, **options: Any) -> Any:
        def counted(images: torch.Tensor) -> Any:
            calls.append(len(images))
            return function(images)

        return counted

    monkeypatch.setattr(torch, "compile", compiler)
    images = cache_factory.tiny_images(16)
    manifest = cache_factory.tiny_manifest(images, teacher_dim=64)
    samples = np.arange(5, dtype=np.int64)
    with fake_cuda() as gpu:
        ensemble = make_ensemble(gpu, manifest, "bfloat16")
        ensemble.compile_for(8)
        buffers = blocks._host_buffers(manifest, 16, gpu.device)
        pixels = NetworkPixels(torch.from_numpy(images.load(slice(0, 5))).pin_memory(), None)
        blocks._compute(blocks.LoadedBatch(0, 0, samples, pixels), manifest, ensemble, buffers)
        with gpu.watch() as watch:
            blocks._compute(blocks.LoadedBatch(1, 0, samples, pixels), manifest, ensemble, buffers)
    assert calls == [8] * 4, "a teacher and a CLIP, twice"
    assert all(transfer.pinned for transfer in watch.transfers)
    assert [transfer.to for transfer in watch.transfers].count("cpu") == len(buffers)


def test_a_manifest_tells_whether_networks_were_compiled() -> None:
    manifest = cache_factory.tiny_manifest(cache_factory.tiny_images(20), canaries=False)
    for stored, expected in (("model", True), ("off", False), ("auto", False), (["model"], False), (None, False)):
        assert has_compiled(manifest.model_copy(update={"build_recipe": {"compile": stored}})) is expected
    assert not has_compiled(manifest)


@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2.0**-4), ("bfloat16", 2.0**-1)])
def test_on_a_gpu_compiled_targets_are_within_the_tolerance_of_a_replay(
    root: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    for compile in ("model", "off"):
        settings = {"precision": precision, "device": "cuda", "batch_size": "auto"}
        build_cache(recipe(root, tmp_path / compile, compile=compile, **settings))
    plain = rows(tmp_path / "off")
    for name, found in rows(tmp_path / "model").items():
        assert np.abs(found - plain[name]).max() <= 8 * tolerance * plain[name].std(), name
    replayed = ["verify", str(tmp_path / "model"), "--replay", "100", "--device", "cuda"]
    assert CliRunner().invoke(cache_tools, replayed).exit_code == 0
