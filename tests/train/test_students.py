"""The zoo has the layouts and outputs of mdistiller; every student has timm's interface."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cache_tools.errors import RecipeError, WeightsError
from tests.support.golden_cases import REFERENCE_LOGITS
from tests.support.turns import slow
from train.recipe.student_names import ZOO_NAMES
from train.students import create_student, student_names

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS: dict[str, Any] = json.loads((GOLDEN / "models.json").read_text())
OUTPUTS = np.load(GOLDEN / "models.npz")


def rule_values(key: str, shape: torch.Size, number: int) -> torch.Tensor:
    """Values by the rule of the golden data, for tensor `number` of a state dict."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    j = np.arange(int(np.prod(shape)), dtype=np.float64)
    x = np.sin(12.9898 * (j + 1) + 78.233 * (number + 1)) * 43758.5453
    b = 2 * (x - np.floor(x)) - 1
    if key.endswith("running_var"):
        values = 1 + 0.1 * np.abs(b)
    elif key.endswith("running_mean"):
        values = 0.05 * b
    elif len(shape) >= 2:
        values = b * np.sqrt(3) * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("weight"):
        values = 1 + 0.1 * b
    else:
        values = 0.05 * b
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


@pytest.fixture(scope="module", params=list(LAYOUTS))
def filled(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """(name, network) with weights by that rule, in eval mode; one network in memory at a time."""
    network = create_student(request.param, num_classes=100)
    state = network.state_dict()
    network.load_state_dict({key: rule_values(key, t.shape, i) for i, (key, t) in enumerate(state.items())})
    return request.param, network.eval()


def relative_error(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


def images(batch: int, size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(size))


# --- the zoo -----------------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_state_dicts_have_the_published_layout(filled: tuple[str, Any]) -> None:
    name, network = filled
    golden = LAYOUTS[name]
    assert [[key, list(t.shape)] for key, t in network.state_dict().items()] == golden["state_dict"]
    assert sum(p.numel() for p in network.parameters()) == golden["parameters"]
    assert network.num_features == golden["feature_dim"]


@torch.no_grad()
def test_outputs_match_the_reference(filled: tuple[str, Any]) -> None:
    name, network = filled
    batch = torch.from_numpy(OUTPUTS["input"])
    logits = network(batch)
    if name in REFERENCE_LOGITS:
        ends = torch.cat([logits[0, :3], logits[1, -3:]])
        assert relative_error(ends, np.array(REFERENCE_LOGITS[name])) < 1e-4
    else:
        assert relative_error(logits, OUTPUTS[f"{name}.logits"]) < 1e-4
        pooled = network.forward_head(network.forward_features(batch), pre_logits=True)
        assert relative_error(pooled, OUTPUTS[f"{name}.features"]) < 1e-4


def assert_interface(network: Any, batch: torch.Tensor, num_classes: int, rank: int = 4) -> None:
    """Check timm's interface in eval mode. `rank` is that of the last map: 4, or 3 for tokens."""
    with torch.no_grad():
        logits = network(batch)
        last_map = network.forward_features(batch)
        kept = last_map.clone()
        pooled = network.forward_head(last_map, pre_logits=True)
        assert torch.equal(network.forward_head(last_map), logits)
        assert torch.equal(last_map, kept), "the head changed the map in place"
        assert torch.equal(network.get_classifier()(pooled), logits)
    assert logits.shape == (len(batch), num_classes)
    assert torch.isfinite(logits).all()
    assert last_map.ndim == rank
    assert pooled.shape == (len(batch), network.num_features)
    assert isinstance(network.get_classifier(), nn.Linear)
    assert network.get_classifier().in_features == network.num_features
    assert network.num_classes == num_classes


def test_interface_of_the_zoo(filled: tuple[str, Any]) -> None:
    _, network = filled
    assert_interface(network, images(2, 32), num_classes=100)


@torch.no_grad()
def test_zoo_maps_are_activated_and_pool_to_the_features(filled: tuple[str, Any]) -> None:
    _, network = filled
    last_map = network.forward_features(images(2, 32))
    assert last_map.shape[1] == network.num_features
    assert last_map.min() == 0, "the last map has a ReLU behind it"
    pooled = network.forward_head(last_map, pre_logits=True)
    torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(last_map, 1).flatten(1))


@torch.no_grad()
@pytest.mark.parametrize("size", [28, 40, 64])
def test_the_zoo_takes_other_image_sizes(filled: tuple[str, Any], size: int) -> None:
    _, network = filled
    logits = network(images(1, size))
    assert logits.shape == (1, 100)
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_zoo_does_not_depend_on_memory_format(filled: tuple[str, Any]) -> None:
    _, network = filled
    batch = images(2, 32)
    logits = network(batch.contiguous(memory_format=torch.channels_last))
    assert relative_error(logits, network(batch).numpy()) < 1e-4


@pytest.mark.medium
@pytest.mark.parametrize("name", student_names())
def test_zoo_trains(name: str) -> None:
    torch.manual_seed(0)
    network = create_student(name, num_classes=10).train()
    logits = network(images(4, 32))
    assert logits.shape == (4, 10)
    F.cross_entropy(logits, torch.arange(4)).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        # A batch norm cancels the bias before it (VGG), so the gradient of that bias is rounding noise.
        if parameter.ndim > 1:
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ["resnet8", "ResNet18", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_gradients_are_right_despite_in_place_operations(name: str) -> None:
    """Gradients in float64 equal a central difference along one random direction."""
    torch.manual_seed(1)
    network = create_student(name, num_classes=5).double().train()
    batch, labels = images(4, 16).double(), torch.tensor([0, 1, 2, 3])
    loss = F.cross_entropy(network(batch), labels)
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    directions = [torch.randn_like(p) * p.detach().abs().mean() for p in parameters]
    slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))

    def moved(step: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
            value = F.cross_entropy(network(batch), labels).item()
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(direction, alpha=step)
        return value

    step = 1e-8  # small enough to cross no ReLU's kink, large enough for float64
    assert slope == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=1e-4)


def test_zoo_initialisation() -> None:
    torch.manual_seed(0)
    for name in ("resnet20", "ResNet18", "wrn_16_2", "vgg8", "MobileNetV2"):
        for key, module in create_student(name, num_classes=10).named_modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
                expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.1), (name, key)
                assert module.bias is None or not module.bias.any()
            elif isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all()
                assert not module.bias.any()
    for name in ("vgg8", "MobileNetV2"):
        linear: Any = create_student(name, num_classes=100).get_submodule("classifier")
        linear = linear[0] if isinstance(linear, nn.Sequential) else linear
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not linear.bias.any()


def test_random_weights_are_drawn_from_the_default_generator() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(create_student("ShuffleV2", 10).state_dict())
    first, second = states
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_zoo_takes_other_channels() -> None:
    for name in ("resnet8", "ResNet18", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"):
        assert create_student(name, 10, in_chans=1)(images(2, 32, channels=1)).shape == (2, 10)


def test_names() -> None:
    assert list(student_names()) == list(LAYOUTS) == list(ZOO_NAMES)
    assert type(create_student("SHUFFLENETV2", 3)) is type(create_student("shufflev2", 3))
    assert type(create_student("ShuffleNetV1", 3)) is type(create_student("ShuffleV1", 3))
    assert create_student("RESNET8X4", 3).num_features == 256
    assert create_student("resnet18", 3).num_features == 512


@pytest.mark.medium
@pytest.mark.medium
def test_names_are_listed_without_importing_timm_or_torchvision() -> None:
    code = (
        "import sys; from train.students import create_student, student_names; student_names();"
        "create_student('resnet8', 10);"
        "print(sorted({'timm', 'torchvision', 'open_clip', 'pipeline'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- timm --------------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "size", "rank", "options"),
    [
        ("resnet10t", 64, 4, {}),
        ("mobilenetv3_small_050", 64, 4, {}),  # a wider layer follows the pool
        ("vit_tiny_patch16_224", 64, 3, {"img_size": 64}),
    ],
)
def test_interface_of_timm(name: str, size: int, rank: int, options: dict[str, Any]) -> None:
    network = create_student(f"timm:{name}", num_classes=7, **options).eval()
    assert_interface(network, images(2, size), num_classes=7, rank=rank)


def test_timm_options_pass_through(tmp_path: Path) -> None:
    network = create_student("timm:resnet10t", 7, in_chans=1)
    assert network(images(2, 64, channels=1)).shape == (2, 7)
    published = create_student("timm:resnet10t", 1000)
    torch.save(published.state_dict(), tmp_path / "weights.pt")
    overlay = {"file": str(tmp_path / "weights.pt")}
    tuned = create_student("TIMM:resnet10t", 7, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(tuned.state_dict()["conv1.0.weight"], published.state_dict()["conv1.0.weight"])
    assert tuned.state_dict()["fc.weight"].shape == (7, 512)


# --- torchvision -------------------------------------------------------------------------------------------------

TORCHVISION = [  # one network of every class, at the smallest size that it takes
    slow("alexnet", 64, 4, {}),
    slow("convnext_tiny", 32, 4, {}),
    slow("densenet121", 32, 4, {}),
    ("efficientnet_b0", 32, 4, {}),
    ("googlenet", 32, 4, {"aux_logits": False, "init_weights": True}),
    slow("inception_v3", 75, 4, {"aux_logits": False, "init_weights": False}),
    slow("maxvit_t", 224, 4, {}),
    ("mnasnet0_5", 32, 4, {}),
    ("mobilenet_v2", 32, 4, {}),
    ("mobilenet_v3_small", 32, 4, {}),
    ("regnet_x_400mf", 32, 4, {}),
    ("resnet18", 32, 4, {}),
    ("shufflenet_v2_x0_5", 32, 4, {}),
    slow("swin_t", 32, 4, {}),
    slow("vgg11", 32, 4, {"init_weights": False}),
    slow("vit_b_32", 64, 3, {"image_size": 64}),
]


@pytest.mark.medium
@pytest.mark.parametrize(("name", "size", "rank", "options"), TORCHVISION)
def test_interface_of_torchvision(name: str, size: int, rank: int, options: dict[str, Any]) -> None:
    import torchvision

    torch.manual_seed(0)
    network = create_student(f"torchvision:{name}", 7, **options).eval()
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, num_classes=7, **options).eval()
    assert list(network.state_dict()) == list(plain.state_dict())
    batch = images(2, size)
    with torch.no_grad():
        assert torch.equal(network(batch), plain(batch))
    assert_interface(network, batch, num_classes=7, rank=rank)


def test_torchvision_student_trains_copies_and_reloads() -> None:
    network = create_student("torchvision:mobilenet_v3_small", 7)
    F.cross_entropy(network.train()(images(2, 32)), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in network.parameters())
    other = create_student("torchvision:MobileNet_V3_Small", 7)
    other.load_state_dict(network.state_dict())
    batch = images(2, 32)
    with torch.no_grad():
        logits = network.eval()(batch)
        assert torch.equal(other.eval()(batch), logits)
        assert torch.equal(copy.deepcopy(network)(batch), logits)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", slow("googlenet"), "mobilenet_v3_small"])
def test_torchvision_pretrained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the download: a thousand classes, their replacement, GoogLeNet's aux heads and input range."""
    import torchvision
    from torchvision.models import _api

    options = {"init_weights": False} if name == "googlenet" else {}
    published = torchvision.models.get_model(name, **options)
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *args, **kwargs: published.state_dict())
    kept = create_student(f"torchvision:{name}", 1000, pretrained=True).eval()
    expected = torchvision.models.get_model(name, weights="DEFAULT").eval()
    batch = images(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(kept(batch), expected(batch), rtol=1e-4, atol=1e-5)
    assert not [key for key in kept.state_dict() if "aux" in key]
    tuned = create_student(f"torchvision:{name}", 7, weights="IMAGENET1K_V1").eval()
    assert_interface(tuned, batch, num_classes=7)
    assert torch.equal(next(iter(tuned.parameters())), next(iter(published.parameters())))


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet8x5", {}, "did you mean 'resnet8x4'"),
        ("MobilNetV2", {}, "did you mean 'MobileNetV2'"),
        ("", {}, "no such student"),
        ("tim:resnet18", {}, "did you mean 'timm'"),
        ("timm:resnet10tt", {}, "did you mean 'resnet10t'"),
        ("timm:resnet10t", {"no_such_option": 1}, "no_such_option"),
        ("torchvision:resnet181", {}, "did you mean 'resnet18'"),
        ("torchvision:resnet18", {"no_such_option": 1}, "no_such_option"),
        ("torchvision:squeezenet1_0", {}, "linear last layer"),
        ("torchvision:deeplabv3_resnet50", {}, "no such classifier"),
        ("resnet8", {"pretrained": True}, "load_state_dict"),
        ("resnet8", {"img_size": 32}, "img_size"),
    ],
)
def test_bad_names_and_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match="(?i)" + message):
        create_student(name, 10, **options)


def test_a_folder_is_no_student_but_may_have_its_weights(tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"")
    for place in (tmp_path, tmp_path / "last.safetensors"):
        with pytest.raises(RecipeError, match="the name of an architecture, and this is a file or folder") as caught:
            create_student(str(place), 10)
        assert str(caught.value).endswith(f"--student ARCHITECTURE --student-weights {place}.")


@pytest.mark.parametrize("name", ["resnet8", "timm:resnet10t", "torchvision:resnet18"])
def test_a_student_needs_at_least_one_class(name: str) -> None:
    with pytest.raises(RecipeError, match="num_classes"):
        create_student(name, 0)


def test_a_timm_encoder_is_refused() -> None:
    with torch.device("meta"), pytest.raises(RecipeError, match="no classifier"):
        create_student("timm:mobilenetv5_300m_enc", 10)


def test_weights_that_cannot_be_downloaded_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import _api

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(_api, "load_state_dict_from_url", unreachable)
    with pytest.raises(WeightsError, match="no route to host"):
        create_student("torchvision:resnet18", 10, pretrained=True)
    overlay = {"file": str(tmp_path / "absent.pt")}
    with pytest.raises(WeightsError, match=r"timm:resnet10t.*FileNotFoundError"):
        create_student("timm:resnet10t", 10, pretrained=True, pretrained_cfg_overlay=overlay)
