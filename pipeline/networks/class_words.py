"""The words for classes in CLIP's prompts, from the names of the classes or from the recipe.

Underscores become spaces. WordNet ids such as n01440764, the class folders of ImageNet, become the names that open_clip
uses for ImageNet, and for the other classes of ImageNet-22k WordNet's first word.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from cache_tools.errors import RecipeError
from cache_tools.images.class_names import listed
from pipeline.networks.prompts import prompt_class_name

_WORDNET_ID = re.compile(r"n[0-9]{8}")
_NUMBERED = re.compile(r"(n[0-9]{8}|[0-9]+)[ ._-]+[^\W\d]")  # `001.Laysan Albatross`, `n02085620-Chihuahua`
_ADVICE = "give words that describe the classes: clip.class_names, a list or a file with a line for each class in order"


def class_words(class_names: Sequence[str], given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The words that replace `{}` in the prompts, one per class.

    Args:
        class_names: of the dataset, in label order.
        given: `clip.class_names` of the recipe, which replace them.

    Raises:
        RecipeError: another number of given names than classes, or an unknown WordNet id.
    """
    names = tuple(class_names) if given is None else tuple(given)
    if len(names) != len(class_names):
        raise RecipeError(
            "the prompts need one class name per class of the dataset",
            where="clip.class_names",
            expected=len(class_names),
            found=len(names),
        )
    if given is None and any(map(is_wordnet_id, names)):
        names = _wordnet_words(names)
    return tuple(prompt_class_name(name) for name in names)


def check_words(class_names: Sequence[str], given: Sequence[str] | None = None) -> tuple[str, ...]:
    """Refuse words that say nothing, or the same, about classes. Case does not matter: CLIP reads lower case.

    Returns:
        Notes for the user about words that CLIP reads badly: with a number or an id before them.

    Raises:
        RecipeError: as `class_words`, or an empty word or two equal ones.
    """
    words = class_words(class_names, given)
    empty = [f"'{name}'" for name, word in zip(class_names, words, strict=True) if not re.search(r"\w", word)]
    if empty:
        raise RecipeError(
            "CLIP's prompts need a word for every class",
            where="clip.class_names",
            found=f"none for the class {listed(empty)}" if len(empty) == 1 else f"none for the classes {listed(empty)}",
            next_step=_ADVICE,
        )
    counts = Counter(word.casefold() for word in words)
    same = [f"{name} = '{word}'" for name, word in zip(class_names, words, strict=True) if counts[word.casefold()] > 1]
    if same:
        raise RecipeError(
            "CLIP cannot tell classes apart that have the same words in its prompts",
            where="clip.class_names",
            expected="different words for every class",
            found=listed(same),
            next_step=_ADVICE,
        )
    numbered = next((word for word in words if _NUMBERED.match(word)), None)
    if numbered is None:
        return ()
    return (f"CLIP's prompts have numbers before the words, as in '{numbered}'; clip.class_names can give plain words",)


def is_wordnet_id(name: str) -> bool:
    """Whether a class name has the form of a WordNet id of a noun."""
    return _WORDNET_ID.fullmatch(name) is not None


@cache
def imagenet_ids(subset: str = "imagenet") -> tuple[str, ...]:
    """The WordNet ids of ImageNet's classes in the order of the outputs; also `imagenet12k`, `imagenet22k`, …"""
    return tuple(_timms_file(f"{subset}_synsets.txt").read_text(encoding="utf-8").split())


def _wordnet_words(names: tuple[str, ...]) -> tuple[str, ...]:
    """Words for the WordNet ids among the names. Ids with the same words get all their words, then their definition."""
    lemmas, definitions = _table("lemma"), _table("definition")
    unknown = [name for name in names if is_wordnet_id(name) and name not in lemmas]
    if unknown:
        raise RecipeError(
            "class names that look like WordNet ids, but are not in ImageNet: CLIP does not know them",
            where="clip.class_names",
            found=listed(unknown),
            next_step=_ADVICE,
        )
    choices: tuple[Callable[[str], str], ...] = (
        lambda name: _open_clips_names().get(name) or lemmas[name].split(", ")[0],
        lambda name: lemmas[name],
        lambda name: f"{lemmas[name]}: {definitions[name]}",
    )
    words = list(names)
    for choose in choices:
        counts = Counter(word.casefold() for word in words)
        words = [
            choose(name) if is_wordnet_id(name) and (word == name or counts[word.casefold()] > 1) else word
            for name, word in zip(names, words, strict=True)
        ]
    return tuple(words)


@cache
def _open_clips_names() -> dict[str, str]:
    """WordNet id → name of each of ImageNet's 1000 classes."""
    from open_clip import IMAGENET_CLASSNAMES

    return dict(zip(imagenet_ids(), IMAGENET_CLASSNAMES, strict=True))


@cache
def _table(column: str) -> dict[str, str]:
    """WordNet id → `lemma`, its words separated by commas, or `definition`."""
    lines = _timms_file(f"imagenet_synset_to_{column}.txt").read_text(encoding="utf-8").splitlines()
    return {row[0]: row[1] for row in csv.reader(lines, delimiter="\t")}


def _timms_file(name: str) -> Path:
    """A file of timm's tables, found without the second that importing timm takes."""
    package = find_spec("timm")
    assert package is not None, "timm is a dependency"
    assert package.submodule_search_locations, "timm is a package"
    return Path(package.submodule_search_locations[0]) / "data" / "_info" / name
