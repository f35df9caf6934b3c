"""What each source says about single samples: their views as replayed, and the five most probable classes.

`cache-tools show` prints it, and `sheet` draws it. No teacher runs; a student's logits come from a plugin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from cache_tools import plugins
from cache_tools.alignment import aligned, check_canaries, open_cached
from cache_tools.analysis.choice import Choice, Ranking
from cache_tools.analysis.figures import TOP_K, js_divergence
from cache_tools.analysis.stats import (
    About,
    about_of,
    analyse,
    check_temperature,
    source_logits,
    sources_of,
    view_numbers,
)
from cache_tools.console import resolve_device
from cache_tools.format.manifest import Fusion
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import as_received, require_one_label
from cache_tools.reader import TeacherCache

SHOWN_VIEWS = 3
GAINS = 3  # classes that the fusion helps most, and as many that it hurts most
STUDENT = "student"
_CONFIDENT = 0.8  # of the statistics; nothing that is shown depends on it


class Student(Protocol):
    """A trained student, as the plugin `student` opens it.

    Attributes:
        name: for people.
        run: the folder or the file that it comes from.
        fingerprint: of the cache that it learned from; None if it learned from labels alone, or if nothing tells.
    """

    @property
    def name(self) -> str: ...

    @property
    def run(self) -> str: ...

    @property
    def fingerprint(self) -> str | None: ...

    def logits(self, pixels_NCHW_u8: torch.Tensor) -> torch.Tensor:
        """Logits float32 [B, C] of views as the student sees them."""
        ...


@dataclass(frozen=True)
class Opinion:
    """What one source says.

    Attributes:
        top: (class, probability) of the five most probable classes. Of equal ones the lowest number is first.
        right: the first class is the label.
        label_probability: of the label.
    """

    top: tuple[tuple[int, float], ...]
    right: bool
    label_probability: float


@dataclass(frozen=True)
class ShownView:
    """One view of a sample.

    Attributes:
        pixels: uint8 [H, W, 3], as the teachers saw them.
        opinions: source → opinion.
        divergence: JS divergence of teacher and CLIP in nats; None without both.
        partner: the sample that the view mixes in; None for none.
        share: of the sample's own label: below 1 with a partner.
    """

    view: int
    pixels: npt.NDArray[np.uint8]
    opinions: Mapping[str, Opinion]
    divergence: float | None
    partner: int | None
    share: float


@dataclass(frozen=True)
class ShownSample:
    """One sample in all shown views.

    Attributes:
        name: its file, where images are files.
        figure: what it was chosen by: a mean over `Shown.about.views`; None for an order that is no ranking.
        suspicion: its row of `TeacherStats.suspicious`; None for another order.
        mean: source → opinion of the mean distribution over the shown views.
    """

    sample: int
    name: str | None
    label: int
    figure: float | None
    suspicion: Mapping[str, Any] | None
    mean: Mapping[str, Opinion]
    views: tuple[ShownView, ...]


@dataclass(frozen=True)
class Shown:
    """All that a sheet shows.

    Attributes:
        about: figures and gains are about its views.
        views: of these, the ones that are shown.
        sources: those of the cache, and `student` if there is one.
        helped, hurt: rows of `TeacherStats.gains`; None where no statistics were made, or without teacher and CLIP.
    """

    about: About
    choice: Choice
    views: tuple[int, ...]
    sources: tuple[str, ...]
    student: Student | None
    samples: tuple[ShownSample, ...]
    helped: pl.DataFrame | None
    hurt: pl.DataFrame | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: everything but the pixels."""
        names, student = self.about.class_names, self.student
        fields = ("name", "run", "fingerprint")
        return {
            "about": self.about.model_dump(mode="json", exclude={"confident"}),
            "order": self.choice.order,
            "views": list(self.views),
            "sources": list(self.sources),
            "student": None if student is None else {field: getattr(student, field) for field in fields},
            "samples": [_sample_dict(each, names) for each in self.samples],
            "helped": None if self.helped is None else self.helped.to_dicts(),
            "hurt": None if self.hurt is None else self.hurt.to_dicts(),
        }


def show_samples(
    cache: TeacherCache,
    choice: Choice,
    views: Sequence[int] | None = None,
    *,
    student: str | None = None,
    data_dir: Path | None = None,
    temperature: float = 1.0,
    device: str = "cpu",
) -> Shown:
    """Choose samples, make their views again, and look up what each source says about them.

    A choice that `needs_stats` costs what `analyse` costs. Others read the blocks of their samples only.

    Args:
        views: None for all complete views, of which the first SHOWN_VIEWS are shown.
        student: the run folder or the checkpoint of a student.
        data_dir: where the images are, if they were moved since the build.
        temperature: divides all logits, also those of the student.

    Raises:
        RecipeError: a bad temperature, too many pictures, or images with any number of labels.
        NotFoundError: no such view, sample or class; no teacher and CLIP that could disagree; no plugin.
        IncompleteError: a view is not complete.
        MismatchError: other images or pixels than the teachers saw, or a student for other ones.
        DataError: no images there, or some that cannot be decoded.
        WeightsError: no student there.
    """
    [shown] = show_choices(
        cache, [choice], views, student=student, data_dir=data_dir, temperature=temperature, device=device
    )
    return shown


def show_choices(
    cache: TeacherCache,
    choices: Sequence[Choice],
    views: Sequence[int] | None = None,
    *,
    student: str | None = None,
    data_dir: Path | None = None,
    temperature: float = 1.0,
    device: str = "cpu",
) -> list[Shown]:
    """`show_samples` for several choices, with one pass over the targets."""
    require_one_label(cache.recipe.dataset.multi_label, "show", cache.path, "look at cache-tools stats")
    cache.recipe.views.require_pixels(cache.path)
    check_temperature(temperature)
    chosen, sources = view_numbers(cache, views), sources_of(cache.recipe)
    for view in chosen:
        cache.require_view(view)
    shown = chosen[:SHOWN_VIEWS] if views is None else chosen
    for choice in choices:
        choice.check(cache, len(shown))
    torch_device = resolve_device(device, needs_float64=True)
    images = _open_images(cache, data_dir)
    network = None if student is None else _open_student(cache, student, torch_device)
    rankings, stats = [Ranking(choice.order, sources[-1], cache.num_samples) for choice in choices], None
    if any(choice.needs_stats for choice in choices):

        def rank(view: int, frame: pl.DataFrame) -> None:
            for ranking in rankings:
                ranking.add(view, frame)

        stats = analyse(cache, chosen, confident=_CONFIDENT, temperature=temperature, device=device, write_view=rank)
    helped, hurt = (None, None) if stats is None or len(sources) == 1 else stats.gains(GAINS)
    about = about_of(cache, chosen, sources, _CONFIDENT, temperature, Fusion.stored(cache.manifest))

    def show(choice: Choice, ranking: Ranking) -> Shown:
        samples = choice.pick(cache, stats, ranking)
        looked_at = shown if len(samples) else ()  # no label may be suspicious
        looks = [_look(cache, images, samples, view, network, temperature, torch_device) for view in looked_at]
        suspicions: dict[int, dict[str, Any]] = {}
        if stats is not None and choice.order == "suspicious":
            suspicions = {row["sample"]: row for row in stats.suspicious(choice.count).to_dicts()}
        found = [
            _shown_sample(cache, images, place, sample, looks, ranking, suspicions.get(sample))
            for place, sample in enumerate(samples.tolist())
        ]
        return Shown(
            about=about,
            choice=choice,
            views=shown,
            sources=sources if network is None else (*sources, STUDENT),
            student=network,
            samples=tuple(found),
            helped=helped,
            hurt=hurt,
        )

    return [show(choice, ranking) for choice, ranking in zip(choices, rankings, strict=True)]


def _shown_sample(
    cache: TeacherCache,
    images: ImageSet,
    place: int,
    sample: int,
    looks: Sequence[_Look],
    ranking: Ranking,
    suspicion: Mapping[str, Any] | None,
) -> ShownSample:
    """The sample at `place` of the looks."""
    label = int(cache.labels[sample])
    mean = {source: np.mean([look.p[source][place] for look in looks], axis=0) for source in looks[0].p}
    return ShownSample(
        sample=sample,
        name=images.name_of(sample) if isinstance(images, EncodedImages) else None,
        label=label,
        figure=ranking.mean(sample) if suspicion is None else float(suspicion["against"]),
        suspicion=suspicion,
        mean={source: opinion(p, label) for source, p in mean.items()},
        views=tuple(look.view_of(place, label) for look in looks),
    )


def opinion(p_C: npt.NDArray[np.float64], label: int) -> Opinion:
    """What a distribution over the classes says about a sample of this label."""
    order = np.argsort(-p_C, kind="stable")[:TOP_K]
    top = tuple((int(number), float(p_C[number])) for number in order)
    return Opinion(top, top[0][0] == label, float(p_C[label]))


@dataclass(frozen=True)
class _Look:
    """Several samples in one view: pixels uint8 [S, 3, H, W], source → p float64 [S, C], the others [S]."""

    view: int
    pixels: npt.NDArray[np.uint8]
    p: Mapping[str, npt.NDArray[np.float64]]
    divergence: npt.NDArray[np.float64] | None
    partner: npt.NDArray[np.int64] | None
    share: npt.NDArray[np.float64] | None

    def view_of(self, place: int, label: int) -> ShownView:
        share = 1.0 if self.share is None else float(self.share[place])
        return ShownView(
            view=self.view,
            pixels=self.pixels[place].transpose(1, 2, 0),
            opinions={source: opinion(p[place], label) for source, p in self.p.items()},
            divergence=None if self.divergence is None else float(self.divergence[place]),
            partner=None if self.partner is None or share == 1.0 else int(self.partner[place]),
            share=share,
        )


def _look(
    cache: TeacherCache,
    images: ImageSet,
    samples: npt.NDArray[np.int64],
    view: int,
    student: Student | None,
    temperature: float,
    device: torch.device,
) -> _Look:
    """Make these samples' views again, and look up what each source says about them."""
    recipe, sources, each = cache.recipe.views, sources_of(cache.recipe), cache.manifest.block_rows
    blocks = np.unique(samples // each)
    targets = cache.load_view(view, device, features=False, blocks=blocks.tolist())
    rows = np.searchsorted(blocks, samples // each) * each + samples % each  # only the last block may be shorter
    logits = {source: source_logits(targets, source, sources[-1], rows) for source in sources}
    seen, own = recipe.seen_by("clip" if sources == ("clip",) else "teacher"), recipe.seen_by("student")
    pixels = seen.finish(seen.load(images, samples, samples, view), samples, view)
    if student is not None:
        is_same = own.output_size(images.image_size) == seen.output_size(images.image_size)
        theirs = pixels if is_same else own.finish(own.load(images, samples, samples, view), samples, view)
        logits[STUDENT] = student.logits(theirs)
    p = {source: (of_source.double() / temperature).softmax(dim=1).cpu() for source, of_source in logits.items()}
    mixing = recipe.mixing(samples, view, cache.recipe.dataset.image_size)
    return _Look(
        view=view,
        pixels=pixels.cpu().numpy(),
        p={source: of_source.numpy() for source, of_source in p.items()},
        divergence=js_divergence(p["teacher"], p["clip"]).numpy() if len(sources) > 1 else None,
        partner=None if mixing is None else mixing.partner,
        share=None if mixing is None else mixing.share,
    )


def _open_images(cache: TeacherCache, data_dir: Path | None) -> ImageSet:
    """The images of the cache in its order, with the pixels that the teachers saw."""
    dataset = as_received(cache.manifest.dataset, cache.path, data_dir=data_dir)
    images = aligned(cache, open_cached(cache, dataset.located(data_dir)))
    check_canaries(cache, images)
    return images


def _open_student(cache: TeacherCache, run: str, device: torch.device) -> Student:
    size = cache.recipe.views.seen_by("student").output_size(cache.recipe.dataset.image_size)
    student: Student = plugins.load(STUDENT)(run, cache.class_names, size, device)
    return student


def _sample_dict(shown: ShownSample, names: Sequence[str]) -> dict[str, Any]:
    return {
        "sample": shown.sample,
        "file": shown.name,
        "label": shown.label,
        "class": names[shown.label],
        "figure": shown.figure,
        "suspicion": None if shown.suspicion is None else dict(shown.suspicion),
        "mean": {source: _opinion_dict(each, names) for source, each in shown.mean.items()},
        "views": [
            {
                "view": view.view,
                "divergence": view.divergence,
                "partner": view.partner,
                "share": view.share,
                "sources": {source: _opinion_dict(each, names) for source, each in view.opinions.items()},
            }
            for view in shown.views
        ],
    }


def _opinion_dict(said: Opinion, names: Sequence[str]) -> dict[str, Any]:
    return {
        "right": said.right,
        "label_probability": said.label_probability,
        "top": [{"label": number, "class": names[number], "probability": p} for number, p in said.top],
    }
