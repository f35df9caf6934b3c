"""Tables that fit the screen, and figures in a fixed number of digits."""

from __future__ import annotations

import os
import pty
import sys

import pytest

from cache_tools.screen import TextTable, count, nats, screen_width

LONG = "timm:mobilenetv4_conv_small_050"


def table(*rows: tuple[str, ...], names: int = 1) -> TextTable:
    found = TextTable(["student", "top-1 of the last epoch", "95 % interval", "parameters"], names=names)
    for row in rows:
        found.add_row(*row)
    return found


ROWS = (("resnet8", "90.00 ± 0.12", "±0.30", "78,042"), (LONG, "66.72 ± 3.20", "±7.95", "971,234"))


def test_a_wide_screen_has_one_line_per_row() -> None:
    assert table(*ROWS).text(100).splitlines() == [
        "student                          top-1 of the last epoch  95 % interval  parameters",
        "resnet8                                     90.00 ± 0.12          ±0.30      78,042",
        f"{LONG}             66.72 ± 3.20          ±7.95     971,234",
    ]


def test_titles_are_wrapped_first() -> None:
    assert table(*ROWS).text(75).splitlines() == [
        "                                 top-1 of the      95 %",
        "student                            last epoch  interval  parameters",
        "resnet8                          90.00 ± 0.12     ±0.30      78,042",
        f"{LONG}  66.72 ± 3.20     ±7.95     971,234",
    ]


@pytest.mark.parametrize("width", [20, 32, 40, 50])
def test_then_a_row_becomes_several_lines_and_nothing_is_cut(width: int) -> None:
    lines = table(*ROWS).text(width).splitlines()
    assert max(map(len, lines)) <= max(width, len(LONG), len("  top-1 of the last epoch"))
    words = " ".join(lines).split()
    for row in ROWS:
        assert set(" ".join(row).split()) <= set(words)
    first = lines.index(LONG)
    assert "66.72 ± 3.20" in lines[first + 1], "the figures are below the name"


def test_names_may_take_several_columns() -> None:
    found = TextTable(["name", "fingerprint", "views", "size"], names=2)
    found.add_row("a-cache-with-a-long-name", "0123456789ab", "4/4", "1.2 GB")
    assert found.text(80).splitlines()[1] == "a-cache-with-a-long-name  0123456789ab    4/4  1.2 GB"
    assert found.text(40).splitlines() == [
        "name  fingerprint", "  views    size", "a-cache-with-a-long-name  0123456789ab", "    4/4  1.2 GB",
    ]  # fmt: skip


def test_wide_and_control_characters() -> None:
    found = TextTable(["class", "n"])
    found.add_row("猫", "1")
    found.add_row("a\x1b[2J", "22")
    assert found.text(40).splitlines() == ["class      n", "猫         1", "a\\x1b[2J  22"]


def test_a_title_and_missing_cells() -> None:
    found = TextTable(["class", "n"], title="Classes")
    found.add_row("only a name")
    assert found.text(40).splitlines() == ["Classes", "class        n", "only a name"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.5, "0.5000"), (12.34567, "12.3457"), (999.9, "999.9000"), (1000.0, "1.00e+03"),
     (3.8e22, "3.80e+22"), (3.4e38, "3.40e+38")],
)  # fmt: skip
def test_likelihoods_have_a_fixed_width(value: float | None, text: str) -> None:
    assert nats(value) == text
    assert len(text) <= 8


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "–"), (0, "0"), (999, "999"), (77_717, "77.7 k"), (3_922_410, "3.92 M"), (1.92e8, "192 M"), (4e9, "4.00 G"),
     (1.5e12, "1.50 T"), (25_000_000, "25.0 M"), (999_600, "1.00 M"), (999_400, "999 k")],
)  # fmt: skip
def test_large_numbers_have_three_digits(number: int | None, text: str) -> None:
    assert count(number) == text


def test_the_width_is_that_of_the_variable_or_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert (screen_width(), screen_width(400)) == (80, 400), "the output is no terminal"
    monkeypatch.setenv("COLUMNS", "97")
    assert screen_width(400) == 97
    monkeypatch.setenv("COLUMNS", "0")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert screen_width(400) == 80, "a terminal that does not know its width"
        import fcntl
        import struct
        import termios

        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 132, 0, 0))
        assert screen_width() == 132
    os.close(ours)
