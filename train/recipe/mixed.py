"""Which settings of a run go with views that mix two images (MixUp, CutMix). Importable without torch."""

from __future__ import annotations

from cache_tools.errors import RecipeError
from cache_tools.views.recipe import ViewRecipe
from train.recipe.loss import LossRecipe


def shows_mixed_views(views: ViewRecipe, num_views: int | None) -> bool:
    """Whether a run on views 0 … num_views − 1 (None: on any) sees mixed images, not the clean view 0 alone."""
    return views.mix is not None and not (views.clean_first and num_views == 1)


def check_mixed_views(
    views: ViewRecipe,
    num_views: int | None,
    where: object,
    *,
    loss: LossRecipe,
    label_fraction: float,
    batch_size: int,
    shuffle_window: int | None,
) -> None:
    """Raise RecipeError if a run has settings for images with one label each, and its views mix two.

    Args:
        views, num_views: of the run or of its cache.
        where: the recipe or the cache, for the error.
        loss, label_fraction, batch_size, shuffle_window: of the run.
    """
    if not shows_mixed_views(views, num_views):
        return
    unfit = {
        f"loss.kind: {loss.kind}": loss.multi_label or (loss.needs_logits and loss.kind in {"dkd", "standardised_dkd"}),
        f"loss.feature: {loss.feature}": loss.needs_features and loss.feature == "crd",
        "loss.class_weights": loss.class_weights != "none",
        f"label_fraction: {label_fraction:g}": label_fraction < 1.0,
    }
    if found := [name for name, is_used in unfit.items() if is_used]:
        raise RecipeError(
            "these settings need images of one class, and the views mix two images (views.mix)",
            where=where,
            expected="a loss of ce, kd or standardised_kd, with any feature term but crd, and all labels",
            found=", ".join(found),
            next_step="choose --loss kd, or a cache whose views are not mixed",
        )
    if shuffle_window is not None:
        raise RecipeError(
            "a shuffle window separates two images that a view mixes (views.mix): they lie in different blocks",
            where=where,
            expected="no shuffle_window",
            found=shuffle_window,
            next_step="leave --shuffle-window out, or use a cache whose views are not mixed",
        )
    if batch_size % 2:
        raise RecipeError(
            "an odd batch size separates two images that a view mixes (views.mix)",
            where=where,
            expected="an even batch_size",
            found=batch_size,
            next_step=f"choose --batch-size {batch_size + 1}",
        )


def check_mixed_part(views: ViewRecipe, num_views: int | None, where: object, split: str) -> None:
    """Raise RecipeError for a part of the samples of a cache: their partners are in the other parts too."""
    if shows_mixed_views(views, num_views):
        raise RecipeError(
            "the views mix images of the whole cache, so a part of it shows images of the other parts (views.mix)",
            where=where,
            expected="the split of the cache",
            found=split,
            next_step="leave dataset.split out, or build a cache of this part",
        )
