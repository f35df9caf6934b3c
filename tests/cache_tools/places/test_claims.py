import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_tools.format.commits import BlockId
from cache_tools.places import Entry, LocalPlace, Place, clock, open_place
from cache_tools.places.claims import GROW, Claims, claim_content, claims_place, growing
from tests.support.s3_server import new_bucket

TEXT = "from cache_tools.places.claims import claim_content; print(claim_content('x').decode())"
BLOCKS = [BlockId(view, block) for view in range(3) for block in range(4)]


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return LocalPlace(tmp_path)
    request.getfixturevalue("server")
    return open_place(f"s3://{new_bucket()}/cache")


def test_a_block_is_claimed_once(place: Place) -> None:
    with Claims(place) as first, Claims(place) as second:
        assert first.claim(BlockId(0, 1))
        assert not second.claim(BlockId(0, 1))
        assert second.claim(BlockId(0, 2))
        first.release(BlockId(0, 1))
        assert second.claim(BlockId(0, 1))
    assert list(claims_place(place).entries()) == []


@pytest.mark.medium
def test_an_expired_claim_is_taken_over_by_exactly_one_builder(place: Place) -> None:
    foreign = json.dumps({"owner": "x", "host": "another-host", "pid": 1}).encode()
    claims_place(place).put("0.0.0", foreign)
    with Claims(place, expire_s=3600) as patient:
        assert not patient.claim(BlockId(0, 0))
    expire_s = _let_expire(place, "0.0.0")
    builders = [Claims(place, expire_s=expire_s) for _ in range(4)]
    winners: list[int] = []

    def take(number: int) -> None:
        if builders[number].claim(BlockId(0, 0)):
            winners.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    builders[winners[0]].release(BlockId(0, 0))
    assert list(claims_place(place).entries()) == []


def test_the_claim_of_a_dead_local_process_is_taken_over_at_once(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", TEXT], capture_output=True, check=True)
    claims_place(LocalPlace(tmp_path)).put("0.0.0", gone.stdout)
    with Claims(LocalPlace(tmp_path)) as claims:
        assert claims.claim(BlockId(0, 0))


def test_a_zombie_process_counts_as_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", TEXT], stdout=subprocess.PIPE)
    assert process.stdout is not None
    claims_place(LocalPlace(tmp_path)).put("0.0.0", process.stdout.read())
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with Claims(LocalPlace(tmp_path)) as claims:
        assert claims.claim(BlockId(0, 0))
    process.wait()


def test_a_reused_process_id_does_not_keep_a_claim_alive(tmp_path: Path) -> None:
    claim = json.loads(claim_content("x"))
    assert claim["pid"] == os.getpid()
    claims_place(LocalPlace(tmp_path)).put("0.0.0", json.dumps(claim).encode())
    claims_place(LocalPlace(tmp_path)).put("0.1.0", json.dumps(claim | {"started": "1"}).encode())
    with Claims(LocalPlace(tmp_path)) as claims:
        assert not claims.claim(BlockId(0, 0))
        assert claims.claim(BlockId(0, 1))


def test_process_ids_of_other_machines_are_ignored(tmp_path: Path) -> None:
    claim = json.loads(claim_content("x")) | {"machine": "localhost", "started": "1"}
    claims_place(LocalPlace(tmp_path)).put("0.0.0", json.dumps(claim).encode())
    with Claims(LocalPlace(tmp_path)) as claims:
        assert not claims.claim(BlockId(0, 0))


def test_a_suspended_builder_notices_that_it_lost_its_block(place: Place) -> None:
    with Claims(place, expire_s=3600) as still:
        assert still.claim(BlockId(0, 0))
        assert still.holds(BlockId(0, 0))
        claims_place(place).put("0.0.1", b"of the builder that took it over")
        assert not still.holds(BlockId(0, 0))
        assert not still.holds(BlockId(0, 1))
        still.release(BlockId(0, 0))
        assert [entry.key for entry in claims_place(place).entries()] == ["0.0.1"]


def test_claims_work_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: object, target: object, **_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(target))

    monkeypatch.setattr(os, "link", no_links)
    with Claims(LocalPlace(tmp_path)) as first, Claims(LocalPlace(tmp_path)) as second:
        assert first.claim(BlockId(0, 0))
        assert not second.claim(BlockId(0, 0))


def test_one_builder_at_a_time_holds_a_claim(place: Place) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with Claims(place) as claims, claims.holding(BlockId(0, 0)):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_the_claim_on_growing_a_cache_is_exclusive_while_builders_come_and_go(place: Place) -> None:
    with growing(place):
        with Claims(place) as builder:  # the one who does the first block
            assert next(builder.share(BLOCKS, lambda: {BlockId(0, 1)}, lambda block: False)) == (0, 0)
        with Claims(place) as another:
            assert list(another.share(BLOCKS, lambda: set(BLOCKS), lambda block: True)) == []
        with Claims(place) as late:
            assert not late.claim(GROW)
    with growing(place):
        pass
    assert list(claims_place(place).entries()) == []


def test_any_number_of_builders_may_prevent_pruning(place: Place) -> None:
    with Claims(place) as first:
        first.prevent_pruning()
        with Claims(place) as second:
            second.prevent_pruning()
            second.prevent_pruning()
            assert len(list(claims_place(place).entries())) == 3  # one for each call
        assert len(list(claims_place(place).entries())) == 1
    assert list(claims_place(place).entries()) == []


def test_a_claim_is_renewed_while_it_is_held(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    with Claims(place, heartbeat_s=0.05) as claims:
        assert claims.claim(BlockId(0, 0))
        first = next(claims_place(place).entries()).modified_s
        deadline = time.monotonic() + 20
        while next(claims_place(place).entries()).modified_s == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_damaged_claim_expires_like_any_other(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    claims_place(place).put("0.0.0", b"\x00not json")
    claims_place(place).put("notes.txt", b"of somebody")
    with Claims(place) as claims:
        assert not claims.claim(BlockId(0, 0))
    os.utime(tmp_path.with_name(f".{tmp_path.name}.claims") / "0.0.0", (0, 0))
    with Claims(place) as claims:
        assert claims.claim(BlockId(0, 0))


@pytest.mark.parametrize(("builders", "at_once"), [(2, 1), (4, 1), (3, 2)])
def test_builders_share_the_blocks_and_compute_each_once(place: Place, builders: int, at_once: int) -> None:
    done: dict[BlockId, int] = {}
    lock = threading.Lock()

    def work() -> None:
        with Claims(place) as claims:
            computed = 0
            for group in claims.share_groups(BLOCKS, lambda: set(done), done.__contains__, at_once=at_once):
                assert 1 <= len(group) <= at_once
                assert len({block.block for block in group}) == 1
                time.sleep(0.01)
                for block in group:
                    with lock:
                        done[block] = done.get(block, 0) + 1
                    claims.release(block)
                computed += len(group)
            assert computed + len(claims.done_by_others) == len(BLOCKS)

    threads = [threading.Thread(target=work) for _ in range(builders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == dict.fromkeys(BLOCKS, 1)
    assert list(claims_place(place).entries()) == []


def test_a_group_takes_the_views_of_the_same_rows_that_are_free(place: Place) -> None:
    """Blocks of a builder at work are left to it; those of a builder that is gone are taken over."""
    wanted = sorted((BlockId(view, block) for view in range(5) for block in range(2)), key=lambda one: one.block)
    done = {BlockId(1, 0)}
    with Claims(place) as other, Claims(place) as claims:
        assert other.claim(BlockId(2, 0))
        gone = json.loads(claim_content("x")) | {"started": "1"}
        claims_place(place).put("3.0.0", json.dumps(gone).encode())
        shared = claims.share_groups(wanted, lambda: done, done.__contains__, at_once=4)
        assert next(shared) == [(0, 0), (3, 0), (4, 0)]
        assert next(shared) == [(0, 1), (1, 1), (2, 1), (3, 1)]
        assert next(shared) == [(4, 1)]
        assert not claims.holds(BlockId(1, 0))
        assert other.holds(BlockId(2, 0))


def test_claims_of_killed_builders_on_committed_blocks_are_removed(place: Place) -> None:
    """Even if they have not expired, since nobody takes them over."""
    claims_place(place).put("0.0.0", b"of another host")
    claims_place(place).put("0.1.0", b"of another host, at work")
    done = {BlockId(0, 0), BlockId(0, 2)}
    with Claims(place) as claims:
        assert list(claims.share([BlockId(0, 0), BlockId(0, 2)], lambda: done, done.__contains__)) == []
        assert claims.done_by_others == [(0, 0), (0, 2)]
    assert [entry.key for entry in claims_place(place).entries()] == ["0.1.0"]


def test_half_written_claims_do_not_keep_the_folder(tmp_path: Path) -> None:
    folder = tmp_path.with_name(f".{tmp_path.name}.claims")
    with Claims(LocalPlace(tmp_path)) as claims:
        assert claims.claim(BlockId(0, 0))
        (folder / f"0.1.0.{'0a' * 16}.partial").write_text("")
        os.utime(folder / f"0.1.0.{'0a' * 16}.partial", (0, 0))
    assert not folder.exists()


def test_a_builder_that_stops_waiting_leaves_nothing(tmp_path: Path) -> None:
    claims_place(LocalPlace(tmp_path)).put("0.0.0", b"of another host")
    handed_out: list[BlockId] = []
    claims = Claims(LocalPlace(tmp_path))
    waiting = threading.Event()

    def look() -> set[BlockId]:
        waiting.set()
        return set()

    def loader() -> None:
        handed_out.extend(claims.share([BlockId(0, 0)], look, lambda block: False))

    thread = threading.Thread(target=loader)
    with claims:
        thread.start()
        waiting.wait()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert handed_out == []
    assert [entry.key for entry in claims_place(LocalPlace(tmp_path)).entries()] == ["0.0.0"]


def test_another_builder_takes_over_the_block_of_a_killed_one(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from cache_tools.places.claims import Claims; "
        "from cache_tools.format.commits import BlockId; "
        "from cache_tools.places import LocalPlace; claims = Claims(LocalPlace(Path(sys.argv[1]))); "
        "print(claims.claim(BlockId(0, 0)), flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"True\n"
    with Claims(LocalPlace(tmp_path)) as claims:
        shared = claims.share([BlockId(0, 0), BlockId(0, 1)], set, lambda block: False)
        assert next(shared) == (0, 1)
        process.kill()
        process.wait()
        assert next(shared) == (0, 0)


def _let_expire(place: Place, key: str) -> float:
    """Age a claim; returns the age from which it is void, long enough for four slow builders on a busy machine."""
    claims = claims_place(place)
    if isinstance(claims, LocalPlace):
        long_ago = time.time() - 120
        os.utime(claims.path / key, (long_ago, long_ago))
        return 60
    time.sleep(7.1)  # the dates of an object store cannot be set, and have whole seconds
    return 6


class SetClock(LocalPlace):
    """A folder of claims whose clock can be set: what is written from then on has other times."""

    by_s, set_at_s = 0.0, float("inf")

    def set_clock(self, by_s: float) -> None:
        self.by_s, self.set_at_s = by_s, time.time()

    def sibling(self, name: str) -> LocalPlace:
        return self

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        for entry in super().entries(prefix):
            moved_s = self.by_s if entry.modified_s >= self.set_at_s else 0.0
            yield Entry(entry.key, entry.size, entry.modified_s + moved_s)


FOREIGN = json.dumps({"owner": "x", "machine": "another", "pid": 1, "started": "1"}).encode()


@pytest.mark.parametrize("by_s", [-7200.0, 7200.0], ids=["back", "forth"])
def test_a_live_claim_outlasts_a_clock_that_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_s: float
) -> None:
    monkeypatch.setattr(clock, "READ_CLOCK_EVERY_S", 0.0)
    place = SetClock(tmp_path)
    waiting = Claims(place, expire_s=0.8)
    place.put("0.0.0", FOREIGN)
    assert not waiting.claim(BlockId(0, 0))
    place.set_clock(by_s)
    for _ in range(8):  # longer than it takes to expire
        assert not waiting.claim(BlockId(0, 0))
        time.sleep(0.15)
        place.put("0.0.0", FOREIGN)  # a heartbeat


@pytest.mark.parametrize("by_s", [-7200.0, 7200.0], ids=["back", "forth"])
def test_a_dead_claim_expires_although_the_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_s: float
) -> None:
    monkeypatch.setattr(clock, "READ_CLOCK_EVERY_S", 0.0)
    place = SetClock(tmp_path)
    waiting, start = Claims(place, expire_s=0.5), time.monotonic()
    place.put("0.0.0", FOREIGN)
    assert not waiting.claim(BlockId(0, 0))
    place.set_clock(by_s)
    while not waiting.claim(BlockId(0, 0)):
        assert time.monotonic() - start < 20
        time.sleep(0.05)
    assert time.monotonic() - start > 0.5


def test_a_claim_from_the_future_expires(tmp_path: Path) -> None:
    """Its builder died before the clock was set back, and nothing else will tell."""
    place = LocalPlace(tmp_path)
    claims_place(place).put("0.0.0", FOREIGN)
    tomorrow = time.time() + 86_400
    os.utime(tmp_path.with_name(f".{tmp_path.name}.claims") / "0.0.0", (tomorrow, tomorrow))
    with Claims(place, expire_s=0.2) as builder:
        assert not builder.claim(BlockId(0, 0))
        time.sleep(0.3)
        assert builder.claim(BlockId(0, 0))
