"""Other prompts for a cache that is there already: what its CLIPs' text towers make of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cache_tools.console import resolve_device
from cache_tools.manifest import Manifest
from pipeline.stored_networks import load_stored_clips


def text_features(
    manifest: Manifest, templates: Sequence[str], device: str = "auto", *, where: object = None
) -> list[npt.NDArray[np.float32]]:
    """Unit text embeddings [P, C, D] of every CLIP of a cache: prompt template × class, float32.

    The classes are called what they were called when the cache was built.

    Args:
        where: the cache, for messages.

    Raises:
        NotFoundError: a cache that does not say how its networks were loaded.
        WeightsError: a CLIP that is missing, or has other weights than the cache's.
        RecipeError: templates without exactly one `{}`.
    """
    clips = load_stored_clips(manifest, templates, resolve_device(device), where=where)
    return [clip.text_features.float().cpu().numpy() for clip in clips]
