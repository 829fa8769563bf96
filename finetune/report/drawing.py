"""What every picture is drawn with: a figure, its title, text that a font has."""

import io
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: a notebook's own pictures stay as they are
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font

from finetune.training.run_dir import run_name
from finetune.utils.files import write_file
from finetune.utils.text import readable


class Picture(Figure):
    """A figure that a notebook shows, whatever its matplotlib is set to."""

    def _repr_png_(self) -> bytes:
        self.savefig(file := io.BytesIO(), dpi=100)
        return file.getvalue()


def legend_above(axes: Axes, columns: int = 3) -> None:
    """A legend above a diagram, where it hides no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize="small", frameon=False, borderaxespad=0.2)


def new_figure() -> tuple[Figure, Axes]:
    """An empty picture of one diagram."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure, figure.subplots()


def save_figure(figure: Figure, axes: Sequence[Axes], file: Path) -> Path:
    """Write the picture, with grid lines and no box."""
    tidy(*axes)
    figure.savefig(picture := io.BytesIO(), dpi=200)
    write_file(file, picture.getvalue())
    return file


def tidy(*axes: Axes) -> None:
    """Grid lines, no box."""
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)


def run_title(run: Path, result: str = "") -> str:
    """A picture's title: the recipe, its images, and in a line below what was reached."""
    file = run / "recipe.json"
    source = json.loads(file.read_text())["data"]["source"] if file.is_file() else ""
    name, images = run_name(run), Path(str(source)).name
    on = f" on {images}" if images not in ("", name) else ""  # a suggested recipe is called as its images
    return "\n".join(filter(None, [shorten(readable(f"{name}{on}"), 80), result]))


def shorten(text: str, length: int) -> str:
    """The text, as it can be drawn, with its middle left out where it is longer."""
    text = drawable(text)
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def shorten_apart(names: Sequence[str], length: int) -> list[str]:
    """The names, shortened; those that are the same then begin with their number."""
    short = [shorten(name, length) for name in names]
    return [one if short.count(one) == 1 else f"{i}: {shorten(names[i], length - 4)}" for i, one in enumerate(short)]


def drawable(text: str) -> str:
    """The text with an escape such as \\u732b for each character that is no print, or that no font here has."""
    missing = missing_characters(text)
    fonts = find_fonts(missing)
    kept = (one if one.isprintable() and (one not in missing or one in fonts) else ascii(one)[1:-1] for one in text)
    return "".join(kept)


def style(text: str, family: str = "sans-serif") -> dict[str, Any]:
    """Arguments with which matplotlib draws the text as it is: no formulas, and fonts that have its characters."""
    return {"parse_math": False, "fontfamily": [family, *sorted(set(find_fonts(missing_characters(text)).values()))]}


def missing_characters(text: str) -> frozenset[str]:
    """The characters of a text that matplotlib's own font does not have."""
    return frozenset(one for one in text if not one.isascii() and ord(one) not in usual_characters())


@cache
def usual_characters() -> frozenset[int]:
    return frozenset(FT2Font(font_manager.findfont(FontProperties(family=["sans-serif"]))).get_charmap())


@cache
def find_fonts(characters: frozenset[str]) -> dict[str, str]:
    """A font of this machine for each of the characters that one has."""
    found: dict[str, str] = {}
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: entry.name) if characters else ():
        if characters == found.keys():
            break
        with suppress(Exception):  # a font that matplotlib can't use
            font = FT2Font(entry.fname)
            there = font.get_charmap() if font.scalable and not entry.name.startswith("Last Resort") else {}  # boxes
            found |= {one: entry.name for one in characters - found.keys() if ord(one) in there}
    return found
