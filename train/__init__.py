"""Stage two: cached targets → student. Never imports `pipeline` or `open_clip`: no teacher can run at train time."""
