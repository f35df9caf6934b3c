"""Random recipes: valid ones of every kind, with values of other types and sizes, keys elsewhere, and odd YAML."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.recipe import load_build_recipe
from train.recipe.loading import load_train_recipe

KINDS = ("build", "train", "sweep")
NOWHERE = {"name": "folder", "data_dir": "no/such/folder"}

WORDS = (
    "", "x", "none", "None", "0", "1e400", "nan", "sorted", "digits", "folder", "train[:3]", "train[::0]", "train[9",
    "../..", "/", "/proc/self/mem", "/dev/zero", "~nobody/x", "~", "é" * 300, "x" * 5000, "a\nb", "timm:no_such",
    "torchvision:", "timm:", ":", "a.b:c", "hf-hub:", "local-dir:", "package:", "package:../..", "s3://", "file://",
    "resnet8", "richkd", "float16", "balanced", "1,2,3", "{}", "a {} b {}",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 7, 255, 4096, 10**6, 10**9, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**30, 10**180, -(10**30), 0.0, -0.0,
    0.5, 1.5, 1e-320, 1e-9, 1e308, float("inf"), float("-inf"), float("nan"), True, False,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, [], {}, [[]], [None], [{}], {"a": 1}, {"name": "x"}, {"op": "flip"}, {"op": "x"}, [1, 2, 3], ["a", "b"],
    {"op": "pad-crop", "padding": 10**9}, [0.1, 0.2, 0.7], [255, 255, 255], [1, 1],
)  # fmt: skip
KEYS = (
    "name", "dataset", "views", "loss", "teacher", "clip", "fusion", "epochs", "seeds", "grid", "students", "trials",
    "cache", "num_views", "a.b", "", "0", "é", "class_weights", "ops", "split", "asha", "search", "set", "recipe",
    "space", "base", "given", "milestones", "test_split", "labels", "class_order", "loggers", "codec",
)  # fmt: skip
TEXTS = (
    "[" * 3000, "{a: " * 3000, "a: &a [*a]", "? ? ? x", "- - - -", "%YAML 9.9\n---\na: 1", "--- a\n--- b", "\tx: 1",
    "a: 1\na: 2", "a: !!python/name:os.system", "a: !!binary x", "a: !!set {x}", "a: *nothing", "a: 2020-99-99",
    "a: 0b_", "a: " + "9" * 5000, "a: 1:" + "59:" * 3000 + "0", "#", "", "null", "42", "just words", "'", '"\\x"',
    "a: |\n x", "<<: 1", "<<: [1]", "<<: {a: 1}", "a: {b: 1, b: 2}", "\ufeffname: x", "a: \u0085b",
)  # fmt: skip
SCRAPS = ("", ":", "- ", "\n", "{", "]", "'", "\t", "é", "&a ", "*a", "!")


def bases() -> dict[str, list[dict[str, Any]]]:
    """Valid recipes of each kind as plain data, with all their fields, whose images are in no folder."""
    full = {"all_fields": True}
    build = [load_build_recipe(name).model_dump(mode="json", context=full) for name in ("digits", "cifar100")]
    train = [
        load_train_recipe(name, overrides).model_dump(mode="json", context=full)
        for name, overrides in (("digits", []), ("cifar100", ["loss.feature=crd"]), ("digits", ["loss.kind=ce"]))
    ]
    sweeps: list[dict[str, Any]] = [
        {"recipe": "digits", "students": ["resnet8", "resnet14"], "losses": ["kd", "ce"], "seeds": 2},
        {"recipe": "digits", "grid": {"lr": [0.1, 0.2], "loss.temperature": [1, 4]}, "set": {"epochs": 3}},
        {"recipe": "digits", "trials": [{"student": "resnet8", "seed": 3}, {"loss": "dkd", "lr": 0.1}]},
        {"recipe": "digits", "asha": {"metric": "test_nll"}, "seeds": [4, 5], "students": ["resnet8"]},
        {"recipe": "digits", "search": {"trials": 5, "space": {"lr": "0.01..0.5", "loss.temperature": [1, 2]}}},
    ]
    for recipe in (*build, train[2]):
        recipe["dataset"] = {**NOWHERE, "split": "train"}
    return {"build": build, "train": train, "sweep": sweeps}


def odd_recipes(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(kind, text of a YAML file); the same for the same arguments."""
    known = bases()
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        kind = rng.choice(KINDS)
        if rng.random() < 0.1:
            yield kind, rng.choice(TEXTS)
            continue
        data: Any = copy.deepcopy(rng.choice(known[kind]))
        for _ in range(rng.randint(0, 3)):
            data = _changed(rng, data, known)
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        yield kind, _odd_text(rng, text) if rng.random() < 0.1 else text


def _changed(rng: random.Random, data: Any, known: dict[str, list[dict[str, Any]]]) -> Any:
    places = list(_places(data))
    if not places:
        return _value(rng)
    holder, key = rng.choice(places)
    match rng.choice(("value", "value", "value", "value", "remove", "wrap", "unwrap", "add", "move", "graft", "text")):
        case "value":
            holder[key] = _value(rng)
        case "remove":
            del holder[key]
        case "wrap":
            holder[key] = rng.choice(([holder[key]], {rng.choice(KEYS): holder[key]}, [holder[key]] * 3))
        case "unwrap" if isinstance(holder[key], dict | list) and holder[key]:
            inner = holder[key]
            holder[key] = next(iter(inner.values())) if isinstance(inner, dict) else inner[0]
        case "add" if isinstance(holder, dict):
            holder[rng.choice(KEYS)] = _value(rng)
        case "move":
            other, other_key = rng.choice(places)
            holder[key] = copy.deepcopy(other[other_key])
        case "graft":
            holder[key] = copy.deepcopy(rng.choice(known[rng.choice(KINDS)]))
        case "text":
            holder[key] = str(holder[key])
    return data


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice((rng.choice(WORDS), rng.choice(NUMBERS), rng.choice(OTHERS))))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _odd_text(rng: random.Random, text: str) -> str:
    """The text with a few characters removed, doubled or replaced."""
    characters = list(text)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(characters)) if characters else 0
        characters[place : place + rng.choice((0, 1, 1, 5))] = rng.choice(SCRAPS)
    return "".join(characters)
