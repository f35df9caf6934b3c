"""How manifests of older format versions are read as if they were of this one.

An older cache opens for reading, copying and converting; nothing is added to it. Golden caches in `tests/golden/caches`
hold this to its word.

| version | difference to the next |
|---|---|
| 1 | `recipe.dtype` was what `recipe.codecs` is now, for all targets; no `recipe.derived_from`, no `constants_digest` |
"""

from __future__ import annotations

from typing import Any

OLDER_VERSIONS = (1,)


def modernised(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an older manifest under today's names; `format_version` and `fingerprint` stay what they were.

    Fields that are missing or wrong are left for validation to find.
    """
    recipe = fields.get("recipe")
    if not isinstance(recipe, dict) or "dtype" not in recipe or "codecs" in recipe:
        return fields
    codec = {"codec": recipe["dtype"]}
    newer = {key: value for key, value in recipe.items() if key != "dtype"}
    return {**fields, "recipe": {**newer, "codecs": {"logits": codec, "features": codec}}}
