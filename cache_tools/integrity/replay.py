"""The report on recomputed rows of a cache: `pipeline.replay` makes it, `cache-tools verify` prints it."""

from __future__ import annotations

from typing import Any

from cache_tools.config import Frozen


class NumberPosition(Frozen):
    """Where one stored number is: its view, its sample and its column in the row."""

    view: int
    sample: int
    column: int

    def __str__(self) -> str:
        return f"view {self.view}, sample {self.sample}, column {self.column}"


class TargetReplay(Frozen):
    """One target: stored rows compared with recomputed rows that went through the same codec.

    Attributes:
        largest, mean: of the absolute differences; differences of probabilities for `top-k` and `sampled`.
        spread: root mean square of the recomputed numbers about their mean, the scale for judging differences.
        identical: share of the numbers that are bit-identical.
        tolerance: root mean square difference that a row may have beyond the codec's own error, in spreads.
        wrong_rows: rows whose difference is larger than tolerance and codec allow.
        worst: position of the largest difference.
    """

    target: str
    largest: float
    mean: float
    spread: float
    identical: float
    tolerance: float
    wrong_rows: int
    worst: NumberPosition

    @property
    def sound(self) -> bool:
        return self.wrong_rows == 0

    def __str__(self) -> str:
        figures = (
            f"largest difference {self.largest:.3g} ({_share(self.largest, self.spread)} of the spread), "
            f"mean {self.mean:.3g} ({_share(self.mean, self.spread)}), {self.identical:.1%} of the numbers the same"
        )
        if self.sound:
            return f"{self.target}: {figures}"
        rows = "1 row is" if self.wrong_rows == 1 else f"{self.wrong_rows} rows are"
        return f"{self.target}: {rows} not what the teachers compute, the worst at {self.worst}: {figures}"


class Replay(Frozen):
    """Rows of a cache, computed again.

    Attributes:
        rows: number of (sample, view) rows, drawn by `seed` from the complete views.
        device, built_on: the device that computed them now, and the one of the build.
        precision: of the forward passes.
    """

    rows: int
    seed: int
    device: str
    built_on: str | None
    precision: str
    targets: tuple[TargetReplay, ...]

    @property
    def sound(self) -> bool:
        """Whether every target is what the teachers compute, within precision and codec error."""
        return all(target.sound for target in self.targets)

    def __str__(self) -> str:
        where = f"{self.device}, built on {self.built_on}" if self.built_on else self.device
        title = f"replay: {self.rows} rows computed again in {self.precision} on {where}"
        return "\n".join([title, *(f"  {target}" for target in self.targets)])

    def to_json(self) -> dict[str, Any]:
        """All fields, and whether each target and the whole are sound."""
        targets = [target.model_dump(mode="json") | {"sound": target.sound} for target in self.targets]
        return self.model_dump(mode="json") | {"targets": targets, "sound": self.sound}


def _share(difference: float, spread: float) -> str:
    return f"{difference / spread:.2g}" if spread > 0.0 else "no spread"
