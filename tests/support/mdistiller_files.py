"""Checkpoints in the formats of mdistiller and RepDistiller, with random weights."""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.students import create_student


def checkpoint(architecture: str, num_classes: int = 100, *, prefix: str = "", seed: int = 0) -> dict[str, Any]:
    """The dictionary that their training scripts save; the optimiser's learning rate in it is a numpy number."""
    torch.manual_seed(seed)
    network = create_student(architecture, num_classes)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    with torch.no_grad():
        parameter = next(network.parameters())
        optimiser.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    for group in optimiser.param_groups:
        group["lr"] = 0.05 * (0.1 ** np.sum(np.asarray([150, 180, 210]) < 240))
    return {
        "epoch": 240,
        "model": {f"{prefix}{key}": value for key, value in network.state_dict().items()},
        "accuracy": torch.tensor([79.42]),
        "optimizer": optimiser.state_dict(),
        "opt": argparse.Namespace(model=architecture, lr_decay_epochs=[150, 180, 210]),
    }


def write_tree(root: Path, *architectures: str, zipped: bool = False) -> Path:
    """Write `cifar_teachers/ARCHITECTURE_vanilla/ckpt_epoch_240.pth`; torch before 1.6 did not zip files."""
    tree = root / "cifar_teachers"
    for architecture in architectures:
        file = tree / f"{architecture}_vanilla" / "ckpt_epoch_240.pth"
        file.parent.mkdir(parents=True)
        torch.save(checkpoint(architecture), file, _use_new_zipfile_serialization=zipped)
    return tree


def write_archive(tree: Path, name: str = "cifar_teachers.tar") -> Path:
    """Write an archive like the published one, with the hidden files that macOS adds."""
    (tree / "resource").write_bytes(b"\0")
    with tarfile.open(tree.parent / name, "w:gz" if name.endswith("gz") else "w") as archive:
        archive.add(tree, tree.name)
        for folder in tree.glob("*_vanilla"):
            archive.add(tree / "resource", f"{tree.name}/{folder.name}/._ckpt_epoch_240.pth")
    return tree.parent / name
