"""What the pictures of an evaluation share: colours and the way to bytes."""

from __future__ import annotations

import io
from typing import Any

# Okabe and Ito's colours, told apart with every common colour blindness.
BLUE, VERMILLION, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8a8a8a", "#222222"


def png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
