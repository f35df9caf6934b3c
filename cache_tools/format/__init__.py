"""The cache format: recipe, manifest, arrays, layout, commits. Nothing here needs torch."""
