"""Recipes as frozen pydantic models, read from YAML files, built-in names and `--set key=value`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from cache_tools.config.given import abridged, find_typed, given_settings, set_dotted, typed_settings
from cache_tools.config.text import MAX_RECIPE_BYTES, parse_yaml, read_text
from cache_tools.errors import RecipeError, error_from_data, error_to_data
from cache_tools.system.arguments import unprintable


class Frozen(BaseModel):
    """An immutable model, validated on construction, that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Extensible(Frozen):
    """A model to which fields were added after digests of its JSON had been stored.

    The fields named in `added` are left out of the JSON while they have their default, so that old digests stay valid.
    `dump_yaml` prints them all.
    """

    added: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_added_defaults(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        if info.context and info.context.get("all_fields"):
            return data
        fields = type(self).model_fields
        unchanged = {
            key for key in self.added if getattr(self, key) == fields[key].get_default(call_default_factory=True)
        }
        return {key: value for key, value in data.items() if key not in unchanged}


class Changes(BaseModel):
    """The keys of a part of a recipe that a user has set, and no others: what is to differ from a stored one."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @classmethod
    def to(cls, model: type[BaseModel], given: Mapping[str, Any], where: str) -> Changes:
        """Changes to a `model`.

        Args:
            where: the key of this part in the recipe.

        Raises:
            RecipeError: a key that the model does not have.
        """
        for key in given:
            if key not in model.model_fields:
                known = sorted(model.model_fields)
                raise RecipeError(
                    f"unknown recipe key '{where}.{key}'",
                    next_step=_hint(str(key), known) or f"known keys: {', '.join(known)}",
                )
        return cls(**given)

    @classmethod
    def made_by(cls, part: BaseModel) -> Changes:
        """The fields of a model that were set when it was made."""
        return cls(**part.model_dump(mode="json", include=part.model_fields_set, context={"all_fields": True}))

    @property
    def values(self) -> dict[str, Any]:
        """Key → value."""
        return dict(self.model_extra or {})

    def apply_to(self, part: Recipe, *, where: str) -> Recipe:
        """A model with these changes.

        Raises:
            RecipeError: a bad value.
        """
        stored = part.model_dump(mode="json", context={"all_fields": True})
        return validate(type(part), {**stored, **self.values}, where=where)


Recipe = TypeVar("Recipe", bound=Frozen)
_FOLDERS_COMPARED = 1000

# Tags of unions. pydantic includes them in the location of an error; the user never wrote them.
ONE, SEVERAL = "(one)", "(several)"
NAME, FIELDS, CHANGES = "(name)", "(fields)", "(changes)"
UNION_TAGS = (ONE, SEVERAL, NAME, FIELDS, CHANGES)


def one_or_several(value: Any) -> str:
    """Discriminator of a union of a value (`ONE`) and a list of such values (`SEVERAL`)."""
    return SEVERAL if isinstance(value, list | tuple) else ONE


def name_or_fields(value: Any) -> str:
    """Discriminator of a union of a name (`NAME`) and a model with fields (`FIELDS`)."""
    return NAME if isinstance(value, str) else FIELDS


def load_recipe(
    model: type[Recipe],
    source: str | None,
    builtin: Traversable,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> Recipe:
    """Read a recipe and apply options to it.

    Args:
        model: the recipe class.
        source: a built-in name (`digits`), a YAML file, or None for an empty recipe.
        builtin: the folder that holds the built-in `NAME.yaml` files.
        overrides: `--set` items, `dotted.key=YAML value`; they override everything else.
        options: dotted key → value of a command-line option; None values are ignored.
        names: as for `typed_settings`.

    Raises:
        RecipeError: an unknown name, unreadable YAML, an unknown key (the message suggests the nearest), a bad value.
    """
    data = {} if source is None else read_recipe(source, builtin)
    overrides = list(overrides)
    for key, value in given_settings(overrides, options):
        set_dotted(data, key, value)
    return validate(model, data, where=source or "options", typed=typed_settings(overrides, options, names))


def is_recipe_file(source: str) -> bool:
    """Whether a recipe is named by its file and not by the name of a built-in one."""
    path = Path(source)
    return path.suffix in {".yaml", ".yml"} or path.is_file()


def builtin_names(builtin: Traversable) -> list[str]:
    """The sorted names of the built-in recipes in a folder."""
    return sorted(entry.name.removesuffix(".yaml") for entry in builtin.iterdir() if entry.name.endswith(".yaml"))


def validate(model: type[Recipe], data: Any, *, where: str, typed: Mapping[str, str] | None = None) -> Recipe:
    """Build `model` from plain data; turn pydantic's report into one RecipeError.

    Args:
        where: the place of the data, for messages.
        typed: dotted key → what the user typed to set it (`typed_settings`): the mistake is there, not in the file.
    """
    _check_values(data, where)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _recipe_error(model, error, where, typed or {}) from error
    except RecipeError as error:  # of a rule that names the key
        if (option := (typed or {}).get(str(error.where))) is None:
            raise
        data = {**error_to_data(error), "where": option}
        raise error_from_data(data) from error


def dump_yaml(recipe: BaseModel) -> str:
    """The full recipe as YAML, defaults included, as `--show-recipe` prints it and results store it."""
    import yaml

    values = recipe.model_dump(mode="json", context={"all_fields": True})
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    if text.replace("\n", "").isprintable():
        return text
    # With escapes for what could affect a terminal; it reads the same.
    return yaml.safe_dump(values, sort_keys=False, width=100)


def read_recipe(source: str, builtin: Traversable) -> dict[str, Any]:
    """A recipe as plain data: a built-in name or a YAML file.

    Raises:
        RecipeError: no such recipe, or not a YAML mapping.
    """
    path = Path(source)
    if is_recipe_file(source):
        if not path.is_file():
            raise RecipeError(
                "recipe file not found", where=path, next_step=f"built-in recipes: {', '.join(builtin_names(builtin))}"
            )
        text = read_text(path, "cannot read the recipe", limit=MAX_RECIPE_BYTES, expected="a YAML file in UTF-8")
    else:
        names = builtin_names(builtin)
        if source not in names:
            raise RecipeError(
                "no such recipe",
                where=source,
                expected=f"a YAML file, a folder of images, or one of {', '.join(names)}",
                next_step=_hint(source, [*names, *_folders_beside(path)]),
            )
        text = (builtin / f"{source}.yaml").read_text(encoding="utf-8")
    data = parse_yaml(text, "recipe is not valid YAML", where=source)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RecipeError(
            "recipe is not a mapping", where=source, expected="key: value lines", found=type(data).__name__
        )
    return data


def _folders_beside(path: Path) -> list[str]:
    """The folders where a recipe or folder was looked for, as they would be typed."""
    try:
        found = [entry for entry in path.expanduser().parent.iterdir() if entry.is_dir() and entry.name[:1] != "."]
    except (OSError, RuntimeError, ValueError):
        return []
    return [f"{path.parent / entry.name}/" for entry in found[:_FOLDERS_COMPARED]]


def _check_values(data: Any, where: str) -> None:
    """Raise RecipeError for text and numbers that no key takes: NUL, half surrogates, NaN, long numbers."""
    stack: list[tuple[str, Any]] = [("", data)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, Mapping):
            inner = [(str(name), part) for name, part in value.items()]
            stack += [("", name) for name, _ in inner]
            stack += [(f"{key}.{name}".removeprefix("."), part) for name, part in inner]
        elif isinstance(value, list | tuple):
            stack += [(f"{key}.{place}".removeprefix("."), part) for place, part in enumerate(value)]
        elif isinstance(value, str) and (character := unprintable(value)) is not None:
            found = f"the character {character}"
            raise RecipeError(f"bad text for '{key}'", where=where, expected="text in UTF-8", found=found)
        elif isinstance(value, int) and abs(value) >= 1 << 64:
            raise RecipeError(f"bad value for '{key}'", where=where, expected="a number", found=abridged(value))
        elif isinstance(value, float) and math.isnan(value):
            raise RecipeError(f"bad value for '{key}'", where=where, expected="a number", found="NaN")


def _recipe_error(model: type[BaseModel], error: ValidationError, where: str, typed: Mapping[str, str]) -> RecipeError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if part not in UNION_TAGS) or "(the whole recipe)"
    where = find_typed(typed, key) or where
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        siblings = _known_keys(model, first["loc"][:-1])
        return RecipeError(
            f"unknown recipe key '{key}'{more}",
            where=where,
            next_step=_elsewhere(model, str(first["loc"][-1]))
            or _hint(str(first["loc"][-1]), siblings)
            or f"known keys: {', '.join(siblings)}",
        )
    if first["type"] == "missing":
        return RecipeError(
            f"missing recipe key '{key}'{more}",
            where=where,
            next_step=f"add it to the recipe, or give it as --set {key}=VALUE",
        )
    if first["type"] == "value_error":  # our own rule over several keys; its input is the whole recipe
        message = first["msg"].removeprefix("Value error, ")
        return RecipeError(f"bad value for '{key}'{more}: {message}", where=where)
    return RecipeError(
        f"bad value for '{key}'{more}",
        where=where,
        expected=first["msg"].removeprefix("Input should be "),
        found=abridged(first.get("input")),
    )


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names at a location of a model. Union tags and list indices, which pydantic adds, are skipped."""
    current: list[type[BaseModel]] = [model]
    for part in location:
        fields = [m.model_fields[str(part)] for m in current if str(part) in m.model_fields]
        if fields:
            current = [m for field in fields for m in _models_in(field.annotation)]
        else:
            tagged = [
                m for m in current if any(f.default == part for f in m.model_fields.values()) or m.__name__ == part
            ]
            current = tagged or current
    return sorted({name for m in current for name in m.model_fields})


def _elsewhere(model: type[BaseModel], name: str) -> str | None:
    """A hint at the keys of this very name below other keys of the recipe, such as fusion.teacher_weight."""
    found: list[str] = []

    def look(inside: type[BaseModel], prefix: str, depth: int) -> None:
        for field, info in inside.model_fields.items():
            if field == name and prefix:
                found.append(f"{prefix}{field}")
            if depth:
                for below in _models_in(info.annotation):
                    look(below, f"{prefix}{field}.", depth - 1)

    look(model, "", 2)
    names = list(dict.fromkeys(found))
    choices = "' or '".join(names)
    return f"did you mean '{choices}'?" if 0 < len(names) <= 3 else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _hint(word: str, names: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else None
