"""Conventional teachers: frozen classifiers, from a named architecture and weights or from a trained student.

Weights may be a checkpoint, a run of train-student, or the CIFAR-100 teachers that mdistiller publishes as
`cifar_teachers.tar`, with `ARCHITECTURE_vanilla/ckpt_epoch_240.pth` for each. The archive, the folder that it unpacks
to, and the folder of one architecture are all accepted.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from cache_tools import fusion
from cache_tools.errors import WeightsError
from cache_tools.format.recipe import Precision, Preprocessing, TeacherIdentity
from cache_tools.preprocess import prepare
from pipeline.networks.pretrained import library_preprocessing, load_pretrained
from pipeline.networks.references import is_file_reference, resolve_path
from pipeline.networks.weights import (
    WeightsFile,
    as_network_input,
    check_class_names,
    first_line,
    freeze,
    load_into,
    mixed_precision,
    read_weights,
    weights_digest,
)
from train.checkpoints import LAST, StudentCard, student_file
from train.students import create_student, student_names

if TYPE_CHECKING:
    from pipeline.recipe import TeacherSpec


LIBRARIES = ("timm:", "torchvision:")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_CHECKPOINT_IN_TREE = re.compile(r"(?:^|/)(?P<architecture>[^/]+)_vanilla/ckpt_epoch_(?P<epoch>\d+)\.pth$")
Size = tuple[int, int]
Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


class TeacherOutput(NamedTuple):
    """A teacher's float32 outputs for a batch."""

    logits: torch.Tensor  # [B, C]
    features: torch.Tensor  # [B, D], the classifier's input


class Teacher(nn.Module):
    """A frozen classifier.

    Attributes:
        identity: describes it in the manifest.
        precision: of the trunk's forward pass. Outputs are always float32. So is a linear head: logits computed from
            stored features are the same numbers.
    """

    def __init__(self, network: nn.Module, identity: TeacherIdentity, precision: Precision = "float32") -> None:
        super().__init__()
        self.network: Any = network
        self.identity, self.precision = identity, precision
        self._head = _linear_head(network) if identity.linear_head else None

    @property
    def head(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(weight [C, D], bias [C]) if logits are features · weightᵀ + bias; None for any other head."""
        return self._head

    @torch.no_grad()
    def forward(self, pixels_NCHW_u8: torch.Tensor) -> TeacherOutput:
        """uint8 [B, 3, H, W] view canvases on this model's device → logits [B, C] and features [B, D]."""
        images = as_network_input(prepare(pixels_NCHW_u8, self.identity.preprocessing))
        with mixed_precision(images.device, self.precision):
            feature_map = self.network.forward_features(images)
            features = self.network.forward_head(feature_map, pre_logits=True)
            if self._head is None:
                return TeacherOutput(self.network.forward_head(feature_map).float(), features.float())
        features = features.float()
        return TeacherOutput(fusion.linear_logits(features, *self._head), features)

    def train(self, mode: bool = True) -> Teacher:
        """Do nothing: a frozen network stays in eval mode."""
        return super().train(False)


def load_teacher(
    spec: TeacherSpec,
    class_names: Sequence[str],
    device: torch.device,
    canvas: Size,
    normalisation: Normalisation,
    *,
    precision: Precision = "float32",
) -> Teacher:
    """Load a teacher with all its weights, and check that its classes are the dataset's.

    Args:
        spec: name, weights, and overrides of its preprocessing.
        class_names: of the dataset, in label order.
        canvas: (height, width) of the views.
        normalisation: the dataset's (mean, std), for zoo networks whose weights do not bring their own.

    Raises:
        RecipeError: unknown architecture.
        WeightsError: weights are not named, missing or unreadable, do not fit, or were trained on another class count,
            other class names or another class order than the dataset's.
    """
    names = tuple(class_names)
    if _is_stored_student(spec.name):
        network, architecture, preprocessing = _stored_student(spec, names, canvas)
    elif spec.weights is None:
        raise WeightsError(
            "the teacher has no weights",
            where=spec.name,
            expected="a .safetensors or .pth file"
            + (", pretrained, or a tag of the library" if spec.name.startswith(LIBRARIES) else ""),
            next_step="set teacher.weights, or name a run folder that train-student wrote",
        )
    elif is_file_reference(spec.weights) or resolve_path(spec.weights).is_dir():
        network, preprocessing = _named_with_file(spec, names, canvas, normalisation)
        architecture = spec.name
    else:
        network, preprocessing = load_pretrained(spec.name, spec.weights, len(names))
        architecture = spec.name
    digest = weights_digest(network)
    preprocessing = _overridden(preprocessing, spec)
    freeze(network, device)
    width, linear = _probe(network, architecture, len(names), preprocessing, canvas, device)
    identity = TeacherIdentity(
        architecture=architecture,
        weights_digest=digest,
        feature_dim=width,
        linear_head=linear,
        preprocessing=preprocessing,
    )
    return Teacher(network, identity, precision)


def read_teacher(path: Path, architecture: str) -> WeightsFile:
    """Read the weights of an architecture from a path.

    Args:
        path: a file that `read_weights` reads, a run folder of train-student (its last epoch is read), or an archive
            or folder of mdistiller's teachers.
        architecture: name of a network, case-insensitive.

    Raises:
        WeightsError: the path is missing or damaged, or has no weights of this architecture.
    """
    if path.is_file() and path.name.endswith(ARCHIVE_SUFFIXES):
        return _from_archive(path, architecture)
    if path.is_dir() and not (path / LAST).exists():
        names = (file.relative_to(path.parent).as_posix() for file in path.rglob("ckpt_epoch_*.pth"))
        return read_weights(path.parent / _chosen(names, architecture, path))
    return read_weights(path / LAST if path.is_dir() else path)


def _is_stored_student(name: str) -> bool:
    """Whether a name is a run folder or file. Names of libraries and of the zoo win over files of the same name."""
    if name.startswith(LIBRARIES) or name.lower() in {known.lower() for known in student_names()}:
        return False
    return is_file_reference(name) or resolve_path(name).is_dir()


def _stored_student(spec: TeacherSpec, names: tuple[str, ...], canvas: Size) -> tuple[nn.Module, str, Preprocessing]:
    if spec.weights is not None:
        raise WeightsError(
            "a teacher that train-student wrote already contains its weights",
            where=spec.name,
            expected="no teacher.weights",
            found=repr(spec.weights),
            next_step="leave teacher.weights out, or name the architecture instead of the run",
        )
    file = read_weights(student_file(resolve_path(spec.name)))
    card = StudentCard.from_metadata(file.metadata, file.path)
    network = create_student(card.architecture, len(names))
    _load_file(network, card.architecture, file, names)
    return network, card.architecture, _card_preprocessing(card, canvas)


def _named_with_file(
    spec: TeacherSpec, names: tuple[str, ...], canvas: Size, normalisation: Normalisation
) -> tuple[nn.Module, Preprocessing]:
    network = create_student(spec.name, len(names))  # fail on an unknown name before reading the file
    file = read_teacher(resolve_path(spec.weights or ""), spec.name)
    _load_file(network, spec.name, file, names)
    if "architecture" in file.metadata:
        return network, _card_preprocessing(StudentCard.from_metadata(file.metadata, file.path), canvas)
    if spec.name.startswith(LIBRARIES):
        return network, library_preprocessing(spec.name, network)
    return network, Preprocessing(mean=normalisation[0], std=normalisation[1])


def _load_file(network: nn.Module, architecture: str, file: WeightsFile, names: tuple[str, ...]) -> None:
    """Load weights, class names checked first: if classes and shapes are both wrong, that message helps more."""
    check_class_names(file.metadata, names, file.path)
    tensors: Mapping[str, torch.Tensor] = file.tensors
    if architecture.startswith("torchvision:"):  # auxiliary classifiers of GoogLeNet and Inception only serve training
        tensors = {key: value for key, value in tensors.items() if not key.lower().startswith("aux")}
    load_into(network, tensors, where=f"{architecture}, {file.path}", num_classes=len(names))


def _card_preprocessing(card: StudentCard, canvas: Size) -> Preprocessing:
    """The preprocessing that the network was trained with; the canvas is resized only if its size differs."""
    return Preprocessing(size=None if card.image_size == canvas else card.image_size, mean=card.mean, std=card.std)


def _overridden(preprocessing: Preprocessing, spec: TeacherSpec) -> Preprocessing:
    overrides = {"interpolation": spec.interpolation, "mean": spec.mean, "std": spec.std}
    changes: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
    if spec.size is not None:
        changes["size"] = (spec.size, spec.size)
    return preprocessing.model_copy(update=changes)


def _linear_head(network: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    classifier = network.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return None
    bias = classifier.bias if classifier.bias is not None else classifier.weight.new_zeros(classifier.out_features)
    return classifier.weight.detach(), bias.detach()


@torch.no_grad()
def _probe(
    network: Any, architecture: str, num_classes: int, preprocessing: Preprocessing, canvas: Size, device: torch.device
) -> tuple[int, bool]:
    """(feature width, whether logits are a linear function of the features), by running two canvases of noise."""
    noise = torch.randint(0, 256, (2, 3, *canvas), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = as_network_input(prepare(noise.to(device), preprocessing))
    try:
        logits, feature_map = network(images), network.forward_features(images)
        features = network.forward_head(feature_map, pre_logits=True)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise WeightsError(
            "the teacher does not accept the size of these views",
            where=architecture,
            expected="a size that the architecture accepts",
            found=f"{list(images.shape[2:])}: {first_line(error)}",
            next_step="set teacher.size",
        ) from error
    if logits.shape != (2, num_classes) or features.ndim != 2:
        raise WeightsError(
            "the teacher's outputs do not have the shapes of a classifier's",
            where=architecture,
            expected=f"logits [B, {num_classes}] and features [B, D]",
            found=f"{list(logits.shape)} and {list(features.shape)}",
        )
    head = _linear_head(network)
    if head is None or head[0].shape[1] != features.shape[1]:
        return features.shape[1], False
    difference = (fusion.linear_logits(features, *head) - logits.float()).abs().max()
    return features.shape[1], bool(difference <= 1e-3 * logits.float().abs().max().clamp_min(1e-3))


def _from_archive(path: Path, architecture: str) -> WeightsFile:
    """Read one file of an archive without unpacking the rest."""
    try:
        with tarfile.open(path) as archive:
            members = {member.name: member for member in archive if member.isfile()}
            name = _chosen(members, architecture, path)
            stream = archive.extractfile(members[name])
            assert stream is not None, "members are plain files"
            content = stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise WeightsError(
            "cannot read the archive", where=path, expected="a tar file", found=first_line(error)
        ) from error
    return read_weights(path / name, io.BytesIO(content))


def _chosen(names: Iterable[str], architecture: str, where: Path) -> str:
    """The checkpoint of an architecture's last epoch, among the file names of a tree."""
    found = [
        (match["architecture"], int(match["epoch"]), name)
        for name in names
        if (match := _CHECKPOINT_IN_TREE.search(name))
    ]
    fitting = [(epoch, name) for known, epoch, name in found if known.lower() == architecture.lower()]
    if not fitting:
        known = ", ".join(sorted({known for known, _, _ in found}))
        raise WeightsError(
            f"no checkpoint of {architecture}",
            where=where,
            expected=f"{architecture}_vanilla/ckpt_epoch_240.pth as in cifar_teachers.tar, or a run of train-student",
            found=f"checkpoints of {known}" if known else "none",
            next_step="name the file itself, or one of these teachers",
        )
    return max(fitting)[1]
