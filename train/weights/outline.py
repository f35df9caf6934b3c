"""What a pickled checkpoint holds, found without running anything in it.

Every name in the pickle becomes an inert stand-in: an empty dict that remembers what it was made from. No class, no
function and no tensor of the file is ever created, so the outline only serves messages.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

_TENSORS = ("torch._utils._rebuild", "torch._tensor._rebuild", "torch.nn.parameter.Parameter", "torch.Tensor")
_LEGACY_HEADERS = 3  # a file of old versions of torch.save begins with three other pickles
_MAX_DEPTH = 4
_MODULE_STATE = {"_modules", "_parameters"}


class Outline(NamedTuple):
    """Foreign objects of a pickled checkpoint, and where its weights are.

    Attributes:
        classes: full names of the foreign classes and functions, in the order of the file.
        weights: the Python expression that gets the state dict from the loaded checkpoint `c`; None if there is none.
        is_module: whether the checkpoint, or its part with the weights, is a whole pickled network.
    """

    classes: tuple[str, ...]
    weights: str | None
    is_module: bool


class _Inert(dict[Any, Any]):
    """Stands for any object: accepts every call and state, runs nothing."""

    full_name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)

    def append(self, item: Any) -> None:
        self[len(self)] = item

    def extend(self, items: Any) -> None:
        for item in items:
            self.append(item)

    def add(self, item: Any) -> None:
        self.append(item)

    def __hash__(self) -> int:  # type: ignore[override]  # it may be the key of a dict
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _OutlineUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="latin1")
        self.names: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        self.names.setdefault(full)
        return type("_Inert", (_Inert,), {"full_name": full})

    def persistent_load(self, pid: Any) -> Any:
        return None


def outline(content: bytes, known: set[str]) -> Outline | None:
    """The outline of a file of torch.save; None if the file cannot be followed.

    Args:
        known: full names that are not foreign.
    """
    try:
        file, count = io.BytesIO(content), 1 + _LEGACY_HEADERS
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl")
                file, count = io.BytesIO(archive.read(name)), 1
        file.seek(0)
        names: dict[str, None] = {}
        for _ in range(count):
            unpickler = _OutlineUnpickler(file)
            root = unpickler.load()
            names |= unpickler.names
    except Exception:  # any bytes may follow; the caller has an error to report already
        return None
    foreign = tuple(name for name in names if name not in known and not name.startswith("torch._utils._rebuild"))
    weights = _weights(root, "c", 0, set())
    return Outline(foreign, None if weights is None else weights[0], weights is not None and weights[1])


def _weights(node: Any, expression: str, depth: int, seen: set[int]) -> tuple[str, bool] | None:
    """(expression of the first state dict below a node, whether it is a network's); shared parts are seen once."""
    if _is_module(node):
        return f"{expression}.state_dict()", True
    if not isinstance(node, Mapping) or depth > _MAX_DEPTH or id(node) in seen:
        return None
    seen.add(id(node))
    if any(_is_tensor(value) for value in node.values()):
        return expression, False
    for key, value in node.items():
        if isinstance(key, str) and not key.startswith(("optim", "sched", "lr_")):
            found = _weights(value, f'{expression}["{key}"]', depth + 1, seen)
            if found is not None:
                return found
    return None


def _is_module(node: Any) -> bool:
    return isinstance(node, _Inert) and node.keys() >= _MODULE_STATE


def _is_tensor(node: Any) -> bool:
    return isinstance(node, _Inert) and node.full_name.startswith(_TENSORS)
