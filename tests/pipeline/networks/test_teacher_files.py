"""Published teacher checkpoints as file, folder and archive, and the errors for checkpoints that do not fit."""

from __future__ import annotations

import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_tools.errors import WeightsError
from pipeline.networks.teachers import Teacher, load_teacher
from pipeline.recipe import TeacherSpec
from tests.support import mdistiller_files
from train.weights.files import open_weights
from train.weights.reading import read_weights

CLASSES = tuple(f"class {number}" for number in range(100))
NORMALISATION = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def load(name: str, weights: Path) -> Teacher:
    spec = TeacherSpec(name=name, weights=str(weights))
    return load_teacher(spec, CLASSES, torch.device("cpu"), (32, 32), NORMALISATION)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mdistiller_files.write_tree(tmp_path_factory.mktemp("ckpts"), "resnet8", "resnet20", "vgg8")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_checkpoint_of_the_training_script_is_read(tmp_path: Path, zipped: bool) -> None:
    """Options and numpy numbers beside the weights are no obstacle."""
    tree = mdistiller_files.write_tree(tmp_path, "resnet8", zipped=zipped)
    file = read_weights(tree / "resnet8_vanilla/ckpt_epoch_240.pth")
    wanted = mdistiller_files.checkpoint("resnet8")["model"]
    assert file.checkpoint["model"].keys() == wanted.keys()
    assert all(torch.equal(file.checkpoint["model"][key], value) for key, value in wanted.items())


@pytest.mark.parametrize("archive", ["cifar_teachers.tar", "cifar_teachers.tar.gz", "cifar_teachers.tgz"])
def test_file_folder_and_archive_give_the_same_teacher(tree: Path, archive: str) -> None:
    file = tree / "resnet8_vanilla/ckpt_epoch_240.pth"
    packed = mdistiller_files.write_archive(tree, archive)
    teachers = [load("resnet8", path) for path in (file, file.parent, tree, packed)]
    assert len({teacher.identity.model_dump_json() for teacher in teachers}) == 1
    assert teachers[0].identity.feature_dim == 64
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert all(torch.equal(teacher(pixels).logits, teachers[0](pixels).logits) for teacher in teachers)
    assert load("resnet20", packed).identity.weights_digest != teachers[0].identity.weights_digest


def test_the_last_epoch_of_the_architecture_is_read(tree: Path, tmp_path: Path) -> None:
    early, late = mdistiller_files.checkpoint("resnet8", seed=1), mdistiller_files.checkpoint("resnet8", seed=2)
    folder = tmp_path / "resnet8_vanilla"
    folder.mkdir()
    torch.save(early, folder / "ckpt_epoch_40.pth")
    torch.save(late, folder / "ckpt_epoch_240.pth")
    found = open_weights(tmp_path, "ResNet8").checkpoint["model"]
    assert torch.equal(found["conv1.weight"], late["model"]["conv1.weight"])


def test_data_parallel_prefix(tmp_path: Path) -> None:
    torch.save(mdistiller_files.checkpoint("resnet8", prefix="module."), tmp_path / "parallel.pth")
    torch.save(mdistiller_files.checkpoint("resnet8"), tmp_path / "plain.pth")
    digests = {load("resnet8", tmp_path / f"{name}.pth").identity.weights_digest for name in ("parallel", "plain")}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("resnet8x4", r"expected 'conv1\.weight' of shape \[32, 3, 3, 3\]; found shape \[16, 3, 3, 3\]"),
        ("wrn_16_1", r"'block1\.layer\.0\.bn1\.weight' of shape \[16\]; found no such tensor, but 'layer1\.0\."),
        ("vgg13", r"expected 'block0\.0\.weight' of shape \[64, 3, 3, 3\]; found no such tensor, but 'conv1\.weight'"),
    ],
)
def test_another_architecture(tree: Path, architecture: str, words: str) -> None:
    with pytest.raises(WeightsError, match=words) as caught:
        load(architecture, tree / "resnet8_vanilla/ckpt_epoch_240.pth")
    assert f"{architecture}, {tree}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_architecture_that_the_tree_lacks(tree: Path, tmp_path: Path) -> None:
    packed = mdistiller_files.write_archive(tree)
    for place in (tree, packed):
        with pytest.raises(WeightsError, match=r"no checkpoint of vgg13.*found checkpoints of resnet20, resnet8, vgg8"):
            load("vgg13", place)
    with pytest.raises(WeightsError, match=r"no checkpoint of vgg13.*found none"):
        load("vgg13", tmp_path)


def test_damaged_archives(tree: Path, tmp_path: Path) -> None:
    whole = mdistiller_files.write_archive(tree).read_bytes()
    cut = tmp_path / "cut.tar"
    for length in (0, 100, 2000, len(whole) // 2):
        cut.write_bytes(whole[:length])
        with pytest.raises(
            WeightsError, match=r"cannot read the archive|cannot read the weights|no checkpoint"
        ) as caught:
            load("vgg8", cut)
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="no such weights"):
        load("vgg8", tmp_path / "missing.tar")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, packed: bool, zipped: bool) -> None:
    mark = tmp_path / "mark"
    checkpoint = mdistiller_files.checkpoint("resnet8") | {"opt": Bomb(mark)}
    file = tmp_path / "resnet8_vanilla" / "ckpt_epoch_240.pth"
    file.parent.mkdir()
    torch.save(checkpoint, file, _use_new_zipfile_serialization=zipped)
    if packed:
        with tarfile.open(tmp_path / "t.tar", "w") as archive:
            archive.add(file, "resnet8_vanilla/ckpt_epoch_240.pth")
    with pytest.raises(WeightsError, match="cannot read the weights"):
        load("resnet8", tmp_path / "t.tar" if packed else file)
    assert not mark.exists()
    pickle.loads(pickle.dumps(checkpoint["opt"]))
    assert mark.exists(), "the bomb is a real one"
