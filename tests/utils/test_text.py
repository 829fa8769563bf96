"""Text fits the terminal."""

import io
import sys
import time
from types import SimpleNamespace

import pytest

from finetune.utils.text import align_columns, duration, fill_lines, look_alikes, progress, readable, spell_out


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


def test_names_are_readable_in_one_line():
    """Bytes that are no UTF-8 have a mark; line breaks, tabs and terminals' commands are escaped; all else stays."""
    assert readable("a\udce9\n\t\x1b[1m\u2028\x85") == "a\ufffd\\n\\t\\x1b[1m\\u2028\\x85"
    assert readable("\ud83d is half of \udc26") == "\ufffd is half of \ufffd"
    assert readable("猫 café\u200b 🐦") == "猫 café\u200b 🐦"


@pytest.mark.parametrize(
    "name,other,spelt",
    [
        ("cat", "cat ", ["'cat'", "'cat '"]),
        ("собака", "соб\u200bака", ["'собака'", r"'соб\u200bака'"]),
        ("caf\xe9", "cafe\u0301", [r"'caf\xe9'", r"'cafe\u0301'"]),
        ("a b", "a\xa0b", ["'a b'", r"'a\xa0b'"]),
    ],
)
def test_names_that_look_alike_are_found(name, other, spelt):
    """Spaces, invisible characters and forms of Unicode; spelt out, they differ. Case and the same name do not count."""
    assert look_alikes([name, "dog", "Dog", "d0g", other, other[:2]]) == [(name, other)]
    assert look_alikes([name, name]) == [] and spell_out([name, other]) == spelt


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
