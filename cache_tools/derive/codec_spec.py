"""Parse codecs as users type them: `compact`, `fixed-step:step=1/48,pack=pcodec`, `companded+feature-steps`.

| spec | codec of the logits | codec of the features |
|---|---|---|
| a preset | the preset's for this number of classes | the preset's |
| a codec | this codec, unless it is for features only | this codec, unless it is for logits only |
| `A+B` | A | B; a side that is left out keeps its codec |

Parameters follow a colon: `key=value`, with commas between. A value may be a fraction.
"""

from __future__ import annotations

import re
from typing import Any

from cache_tools.codecs import CODECS, Codec, Companded, FeatureSteps, Product, SparseCodec, parse_codec
from cache_tools.codecs.presets import PRESETS, TargetCodecs, resolve_codecs, target_kind
from cache_tools.config import parse_yaml, validate
from cache_tools.errors import RecipeError
from cache_tools.format.arrays import targets
from cache_tools.format.recipe import CacheRecipe

_FRACTION = re.compile(r"([0-9.eE]+)/([0-9.eE]+)")


def codecs_for(spec: str, recipe: CacheRecipe) -> TargetCodecs:
    """The codecs that a spec gives a cache; targets that it does not name keep theirs.

    Raises:
        RecipeError: unknown names or parameters, or a codec for which the cache has no targets.
    """
    logits, plus, features = (part.strip() for part in spec.partition("+"))
    if not plus:
        if spec in PRESETS:
            return resolve_codecs(spec, len(recipe.dataset.class_names))
        codec = _parse_codec(spec)
        fields = {
            "logits": None if isinstance(codec, FeatureSteps) else codec,
            "features": None if isinstance(codec, Companded | SparseCodec | Product) else codec,
        }
    else:
        fields = {
            "logits": _parse_codec(logits) if logits else None,
            "features": _parse_codec(features) if features else None,
        }
    stored = kinds(recipe)
    changes = {key: codec for key, codec in fields.items() if codec is not None and key in stored}
    if not changes:
        raise RecipeError(
            "this codec is for targets that the cache does not store",
            where=spec,
            expected=f"a codec for {' and '.join(stored)}",
            found="the logits of this cache are made from its features" if "logits" not in stored else None,
            next_step="name a preset or another codec",
        )
    plain = {key: codec.model_dump(mode="json") for key, codec in changes.items()}
    return validate(TargetCodecs, recipe.codecs.model_dump(mode="json") | plain, where=f"codec {spec}")


def kinds(recipe: CacheRecipe) -> tuple[str, ...]:
    """The kinds of targets that a cache stores: `logits`, `features` or both."""
    found = {target_kind(spec.name) for spec in targets(recipe, 1)}
    return tuple(kind for kind in ("logits", "features") if kind in found)


def choose(recipe: CacheRecipe, spec: str | None, logits: str | None, features: str | None) -> tuple[TargetCodecs, str]:
    """The codecs of a spec, or of single specs for logits and features; and a label of them for file names.

    Raises:
        RecipeError: no codec is given, or as `codecs_for`.
    """
    parts = [spec, f"{logits}+" if logits else None, f"+{features}" if features else None]
    chosen = [part for part in parts if part]
    if not chosen:
        raise RecipeError("no codec is given", next_step=f"add --codec, such as one of {', '.join(PRESETS)}")
    for part in chosen:
        recipe = recipe.model_copy(update={"codecs": codecs_for(part, recipe)})
    names = [name.partition(":")[0].strip() for part in chosen for name in part.split("+")]
    return recipe.codecs, "-".join(name for name in names if name)


def _parse_codec(text: str) -> Codec:
    name, _, parameters = text.partition(":")
    if name not in CODECS:
        known = ", ".join(dict.fromkeys([*PRESETS, *CODECS]))
        raise RecipeError("no such codec", where=text, expected=f"one of {known}", found=repr(name))
    fields: dict[str, Any] = {"codec": name}
    for item in filter(None, parameters.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise RecipeError("cannot read a codec", where=text, expected="NAME:KEY=VALUE,KEY=VALUE", found=repr(item))
        fields[key.strip()] = _parse_value(value.strip())
    return parse_codec(fields, where=f"codec {text}")


def _parse_value(text: str) -> Any:
    if fraction := _FRACTION.fullmatch(text):
        try:
            return float(fraction[1]) / float(fraction[2])
        except (ValueError, ZeroDivisionError):
            return text
    try:
        return parse_yaml(text, "cannot read a codec", where=text)
    except RecipeError:
        return text
