"""Recipes as frozen pydantic models; the types of their fields; the text that they are read from, within limits."""

from cache_tools.config.given import find_typed, given_settings, option_name, set_dotted, typed_settings
from cache_tools.config.recipes import (
    CHANGES,
    FIELDS,
    NAME,
    ONE,
    SEVERAL,
    Changes,
    Extensible,
    Frozen,
    Recipe,
    builtin_names,
    dump_yaml,
    is_recipe_file,
    load_recipe,
    name_or_fields,
    one_or_several,
    read_recipe,
    validate,
)
from cache_tools.config.text import parse_yaml

__all__ = [
    "CHANGES",
    "FIELDS",
    "NAME",
    "ONE",
    "SEVERAL",
    "Changes",
    "Extensible",
    "Frozen",
    "Recipe",
    "builtin_names",
    "dump_yaml",
    "find_typed",
    "given_settings",
    "is_recipe_file",
    "load_recipe",
    "name_or_fields",
    "one_or_several",
    "option_name",
    "parse_yaml",
    "read_recipe",
    "set_dotted",
    "typed_settings",
    "validate",
]
