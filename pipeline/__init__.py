"""Stage one: images → views → teacher and CLIP → fused targets → cache."""
