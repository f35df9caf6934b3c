"""1, 2 and 4 ranks at one global batch: the losses of 50 steps, and the weights after two epochs, are the same.

`python -m tests.train.test_rank_matrix` prints how far they are apart.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support import tiny_run
from tests.support.child import in_child
from tests.support.rank_workers import PLAIN, losses_of_batches, on_ranks, record_losses, use_double_precision
from train.recipe import TrainRecipe
from train.run import train_student

SAMPLES, STEPS, EPOCHS = 58, 50, 13  # batches of 16, and the last one of 10: four steps in an epoch
LOSSES: dict[str, dict[str, Any]] = {
    "kd": {"loss": {"kind": "kd"}},
    "richkd": {"loss": {"kind": "kd", "feature": "crd", "crd_negatives": 8}},
    "top-k": {"loss": {"kind": "kd", "temperature": 1.0}},
}
STUDENTS: dict[str, dict[str, Any]] = {
    "without batch norm": {"student": PLAIN, "optimiser": {"learning_rate": 0.02}},
    # Computed in double precision: with batch norm and these random targets every step multiplies the rounding in which
    # two runs differ, and in float32 they are different runs after 50 steps.
    "resnet8": {"student": "resnet8", "sync_batchnorm": True, "optimiser": {"learning_rate": 0.02}},
}


def write_caches(root: Path) -> dict[str, Path]:
    """A cache for each of the losses."""
    pictures = tiny_run.write_pictures(root / "pictures", train=SAMPLES)
    dense = tiny_run.write_cache(root / "components.zarr", pictures, store="components")
    sparse = tiny_run.write_cache(root / "top-k.zarr", pictures, codec="top-k")
    return {name: sparse if name == "top-k" else dense for name in LOSSES}


def trained(recipe: TrainRecipe) -> Callable[[], list[tuple[int, float]]]:
    def train() -> list[tuple[int, float]]:
        if recipe.sync_batchnorm:
            use_double_precision()
        steps = record_losses()
        train_student(recipe)
        return steps

    return train


def deviations(caches: dict[str, Path], root: Path, loss: str, student: str) -> Iterator[tuple[int, float, float]]:
    """(ranks, largest difference of a loss of the first 50 steps, of a weight after two epochs) to one process.

    Losses above 1 are compared by the share in which they differ.
    """
    root.mkdir(parents=True, exist_ok=True)
    own = {"loggers": (), **LOSSES[loss], **STUDENTS[student]}

    def run(count: int, epochs: int) -> tuple[list[float], dict[str, Any]]:
        out = root / f"{count}-{epochs}"
        recipe = tiny_run.recipe(caches[loss], out, epochs=epochs, evaluate_every=epochs, **own)
        if count == 1:
            losses = [value for _, value in in_child(trained(recipe), root / "log")]
        else:
            losses = losses_of_batches(on_ranks(count, trained(recipe), root))
        return losses[:STEPS], load_file(out / "last.safetensors")

    alone = {epochs: run(1, epochs) for epochs in (EPOCHS, 2)}
    assert len(alone[EPOCHS][0]) == STEPS
    for count in (2, 4):
        losses, weights = run(count, EPOCHS)[0], run(count, 2)[1]
        of_losses = max(abs(one - other) / max(1.0, other) for one, other in zip(losses, alone[EPOCHS][0], strict=True))
        of_weights = max(float((weights[name] - tensor).abs().max()) for name, tensor in alone[2][1].items())
        yield count, of_losses, of_weights


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_have_the_losses_and_weights_of_one_process(tmp_path: Path, loss: str, student: str) -> None:
    for count, of_losses, of_weights in deviations(write_caches(tmp_path), tmp_path / "runs", loss, student):
        assert of_losses < 1e-5, (count, of_losses)
        assert of_weights < 1e-4, (count, of_weights)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        caches = write_caches(root)
        for loss in LOSSES:
            for student in STUDENTS:
                for count, of_losses, of_weights in deviations(caches, root / loss / student, loss, student):
                    print(f"{loss}, {student}, {count} ranks: losses {of_losses:.1e}, weights {of_weights:.1e}")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
