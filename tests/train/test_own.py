"""Networks of one's own: imported by name, used through timm's interface, and never from a stored name alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_tools.errors import RecipeError
from cache_tools.system import named
from train import own
from train.checkpoints import StudentCard, load_student, save_student
from train.students import create_student

NETS = """
import torch
from torch import nn

def plain(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Dropout(0.5), nn.Linear(8, num_classes))

class Net(nn.Module):
    '''Has a `forward_features` of its own, a hidden linear layer, and a buffer.'''
    def __init__(self, classes, width=6):
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 5), nn.Linear(5, classes)
        self.register_buffer("scale", torch.tensor(2.0))
    def forward_features(self, x):
        return self.conv(x).mean((2, 3)) * self.scale
    def forward(self, x):
        return self.head(self.hidden(self.forward_features(x)).relu())

def fixed():
    return Net(3)

def timms(num_classes, **options):
    import timm
    return timm.create_model("test_resnet", num_classes=num_classes, **options)

def probabilities(num_classes):
    return nn.Sequential(plain(num_classes), nn.Softmax(1))

def convolutional(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def two_arguments(num_classes, depth):
    return plain(num_classes)

def broken(num_classes):
    return plain(num_classes / 0)

def text(num_classes):
    return "resnet18"

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module that no other test has seen, and an empty cache home."""
    (tmp_path / "nets_of_mine.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(own.ALLOWED, raising=False)
    monkeypatch.setattr(named, "_in_process", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("nets_of_mine", None)


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["plain", "Net", "fixed"])
def test_features_are_the_input_of_the_layer_that_gives_the_logits(folder: Path, name: str) -> None:
    network: Any = create_student(f"nets_of_mine:{name}", 3).eval()
    logits, features = network(images()), network.forward_head(network.forward_features(images()), pre_logits=True)
    assert features.shape == (2, network.num_features)
    assert logits.shape == (2, 3)
    linear = network.get_classifier()
    assert torch.equal(torch.nn.functional.linear(features, linear.weight, linear.bias), logits)
    assert torch.equal(network.forward_head(network.forward_features(images())), logits)


def test_state_dicts_have_the_names_of_the_network(folder: Path) -> None:
    torch.manual_seed(0)
    network: Any = create_student("nets_of_mine:plain", 3)
    inner = sys.modules["nets_of_mine"].plain(3)
    assert list(network.state_dict()) == list(inner.state_dict())
    network.load_state_dict(inner.state_dict())
    assert all(torch.equal(value, inner.state_dict()[key]) for key, value in network.state_dict().items())
    inside = torch.nn.ModuleDict({"module": network})  # as an average of weights holds it
    assert list(inside.state_dict()) == [f"module.{key}" for key in inner.state_dict()]
    inside.load_state_dict({key: torch.zeros_like(value) for key, value in inside.state_dict().items()})
    assert not any(value.any() for value in network.state_dict().values())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        network.load_state_dict({**inner.state_dict(), "extra": torch.zeros(1)})


def test_gradients_reach_every_parameter(folder: Path) -> None:
    network: Any = create_student("nets_of_mine:Net", 3)
    maps = network.forward_features(images())
    (network.forward_head(maps).sum() + network.forward_head(maps, pre_logits=True).sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_a_network_with_timms_interface_is_used_as_it_is(folder: Path) -> None:
    network: Any = create_student("nets_of_mine:timms", 4, drop_rate=0.25)
    assert type(network).__module__.startswith("timm.")
    assert network.num_classes == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets_of_mine:fixed", r"another class count.*expected 7 outputs.*found 3"),
        ("nets_of_mine:convolutional", "no linear layer that gives the logits"),
        ("nets_of_mine:two_arguments", r"other arguments.*found num_classes, depth"),
        (
            "nets_of_mine:broken",
            r"failed \(nets_of_mine:broken, .*nets_of_mine\.py, line \d+\); found ZeroDivisionError",
        ),
        ("nets_of_mine:text", r"expected a torch\.nn\.Module; found str"),
        ("nets_of_mine:number", "has no function 'number'"),
        ("nets_of_mine:absent", r"has no function 'absent' .*nets_of_mine\.py"),
        ("nets_of_yours:plain", r"no module 'nets_of_yours'"),
        ("nets_of_mine.py:plain", r"Leave out '\.py': nets_of_mine:plain"),
        ("train.nets:plain", "'train' is a package of teacher-cache: give your module another name"),
        ("unfinished:plain", r"cannot import the module.*unfinished\.py, line 1\); found SyntaxError"),
        ("needy:plain", "needs a package that is not installed.*found no_such_package"),
    ],
)
def test_errors(folder: Path, name: str, message: str) -> None:
    (folder / "unfinished.py").write_text("def plain(:\n")
    (folder / "needy.py").write_text("import no_such_package\n")
    with pytest.raises(RecipeError, match=message) as caught:
        create_student(name, 7)
    assert "\n" not in str(caught.value)


def test_a_network_that_returns_something_else_than_its_linear_layer_gives(folder: Path) -> None:
    network: Any = create_student("nets_of_mine:probabilities", 3).eval()
    with pytest.raises(
        RecipeError, match=r"not the output of its last linear layer \(nets_of_mine:probabilities, layer 0\.6"
    ):
        network.forward_features(images())


def stored_student(folder: Path, name: str = "nets_of_mine:plain", network: torch.nn.Module | None = None) -> Path:
    card = StudentCard(
        architecture=name,
        num_classes=3,
        class_names=("a", "b", "c"),
        image_size=(16, 16),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        dataset="folder",
    )
    path = folder / "last.safetensors"
    save_student(path, network or create_student(name, 3), card)
    return path


class TestConsent:
    def forget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in a new process."""
        monkeypatch.setattr(named, "_in_process", set())
        sys.modules.pop("nets_of_mine", None)

    def test_a_module_that_the_user_has_named_is_imported_for_a_stored_run(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = stored_student(folder)
        self.forget(monkeypatch)
        student, _ = load_student(path)
        assert student(images()).shape == (2, 3)

    def test_a_module_of_somebody_else_is_not_imported(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = stored_student(folder)
        self.forget(monkeypatch)
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "another-user"))
        (folder / "nets_of_mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n{NETS}")
        with pytest.raises(
            RecipeError, match=r"found nets_of_mine:plain, in .*nets_of_mine\.py.*TEACHER_CACHE_MODULES="
        ):
            load_student(path)
        assert not (folder / "ran").exists()
        monkeypatch.setenv(own.ALLOWED, "others, nets_of_mine")
        load_student(path)
        assert (folder / "ran").exists()

    def test_the_same_name_in_another_place_is_not_the_same_module(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = stored_student(folder)
        self.forget(monkeypatch)
        received = folder / "received"
        received.mkdir()
        (received / "nets_of_mine.py").write_text(NETS)
        monkeypatch.chdir(received)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(folder)])
        with pytest.raises(RecipeError, match=r"found nets_of_mine:plain, in .*received"):
            load_student(path)

    @pytest.mark.parametrize("name", ["os:abort", "sys:exit", "builtins:breakpoint"])
    def test_functions_of_python_are_not_called_for_a_stored_name(self, folder: Path, name: str) -> None:
        path = stored_student(folder, name, torch.nn.Linear(2, 3))
        with pytest.raises(RecipeError, match="you have not named it"):
            load_student(path)

    def test_other_names_need_no_consent(self, folder: Path) -> None:
        for name in ("resnet8", "timm:resnet18", "torchvision:resnet18"):
            own.require_consent(name, "a run")
