"""Text fits the terminal."""

import io
import sys
import time
from types import SimpleNamespace

import pytest

from finetune.utils.text import align_columns, duration, fill_lines, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("width", [20, 31, 40])
def test_columns_are_cut_to_fit(width):
    """Lines are as long as asked for at most, what is cut ends in dots, and short columns and wide terminals lose nothing."""
    rows = [("name", "words", "n"), ("abc", "x" * 30, "1"), ("a name that is long", "short", "22")]
    lines = align_columns(rows, width=width).splitlines()
    assert max(map(len, lines)) == width and "..." in lines[1] and [line.split()[-1] for line in lines] == ["n", "1", "22"]
    assert align_columns(rows, width=57) == align_columns(rows) and "..." not in align_columns(rows)


def test_lines_are_filled_and_names_stay_whole():
    """No word, path or name with a hyphen is broken, whatever its length."""
    text = "a word " * 20 + "/a/path/" + "x" * 90 + " and top-1 " * 20
    filled = fill_lines(text)
    assert filled.split() == text.split() and all(len(line) <= 80 or line.startswith("/a/path") for line in filled.splitlines())


def test_durations_have_two_digits_or_so():
    """Seconds, minutes and hours change where the next unit has two digits."""
    assert [duration(s) for s in (0, 45.4, 99, 100, 720, 9000)] == ["0 s", "45 s", "99 s", "2 min", "12 min", "2.5 h"]


@pytest.mark.parametrize(
    "terminal, shown, notebook, bar", [(1, 1, 0, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 1, 1, 1), (0, 0, 1, 0)]
)
def test_a_bar_is_for_terminals_and_notebooks(monkeypatch, terminal, shown, notebook, bar):
    """It is drawn after a second, in a terminal or a notebook's kernel, unless it is not to be shown; items are the same."""
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    shell = SimpleNamespace(kernel=True) if notebook else None
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "ipykernel", sys)  # its import alone makes no notebook
    seen = []
    for item in progress("abc", 3, "epoch 3 of 8", bool(shown)):
        seen.append(item)
        time.sleep(0.7)
    assert seen == ["a", "b", "c"] and ("epoch 3 of 8  " in sys.stderr.getvalue()) == bool(bar)


def test_what_is_over_in_a_second_shows_no_bar(monkeypatch):
    """Not even when words are put behind it."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("abc", 3, "images") as bar:
        for _ in bar:
            bar.set_postfix_str("loss 1", refresh=False)
    assert sys.stderr.getvalue() == ""
