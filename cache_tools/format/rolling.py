"""Rolling caches: at most K views are there at a time; those that all students have seen are dropped.

`build-cache --keep-views` makes them. Views are dropped in order, so a number says which are gone. It is stored in the
attribute `rolling` of the group, beside the manifest, before a file of the view is removed.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cache_tools.config import Frozen
from cache_tools.errors import DroppedError

ROLLING_KEY = "rolling"
MAX_VIEWS = 1 << 31


class Rolling(Frozen):
    """The state of a rolling cache.

    Attributes:
        keep: the most views that are there at a time.
        dropped: views 0 … dropped − 1 are gone for good.
    """

    keep: int = Field(ge=1, le=MAX_VIEWS)
    dropped: int = Field(0, ge=0, le=MAX_VIEWS)

    def __str__(self) -> str:
        """`views 0–27 were dropped`; empty if none was."""
        if not self.dropped:
            return ""
        return "view 0 was dropped" if self.dropped == 1 else f"views 0–{self.dropped - 1} were dropped"


def dropped_error(rolling: Rolling, where: Any, view: int | None = None) -> DroppedError:
    """The error of a reader that needs a dropped view, or all views (None)."""
    seen = "it" if view is not None or rolling.dropped == 1 else "them"
    what = str(rolling) if view is None else f"view {view} was dropped"
    return DroppedError(
        f"{what}: the students that followed the build had seen {seen}",
        where=where,
        found=f"a cache built with --keep-views {rolling.keep}",
        next_step="build it again elsewhere (--out), without --keep-views to keep every view, or follow the build from "
        "its start",
    )
