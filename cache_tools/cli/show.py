"""`cache-tools show`: what teacher, CLIP, their fusion and a student say about single images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_tools.cli.options import AsJson, Cache, Device, Temperature
from cache_tools.console import print_json, print_line, print_next
from cache_tools.errors import RecipeError

if TYPE_CHECKING:
    from cache_tools.analysis.choice import Choice

_SUFFIXES = (".png", ".html")


def show_command(
    reference: Cache,
    sample: Annotated[
        list[int] | None, typer.Option("--sample", help="Number of a sample; give it again for more.")
    ] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="Samples of this class.")] = None,
    disagree: Annotated[
        bool, typer.Option("--disagree", help="Where teacher and CLIP differ most: by their JS divergence.")
    ] = False,
    confused: Annotated[
        bool, typer.Option("--confused", help="Where the fusion is least certain: by its entropy.")
    ] = False,
    suspicious: Annotated[
        bool, typer.Option("--suspicious", help="Whose labels look wrong, as in cache-tools stats.")
    ] = False,
    count: Annotated[int | None, typer.Option("--count", min=1, help="Number of samples. [default: 12]")] = None,
    view: Annotated[
        str | None,
        typer.Option("--view", help="Numbers of views with commas, or all. [default: show 3, rank by all]"),
    ] = None,
    student: Annotated[
        str | None, typer.Option("--student", help="Also ask a student: a run folder, or a checkpoint.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Where the dataset is, if it was moved since the build.")
    ] = None,
    temperature: Temperature = 1.0,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the pictures, with the five top classes: a .png or .html file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show samples, and what teacher, CLIP and fusion say about them.

    The pictures are the views that the teachers saw, made again from the images. Without --sample, --class, --disagree,
    --confused or --suspicious the samples are spread evenly over the classes. JS divergence and entropy are means over
    the views. The list has the top class of the mean over the shown views; --out and --json have the five top classes
    in each view. docs/analysis.md explains each figure.
    """
    choice = _choice(sample, class_name, disagree, confused, suspicious, count)
    views = _views(view)
    if out is not None and out.suffix.lower() not in _SUFFIXES:
        raise RecipeError("bad --out", expected="a file that ends in .png or .html", found=out)

    from cache_tools.analysis.samples import show_samples
    from cache_tools.reader import TeacherCache
    from cache_tools.system.memory import keep_freed_memory

    cache = TeacherCache.open(reference)
    if view == "all":
        views = list(cache.complete_views)
    keep_freed_memory()
    if out is not None:  # fail before the work starts
        from cache_tools.analysis.stats import make_folder

        make_folder(out.parent)
    shown = show_samples(
        cache,
        choice,
        views,
        student=student,
        data_dir=data_dir,
        temperature=temperature,
        device=device,
    )
    if out is not None:
        from cache_tools.analysis.sheet import write_sheet

        write_sheet(shown, out)
    if as_json:
        print_json(shown.to_dict())
        return
    from cache_tools.analysis.samples_text import print_samples

    print_samples(shown)
    if out is not None:
        print_line(f"The pictures are in {out}")
        print_next("cache-tools", "stats", reference)
        return
    options = {
        "--class": class_name,
        "--count": count,
        "--view": view,
        "--student": student,
        "--data-dir": data_dir,
        "--temperature": None if temperature == 1.0 else temperature,
    }
    again: list[object] = [word for number in choice.samples for word in ("--sample", number)]
    again += [f"--{choice.order}"] if choice.is_ranking else []
    again += [word for option, value in options.items() if value is not None for word in (option, value)]
    print_next("cache-tools", "show", reference, *again, "--out", "samples.html")


def _choice(
    samples: list[int] | None,
    class_name: str | None,
    disagree: bool,
    confused: bool,
    suspicious: bool,
    count: int | None,
) -> Choice:
    from cache_tools.analysis.choice import COUNT, Choice

    given = {
        "--sample": bool(samples),
        "--class": class_name is not None,
        "--disagree": disagree,
        "--confused": confused,
        "--suspicious": suspicious,
    }
    named = [option for option, is_given in given.items() if is_given]
    if len(named) > 1:
        raise RecipeError("these options choose other samples", expected="one of them", found=" and ".join(named))
    if samples:
        if count is not None:
            raise RecipeError("--count is not for samples that are named", where="--sample", found=f"--count {count}")
        return Choice("samples", samples=tuple(dict.fromkeys(samples)))
    number = COUNT if count is None else count
    if class_name is not None:
        return Choice("class", class_name=class_name, count=number)
    if disagree:
        return Choice("disagree", count=number)
    if confused:
        return Choice("confused", count=number)
    return Choice("suspicious" if suspicious else "even", count=number)


def _views(text: str | None) -> list[int] | None:
    """The value of `--view`; None without it, and for all views."""
    if text is None or text == "all":
        return None
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() and len(number) < 10 for number in numbers) or len(set(map(int, numbers))) < len(
        numbers
    ):
        raise RecipeError("bad --view", expected="different numbers of views with commas, or all", found=text)
    return [int(number) for number in numbers]
