"""The cache format: recipe, manifest, arrays, layout, commits. Importable without torch."""
