"""Students start from published weights, checkpoints and runs: bit for bit, with a new classifier where it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cache_tools.config import dump_yaml
from cache_tools.errors import RecipeError, WeightsError
from tests.support import tiny_build, tiny_run
from tests.support.hub_copies import add_to_hub_cache, use_hub_cache
from train.checkpoints import load_student
from train.initial import check_names, first_student
from train.recipe import TrainRecipe, recipe_digest
from train.recipe.loading import load_train_recipe
from train.run import train_student
from train.students import create_student


def recipe(student: str = "resnet8", **changes: Any) -> TrainRecipe:
    data: dict[str, Any] = {"name": "t", "dataset": {"name": "digits"}, "loss": {"kind": "ce"}, "student": student}
    return TrainRecipe.model_validate(data | changes)


def state_of(name: str, num_classes: int, seed: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state: dict[str, torch.Tensor] = create_student(name, num_classes).state_dict()
    return state


def assert_equal(student: Any, wanted: dict[str, torch.Tensor], *, but: tuple[str, ...] = ()) -> None:
    state = student.state_dict()
    different = {key for key, value in wanted.items() if not torch.equal(state[key], value)}
    assert different == set(but)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights that a hub, which cannot be reached, has published before as timm/test_resnet.r160_in1k."""
    state = state_of("timm:test_resnet", 1000)
    save_file(state, tmp_path / "model.safetensors")
    add_to_hub_cache(tmp_path / "hub", "timm/test_resnet.r160_in1k", tmp_path / "model.safetensors")
    use_hub_cache(monkeypatch, tmp_path / "hub")
    return state


class TestPublished:
    def test_a_tag_in_the_name_starts_from_its_weights(self, published: dict[str, torch.Tensor]) -> None:
        student, notes = first_student(recipe("timm:test_resnet.r160_in1k"), 3)
        assert_equal(student, {key: value for key, value in published.items() if not key.startswith("fc.")})
        assert student.get_classifier().out_features == 3
        assert notes == (
            "starts from the weights r160_in1k",
            "starts with a new classifier of 3 classes: the file's is for 1000 classes",
        )

    @pytest.mark.parametrize("tag", ["r160_in1k", "pretrained"])
    def test_a_tag_as_weights_does_the_same(self, published: dict[str, torch.Tensor], tag: str) -> None:
        student, notes = first_student(recipe("timm:test_resnet", student_weights=tag), 1000)
        assert_equal(student, published)
        assert notes == ("starts from the weights r160_in1k",)

    def test_random_numbers_afterwards_do_not_depend_on_the_weights(self, published: dict[str, torch.Tensor]) -> None:
        draws = []
        for name in ("timm:test_resnet", "timm:test_resnet.r160_in1k"):
            torch.manual_seed(0)
            first_student(recipe(name), 3)
            draws.append(torch.rand(4))
        assert torch.equal(*draws)

    def test_without_copy_and_network_it_is_one_clear_error(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        import huggingface_hub.constants as hub

        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(
            WeightsError, match=r"cannot get the pretrained weights \(timm:test_resnet\.r160_in1k"
        ) as info:
            first_student(recipe("timm:test_resnet.r160_in1k"), 3)
        assert "\n" not in str(info.value)
        assert "Run once with network access, or give a checkpoint file" in str(info.value)

    def test_a_folder_that_timm_resolves(self, tmp_path: Path) -> None:
        wanted = state_of("timm:test_resnet", 4)
        save_file(wanted, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"architecture": "test_resnet", "num_classes": 4, "pretrained_cfg": {}}')
        student, notes = first_student(recipe(f"timm:local-dir:{tmp_path}"), 4)
        assert_equal(student, wanted)
        assert notes == ("starts from the weights pretrained",)

    def test_names_are_checked_without_a_download(self) -> None:
        check_names(recipe("timm:resnet18.a1_in1k"))
        check_names(recipe("torchvision:resnet18", student_weights="IMAGENET1K_V1"))
        with pytest.raises(WeightsError, match=r"one of .*a1_in1k.*found 'a9'"):
            check_names(recipe("timm:resnet18", student_weights="a9"))
        with pytest.raises(WeightsError, match=r"no such weights .*absent\.pth"):
            check_names(recipe(student_weights="absent.pth"))


class TestFiles:
    def test_a_checkpoint_of_the_same_classes(self, tmp_path: Path) -> None:
        wanted = state_of("resnet8", 5)
        torch.save({"state_dict": {f"module.{key}": value for key, value in wanted.items()}}, tmp_path / "a.pth.tar")
        student, notes = first_student(recipe(student_weights=str(tmp_path / "a.pth.tar")), 5)
        assert_equal(student, wanted)
        assert notes == (f"starts from the weights {tmp_path / 'a.pth.tar'}",)

    @pytest.mark.parametrize(("classes", "words"), [(5, "the file's is for 5 classes"), (None, "the file has none")])
    def test_the_classifier_is_new_where_it_must_be(self, tmp_path: Path, classes: int | None, words: str) -> None:
        given = state_of("resnet8", classes or 5)
        if classes is None:
            given = {key: value for key, value in given.items() if not key.startswith("fc.")}
        save_file(given, tmp_path / "a.safetensors")
        torch.manual_seed(3)
        random = create_student("resnet8", 8).state_dict()
        torch.manual_seed(3)
        student, notes = first_student(recipe(student_weights=str(tmp_path / "a.safetensors")), 8)
        trunk = {key: value for key, value in given.items() if not key.startswith("fc.")}
        assert_equal(student, trunk | {key: random[key] for key in ("fc.weight", "fc.bias")})
        assert notes[-1] == f"starts with a new classifier of 8 classes: {words}"

    def test_everything_else_must_fit(self, tmp_path: Path) -> None:
        save_file(state_of("resnet14", 5), tmp_path / "a.safetensors")
        with pytest.raises(WeightsError, match=r"tensors that the architecture lacks.*layer1\.1"):
            first_student(recipe(student_weights=str(tmp_path / "a.safetensors")), 5)
        torch.save({"teacher": state_of("resnet8", 5), "student": state_of("resnet8", 5, 8)}, tmp_path / "two.pth")
        with pytest.raises(WeightsError, match="Choose one with student_weights_key"):
            first_student(recipe(student_weights=str(tmp_path / "two.pth")), 9)
        changes = {"student_weights": str(tmp_path / "two.pth"), "student_weights_key": "student"}
        assert_equal(first_student(recipe(**changes), 5)[0], state_of("resnet8", 5, 8))

    def test_a_run_folder(self, tmp_path: Path) -> None:
        tiny_build.write_teacher(tmp_path / "last.safetensors", ("a", "b"))
        student, _ = first_student(recipe(student_weights=str(tmp_path)), 2)
        assert_equal(student, load_student(tmp_path)[0].state_dict())


class TestRecipe:
    def test_runs_without_weights_keep_their_digest(self) -> None:
        values = recipe("timm:resnet18").values()
        assert not [key for key in values if key.startswith("student_")]
        assert recipe_digest(recipe().values()) == recipe_digest(recipe(student_weights=None).values())

    def test_the_content_counts_and_not_the_name(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        for name, content in {"a.pth": b"1", "b.pth": b"1", "c.pth": b"2", "run/last.safetensors": b"1"}.items():
            (tmp_path / name).write_bytes(content)
        digests = [recipe(student_weights=str(tmp_path / name)).values()["student_weights"] for name in
                   ("a.pth", "b.pth", "c.pth", "run")]  # fmt: skip
        assert digests[0] == digests[1] == digests[3] != digests[2]
        assert recipe("timm:resnet18.a1_in1k").values()["student_weights"] == "a1_in1k"

    def test_student_weights_has_a_second_spelling(self, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_text(
            "name: t\ndataset: {name: digits}\nloss: {kind: ce}\nstudent: {name: timm:resnet18, weights: a1_in1k}\n"
        )
        spelled = load_train_recipe(str(tmp_path / "r.yaml"))
        assert (spelled.student, spelled.student_weights) == ("timm:resnet18", "a1_in1k")
        set_by_key = load_train_recipe(str(tmp_path / "r.yaml"), ["student=resnet8", "student.weights=a.pth"])
        assert (set_by_key.student, set_by_key.student_weights) == ("resnet8", "a.pth")
        assert "student_weights: a.pth" in dump_yaml(set_by_key)
        with pytest.raises(RecipeError, match=r"student\.wieghts"):
            load_train_recipe(str(tmp_path / "r.yaml"), ["student={name: resnet8, wieghts: a.pth}"])
        with pytest.raises(RecipeError, match="Give student_weights too"):
            load_train_recipe(str(tmp_path / "r.yaml"), ["student=resnet8", "student_weights_key=ema"])


@pytest.mark.medium
def test_a_run_starts_from_its_weights_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run.write_pictures(tmp_path / "pictures", train=16, test=3)
    wanted = state_of("resnet8", 5)
    save_file(wanted, tmp_path / "a.safetensors")
    base = tiny_run.recipe("", tmp_path / "run").model_dump()
    changes: dict[str, Any] = {
        "cache": None,
        "dataset": tiny_run.dataset(tmp_path / "pictures").model_dump(),
        "loss": {"kind": "ce"},
        "student_weights": str(tmp_path / "a.safetensors"),
        "optimiser": {"learning_rate": 1e-12, "momentum": 0.0, "weight_decay": 0.0},
        "epochs": 1,
    }
    result = train_student(TrainRecipe.model_validate(base | changes))
    student, _ = load_student(result.folder)
    for key, value in wanted.items():
        if key.endswith("weight") and not key.startswith("fc."):
            torch.testing.assert_close(student.state_dict()[key], value, rtol=0, atol=1e-6)
    said = capsys.readouterr().err
    assert f"note: resnet8 starts from the weights {tmp_path / 'a.safetensors'}" in said
    assert "note: resnet8 starts with a new classifier of 3 classes: the file's is for 5 classes" in said
