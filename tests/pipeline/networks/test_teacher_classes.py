"""The names of a teacher's outputs: where they are found, and how they are matched with the dataset's classes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_tools.errors import RecipeError, WeightsError
from pipeline.networks.class_words import imagenet_ids
from pipeline.networks.teacher_classes import (
    StoredNames,
    TeacherClasses,
    match_classes,
    matching,
    names_beside,
    names_in_checkpoint,
    names_of_imagenet,
)

CATS = ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("own", "outputs"),
    [
        (("ant", "bee", "cat"), (0, 1, 2)),
        (("cat", "ant", "bee"), (1, 2, 0)),
        (("dog", "cat", "eel", "bee", "ant"), (4, 3, 1)),
        (("Cat", "ANT", "bee"), (1, 2, 0)),
        (("ant", "bee"), None),
        (("ant", "bee", "dog"), None),
        (("ant", "bee", "cat", "cat"), None),  # which of the two?
        (("ant", "bee", "cat", "dog", "dog"), (0, 1, 2)),  # the dataset has no dogs
        (("ant", "bee", "cat", "Cat"), (0, 1, 2)),  # the same spelling counts
        (("ant", "bee", "CAT", "Cat"), None),
    ],
)
def test_matching(own: tuple[str, ...], outputs: tuple[int, ...] | None) -> None:
    assert matching(own, CATS) == outputs


def test_names_may_be_spelled_otherwise() -> None:
    assert matching(("Great White Shark", "tree frog"), ("tree_frog", "great-white_shark")) == (1, 0)
    assert matching(("tree frog", "cat"), ("tree_frog", "tree frog")) is None  # two classes of one name


def test_given_names_choose_the_outputs() -> None:
    found = match_classes(CATS, ("cat", "dog", "ant", "bee"), [], where="net")
    assert found[:2] == (4, (2, 3, 0))
    assert found.note == "has 4 classes, and its outputs for the 3 of the dataset are used (teacher.classes)"
    found = match_classes(CATS, ("bee", "cat", "ant"), [StoredNames("file", CATS)], where="net")
    assert found.outputs == (2, 0, 1)  # the recipe wins over the file
    assert match_classes(CATS, CATS, [], where="net") == TeacherClasses(3)


@pytest.mark.parametrize(
    ("order", "outputs"),
    [("natural", (0, 2, 1)), ("sorted", None), ("case-blind", None), ("reversed", (2, 1, 0))],
)
def test_given_orders(order: str, outputs: tuple[int, ...] | None) -> None:
    found = match_classes(("1", "10", "2"), order, [], where="net")
    assert (found.total, found.outputs) == (3, outputs)


def test_classes_of_imagenet() -> None:
    found = match_classes(("n01443537", "n01440764"), "imagenet-1k", [], where="net")
    assert found[:2] == (1000, (1, 0))
    assert match_classes(("n01443537",), "imagenet-22k", [], where="net").total == 21_841


@pytest.mark.parametrize("given", [("ant", "bee", "dog"), "imagenet-1k"])
def test_given_names_must_have_the_classes_of_the_dataset(given: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"teacher\.classes lacks classes of the dataset.*\(net\).*names without .*cat"
    ):
        match_classes(CATS, given, [], where="net")


def test_names_that_are_there_twice_are_called_so() -> None:
    with pytest.raises(RecipeError, match=r"has names twice .*found twice: cat\."):
        match_classes(("cat", "dog"), ("cat", "dog", "cat"), [], where="resnet")
    with pytest.raises(RecipeError, match=r"lacks classes .*without dog"):
        match_classes(("cat", "dog"), ("cat", "cow"), [], where="resnet")


def test_stored_names_are_used_in_their_order() -> None:
    useless, right = StoredNames("a.txt", ("x",) * 7), StoredNames("b.json", ("cat", "bee", "ant"))
    found = match_classes(CATS, None, [useless, right], where="net")
    assert found.outputs == (2, 1, 0)
    assert found.note == "has its classes in another order, and its outputs are put in the dataset's order (b.json)"
    assert match_classes(CATS, None, [useless], where="net") == TeacherClasses(3)
    assert match_classes(CATS, None, [], where="net") == TeacherClasses(3)


def test_other_names_of_the_same_number_are_refused_unless_they_say_nothing() -> None:
    with pytest.raises(
        WeightsError,
        match=r"other classes than the dataset \(net: f\.json\); expected a class 'cat'; found 3 classes: ant",
    ):
        match_classes(CATS, None, [StoredNames("f.json", ("ant", "bee", "dog"))], where="net")
    for made_up in (("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2"), ("class_1", "class_2", "class_3")):
        assert match_classes(CATS, None, [StoredNames("f.json", made_up)], where="net") == TeacherClasses(3)
        with pytest.raises(WeightsError, match="other classes than the dataset"):
            match_classes(CATS, None, [StoredNames("run", made_up, certain=True)], where="net")
    assert match_classes(("1", "0"), None, [StoredNames("f.json", ("0", "1"))], where="net").outputs == (1, 0)


@pytest.mark.parametrize(
    ("checkpoint", "source"),
    [
        ({"model": {}, "class_to_idx": {"cat": 2, "ant": 0, "bee": 1}}, "class_to_idx in the checkpoint"),
        ({"model": {}, "classes": list(CATS)}, "classes in the checkpoint"),
        ({"meta": {"CLASSES": CATS, "epoch": 3}}, "meta.CLASSES in the checkpoint"),
        ({"args": argparse.Namespace(class_names=list(CATS))}, "args.class_names in the checkpoint"),
        ({"hyper_parameters": {"id2label": {0: "ant", 1: "bee", 2: "cat"}}}, "hyper_parameters.id2label in the"),
    ],
)
def test_names_in_a_checkpoint(checkpoint: Any, source: str) -> None:
    [found] = names_in_checkpoint(checkpoint)
    assert found.names == CATS
    assert found.source.startswith(source)


def test_a_checkpoint_without_names() -> None:
    for checkpoint in (
        {"weight": torch.zeros(3)},
        {"classes": 3},
        {"classes": torch.zeros(3)},
        torch.zeros(1),
        None,
        {},
    ):
        assert list(names_in_checkpoint(checkpoint)) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("class_to_idx.json", {"bee": 1, "ant": 0, "cat": 2}),
        ("labels.json", list(CATS)),
        ("config.json", {"architecture": "resnet18", "label_names": list(CATS)}),
        ("config.json", {"architecture": "resnet18", "pretrained_cfg": {"label_names": list(CATS)}}),
        ("config.json", {"id2label": {"0": "ant", "1": "bee", "2": "cat"}}),
        ("classes.txt", "ant\nbee\ncat\n"),
    ],
)
def test_names_beside_the_weights(tmp_path: Path, name: str, content: Any) -> None:
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for path in (tmp_path, tmp_path / "weights.pth"):
        [found] = names_beside(path)
        assert found == (str(tmp_path / name), CATS, False)


def test_other_files_of_these_names_are_no_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2")
    (tmp_path / "labels.json").write_text('{"a": [1]}')
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "classes.txt").write_text("")
    assert list(names_beside(tmp_path / "weights.pth")) == []


def test_an_imagenet_teacher_is_known_by_its_outputs() -> None:
    ids = ("n01443537", "n02123045")
    head = {"state_dict": {"fc.weight": torch.zeros(1000, 4), "fc.bias": torch.zeros(1000)}}
    [found] = names_of_imagenet(head, ids)
    assert found.names == imagenet_ids()
    assert found.source.startswith("imagenet-1k")
    assert list(names_of_imagenet(head, ("ant", "bee"))) == []
    assert list(names_of_imagenet({"fc.bias": torch.zeros(2)}, ids)) == []
    assert list(names_of_imagenet({"bn.bias": torch.zeros(1000), "fc.bias": torch.zeros(2)}, ids)) == []
