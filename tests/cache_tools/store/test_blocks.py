from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cache_tools.errors import FormatError
from cache_tools.format import commits
from cache_tools.reader import TeacherCache
from cache_tools.store import blocks
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write

IMAGES = tiny_images()
MANIFEST = tiny_manifest(IMAGES)


def test_commits_are_read_again_only_while_blocks_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = blocks.read_commits

    def read_commits(*arguments: object) -> np.ndarray:
        reads.append(arguments)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks, "read_commits", read_commits)
    writer = create(tmp_path / "c", MANIFEST, IMAGES)
    write(writer, tiny_targets(MANIFEST), [(0, block) for block in range(MANIFEST.num_blocks)])
    cache = TeacherCache.open(tmp_path / "c")
    cache.load_view(0)
    cache.load_view(0)
    assert len(reads) == 1, "a block that was found is not looked for again"
    assert cache.complete_views == (0,)
    assert len(reads) == 2, "another builder may have finished a view"
    write(writer, tiny_targets(MANIFEST))
    assert cache.is_complete
    assert cache.is_complete
    cache.load_view(2)
    assert len(reads) == 3, "nothing can be added to a complete cache"


def test_commits_are_read_as_zarr_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks are missing. zarr reads only what is not sound, for its error."""
    writer = create(tmp_path / "c", MANIFEST, IMAGES)
    table: Any = zarr.open_array(tmp_path / "c" / "commits", mode="r")
    write(writer, tiny_targets(MANIFEST), [(0, 3), (2, 0)])
    for _ in range(2):
        quick = blocks.read_commits(table, tmp_path / "c", MANIFEST)
        assert quick.any()
        assert np.array_equal(quick, table[...])
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "_read_sound", lambda *_: None)
            assert np.array_equal(quick, blocks.read_commits(table, tmp_path / "c", MANIFEST))
        write(writer, tiny_targets(MANIFEST))
    file = tmp_path / "c" / "commits" / "c.1.2.0"
    sound = file.read_bytes()
    for damaged in (
        sound[:-1],
        sound + b"0",
        bytes([sound[0] ^ 1]) + sound[1:],
        sound[:-1] + bytes([sound[-1] ^ 1]),
        b"",
    ):
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"damaged commit.*c\.1\.2\.0"):
            blocks.read_commits(table, tmp_path / "c", MANIFEST)


def test_the_commit_of_a_block_has_the_digest_of_each_array(tmp_path: Path) -> None:
    build(tmp_path / "c", MANIFEST, IMAGES)
    cache = TeacherCache.open(tmp_path / "c")
    commit = cache.commit(1, 2)
    assert list(commit) == ["view_parameters", "fused_logits", "fused_features"]
    assert commit["fused_logits"] == commits.block_digest(cache.read_stored("fused_logits", 1, MANIFEST.block(2)))
