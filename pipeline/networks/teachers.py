"""Conventional teachers: frozen classifiers, from a named architecture and weights or from a trained student.

`train.weights` says what the weights may be: checkpoints of many kinds, runs of train-student, published archives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from cache_tools import fusion
from cache_tools.errors import WeightsError
from cache_tools.format.recipe import Precision, Preprocessing, TeacherIdentity
from cache_tools.preprocess import prepare
from cache_tools.system.devices import seeded_on_cpu
from pipeline.networks.compiled import CompiledNetwork, NetworkFunction
from pipeline.networks.pretrained import library_preprocessing, load_pretrained, timm_preprocessing
from pipeline.networks.references import FOLDER_PREFIX, LIBRARIES, is_file_reference, resolve_path
from pipeline.networks.teacher_classes import TeacherClasses, classes_of_file, match_classes
from pipeline.networks.weights import as_network_input, convert_weights, freeze, mixed_precision, noise, weights_digest
from train import own
from train.checkpoints import LAST, StudentCard, check_student_file, create_stored, student_file
from train.students import create_student, student_names
from train.weights.files import CONFIG, open_weights, read_config, read_hub_folder
from train.weights.load import Loaded, class_count_error, load_into, require_size
from train.weights.reading import WeightsFile, read_weights
from train.weights.text import first_line

if TYPE_CHECKING:
    from pipeline.recipe import TeacherSpec


Size = tuple[int, int]
Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


class TeacherOutput(NamedTuple):
    """A teacher's float32 outputs for a batch."""

    logits: torch.Tensor  # [B, C]
    features: torch.Tensor  # [B, D], the classifier's input


class Teacher(nn.Module):
    """A frozen classifier, whose logits are those of the dataset's classes.

    Attributes:
        identity: describes it in the manifest.
        precision: of the trunk's forward pass. Outputs are always float32. So is a linear head: logits computed from
            stored features are the same numbers.
        notes: what a user should know about the choice of its weights, one sentence each.
        raw_key: the `weights_key` of the raw weights, if these are their average.
        own_classes: the names of all its outputs, if they are not the dataset's classes in their order.
    """

    def __init__(
        self,
        network: nn.Module,
        identity: TeacherIdentity,
        precision: Precision = "float32",
        notes: Sequence[str] = (),
        raw_key: str | None = None,
        own_classes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.identity, self.precision = identity, precision
        self.notes, self.raw_key, self.own_classes = tuple(notes), raw_key, own_classes
        self._head = _linear_head(network) if identity.linear_head else None
        self._run: NetworkFunction = self._outputs_of
        self._outputs: torch.Tensor | None = None
        if identity.outputs is not None:
            self._outputs = torch.tensor(identity.outputs, device=next(network.parameters()).device)

    @property
    def head(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(weight [C, D], bias [C]) if logits are features · weightᵀ + bias; None for any other head.

        These are the rows of the dataset's classes.
        """
        if self._head is None or self._outputs is None:
            return self._head
        weight, bias = self._head
        return weight[self._outputs], bias[self._outputs]

    @torch.no_grad()
    def forward(self, pixels_NCHW_u8: torch.Tensor) -> TeacherOutput:
        """uint8 [B, 3, H, W] view canvases on this model's device → logits [B, C] and features [B, D]."""
        images = as_network_input(prepare(pixels_NCHW_u8, self.identity.preprocessing))
        features, *logits = self._run(images)
        if self._head is None:
            return self._output(logits[0], features)
        # Not compiled: readers compute the same product from stored features.
        return self._output(fusion.linear_logits(features, *self._head), features)

    def compile_for(self, rows: int) -> None:
        """Compile the network for batches of `rows` images, and use it for these and for shorter ones from now on."""
        self._run = CompiledNetwork(self._outputs_of, rows)

    def _outputs_of(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Features, float32, and without a linear head the network's own logits too."""
        with mixed_precision(images.device, self.precision):
            feature_map = self.network.forward_features(images)
            features = self.network.forward_head(feature_map, pre_logits=True)
            if self._head is None:
                return features.float(), self.network.forward_head(feature_map).float()
        return (features.float(),)

    def _output(self, own_logits: torch.Tensor, features: torch.Tensor) -> TeacherOutput:
        """Choose the dataset's classes. A product with fewer rows of the head could differ in the last bits."""
        return TeacherOutput(own_logits if self._outputs is None else own_logits[:, self._outputs], features)

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
    """Load a teacher with all its weights, and match its outputs with the dataset's classes (`match_classes`).

    Args:
        spec: name, weights, and overrides of its preprocessing.
        class_names: of the dataset, in label order.
        canvas: (height, width) of the views.
        normalisation: the dataset's (mean, std), for zoo networks whose weights do not bring their own.

    Raises:
        RecipeError: unknown architecture.
        WeightsError: weights are not named, missing or unreadable, do not fit, or were trained on other classes than
            the dataset's.
    """
    names = tuple(class_names)
    loaded = _load(spec, names, canvas, normalisation)
    network, architecture = loaded.network, loaded.architecture
    digest = weights_digest(network)
    preprocessing = _overridden(loaded.preprocessing, spec)
    freeze(network, device)
    width, linear = _probe(network, architecture, loaded.classes.total, preprocessing, canvas, device)
    identity = TeacherIdentity(
        architecture=architecture,
        weights_digest=digest,
        feature_dim=width,
        linear_head=linear,
        preprocessing=preprocessing,
        outputs=loaded.classes.outputs,
    )
    about_classes = [] if loaded.classes.note is None else [loaded.classes.note]
    notes = [f"{architecture} {note}" for note in (*loaded.notes, *about_classes)]
    teacher = Teacher(network, identity, precision, notes, loaded.raw_key, loaded.classes.names)
    pixels = noise(canvas, device)
    convert_weights(network, precision, lambda: teacher(pixels))
    return teacher


class _Network(NamedTuple):
    """A loaded network, its name in the manifest, how its inputs are prepared, and which outputs are used."""

    network: nn.Module
    architecture: str
    preprocessing: Preprocessing
    classes: TeacherClasses
    notes: tuple[str, ...] = ()
    raw_key: str | None = None


def _load(spec: TeacherSpec, names: tuple[str, ...], canvas: Size, normalisation: Normalisation) -> _Network:
    """Load the network of a recipe with its weights."""
    if spec.name.startswith(FOLDER_PREFIX):
        return _hub_folder(spec, names, canvas)
    if _is_stored_student(spec.name):
        folder = resolve_path(spec.name)
        if (folder / CONFIG).is_file() and not (folder / LAST).exists():
            return _hub_folder(spec, names, canvas)
        return _stored_student(spec, names, canvas)
    if spec.weights is None and own.is_own(spec.name):
        return _own_with_weights(spec, names, normalisation)
    if spec.weights is None:
        raise WeightsError(
            "the teacher has no weights",
            where=spec.name,
            expected="a .safetensors or .pth file"
            + (", pretrained, or a tag of the library" if spec.name.startswith(LIBRARIES) else ""),
            next_step="set teacher.weights, or name a run folder that train-student wrote",
        )
    if is_file_reference(spec.weights) or resolve_path(spec.weights).is_dir():
        return _named_with_file(spec, names, canvas, normalisation)
    if spec.weights_key is not None:
        raise WeightsError(
            "weights_key is a place in a checkpoint file",
            where=f"{spec.name}, {spec.weights}",
            found=f"weights_key={spec.weights_key} for published weights",
            next_step="leave teacher.weights_key out",
        )
    network, preprocessing, classes = load_pretrained(spec.name, spec.weights, names, spec.classes)
    return _Network(network, spec.name, preprocessing, classes)


def _is_stored_student(name: str) -> bool:
    """Whether a name is a run folder or file. Names of libraries and of the zoo win over files of the same name."""
    if name.startswith(LIBRARIES) or name.lower() in {known.lower() for known in student_names()}:
        return False
    return is_file_reference(name) or resolve_path(name).is_dir()


def _stored_student(spec: TeacherSpec, names: tuple[str, ...], canvas: Size) -> _Network:
    _refuse_weights(spec, "a teacher that train-student wrote")
    path = resolve_path(spec.name)
    if path.is_dir():  # a run, in which no link is followed
        check_student_file(student_file(path))
    return _from_card(read_weights(student_file(path)), spec, names, canvas)


def _from_card(file: WeightsFile, spec: TeacherSpec, names: tuple[str, ...], canvas: Size) -> _Network:
    """A student that train-student stored, as its card describes it."""
    card = StudentCard.from_metadata(file.metadata, file.path)
    own.require_consent(card.architecture, file.path)
    classes = classes_of_file(names, spec.classes, file, where=spec.name)
    network = create_stored(card, _bytes_of(file), file.path, classes.total)
    loaded = _load_file(network, card.architecture, file, classes, spec)
    return _Network(network, card.architecture, _card_preprocessing(card, canvas), classes, loaded.notes, loaded.raw)


def _bytes_of(file: WeightsFile) -> int:
    """The size of a file's tensors."""
    return sum(tensor.nbytes for tensor in file.checkpoint.values() if isinstance(tensor, torch.Tensor))


def _hub_folder(spec: TeacherSpec, names: tuple[str, ...], canvas: Size) -> _Network:
    """A folder with timm's `config.json`: of a hub, of timm's `save_for_hf` or of export-student."""
    _refuse_weights(spec, "a teacher from a folder")
    folder = resolve_path(spec.name.removeprefix(FOLDER_PREFIX))
    config, file = read_config(folder), read_hub_folder(folder)
    if "architecture" in file.metadata:
        return _from_card(file, spec, names, canvas)
    architecture = f"timm:{config['architecture']}"
    classes = classes_of_file(names, spec.classes, file, where=spec.name)
    with torch.device("meta"):
        create_student(architecture, classes.total)  # raises RecipeError with the most similar name
        require_size(create_student(f"timm:{FOLDER_PREFIX}{folder}", classes.total), file, spec.name)
    network: Any = create_student(f"timm:{FOLDER_PREFIX}{folder}", classes.total)  # with all arguments in the config
    loaded = _load_file(network, architecture, file, classes, spec)
    # Old folders of timm have the keys at the top.
    given = {**config, **(config.get("pretrained_cfg") or {})}
    known = {key: value for key, value in given.items() if value is not None}
    preprocessing = timm_preprocessing({**network.pretrained_cfg, **known})
    return _Network(network, architecture, preprocessing, classes, loaded.notes, loaded.raw)


def _own_with_weights(spec: TeacherSpec, names: tuple[str, ...], normalisation: Normalisation) -> _Network:
    """A network of one's own whose function loads the weights itself: it must return the same ones every time."""
    networks = []
    classes = match_classes(names, spec.classes, [], where=spec.name)
    for seed in (0, 1):
        with seeded_on_cpu(seed):
            networks.append(create_student(spec.name, classes.total))
    if weights_digest(networks[0]) != weights_digest(networks[1]):
        raise WeightsError(
            "the teacher has no weights: its function returns random ones",
            where=spec.name,
            next_step="set teacher.weights to a checkpoint, or let the function load one",
        )
    return _Network(networks[0], spec.name, _preprocessing_of(spec.name, networks[0], normalisation), classes)


def _refuse_weights(spec: TeacherSpec, what: str) -> None:
    if spec.weights is not None:
        raise WeightsError(
            f"{what} already contains its weights",
            where=spec.name,
            expected="no teacher.weights",
            found=repr(spec.weights),
            next_step="leave teacher.weights out, or name the architecture instead of the run",
        )


def _named_with_file(spec: TeacherSpec, names: tuple[str, ...], canvas: Size, normalisation: Normalisation) -> _Network:
    network = create_student(spec.name, len(names))  # fail on an unknown name before reading the file
    file = open_weights(resolve_path(spec.weights or ""), spec.name)
    classes = classes_of_file(names, spec.classes, file, where=f"{spec.name}, {file.path}")
    if classes.total != len(names):
        network = create_student(spec.name, classes.total)
    loaded = _load_file(network, spec.name, file, classes, spec)
    if "architecture" in file.metadata:
        preprocessing = _card_preprocessing(StudentCard.from_metadata(file.metadata, file.path), canvas)
    else:
        preprocessing = _preprocessing_of(spec.name, network, normalisation)
    return _Network(network, spec.name, preprocessing, classes, loaded.notes, loaded.raw)


def _preprocessing_of(name: str, network: Any, normalisation: Normalisation) -> Preprocessing:
    """The preprocessing of a network whose weights do not bring their own."""
    if name.startswith(LIBRARIES) or (own.is_own(name) and getattr(network, "pretrained_cfg", None)):
        return library_preprocessing(name, network)
    return Preprocessing(mean=normalisation[0], std=normalisation[1])


def _load_file(
    network: nn.Module, architecture: str, file: WeightsFile, classes: TeacherClasses, spec: TeacherSpec
) -> Loaded:
    where = f"{architecture}, {file.path}"
    try:
        return load_into(
            network,
            file.checkpoint,
            where=where,
            num_classes=classes.total,
            key=spec.weights_key,
            key_name="teacher.weights_key",
            without_auxiliary=architecture.startswith("torchvision:"),
        )
    except WeightsError as error:
        if spec.classes is None or error.what != class_count_error(None, 0, 0).what:
            raise
        raise WeightsError(
            "teacher.classes does not have a name for each output of the teacher",
            where=where,
            expected=f"{error.found} names",
            found=classes.total,
            next_step="name all outputs in order; the dataset need not have all these classes",
        ) from error


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
    images = as_network_input(prepare(noise(canvas, device), preprocessing))
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
