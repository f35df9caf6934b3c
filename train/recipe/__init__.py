"""Training recipes: the settings of a run, and how commands read them. Importable without torch."""

from train.recipe.settings import TrainRecipe, all_fields, as_changes, default_fields, has_name, recipe_digest

__all__ = ["TrainRecipe", "all_fields", "as_changes", "default_fields", "has_name", "recipe_digest"]
