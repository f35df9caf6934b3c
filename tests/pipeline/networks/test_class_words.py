"""The words of CLIP's prompts: names of folders, WordNet ids, and words that say nothing."""

from __future__ import annotations

from collections import Counter

import pytest

from cache_tools.errors import RecipeError
from pipeline.networks.class_words import check_words, class_words, imagenet_ids


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("aquarium_fish", "cat"), ("aquarium fish", "cat")),
        (("n01440764", "n02123045"), ("tench", "tabby cat")),
        (("n01440764", "maple_tree"), ("tench", "maple tree")),  # ids and words in one dataset
        (("n02012849", "n03126707"), ("crane bird", "construction crane")),  # both "crane" in WordNet
        (("n03773504", "n04008634"), ("missile", "projectile, missile")),  # both "missile" in open_clip's list
        (("n04355933", "n04356056"), ("sunglass", "sunglasses, dark glasses, shades")),
        (("n00004475", "n01317541"), ("organism", "domestic animal")),  # of ImageNet-22k, not of the 1000
        (("0", "1"), ("0", "1")),
        (("001.Black_footed_Albatross",), ("001.Black footed Albatross",)),
    ],
)
def test_words_of_class_names(names: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert class_words(names) == words
    check_words(names)


def test_words_of_the_recipe_are_taken_as_they_are() -> None:
    assert class_words(("n01440764", "b"), ("n01440764", "big_dog")) == ("n01440764", "big dog")


def test_all_classes_of_imagenet_have_words_of_their_own() -> None:
    """In the order of the outputs, as open_clip and timm number them."""
    words = class_words(imagenet_ids())
    assert len(words) == 1000
    assert (words[0], words[281], words[999]) == ("tench", "tabby cat", "toilet paper")
    assert [word for word, count in Counter(word.casefold() for word in words).items() if count > 1] == []
    check_words(imagenet_ids())


@pytest.mark.parametrize("subset", ["imagenet12k", "imagenet22k"])
def test_all_classes_of_the_large_imagenets_have_words_of_their_own(subset: str) -> None:
    check_words(imagenet_ids(subset))


def test_unknown_ids_are_refused_with_advice() -> None:
    with pytest.raises(
        RecipeError, match=r"not in ImageNet.*found n00440764, n09999999\. Give words.*clip\.class_names"
    ):
        class_words(("n01440764", "n00440764", "n09999999"))
    assert class_words(("n1", "n014407640")) == ("n1", "n014407640")  # no ids


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("black_cat", "black cat", "dog"), "black_cat = 'black cat', black cat = 'black cat'"),
        (("Cat", "cat"), "Cat = 'Cat', cat = 'cat'"),
        (("a__b", "c", "_a b"), "a__b = 'a b', _a b = 'a b'"),
    ],
)
def test_equal_words_are_refused(names: tuple[str, ...], found: str) -> None:
    with pytest.raises(RecipeError, match=rf"cannot tell classes apart.*found {found}\. Give words"):
        check_words(names)
    check_words(names, [f"word {number}" for number in range(len(names))])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("_", "cat"), r"none for the class '_'"),
        (("cat", "  ", "--"), r"none for the classes '  ', '--'"),
        (("",), "''"),
    ],
)
def test_empty_words_are_refused(names: tuple[str, ...], found: str) -> None:
    with pytest.raises(RecipeError, match=rf"need a word for every class.*{' '.join(found.split())}"):
        check_words(names)


def test_given_words_are_judged_too() -> None:
    with pytest.raises(RecipeError, match="cannot tell classes apart"):
        check_words(("a", "b"), ("cat", "CAT"))
    with pytest.raises(RecipeError, match="need a word for every class"):
        check_words(("a", "b"), ("cat", "_"))
    with pytest.raises(RecipeError, match=r"one class name per class.*expected 2; found 1"):
        check_words(("a", "b"), ("cat",))


@pytest.mark.parametrize(
    ("names", "example"),
    [
        (("001.Black_footed_Albatross", "002.Laysan_Albatross"), "001.Black footed Albatross"),
        (("n02085620-Chihuahua", "n02085782-Japanese_spaniel"), "n02085620-Chihuahua"),
        (("0_zero", "1_one"), "0 zero"),
        (("cat", "12 - dog"), "12 - dog"),
        (("0", "1"), None),
        (("2023", "747-400"), None),  # a number is the name
        (("n01440764", "n01443537"), None),
        (("4x4", "b2"), None),
    ],
)
def test_numbers_before_words_are_noted(names: tuple[str, ...], example: str | None) -> None:
    notes = check_words(names)
    assert [f"as in '{example}'" in note for note in notes] == ([] if example is None else [True])
    assert check_words(names, ["cat", "dog"]) == ()
