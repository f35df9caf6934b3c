import json
from pathlib import Path
from typing import Any

import pytest

from cache_tools.cli.table import print_table
from cache_tools.home import registry
from cache_tools.home.listing import Filters, list_remote
from cache_tools.home.registry import Summary
from cache_tools.places import LocalPlace, Place, open_place
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.s3_server import new_bucket, upload

IMAGES = tiny_images()
DAY = 86_400.0


def summary(name: str, **fields: object) -> Summary:
    data: dict[str, Any] = {"teacher": "resnet32x4 + vgg13", "views_done": 2, "views_total": 2}
    return Summary(**({"name": name, "dataset": "cifar100/train"} | data | fields))


RECORDS = [
    summary("digits", dataset="digits/train", size_bytes=500, used_s=9 * DAY),
    summary("Photos-v2", views_done=1, size_bytes=5000, used_s=5 * DAY),
    summary("broken", dataset="", teacher="", views_done=0, views_total=0, problem="damaged", used_s=1 * DAY),
]


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({}, ["digits", "Photos-v2", "broken"]),
        ({"name": "photos"}, ["Photos-v2"]),
        ({"name": "p*v?"}, ["Photos-v2"]),
        ({"dataset": "TRAIN"}, ["digits", "Photos-v2"]),
        ({"dataset": "cifar"}, ["Photos-v2"]),
        ({"teacher": "vgg"}, ["digits", "Photos-v2"]),
        ({"teacher": "clip"}, []),
        ({"complete": True}, ["digits"]),
        ({"complete": False}, ["Photos-v2", "broken"]),
        ({"larger_than": 500}, ["Photos-v2"]),
        ({"unused_for_s": 5 * DAY}, ["Photos-v2", "broken"]),
        ({"unused_for_s": 5 * DAY, "complete": False, "name": "o"}, ["Photos-v2", "broken"]),
        ({"unused_for_s": 5 * DAY, "name": "k"}, ["broken"]),
    ],
)
def test_a_record_must_pass_every_filter(filters: dict[str, Any], names: list[str]) -> None:
    assert [record.name for record in Filters(**filters).apply(RECORDS, now_s=10.5 * DAY)] == names


@pytest.fixture
def place(server: str) -> Place:
    """A folder of an object store, for a complete, a half-built and a damaged cache and other files."""
    return open_place(f"s3://{new_bucket()}/group/caches")


def test_the_caches_of_a_remote_folder(place: Place, tmp_path: Path) -> None:
    whole, half = tiny_manifest(IMAGES, name="whole"), tiny_manifest(IMAGES, name="half", codec="float32")
    build(tmp_path / "whole.zarr", whole, IMAGES)
    write(
        create(tmp_path / "half.zarr", half, IMAGES), tiny_targets(half), [(1, block) for block in range(5)] + [(2, 0)]
    )
    for name in ("whole", "half"):
        upload(tmp_path / f"{name}.zarr", f"{place}/{name}-0.zarr")
    place.child("broken.zarr").put("zarr.json", b"{")
    place.child("notes").put("readme.txt", b"no cache")
    place.child(".whole-0.zarr.claims").put("0.0.0", b"{}")
    broken, one, two = list_remote(place)
    assert (broken.name, broken.complete, broken.size_bytes) == ("broken", False, 1)
    assert broken.problem is not None
    assert "not a teacher cache" in broken.problem
    assert (one.name, one.fingerprint, one.views_done, one.views_total) == ("half", half.fingerprint, 1, 3)
    assert (two.name, two.views_done, two.complete, two.url) == ("whole", 3, True, f"{place}/whole-0.zarr")
    assert two.size_bytes == registry.read_record(tmp_path / "whole.zarr").size_bytes
    assert two.modified_s > 0
    assert [record.name for record in list_remote(place.child("whole-0.zarr"))] == ["whole"], "a cache itself"
    assert list_remote(place.child("notes")) == []


def test_listing_reads_no_arrays(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "whole.zarr", tiny_manifest(IMAGES), IMAGES)
    upload(tmp_path / "whole.zarr", f"{place}/whole.zarr")
    read: list[str] = []
    original = type(place).read

    def recording(self: Place, key: str, *limit: int) -> bytes:
        read.append(key)
        return original(self, key, *limit)

    monkeypatch.setattr(type(place), "read", recording)
    assert len(list_remote(place)) == 1
    assert read == ["zarr.json", "zarr.json"]


def test_caches_of_newer_versions_are_not_called_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder and in an object store."""
    place = LocalPlace(tmp_path / "newer.zarr")
    build(place.path, tiny_manifest(IMAGES, name="newer"), IMAGES)
    group = json.loads(place.read("zarr.json"))
    group["attributes"]["teacher_cache"]["format_version"] = 3
    place.put("zarr.json", json.dumps(group).encode())
    for records in (registry.list_caches(tmp_path), list_remote(place)):
        assert [record.unknown for record in records] == ["written by another version of teacher-cache"]
        print_table(records)
        shown = capsys.readouterr().out
        assert "newer cannot be opened: unknown cache format version" in shown
        assert "damaged" not in shown
