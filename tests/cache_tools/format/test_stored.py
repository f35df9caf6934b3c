import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_tools.codecs.presets import PRESETS, PresetName, resolve_codecs
from cache_tools.codecs.sparse import MAX_CLASSES
from cache_tools.config import Frozen
from cache_tools.errors import FormatError, NotFoundError, UnknownFormatError
from cache_tools.format.arrays import CHUNK_BYTES, array_name, constant_shapes, default_block_rows, target_arrays
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import CacheRecipe, FusionRecipe
from cache_tools.format.stored import group_attributes, manifest_attribute, parse_group, parse_manifest
from tests.support.cache_factory import tiny_images, tiny_manifest

MANIFEST = tiny_manifest(tiny_images())
SEVERAL = tiny_manifest(
    tiny_images(), store="components", teacher_weights=(0.5, 0.3, 0.2), clip_weights=(0.25, 0.75), linear_head=False
)


def stored(manifest: Manifest = MANIFEST) -> dict[str, object]:
    """The attribute as read from zarr.json."""
    return json.loads(json.dumps(manifest_attribute(manifest)))


def sized(num_samples: int, num_classes: int, **recipe: object) -> CacheRecipe:
    dataset = MANIFEST.recipe.dataset.model_copy(
        update={"num_samples": num_samples, "class_names": tuple(map(str, range(num_classes)))}
    )
    return MANIFEST.recipe.model_copy(update={"dataset": dataset, **recipe})


def changed(model: Frozen, **fields: object) -> Frozen:
    return model.model_copy(update=fields)


def test_a_manifest_round_trips_through_json() -> None:
    for manifest in (MANIFEST, SEVERAL):
        assert parse_group(json.loads(json.dumps(group_attributes(manifest))), where="here") == manifest


def test_the_fingerprint_covers_the_recipe_and_nothing_else() -> None:
    recipe = MANIFEST.recipe
    others = [
        recipe.model_copy(update={"codecs": resolve_codecs("float32", 5)}),
        recipe.model_copy(update={"derived_from": "ab" * 32}),
        recipe.model_copy(update={"fusion": FusionRecipe(feature_dim=8, teacher_weight=0.6)}),
        recipe.model_copy(update={"views": recipe.views.model_copy(update={"base_seed": 8})}),
        recipe.model_copy(update={"teachers": (changed(recipe.teacher, weights_digest="ab" * 31 + "ac"),)}),
        recipe.model_copy(update={"teachers": (changed(recipe.teacher, weight=0.5),) * 2}),
        recipe.model_copy(update={"teachers": tuple(changed(recipe.teacher, weight=w) for w in (0.25, 0.75))}),
        recipe.model_copy(update={"clips": (changed(recipe.clip, class_names=("one", "2", "3", "4", "5")),)}),
        recipe.model_copy(update={"fusion": FusionRecipe(feature_dim=8, prompt_ensemble="logits")}),
        recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"content_digest": "0"})}),
    ]
    assert len({recipe.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)
    grown = tiny_manifest(tiny_images(), num_views=9, block_rows=32, name="other")
    assert grown.fingerprint == MANIFEST.fingerprint


@pytest.mark.parametrize("key", sorted(MANIFEST.model_dump()))
def test_a_changed_or_missing_field_is_found(key: str) -> None:
    missing = {name: value for name, value in stored().items() if name != key}
    with pytest.raises(FormatError):
        parse_manifest(missing, where="here")
    with pytest.raises(FormatError):
        parse_manifest({**stored(), key: {"not": "this"}}, where="here")


@pytest.mark.parametrize("attribute", [None, [], 3])
def test_an_attribute_that_is_not_a_manifest(attribute: object) -> None:
    with pytest.raises(FormatError, match="not a teacher cache"):
        parse_manifest(attribute, where="here")


@pytest.mark.parametrize("version", [None, "1", 1, 3, [2]])
def test_another_format_version_is_refused(version: object) -> None:
    """It may be sound, so the error has a class of its own and names the version."""
    with pytest.raises(UnknownFormatError) as caught:
        parse_manifest({**stored(), "format_version": version}, where="here")
    assert f"unknown cache format version (here); expected 2; found {version!r}. Open it with" in str(caught.value)


def test_a_wrong_fingerprint_with_a_right_digest_is_refused() -> None:
    forged = stored(MANIFEST.model_copy(update={"fingerprint": "0" * 64}))
    with pytest.raises(FormatError, match="fingerprint disagree"):
        parse_manifest(forged, where="here")


def test_every_flipped_character_of_the_manifest_is_found() -> None:
    text = json.dumps(stored())
    for position in range(0, len(text), 7):
        damaged = text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :]
        try:
            attribute = json.loads(damaged)
        except ValueError:
            continue
        with pytest.raises(FormatError):
            parse_manifest(attribute, where="here")


def test_blocks_cover_every_sample_once() -> None:
    rows = [row for block in range(MANIFEST.num_blocks) for row in range(75)[MANIFEST.block(block)]]
    assert rows == list(range(75))
    assert MANIFEST.num_blocks == 5


@given(
    st.integers(1, 3_000_000),
    st.integers(2, 22_000),
    st.sampled_from(["fused", "components"]),
    st.sampled_from(sorted(PRESETS)),
)
def test_a_block_is_a_whole_number_of_chunks_of_at_most_8_mib(
    num_samples: int, num_classes: int, store: str, codec: PresetName
) -> None:
    recipe = sized(num_samples, num_classes, store=store, codecs=resolve_codecs(codec, num_classes))
    rows = default_block_rows(recipe)
    assert 64 <= rows <= 16_384
    assert rows <= max(64, 2 * num_samples)
    for spec in target_arrays(recipe, rows):
        assert rows % spec.chunk_rows == 0
        assert spec.chunk_rows * spec.stored.row_bytes <= CHUNK_BYTES


def test_array_names_follow_store_and_head() -> None:
    images = tiny_images()
    linear = tiny_manifest(images, store="components")
    other = tiny_manifest(images, store="components", linear_head=False)
    assert [spec.name for spec in target_arrays(MANIFEST.recipe, 16)] == ["fused_logits", "fused_features"]
    assert [spec.name for spec in target_arrays(linear.recipe, 16)] == ["teacher_features", "clip_features"]
    assert "teacher_logits" in [spec.name for spec in target_arrays(other.recipe, 16)]
    assert "teacher_head_weight" in constant_shapes(linear.recipe)
    assert "teacher_head_weight" not in constant_shapes(other.recipe)
    assert set(constant_shapes(MANIFEST.recipe)) == {"teacher_projection", "clip_projection", "class_embeddings"}


def test_each_network_has_its_own_arrays() -> None:
    """The first network's arrays have no number. Commits list all networks of one kind of array, then the next kind."""
    assert [array_name("x", number) for number in range(3)] == ["x", "x_2", "x_3"]
    assert [(spec.name, spec.width) for spec in target_arrays(SEVERAL.recipe, 16)] == [
        ("teacher_features", 12), ("teacher_features_2", 15), ("teacher_features_3", 18),
        ("clip_features", 10), ("clip_features_2", 12),
        ("teacher_logits", 5), ("teacher_logits_3", 5),
    ]  # fmt: skip
    shapes = constant_shapes(SEVERAL.recipe)
    assert shapes["teacher_projection_3"] == (18, 8)
    assert shapes["teacher_head_weight_2"] == (5, 15)
    assert not {"teacher_head_weight", "teacher_head_weight_3"} & set(shapes)
    assert shapes["text_features_2"] == (3, 5, 12)
    assert shapes["class_embeddings_2"] == (5, 12)
    fused = SEVERAL.recipe.model_copy(update={"store": "fused"})
    assert [spec.name for spec in target_arrays(fused, 16)] == ["fused_logits", "fused_features"]
    assert set(constant_shapes(fused)) == {
        "teacher_projection", "teacher_projection_2", "teacher_projection_3",
        "clip_projection", "clip_projection_2", "class_embeddings", "class_embeddings_2",
    }  # fmt: skip


def test_top_k_refuses_more_classes_than_its_codes_can_number() -> None:
    recipe = sized(75, MAX_CLASSES + 1, codecs=resolve_codecs("top-k", MAX_CLASSES + 1))
    with pytest.raises(FormatError, match=r"too many classes for top-k \(codec\).*Choose another codec"):
        target_arrays(recipe, 16)
    forged = MANIFEST.model_copy(update={"recipe": recipe, "fingerprint": recipe.fingerprint})
    with pytest.raises(FormatError, match=r"too many classes for top-k \(here\); expected at most 32,767"):
        parse_manifest(stored(forged), where="here")


def test_properties_of_the_first_network() -> None:
    assert (SEVERAL.recipe.teacher, SEVERAL.recipe.clip) == (SEVERAL.recipe.teachers[0], SEVERAL.recipe.clips[0])
    assert (SEVERAL.clip_scale, SEVERAL.clip_scales) == (100.0, (100.0, 50.0))
    assert SEVERAL.recipe.teacher_weights == (0.5, 0.3, 0.2)
    assert SEVERAL.recipe.clip_weights == (0.25, 0.75)


def test_a_manifest_without_a_scale_for_each_clip_is_refused() -> None:
    attribute = stored(SEVERAL.model_copy(update={"clip_scales": (100.0,)}))
    with pytest.raises(FormatError, match="2 CLIPs have 1 scales"):
        parse_manifest(attribute, where="here")


# One group of networks

TEACHERS = tiny_manifest(tiny_images(), canaries=False, teacher_weights=(0.25, 0.75), clip_weights=())
CLIP_ALONE = tiny_manifest(tiny_images(), canaries=False, teacher_weights=(), store="components")


@pytest.mark.parametrize(
    ("manifest", "fingerprint"),
    [
        (TEACHERS, "960e5709c3578cd2"),
        (CLIP_ALONE, "c7d14596c36ccc0d"),
    ],
)
def test_a_manifest_without_a_group_round_trips_with_this_fingerprint(manifest: Manifest, fingerprint: str) -> None:
    assert parse_group(json.loads(json.dumps(group_attributes(manifest))), where="here") == manifest
    assert manifest.fingerprint.startswith(fingerprint)
    data = manifest.recipe.model_dump(mode="json")
    assert [] in (data["teachers"], data["clips"])
    assert {data["fusion"]["teacher_weight"], data["fusion"]["feature_weight"]} == {1.0 if data["teachers"] else 0.0}


def test_a_missing_group_has_no_first_network() -> None:
    assert TEACHERS.recipe.teacher == TEACHERS.recipe.teachers[0]
    assert CLIP_ALONE.recipe.clip == CLIP_ALONE.recipe.clips[0]
    with pytest.raises(NotFoundError, match="this cache has no CLIP"):
        _ = TEACHERS.recipe.clip
    with pytest.raises(NotFoundError, match="this cache has no CLIP"):
        _ = TEACHERS.clip_scale
    with pytest.raises(NotFoundError, match="this cache has no teacher"):
        _ = CLIP_ALONE.recipe.teacher


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        (TEACHERS.recipe, {"teachers": ()}, "a cache needs a teacher or a CLIP"),
        (TEACHERS.recipe, {"fusion": FusionRecipe()}, "teachers alone has teacher_weight and feature_weight 1"),
        (CLIP_ALONE.recipe, {"fusion": FusionRecipe(teacher_weight=0.0)}, "CLIPs alone has teacher_weight"),
    ],
    ids=["no networks", "weights of a teacher", "weights of a CLIP"],
)
def test_recipes_whose_weights_contradict_their_groups_are_refused(
    recipe: CacheRecipe, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        CacheRecipe.model_validate(recipe.model_copy(update=changes).model_dump())
