"""Read a cache: open it by path, name or fingerprint, and load whole views onto a device."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cache_tools.alignment import check_canaries, check_dataset, make_canaries, pixel_digest
from cache_tools.console import resolve_device
from cache_tools.errors import FormatError, IncompleteError, NotFoundError
from cache_tools.format import commits
from cache_tools.format.arrays import targets
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import CacheRecipe
from cache_tools.home import registry, staging
from cache_tools.places import is_remote
from cache_tools.store.create import StoredConstants
from cache_tools.store.group import (
    RESTORE,
    check_chunks,
    open_array,
    open_group,
    read_commits,
    read_manifest,
    read_whole,
    translated,
)

if TYPE_CHECKING:
    import torch

    from cache_tools.images.image_set import ImageSet
    from cache_tools.targets import ViewTargets

__all__ = ["TeacherCache", "ViewTargets", "make_canaries", "pixel_digest"]


def __getattr__(name: str) -> Any:
    """`ViewTargets` comes with torch, which commands that only look at a cache do not wait for."""
    if name == "ViewTargets":
        from cache_tools.targets import ViewTargets

        return ViewTargets
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class TeacherCache:
    """A cache, opened for reading. Cheap to open: arrays are read when a view is loaded.

    Attributes:
        path: folder of the cache; of a remote one, its mirror in the cache home.
        manifest: recipe, geometry and provenance.
        targets: what is cached per (view, sample), by name, with its codec.
        origin: what the mirror is staged from, view by view as they are needed; None for a local cache.
    """

    def __init__(self, path: Path, origin: staging.Origin | None = None) -> None:
        self.path, self.manifest, self.origin = path, read_manifest(path), origin
        self.targets = {spec.name: spec for spec in targets(self.recipe, self.manifest.block_rows)}
        self._specs = {array.name: array for spec in self.targets.values() for array in spec.arrays}
        for spec in self._specs.values():
            spec.stored.check_readable()
        self._layouts = array_layouts(self.manifest)
        self._group = open_group(path, self._layouts)
        self._arrays = {name: open_array(self._group, path, name, self._layouts) for name in self._specs}
        self._constants = StoredConstants(self._group, path, self.manifest, self._layouts)
        self._commit_table = open_array(self._group, path, commits.COMMITS, self._layouts)
        self._commits_read: npt.NDArray[np.uint64] | None = None

    @classmethod
    def open(cls, reference: str | Path) -> TeacherCache:
        """Open a cache.

        Args:
            reference: a path, the name or fingerprint prefix (four hex digits or more) of a cache in the cache home, or
                the URL of a remote one (`s3://…`, `gs://…`, `az://…`), of which a mirror is made in the cache home.

        Raises:
            NotFoundError: nothing of that path, URL, name or fingerprint, or several.
            FormatError: something that is not a cache, a damaged one, or one of an unknown format version.
            StorageError: a store that does not answer, and of which nothing is staged.
        """
        if is_remote(reference):
            origin = staging.connect(str(reference))
            return cls(origin.mirror, origin)
        path = registry.resolve(reference)
        return cls(path, staging.origin_of(path))

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
        """Views whose every block is committed (of a remote cache: there), ascending; read anew during a build."""
        return tuple(int(view) for view in np.flatnonzero(self._committed().all(axis=1)))

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
    ) -> ViewTargets:
        """Read a whole view and put it on a device as it is stored; batches are decoded there.

        Copies to CUDA start from pinned memory on the current stream and are not waited for.

        Args:
            logits, features: which fused targets there are to be; the components of a component cache always are.
            verify: compare what was read with the commits' checksums.
            fusion: how a component cache is fused (`FusionChoice(…).resolve(cache)`), by default as it was built.

        Raises:
            IncompleteError: the view is not completely built.
            FormatError: stored bytes that are damaged, missing, or not those that were committed.
            NotFoundError: no such view.
            DeviceError: no such device.
        """
        from cache_tools.targets import ViewTargets, constants_for, fused

        target = resolve_device(str(device))
        self._require_blocks(view, range(self.manifest.num_blocks))
        wanted = {"fused_logits": logits, "fused_features": features}
        pin = target.type == "cuda"
        how = fusion or Fusion.stored(self.manifest)
        clip_view = view if how.clip_view is None else how.clip_view
        self._require_blocks(clip_view, range(self.manifest.num_blocks))
        specs = {name: spec for name, spec in self.targets.items() if wanted.get(name, True)}
        arrays = {}
        for name, spec in specs.items():
            source = clip_view if name.startswith("clip_features") else view
            for array in spec.arrays:
                arrays[array.name] = self._load(array.name, source, pin, verify).to(target, non_blocking=True)
        if self.recipe.store == "fused":
            constants = {name: self._tensor(name) for spec in specs.values() for name in spec.constants}
        else:
            constants = constants_for(how, self.recipe, self._tensor)
        moved = {name: tensor.to(target) for name, tensor in constants.items()}
        found = ViewTargets(view, arrays, moved, how if self.recipe.store == "components" else None, specs)
        return found if self.recipe.store == "fused" else fused(found, logits=logits, features=features)

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
        """Rows of one array as they are stored, [rows, width]: one plain zarr read; errors as for `read_array`."""
        if name not in self._specs:
            raise NotFoundError("no such array", where=self.path, expected=", ".join(self._specs), found=name)
        start, stop, _ = rows.indices(self.num_samples)
        size = self.manifest.block_rows
        self._require_blocks(view, range(start // size, -(-stop // size)))
        check_chunks(self._specs[name], self.manifest, self.path, view, start, stop)
        with translated(f"{self.path / name}, view {view}"):
            values = np.asarray(self._arrays[name][view, rows])
        if self._specs[name].stored.is_fill(values[:, 0]).any():
            raise FormatError("a chunk is missing", where=f"{self.path / name}, view {view}", next_step=RESTORE)
        return values

    def commit(self, view: int, block: int) -> dict[str, int]:
        """The digests of a committed block by column: `view_parameters`, then each stored array (see `commits`).

        Raises:
            IncompleteError: not committed.
            NotFoundError: no such view.
        """
        self._require_blocks(view, range(block, block + 1))
        assert self._commits_read is not None
        return dict(zip([commits.PARAMETERS, *self._specs], self._commits_read[view, block].tolist(), strict=True))

    def committed_blocks(self) -> npt.NDArray[np.bool_]:
        """Which blocks are committed, bool [V, blocks]; read anew while a build is under way."""
        return self._committed()

    def constant(self, name: str) -> npt.NDArray[np.float32]:
        """An array that holds for all samples and views, float32; see `arrays.constant_shapes`."""
        if name not in self._constants:
            raise NotFoundError("no such constant", where=self.path, expected=", ".join(self._constants), found=name)
        return self._constants[name]

    def require_complete(self) -> None:
        """Raise IncompleteError unless every view is built."""
        committed = self._committed()
        if not committed.all():
            done = int(committed.all(axis=1).sum())
            raise IncompleteError(
                "the cache is not completely built",
                where=self._where,
                expected=f"{self.num_views} views",
                found=f"{done} complete, {int((~committed).sum())} of {committed.size} blocks missing",
                next_step=f"run the same {self.recipe.made_by} command again: it goes on from what is stored",
            )

    def check_dataset(self, images: ImageSet) -> None:
        """Raise MismatchError, saying what differs, unless these are the samples the cache was built from, in order."""
        check_dataset(self, images)

    def check_canaries(self, images: ImageSet) -> None:
        """Raise MismatchError unless view code and image decoding give the pixels that the teachers saw."""
        check_canaries(self, images)

    def __repr__(self) -> str:
        return (
            f"TeacherCache({str(self.path)!r}, {self.num_samples} samples × {self.num_views} views, "
            f"fingerprint {self.manifest.fingerprint[:12]})"
        )

    @cached_property
    def _samples(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        labels, keys = (read_whole(self._group, self.path, name, self._layouts) for name in ("labels", "sample_keys"))
        if commits.content_digest(keys, labels, self.class_names) != self.recipe.dataset.content_digest:
            raise FormatError("labels or sample keys are damaged", where=self.path, next_step=RESTORE)
        return labels, keys

    def _tensor(self, name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.constant(name))

    def _load(self, name: str, view: int, pin: bool, verify: bool) -> torch.Tensor:
        from cache_tools.store.loading import load_array

        assert self._commits_read is not None
        column = 1 + list(self._specs).index(name)
        digests = self._commits_read[view, :, column].tolist() if verify else None
        return load_array(self._arrays[name], self._specs[name], self.manifest, self.path, view, digests, pin=pin)

    @property
    def _where(self) -> str:
        return str(self.path) if self.origin is None else self.origin.url

    def _committed(self) -> npt.NDArray[np.bool_]:
        """bool [V, blocks]: what can be read, of a remote cache once it is staged."""
        here = self._here()
        return here if self.origin is None or here.all() else here | self.origin.committed(self.manifest)

    def _here(self) -> npt.NDArray[np.bool_]:
        """bool [V, blocks]. A commit is never taken back, so a complete cache is looked at once."""
        if self._commits_read is None or not (self._commits_read != 0).all():
            self._commits_read = read_commits(self._commit_table, self.path, self.manifest)
        return commits.committed_blocks(self._commits_read, self.manifest)

    def _require_blocks(self, view: int, blocks: range) -> None:
        if not 0 <= view < self.num_views:
            raise NotFoundError("no such view", where=self.path, expected=f"0 to {self.num_views - 1}", found=view)
        rows = slice(blocks.start, blocks.stop)
        if self._known(view, rows) or self._here()[view, rows].all():
            return
        committed = self._committed()[view, rows]
        if self.origin is not None and committed.all():
            self.origin.stage(self.manifest, view)
            committed = self._here()[view, rows]
        missing = [blocks[number] for number in np.flatnonzero(~committed)]
        if missing:
            raise IncompleteError(
                f"view {view} is not completely built",
                where=self._where,
                expected=f"{self.manifest.num_blocks} blocks",
                found=f"{commits.ranges(missing)} missing",
                next_step=f"run the same {self.recipe.made_by} command again: it goes on from what is stored",
            )

    def _known(self, view: int, rows: slice) -> bool:
        """Whether an earlier look found these blocks here: a commit is never taken back."""
        read = self._commits_read
        return read is not None and bool(commits.committed_blocks(read, self.manifest)[view, rows].all())
