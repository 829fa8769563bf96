"""Text for the terminal: the nearest name, the first of many, lines and columns that fit, progress bars, streams that last."""

import argparse
import difflib
import json
import os
import re
import sys
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from io import TextIOWrapper
from itertools import islice
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm.std import tqdm

WIDTH = 80  # columns of a terminal that was never widened
STDOUT = "stdout"  # as a file's name


COLOURS = {"bold": 1, "red": 31, "green": 32, "yellow": 33}


def colour(text: str, name: str, stream: TextIO | None = None) -> str:
    """The text in a colour, or in bold, where the stream, by default stdout, is a terminal and NO_COLOR is not set.

    See https://no-color.org. Only a new terminal of Windows is known to have colours.
    """
    stream = stream or sys.stdout
    known = os.name != "nt" or "WT_SESSION" in os.environ
    if not stream or not stream.isatty() or not known or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{COLOURS[name]}m{text}\033[0m"


def escape_output() -> None:
    """Have stdout escape what it can't encode, such as a file name that is no UTF-8."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_error(text: object) -> None:
    """What a person can put right, on stderr."""
    print(f"{colour('finetune:', 'red', sys.stderr)} {text}", file=sys.stderr)


def show_result(args: argparse.Namespace, result: Any, text: Callable[[], str]) -> None:
    """Print what a verb has found: as JSON if that was asked for, else as text."""
    said = json.dumps(result, indent=1) if args.json else text()
    try:
        print(said, flush=True)
    except OSError as error:
        error.filename = STDOUT
        raise


def drop_output() -> None:
    """Send what is still to be printed nowhere, so that Python does not fail on it in the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@cache
def note(text: str) -> None:
    """What a person should know, on stderr: by the first process alone, and once."""
    if os.environ.get("RANK", "0") == "0":
        print_error(text)


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean X?' or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def list_few(names: Iterable[str], number: int) -> str:
    """The first ten of so many names, and how many more there are."""
    return ", ".join(islice(names, 10)) + (f" and {number - 10} more" if number > 10 else "")


def align_columns(rows: Sequence[Sequence[str]], numbers: bool = False, width: float = float("inf")) -> str:
    """Rows of cells as lines of text, to the left; where they hold `numbers`, all but the first column to the right.

    The widest columns are cut, their cells ending in "...", until lines are no longer than `width`.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > 4:
        widths[widths.index(max(widths))] -= 1
    rows = [
        [cell if len(cell) <= most else cell[: most - 3] + "..." for cell, most in zip(row, widths, strict=True)]
        for row in rows
    ]
    sides = [str.ljust, *[str.rjust if numbers else str.ljust] * (len(widths) - 1)]
    return "\n".join("  ".join(map(lambda cell, side, width: side(cell, width), row, sides, widths)).rstrip() for row in rows)


def fill_lines(text: str, width: float = WIDTH) -> str:
    """The text in lines no longer than `width`; words, paths and names stay whole."""
    if width == float("inf"):
        return text
    return "\n".join(
        textwrap.fill(line, int(width), break_long_words=False, break_on_hyphens=False) for line in text.splitlines()
    )


def readable(name: str) -> str:
    """A name in one line: as UTF-8, with a mark for what is not that, and escapes for line breaks and their like."""
    name = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", name)  # lone surrogates, but for those that stand for bytes
    text = name.encode(errors="surrogateescape").decode(errors="replace")
    return "".join(ascii(one)[1:-1] if unicodedata.category(one) in ("Cc", "Zl", "Zp") else one for one in text)


def as_seen(name: str) -> str:
    """A name as it looks: without invisible characters and outer spaces, in one form of Unicode."""
    visible = "".join(one for one in name if unicodedata.category(one) != "Cf")
    return " ".join(unicodedata.normalize("NFC", visible).split())


def look_alikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of names that differ only in what can't be seen, each name with the first that looks like it."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(as_seen(name), name), name) for name in names]
    return [(one, other) for one, other in pairs if one != other]


def spell_out(names: Sequence[str]) -> list[str]:
    """The names in quotes, what can't be seen as escapes; all but ASCII, where they would look alike still."""
    spelt = list(map(repr, names))
    return list(map(ascii, names)) if look_alikes(spelt) else spelt


def duration(seconds: float) -> str:
    """'45 s', '12 min' or '2.5 h'."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def progress(items: Iterable[Any] | None, total: int | None, text: str, shown: bool = True) -> "tqdm[Any]":
    """The items, with a bar on stderr once a second has passed: in a terminal or a notebook, and only if `shown`.

    Without a total there is no bar but a count, and without items one that `update` raises.
    """
    return import_tqdm()(
        items,
        total=total,
        desc=text,
        delay=1,
        leave=False,
        dynamic_ncols=True,
        disable=not (shown and (sys.stderr.isatty() or in_notebook())),
        bar_format="{desc} "
        + ("{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}" if total else "{n_fmt}, {elapsed}"),
    )


def import_tqdm() -> "type[tqdm[Any]]":
    """tqdm for a terminal or a notebook, without its warning in a notebook that lacks ipywidgets: there the bar is text."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")
        from tqdm.auto import tqdm
    return tqdm


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel; a program that only imports one is none."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


class LastingStream:
    """A text stream whose reader may go: from then on, what is written goes nowhere."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError:
            self.drop()
        except UnicodeEncodeError:  # a terminal that knows no such letters
            self.stream.write(text.encode(encoding := self.stream.encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.drop()

    def drop(self) -> None:
        with suppress(OSError), open(os.devnull, "w") as nowhere:  # a notebook's stream has no file
            os.dup2(nowhere.fileno(), self.stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within, what is printed for a reader that has gone (`head`, a terminal that was closed), or to a closed stream, is lost,
    and nothing else is."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # or the next file that is opened would be taken for a closed stream
        pass
    os.close(spare)
    streams = [LastingStream(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr)]  # noqa: SIM115
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        yield


def as_number(cell: str) -> float | None:
    """The number that a text is; None for what is none, not finite, or too large for float32."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if abs(number) < 3e38 else None
