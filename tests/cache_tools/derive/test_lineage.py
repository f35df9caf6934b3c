from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cache_tools.cli import app
from cache_tools.derive.codec_spec import codecs_for
from cache_tools.derive.fuse import fuse
from cache_tools.derive.lineage import lineage, open_source
from cache_tools.derive.recode import recode
from cache_tools.errors import NotFoundError
from cache_tools.home.registry import HOME_VARIABLE
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from tests.support.cache_factory import build, tiny_images, tiny_manifest

IMAGES = tiny_images()


def make_chain(folder: Path) -> list[TeacherCache]:
    """A component cache, the same recoded, and that fused."""
    build(folder / "first.zarr", tiny_manifest(IMAGES, store="components"), IMAGES)
    first = TeacherCache(folder / "first.zarr")
    second = TeacherCache(recode(first, codecs_for("float32", first.recipe), "second", folder / "second.zarr").path)
    return [first, second, TeacherCache(fuse(second, FusionChoice(), out=folder / "third.zarr").path)]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[TeacherCache]:
    """Caches for reading only."""
    return make_chain(tmp_path_factory.mktemp("chain"))


def test_the_nearest_source_comes_first(chain: list[TeacherCache]) -> None:
    first, second, third = chain
    assert lineage(first.manifest) == ()
    nearest, original = lineage(third.manifest)
    assert (nearest.name, nearest.fingerprint, nearest.path) == (
        "second",
        second.manifest.fingerprint,
        str(second.path),
    )
    assert (original.name, original.store, original.codecs) == ("tiny", "components", first.recipe.codecs)
    assert lineage(second.manifest) == (original,)
    assert nearest.source == original
    assert original.source is None


def test_a_source_is_opened_at_its_path_or_from_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = make_chain(tmp_path)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    nearest, original = lineage(chain[2].manifest)
    assert open_source(nearest).path == chain[1].path
    chain[0].path.rename(tmp_path / "gone.zarr")
    chain[2].path.rename(chain[0].path)  # another cache in its place
    with pytest.raises(
        NotFoundError, match=rf"made from is missing \(.*first.zarr\).*tiny, fingerprint {original.fingerprint[:12]}"
    ):
        open_source(original)
    (tmp_path / "home").mkdir()
    (tmp_path / "gone.zarr").rename(tmp_path / "home" / "any.zarr")
    assert open_source(original).path == tmp_path / "home" / "any.zarr"


@pytest.mark.parametrize("provenance", [{}, {"source": None}, {"source": {"name": "x"}}, {"source": "elsewhere"}])
def test_a_derived_cache_without_a_record_of_its_source(chain: list[TeacherCache], provenance: dict[str, Any]) -> None:
    silent = chain[2].manifest.model_copy(update={"provenance": provenance})
    with pytest.raises(
        NotFoundError, match=rf"does not record what it was made from.*{str(silent.recipe.derived_from)[:12]}"
    ):
        lineage(silent)


def test_a_source_of_another_fingerprint_is_an_error(chain: list[TeacherCache]) -> None:
    other = chain[2].manifest.provenance["source"] | {"fingerprint": "0" * 64}
    with pytest.raises(NotFoundError, match="found 000000000000"):
        lineage(chain[2].manifest.model_copy(update={"provenance": {"source": other}}))


def test_info_prints_one_line_per_source(chain: list[TeacherCache]) -> None:
    printed = CliRunner().invoke(app, ["info", str(chain[2].path)]).stdout
    lines = [line for line in printed.splitlines() if line.startswith("made from:")]
    assert [line.split()[2] for line in lines] == ["second,", "tiny,"]
    assert f"components as float16 ({chain[0].path})" in lines[1]
    assert "source:" not in printed
