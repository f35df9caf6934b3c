"""Checkpoints as people store them: one small network in more than forty wrappings, and what each must do.

`python -m tests.support.wrappings` prints the table. Every wrapping either gives the right weights, bit for bit, or is
refused with a sentence. None may give other weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pickle
import re
import sys
import tarfile
import tempfile
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from cache_tools.errors import WeightsError
from pipeline.networks.teachers import load_teacher
from pipeline.recipe import TeacherSpec
from train.students import create_student

ARCHITECTURE, CLASSES = "resnet8", ("ant", "bee", "cat", "dog", "elk")
State = dict[str, torch.Tensor]


class Wrapping(NamedTuple):
    """One way to store weights.

    Attributes:
        title: what people call it.
        write: writes it into an empty folder and returns what `teacher.weights` names.
        refusal: pattern of the sentence that refuses it; None if it loads.
        note: pattern of what is said about the choice; None if there is nothing to say.
        key: `teacher.weights_key`.
        right: the weights that it must give, from the right ones; None for these themselves.
    """

    title: str
    write: Callable[[Path], Path]
    refusal: str | None = None
    note: str | None = None
    key: str | None = None
    right: Callable[[torch.Tensor], torch.Tensor] | None = None


class Outcome(NamedTuple):
    """What a wrapping did: `state` and `notes` if it loaded, else `error`."""

    state: State | None
    notes: tuple[str, ...]
    error: str | None


def weights(seed: int = 1) -> State:
    """Weights of the network with batch statistics other than the identity."""
    torch.manual_seed(seed)
    state: State = create_student(ARCHITECTURE, len(CLASSES)).state_dict()
    for key, value in state.items():
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return state


RIGHT, OTHER = weights(1), weights(2)


def load(path: Path, key: str | None = None) -> Outcome:
    """Load a wrapping as `build-cache --teacher resnet8 --teacher-checkpoint PATH` does."""
    spec = TeacherSpec(name=ARCHITECTURE, weights=str(path), weights_key=key)
    try:
        teacher = load_teacher(spec, CLASSES, torch.device("cpu"), (32, 32), ((0.5,) * 3, (0.25,) * 3))
    except WeightsError as error:
        return Outcome(None, (), str(error))
    return Outcome(teacher.network.state_dict(), teacher.notes, None)


def fault(wrapping: Wrapping, folder: Path) -> tuple[Outcome, str | None]:
    """What a wrapping did, and what was wrong with that; None if it was right."""
    outcome = load(wrapping.write(folder), wrapping.key)
    if wrapping.refusal is not None:
        if outcome.error is None:
            return outcome, "loaded, where it must be refused"
        if "\n" in outcome.error or not re.search(wrapping.refusal, outcome.error):
            return outcome, f"refused with other words than {wrapping.refusal!r}: {outcome.error}"
        return outcome, None
    if outcome.state is None:
        return outcome, f"refused: {outcome.error}"
    change = wrapping.right or (lambda tensor: tensor)
    for key, value in RIGHT.items():
        if not key.endswith("num_batches_tracked") and not torch.equal(outcome.state[key], change(value)):
            return outcome, f"other weights: {key}"
    said = " | ".join(outcome.notes)
    if (wrapping.note is None) != (not said) or (wrapping.note and not re.search(wrapping.note, said)):
        return outcome, f"said {said!r}, where {wrapping.note!r} is expected"
    return outcome, None


def saved(content: Any, name: str = "file.pth", **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(content, folder / name, **options)
        return folder / name

    return write


def prefixed(prefix: str, state: State = RIGHT) -> State:
    return OrderedDict((prefix + key, value) for key, value in state.items())


def renamed(rename: Callable[[str], str], state: State = RIGHT) -> State:
    return {rename(key): value for key, value in state.items()}


def cast(dtype: torch.dtype) -> State:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in RIGHT.items()}


def through(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.to(dtype).to(tensor.dtype) if tensor.is_floating_point() else tensor


def foreign(module: str, name: str, base: type = dict) -> Any:
    """An empty object of a class in a module that is gone when the file is read."""
    made = types.ModuleType(module)
    kind = type(name, (base,), {"__module__": module})
    setattr(made, name, kind)
    parts = module.split(".")
    for end in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    sys.modules[module] = made
    return kind()


def with_foreign(module: str, name: str, content: Callable[[Any], Any], **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        before = set(sys.modules)
        try:
            torch.save(content(foreign(module, name)), folder / "file.pth", **options)
        finally:
            for added in set(sys.modules) - before:
                del sys.modules[added]
        return folder / "file.pth"

    return write


def plain_file(content: bytes, name: str = "file.pth") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def safetensors(name: str, state: State = RIGHT) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file(state, folder / name)
        return folder / name

    return write


def hub_folder(folder: Path) -> Path:
    save_file(RIGHT, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def old_hub_folder(folder: Path) -> Path:
    torch.save(RIGHT, folder / "pytorch_model.bin")
    return folder


def parted_folder(folder: Path) -> Path:
    names = list(RIGHT)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for part, keys in parts.items():
        save_file({key: RIGHT[key] for key in keys}, folder / part)
    index = {"metadata": {}, "weight_map": {key: part for part, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def archive(folder: Path) -> Path:
    torch.save({"model": RIGHT}, folder / "model.pth")
    with tarfile.open(folder / "model.tar.gz", "w:gz") as file:
        file.add(folder / "model.pth", "model.pth")
    return folder / "model.tar.gz"


def torchscript(folder: Path) -> Path:
    with torch.no_grad():
        traced = torch.jit.trace(create_student(ARCHITECTURE, 5).eval(), torch.zeros(1, 3, 32, 32), check_trace=False)
    torch.jit.save(traced, str(folder / "file.pt"))
    return folder / "file.pt"


def cut(folder: Path) -> Path:
    torch.save(RIGHT, folder / "whole.pth")
    (folder / "file.pth").write_bytes((folder / "whole.pth").read_bytes()[:20_000])
    return folder / "file.pth"


def cut_old(folder: Path) -> Path:
    torch.save(RIGHT, folder / "whole.pth", **_OLD)
    (folder / "file.pth").write_bytes((folder / "whole.pth").read_bytes()[:-1000])
    return folder / "file.pth"


def npz(folder: Path) -> Path:
    np.savez(folder / "file.npz", weight=np.zeros(3))
    return folder / "file.npz"


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "file.zip", "w") as file:
        file.writestr("readme.txt", "weights")
    return folder / "file.zip"


def quantised() -> dict[str, Any]:
    state: dict[str, Any] = dict(RIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in newer versions of torch
        state["fc.weight"] = torch.quantize_per_tensor(RIGHT["fc.weight"], 0.1, 0, torch.qint8)
    return state


def noisy_extras() -> dict[str, Any]:
    return {
        "state_dict": RIGHT,
        "opt": argparse.Namespace(lr=0.1, model="resnet8"),
        "lr": np.float64(0.1),
        "history": np.arange(3, dtype=np.float32),
        "saved": datetime.datetime(2024, 5, 1),
        "folder": Path("runs/1"),
        "classes": ["ant", "bee"],
    }


def lightning() -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed("model."),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [{"state": {0: {"exp_avg": RIGHT["conv1.weight"]}}, "param_groups": []}],
        "hyper_parameters": {"lr": 0.1, "arch": "resnet8"},
    }


def optimiser(state: State = OTHER) -> dict[str, Any]:
    return {"state": {number: {"momentum_buffer": value} for number, value in enumerate(state.values())}}


_COUNTERS = {
    "total_ops": torch.zeros(1, dtype=torch.float64),
    "total_params": torch.zeros(1, dtype=torch.float64),
    "layer1.total_ops": torch.ones(1, dtype=torch.float64),
}
_OLD: dict[str, Any] = {"_use_new_zipfile_serialization": False}
_EMA = r"takes the averaged weights \(EMA\) at"


def _keyed(*keys: str, state: State = RIGHT) -> dict[str, Any]:
    nested: Any = state
    for key in reversed(keys):
        nested = {"epoch": 3, key: nested}
    return nested


def _without_head(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def _of_transformers() -> State:
    names = {"conv1.": "resnet.embedder.embedder.convolution.", "bn1.": "resnet.embedder.embedder.normalization."}
    names |= {"fc.": "classifier.1.", "layer": "resnet.encoder.stages."}
    return renamed(
        lambda key: next((new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)), key)
    )


def wrappings() -> list[Wrapping]:
    """All of them; those that load first."""
    return [*_files(), *_nested(), *_prefixes(), *_tensors(), *_averages(), *_several(), *_refused()]


def _files() -> Iterable[Wrapping]:
    yield Wrapping("state dict, .pth", saved(RIGHT))
    yield Wrapping("state dict, torch.save before 1.6", saved(RIGHT, **_OLD))
    yield Wrapping("state dict, no ending", saved(RIGHT, "checkpoint"))
    yield Wrapping("safetensors", safetensors("file.safetensors"))
    yield Wrapping("safetensors called .bin", safetensors("pytorch_model.bin"))
    yield Wrapping("torch.save called .safetensors", saved(RIGHT, "file.safetensors"))
    extras = {"epoch": 1, "arch": "resnet8", "best_acc1": torch.tensor(0.7), "optimizer": optimiser()}
    yield Wrapping("ImageNet example, .pth.tar", saved({**extras, "state_dict": prefixed("module.")}, "best.pth.tar"))
    yield Wrapping("ImageNet example, .tar, old format", saved({**extras, "state_dict": RIGHT}, "best.tar", **_OLD))
    yield Wrapping("Lightning .ckpt", saved(lightning(), "epoch=3.ckpt"))
    yield Wrapping("hub folder, model.safetensors", hub_folder)
    yield Wrapping("hub folder, pytorch_model.bin", old_hub_folder)
    yield Wrapping("hub folder in parts", parted_folder)
    yield Wrapping("tar.gz with one checkpoint", archive)


def _nested() -> Iterable[Wrapping]:
    for name in ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "params", "weights"):
        yield Wrapping(f"{{{name}: …}}", saved(_keyed(name)))
    for name in ("teacher", "student"):
        yield Wrapping(f"{{{name}: …}} alone", saved(_keyed(name)))
    for path in ("model.state_dict", "state.model", "checkpoint.net.params", "what.ever.it.is"):
        yield Wrapping(f"{path}", saved(_keyed(*path.split("."))))
    yield Wrapping("list with a state dict", saved([{"model": RIGHT}, 3]))
    yield Wrapping("names, tensors and figures mixed", saved({**RIGHT, "epoch": 3, "loss": 0.25}))


def _prefixes() -> Iterable[Wrapping]:
    prefixes = (
        "module. _orig_mod. module._orig_mod. _orig_mod.module. model. net. backbone. encoder. teacher. "
        "module.model.net. model._orig_mod.module. student.backbone."
    )
    for prefix in prefixes.split():
        yield Wrapping(f"prefix {prefix}", saved({"state_dict": prefixed(prefix)}))
    inside = renamed(lambda key: key.replace("layer1.", "layer1._fsdp_wrapped_module."))
    yield Wrapping("FSDP around a layer", saved(inside))
    yield Wrapping("DataParallel around a layer", saved(renamed(lambda key: key.replace("layer1.", "layer1.module."))))
    parts = renamed(lambda key: f"head.{key}" if key.startswith("fc.") else f"backbone.{key}")
    yield Wrapping("backbone. and head.", saved({"state_dict": parts}))
    beside = {**prefixed("model."), "criterion.weight": torch.ones(5)}
    yield Wrapping(
        "a loss beside the network",
        saved({"state_dict": beside}),
        note=r"leaves out what is beside .*criterion\.weight",
    )


def _tensors() -> Iterable[Wrapping]:
    yield Wrapping("thop's counters", saved({**RIGHT, **_COUNTERS}), note="a profiler's counters: .*total_ops")
    counted = {f"module.{key}": value for key, value in {**RIGHT, **_COUNTERS}.items()}
    yield Wrapping("thop's counters in DataParallel", saved(counted), note="a profiler's counters: .*total_ops")
    old = {key: value for key, value in RIGHT.items() if not key.endswith("num_batches_tracked")}
    yield Wrapping("no batch counters", saved(old))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        yield Wrapping(str(dtype).removeprefix("torch."), saved(cast(dtype)), right=through(dtype))
    yield Wrapping("Parameters", saved({k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in RIGHT.items()}))
    yield Wrapping("channels last", saved({k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v
                                           for k, v in RIGHT.items()}))  # fmt: skip
    yield Wrapping("Namespace, numpy, dates, paths beside", saved(noisy_extras()))


def _averages() -> Iterable[Wrapping]:
    yield Wrapping("timm: state_dict_ema", saved({"state_dict": OTHER, "state_dict_ema": RIGHT}),
                   note=_EMA + " 'state_dict_ema'; .*weights_key=state_dict takes the raw")  # fmt: skip
    averaged = {"n_averaged": torch.tensor(9), **prefixed("module.")}
    yield Wrapping("torchvision: model_ema", saved({"model": OTHER, "model_ema": averaged}), note=_EMA)
    empty = {"n_averaged": torch.tensor(0), **prefixed("module.", OTHER)}
    note = "resnet8 leaves the average at 'swa_model.module' alone, which has averaged nothing .n_averaged: 0."
    yield Wrapping("SWA that averaged nothing", saved({"model": RIGHT, "swa_model": empty}), note=note)
    parallel = {"n_averaged": torch.tensor(9), **prefixed("module.module.")}
    yield Wrapping(
        "DataParallel in EMA", saved({"model": prefixed("module.", OTHER), "model_ema": parallel}), note=_EMA
    )
    yield Wrapping("{ema: {module: …}}", saved({"model": OTHER, "ema": {"module": RIGHT, "updates": 7}}), note=_EMA)
    yield Wrapping("ema_state_dict", saved({"state_dict": OTHER, "ema_state_dict": RIGHT}), note=_EMA)
    both = {**prefixed("model.", OTHER), **prefixed("ema_model.module.")}
    yield Wrapping("Lightning: ema_model.", saved({"state_dict": both}), note=_EMA)
    swapped = {"steps": torch.tensor(4), **prefixed("module.", OTHER)}
    yield Wrapping("mmengine, which swaps the two", saved({"state_dict": RIGHT, "ema_state_dict": swapped}), note=_EMA)
    averaging = {"state_dict": prefixed("model."), "current_model_state": prefixed("model.", OTHER)}
    averaging["averaging_state"] = {"n_averaged": torch.tensor(3)}
    yield Wrapping("Lightning: WeightAveraging, which swaps too", saved({**lightning(), **averaging}), note=_EMA)
    callback = {**lightning(), "state_dict": prefixed("model.", OTHER), "callbacks": {"EMA": {"weights": RIGHT}}}
    yield Wrapping("EMA in a callback of Lightning", saved(callback), note=_EMA + " 'callbacks.EMA.weights'")
    yield Wrapping("EMA equal to the raw weights", saved({"state_dict": RIGHT, "state_dict_ema": dict(RIGHT)}))
    yield Wrapping("EMA alone", saved({"model_ema": RIGHT}))
    yield Wrapping("raw weights by key", saved({"model": RIGHT, "ema": {"module": OTHER}}), key="model")
    half = {key: value for key, value in OTHER.items() if "running" not in key}
    yield Wrapping(
        "EMA without batch statistics", saved({"model": RIGHT, "model_ema": half}), note="cannot use the averaged"
    )


def _several() -> Iterable[Wrapping]:
    pair = {"student": OTHER, "teacher": RIGHT}
    yield Wrapping(
        "student and teacher", saved(pair), refusal=r"several different.*'student' and 'teacher'.*weights_key="
    )
    yield Wrapping("student and teacher, by key", saved(pair), key="teacher")
    inside = {**prefixed("student.", OTHER), **prefixed("teacher.")}
    yield Wrapping("both in one state dict", saved(inside), refusal="several different")
    yield Wrapping("both in one state dict, by key", saved({"state_dict": inside}), key="state_dict.teacher")
    yield Wrapping("model and best_model", saved({"model": OTHER, "best_model": RIGHT}), refusal="several different")
    three = {"model": OTHER, "best": weights(3), "ema": RIGHT}
    yield Wrapping("two raw ones and an EMA", saved(three), refusal="several different.*'model' and 'best' and 'ema'")
    yield Wrapping("two equal copies", saved({"model": RIGHT, "copy": {k: v.clone() for k, v in RIGHT.items()}}))
    yield Wrapping(
        "a key that is not there", saved(pair), key="ema", refusal=r"no weights at .*weights_key=ema.*'student'"
    )


def _refused() -> Iterable[Wrapping]:
    save = r'torch\.save\(c\["model"\], "weights\.pth"\)'
    for module, name in (
        ("yacs.config", "CfgNode"),
        ("omegaconf.dictconfig", "DictConfig"),
        ("mmengine.config.config", "Config"),
    ):
        content = lambda config: {"epoch": 3, "config": config, "model": RIGHT}  # noqa: E731
        yield Wrapping(
            f"{module}.{name} beside",
            with_foreign(module, name, content),
            refusal=rf"{re.escape(module)}\.{name}.*{save}",
        )
    yield Wrapping(
        "the same in the old format",
        with_foreign("easydict", "EasyDict", content, **_OLD),
        refusal=rf"easydict\.EasyDict.*{save}",
    )
    network = create_student(ARCHITECTURE, 5)
    whole = r"whole pickled network of the class train\.zoo\.resnet\.CifarResNet.*torch\.save\(c{}\.state_dict\(\)"
    yield Wrapping("whole network", saved(network), refusal=whole.format(""))
    yield Wrapping("whole network inside", saved({"epoch": 1, "model": network}), refusal=whole.format(r'\["model"\]'))
    yield Wrapping("TorchScript", torchscript, refusal=r"TorchScript.*torch\.jit\.load")
    yield Wrapping("pickle.dump", plain_file(pickle.dumps(RIGHT)), refusal=r"pickle\.dump")
    yield Wrapping("protocol 4", saved(RIGHT, pickle_protocol=4), refusal=r"only by running it.*torch\.save\(c, ")
    yield Wrapping("numpy.savez", npz, refusal=r"numpy\.savez")
    yield Wrapping("zip of other files", zipped, refusal="zip archive without a checkpoint")
    yield Wrapping("Git LFS pointer", plain_file(b"version https://git-lfs.github.com/spec/v1\n"), refusal="Git LFS")
    yield Wrapping("web page", plain_file(b"<!DOCTYPE html><html>"), refusal="a web page")
    yield Wrapping("HDF5", plain_file(b"\x89HDF\r\n\x1a\n"), refusal="HDF5")
    yield Wrapping("empty file", plain_file(b""), refusal="an empty file")
    yield Wrapping("cut off, old format", cut_old, refusal="cannot read the weights .*found")
    yield Wrapping("cut off", cut, refusal="incomplete or damaged")
    yield Wrapping(
        "other class count",
        saved({**RIGHT, "fc.weight": torch.ones(7, 64), "fc.bias": torch.ones(7)}),
        refusal="expected 5 classes; found 7",
    )
    yield Wrapping(
        "no classifier", saved({"state_dict": prefixed("encoder.", _without_head(RIGHT))}), refusal="no classifier"
    )
    yield Wrapping("a trunk alone", saved(_without_head(RIGHT)), refusal="no classifier")
    yield Wrapping(
        "unknown tensors", saved({**RIGHT, "layer9.weight": torch.ones(3)}), refusal=r"1 more, first 'layer9\.weight'"
    )
    yield Wrapping(
        "another network", saved(create_student("resnet14", 5).state_dict()), refusal="that the architecture lacks"
    )
    yield Wrapping("int8 tensors", saved(cast(torch.int8)), refusal="quantised.*int8")
    yield Wrapping("torch's quantised tensors", saved(quantised()), refusal="quantised.*qint8")
    yield Wrapping("optimiser alone", saved({"optimizer": optimiser()}), refusal="no state dict")
    yield Wrapping("names of transformers", saved(_of_transformers()), refusal="names of the transformers library")
    yield Wrapping("figures alone", saved({"epoch": 3, "accuracy": 0.5}), refusal="no state dict.*epoch, accuracy")


def main() -> None:
    """Print the table: wrapping, and whether it loads right or which sentence refuses it."""
    faults = 0
    for number, wrapping in enumerate(wrappings(), start=1):
        with tempfile.TemporaryDirectory() as folder:
            outcome, wrong = fault(wrapping, Path(folder))
            said = outcome.error or " | ".join(["loads right", *outcome.notes])
            print(f"| {number} | {wrapping.title} | {said.replace(folder, '.')} |")
        if wrong:
            faults += 1
            print(f"| {number} | {wrapping.title} | WRONG: {wrong} |")
    print(f"{number} wrappings, {faults} wrong")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
