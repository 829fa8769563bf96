"""Predictions in a file, written as they come: CSV, JSON lines or Parquet."""

import csv
import importlib.util
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from finetune.inference.explain import picture_writer
from finetune.inference.inputs import part_of
from finetune.inference.predict import check_top, count_unreadable, joined, predict_rows
from finetune.models.saved import find_model, load_model
from finetune.utils.errors import RecipeError
from finetune.utils.files import aside_of, check_new, file_digest, flush

FORMATS = (".csv", ".jsonl", ".parquet")
ROWS_AT_ONCE = 10_000  # of a Parquet file's row groups

Row = dict[str, Any]


def check_target(target: Path) -> None:
    """Raise RecipeError unless predictions can be written to such a file, and it is not there yet."""
    if target.suffix.lower() not in FORMATS:
        raise RecipeError(
            f"{target}: predictions are written to a file that ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        )
    if target.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise RecipeError("Parquet needs pyarrow: pip install pyarrow, or name a .csv or a .jsonl")
    check_new(target, target.suffix.lower())


def write_predictions(
    source: str | Path,
    files: Sequence[Path],
    target: Path,
    top: int = 5,
    workers: int = 0,
    pictures: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write what `predict_images` says of each file, in their order; the memory this takes does not grow with their number.

    Until all are done the rows are in TARGET.part, a JSON object a line; the same call goes on with it. `pictures` has
    a file for each image, to draw what speaks for its class.
    Returns {"file", "images", "unreadable"}.

    Raises:
        RecipeError: for a target that is there, a .part of another model, images or `top`, and if no image could be read.
    """
    check_top(top)
    check_target(target)
    part = part_of(target)
    begun = {"weights": file_digest(find_model(source)[0] / "model.safetensors"), "top": top}
    done = read_part(part, begun, files) if part.exists() else 0
    model = load_model(source)
    look = picture_writer(model, files[done:], pictures[done:]) if pictures else None
    with open(part, "a", encoding="utf-8", errors="surrogateescape") as lines:
        if not done:
            lines.truncate(0)
            write_line(lines, begun)
        for row in predict_rows(model, files[done:], top, workers, look):
            write_line(lines, row)
        lines.flush()
    finish(part, target, min(top, len(model.classes)))
    unreadable = sum("error" in row for row in rows_of(part))
    part.unlink()
    count_unreadable(unreadable, len(files))
    return {"file": str(target), "images": len(files), "unreadable": unreadable}


def write_line(lines: TextIO, value: Row) -> None:
    """One JSON object, in a line of its own."""
    lines.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_part(part: Path, begun: Row, files: Sequence[Path]) -> int:
    """How many of the files have their rows in a .part; what comes after a line that was cut is removed.

    Raises:
        RecipeError: if it was begun with another model, `top` or list of images.
    """
    with open(part, "rb+") as lines:
        whole = done = 0
        for number, line in enumerate(lines):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # a power cut can leave zeros
                row = None
            if row is None:
                break
            if number == 0 and row != begun or number > 0 and (number > len(files) or row["file"] != str(files[number - 1])):
                what = "with another model or --top" if number == 0 else "for other images"
                raise RecipeError(f"{part} was begun {what}: delete it, or name another file than {part.stem}")
            whole, done = whole + len(line), number
        lines.truncate(whole)
    if done:
        print(f"going on after {done:,} of {len(files):,} images", file=sys.stderr)
    return done


def rows_of(part: Path) -> Iterator[Row]:
    """The rows in a .part, after its first line."""
    with open(part, encoding="utf-8", errors="surrogateescape") as lines:
        yield from map(json.loads, islice(lines, 1, None))


def finish(part: Path, target: Path, top: int) -> None:
    """Write the rows of a .part in the target's format, aside, and rename it."""
    aside = aside_of(target)
    if target.suffix.lower() == ".parquet":
        write_parquet(aside, rows_of(part), top)
    else:
        with open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as lines:
            if target.suffix.lower() == ".csv":
                write_csv(lines, rows_of(part), top)
            else:
                for row in rows_of(part):
                    write_line(lines, row)
    flush(aside)
    aside.replace(target)


def columns_of(top: int) -> list[str]:
    """file, predicted, class_1, probability_1, class_2, ..., error."""
    return [
        "file",
        "predicted",
        *(f"{what}_{rank}" for rank in range(1, top + 1) for what in ("class", "probability")),
        "error",
    ]


def cells_of(row: Row, top: int) -> list[str | float | None]:
    """A row's cells in the columns of `columns_of`; several classes are joined by ;."""
    ranked = [value for pair in row["top"] for value in pair]
    return [row["file"], joined(row["predicted"], ";"), *ranked, *[None] * (2 * top - len(ranked)), row.get("error")]


def write_csv(lines: TextIO, rows: Iterable[Row], top: int) -> None:
    """A header and a line an image, each as soon as it comes."""
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(columns_of(top))
    for row in rows:
        table.writerow(cells_of(row, top))


def predictions_as_csv(rows: Sequence[Row]) -> str:
    """What `write_csv` writes of these rows."""
    write_csv(text := io.StringIO(), rows, max(len(row["top"]) for row in rows))
    return text.getvalue()


def write_parquet(file: Path, rows: Iterable[Row], top: int) -> None:
    """A Parquet file with the CSV's columns, classes as text and probabilities as doubles."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    kinds = [pyarrow.float64() if name.startswith("probability") else pyarrow.string() for name in columns_of(top)]
    schema = pyarrow.schema(list(zip(columns_of(top), kinds, strict=True)))
    with ParquetWriter(file, schema) as table:
        rows = iter(rows)
        while some := [cells_of(row, top) for row in islice(rows, ROWS_AT_ONCE)]:
            columns = [pyarrow.array(cells, kind) for cells, kind in zip(zip(*some, strict=True), kinds, strict=True)]
            table.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
