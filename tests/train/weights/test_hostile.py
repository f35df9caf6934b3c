"""Checkpoints that were made to harm: what they hold is refused in one line, or gives the right weights."""

from __future__ import annotations

import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from cache_tools.errors import CacheError, WeightsError
from pipeline.networks.teachers import load_teacher
from pipeline.recipe import TeacherSpec
from tests.support.hostile import limited_resources
from tests.support.wrappings import CLASSES, RIGHT, load
from train.weights.reading import read_weights

NAME = next(name for name, value in RIGHT.items() if value.ndim == 4)
WEIGHT = RIGHT[NAME]


class View:
    """A tensor of any size and strides over a storage of four numbers, which torch would not save itself."""

    def __init__(self, *size: int, strides: tuple[int, ...], offset: int = 0) -> None:
        self.size, self.strides, self.offset = size, strides, offset

    def __reduce__(self) -> Any:
        storage = torch.zeros(4).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return _rebuild_tensor_v2, (typed, self.offset, self.size, self.strides, False, {})


class Subclass(torch.Tensor):
    pass


TENSORS: dict[str, Callable[[], Any]] = {
    "sparse COO": lambda: WEIGHT.to_sparse(),
    "sparse CSR": lambda: WEIGHT.reshape(len(WEIGHT), -1).to_sparse_csr(),
    "on the device meta": lambda: WEIGHT.to("meta"),
    "larger than the machine, meta": lambda: torch.empty(1 << 40, 1 << 20, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "quantised": lambda: torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8),
    "complex": lambda: WEIGHT.to(torch.complex64),
    "bool": lambda: WEIGHT > 0,
    "float8": lambda: WEIGHT.to(torch.float8_e4m3fn),
    "int64": lambda: WEIGHT.to(torch.int64),
    "of no dimension": lambda: torch.tensor(1.0),
    "of another class": lambda: WEIGHT.as_subclass(Subclass),
    "a string": lambda: "weights",
    "a list": lambda: WEIGHT.flatten().tolist(),
    "nothing": lambda: None,
    "10¹² numbers in a view of one": lambda: View(10**6, 10**6, strides=(0, 0)),
    "a view beyond its storage": lambda: View(10**6, 10**4, strides=(10**4, 1)),
    "a view before its storage": lambda: View(2, strides=(1,), offset=-4),
    "negative strides": lambda: View(4, strides=(-1,)),
    "more numbers than a count can hold": lambda: View(1 << 40, 1 << 40, strides=(1, 1)),
}


def refused(path: Path, read: Callable[[Path], Any] = load) -> str:
    """The sentence with which a file is refused; it takes neither long nor much memory."""
    with limited_resources():
        try:
            outcome = read(path)
        except CacheError as error:
            message = str(error)
        else:
            message = getattr(outcome, "error", None) or ""
    assert message, "it was read"
    assert message.isprintable()
    assert len(message) < 3000
    return message


@pytest.mark.filterwarnings("ignore:Sparse|The PyTorch API of nested")
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_a_tensor_without_plain_numbers_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.save({**RIGHT, NAME: make()}, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth")


@pytest.mark.parametrize("kind", ["sparse COO", "on the device meta", "complex", "bool"])
def test_the_refusal_says_what_the_tensor_is(kind: str, tmp_path: Path) -> None:
    torch.save({**RIGHT, NAME: TENSORS[kind]()}, tmp_path / "weights.pth")
    message = refused(tmp_path / "weights.pth")
    assert f"the weights are not stored as plain numbers (resnet8, {tmp_path / 'weights.pth'})" in message
    assert {"sparse COO": "layout sparse_coo", "on the device meta": "meta"}.get(kind, kind) in message


@pytest.mark.parametrize("name", ["sparse COO", "on the device meta", "complex", "10¹² numbers in a view of one"])
def test_such_a_tensor_beside_the_weights_is_left_alone(name: str, tmp_path: Path) -> None:
    torch.save({"model": RIGHT, "masks": {"a": TENSORS[name]()}}, tmp_path / "weights.pth")
    with limited_resources():
        state = load(tmp_path / "weights.pth").state
    assert state is not None
    assert torch.equal(state[NAME], WEIGHT)


def aliases(levels: int) -> Any:
    part: Any = {"w": torch.zeros(2)}
    for _ in range(levels):
        part = {f"k{number}": part for number in range(10)}
    return part


def itself(part: Any, key: Any) -> Any:
    part[key] = part
    return part


TREES: dict[str, Callable[[], Any]] = {
    "parts of parts": lambda: aliases(30),
    "a mapping that contains itself": lambda: itself({"w": torch.zeros(2)}, "model"),
    "a list that contains itself": lambda: itself([{}], 0),
    "levels without end": lambda: _nested(200),
    "empty": dict,
    "a number": lambda: 7,
    "a tensor": lambda: WEIGHT,
    "keys that are numbers": lambda: dict(enumerate(RIGHT.values())),
    "keys of any length": lambda: {"x" * 10_000_000: WEIGHT},
    "names of classes that are no names": lambda: {"classes": {(1, 2): 0}, "model": {"w": WEIGHT}},
}


def _nested(levels: int) -> Any:
    part: Any = {}
    for _ in range(levels):
        part = {"model": part}
    return part


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_parts_that_are_nested_as_no_checkpoint_is(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth")


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/version", b"3\n")
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(400):
                entry.write(bytes(1 << 20))


def tar_bomb(path: Path) -> None:
    torch.save(RIGHT, path.with_suffix(".one"))
    with tarfile.open(path, "w:gz", compresslevel=9) as archive:
        entry = tarfile.TarInfo("resnet8_vanilla/ckpt_epoch_240.pth")
        entry.size = 400 << 20
        with open("/dev/zero", "rb") as zeros:
            archive.addfile(entry, zeros)


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FILES: dict[str, bytes] = {
    "more than the file has": safetensors({"w": entry([1 << 30], 0, 4 << 30)}, bytes(16)),
    "a shape that lies": safetensors({"w": entry([1 << 30], 0, 16)}, bytes(16)),
    "a shape beyond all numbers": safetensors({"w": entry([1 << 62, 1 << 62], 0, 16)}, bytes(16)),
    "tensors that overlap": safetensors({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24)),
    "a hole": safetensors({"a": entry([2], 8, 16)}, bytes(16)),
    "offsets that fall": safetensors({"a": entry([2], 16, 8)}, bytes(16)),
    "negative offsets": safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}', bytes(16)),
    "an unknown type": safetensors({"a": entry([2], 0, 8, "F33")}, bytes(8)),
    "a header longer than the file": safetensors({"a": entry([2], 0, 8)}, bytes(8), 1 << 60),
    "a header of nothing": safetensors(b"{}"),
    "no JSON": safetensors(b"{" * 200_000),
    "a header without end": safetensors(b'{"a":' + b"[" * 500_000),
    "metadata that are numbers": safetensors({"__metadata__": {"a": 1}}),
    "nothing": b"",
    "zeros": bytes(4096),
    "text": b"hello\n" * 100,
    "the head of a zip file": b"PK\x03\x04" + bytes(200),
    "a pickle": b"\x80\x02}q\x00.",
    "a pickle without end": b"\x80\x02" + b"(" * 1_000_000,
    "a pickle of a huge text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50),
    "a pickle that calls": b"cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_files_that_lie_about_themselves(content: bytes, ending: str, tmp_path: Path) -> None:
    (tmp_path / f"weights.{ending}").write_bytes(content)
    refused(tmp_path / f"weights.{ending}")


@pytest.mark.parametrize("write", [bomb, tar_bomb])
def test_archives_that_unpack_to_far_more_than_their_size(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").stat().st_size < 2 << 20
    assert "unpacks to far more than its size" in refused(tmp_path / "weights.pth")


def test_a_checkpoint_cut_anywhere_is_refused(tmp_path: Path) -> None:
    torch.save(RIGHT, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for part in range(1, 24):
        (tmp_path / "weights.pth").write_bytes(whole[: len(whole) * part // 24])
        with pytest.raises(WeightsError) as caught:
            read_weights(tmp_path / "weights.pth")
        assert str(caught.value).isprintable()


CONFIG = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "pretrained_cfg": {"input_size": [3, 224, 224]}}
CONFIGS: dict[str, Any] = {
    "a wide network": {**CONFIG, "model_args": {"embed_dim": 60_000}},
    "a network wider than any": {**CONFIG, "model_args": {"embed_dim": 10**9}},
    "a network without end": {**CONFIG, "model_args": {"depth": 10**7}},
    "arguments that are none": {**CONFIG, "model_args": ["embed_dim", 3]},
    "arguments of another network": {**CONFIG, "model_args": {"no_such_argument": 3}},
    "a name that is a number": {**CONFIG, "architecture": 7},
    "a name of nothing": {**CONFIG, "architecture": "no_such_network"},
    "images of any size": {**CONFIG, "pretrained_cfg": {"input_size": [3, 10**6, 10**6]}},
    "images of no size": {**CONFIG, "pretrained_cfg": {"input_size": None, "mean": None}},
    "a mean that is none": {**CONFIG, "pretrained_cfg": {"mean": ["a", "b", "c"]}},
    "a deviation of 0": {**CONFIG, "pretrained_cfg": {"std": [0, 0, 0]}},
    "a mean of NaN": '{"architecture": "resnet18", "pretrained_cfg": {"mean": [NaN, 0, 0]}}',
    "a configuration that is a list": {**CONFIG, "pretrained_cfg": [1]},
    "classes beyond all numbers": {**CONFIG, "num_classes": 1 << 62},
    "a list": [1, 2],
    "a key twice": '{"architecture": "resnet18", "architecture": "resnet34"}',
}


@pytest.mark.medium
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_config_of_a_folder_is_checked_before_the_network_is_made(config: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    torch.save({"head.bias": torch.zeros(5)}, tmp_path / "pytorch_model.bin")
    spec = TeacherSpec(name=f"local-dir:{tmp_path}")
    refused(
        tmp_path,
        lambda path: load_teacher(spec, CLASSES, torch.device("cpu"), (32, 32), ((0.5,) * 3, (0.25,) * 3)),
    )
