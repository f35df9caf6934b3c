"""The manifest as it is stored: the attribute of a zarr group, with a digest, checked before it is believed.

`docs/format.md` says the same in prose, enough to write another reader; `arrays.py` says which arrays there are.
Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import ValidationError

from cache_tools.cache_recipe import FORMAT_VERSION, canonical_json, recipe_fingerprint
from cache_tools.errors import FormatError, UnknownFormatError
from cache_tools.format_history import OLDER_VERSIONS, modernised
from cache_tools.limits import check_json, check_limits
from cache_tools.manifest import Manifest

MANIFEST_KEY = "teacher_cache"


def manifest_attribute(manifest: Manifest) -> dict[str, Any]:
    """The manifest as it is stored: plain JSON with a digest over everything else in it."""
    fields = manifest.model_dump(mode="json")
    return {"digest": _manifest_digest(fields), **fields}


def parse_manifest(attribute: Any, *, where: str) -> Manifest:
    """Read the `teacher_cache` attribute of a group, as `manifest_attribute` made it.

    Raises:
        UnknownFormatError: another format version, or fields that this version does not know.
        FormatError: no such attribute, a wrong digest or fingerprint, numbers beyond all limits.
    """
    if not isinstance(attribute, dict):
        raise FormatError(
            "not a teacher cache", where=where, expected=f"a group attribute '{MANIFEST_KEY}'", found="none"
        )
    check_json(attribute, where=where)
    version = attribute.get("format_version")
    if version not in (FORMAT_VERSION, *OLDER_VERSIONS):
        raise UnknownFormatError(
            "unknown cache format version",
            where=where,
            expected=f"{FORMAT_VERSION}, or {' or '.join(map(str, OLDER_VERSIONS))} (read-only)",
            found=repr(version)[:40],
            next_step="open it with the teacher-cache version that wrote it, or build it again elsewhere (--out)",
        )
    fields = {key: value for key, value in attribute.items() if key != "digest"}
    if attribute.get("digest") != _manifest_digest(fields):
        raise FormatError(
            "damaged manifest: it is not what its digest says",
            where=where,
            next_step="restore zarr.json from a copy, or remove the cache and build it again",
        )
    try:
        expected = recipe_fingerprint(version, fields.get("recipe"))
        manifest = Manifest.model_validate(modernised(fields) if version in OLDER_VERSIONS else fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UnknownFormatError(  # its digest is right: what it says is what somebody wrote
            f"damaged manifest, field '{key}'", where=where, expected=first["msg"], found=repr(first.get("input"))[:80]
        ) from error
    if manifest.fingerprint != expected:
        raise FormatError(
            "manifest and fingerprint disagree", where=where, expected=expected[:12], found=manifest.fingerprint[:12]
        )
    check_limits(manifest, where=where)
    return manifest


def _manifest_digest(fields: dict[str, Any]) -> str:
    """32 hex digits of blake2b over the canonical JSON; the fingerprint covers the recipe only."""
    return hashlib.blake2b(canonical_json(fields), digest_size=16).hexdigest()
