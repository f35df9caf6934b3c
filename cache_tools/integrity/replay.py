"""What computing some rows of a cache again found: `pipeline.replay` makes it, `cache-tools verify` shows it."""

from __future__ import annotations

from typing import Any

from cache_tools.config import Frozen


class Place(Frozen):
    """One stored number: which view, which sample, which column of the row."""

    view: int
    sample: int
    column: int

    def __str__(self) -> str:
        return f"view {self.view}, sample {self.sample}, column {self.column}"


class TargetReplay(Frozen):
    """One target: stored rows against recomputed ones that went through the same codec.

    Attributes:
        largest, mean: of the absolute differences; of probabilities where the codec is `top-k`.
        spread: root mean square of the recomputed numbers about their mean: what differences are to be seen against.
        identical: share of the numbers that are the same bit by bit.
        tolerance: what a row's root mean square difference may be, in spreads, the codec's own error not counted.
        wrong_rows: rows that are further off than that and the codec explain.
        worst: where the largest difference is.
    """

    target: str
    largest: float
    mean: float
    spread: float
    identical: float
    tolerance: float
    wrong_rows: int
    worst: Place

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
        return f"{self.target}: {rows} not what the teachers say, the worst at {self.worst}: {figures}"


class Replay(Frozen):
    """Rows of a cache, computed again.

    Attributes:
        rows: how many (sample, view) pairs, drawn by `seed` from the complete views.
        device, built_on: where they were computed now and then.
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
        """Whether every target is what the teachers say, within precision and codec."""
        return all(target.sound for target in self.targets)

    def __str__(self) -> str:
        where = f"{self.device}, built on {self.built_on}" if self.built_on else self.device
        title = f"replay: {self.rows} rows computed again in {self.precision} on {where}"
        return "\n".join([title, *(f"  {target}" for target in self.targets)])

    def to_json(self) -> dict[str, Any]:
        """All fields, and what is sound."""
        targets = [target.model_dump(mode="json") | {"sound": target.sound} for target in self.targets]
        return self.model_dump(mode="json") | {"targets": targets, "sound": self.sound}


def _share(difference: float, spread: float) -> str:
    return f"{difference / spread:.2g}" if spread > 0.0 else "no spread"
