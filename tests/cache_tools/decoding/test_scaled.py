"""JPEGs that are decoded at a part of their size: never below a view, and the same pixels whoever decodes them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cache_tools.decoding.packing import find_packed, make_packed, pack_in_memory, packed_bytes
from cache_tools.decoding.service import DecodeService, start_loading
from cache_tools.images import open_images
from cache_tools.images.decode import PixelRules, _scale, decode_picture, decoded_size
from cache_tools.images.folder import FolderImages
from cache_tools.reader import TeacherCache
from cache_tools.views import ViewRecipe, load_each
from pipeline.build.cache import build_cache
from pipeline.replay import replay
from tests.support import tiny_build, tiny_run
from tests.support.pictures import photo, recipe_for
from train.feed.tiers import choose_tier
from train.recipe.pixels import PixelRecipe

CROP = {"op": "random-resized-crop", "size": 24, "scale": [0.25, 1]}


def recipe(**changes: Any) -> ViewRecipe:
    return ViewRecipe.model_validate({"decoding": "scaled", "ops": [CROP, "flip"]} | changes)


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderImages:
    """Pictures that are decoded whole, at 1/2, at 1/4 and at 1/8; one turned by EXIF, one in CMYK, one PNG."""
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    folder, *others = (tmp_path / "train" / name for name in tiny_run.CLASSES)
    for each in (folder, *others):
        each.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, (width, height) in enumerate([(50, 40), (120, 90), (260, 201), (500, 420), (437, 399)]):
        (folder / f"{number}.jpg").write_bytes(jpeg(photo(width, height, number)))
    (folder / "turned.jpg").write_bytes(jpeg(photo(300, 200), exif=exif))
    (others[0] / "cmyk.jpg").write_bytes(jpeg(photo(300, 200).convert("CMYK")))
    photo(300, 200).save(others[1] / "whole.png")
    images = open_images(recipe_for(tmp_path, test_split=None))
    assert isinstance(images, FolderImages)
    return images


sides = st.integers(1, 9000)
shares = st.sampled_from([0.08, 0.25, 0.5, 1.0])
ratios = st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.5, 0.6), (1.5, 2.0)])


@given(sides, sides, shares, ratios, st.sampled_from([16, 64, (40, 24), (16, 96)]), st.sampled_from([None, 48]))
def test_no_box_is_smaller_than_a_view(
    height: int, width: int, share: float, ratio: tuple[float, float], size: Any, clip: int | None
) -> None:
    """Boxes of a random crop, of its clean view, and of a centre crop, on the picture upright and turned."""
    crop = {"op": "random-resized-crop", "size": size, "scale": [share, 1], "ratio": ratio}
    for op in (
        crop,
        {"op": "resize-centre-crop", "size": size},
        {"op": "resize-centre-crop", "size": size, "resize": 99},
    ):
        views = recipe(ops=[op], sizes={"clip": clip}, clean_first=True)
        scale = _scale(height, width, PixelRules().with_needs(views.needed))
        if scale == 1:
            continue
        needed = np.maximum(views.crop_size or (0, 0), clip or 0)
        for shape in ((height, width), (width, height)):
            decoded = (-(-shape[0] // scale), -(-shape[1] // scale))
            for view in (0, 1):
                drawn = views.parameters(np.arange(40), view, decoded)
                boxes = [drawn[f"0.{op['op']}.{name}"] for name in ("height", "width")]
                assert (np.stack(boxes, axis=1) >= needed).all()


def test_the_size_is_that_of_the_header_divided(images: FolderImages) -> None:
    rules = images.rules.with_needs(recipe().needed)
    scales = {}
    for row in range(len(images)):
        data, name = images.read(row), Path(images.name_of(row)).name
        whole, part = decode_picture(data, name, images.rules), decode_picture(data, name, rules)
        turned = slice(None, None, -1) if name == "turned.jpg" else slice(None)
        assert decoded_size(data, rules) == part.shape[:2][turned]
        scales[name] = round(whole.shape[0] / part.shape[0])
        assert abs(float(whole.mean()) - float(part.mean())) < 1.5, "the same picture"
    expected = {
        "0.jpg": 1,
        "1.jpg": 1,
        "2.jpg": 2,
        "3.jpg": 8,
        "4.jpg": 4,
        "turned.jpg": 4,
        "cmyk.jpg": 4,
        "whole.png": 1,
    }
    assert scales == expected


@pytest.fixture(scope="module")
def service() -> Iterator[DecodeService]:
    """One process that decodes pictures."""
    made = DecodeService(1)
    yield made
    made.close()


@pytest.mark.medium
@pytest.mark.parametrize("sizes", [{}, {"student": 16, "clip": 40}])
def test_pixels_are_the_same_whoever_decodes(
    images: FolderImages, service: DecodeService, sizes: dict[str, int]
) -> None:
    """Threads, processes, memory and a pixel file; and each network's crop is of one decoding."""
    views = recipe(sizes=sizes)
    rows = np.arange(len(images))
    wanted = [(views.seen_by(network), view) for view in (0, 1) for network in ("student", "clip")]
    pictures = [torch.from_numpy(each) for each in images.decoded_for(views.needed).pictures(rows)]
    expected = [of_network.crop(pictures, rows, view) for of_network, view in wanted]
    whole = load_each(images, rows, rows, [(recipe(decoding="full"), 1)])[0]
    assert sizes or not torch.equal(expected[2], whole)
    scaled = images.decoded_for(views.needed)
    packed = make_packed(scaled, canvases=False, budget=10**8)
    assert packed.file.path.stat().st_size == packed_bytes(scaled, canvases=False)
    assert find_packed(images, canvases=False) is None, "the file has not the whole pictures"
    in_memory = pack_in_memory(scaled)
    assert in_memory is not None
    sources = [(images, None), (images, service), (scaled, service), (in_memory, None), (packed, None)]
    for source, by in [*sources, (packed, service)]:
        found = start_loading(by, source, rows, rows, wanted, pin=False)()
        assert all(map(torch.equal, found, expected))
    full = start_loading(service, packed, rows, rows, [(recipe(decoding="full"), 1)], pin=False)()
    assert torch.equal(full[0], whole), "a file of smaller pictures is not used for whole ones"
    tier = choose_tier(images, views, torch.device("cpu"), PixelRecipe(host_memory=0, disk=10**8))
    assert tier.name == "disk"


@pytest.mark.medium
def test_a_cache_of_scaled_pictures_replays(images: FolderImages, tmp_path: Path) -> None:
    tiny_build.write_teacher(tmp_path / "teacher.safetensors")
    views = {"decoding": "scaled", "ops": [CROP, "flip"]}
    wanted = tiny_build.recipe(tmp_path, dataset=recipe_for(images.summary.root.parent, test_split=None), views=views)
    build_cache(wanted)
    cache = TeacherCache.open(tmp_path / "cache.zarr")
    assert cache.recipe.views.decoding == "scaled"
    assert cache.recipe.views.needed == wanted.views.needed
    assert not any(target.wrong_rows for target in replay(cache, images, 4).targets)


def test_the_default_keeps_the_bytes_of_a_recipe() -> None:
    plain = ViewRecipe.model_validate({"ops": [CROP], "version": 2})
    assert plain == recipe(decoding="full", ops=[CROP], version=2)
    assert "decoding" not in plain.model_dump_json(exclude_defaults=True)
    assert plain.needed is None
    assert recipe().version == 2


@pytest.mark.parametrize("changes", [{"version": 1}, {"ops": ["flip"]}, {"ops": []}])
def test_views_of_a_canvas_refuse_it(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="decoding: scaled needs views of version 2 whose first op is a crop"):
        recipe(**changes)
