"""Two hosts train one student from the object store of a third, with a rank each: the student of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import tiny_run
from tests.support.hosts import Host, end, hosts, store_on
from tests.support.preloaded import Preloaded, run_module
from tests.support.rank_workers import PLAIN
from train.runs.result import load_result

pytestmark = pytest.mark.slow
PATIENCE_S = 500.0
EPOCHS, CLOSE = 2, 1e-4  # as tests/train/test_rank_matrix.py
PROGRAM = "import torch; torch.set_num_threads(1); from train.cli import main; main()"


def torchrun(host: Host, first: Host, number: int) -> list[object]:
    """One rank on each of two hosts; names of hosts are not resolved in a namespace, so addresses are given."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1),
        *("--node-rank", number, "--local-addr", host.address, "--rdzv-backend", "c10d", "--rdzv-id", "train"),
        *("--rdzv-endpoint", f"{first.address}:29511", "--rdzv-conf", f"is_host={int(number == 0)}"),
        *("--no-python", "--", sys.executable, "-c", PROGRAM),
    ]


def test_two_hosts_train_one_student(tmp_path: Path) -> None:
    """Each has its own cache home and names its own run folder: rank 0 alone writes one."""
    pictures = tiny_run.write_pictures(tmp_path / "pictures")
    local = tiny_run.write_cache(tmp_path / "tiny.zarr", pictures)
    own = {"student": PLAIN, "optimiser": {"learning_rate": 0.02}, "epochs": EPOCHS, "loggers": ()}
    alone = tiny_run.recipe(local, tmp_path / "alone", **own)
    (tmp_path / "recipe.yaml").write_text(alone.model_dump_json(exclude={"cache", "out", "fusion"}))
    with hosts(3, tmp_path) as (first, second, third), store_on(third) as variables:
        url = f"s3://{variables.pop('BUCKET')}/caches/tiny.zarr"
        copy = third.start([sys.executable, "-m", "cache_tools.cli", "copy", local, url], **variables)
        _, err = copy.communicate(timeout=PATIENCE_S)
        assert copy.returncode == 0, err
        before = {host.name: host.moved() for host in (first, second)}
        words = [tmp_path / "recipe.yaml", "--cache", url, "--overwrite"]
        ranks = [
            host.start(
                [*torchrun(host, first, number), *words, "--out", tmp_path / f"run-{number}"],
                GLOO_SOCKET_IFNAME="eth0",
                **variables,
            )
            for number, host in enumerate((first, second))
        ]
        try:
            errors = [rank.communicate(timeout=PATIENCE_S)[1] for rank in ranks]
        finally:
            for rank in ranks:
                end(rank)
        assert [rank.returncode for rank in ranks] == [0, 0], errors
        moved = {}
        for host in (first, second):
            received, sent = (now - then for then, now in zip(before[host.name], host.moved(), strict=True))
            moved[host.address] = {"received": received, "sent": sent}
        staged = {host.address: len(list(host.home.glob("tiny-*.zarr/commits/c.*"))) for host in (first, second)}
    one = Preloaded(run_module, "train.cli", str(words[0]), "--cache", str(local), "--out", str(tmp_path / "alone"))
    _, err = one.communicate(timeout=PATIENCE_S)
    assert one.returncode == 0, err
    size = sum(file.stat().st_size for file in local.rglob("*") if file.is_file())
    print(json.dumps({"bytes_of_cache": size, "staged_blocks": staged, "hosts": moved}))
    result = load_result(tmp_path / "run-0")
    assert result is not None
    assert result.environment["ranks"] == "2"
    assert not (tmp_path / "run-1").exists(), "rank 0 owns the folder of the run"
    weights, expected = (load_file(tmp_path / name / "last.safetensors") for name in ("run-0", "alone"))
    assert max(float((weights[name] - tensor).abs().max()) for name, tensor in expected.items()) < CLOSE
    assert len(set(staged.values())) == 1, "each host stages the views that it reads"
    for figures in moved.values():
        assert figures["received"] > sum(tensor.nbytes for tensor in expected.values()), "gradients come at every step"
