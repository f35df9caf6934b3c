"""Build the cache of a recipe: find or create it, then compute its missing blocks (`pipeline/build/blocks.py`).

torch is imported only when networks are needed, so that a complete cache is recognised fast.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import ValidationError

from cache_tools.alignment import check_manifest_canaries, make_canaries
from cache_tools.codecs.presets import resolve_codecs
from cache_tools.console import StopRequest, device_name, resolve_device
from cache_tools.errors import DataError, MismatchError, RecipeError, printable
from cache_tools.format.arrays import default_block_rows
from cache_tools.format.commits import BlockId
from cache_tools.format.manifest import CODE, DECODER, Manifest, check_code_versions, has_compiled
from cache_tools.format.recipe import CacheRecipe, ClipIdentity, TeacherIdentity
from cache_tools.format.rolling import Rolling
from cache_tools.format.stored import text_not_unicode
from cache_tools.images import open_images
from cache_tools.images.check import check_new_images, frame_notes
from cache_tools.images.classes import shared_notes, with_classes
from cache_tools.images.formats import decoder_versions
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import TestSplits
from cache_tools.places import open_place
from cache_tools.places.claims import remove_dead_claims
from cache_tools.places.metadata import manifest_at
from cache_tools.system.compilation import explain_compiler_failure
from cache_tools.system.memory import raise_on_out_of_memory
from cache_tools.system.ranks import Meeting, own_rank
from cache_tools.units import counted, duration
from pipeline.build.destination import destination
from pipeline.build.known import CODE_VERSIONS, INPUTS, find_finished, inputs_digest
from pipeline.build.multilabel_preflight import MultiLabelPreflight, run_multilabel_preflight
from pipeline.build.preflight import Preflight, run_preflight
from pipeline.recipe import BuildRecipe

if TYPE_CHECKING:
    from cache_tools.store.writer import CacheWriter
    from pipeline.build.output import Output
    from pipeline.networks.ensemble import TeacherEnsemble

SHARES_WITHIN_S = 120.0
"""How long rank 0 waits for the others' figures after its own last block; they end within seconds of each other."""

Identity = TypeVar("Identity", TeacherIdentity, ClipIdentity)


class BuildResult(NamedTuple):
    """The outcome of a build.

    Attributes:
        path: folder of the cache. For a cache in an object store, at `url`, its mirror with the blocks computed here.
        images: (sample, view) pairs that this run computed. `elapsed_s` is the time of the build loop alone.
        bytes_moved: to and from the object store.
        folders: split → what its folder holds besides samples (`FolderSummary.to_json`).
        images_of_ranks: what each of several ranks computed, known to the first; None for one that has not ended.
    """

    path: Path
    url: str | None
    manifest: Manifest
    preflight: Preflight | MultiLabelPreflight | None
    images: int = 0
    elapsed_s: float = 0.0
    bytes_moved: int = 0
    folders: dict[str, Any] | None = None
    images_of_ranks: tuple[int | None, ...] = ()


def build_cache(recipe: BuildRecipe, say: Callable[[str], None] = lambda text: None) -> BuildResult:
    """Build the cache of a recipe. Continues an earlier run, and shares the work with other builders of the cache.

    Of several ranks the first creates the cache, while the others load their networks and wait.

    Args:
        recipe: what to build; it goes to `recipe.out` or else into the cache home.
        say: receives one line per milestone.

    Raises:
        CacheError: a problem with data, weights, device or storage, or another recipe's cache in the same place.
    """
    rank = own_rank()
    if rank.is_alone:
        return _build_cache(recipe, say)
    meeting = Meeting(rank)
    wait: Callable[[], object] = (lambda: None) if rank.is_first else lambda: meeting.wait_for("created", 0)
    result = _build_cache(recipe, say, wait, created=lambda: meeting.announce("created"))
    meeting.announce("created")  # also where it was complete before
    meeting.announce("images", str(result.images))
    if not rank.is_first:
        return result
    counts = [meeting.wait_for("images", number, SHARES_WITHIN_S) for number in range(rank.count)]
    return result._replace(images_of_ranks=tuple(None if count is None else int(count) for count in counts))


class ReadyBuild(NamedTuple):
    """A cache that is ready for blocks, and what computes them.

    Attributes:
        batch_size: images per forward pass, the same for all builders that were not given another.
        missing: blocks that are not committed.
        result: the outcome if no further block is computed.
    """

    output: Output
    images: ImageSet
    ensemble: TeacherEnsemble
    batch_size: int
    missing: list[BlockId]
    result: BuildResult


def _build_cache(
    recipe: BuildRecipe,
    say: Callable[[str], None],
    wait: Callable[[], object] = lambda: None,
    created: Callable[[], None] = lambda: None,
) -> BuildResult:
    """`build_cache` in one process; see `prepare_build`."""
    request = StopRequest(recipe.max_minutes)
    ready = prepare_build(recipe, say, wait, created)
    if isinstance(ready, BuildResult):
        return ready

    from pipeline.build.blocks import build_blocks

    start = time.monotonic()
    output, images, ensemble = ready.output, ready.images, ready.ensemble
    count = build_blocks(
        output, images, ensemble, ready.batch_size, recipe.views_at_once, request, 60.0 * recipe.lease_minutes
    )
    return ready.result._replace(images=count, elapsed_s=time.monotonic() - start, bytes_moved=ready.output.bytes_moved)


def prepare_build(
    recipe: BuildRecipe,
    say: Callable[[str], None] = lambda text: None,
    wait: Callable[[], object] = lambda: None,
    created: Callable[[], None] = lambda: None,
) -> ReadyBuild | BuildResult:
    """Check the images, load the networks, and open the cache, which is created first if necessary.

    Args:
        wait: called when all is loaded; returns when this process may open or create the cache.
        created: called when the cache is ready for blocks.

    Returns:
        What builds the missing blocks, or the result if there are none.
    """
    if (bad := text_not_unicode(recipe.model_dump(mode="json"))) is not None:
        key, text = bad
        raise RecipeError("text that is not UTF-8, which a cache cannot store", where=key, found=text)
    if recipe.out is not None:
        open_place(recipe.out)  # fail early on a malformed URL
    images = open_images(recipe.dataset)
    finished = find_finished(recipe, images)
    if finished is not None and finished.manifest.dataset.test_split == recipe.dataset.test_split:
        say(f"{finished.where} {_complete(finished.manifest)}: nothing to do")
        remove_dead_claims(finished.where.place)
        contents = _folders([images])
        return BuildResult(*finished.where, finished.manifest, stored_preflight(finished.manifest), folders=contents)
    splits = (images, *_open_tests(recipe, images, say))
    for note in (*(note for split in splits for note in split.notes()), *shared_notes(*splits)):
        say(f"note: {note}")
    check_new_images(*splits)  # before the networks are loaded
    for note in frame_notes(*splits):
        say(f"note: {note}")

    from pipeline.build.batch_size import START, forward_pass, new_batch_size, require_room, stored_batch_size
    from pipeline.build.open_output import open_output
    from pipeline.networks.class_words import check_words
    from pipeline.networks.ensemble import load_ensemble
    from pipeline.networks.references import names_to_download
    from train.weights.names import remember

    for clip in recipe.clips:
        for note in check_words(images.class_names, clip.class_names):
            say(f"note: {note}")
    remember(names_to_download(recipe))
    device = resolve_device(recipe.device)
    inputs = inputs_digest(recipe)
    ensemble = load_ensemble(
        recipe.teachers,
        recipe.clips,
        recipe.fusion,
        images,
        recipe.dataset,
        device,
        recipe.precision,
        batch_size=START if recipe.batch_size == "auto" else recipe.batch_size,
    )
    for note in ensemble.notes:
        say(f"note: {note}")
    identity = resolve(recipe, images, ensemble)
    if identity.codecs.caution:
        say(f"note: {identity.codecs.caution}")
    if recipe.num_views > 1 and not recipe.views.ops and recipe.views.mix is None:
        say(
            f"note: all {recipe.num_views} views show the same pixels, because views.ops is empty: set it (such as "
            "--set views.ops=[pad-crop,flip]), or build one view (--views 1)"
        )
    wait()
    where = destination(recipe, identity.fingerprint)
    found: int | None = None

    def compile_networks(rows: int) -> None:
        names = [*(teacher.name for teacher in recipe.teachers), *(clip.name for clip in recipe.clips)]
        where, start = f"{' + '.join(names)} on {ensemble.device}", time.monotonic()
        ensemble.compile_for(rows)
        with (
            explain_compiler_failure("the networks cannot be compiled", f"{where}, --compile model"),
            raise_on_out_of_memory(where, "give a smaller --batch-size, or build where there is more memory"),
        ):
            forward_pass(identity, images, ensemble, recipe.num_views)(rows)
        say(f"networks compiled in {duration(time.monotonic() - start)}")

    def create(path: Path) -> CacheWriter:
        nonlocal found
        found = new_batch_size(recipe, identity, images, ensemble)
        rows = min(found, recipe.block_rows or default_block_rows(identity), len(images))
        compile_first = partial(compile_networks, rows) if recipe.compile == "model" else None
        return _create(path, recipe, found, identity, splits, ensemble, inputs, say, compile_first)

    output = open_output(
        where,
        identity,
        recipe.num_views,
        create=create,
        grow=lambda writer: _grow(writer, recipe, images, ensemble),
        check=lambda manifest: is_compiled(recipe, manifest, where),
    )
    if missing := output.missing_blocks():  # a build that is refused changes nothing
        check_code_versions(output.manifest, CODE_VERSIONS, where)
        is_compiled(recipe, output.manifest, where)
    begun = stored_batch_size(output.manifest)
    batch_size = begun if recipe.batch_size == "auto" else recipe.batch_size
    _record_test_split(output, recipe, batch_size, splits, ensemble, say)
    if recipe.keep_views is not None and (before := output.rolling()) != Rolling(
        keep=recipe.keep_views, dropped=0 if before is None else before.dropped
    ):
        output.keep_views(recipe.keep_views)
    created()
    manifest = output.manifest
    result = BuildResult(
        *where, manifest, stored_preflight(manifest), bytes_moved=output.bytes_moved, folders=_folders(splits)
    )
    ensemble.use_scales(manifest.clip_scales)
    if not missing:
        say(f"{where} {_complete(manifest_at(output.place))}: nothing to do")
        remove_dead_claims(output.place)
        return result
    if len(missing) < manifest.num_views * manifest.num_blocks:
        check_manifest_canaries(manifest, images)  # blocks of an earlier build have pixels of the same kind
    if recipe.batch_size == "auto":
        if batch_size != found:
            require_room(manifest, images, ensemble)
        say(f"batch size {batch_size:,}")
    elif batch_size != begun:
        say(
            f"note: this cache was begun with batches of {counted(begun, 'image')}, not {batch_size:,}: the last bits "
            "of targets may depend on it"
        )
    rows = min(batch_size, manifest.block_rows, len(images))
    if has_compiled(manifest) and ensemble.compiled_rows != rows:
        compile_networks(rows)
    say(f"{len(missing)} of {manifest.num_views * manifest.num_blocks} blocks to build in {where}")
    return ReadyBuild(output, images, ensemble, batch_size, missing, result)


def is_compiled(recipe: BuildRecipe, manifest: Manifest, where: object) -> bool:
    """Whether the networks of a cache are compiled for its further blocks, as for those before.

    Raises:
        MismatchError: the recipe asks for the other kind.
    """
    compiled = has_compiled(manifest)
    if recipe.compile == "auto" or (recipe.compile == "model") == compiled:
        return compiled
    begun, other = ("compiled", "plain") if compiled else ("plain", "compiled")
    raise MismatchError(
        f"this cache was begun with {begun} networks, and the targets of {other} ones differ by rounding: they must "
        "not be mixed",
        where=where,
        expected=f"--compile {'model' if compiled else 'off'}, or auto",
        found=f"--compile {recipe.compile}",
        next_step="use --compile auto, or choose another --out",
    )


def _complete(manifest: Manifest) -> str:
    rolling = manifest.rolling
    return f"has been built, and {rolling}" if rolling is not None and rolling.dropped else "is complete"


def _record_test_split(
    output: Output,
    recipe: BuildRecipe,
    batch_size: int,
    splits: Sequence[ImageSet],
    ensemble: TeacherEnsemble,
    say: Callable[[str], None],
) -> None:
    """Record the test splits of the recipe in a cache that has others, after a preflight on the new one."""
    before, after = output.manifest.dataset.test_split, recipe.dataset.test_split
    if before == after:
        return
    preflight: Preflight | MultiLabelPreflight | None = None
    if not recipe.preflight_samples:
        for split in recipe.dataset.test_splits:
            open_images(recipe.dataset, split)  # a name that is wrong is not recorded
    else:
        ensemble.use_scales(output.manifest.clip_scales)
        preflight = _measure(ensemble, recipe, ensemble.compiled_rows or batch_size, splits)
        say(f"preflight: {preflight}")
        if preflight.lost_by_fusion is not None:
            say(f"{preflight.lost_by_fusion} `cache-tools tune-fusion` can choose a better one from a component cache.")
    output.record_test_split(after, None if preflight is None else preflight.model_dump(), _folders(splits))
    say(f"the test split is now {_splits(after)} (it was {_splits(before)}); the targets stay as they are")


def _splits(splits: TestSplits | None) -> str:
    return splits if isinstance(splits, str) else ", ".join(splits or ()) or "none"


def resolve(recipe: BuildRecipe, images: ImageSet, ensemble: TeacherEnsemble) -> CacheRecipe:
    """The recipe with every name resolved: content digests, preprocessing, prompts."""
    return CacheRecipe(
        dataset=images.identity(),
        views=recipe.views,
        teachers=_weighted([teacher.identity for teacher in ensemble.teachers], ensemble.fusion.teacher_weights),
        clips=_weighted([clip.identity for clip in ensemble.clips], ensemble.fusion.clip_weights),
        fusion=recipe.fusion.for_groups(teachers=bool(ensemble.teachers), clips=bool(ensemble.clips)),
        store=recipe.store,
        codecs=resolve_codecs(recipe.codec, len(images.class_names)),
        precision=recipe.precision,
    )


def _weighted(identities: Sequence[Identity], weights: Sequence[float]) -> tuple[Identity, ...]:
    return tuple(
        identity.model_copy(update={"weight": weight}) for identity, weight in zip(identities, weights, strict=True)
    )


def _create(
    path: Path,
    recipe: BuildRecipe,
    batch_size: int,
    identity: CacheRecipe,
    splits: Sequence[ImageSet],
    ensemble: TeacherEnsemble,
    inputs: str | None,
    say: Callable[[str], None],
    compile_networks: Callable[[], None] | None,
) -> CacheWriter:
    """Create an empty cache after the preflight.

    Args:
        splits: the training split and the test splits.
        compile_networks: called after the preflight, whose images may have another size; None for plain networks.
    """
    from cache_tools.store.writer import CacheWriter

    images = splits[0]
    preflight: Preflight | MultiLabelPreflight | None = None
    if recipe.preflight_samples:
        preflight = _measure(ensemble, recipe, batch_size, splits)
        say(f"preflight: {preflight}")
        for note in preflight.notes:
            say(f"note: {note}")
    if compile_networks is not None:
        compile_networks()
    if inputs_digest(recipe) != inputs:  # a file was replaced after its network was loaded
        inputs = None
    manifest = Manifest(
        fingerprint=identity.fingerprint,
        name=recipe.name,
        recipe=identity,
        dataset=recipe.dataset.absolute(),  # readers may run in another working directory
        num_views=recipe.num_views,
        rolling=None if recipe.keep_views is None else Rolling(keep=recipe.keep_views),
        block_rows=recipe.block_rows or default_block_rows(identity),
        clip_scales=ensemble.fusion.clip_scales,
        canaries=make_canaries(identity.views, images, recipe.num_views),
        build_recipe=_as_stored(recipe, batch_size, ensemble).model_dump(mode="json"),
        provenance=_provenance("created", ensemble, images, compiled=compile_networks is not None)
        | ({"notes": list(ensemble.notes)} if ensemble.notes else {})
        | {
            "preflight": preflight.model_dump() if preflight else None,
            INPUTS: inputs,
            CODE: CODE_VERSIONS,
            "folders": _folders(splits),
        },
    )
    return CacheWriter.create(
        path,
        manifest,
        labels=images.labels,
        sample_keys=images.keys,
        constants=_constants(recipe, batch_size, identity, images, ensemble),
    )


def _as_stored(recipe: BuildRecipe, batch_size: int, ensemble: TeacherEnsemble) -> BuildRecipe:
    """The recipe with what was found out: the batch size, and the names of the teachers' outputs.

    The names came with the weights. With them a replay needs no list.
    """
    recipe = recipe.model_copy(update={"batch_size": batch_size})
    specs = tuple(
        spec.model_copy(update={"classes": teacher.own_classes})
        if spec.classes is None and teacher.identity.outputs is not None
        else spec
        for spec, teacher in zip(recipe.teachers, ensemble.teachers, strict=True)
    )
    if specs == recipe.teachers:
        return recipe
    return recipe.model_copy(update={"teacher": specs if isinstance(recipe.teacher, tuple) else specs[0]})


def _grow(writer: CacheWriter, recipe: BuildRecipe, images: ImageSet, ensemble: TeacherEnsemble) -> CacheWriter:
    """Add room for more views, with their own canaries and a note of the time and the build."""
    check_code_versions(writer.manifest, CODE_VERSIONS, writer.path)
    is_compiled(recipe, writer.manifest, writer.path)
    before = writer.manifest.num_views
    return writer.grow(
        recipe.num_views,
        canaries=make_canaries(writer.manifest.recipe.views, images, recipe.num_views, first=before),
        note=_provenance("date", ensemble, images, compiled=has_compiled(writer.manifest))
        | {"views": [before, recipe.num_views]},
    )


def _provenance(date_key: str, ensemble: TeacherEnsemble, images: ImageSet, *, compiled: bool) -> dict[str, Any]:
    """The provenance of this run; its date goes under `date_key`."""
    from pipeline.networks.weights import kernel_settings

    decoder = {} if images.resident else {DECODER: decoder_versions()}
    kernels = {"kernels": settings} if (settings := kernel_settings(ensemble.device, compiled=compiled)) else {}
    return (
        decoder
        | kernels
        | {
            date_key: datetime.now(UTC).isoformat(timespec="seconds"),
            "command": printable(" ".join(sys.argv)),
            "device": device_name(ensemble.device),
            "versions": {name: version(name) for name in ("teacher-cache", "torch", "open_clip_torch", "timm", "zarr")},
            "python": platform.python_version(),
        }
    )


def _constants(
    recipe: BuildRecipe, batch_size: int, identity: CacheRecipe, images: ImageSet, ensemble: TeacherEnsemble
) -> dict[str, np.ndarray]:
    """The arrays that hold for all samples and views, constants of fitted codecs included.

    Encodes a sample of rows: values that a codec cannot store are found now instead of hours later.
    """
    from cache_tools.store.encoding import Encoder, fit_codecs, fit_rows
    from pipeline.networks.ensemble import view_pixels

    constants = ensemble.constants(recipe.store)
    if identity.codecs.is_floating:
        return constants
    index = fit_rows(identity, len(images))
    batch_size = ensemble.compiled_rows or batch_size
    rows: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(index), batch_size):
        pixels = view_pixels(images, recipe.views, index[start : start + batch_size], 0, ensemble.device)
        for name, values in ensemble.targets(pixels.teacher, recipe.store, pixels.clip).items():
            rows.setdefault(name, []).append(values.float().cpu().numpy())
    sample = {name: np.concatenate(parts) for name, parts in rows.items()}
    constants |= fit_codecs(identity, sample)
    Encoder(identity, constants.__getitem__).encode(sample, where="a sample of view 0")
    return constants


def stored_preflight(manifest: Manifest) -> Preflight | MultiLabelPreflight | None:
    """The preflight of the first build; None if there was none or the manifest has something else in its place."""
    for kind in (Preflight, MultiLabelPreflight):
        with suppress(ValidationError):
            return kind.model_validate(manifest.provenance.get("preflight"))
    return None


def _open_tests(recipe: BuildRecipe, images: ImageSet, say: Callable[[str], None]) -> list[ImageSet]:
    """The test splits, with the labels of the training images.

    The preflight needs the first, and the images of all are checked. Without a preflight they may be elsewhere.
    """
    tests: list[ImageSet] = []
    if not (recipe.preflight_samples or recipe.dataset.has_image_files):
        return tests
    for split in recipe.dataset.test_splits:
        try:
            tests.append(open_images(recipe.dataset, split))
        except DataError as error:
            if recipe.preflight_samples:
                raise
            say(f"note: the test split is not checked: {error}")
    return [with_classes(test, images.class_names) for test in tests]


def _preflight_images(splits: Sequence[ImageSet]) -> ImageSet:
    """The first test split if there is one: a teacher looks too good on its own training images."""
    return splits[1] if len(splits) > 1 else splits[0]


def _measure(
    ensemble: TeacherEnsemble, recipe: BuildRecipe, batch_size: int, splits: Sequence[ImageSet]
) -> Preflight | MultiLabelPreflight:
    """The preflight on the part of each image that students are tested on, at each network's own size."""
    from train.evaluate.canvas import network_tests

    images, normalisation = _preflight_images(splits), recipe.dataset.normalisation
    test, for_clip = network_tests(images, recipe.views, recipe.evaluation, normalisation)
    how = (ensemble, test.images, recipe.preflight_samples, batch_size, test.preprocessing)
    return run_multilabel_preflight(*how) if images.multi_label else run_preflight(*how, for_clip)


def _folders(splits: Sequence[ImageSet]) -> dict[str, Any] | None:
    """What the folders of the splits hold besides samples, by split; None for array sources."""
    found = {images.split: images.folder_contents() for images in splits}
    return {split: content for split, content in found.items() if content is not None} or None
