"""Which output of a teacher belongs to which class of the dataset.

The names of the outputs come from `teacher.classes`, or from what was stored with the weights: a run of train-student,
`class_to_idx` and the like in a checkpoint, timm's or Hugging Face's `config.json`, a list of classes beside the file.
They are compared with the dataset's class names. The same names in another order, or more of them, say which outputs to
take. Without names the outputs are taken in the order of the dataset's classes, and the preflight judges that.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cache_tools.config.text import parse_json, read_text
from cache_tools.errors import CacheError, RecipeError, WeightsError
from cache_tools.images.class_names import (
    IMAGENETS,
    MAX_NAMES_BYTES,
    ORDERS,
    Names,
    describe,
    listed,
    names_in,
    read_names,
)
from pipeline.networks.class_words import imagenet_ids
from pipeline.networks.references import class_files
from train.weights.reading import WeightsFile

_KEYS = ("class_names", "classes", "CLASSES", "class_to_idx", "idx_to_class", "label_names", "id2label", "label2id")
_NUMBER = re.compile(r"(label|class)?[_ -]?[0-9]+", re.IGNORECASE)  # `LABEL_3`, which Hugging Face makes up


class StoredNames(NamedTuple):
    """Names of a teacher's outputs, and where they were found.

    `certain` names were stored by train-student. Others that only number the outputs (`LABEL_3`) say nothing.
    """

    source: str
    names: Names
    certain: bool = False

    @property
    def say_nothing(self) -> bool:
        return not self.certain and all(_NUMBER.fullmatch(name) for name in self.names)


class TeacherClasses(NamedTuple):
    """The outputs of a teacher.

    Attributes:
        total: number of its own outputs.
        outputs: the output of each class of the dataset; None if they are the same in the same order.
        note: says so to the user, as a sentence that begins with the teacher's name; None if there is nothing to say.
        names: of all its outputs, where `outputs` is not None.
    """

    total: int
    outputs: tuple[int, ...] | None = None
    note: str | None = None
    names: Names = ()


def classes_of_file(
    class_names: Names, given: str | Names | None, file: WeightsFile, *, where: object
) -> TeacherClasses:
    """Match the outputs of a network whose weights are in a file; see `match_classes`."""
    stored = [
        *_names_in_metadata(file),
        *names_in_checkpoint(file.checkpoint),
        *names_beside(file.path),
        *names_of_imagenet(file.checkpoint, class_names),
    ]
    return match_classes(class_names, given, stored, where=where)


def classes_of_library(
    class_names: Names, given: str | Names | None, total: int, categories: Sequence[str], *, where: object
) -> TeacherClasses:
    """Match the outputs of a library's pretrained network with `total` classes, whose names may be in `categories`."""
    known = [names for name in IMAGENETS.values() if len(names := imagenet_ids(name)) == total]
    stored = [StoredNames("the library's list of classes", names) for names in (*known, tuple(categories))]
    fitting = [one for one in stored if matching(one.names, class_names) is not None]
    return match_classes(class_names, given, fitting, where=where)


def match_classes(
    class_names: Names, given: str | Names | None, stored: Sequence[StoredNames], *, where: object
) -> TeacherClasses:
    """Match a teacher's outputs with the dataset's classes.

    Args:
        class_names: of the dataset, in label order.
        given: `teacher.classes` of the recipe: a key of `ORDERS` or `IMAGENETS`, or the names of the outputs.
        stored: names found with the weights, the most reliable first. The first that fit are used.
        where: the teacher, for messages.

    Raises:
        RecipeError: `given` lacks a class of the dataset.
        WeightsError: stored names are as many as the dataset's classes, but other ones.
    """
    if given is not None:
        own = _given_names(given, class_names)
        outputs = matching(own, class_names)
        if outputs is None:
            twice = [name for name, count in Counter(own).items() if count > 1]
            if twice and not set(class_names) - set(own):
                raise RecipeError(
                    "teacher.classes has names twice",
                    where=where,
                    expected="a name of its own for each output of the teacher",
                    found=f"twice: {listed(twice)}",
                    next_step="give every output but one of these another name",
                )
            raise RecipeError(
                "teacher.classes lacks classes of the dataset, or has them twice",
                where=where,
                expected=f"each of {describe(class_names)} once",
                found=f"{len(own)} names without {listed(_unmatched(own, class_names))}",
                next_step="name the teacher's outputs in order, with the names of the dataset for its classes",
            )
        return _result(own, outputs, "teacher.classes")
    for found in stored:
        source, own = found.source, found.names
        outputs = matching(own, class_names)
        if outputs is not None:
            return _result(own, outputs, source)
        if len(own) == len(class_names) and not found.say_nothing:
            position = next(place for place, name in enumerate(class_names) if name in _unmatched(own, class_names))
            raise WeightsError(
                "the teacher has other classes than the dataset",
                where=f"{where}: {source}",
                expected=f"a class '{class_names[position]}'",
                found=describe(own),
                next_step="choose weights that were trained on the dataset's classes. If these are other names for "
                "them, name the teacher's outputs as the dataset does with teacher.classes: sorted, natural, or a file",
            )
    return TeacherClasses(len(class_names))


def matching(own: Names, class_names: Names) -> tuple[int, ...] | None:
    """The position in `own` of each class name; None if one is missing or there twice.

    If the names are not the same, they are compared without case, blanks, dashes, underscores and slashes.
    """
    for form in (str, _plain):
        wanted = [form(name) for name in class_names]
        counts = Counter(form(name) for name in own)
        if all(counts[name] == 1 for name in wanted) and len(set(wanted)) == len(wanted):
            position = {form(name): place for place, name in enumerate(own)}
            return tuple(position[name] for name in wanted)
    return None


def names_in_checkpoint(checkpoint: Any) -> Iterator[StoredNames]:
    """Class names that a training script stored beside the weights, at the top of the file or one level below."""
    parts = {"": checkpoint} if isinstance(checkpoint, Mapping) else {}
    for key, value in list(parts.get("", {}).items()):
        inner = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(inner, Mapping) and not any(isinstance(tensor, torch.Tensor) for tensor in inner.values()):
            parts[f"{key}."] = inner
    for prefix, part in parts.items():
        for key in _KEYS:
            if (names := names_in(part.get(key))) is not None:
                yield StoredNames(f"{prefix}{key} in the checkpoint", names)


def names_beside(path: Path) -> Iterator[StoredNames]:
    """Class names in the folder of the weights: lists of them, and the `config.json` of timm and Hugging Face."""
    for file in class_files(path):
        try:
            if file.suffix == ".txt":
                yield StoredNames(str(file), tuple(read_names(str(file), where="")))
                continue
            what = "cannot read the class names"
            text = read_text(file, what, limit=MAX_NAMES_BYTES, error=WeightsError)
            content = parse_json(text, what, where=file, error=WeightsError)
        except CacheError:  # some other file of this name
            continue
        config = content.get("pretrained_cfg") if isinstance(content, Mapping) else None
        candidates = [names_in(content)]
        candidates += [
            names_in(part.get(key)) for part in (content, config) if isinstance(part, Mapping) for key in _KEYS
        ]
        yield from (StoredNames(str(file), names) for names in candidates if names is not None)


def names_of_imagenet(checkpoint: Any, class_names: Names) -> Iterator[StoredNames]:
    """The classes of an ImageNet whose number is that of the checkpoint's outputs, if the dataset has WordNet ids."""
    rows = _row_counts(checkpoint)
    if len(class_names) in rows:
        return
    for word, subset in IMAGENETS.items():
        ids = imagenet_ids(subset)
        if len(ids) in rows and set(class_names) <= set(ids):
            yield StoredNames(f"{word}, by its {len(ids)} outputs and the WordNet ids of the dataset", ids)


def _names_in_metadata(file: WeightsFile) -> Iterator[StoredNames]:
    """The class names that train-student stores in safetensors files, a JSON list under `class_names`."""
    text = file.metadata.get("class_names")
    if text is None:
        return
    what = "cannot read class_names in the weights' metadata"
    names = names_in(parse_json(text, what, where=file.path, error=WeightsError))
    if names is None:
        raise WeightsError(what, where=file.path, expected="a JSON list of names")
    yield StoredNames(f"class_names in {file.path.name}", names, certain=True)


def _given_names(given: str | Names, class_names: Names) -> Names:
    if not isinstance(given, str):
        return given
    return ORDERS[given](class_names) if given in ORDERS else imagenet_ids(IMAGENETS[given])


def _result(own: Names, outputs: tuple[int, ...], source: str) -> TeacherClasses:
    if outputs == tuple(range(len(own))):
        return TeacherClasses(len(own))
    if len(own) > len(outputs):
        note = f"has {len(own)} classes, and its outputs for the {len(outputs)} of the dataset are used ({source})"
    else:
        note = f"has its classes in another order, and its outputs are put in the dataset's order ({source})"
    return TeacherClasses(len(own), outputs, note, own)


def _unmatched(own: Names, class_names: Names) -> list[str]:
    """The dataset's classes that are missing in `own`, or there twice."""
    exact, plain = Counter(own), Counter(map(_plain, own))
    return [name for name in class_names if exact[name] != 1 and plain[_plain(name)] != 1] or list(class_names)


def _plain(name: str) -> str:
    return re.sub(r"[\s_/\\-]+", " ", name).strip().casefold()


def _row_counts(checkpoint: Any) -> set[int]:
    """The first dimensions of all vectors in a checkpoint: one of them is the bias of the classifier."""
    if isinstance(checkpoint, torch.Tensor):
        return {len(checkpoint)} if checkpoint.ndim == 1 else set()
    values = checkpoint.values() if isinstance(checkpoint, Mapping) else ()
    return set().union(*(_row_counts(value) for value in values))
