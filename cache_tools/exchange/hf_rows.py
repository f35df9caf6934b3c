"""The rows of a cache as the tables of a Hugging Face data set: their columns, types and numbers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_tools.codecs import Float16, SparseCodec
from cache_tools.format.arrays import seed_arrays
from cache_tools.reader import TeacherCache

if TYPE_CHECKING:
    import pyarrow as pa

    from cache_tools.targets import ViewTargets


class ExportedRows:
    """The rows of a cache as tables.

    Args:
        top: store the so many most probable classes instead of all logits; None for what the cache has.
        features: also the fused features.
        names: the file of each image; None to leave it out.

    Attributes:
        features: column → the feature that the package `datasets` knows it by.
        about: column → what it has, for the card.
    """

    def __init__(self, cache: TeacherCache, *, top: int | None, features: bool, names: list[str] | None) -> None:
        self.cache, self._top, self._names = cache, top, names
        spec = cache.targets.get("fused_logits")
        codec = None if spec is None else spec.codec
        self._sparse = codec if isinstance(codec, SparseCodec) else None
        self._dtype = "float16" if isinstance(codec, Float16) else "float32"
        self._with_features, self._has_seeds = features, bool(seed_arrays(cache.recipe, 1))
        self.features: dict[str, Any] = {}
        self.about: dict[str, str] = {}
        self._declare()

    def _declare(self) -> None:
        cache, multi_label = self.cache, self.cache.recipe.dataset.multi_label
        label = {"names": list(cache.class_names), "_type": "ClassLabel"}
        self._add("view", _value("int32"), "the augmentation seed: the number of the view")
        self._add("sample", _value("int64"), "the number of the image")
        self._add("key", _value("string"), "its content key: 32 hex digits of blake2b over the bytes of its file")
        if self._names is not None:
            self._add("file_name", _value("string"), "its file, below the folder of the split")
        if multi_label:
            self._add("labels", _list(label), "the ground truth: every class that is in the image")
        else:
            self._add("label", label, "the ground truth")
        if self._has_seeds:
            self._add("tool_seed", _value("int32"), "the seed from which the other tool drew the view")
        if self._sparse is not None or self._top is not None:
            temperature = 1.0 if self._sparse is None or self._top is not None else self._sparse.temperature
            self._add("classes", _list(_value("int32")), "the classes whose probabilities are known")
            self._add(
                "probabilities",
                _list(_value("float32")),
                f"what the teachers give them, at temperature {temperature:g}",
            )
            self._add("rest", _value("float32"), "the probability of all other classes together")
        else:
            centred = "" if multi_label else ", mean-centred"
            self._add("logits", _list(_value(self._dtype), cache.num_classes), f"the fused logits{centred}")
        if self._with_features:
            width = cache.recipe.fusion.feature_dim
            self._add("features", _list(_value("float32"), width), "the fused features")

    def _add(self, name: str, feature: Any, about: str) -> None:
        self.features[name], self.about[name] = feature, about

    @property
    def row_bytes(self) -> int:
        """About as many as a row has before compression."""
        found = 60
        if "logits" in self.features:
            found += self.cache.num_classes * (2 if self._dtype == "float16" else 4)
        if "classes" in self.features:
            found += 8 * (self._top or 64)
        return found + 4 * self.cache.recipe.fusion.feature_dim * self._with_features

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        fields = [pa.field(name, _arrow(feature)) for name, feature in self.features.items()]
        return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": self.features}})})

    def table(self, view: int, block: int) -> pa.Table:
        """The rows of a block."""
        import pyarrow as pa

        cache, place = self.cache, self.cache.manifest.block(block)
        targets = cache.load_view(view, features=self._with_features, blocks=[block])
        samples = np.arange(place.start, place.stop, dtype=np.int64)
        keys = cache.sample_keys[place]
        columns: dict[str, Any] = {
            "view": np.full(len(samples), view, np.int32),
            "sample": samples,
            "key": [key.tobytes().hex() for key in keys],
        }
        if self._names is not None:
            columns["file_name"] = self._names[place]
        labels = cache.labels[place]
        if labels.ndim == 2:
            columns["labels"] = [np.flatnonzero(row).tolist() for row in labels]
        else:
            columns["label"] = labels
        if self._has_seeds:
            columns["tool_seed"] = cache.view_seeds(view, place)
        columns |= self._logits(targets)
        if self._with_features:
            columns["features"] = _fixed(targets.features(slice(None)).numpy())
        schema = self.schema()
        arrays = [
            value if isinstance(value, pa.Array) else pa.array(value, schema.field(name).type)
            for name, value in ((name, columns[name]) for name in schema.names)
        ]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _logits(self, targets: ViewTargets) -> dict[str, Any]:
        if "logits" in self.features:
            return {"logits": _fixed(targets.logits(slice(None)).numpy().astype(self._dtype))}
        if self._top is None:
            assert self._sparse is not None, "the columns of a sparse codec"
            found = targets.sparse_logits(slice(None), self._sparse.temperature)
            classes, p = found.classes.numpy(), np.exp(found.log_p.numpy().astype(np.float64))
            known = classes < self.cache.num_classes
            rest = np.exp(found.log_tail.numpy().astype(np.float64))
        else:
            logits = targets.logits(slice(None)).double()
            probabilities = logits.softmax(dim=1)
            best = probabilities.topk(self._top, dim=1)
            classes, p = best.indices.numpy(), best.values.numpy()
            known = np.ones(classes.shape, np.bool_)
            rest = np.maximum(1.0 - p.sum(axis=1), 0.0)
        return {
            "classes": _ragged(classes.astype(np.int32), known),
            "probabilities": _ragged(p.astype(np.float32), known),
            "rest": rest.astype(np.float32),
        }


def _value(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


def _list(feature: Any, length: int = -1) -> dict[str, Any]:
    return {"feature": feature, "length": length, "_type": "List"}


def _arrow(feature: dict[str, Any]) -> pa.DataType:
    import pyarrow as pa

    if feature["_type"] == "List":
        return pa.list_(_arrow(feature["feature"]), feature["length"])
    return pa.int64() if feature["_type"] == "ClassLabel" else pa.type_for_alias(feature["dtype"])


def _fixed(values: np.ndarray) -> pa.Array:
    """Rows of one width as an array of lists of this length."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def _ragged(values: np.ndarray, known: np.ndarray) -> pa.Array:
    """The known numbers of each row as lists."""
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(known.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values[known]))
