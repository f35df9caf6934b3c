"""Which weights a teacher gets: averages, folders of a hub, networks of one's own; and what a build says about it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache_tools.errors import RecipeError, WeightsError
from cache_tools.format.recipe import Preprocessing
from cache_tools.images import open_images
from cache_tools.reader import TeacherCache
from cache_tools.system import named
from pipeline.build.cache import build_cache
from pipeline.networks.stored import load_stored_ensemble
from pipeline.networks.teachers import Teacher, load_teacher
from pipeline.networks.weights import weights_digest
from pipeline.recipe import TeacherSpec
from tests.support import tiny_build
from train.checkpoints import StudentCard, save_student
from train.students import create_student

CPU = torch.device("cpu")
CLASSES = ("blue", "green", "red")
_SIZE = {"input_size": [3, 160, 160], "fixed_input_size": True}
NORMALISATION = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def load(**spec: Any) -> Teacher:
    return load_teacher(TeacherSpec(**spec), CLASSES, CPU, (16, 16), NORMALISATION)


def network(name: str = "resnet8", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return create_student(name, len(CLASSES)).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("root"), train=12)


class TestAverages:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        states = {"state_dict": network(seed=1).state_dict(), "state_dict_ema": network(seed=2).state_dict()}
        torch.save(states, tmp_path / "both.pth")
        return tmp_path / "both.pth"

    def build(self, root: Path, checkpoint: Path, **teacher: Any) -> tuple[TeacherCache, list[str]]:
        said: list[str] = []
        spec = {"name": "resnet8", "weights": str(checkpoint), **teacher}
        recipe = tiny_build.recipe(root, teacher=spec, num_views=1, out=checkpoint.parent / "cache.zarr")
        build_cache(recipe, said.append)
        return TeacherCache.open(checkpoint.parent / "cache.zarr"), said

    def test_a_build_takes_them_and_says_so(self, root: Path, checkpoint: Path) -> None:
        cache, said = self.build(root, checkpoint)
        words = (
            "resnet8 takes the averaged weights (EMA) at 'state_dict_ema'; "
            "teacher.weights_key=state_dict takes the raw ones"
        )
        assert said[0] == f"note: {words}"
        assert cache.manifest.provenance["notes"] == [words]
        assert cache.recipe.teacher.weights_digest == weights_digest(network(seed=2))

    def test_a_key_takes_the_raw_ones(self, root: Path, checkpoint: Path) -> None:
        cache, said = self.build(root, checkpoint, weights_key="state_dict")
        assert not [line for line in said if line.startswith("note")]
        assert "notes" not in cache.manifest.provenance
        assert cache.recipe.teacher.weights_digest == weights_digest(network(seed=1))

    def test_a_cache_of_the_raw_weights_whose_recipe_has_no_key_is_still_recomputed(
        self, root: Path, checkpoint: Path
    ) -> None:
        """As older versions built it, which did not look for averages."""
        cache, _ = self.build(root, checkpoint, weights_key="state_dict")
        old = dict(cache.manifest.build_recipe)
        old["teacher"] = {key: value for key, value in old["teacher"].items() if key != "weights_key"}
        manifest = cache.manifest.model_copy(update={"build_recipe": old})
        ensemble = load_stored_ensemble(manifest, open_images(manifest.dataset), CPU, where="cache")
        assert ensemble.teachers[0].identity.weights_digest == weights_digest(network(seed=1))

    def test_a_key_is_not_for_published_weights(self) -> None:
        with pytest.raises(WeightsError, match="weights_key is a place in a checkpoint file"):
            load(name="timm:test_resnet", weights="r160_in1k", weights_key="ema")

    def test_recipes_without_a_key_have_the_json_of_before(self) -> None:
        assert "weights_key" not in TeacherSpec(name="resnet8", weights="a.pth").model_dump(mode="json")


class TestFolders:
    def write(self, folder: Path, config: dict[str, Any], name: str = "timm:test_resnet") -> Any:
        model = network(name)
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return model

    @pytest.mark.parametrize("named", ["local-dir:{}", "{}"])
    def test_a_folder_of_timm(self, tmp_path: Path, named: str) -> None:
        config = {
            "architecture": "test_resnet",
            "num_classes": 3,
            "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "input_size": [3, 160, 160]},
        }
        model = self.write(tmp_path, config)
        teacher = load(name=named.format(tmp_path))
        assert teacher.identity.weights_digest == weights_digest(model)
        assert teacher.identity.architecture == "timm:test_resnet"
        assert teacher.identity.preprocessing.mean == (0.1, 0.2, 0.3)
        assert teacher.identity.preprocessing.size == (160, 160)

    def test_arguments_of_the_model(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = create_student("timm:test_vit", 3, img_size=32)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        config = {
            "architecture": "test_vit",
            "model_args": {"img_size": 32},
            "pretrained_cfg": {"input_size": [3, 32, 32]},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        teacher = load(name=f"local-dir:{tmp_path}")
        assert teacher.identity.preprocessing.size == (32, 32)
        assert teacher.identity.weights_digest == weights_digest(model)

    def test_a_folder_of_export_student_is_the_same_teacher_as_the_run(self, tmp_path: Path) -> None:
        tiny_build.write_teacher(tmp_path / "last.safetensors")
        export = tmp_path / "export"
        export.mkdir()
        (export / "model.safetensors").write_bytes((tmp_path / "last.safetensors").read_bytes())
        (export / "config.json").write_text(json.dumps({"library": "teacher-cache", "architecture": "resnet8"}))
        assert load(name=f"local-dir:{export}").identity == load(name=str(tmp_path)).identity

    def test_the_pooling_that_the_config_names(self, tmp_path: Path) -> None:
        """A ViT that was trained with average pooling has other layers than timm's default of that name."""
        model = create_student("timm:test_vit", 3, global_pool="avg")
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        config = {"architecture": "test_vit", "model_args": {"global_pool": "avg"}, "pretrained_cfg": _SIZE}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load(name=f"local-dir:{tmp_path}").identity.weights_digest == weights_digest(model)

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"architectures": ["ResNetForImageClassification"]}, "found ResNetForImageClassification.*timm's layout"),
            ({"model_type": "vit"}, "a model of the transformers library.*found vit"),
            ({"hidden_size": 3}, "names no architecture"),
            ({"architecture": "test_vit"}, "weights do not fit the architecture"),
            ({"architecture": "test_rsnet"}, "did you mean 'test_resnet'"),
        ],
    )
    def test_other_folders(self, tmp_path: Path, config: dict[str, Any], words: str) -> None:
        self.write(tmp_path, config)
        with pytest.raises((WeightsError, RecipeError), match=f"(?i){words}") as caught:
            load(name=f"local-dir:{tmp_path}")
        assert "\n" not in str(caught.value)

    def test_no_folder_and_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"no model in this folder .*found no such folder"):
            load(name=f"local-dir:{tmp_path / 'absent'}")
        (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
        with pytest.raises(WeightsError, match=r"no weights in this folder.*model\.safetensors or pytorch_model\.bin"):
            load(name=f"local-dir:{tmp_path}")
        with pytest.raises(WeightsError, match="already contains its weights"):
            load(name=f"local-dir:{tmp_path}", weights="pretrained")


OWN = """
import torch
from torch import nn

def small(num_classes):
    trunk = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*trunk, nn.Linear(8, num_classes))

def loaded(num_classes):
    network = small(num_classes)
    network.load_state_dict(torch.load("small.pth"))
    return network

def described(num_classes):
    network = loaded(num_classes)
    config = {"input_size": (3, 20, 20), "interpolation": "bilinear", "mean": (0.1,) * 3, "std": (0.2,) * 3}
    network.pretrained_cfg = config
    return network
"""


class TestOwn:
    @pytest.fixture
    def small(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """The network with the weights in `small.pth`, in the current folder."""
        (tmp_path / "teachers_of_mine.py").write_text(OWN)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(named, "_in_process", set())
        monkeypatch.setattr(sys, "path", list(sys.path))
        sys.modules.pop("teachers_of_mine", None)
        model = network("teachers_of_mine:small")
        torch.save(model.state_dict(), "small.pth")
        return model

    def test_with_a_checkpoint(self, small: Any) -> None:
        torch.save({"model": {f"module.{key}": value for key, value in small.state_dict().items()}}, "wrapped.pth")
        teacher = load(name="teachers_of_mine:small", weights="wrapped.pth")
        assert teacher.identity.architecture == "teachers_of_mine:small"
        assert teacher.identity.linear_head
        assert teacher.identity.feature_dim == 8
        assert teacher.identity.weights_digest == weights_digest(small)
        assert teacher.identity.preprocessing == Preprocessing(mean=NORMALISATION[0], std=NORMALISATION[1])
        pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATION)
        with torch.no_grad():
            expected = small((pixels / 255.0 - mean) / std)
        torch.testing.assert_close(teacher(pixels).logits, expected, rtol=1e-5, atol=1e-5)

    def test_a_function_that_loads_the_weights_itself(self, small: Any) -> None:
        teacher = load(name="teachers_of_mine:loaded")
        assert teacher.identity.weights_digest == weights_digest(small)
        described = load(name="teachers_of_mine:described").identity
        assert described.preprocessing == Preprocessing(
            size=(20, 20), interpolation="bilinear", mean=(0.1, 0.1, 0.1), std=(0.2, 0.2, 0.2)
        )
        assert described.weights_digest == weights_digest(small)

    def test_random_weights_are_refused(self, small: Any) -> None:
        before = torch.get_rng_state()
        with pytest.raises(WeightsError, match="its function returns random ones"):
            load(name="teachers_of_mine:small")
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_checkpoint_that_does_not_fit(self, small: Any) -> None:
        torch.save({**small.state_dict(), "4.weight": torch.zeros(5, 8), "4.bias": torch.zeros(5)}, "five.pth")
        with pytest.raises(WeightsError, match=r"another class count.*expected 3 classes; found 5"):
            load(name="teachers_of_mine:small", weights="five.pth")

    def test_a_build_and_its_replay(self, small: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = {"name": "teachers_of_mine:small", "weights": "small.pth"}
        build_cache(tiny_build.recipe(root, teacher=spec, num_views=1, out=Path("cache.zarr").absolute()))
        manifest = TeacherCache.open("cache.zarr").manifest
        assert manifest.provenance["inputs"] is None, "the module's code is not known to be the same next time"
        images = open_images(manifest.dataset)
        assert load_stored_ensemble(manifest, images, CPU, where="cache").teachers[0].identity.feature_dim == 8
        monkeypatch.setattr(named, "_in_process", set())
        monkeypatch.setenv("XDG_STATE_HOME", "another")
        with pytest.raises(RecipeError, match="you have not named it before"):
            load_stored_ensemble(manifest, images, CPU, where="cache")

    def test_a_run_of_ones_own_student(self, small: Any, tmp_path: Path) -> None:
        card = StudentCard(
            architecture="teachers_of_mine:small",
            num_classes=3,
            class_names=CLASSES,
            image_size=(16, 16),
            mean=(0.1, 0.2, 0.3),
            std=(0.5, 0.5, 0.5),
            dataset="folder",
        )
        (tmp_path / "run").mkdir()
        save_student(tmp_path / "run" / "last.safetensors", small, card)
        assert load(name=str(tmp_path / "run")).identity.weights_digest == weights_digest(small)
        assert set(load_file(tmp_path / "run" / "last.safetensors")) == {"0.weight", "0.bias", "4.weight", "4.bias"}
