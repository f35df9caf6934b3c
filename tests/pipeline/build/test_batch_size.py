"""`batch_size: auto`: the largest batch that fits, stored in the manifest, and used by whoever continues the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cache_tools.console import Stopped
from cache_tools.errors import OutOfMemoryError, RecipeError
from cache_tools.images import open_images
from cache_tools.integrity.local import verify
from cache_tools.reader import TeacherCache
from cache_tools.system.memory import free_memory
from pipeline.build import batch_size, blocks
from pipeline.build.batch_size import DEFAULT, MEMORY_SHARE, START, largest_batch, stored_batch_size
from pipeline.build.cache import build_cache, prepare_build
from pipeline.cli import app
from pipeline.networks.ensemble import TeacherEnsemble
from pipeline.recipe import load_build_recipe
from tests.support import cache_factory, tiny_build
from tests.support.fake_cuda import fake_cuda
from tests.support.tiny_build import arrays_of

CPU = torch.device("cpu")
SAMPLES, ROWS, VIEWS = 100, 40, 2


class Meter:
    """In place of `MemoryMeter`: work takes little memory."""

    def __init__(self, device: torch.device) -> None: ...

    def share(self) -> float:
        return 0.1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("batch"), train=SAMPLES)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Pretend a device with room for so many images at once. Returns the sizes of the batches that are tried."""
    forward = TeacherEnsemble.targets
    monkeypatch.setattr(batch_size, "is_measured", lambda device: True)
    monkeypatch.setattr(batch_size, "MemoryMeter", Meter)

    def limit(most: int) -> list[int]:
        sizes: list[int] = []

        def targets(self: TeacherEnsemble, pixels: torch.Tensor, *rest: Any) -> Any:
            sizes.append(len(pixels))
            if len(pixels) > most:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(pixels)} GiB.")
            return forward(self, pixels, *rest)

        monkeypatch.setattr(TeacherEnsemble, "targets", targets)
        return sizes

    return limit


def recipe(root: Path, out: Path, **changes: Any) -> Any:
    settings = {"num_views": VIEWS, "block_rows": ROWS, "batch_size": "auto", "out": out}
    return tiny_build.recipe(root, **settings | changes)


def size_of(path: Path) -> Any:
    return TeacherCache.open(path).manifest.build_recipe["batch_size"]


@pytest.mark.parametrize(
    ("room", "most", "expected"),
    [(10**6, 100, 100), (10**6, 40, 40), (90, 150, START), (130, 150, 128), (149, 150, 128), (40, 150, 32), (1, 70, 1)],
)
def test_the_largest_batch_is_found(monkeypatch: pytest.MonkeyPatch, room: int, most: int, expected: int) -> None:
    monkeypatch.setattr(batch_size, "MemoryMeter", Meter)
    tried = []

    def work(size: int) -> None:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_batch(work, most, CPU) == expected
    assert max(tried) <= most
    assert len(tried) == len(set(tried)), "a size is tried once"


def test_no_room_for_one_image_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "MemoryMeter", Meter)

    def work(size: int) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    with pytest.raises(OutOfMemoryError, match=r"a batch of one image \(cpu\); found .* MiB free\. End what else"):
        largest_batch(work, 100, CPU)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "MemoryMeter", Meter)

    def work(size: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        largest_batch(work, 100, CPU)


@pytest.mark.parametrize(
    ("bytes_per_image", "expected"), [(1 << 20, 512), (2 << 20, 256), (3 << 20, 256), (1 << 30, 0)]
)
def test_on_cuda_memory_is_measured_with_a_margin(bytes_per_image: int, expected: int) -> None:
    """1 GiB is free, of which torch holds 200 MiB that it does not use."""
    with fake_cuda() as gpu:
        free = 1 << 30
        gpu.reserved_bytes, gpu.allocated_bytes = 500 << 20, 300 << 20
        gpu.free_bytes = free - (200 << 20)

        def work(size: int) -> None:
            taken = gpu.allocated_bytes + size * bytes_per_image
            if size * bytes_per_image > free:
                raise torch.OutOfMemoryError("CUDA out of memory")
            gpu.peak_bytes = max(gpu.reserved_bytes, taken)

        if not expected:
            with pytest.raises(OutOfMemoryError, match="a pretended GPU"):
                largest_batch(work, 4096, gpu.device)
            return
        assert largest_batch(work, 4096, gpu.device) == expected
    assert expected * bytes_per_image <= MEMORY_SHARE * free < 2 * expected * bytes_per_image


def test_the_measured_work_is_that_of_a_build_on_cuda() -> None:
    from tests.pipeline.networks.test_pretended_gpu import make_ensemble

    images = cache_factory.tiny_images(80)
    manifest = cache_factory.tiny_manifest(images, teacher_dim=64)
    with fake_cuda() as gpu:
        ensemble = make_ensemble(gpu, manifest, "float32")
        work = batch_size.forward_pass(manifest.recipe, images, ensemble, 2)
        with gpu.watch() as watch:
            found = work(48)
        assert {name: (rows.shape, rows.device.type) for name, rows in found.items()} == {  # type: ignore[attr-defined]
            "fused_logits": ((48, 5), "cuda"),
            "fused_features": ((48, 8), "cuda"),
        }
        assert all(transfer.is_safe for transfer in watch.transfers)
        assert largest_batch(work, 80, gpu.device) == 80


@pytest.mark.medium
def test_the_found_size_is_stored_and_a_resumed_build_uses_it(
    root: Path, tmp_path: Path, memory: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(25)
    said: list[str] = []
    build_cache(recipe(root, tmp_path / "whole"), said.append)
    assert size_of(tmp_path / "whole") == 20, "40 rows of a block, halved once"
    assert "batch size 20" in said
    build_cache(recipe(root, tmp_path / "given", batch_size=20))
    assert arrays_of(tmp_path / "whole") == arrays_of(tmp_path / "given")

    compute, calls = blocks._compute, 0

    def stop_early(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise Stopped("Stopped by a test", 143)
        compute(*given)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_compute", stop_early)
        with pytest.raises(Stopped):
            build_cache(recipe(root, tmp_path / "resumed"))
    sizes = memory(10**6)  # the machine has become larger
    build_cache(recipe(root, tmp_path / "resumed"))
    assert max(sizes) == 20
    assert arrays_of(tmp_path / "resumed") == arrays_of(tmp_path / "whole")
    assert verify(tmp_path / "resumed").problems == ()


@pytest.mark.medium
def test_a_builder_with_less_memory_is_told_what_it_has_room_for(
    root: Path, tmp_path: Path, memory: Callable[[int], list[int]]
) -> None:
    memory(10**6)
    assert prepare_build(recipe(root, tmp_path / "c")).batch_size == ROWS
    memory(12)
    words = r"do not fit on this device .*expected room for 40 images.*; found room for 10 images.*--batch-size 10"
    with pytest.raises(OutOfMemoryError, match=words):
        build_cache(recipe(root, tmp_path / "c"))
    said: list[str] = []
    sizes = memory(12)
    build_cache(recipe(root, tmp_path / "c", batch_size=10), said.append)
    assert max(sizes) == 10
    assert [line for line in said if "begun with batches of 40 images, not 10" in line]
    assert size_of(tmp_path / "c") == ROWS
    TeacherCache.open(tmp_path / "c").require_complete()


@pytest.mark.medium
def test_of_two_builders_that_start_together_the_first_decides(
    root: Path, tmp_path: Path, memory: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    find, others = batch_size.new_batch_size, [25]

    def find_while_another_begins(*given: Any) -> int:
        found = find(*given)
        if others:
            memory(others.pop())
            prepare_build(recipe(root, tmp_path / "c"))
            memory(10**6)
        return found

    memory(10**6)
    monkeypatch.setattr(batch_size, "new_batch_size", find_while_another_begins)
    ready = prepare_build(recipe(root, tmp_path / "c"))
    assert ready.batch_size == size_of(tmp_path / "c") == 20


@pytest.mark.medium
def test_on_a_cpu_it_is_the_default(root: Path, tmp_path: Path) -> None:
    build_cache(recipe(root, tmp_path / "auto"))
    build_cache(recipe(root, tmp_path / "given", batch_size=DEFAULT))
    assert size_of(tmp_path / "auto") == size_of(tmp_path / "given") == DEFAULT
    assert arrays_of(tmp_path / "auto") == arrays_of(tmp_path / "given")


@pytest.mark.parametrize(
    ("stored", "expected"), [(48, 48), ("auto", DEFAULT), (0, DEFAULT), (True, DEFAULT), (None, DEFAULT)]
)
def test_a_manifest_without_a_size_gives_the_default(stored: Any, expected: int) -> None:
    manifest = cache_factory.tiny_manifest(cache_factory.tiny_images(20), canaries=False)
    assert stored_batch_size(manifest.model_copy(update={"build_recipe": {"batch_size": stored}})) == expected
    assert stored_batch_size(manifest) == DEFAULT


@pytest.mark.medium
def test_memory_that_runs_out_during_a_build_is_one_error(
    root: Path, tmp_path: Path, memory: Callable[[int], list[int]]
) -> None:
    memory(15)
    with pytest.raises(OutOfMemoryError, match=r"a batch of 20 images on cpu.*Continue with --batch-size 10"):
        build_cache(recipe(root, tmp_path / "c", batch_size=20))
    memory(0)
    with pytest.raises(OutOfMemoryError, match=r"a batch of 1 image on cpu.*Build where there is more memory"):
        build_cache(recipe(root, tmp_path / "c", batch_size=1))


@pytest.mark.medium
def test_one_decoding_serves_as_many_views_as_with_the_default(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    views = {"version": 2, "ops": [{"op": "random-resized-crop", "size": 12}, "flip"]}
    given = recipe(root, tmp_path / "c", views=views, num_views=4, block_rows=100)
    build_cache(given)
    cache = TeacherCache.open(tmp_path / "c")
    images = open_images(cache.manifest.dataset)

    def at_once(size: int) -> int:
        return blocks.views_at_once(cache.recipe, 100, images, size)

    assert batch_size._most_images(given, cache.recipe, images) == 100
    monkeypatch.setattr(batch_size, "DEFAULT", 16)
    for group_bytes in (200_000, 400_000):
        monkeypatch.setattr(blocks, "GROUP_BYTES", group_bytes)
        most = batch_size._most_images(given, cache.recipe, images)
        assert at_once(100) < min(4, at_once(16)) <= at_once(most)
        assert most > 1


@pytest.mark.parametrize("value", ["0", "-4", "many", "1.5", "true", "10000000000", "Auto", "[4]"])
def test_what_is_no_size_is_refused(value: str) -> None:
    with pytest.raises(RecipeError, match=r"'batch_size'.*expected auto, or a number from 1 to 1,000,000,000; found"):
        load_build_recipe("digits", [f"batch_size={value}"])


def test_the_option_takes_a_number_or_auto() -> None:
    shown = [CliRunner().invoke(app, ["digits", "--batch-size", text, "--show-recipe"]) for text in ("auto", "48")]
    for result, line in zip(shown, ("batch_size: auto", "batch_size: 48"), strict=True):
        assert line in result.stdout, result.stderr
    refused = CliRunner().invoke(app, ["digits", "--batch-size", "lots", "--show-recipe"])
    assert refused.exit_code == 2
    assert "(--batch-size); expected auto, or a number" in refused.stderr


@pytest.mark.cuda
def test_on_a_gpu_the_found_batch_fits_and_twice_as_much_would_not() -> None:
    cuda = torch.device("cuda")
    of_an_image = free_memory(cuda) // 300

    def work(size: int) -> torch.Tensor:
        return torch.empty(size * of_an_image, dtype=torch.uint8, device=cuda)

    assert largest_batch(work, 4096, cuda) == 128
    before = torch.cuda.memory_allocated(cuda)
    taken = batch_size.memory_taken(work, 150, cuda)
    assert taken == pytest.approx(0.5, abs=0.05)
    assert batch_size.memory_taken(work, 600, cuda) is None
    assert torch.cuda.memory_allocated(cuda) == before
