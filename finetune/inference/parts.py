"""Images divided among processes, and the rows that each has written, which a next call goes on with."""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from finetune.inference.explain import picture_writer
from finetune.inference.inputs import part_of, parts_of
from finetune.inference.predict import check_top, check_unsure, predict_rows
from finetune.models.saved import find_model, load_model
from finetune.training.setup import usable_threads
from finetune.utils.errors import RecipeError
from finetune.utils.files import file_digest
from finetune.utils.text import progress

Row = dict[str, Any]


class Asked(NamedTuple):
    """What is asked of the images, and with how much of a machine."""

    top: int = 5
    unsure_below: float | None = None
    workers: int = 0  # that load images, of each process
    processes: int = 1


DEFAULTS = Asked()


class Part(NamedTuple):
    """Images of one process: the file of their rows, the images, and a picture to draw for each, or none."""

    path: Path
    files: Sequence[Path | str]
    pictures: Sequence[Path]


def divide(target: Path, files: Sequence[Path | str], pictures: Sequence[Path], asked: Asked) -> list[Part]:
    """A part for each process: as many images as any other, or one less.

    Raises:
        RecipeError: for options that there can't be.
    """
    check_top(asked.top)
    check_unsure(asked.unsure_below)
    if asked.processes < 1:
        raise RecipeError(f"--processes starts at 1, not {asked.processes}")
    number, parts = max(1, min(asked.processes, len(files))), []
    for i in range(number):
        one = slice(len(files) * i // number, len(files) * (i + 1) // number)
        parts.append(Part(part_of(target, i, number), files[one], pictures[one]))
    if others := parts_of(target) - {part.path for part in parts}:
        raise RecipeError(f"{min(others)} was begun with another --processes: name that, or delete it")
    return parts


def fill(part: Part, source: str | Path, asked: Asked) -> None:
    """Write the rows that a part lacks."""
    begun: Row = {"weights": file_digest(find_model(source)[0] / "model.safetensors"), "top": asked.top}
    begun |= {} if asked.unsure_below is None else {"unsure_below": asked.unsure_below}
    done = read_part(part.path, begun, part.files) if part.path.exists() else 0
    model = load_model(source)
    look = picture_writer(model, part.files[done:], part.pictures[done:]) if part.pictures else None
    with open(part.path, "a", encoding="utf-8", errors="surrogateescape") as lines:
        if not done:
            lines.truncate(0)
            write_line(lines, begun)
        for row in predict_rows(model, part.files[done:], asked.top, asked.workers, look, asked.unsure_below):
            write_line(lines, row)


def fill_in_processes(parts: Sequence[Part], source: str | Path, asked: Asked) -> None:
    """`fill` each part in a process of its own; the first that fails says why, and what the others wrote stays."""
    context = multiprocessing.get_context("spawn")  # a forked process has no GPU
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # theirs; this process counts for all
    try:
        total = sum(len(part.files) for part in parts)
        with ProcessPoolExecutor(len(parts), context) as pool, progress(None, total, "images") as bar:
            jobs = [pool.submit(fill_alone, part, source, asked, i) for i, part in enumerate(parts)]
            places = dict.fromkeys((part.path for part in parts), 0)
            while wait(jobs, timeout=1).not_done:
                bar.update(sum(new_lines(path, places) for path in places))
            for job in jobs:
                job.result()
    finally:
        del os.environ["TQDM_DISABLE"]
        os.environ |= {} if before is None else {"TQDM_DISABLE": before}


def fill_alone(part: Part, source: str | Path, asked: Asked, number: int) -> None:
    """`fill` in one of the processes, on its GPU, or on its share of the CPU's cores."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, usable_threads() // asked.processes))
    fill(part, source, asked)


def new_lines(path: Path, places: dict[Path, int]) -> int:
    """How many lines a file has got since the last look."""
    if not path.exists():
        return 0
    with open(path, "rb") as lines:
        lines.seek(places[path])
        text = lines.read()
    places[path] += len(text)
    return text.count(b"\n")


def write_line(lines: TextIO, value: Row) -> None:
    """One JSON object, in a line of its own."""
    lines.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_part(part: Path, begun: Row, files: Sequence[Path | str]) -> int:
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
                what = "with another model, --top or --unsure-below" if number == 0 else "for other images"
                raise RecipeError(f"{part} was begun {what}: delete it, or name another file than {part.stem}")
            whole, done = whole + len(line), number
        lines.truncate(whole)
    if done:
        print(f"going on after {done:,} of {len(files):,} images", file=sys.stderr)
    return done


def rows_of(parts: Sequence[Part]) -> Iterator[Row]:
    """The rows in the .part files, one after the other, without the first line of each."""
    for part in parts:
        with open(part.path, encoding="utf-8", errors="surrogateescape") as lines:
            yield from map(json.loads, islice(lines, 1, None))
