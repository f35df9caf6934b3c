"""Mixed views: the pairs of a view, their shares and boxes, and the pixels, against plain recomputations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from cache_tools.errors import DataError, RecipeError
from cache_tools.views import ViewRecipe
from cache_tools.views.mix import BINS, MixRecipe, Pairing, beta_bins, beta_share, draw_cut
from cache_tools.views.ops import ONE

BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
WORDS = np.random.default_rng(1).integers(0, 1 << 32, 100_000, dtype=np.uint32)
# Of `recipe(ops=[…crop, flip])` over 1000 samples: they must never change within version 2.
PINNED_PARTNERS = [788, 587, 766, 85, 767, 735, 368, 851]
PINNED_DIGEST = 12832531691645467121


def recipe(count: int | None = None, **changes: Any) -> ViewRecipe:
    views = ViewRecipe.model_validate({"mix": BOTH} | changes)
    return views if count is None else views.over(count)


def images(count: int, height: int = 14, width: int = 18) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )


@given(count=st.integers(1, 3000), seed=st.integers(0, (1 << 64) - 1), view=st.integers(0, (1 << 32) - 1))
@settings(max_examples=150, deadline=None)
def test_pairs_are_an_involution(count: int, seed: int, view: int) -> None:
    pairs, samples = Pairing(seed, view, count), np.arange(count)
    partners = pairs.partners(samples)
    assert np.array_equal(partners[partners], samples)
    assert (partners == samples).sum() == count % 2
    order = pairs.samples(samples)
    assert np.array_equal(np.sort(order), samples)
    assert np.array_equal(pairs.positions(order), samples)
    for number in range(count // 2):
        assert partners[order[2 * number]] == order[2 * number + 1]
    some = np.random.default_rng(0).permutation(count)[:7]
    assert np.array_equal(pairs.partners(some), partners[some])


@pytest.mark.parametrize(("count", "pairings"), [(4, 3), (5, 15), (6, 15)])
def test_every_pairing_of_a_few_samples_is_equally_likely(count: int, pairings: int) -> None:
    drawn = [tuple(Pairing(9, view, count).partners(np.arange(count))) for view in range(400)]
    seen = np.unique(np.array(drawn), axis=0, return_counts=True)[1]
    assert len(seen) == pairings
    assert stats.chisquare(seen).pvalue > 1e-3


def test_classes_of_partners_are_independent() -> None:
    """Chi-square over a split sorted by class, in which neighbours have the same label."""
    labels = np.repeat(np.arange(10), 600)
    for view in range(5):
        partners = recipe(len(labels)).mixing(range(len(labels)), view, (8, 8)).partner
        first = partners > np.arange(len(labels))  # each pair once
        table = np.zeros((10, 10))
        np.add.at(table, (labels[first], labels[partners[first]]), 1)
        table += table.T  # the order in a pair has no meaning: 55 cells, of which the diagonal counts once
        upper = np.triu_indices(10)
        expected = np.outer([600.0] * 10, [600.0] * 10) / 6000
        observed, wanted = table[upper], expected[upper]
        halved = np.where(upper[0] == upper[1], 0.5, 1.0)
        statistic = ((observed - wanted) ** 2 / wanted * halved).sum()
        assert 1e-3 < stats.chi2.sf(statistic, 45) < 1 - 1e-3
    assert len({tuple(recipe(6000).with_partners([0, 1, 2], view)) for view in range(5)}) == 5


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.8, 1.0, 2.0, 32.0])
def test_shares_have_the_beta_distribution(alpha: float) -> None:
    exact = stats.beta(alpha, alpha)
    expected = exact.cdf(np.arange(BINS + 1) / BINS) * 2.0**32
    assert np.abs(beta_bins(alpha) - expected).max() <= 1.0
    assert beta_bins(alpha)[[0, -1]].tolist() == [0, 1 << 32]
    shares = beta_share(WORDS, alpha)
    assert shares.min() >= 0
    assert shares.max() < ONE
    ends = np.bincount(shares * BINS // ONE, minlength=BINS)
    few = np.add.reduceat(ends, np.arange(0, BINS, 128))
    probability = np.diff(exact.cdf(np.arange(0, BINS + 1, 128) / BINS))
    kept = probability * len(shares) > 5
    merged = np.append(few[kept], few[~kept].sum()), np.append(probability[kept], probability[~kept].sum())
    used = merged[1] > 0
    assert stats.chisquare(merged[0][used], merged[1][used] * len(shares)).pvalue > 1e-3


def test_boxes_have_the_sides_and_the_centre_of_cutmix() -> None:
    """√(1 − λ) of each side about a uniform centre, cut at the edges, as timm's `rand_bbox`."""
    rng, sides = np.random.default_rng(2), (37, 50)
    shares = rng.integers(0, ONE, 300)
    words = rng.integers(0, 1 << 32, (2, 300), dtype=np.uint32)
    boxes = draw_cut(shares, words[0], words[1], sides)
    for k, share in enumerate(shares):
        for axis, names in enumerate((("top", "height"), ("left", "width"))):
            length = sides[axis]
            cut, centre = int(length * math.sqrt(1 - share / ONE)), int(words[axis, k]) * length >> 32
            first, end = max(centre - cut // 2, 0), min(centre + (cut + 1) // 2, length)
            assert [int(boxes[name][k]) for name in names] == [first, end - first]
    drawn = MixRecipe(cutmix_alpha=1.0).draw(5, 2, np.arange(300), sides)
    exact = 1 - drawn["height"] * drawn["width"] / (37 * 50)
    assert np.abs(drawn["share"] / ONE - exact).max() <= 0.5 / ONE
    assert len(np.unique(drawn["height"])) > 20


def test_how_often_pairs_are_mixed_and_how() -> None:
    pairs = np.arange(20_000)
    drawn = MixRecipe(**BOTH, probability=0.7, cutmix_probability=0.25).draw(1, 1, pairs, (64, 64))
    mixed_up, cut = drawn["own"] < ONE, drawn["height"] > 0
    assert not (mixed_up & cut).any()
    assert abs(mixed_up.mean() - 0.7 * 0.75) < 0.012
    assert abs(cut.mean() - 0.7 * 0.25) < 0.012  # all but boxes of less than a pixel
    assert np.array_equal(drawn["share"][~cut], drawn["own"][~cut])
    assert (MixRecipe(mixup_alpha=1.0).draw(1, 1, pairs, (64, 64))["height"] == 0).all()
    gate = MixRecipe(**BOTH, probability=0.7).draw_gate(1, 1, pairs)
    assert np.array_equal(gate, (MixRecipe(mixup_alpha=1.0, probability=0.7).draw(1, 1, pairs, (9, 9))["own"] < ONE))


@pytest.mark.parametrize("mix", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, BOTH | {"probability": 0.8}])
def test_pixels_are_weighted_means_of_the_two_views(mix: dict[str, float]) -> None:
    """Every pixel in float64, from the views of both samples before they are mixed."""
    ops = [{"op": "random-resized-crop", "size": [12, 10]}, "flip"]
    views, count = recipe(21, ops=ops, mix=mix), 21
    plain = views.model_copy(update={"mix": None})
    canvas, everyone = images(count), np.arange(count)
    before = plain.apply(canvas, everyone, 3).double().numpy()
    mixed = views.apply(canvas, everyone, 3).numpy()
    drawn = views.parameters(everyone, 3, (14, 18))
    differs = 0
    for i in range(count):
        weight = np.full((12, 10), drawn["mix.own"][i] / ONE)
        top, left, height, width = (drawn[f"mix.{name}"][i] for name in ("top", "left", "height", "width"))
        weight[top : top + height, left : left + width] = 0.0
        exact = before[i] * weight + before[drawn["mix.partner"][i]] * (1 - weight)
        assert np.abs(mixed[i] - exact).max() <= 0.5
        np.testing.assert_array_equal(mixed[i], np.floor(exact + 0.5))  # exact: float64 has 53 bits
        differs += not np.array_equal(mixed[i], before[i])
        mixing = views.mixing([i], 3, (14, 18))
        assert mixing is not None
        assert abs(mixing.share[0] - weight.mean()) <= 0.5 / ONE
        partner = views.mixing([mixing.partner[0]], 3, (14, 18))
        assert partner is not None
        assert (partner.partner[0], partner.share[0]) == (i, mixing.share[0])
    assert differs > 10


def test_a_batch_gives_the_pixels_of_each_sample_alone() -> None:
    views, canvas = recipe(21, ops=["pad-crop", "flip"]), images(21)
    everyone = views.apply(canvas, range(21), 5)
    for sample in range(21):
        shown = views.with_partners([sample], 5)
        assert shown[0] == sample
        assert len(shown) <= 2
        assert torch.equal(views.apply(canvas[shown], [sample], 5)[0], everyone[sample])
    whole = views.pairs(5)
    assert np.array_equal(views.with_partners(whole[4:10], 5), whole[4:10])
    assert torch.equal(views.apply(canvas[whole[4:10]], whole[4:10], 5), everyone[whole[4:10]])
    twice = np.array([7, 7, 3])
    assert torch.equal(views.apply(canvas[views.with_partners(twice, 5)], twice, 5), everyone[twice])


def test_decoded_pictures_of_several_sizes_are_mixed_as_views() -> None:
    views = recipe(9, ops=[{"op": "random-resized-crop", "size": 8}], sizes={"clip": 16})
    pictures = [images(1, 9 + k, 30 - 2 * k)[0] for k in range(9)]
    both = views.apply(pictures, range(9), 1)
    shown = views.with_partners([2], 1)
    assert torch.equal(views.apply([pictures[k] for k in shown], [2], 1)[0], both[2])
    larger = recipe(9, ops=views.ops, sizes={"clip": 16}, mix={"cutmix_alpha": 1.0}).seen_by("clip")
    assert larger.apply(pictures, range(9), 1).shape == (9, 3, 16, 16)
    plain = larger.model_copy(update={"mix": None}).apply(pictures, range(9), 1)
    drawn = larger.parameters(range(9), 1, (9, 30))
    seen = larger.apply(pictures, range(9), 1)
    for i, partner in enumerate(drawn["mix.partner"]):
        box = tuple(
            slice(2 * drawn[f"mix.{start}"][i], 2 * (drawn[f"mix.{start}"][i] + drawn[f"mix.{length}"][i]))
            for start, length in (("top", "height"), ("left", "width"))
        )
        expected = plain[i].clone()
        expected[:, box[0], box[1]] = plain[partner][:, box[0], box[1]]
        assert torch.equal(seen[i], expected)


@pytest.mark.parametrize("view", [0, 5])
@pytest.mark.parametrize("ops", [["pad-crop", "flip"], [{"op": "random-resized-crop", "size": 8}, "rand-augment"]])
def test_pixels_of_views_that_were_drawn_before_are_the_same(ops: list[Any], view: int) -> None:
    recipes = [recipe(21, ops=ops, clean_first=True), ViewRecipe(ops=ops)]
    if ops[0] != "pad-crop":
        recipes.append(recipe(21, ops=ops, sizes={"clip": 16}).seen_by("clip"))
    for views in recipes:
        index = [7, 3, 20]
        shown = views.with_partners(index, view)
        drawn = views.draw(index, view, (14, 18))
        assert np.array_equal(drawn.shown, shown)
        made = views.apply(images(21)[shown], index, view, drawn)
        assert torch.equal(made, views.apply(images(21)[shown], index, view))


def test_a_clean_first_view_stays_clean() -> None:
    views = recipe(20, ops=["pad-crop"], clean_first=True)
    assert torch.equal(views.apply(images(6), range(6), 0), images(6))
    assert views.mixing(range(6), 0, (14, 18)) is None
    assert not views.mixes(0)
    assert views.mixes(1)
    assert not any(name.startswith("mix") for name in views.parameters(range(6), 0, (14, 18)))
    assert any(name.startswith("mix") for name in views.parameters(range(6), 1, (14, 18)))


def test_draws_are_pinned() -> None:
    views = recipe(1000, ops=[{"op": "random-resized-crop", "size": 24}, "flip"])
    assert views.version == 2
    mixing = views.mixing(range(8), 3, (1, 1))
    assert mixing is not None
    assert mixing.partner.tolist() == PINNED_PARTNERS
    assert views.parameter_digest(range(1000), 3, (32, 32)) == PINNED_DIGEST
    assert recipe(999, ops=views.ops).parameter_digest(range(999), 3, (32, 32)) != PINNED_DIGEST


def test_what_a_recipe_without_mixing_stores_is_unchanged() -> None:
    assert "mix" not in ViewRecipe(version=2).model_dump_json()
    read = ViewRecipe.model_validate_json(recipe(5).model_dump_json())
    assert read == recipe()


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({}, "an alpha above 0"),
        ({"mixup_alpha": 0.001}, "0.01 to 32"),
        ({"mixup_alpha": 33}, "less than or equal to 32"),
        ({"cutmix_alpha": float("nan")}, "finite"),
        ({"cutmix_alpha": 1.0, "cutmix_probability": 0.3}, "mixup_alpha and cutmix_alpha are both above 0"),
    ],
)
def test_recipes_that_cannot_mix_are_refused(mix: dict[str, float], message: str) -> None:
    with pytest.raises((ValidationError, RecipeError), match=message):
        ViewRecipe.model_validate({"mix": mix})
    with pytest.raises((ValidationError, RecipeError), match="version 2"):
        ViewRecipe.model_validate({"version": 1, "mix": BOTH})


def test_views_without_their_partners_are_refused() -> None:
    with pytest.raises(DataError, match="number of samples"):
        recipe().apply(images(4), range(4), 1)
    views = recipe(100)
    with pytest.raises(DataError, match="with_partners"):
        views.apply(images(4), range(4), 1)
    with pytest.raises(DataError, match="below 100"):
        views.with_partners([100], 1)


@pytest.mark.cuda
def test_cuda_makes_the_same_pixels() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    views = recipe(40, ops=[{"op": "random-resized-crop", "size": 24}, "flip"])
    made = views.apply(images(40).cuda(), range(40), 3)
    assert torch.equal(made.cpu(), views.apply(images(40), range(40), 3))
