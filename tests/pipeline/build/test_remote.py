"""Builds to an object store through a real HTTP server: block by block, resumable, never two caches in one."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cache_tools.config import dump_yaml
from cache_tools.errors import MismatchError, NotFoundError, RecipeError, StorageError
from cache_tools.home import housekeeping, registry
from cache_tools.home.origin import read_origin
from cache_tools.integrity.local import verify
from cache_tools.places import LocalPlace, open_place
from cache_tools.places.claims import GROW, claims_place, newest_claims
from cache_tools.places.metadata import manifest_at
from cache_tools.places.transfer import copy_cache, list_committed
from cache_tools.reader import TeacherCache
from pipeline.build.blocks import build_blocks
from pipeline.build.cache import build_cache
from pipeline.build.destination import destination
from pipeline.build.output import MirroredOutput
from pipeline.cli import app
from pipeline.networks.ensemble import TeacherEnsemble
from pipeline.plan import make_plan
from tests.support import tiny_build
from tests.support.builders import Builder
from tests.support.cache_factory import create, tiny_images, tiny_manifest
from tests.support.flaky_proxy import flaky_proxy
from tests.support.s3_server import new_bucket
from tests.support.tiny_build import arrays_of

SAMPLES, VIEWS, ROWS = 40, 3, 20


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("remote"), train=SAMPLES)


@pytest.fixture(scope="module")
def clean(root: Path) -> dict[str, bytes]:
    """The arrays of a build into a folder."""
    build_cache(recipe(root, root / "clean.zarr"))
    return arrays_of(root / "clean.zarr")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def url(server: str) -> str:
    return f"s3://{new_bucket()}/group/tiny.zarr"


def recipe(root: Path, out: Path | str | None, **changes: object):
    return tiny_build.recipe(root, **({"num_views": VIEWS, "block_rows": ROWS, "out": out} | changes))


def same_as(clean: dict[str, bytes], url: str, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "copy.zarr", ignore_errors=True)
    copy_cache(open_place(url), LocalPlace(tmp_path / "copy.zarr"))
    assert verify(tmp_path / "copy.zarr").sound
    assert arrays_of(tmp_path / "copy.zarr") == clean
    parent = open_place(url.rpartition("/")[0])
    assert [entry.key for entry in parent.entries() if entry.key.startswith(".")] == [], "claims are left"


def leftovers(home: Path) -> list[str]:
    """Hidden files beside mirrors, except records of their origin and partial files, which expire."""
    kept = {".origin", ".partial"}
    return [path.name for path in home.iterdir() if path.name.startswith(".") and path.suffix not in kept]


def test_a_build_to_a_url_counts_its_traffic_and_keeps_a_mirror(root, clean, url, tmp_path, home):
    result = build_cache(recipe(root, url))
    assert (result.images, result.url) == (VIEWS * SAMPLES, url)
    assert result.bytes_moved == sum(entry.size for entry in open_place(url).entries())
    same_as(clean, url, tmp_path)
    assert result.path == registry.cache_path("tiny", result.manifest.fingerprint)
    assert arrays_of(result.path) == clean
    record = read_origin(result.path)
    assert record is not None
    assert (record.url, record.views, record.complete) == (url, VIEWS, True)
    assert leftovers(home) == []


def test_a_repeated_build_does_nothing(root, url, home):
    build_cache(recipe(root, url, num_views=1))
    before = {entry.key: entry for entry in open_place(url).entries()}
    messages: list[str] = []
    again = build_cache(recipe(root, url, num_views=1), messages.append)
    assert messages == [f"{url} is complete: nothing to do"]
    assert (again.images, again.bytes_moved) == (0, 0)
    shutil.rmtree(home)  # as on another machine
    other = build_cache(recipe(root, url, num_views=1))
    assert (other.images, other.url) == (0, url)
    assert {entry.key: entry for entry in open_place(url).entries()} == before


def test_a_url_without_zarr_suffix_holds_caches_of_any_recipe(root, url):
    place = url.rpartition("/")[0]
    first = build_cache(recipe(root, place, num_views=1))
    second = build_cache(recipe(root, place, num_views=1, views={"base_seed": 5, "ops": ["flip"]}))
    assert first.url == f"{place}/tiny-{first.manifest.fingerprint[:12]}.zarr"
    assert open_place(place).folders() == sorted(result.path.name for result in (first, second))
    assert build_cache(recipe(root, f"{place}/", num_views=1)).images == 0


def test_a_cache_in_the_home_is_pushed_instead_of_recomputed(root, clean, url, tmp_path):
    built = build_cache(recipe(root, None))
    (built.path / "commits" / "c.1.1.0").unlink()
    result = build_cache(recipe(root, url))
    assert result.images == ROWS
    same_as(clean, url, tmp_path)


def test_any_machine_can_add_views_to_a_remote_cache(root, url, tmp_path, monkeypatch):
    build_cache(recipe(root, url, num_views=1))
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "another-home"))
    grown = build_cache(recipe(root, url, num_views=2))
    assert grown.images == SAMPLES, "what is there is neither computed again nor pulled"
    assert {view for view, _ in list_committed(LocalPlace(grown.path))} == {1}
    everything = TeacherCache.open(grown.path)
    everything.load_view(0)  # comes from the store
    assert everything.complete_views == (0, 1)
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    more = build_cache(recipe(root, url, num_views=VIEWS))
    assert more.images == SAMPLES
    manifest = manifest_at(open_place(url))
    assert [note["views"] for note in manifest.provenance["grown"]] == [[1, 2], [2, VIEWS]]
    build_cache(recipe(root, tmp_path / "clean.zarr", num_views=1))
    build_cache(recipe(root, tmp_path / "clean.zarr", num_views=VIEWS))
    same_as(arrays_of(tmp_path / "clean.zarr"), url, tmp_path)


def test_growing_claims_the_cache_and_its_mirror(root, url, monkeypatch):
    from pipeline.build import cache

    build_cache(recipe(root, url, num_views=1))
    claimed: list[Any] = []
    whole = cache._grow

    def grow(writer, *arguments):
        places = (open_place(url), LocalPlace(writer.path))
        claimed.extend(GROW in newest_claims(claims_place(place)) for place in places)
        return whole(writer, *arguments)

    monkeypatch.setattr(cache, "_grow", grow)
    build_cache(recipe(root, url, num_views=2))
    assert claimed == [True, True]


def test_a_builder_killed_at_random_requests_resumes(root, clean, url, tmp_path, home):
    """The store stops answering at any time from the creation to the last blocks, and the builder is killed."""
    place, progress, random_count = open_place(url), [0], random.Random(7)
    with flaky_proxy() as proxy:
        for most in (20, 45, 45, 45):
            proxy.stop_after(random_count.randint(1, most))
            builder = Builder(recipe(root, url))
            assert proxy.full.wait(120)
            builder.kill()
            proxy.go_on()
            progress.append(len(list_committed(place)))
        assert progress == sorted(progress), "a committed block was lost"
        assert progress[-1] > 0, "every kill came before the first commit"
        Builder(recipe(root, url)).result()
    same_as(clean, url, tmp_path)
    assert leftovers(home) == []


def test_builders_through_a_store_that_fails_a_fifth_of_its_requests(root, clean, url, tmp_path):
    with flaky_proxy(seed=5) as proxy:
        proxy.fail(0.2)
        running = [Builder(recipe(root, url), TEACHER_CACHE_HOME=tmp_path / f"home-{number}") for number in range(2)]
        images = sum(builder.result().images for builder in running)
        failed = sum(seen.failure is not None for seen in proxy.seen)
    assert images == VIEWS * SAMPLES
    assert failed > 20
    same_as(clean, url, tmp_path)


def test_a_mirror_in_use_is_not_removed(root, url, monkeypatch):
    from pipeline.build import cache

    refused = []

    def tidy_up_meanwhile(output, *arguments):
        with output.building(), pytest.raises(StorageError, match="right now"):
            housekeeping.remove(output.path)
        refused.append(output.path)
        return build_blocks(output, *arguments)

    monkeypatch.setattr("pipeline.build.blocks.build_blocks", tidy_up_meanwhile)
    assert cache.build_cache(recipe(root, url, num_views=1)).images == SAMPLES
    assert refused


def test_a_mirror_with_two_builders_is_kept_until_both_are_done(home, tmp_path):
    images = tiny_images()
    writer, store = create(home / "tiny.zarr", tiny_manifest(images), images), LocalPlace(tmp_path / "store.zarr")
    copy_cache(LocalPlace(writer.path), store)
    with ExitStack() as first:
        first.enter_context(MirroredOutput(writer, store, writer.manifest, 0).building())
        with MirroredOutput(writer, store, writer.manifest, 0).building():
            first.close()
            with pytest.raises(StorageError, match="right now"):
                housekeeping.remove(writer.path)
    housekeeping.remove(writer.path)


def test_an_interrupted_creation_leaves_no_cache(root, clean, url, tmp_path, monkeypatch):
    """The manifest is uploaded last: files without one are overwritten by the next build."""
    from cache_tools.places import metadata

    copied: list[str] = []
    whole = metadata._put

    def cut(target, key, data):
        copied.append(key)
        if len(copied) == 6:
            raise StorageError("cut", where=target)
        return whole(target, key, data)

    monkeypatch.setattr(metadata, "_put", cut)
    with pytest.raises(StorageError, match="cut"):
        build_cache(recipe(root, url))
    monkeypatch.undo()
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "another-home"))
    with pytest.raises(NotFoundError):
        manifest_at(open_place(url))
    build_cache(recipe(root, url))
    same_as(clean, url, tmp_path)


class OtherMachine:
    """Makes constants differ in their last bits, as on another machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        whole = TeacherEnsemble.constants

        def constants(ensemble: TeacherEnsemble, store: str):
            found = whole(ensemble, store)  # type: ignore[arg-type]
            return found | {"class_embeddings": np.nextafter(found["class_embeddings"], np.float32(2))}

        monkeypatch.setattr(TeacherEnsemble, "constants", constants)
        monkeypatch.setenv("TEACHER_CACHE_HOME", str(home))


def test_the_first_builder_determines_the_constants(root, clean, url, tmp_path, monkeypatch):
    first = build_cache(recipe(root, url, num_views=1))
    OtherMachine(monkeypatch, tmp_path / "another-home")
    result = build_cache(recipe(root, url))
    assert result.images == 2 * SAMPLES
    assert result.manifest.constants_digest == first.manifest.constants_digest
    mirrored = TeacherCache.open(result.path)
    for name in ("class_embeddings", "clip_projection", "teacher_projection"):
        np.testing.assert_array_equal(mirrored.constant(name), TeacherCache.open(first.path).constant(name))


def test_two_builders_creating_one_cache_end_with_the_same_constants(root, url, tmp_path, monkeypatch):
    """The second builder has created its own cache, without blocks, before it finds that it was not the first."""
    from pipeline.build import cache

    whole = cache._create
    firsts = []

    def slower(*arguments):
        writer = whole(*arguments)
        firsts.append(Builder(recipe(root, url), TEACHER_CACHE_HOME=tmp_path / "home").result())
        return writer

    OtherMachine(monkeypatch, tmp_path / "another-home")
    monkeypatch.setattr(cache, "_create", slower)
    build_cache(recipe(root, url, num_views=VIEWS + 1))
    (first,) = firsts
    manifest = manifest_at(open_place(url))
    assert manifest.constants_digest == first.manifest.constants_digest
    assert manifest.num_views == VIEWS + 1
    copy_cache(open_place(url), LocalPlace(tmp_path / "copy.zarr"))
    assert verify(tmp_path / "copy.zarr").sound
    TeacherCache.open(tmp_path / "copy.zarr").require_complete()


def test_blocks_with_other_constants_are_never_mixed(root, url, tmp_path, monkeypatch):
    build_cache(recipe(root, url, num_views=1))
    before = {entry.key: entry for entry in open_place(url).entries()}
    OtherMachine(monkeypatch, tmp_path / "another-home")
    built = build_cache(recipe(root, None, num_views=1))
    with pytest.raises(MismatchError, match="must not be mixed") as caught:
        build_cache(recipe(root, url))
    assert str(built.path) in str(caught.value)
    assert {entry.key: entry for entry in open_place(url).entries()} == before
    shutil.rmtree(built.path)
    assert build_cache(recipe(root, url)).images == (VIEWS - 1) * SAMPLES


def test_a_remote_cache_of_another_recipe_is_not_touched(root, url):
    build_cache(recipe(root, url, num_views=1))
    before = {entry.key: entry for entry in open_place(url).entries()}
    with pytest.raises(MismatchError, match="another recipe"):
        build_cache(recipe(root, url, num_views=1, views={"base_seed": 5, "ops": ["flip"]}))
    assert {entry.key: entry for entry in open_place(url).entries()} == before


def test_other_remote_files_are_not_touched(root, url):
    open_place(f"{url}/thesis").put("chapter-1.tex", b"precious")
    with pytest.raises(StorageError, match="place is taken"):
        build_cache(recipe(root, url))
    assert [entry.key for entry in open_place(url).entries()] == ["thesis/chapter-1.tex"]


def test_a_missing_bucket_is_a_one_line_error(root, server, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_yaml(recipe(root, "s3://no-such-bucket-here/tiny.zarr")))
    done = CliRunner().invoke(app, [str(file)])
    assert done.exit_code == 2, done.output
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == done.stderr.splitlines()[-1:]


def test_an_unknown_scheme_fails_before_anything_is_loaded(root):
    with pytest.raises(RecipeError, match="not a URL of an object store"):
        build_cache(recipe(root, "nosuch://bucket/c.zarr", teacher={"name": "nowhere.safetensors"}))


def test_the_command_prints_its_traffic_and_the_next_step(root, url, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_yaml(recipe(root, None, num_views=1)))
    done = CliRunner().invoke(app, [str(file), "--out", url])
    assert done.exit_code == 0, done.output
    assert "moved; the local mirror is " in done.stdout
    assert done.stdout.splitlines()[-1] == f"next: train-student --cache {url}"
    summary = json.loads(CliRunner().invoke(app, [str(file), "--out", url, "--views", "2", "--json"]).stdout)
    assert (summary["url"], summary["images_computed"]) == (url, SAMPLES)
    assert 0 < summary["bytes_moved"] < sum(entry.size for entry in open_place(url).entries())


def test_recipes_and_plans_keep_a_url(root, url, home):
    wanted = recipe(root, url)
    assert wanted.out == url
    assert type(wanted).model_validate(wanted.model_dump(mode="json")) == wanted
    assert recipe(root, "some/folder").out == Path("some/folder")
    assert recipe(root, "file:///some/folder").out == Path("/some/folder")
    assert destination(wanted, "ab" * 32).path.parent == home
    assert make_plan(wanted, "resnet8", 10).bytes_free > 0
