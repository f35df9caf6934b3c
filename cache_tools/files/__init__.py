"""Files: replace them atomically and durably, follow no links below a folder, remove what killed processes left."""

from cache_tools.files.safe import Entry, SafeFolder, find_leftovers, remove_leftover, remove_leftovers
from cache_tools.files.whole import (
    HOME_VARIABLE,
    LEFTOVER_AGE_S,
    MAX_FILE_BYTES,
    MAX_METADATA_BYTES,
    PARTIAL,
    cache_home,
    is_partial,
    output_folder,
    put_durably,
    rename_unless_exists,
    replaced_durably,
    sync_folder,
    sync_tree,
    too_large,
)

__all__ = [
    "HOME_VARIABLE",
    "LEFTOVER_AGE_S",
    "MAX_FILE_BYTES",
    "MAX_METADATA_BYTES",
    "PARTIAL",
    "Entry",
    "SafeFolder",
    "cache_home",
    "find_leftovers",
    "is_partial",
    "output_folder",
    "put_durably",
    "remove_leftover",
    "remove_leftovers",
    "rename_unless_exists",
    "replaced_durably",
    "sync_folder",
    "sync_tree",
    "too_large",
]
