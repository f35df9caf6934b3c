"""Read a cache: open it by path, name, fingerprint or URL, and load whole views onto a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cache_tools import alignment
from cache_tools.console import resolve_device
from cache_tools.errors import FormatError, MismatchError, NotFoundError, printable
from cache_tools.format import commits
from cache_tools.format.arrays import SEEDS, seed_arrays, targets
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import CacheRecipe
from cache_tools.format.rolling import Rolling
from cache_tools.home import registry
from cache_tools.home.origin import budget_is_refused, read_origin
from cache_tools.places import LocalPlace, Place, is_remote
from cache_tools.store.blocks import LocalBlocks
from cache_tools.store.group import RESTORE, check_chunks, open_array, open_group, read_manifest, translate_errors
from cache_tools.store.whole import StoredConstants, check_whole_arrays, read_samples
from cache_tools.system.devices import copy_to

if TYPE_CHECKING:
    import torch

    from cache_tools.home.stage import Stage
    from cache_tools.home.staging import Origin
    from cache_tools.images.image_set import ImageSet
    from cache_tools.targets import ViewTargets

__all__ = ["TeacherCache", "ViewTargets"]


def __getattr__(name: str) -> Any:
    """Import `ViewTargets` on first use: it needs torch, and commands that only look at a cache do not."""
    if name == "ViewTargets":
        from cache_tools.targets import ViewTargets

        return ViewTargets
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class TeacherCache:
    """A cache, opened for reading. Opening is cheap: arrays are read when a view is loaded.

    A pickled or copied cache is its path: unpickling, in a worker of a DataLoader for example, opens the cache again.

    Args:
        path: folder of the cache.
        origin: the remote cache that this folder mirrors; blocks that the mirror lacks are staged from it.

    Attributes:
        path: folder of the cache; for a remote cache, its mirror in the cache home.
        manifest: recipe, geometry and provenance.
        targets: what is cached for each (view, sample), by name, with its codec.
        origin: the remote cache behind a mirror; None for a local cache.
    """

    def __init__(self, path: Path, origin: Origin | None = None) -> None:
        self.path, self.manifest, self.origin = path, read_manifest(path), origin
        self.targets = {spec.name: spec for spec in targets(self.recipe, self.manifest.block_rows)}
        self._specs = {array.name: array for spec in self.targets.values() for array in spec.arrays}
        self._specs |= {array.name: array for array in seed_arrays(self.recipe, self.manifest.block_rows)}
        for spec in self._specs.values():
            spec.stored.check_readable()
        self._layouts = array_layouts(self.manifest)
        self._group = open_group(path, self._layouts)
        self._arrays = {name: open_array(self._group, path, name, self._layouts) for name in self._specs}
        self._constants = StoredConstants(self._group, path, self.manifest, self._layouts)
        table = open_array(self._group, path, commits.COMMITS, self._layouts)
        self._blocks = (
            LocalBlocks(path, self.manifest, table) if origin is None else origin.blocks(self.manifest, table)
        )

    @classmethod
    def open(cls, reference: str | Path, *, stage_budget: int | None = None) -> TeacherCache:
        """Open a cache.

        Args:
            reference: a path, the name or fingerprint prefix (four hex digits or more) of a cache in the cache home, or
                the URL of a remote cache (`s3://…`, `gs://…`, `az://…`), which gets a mirror in the cache home.
            stage_budget: of a remote cache: bytes of this disk that it may take. Views are dropped again when room is
                needed; `close` gives up those that are left. None keeps every view that was read.

        Raises:
            RecipeError: a budget without room for two views, or for a local cache.
            NotFoundError: nothing has that path, URL, name or fingerprint, or several caches have it.
            FormatError: not a cache, a damaged cache, or an unknown format version.
            StorageError: the store does not answer and nothing of the cache is staged.
        """
        if is_remote(reference):
            from cache_tools.home import staging

            origin = staging.connect(str(reference), stage_budget)
            return cls(origin.mirror, origin)
        if stage_budget is not None:
            raise budget_is_refused("stage_budget", reference)
        path = registry.resolve(reference)
        record = read_origin(path)
        if record is None or not record.is_mirror:
            return cls(path)
        from cache_tools.home import staging

        return cls(path, staging.Origin(path, record))

    @property
    def recipe(self) -> CacheRecipe:
        return self.manifest.recipe

    @property
    def num_views(self) -> int:
        return self.manifest.num_views

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.recipe.dataset.class_names

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Ground truth, int64 [N]."""
        return self._samples[0]

    @property
    def sample_keys(self) -> npt.NDArray[np.uint8]:
        """Content keys, uint8 [N, 16]."""
        return self._samples[1]

    @property
    def complete_views(self) -> tuple[int, ...]:
        """Views whose every block can be read, ascending. During a build, each call looks again."""
        return tuple(int(view) for view in np.flatnonzero(self.committed_blocks().all(axis=1)))

    @property
    def is_complete(self) -> bool:
        return len(self.complete_views) == self.num_views

    def load_view(
        self,
        view: int,
        device: str | torch.device = "cpu",
        *,
        logits: bool = True,
        features: bool = True,
        verify: bool = True,
        fusion: Fusion | None = None,
        blocks: Sequence[int] | None = None,
    ) -> ViewTargets:
        """Read a whole view, or some blocks of it, and copy it to a device as it is stored; batches are decoded there.

        Copies to CUDA start from pinned memory on the current stream and are not waited for.

        Args:
            logits, features: which fused targets to load. The components of a component cache are always loaded.
            verify: compare the data with the digests in the commits.
            fusion: how to fuse a component cache (`FusionChoice(…).resolve(cache)`); by default as it was built.
            blocks: numbers of the blocks to read (rows `manifest.block(number)` each); the targets then have the rows
                of these blocks alone, one block after the other. The rows equal those of the whole view bit for bit.

        Raises:
            IncompleteError: the view, or one of the blocks, is not completely built.
            DroppedError: the view was dropped (`build-cache --keep-views`).
            FormatError: stored bytes are damaged or missing, or differ from what was committed.
            NotFoundError: no such view.
            DeviceError: no such device.
        """
        from cache_tools.targets import ComponentView, FusedView, fusion_constants

        target_device = resolve_device(str(device))
        fusion = fusion or Fusion.stored(self.manifest)
        wanted = {"fused_logits": logits, "fused_features": features}
        specs = {name: spec for name, spec in self.targets.items() if wanted.get(name, True)}
        chosen = list(range(self.manifest.num_blocks) if blocks is None else blocks)
        self.require_view(view, fusion, chosen)
        arrays = {}
        for spec in specs.values():
            source = spec.view_to_read(view, fusion.clip_view)
            for array in spec.arrays:
                rows = self._load(array.name, source, chosen, pin=target_device.type == "cuda", verify=verify)
                arrays[array.name] = copy_to(rows, target_device)
        if blocks is None and view != fusion.clip_view:  # else more blocks of it may be read
            self._blocks.release(view)

        def move(constants: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.to(target_device) for name, tensor in constants.items()}

        if self.recipe.store != "components":
            constants = {name: self._tensor(name) for spec in specs.values() for name in spec.constants}
            return FusedView(view, arrays, move(constants), specs)
        constants = fusion_constants(fusion, self.recipe, self._tensor)
        components = ComponentView(view, arrays, move(constants), specs, fusion)
        sizes = [len(range(self.num_samples)[self.manifest.block(block)]) for block in chosen]
        return components.fuse(logits=logits, features=features, sizes=sizes)

    def read_array(self, name: str, view: int, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Rows of one target, [rows, width] float32: plain zarr reads and the codec, the reference for `load_view`.

        Raises:
            IncompleteError: rows of a block that is not committed.
            FormatError: damaged or missing bytes.
            NotFoundError: no such target or view.
        """
        if name not in self.targets:
            raise NotFoundError("no such target", where=self.path, expected=", ".join(self.targets), found=name)
        spec = self.targets[name]
        stored = {array.suffix: self.read_stored(array.name, view, rows) for array in spec.arrays}
        constants = {key.removeprefix(name): self.constant(key) for key in spec.constants}
        return spec.codec.decode(stored, constants).numpy()

    def read_stored(self, name: str, view: int, rows: slice = slice(None)) -> npt.NDArray[Any]:
        """Rows of one array as stored, [rows, width]: one plain zarr read. Raises the errors of `read_array`."""
        if name not in self._specs:
            raise NotFoundError("no such array", where=self.path, expected=", ".join(self._specs), found=name)
        start, stop, _ = rows.indices(self.num_samples)
        size = self.manifest.block_rows
        self._blocks.hold([view])
        self._blocks.require(view, range(start // size, -(-stop // size)))
        check_chunks(self._specs[name], self.manifest, self.path, view, start, stop)
        with translate_errors(f"{self.path / name}, view {view}"):
            values = np.asarray(self._arrays[name][view, rows])
        if self._specs[name].stored.is_fill(values[:, 0]).any():
            raise FormatError("a chunk is missing", where=f"{self.path / name}, view {view}", next_step=RESTORE)
        return values

    def view_seeds(self, view: int, rows: slice = slice(None)) -> npt.NDArray[np.int32]:
        """The seeds from which another tool drew a view, int32 [rows]; imported caches of such views only.

        Raises:
            NotFoundError: views without such seeds. Otherwise as `read_stored`.
        """
        if SEEDS not in self._specs:
            raise NotFoundError("this cache has no seeds of another tool", where=self.path)
        return self.read_stored(SEEDS, view, rows)[:, 0]

    def commit(self, view: int, block: int) -> dict[str, int]:
        """The digests of a committed block by column: `view_parameters`, then each stored array (see `commits`).

        Raises:
            IncompleteError: the block is not committed.
            NotFoundError: no such view.
        """
        self._blocks.hold([view])
        self._blocks.require(view, range(block, block + 1))
        digests = self._blocks.digests[view, block].tolist()
        return dict(zip([commits.PARAMETERS, *self._specs], digests, strict=True))

    def committed_blocks(self) -> npt.NDArray[np.bool_]:
        """Which blocks can be read, bool [V, blocks]. During a build, each call looks again."""
        return self._blocks.committed()

    def constant(self, name: str) -> npt.NDArray[np.float32]:
        """An array that holds for all samples and views, float32; see `arrays.constant_shapes`."""
        if name not in self._constants:
            raise NotFoundError("no such constant", where=self.path, expected=", ".join(self._constants), found=name)
        return self._constants[name]

    def check_arrays(self) -> None:
        """Raise FormatError unless labels, sample keys and constants have the digests that are stored with them.

        `labels`, `sample_keys` and `constant` check what they read; this also checks what is not read.
        """
        check_whole_arrays(self._group, self.path, self.manifest, self._layouts)

    def place(self) -> Place:
        """The place where builders and other readers find the cache: its folder or, behind a mirror, the store."""
        return LocalPlace(self.path) if self.origin is None else self.origin.place()

    def rolling(self) -> Rolling | None:
        """The state of a rolling cache (`build-cache --keep-views`), read again at each call; None for all others."""
        return self._blocks.rolling()

    @property
    def stage(self) -> Stage | None:
        """With a stage budget, the views of a remote cache that are on this disk."""
        return None if self.origin is None else self.origin.budgeted

    def prepare_view(self, view: int) -> None:
        """With a stage budget, begin to stage a view that will be read next, if there is room for it. Returns at once.

        An error of it is met again when the view is read.
        """
        if self.stage is not None:
            self.stage.prepare(view)

    def stop_waiting(self) -> None:
        """With a stage budget, end what another thread waits for or stages, with an error (see `Stage.resume`)."""
        if self.stage is not None:
            self.stage.stop()

    def close(self) -> None:
        """With a stage budget, give up the staged views; others have nothing to close."""
        if self.stage is not None:
            self.stage.close()

    def require_complete(self) -> None:
        """Raise IncompleteError unless every view is built, DroppedError if some were dropped."""
        self._blocks.require_all()

    def require_view(self, view: int, fusion: Fusion | None = None, blocks: Sequence[int] | None = None) -> None:
        """Make sure that a view, or some blocks of it, can be read, and the view that `fusion` takes CLIP's from.

        Raises:
            IncompleteError: not completely built.
            NotFoundError: no such view or block.
        """
        count = self.manifest.num_blocks
        wanted = np.arange(count) if blocks is None else np.unique(np.asarray(blocks, dtype=np.int64))
        if len(wanted) and (wanted[0] < 0 or wanted[-1] >= count):
            found = wanted[0] if wanted[0] < 0 else wanted[-1]
            raise NotFoundError("no such block", where=self.path, expected=f"0 to {count - 1}", found=found)
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        sources = [*dict.fromkeys((view, view if fusion is None or fusion.clip_view is None else fusion.clip_view))]
        self._blocks.hold(sources)
        for source in sources:
            for run in runs:
                self._blocks.require(source, range(int(run[0]), int(run[-1]) + 1))

    def check_dataset(self, images: ImageSet) -> None:
        """Raise MismatchError, naming the difference, unless the cache was built from these samples in this order."""
        alignment.check_dataset(self, images)

    def check_canaries(self, images: ImageSet) -> None:
        """Raise MismatchError unless image decoding and view code still make the pixels that the teachers saw."""
        alignment.check_canaries(self, images)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self.path.absolute(), self.origin, self.manifest.fingerprint)

    def describe(self) -> str:
        """What is in the cache, a line for each thing; `cache-tools info` says more."""
        rows = self._description()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {printable(text)}" for name, text in rows)

    def _repr_html_(self) -> str:
        """The description as a table, for notebooks."""
        rows = "".join(
            f'<tr><th scope="row" style="text-align:left">{name}</th>'
            f'<td style="text-align:left">{escape(printable(text))}</td></tr>'
            for name, text in self._description()
        )
        return f"<table><caption>TeacherCache</caption><tbody>{rows}</tbody></table>"

    def _views_text(self) -> str:
        text = f"{len(self.complete_views)} of {self.num_views} complete"
        rolling = self.rolling() if self.origin is None else self.manifest.rolling  # the store may not answer
        return text if rolling is None or not rolling.dropped else f"{text}; {rolling}"

    def _description(self) -> list[tuple[str, str]]:
        recipe, dataset, shape = self.recipe, self.recipe.dataset, f"{self.num_views} × {self.num_samples:,}"
        height, width = dataset.image_size
        rows = [
            ("cache", f"{self.manifest.name}, {self.path}"),
            ("fingerprint", self.manifest.fingerprint[:12]),
            (
                "images",
                f"{dataset.name}/{dataset.split}: {self.num_samples:,}, {self.num_classes:,} classes, {height}×{width}",
            ),
            ("views", self._views_text()),
            *(("teacher", teacher.architecture) for teacher in recipe.teachers),
            *(("CLIP", clip.architecture) for clip in recipe.clips),
        ]
        for spec in self.targets.values():
            stored = " + ".join(array.stored.dtype for array in spec.arrays)
            rows.append((spec.name, f"{shape} × {spec.width:,}, {spec.codec.codec} ({stored})"))
        return rows

    def __repr__(self) -> str:
        return (
            f"TeacherCache({str(self.path)!r}, {self.num_samples} samples × {self.num_views} views, "
            f"fingerprint {self.manifest.fingerprint[:12]})"
        )

    @cached_property
    def _samples(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        return read_samples(self._group, self.path, self.manifest, self._layouts)

    def _tensor(self, name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.constant(name))

    def _load(self, name: str, view: int, blocks: Sequence[int], *, pin: bool, verify: bool) -> torch.Tensor:
        from cache_tools.store.loading import load_array

        array, spec, column = self._arrays[name], self._specs[name], 1 + list(self._specs).index(name)
        digests = self._blocks.digests[view, blocks, column].tolist() if verify else None
        return load_array(array, spec, self.manifest, self.path, view, blocks, digests, pin=pin)


def _reopen(kind: type[TeacherCache], path: Path, origin: Origin | None, fingerprint: str) -> TeacherCache:
    """Open the cache of a pickle.

    Raises:
        NotFoundError: it is no longer there, or not on this machine.
        MismatchError: another cache is there now.
    """
    cache = kind(path, origin)
    if cache.manifest.fingerprint != fingerprint:
        raise MismatchError(
            "another cache is where the pickled one was",
            where=path,
            expected=f"fingerprint {fingerprint[:12]}",
            found=cache.manifest.fingerprint[:12],
            next_step="open the cache again and pickle that",
        )
    return cache
