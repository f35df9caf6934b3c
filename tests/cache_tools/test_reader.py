import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from zarr.core.metadata import ArrayV3Metadata

from cache_tools import fusion
from cache_tools.errors import (
    CacheError,
    DeviceError,
    FormatError,
    IncompleteError,
    NotFoundError,
    StorageError,
)
from cache_tools.files import SafeFolder
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import FusionRecipe
from cache_tools.reader import TeacherCache, ViewTargets
from cache_tools.store.writer import CacheWriter
from cache_tools.targets import ComponentView
from tests.support.cache_factory import build, create, tiny_constants, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.fusion_by_hand import fused_by_hand
from tests.support.turns import turns

IMAGES = tiny_images()
MANIFEST = tiny_manifest(IMAGES)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TeacherCache]:
    """Complete caches, not to be written to."""
    folder = tmp_path_factory.mktemp("caches")
    kinds: dict[str, dict[str, Any]] = {
        "fused": {},
        "float32": {"codec": "float32"},
        "components": {"store": "components"},
        "logits": {"store": "components", "linear_head": False, "codec": "float32"},
        "several": {"store": "components", "teacher_weights": (0.25, 0.75), "clip_weights": (0.4, 0.6)},
        "probabilities": {"store": "components", "fusion": FusionRecipe(prompt_ensemble="probabilities")},
    }
    for name, kind in kinds.items():
        build(folder / name, tiny_manifest(IMAGES, **kind), IMAGES)
    return {name: TeacherCache.open(folder / name) for name in kinds}


def test_a_cache_describes_itself(caches: dict[str, TeacherCache], tmp_path: Path) -> None:
    cache = caches["several"]
    lines = dict(line.split("  ", 1) for line in cache.describe().splitlines())
    assert {name: text.strip() for name, text in lines.items()}["images"] == "digits/train: 75, 5 classes, 32×32"
    assert cache.describe().count("\nteacher  ") == cache.describe().count("\nCLIP  ") == 2
    assert "clip_features" in lines
    assert "3 × 75 × 10, float16 (float16)" in lines["clip_features"]
    page = cache._repr_html_()
    assert page.count("<tr>") == len(cache.describe().splitlines())
    assert "3 of 3 complete" in page
    images = tiny_images()
    hostile = tiny_manifest(images, name="x").model_copy(update={"name": "<script>\x1b[31m"})
    build(tmp_path / "hostile", hostile, images)
    text = TeacherCache.open(tmp_path / "hostile")._repr_html_() + TeacherCache.open(tmp_path / "hostile").describe()
    assert "<script>\\x1b[31m" in text
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text


# The format is open


@pytest.mark.parametrize("kind", ["fused", "float32", "components", "logits", "several", "probabilities"])
def test_tensorstore_and_the_reader_agree(caches: dict[str, TeacherCache], kind: str) -> None:
    cache = caches[kind]

    def read(name: str) -> np.ndarray:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache.path / name)}}
        return tensorstore.open(spec, open=True).result().read().result()

    for name, written in tiny_targets(cache.manifest).items():
        stored = read(name)
        np.testing.assert_array_equal(stored, written)
        for view in range(cache.num_views):
            np.testing.assert_array_equal(stored[view], cache.load_view(view).arrays[name].numpy())
    for name in tiny_constants(cache.manifest):
        np.testing.assert_array_equal(read(name), cache.constant(name))
    np.testing.assert_array_equal(read("labels"), cache.labels)
    np.testing.assert_array_equal(read("sample_keys"), cache.sample_keys)
    np.testing.assert_array_equal(read("commits"), zarr.open_array(cache.path / "commits", mode="r")[...])


def test_arrays_name_their_axes_and_codecs(caches: dict[str, TeacherCache]) -> None:
    array = zarr.open_array(caches["fused"].path / "fused_logits", mode="r")
    assert isinstance(array.metadata, ArrayV3Metadata)
    assert array.metadata.dimension_names == ("view", "sample", "class")
    assert [codec.to_dict()["name"] for codec in array.metadata.codecs] == ["bytes", "zstd", "crc32c"]
    assert array.chunks == (1, 16, 5)


def test_each_network_has_its_own_axis_names(caches: dict[str, TeacherCache]) -> None:
    """A dimension name has one length in the whole group: tools that align arrays by name rely on it."""
    lengths: dict[str, set[int]] = {}
    for file in caches["several"].path.glob("*/zarr.json"):
        array = zarr.open_array(file.parent, mode="r")
        assert isinstance(array.metadata, ArrayV3Metadata)
        for name, length in zip(array.metadata.dimension_names or (), array.shape, strict=True):
            lengths.setdefault(str(name), set()).add(length)
    assert all(len(found) == 1 for found in lengths.values()), lengths
    assert {"teacher_feature", "teacher_feature_2", "clip_feature_2", "prompt_2", "class"} <= set(lengths)


# Properties


def test_properties_of_a_cache(caches: dict[str, TeacherCache]) -> None:
    cache = caches["fused"]
    assert (cache.num_views, cache.num_samples, cache.num_classes) == (3, 75, 5)
    assert cache.class_names == IMAGES.class_names
    assert cache.recipe == MANIFEST.recipe
    assert cache.manifest == MANIFEST
    assert cache.complete_views == (0, 1, 2)
    assert cache.is_complete
    cache.require_complete()
    assert MANIFEST.fingerprint[:12] in repr(cache)


# The fast path is the plain path


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", ["fused", "float32"])
def test_a_resident_view_equals_plain_reads(caches: dict[str, TeacherCache], kind: str, verify: bool) -> None:
    cache, order = caches[kind], np.random.default_rng(0).permutation(75)
    for view in range(3):
        targets = cache.load_view(view, "cpu", verify=verify)
        assert targets.arrays["fused_logits"].dtype == getattr(torch, cache.recipe.codecs.logits.codec)
        for rows in (order[:20], order[20:21], order):
            plain = np.stack([cache.read_array("fused_logits", view, slice(row, row + 1))[0] for row in rows])
            np.testing.assert_array_equal(targets.logits(rows).numpy(), plain.astype(np.float32))
        np.testing.assert_array_equal(targets.features(order), cache.read_array("fused_features", view)[order])


@pytest.mark.parametrize("kind", ["fused", "components", "logits", "several", "probabilities"])
@pytest.mark.parametrize("blocks", [[0], [4], [3, 0, 4], range(1, 3), range(5)])
def test_blocks_of_a_view_equal_its_rows(caches: dict[str, TeacherCache], kind: str, blocks: Sequence[int]) -> None:
    """75 samples in blocks of 16, the last one short; in the order asked for, bit for bit."""
    cache = caches[kind]
    whole, part = cache.load_view(1), cache.load_view(1, blocks=blocks)
    rows = np.concatenate([np.arange(75)[cache.manifest.block(block)] for block in blocks])
    assert len(part) == len(rows)
    assert part.logits(slice(None)).equal(whole.logits(rows))
    assert part.features(slice(None)).equal(whole.features(rows))
    if kind != "fused":
        for one, other in zip(part.component_features(slice(None)), whole.component_features(rows), strict=True):
            assert one.equal(other)


def test_blocks_that_are_not_there_are_refused(caches: dict[str, TeacherCache], tmp_path: Path) -> None:
    for block in (-1, 5):
        with pytest.raises(NotFoundError, match=f"0 to 4.*{block}"):
            caches["fused"].load_view(0, blocks=[0, block])
    writer = create(tmp_path / "half", MANIFEST, IMAGES)
    write(writer, tiny_targets(MANIFEST), [(0, 2), (0, 4)])
    half = TeacherCache(tmp_path / "half")
    assert len(half.load_view(0, blocks=[4, 2])) == 16 + 11
    with pytest.raises(IncompleteError, match="3 missing"):
        half.load_view(0, blocks=[4, 3, 2])


@pytest.mark.parametrize("kind", ["components", "logits", "several", "probabilities"])
def test_fused_components_equal_the_equations(
    caches: dict[str, TeacherCache], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 numpy; a view is fused in several pieces."""
    monkeypatch.setattr("cache_tools.targets.FUSE_ROWS", 32)
    cache, rows = caches[kind], [4, 70, 4]
    for view in range(3):
        expected, targets = fused_by_hand(cache, view), cache.load_view(view)
        np.testing.assert_allclose(targets.logits(rows), expected.logits[rows], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(targets.features(rows), expected.features[rows], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(targets.teacher_logits(rows), expected.teacher[rows], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(targets.clip_logits(rows), expected.clip[rows], rtol=1e-5, atol=1e-4)


def test_targets_of_single_networks(caches: dict[str, TeacherCache]) -> None:
    """Two teachers, one with a linear head, and two CLIPs with different scales."""
    cache, rows = caches["several"], [4, 70, 4]
    targets = cache.load_view(1)
    for number, suffix in enumerate(("", "_2")):
        for name in ("teacher_features", "clip_features"):
            stored = cache.read_array(name + suffix, 1)[rows].astype(np.float32)
            np.testing.assert_array_equal(getattr(targets, name)(rows, number), stored)
        alone = tuple(float(other == number) for other in range(2))
        expected = fused_by_hand(cache, 1, teacher_weights=alone, clip_weights=alone)
        np.testing.assert_allclose(targets.teacher_logits(rows, number), expected.teacher[rows], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(targets.clip_logits(rows, number), expected.clip[rows], rtol=1e-5, atol=1e-4)
        scaled = cache.manifest.clip_scales[number] * targets.cosine(rows, number)
        assert torch.equal(scaled, targets.clip_logits(rows, number))
    own = targets.component_features(rows)
    assert [each.shape[1] for each in own] == [12, 15, 10, 12]
    assert torch.equal(own[1], targets.teacher_features(rows, 1))
    assert torch.equal(own[2], targets.clip_features(rows, 0))
    with pytest.raises(NotFoundError, match="teacher features 3 are not loaded"):
        targets.teacher_features(rows, 2)


@pytest.mark.parametrize("kind", ["components", "several"])
@pytest.mark.parametrize("wanted", [{"logits": False}, {"features": False}, {"logits": False, "features": False}])
def test_only_requested_targets_are_fused(caches: dict[str, TeacherCache], kind: str, wanted: dict[str, Any]) -> None:
    everything, some = caches[kind].load_view(0), caches[kind].load_view(0, **wanted)
    for name in ("logits", "features"):
        if wanted.get(name, True):
            assert torch.equal(getattr(some, name)([3, 1]), getattr(everything, name)([3, 1]))
        else:
            with pytest.raises(NotFoundError, match=f"fused {name} are not loaded"):
                getattr(some, name)([3, 1])
    assert torch.equal(some.clip_logits([3, 1]), everything.clip_logits([3, 1]))


def test_component_and_fused_caches_of_the_same_teachers_agree(tmp_path: Path) -> None:
    components = tiny_manifest(IMAGES, store="components", codec="float32")
    stored = build(tmp_path / "components", components, IMAGES)
    constants = {name: torch.from_numpy(values) for name, values in tiny_constants(components).items()}
    fused = tiny_manifest(IMAGES, codec="float32")
    targets: dict[str, list[np.ndarray]] = {"fused_logits": [], "fused_features": []}
    for view in range(3):
        features, clip = (torch.from_numpy(stored[name][view]) for name in ("teacher_features", "clip_features"))
        teacher = fusion.linear_logits(features, constants["teacher_head_weight"], constants["teacher_head_bias"])
        recipe = Fusion.stored(components)
        clip_logits = fusion.clip_logits(clip, constants["class_embeddings"], 100.0)
        logits = fusion.fused_logits([teacher], [clip_logits], recipe)
        mixed = fusion.fused_features(
            [features], [constants["teacher_projection"]], [clip], [constants["clip_projection"]], recipe
        )
        targets["fused_logits"].append(logits.numpy())
        targets["fused_features"].append(mixed.numpy())
    write(create(tmp_path / "fused", fused, IMAGES), {name: np.stack(views) for name, views in targets.items()})
    for view in range(3):
        one = TeacherCache.open(tmp_path / "components").load_view(view)
        two = TeacherCache.open(tmp_path / "fused").load_view(view)
        torch.testing.assert_close(one.logits(slice(None)), two.logits(slice(None)), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(one.features(slice(None)), two.features(slice(None)), rtol=1e-6, atol=1e-6)


def test_only_requested_arrays_are_loaded(caches: dict[str, TeacherCache]) -> None:
    targets = caches["fused"].load_view(0, logits=True, features=False)
    assert list(targets.arrays) == ["fused_logits"]
    assert targets.nbytes == 75 * 5 * 2
    assert len(targets) == 75
    with pytest.raises(NotFoundError, match="fused features are not loaded"):
        targets.features([0])
    with pytest.raises(NotFoundError, match="--store components"):
        targets.teacher_features([0])


def test_targets_move_between_devices(caches: dict[str, TeacherCache]) -> None:
    targets = caches["components"].load_view(1)
    moved = targets.to("cpu")
    assert isinstance(moved, ComponentView)
    assert isinstance(moved, ViewTargets)
    assert moved.device == torch.device("cpu")
    assert torch.equal(moved.logits([5]), targets.logits([5]))
    with pytest.raises(DeviceError):
        caches["components"].load_view(1, "tpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["fused", "float32", "components", "logits", "several", "probabilities"])
def test_a_view_on_cuda_equals_the_one_on_the_cpu(caches: dict[str, TeacherCache], kind: str) -> None:
    rows = np.random.default_rng(0).permutation(75)
    for view in range(3):
        on_cpu, on_cuda = caches[kind].load_view(view), caches[kind].load_view(view, "cuda")
        assert on_cuda.logits(rows).device.type == "cuda"
        rtol, atol = (0.0, 0.0) if kind in {"fused", "float32"} else (1e-5, 1e-4)
        for index in (rows, rows.tolist(), torch.from_numpy(rows), torch.from_numpy(rows).cuda(), slice(3, 50)):
            same = index.cpu() if isinstance(index, torch.Tensor) else index
            torch.testing.assert_close(on_cuda.logits(index).cpu(), on_cpu.logits(same), rtol=rtol, atol=atol)
            torch.testing.assert_close(on_cuda.features(index).cpu(), on_cpu.features(same), rtol=rtol, atol=atol)
        for name in tiny_targets(caches[kind].manifest):
            assert torch.equal(on_cuda.arrays[name].cpu(), on_cpu.arrays[name])
        assert on_cuda.to("cpu").device.type == "cpu"


# Half-built caches


def test_incomplete_views_are_refused(tmp_path: Path) -> None:
    writer = create(tmp_path / "c", MANIFEST, IMAGES)
    targets = tiny_targets(MANIFEST)
    cache = TeacherCache.open(tmp_path / "c")
    assert list(cache.complete_views) == []
    write(writer, targets, [(1, block) for block in range(5)] + [(2, 0), (2, 4)])
    assert cache.complete_views == (1,)
    assert not cache.is_complete
    np.testing.assert_array_equal(cache.load_view(1).arrays["fused_logits"], targets["fused_logits"][1])
    with pytest.raises(IncompleteError, match=r"view 2 is not .* found 1–3 missing\. Run the same build-cache"):
        cache.load_view(2)
    np.testing.assert_array_equal(cache.read_array("fused_logits", 2, slice(64, 75)), targets["fused_logits"][2, 64:])
    with pytest.raises(IncompleteError, match="found 3 missing"):
        cache.read_array("fused_logits", 2, slice(63, 75))
    with pytest.raises(IncompleteError, match=r"found 1 complete, 8 of 15 blocks missing"):
        cache.require_complete()
    write(writer, targets)
    cache.require_complete()
    assert len(cache.load_view(2)) == 75


@pytest.mark.parametrize("view", [-1, 3])
def test_views_that_do_not_exist(caches: dict[str, TeacherCache], view: int) -> None:
    with pytest.raises(NotFoundError, match=r"no such view.*0 to 2"):
        caches["fused"].load_view(view)
    with pytest.raises(NotFoundError):
        caches["fused"].read_array("fused_logits", view)


def test_arrays_and_constants_that_do_not_exist(caches: dict[str, TeacherCache]) -> None:
    with pytest.raises(NotFoundError, match="fused_logits, fused_features"):
        caches["fused"].read_array("teacher_logits", 0)
    with pytest.raises(NotFoundError, match="teacher_projection"):
        caches["fused"].constant("text_features")


# Damage


def read_everything(path: Path) -> None:
    cache = TeacherCache.open(path)
    cache.require_complete()
    for view in range(cache.num_views):
        cache.load_view(view)
    assert len(cache.labels) == len(cache.sample_keys)
    for name in tiny_constants(cache.manifest):
        cache.constant(name)


def damage(file: Path, kind: str) -> None:
    data = file.read_bytes()
    if kind == "gone":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :])


DAMAGE = {
    "fused_logits/c.1.2.0": r"fused_logits, view 1, block 2.*Remove .*commits/c\.1\.2\.0 and run",
    "fused_features/c.2.4.0": r"fused_features, view 2, block 4.*Remove .*commits/c\.2\.4\.0 and run",
    "commits/c.0.3.0": r"c\.0\.3\.0|not completely built",
    "labels/c.0": "labels",
    "sample_keys/c.0.0": "keys",
    "class_embeddings/c.0.0": "class_embeddings",
    "zarr.json": r"not a teacher cache|zarr\.json|manifest",
    "fused_logits/zarr.json": "fused_logits",
    "commits/zarr.json": "commits",
}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("file", "kind"),
    [
        (file, kind)
        for file in DAMAGE
        for kind in ("gone", "empty", "truncated", "flipped")
        if not (kind == "flipped" and file.endswith("/zarr.json"))  # may be harmless: see the next test
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, file: str, kind: str) -> None:
    build(tmp_path / "c", MANIFEST, IMAGES)
    read_everything(tmp_path / "c")
    damage(tmp_path / "c" / file, kind)
    with pytest.raises((FormatError, IncompleteError), match=DAMAGE[file]) as caught:
        read_everything(tmp_path / "c")
    assert "\n" not in str(caught.value)


@pytest.mark.turns
@pytest.mark.parametrize("array", ["fused_logits", "commits", "labels"])
def test_a_flipped_bit_in_metadata_is_an_error_or_changes_nothing(tmp_path: Path, array: str) -> None:
    targets = build(tmp_path / "c", MANIFEST, IMAGES)
    file = tmp_path / "c" / array / "zarr.json"
    data = file.read_bytes()
    found = 0
    for position in range(0, len(data), turns(15, 5)):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 7]) + data[position + 1 :])
        try:
            cache = TeacherCache.open(tmp_path / "c")
            np.testing.assert_array_equal(cache.load_view(1).arrays["fused_logits"], targets["fused_logits"][1])
            np.testing.assert_array_equal(cache.labels, IMAGES.labels)
        except CacheError:
            found += 1
    assert found > turns(6, 20)


def test_swapped_chunks_are_found(tmp_path: Path) -> None:
    """Each chunk passes its own crc32c; only the commit shows that it belongs to another block."""
    build(tmp_path / "c", MANIFEST, IMAGES)
    one, two = (tmp_path / "c" / "fused_logits" / name for name in ("c.0.1.0", "c.0.2.0"))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(FormatError, match=r"not those that were committed.*fused_logits, view 0, block 1"):
        TeacherCache.open(tmp_path / "c").load_view(0)
    TeacherCache.open(tmp_path / "c").load_view(0, verify=False)


def test_following_the_message_repairs_a_damaged_block(tmp_path: Path) -> None:
    targets = build(tmp_path / "c", MANIFEST, IMAGES)
    damage(tmp_path / "c" / "fused_logits" / "c.1.4.0", "flipped")
    with pytest.raises(FormatError) as caught:
        TeacherCache.open(tmp_path / "c").load_view(1)
    named = str(caught.value.next_step).removeprefix("remove ").split(" and run")[0]
    Path(named).unlink()
    writer = CacheWriter.resume(tmp_path / "c", MANIFEST.fingerprint)
    assert writer.missing_blocks() == [(1, 4)]
    write(writer, targets)
    loaded = TeacherCache.open(tmp_path / "c").load_view(1)
    np.testing.assert_array_equal(loaded.arrays["fused_logits"], targets["fused_logits"][1])


def test_an_array_of_another_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "c", MANIFEST, IMAGES)
    build(tmp_path / "d", tiny_manifest(IMAGES, codec="float32"), IMAGES)
    file = tmp_path / "c" / "fused_logits" / "zarr.json"
    file.write_bytes((tmp_path / "d" / "fused_logits" / "zarr.json").read_bytes())
    with pytest.raises(FormatError, match=r"expected float16 \[3, 75, 5\]; found float32"):
        TeacherCache.open(tmp_path / "c")


def test_an_unreadable_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "c", MANIFEST, IMAGES)
    cache = TeacherCache.open(tmp_path / "c")
    assert cache.is_complete
    real = SafeFolder.read_bytes

    def fail(self: SafeFolder, name: str, limit: int | None = None) -> bytes:
        if name.endswith("c.1.2.0"):
            raise OSError(5, "Input/output error", str(self.path / name))
        return real(self, name, limit)

    monkeypatch.setattr(SafeFolder, "read_bytes", fail)
    with pytest.raises(StorageError, match=r"Input/output error.*c\.1\.2\.0"):
        cache.load_view(1)


def test_opening_a_local_cache_imports_neither_torch_nor_remote_code(caches: dict[str, TeacherCache]) -> None:
    code = (
        "import sys; from cache_tools import TeacherCache; "
        "cache = TeacherCache.open(sys.argv[1]); assert cache.is_complete and len(cache.labels); "
        "cache.read_stored('fused_logits', 0); "
        "assert not {'torch', 'obstore', 'cache_tools.home.staging'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(caches["fused"].path)], check=True)
