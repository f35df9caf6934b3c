"""Settings of where the pixels of a run are kept. They are the machine's: no result depends on them."""

from __future__ import annotations

from cache_tools.config import Frozen
from cache_tools.config.fields import NumBytes


class PixelRecipe(Frozen):
    """Bytes that the pixels of the training images may take; 0 for none.

    Attributes:
        device_memory: of the training device; None for 60 % of what is free.
        host_memory: of this machine; None for 60 % of what is free.
        disk: of all pixel files in the cache home together. None makes no file, and uses those that are there.
    """

    device_memory: NumBytes | None = None
    host_memory: NumBytes | None = None
    disk: NumBytes | None = None
