"""The process that talks to Ray for `RayEngine`: it trains the shares of a sweep, see `train.sweep.ray.cluster`."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_tools.system.processes import CLAIM
from train.sweep.ray.cluster import reason_of, send, serve


def main() -> None:
    """Connect, then train the jobs that come on standard input until it ends."""
    serve(lambda job: send({"died": run_shares(job)}), "sweep")


def run_shares(job: Mapping[str, Any]) -> dict[str, str]:
    """Train shares, each as a Tune trial that restarts once if its worker dies. An error of a share is sent at once.

    Args:
        job: `shares` (JSON of `Share`), `cpus` and `gpus` of each, `at_once`, and the `folder` for Tune's own files.

    Returns:
        Number of a share whose worker died twice → the reason.
    """
    from ray import tune

    died: dict[str, str] = {}

    class Watch(tune.Callback):  # type: ignore[misc]  # Ray has no types
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            if result.get("error"):
                send({"error": json.loads(result["error"])})

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            died[str(trial.config["share"])] = reason_of(trial.get_pickled_error() or trial.get_error())

    folder = Path(job["folder"])
    shutil.rmtree(folder / "tune", ignore_errors=True)
    trainable = tune.with_parameters(_trainable(), shares=job["shares"])
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": job["cpus"], "gpu": job["gpus"]}),
        param_space={"share": tune.grid_search(list(range(len(job["shares"]))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=job["at_once"]),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[Watch()],
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    ).fit()
    shutil.rmtree(folder / "tune", ignore_errors=True)  # results are in the folders of the sweep's trials
    return died


def _trainable() -> Callable[..., None]:
    """`worker.train_share` for a process of Ray; see `cluster._remote_probe`."""
    claim = CLAIM

    def train_share(config: Mapping[str, Any], *, shares: Sequence[str]) -> None:
        importlib.import_module(claim)
        from train.sweep.ray import worker

        worker.train_share(config, shares=shares)

    return train_share
