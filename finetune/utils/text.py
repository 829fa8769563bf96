"""Text for the terminal: the nearest name, aligned columns."""

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean X?' or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def align_columns(rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Rows of cells as lines of text, to the left; where they hold `numbers`, all but the first column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust, *[str.rjust if numbers else str.ljust] * (len(widths) - 1)]
    return "\n".join("  ".join(map(lambda cell, side, width: side(cell, width), row, sides, widths)).rstrip() for row in rows)
