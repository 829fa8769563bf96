"""Predictions in a file, written as they come: CSV, JSON lines or Parquet."""

import csv
import importlib.util
import io
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from finetune.inference.parts import DEFAULTS, Asked, Part, Row, divide, fill, fill_in_processes, rows_of, write_line
from finetune.inference.predict import count_unreadable, joined
from finetune.utils.errors import RecipeError
from finetune.utils.files import aside_of, check_new, flush

FORMATS = (".csv", ".jsonl", ".parquet")
ROWS_AT_ONCE = 10_000  # of a Parquet file's row groups


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
    source: str | Path, files: Sequence[Path | str], target: Path, asked: Asked = DEFAULTS, pictures: Sequence[Path] = ()
) -> dict[str, Any]:
    """Write what `predict_images` says of each file, in their order; the memory this takes does not grow with their number.

    Until all are done the rows are in TARGET.part, a JSON object a line; the same call goes on with it. `pictures` has
    a file for each image, to draw what speaks for its class. Of several processes each has its part of the images, its own
    .part and, in turns, one of the GPUs.
    Returns {"file", "images", "unreadable"} and, with `unsure_below`, "unsure".

    Raises:
        RecipeError: for a target that is there, a .part of another model, images or options, and if no image could be read.
    """
    check_target(target)
    parts = divide(target, files, pictures, asked)
    fill(parts[0], source, asked) if len(parts) == 1 else fill_in_processes(parts, source, asked)
    finish(parts, target, columns_for(rows_of(parts), asked.unsure_below is not None))
    unreadable, unsure = (sum(bool(row.get(what)) for row in rows_of(parts)) for what in ("error", "unsure"))
    for part in parts:
        part.path.unlink()
    count_unreadable(unreadable, len(files))
    result = {"file": str(target), "images": len(files), "unreadable": unreadable}
    return result if asked.unsure_below is None else result | {"unsure": unsure}


def finish(parts: Sequence[Part], target: Path, columns: Sequence[str]) -> None:
    """Write the rows of all parts in the target's format, aside, and rename it."""
    aside = aside_of(target)
    if target.suffix.lower() == ".parquet":
        write_parquet(aside, rows_of(parts), columns)
    else:
        with open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as lines:
            if target.suffix.lower() == ".csv":
                write_csv(lines, rows_of(parts), columns)
            else:
                for row in rows_of(parts):
                    write_line(lines, row)
    flush(aside)
    aside.replace(target)


def columns_of(top: int, unsure: bool = False) -> list[str]:
    """file, predicted, class_1, probability_1, class_2, ..., unsure if that was asked for, error."""
    return [
        "file",
        "predicted",
        *(f"{what}_{rank}" for rank in range(1, top + 1) for what in ("class", "probability")),
        *["unsure"] * unsure,
        "error",
    ]


def columns_for(rows: Iterable[Row], unsure: bool) -> list[str]:
    """The columns that these rows need: of numbers file, predicted, error, and of several predicted_NAME for each.

    Of grades there are grade, or grade_NAME, too.
    """
    classes, numbers = None, ["predicted"]
    for row in rows:
        if "top" in row:
            classes = max(classes or 0, len(row["top"]))
        elif "error" not in row:
            several = row["predicted"] if isinstance(row["predicted"], dict) else {}
            kinds = ["predicted", *["grade"] * ("grade" in row)]
            numbers = [f"{kind}_{name}" for kind in kinds for name in several] if several else kinds
    return ["file", *numbers, "error"] if classes is None else columns_of(classes, unsure)


def cells_of(row: Row, columns: Sequence[str]) -> list[str | float | None]:
    """A row's cells in the columns of `columns_of`; several classes are joined by ;."""
    if "top" not in row:
        several = {kind: row[kind] for kind in ("predicted", "grade") if isinstance(row.get(kind), dict)}
        cells = row | {f"{kind}_{name}": number for kind, named in several.items() for name, number in named.items()}
        return [cells.get(column) for column in columns]
    cells = row | {"predicted": joined(row["predicted"], ";")}
    for rank, (name, probability) in enumerate(row["top"], 1):
        cells |= {f"class_{rank}": name, f"probability_{rank}": probability}
    return [cells.get(column) for column in columns]


def write_csv(lines: TextIO, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """A header and a line an image, each as soon as it comes."""
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(columns)
    for row in rows:
        table.writerow(cells_of(row, columns))


def predictions_as_csv(rows: Sequence[Row]) -> str:
    """What `write_csv` writes of these rows."""
    columns = columns_for(rows, any("unsure" in row for row in rows))
    write_csv(text := io.StringIO(), rows, columns)
    return text.getvalue()


def write_parquet(file: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """A Parquet file with the CSV's columns, classes as text, probabilities as doubles."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    of_numbers = "class_1" not in columns
    doubles = [name for name in columns if name.startswith(("predicted", "grade") if of_numbers else "probability")]
    numbers = {name: pyarrow.float64() for name in doubles} | {"unsure": pyarrow.bool_()}
    kinds = [numbers.get(name, pyarrow.string()) for name in columns]
    schema = pyarrow.schema(list(zip(columns, kinds, strict=True)))
    with ParquetWriter(file, schema) as table:
        rows = iter(rows)
        while some := [cells_of(row, columns) for row in islice(rows, ROWS_AT_ONCE)]:
            arrays = [pyarrow.array(cells, kind) for cells, kind in zip(zip(*some, strict=True), kinds, strict=True)]
            table.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
