"""A trained student that can be asked about views: the plugin `student` of `cache_tools`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cache_tools.errors import DivergedError, MismatchError
from cache_tools.format.recipe import Preprocessing
from cache_tools.preprocess import prepare
from cache_tools.system.arguments import expand_user
from train.checkpoints import load_student
from train.evaluate.metrics import evaluating
from train.runs.stored import read_manifest

_BATCH = 64


@dataclass(frozen=True, eq=False)
class OpenStudent:
    """A student in eval mode.

    Attributes:
        name: its architecture and the number of its epochs.
        run: the folder or the file that it comes from.
        fingerprint: of the cache that it learned from; None if it learned from labels alone, or if nothing tells.
    """

    name: str
    run: str
    fingerprint: str | None
    model: nn.Module
    preprocessing: Preprocessing
    device: torch.device

    def logits(self, pixels_NCHW_u8: Tensor) -> Tensor:
        """Logits float32 [B, C] of views, normalised as in its training.

        Raises:
            DivergedError: some are not finite.
        """
        with evaluating(self.model, self.device):
            parts = [
                self.model(prepare(part.to(self.device), self.preprocessing)).float()
                for part in pixels_NCHW_u8.split(_BATCH)
            ]
        logits = torch.cat(parts)
        if not bool(torch.isfinite(logits).all()):
            raise DivergedError("the logits of the student are not finite", where=self.run)
        return logits


def open_student(run: str, class_names: Sequence[str], view_size: tuple[int, int], device: torch.device) -> OpenStudent:
    """Load a student for the views of a cache. It may have learned from other images of the same classes.

    Args:
        run: a run folder, for its last epoch, or a checkpoint.
        class_names: of the cache.
        view_size: (height, width) of its views as students see them.

    Raises:
        MismatchError: a student of other classes, or of views of another size.
        WeightsError: no student there, or a damaged one.
    """
    path = expand_user(run)
    model, card = load_student(path, device)
    if card.class_names != tuple(class_names):
        differs = sorted(card.class_names) != sorted(class_names)
        raise MismatchError(
            f"the student has {'other classes than' if differs else 'the classes in another order than'} the cache",
            where=path,
            expected=_classes(class_names, card.class_names),
            found=_classes(card.class_names, class_names),
            next_step="name a run that learned from this cache, or from one with the same classes",
        )
    if card.image_size != tuple(view_size):
        raise MismatchError(
            "the student takes views of another size than the cache has",
            where=path,
            expected="{} × {}".format(*view_size),
            found="{} × {}".format(*card.image_size),
            next_step="name a run that learned from this cache, or from one with the same views",
        )
    manifest = read_manifest(path if path.is_dir() else path.parent)
    return OpenStudent(
        name=f"{card.architecture}, {card.epoch} epochs" if card.epoch != 1 else f"{card.architecture}, 1 epoch",
        run=str(run),
        fingerprint=None if manifest is None else manifest.fingerprint,
        model=model,
        preprocessing=Preprocessing(mean=card.mean, std=card.std),
        device=device,
    )


def _classes(names: Sequence[str], others: Sequence[str]) -> str:
    """The number of classes, with one that the others lack; or, in another order, the first one at another place."""
    known = set(others)
    new = next((f"such as {name!r}" for name in names if name not in known), None)
    if new is None and len(names) == len(others):
        place = next(place for place, name in enumerate(names) if name != others[place])
        new = f"{names[place]!r} at {place}"
    return f"{len(names)} classes" + ("" if new is None else f", {new}")
