import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from s3_server import new_bucket

from cache_tools.claims import Claims, claims_of
from cache_tools.place import LocalPlace, Place, open_place

BLOCKS = [(view, block) for view in range(3) for block in range(4)]


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return LocalPlace(tmp_path)
    request.getfixturevalue("server")
    return open_place(f"s3://{new_bucket()}/cache")


def test_a_block_is_claimed_once(place: Place) -> None:
    with Claims(place) as first, Claims(place) as second:
        assert first.claim((0, 1))
        assert not second.claim((0, 1))
        assert second.claim((0, 2))
        first.release((0, 1))
        assert second.claim((0, 1))
    assert list(claims_of(place).entries()) == []


def test_an_expired_claim_is_taken_over_by_exactly_one(place: Place) -> None:
    foreign = json.dumps({"owner": "x", "host": "another-host", "pid": 1}).encode()
    claims_of(place).put("0.0.0", foreign)
    with Claims(place, expire_s=3600) as patient:
        assert not patient.claim((0, 0))
    time.sleep(2.1)  # object stores tell time in seconds
    builders = [Claims(place, expire_s=1) for _ in range(4)]
    winners: list[int] = []

    def take(number: int) -> None:
        if builders[number].claim((0, 0)):
            winners.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    builders[winners[0]].release((0, 0))
    assert list(claims_of(place).entries()) == []


def test_a_claim_of_a_dead_process_of_this_host_is_not_waited_for(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    claim = {"owner": "x", "host": socket.gethostname(), "pid": int(gone.stdout)}
    claims_of(LocalPlace(tmp_path)).put("0.0.0", json.dumps(claim).encode())
    with Claims(LocalPlace(tmp_path)) as claims:
        assert claims.claim((0, 0))


def test_a_claim_is_renewed_while_it_is_held(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    with Claims(place, heartbeat_s=0.05) as claims:
        assert claims.claim((0, 0))
        first = next(claims_of(place).entries()).modified_s
        deadline = time.monotonic() + 20
        while next(claims_of(place).entries()).modified_s == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_damaged_claim_expires_like_any_other(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    claims_of(place).put("0.0.0", b"\x00not json")
    claims_of(place).put("notes.txt", b"of somebody")
    with Claims(place) as claims:
        assert not claims.claim((0, 0))
    os.utime(tmp_path.with_name(f".{tmp_path.name}.claims") / "0.0.0", (0, 0))
    with Claims(place) as claims:
        assert claims.claim((0, 0))


@pytest.mark.parametrize("builders", [2, 4])
def test_builders_share_the_blocks_without_double_work(place: Place, builders: int) -> None:
    done: dict[tuple[int, int], int] = {}
    lock = threading.Lock()

    def work() -> None:
        with Claims(place) as claims:
            for pair in claims.share(BLOCKS, lambda: set(done)):
                time.sleep(0.01)
                with lock:
                    done[pair] = done.get(pair, 0) + 1
                claims.release(pair)

    threads = [threading.Thread(target=work) for _ in range(builders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == dict.fromkeys(BLOCKS, 1)
    assert list(claims_of(place).entries()) == []


def test_a_block_of_a_builder_that_dies_is_done_by_another(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from cache_tools.claims import Claims; "
        "from cache_tools.place import LocalPlace; claims = Claims(LocalPlace(Path(sys.argv[1]))); "
        "print(claims.claim((0, 0)), flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"True\n"
    with Claims(LocalPlace(tmp_path)) as claims:
        shared = claims.share([(0, 0), (0, 1)], set)
        assert next(shared) == (0, 1)
        process.kill()
        process.wait()
        assert next(shared) == (0, 0)
