"""Damaged image files: each is refused in one line, or gives the pixels that Pillow gives; none hangs, crashes or changes.

    python -m benchmarks.fuzz

Files of eight formats are made from a seed and damaged: cut off, bytes flipped, a block zeroed, the header or the ending of
another format. Worker processes read each twice with a limit of time; a process that dies or hangs is replaced, and counted.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from finetune.images.read import read_image
from finetune.utils.errors import RecipeError

FORMATS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "TIFF": "tif", "BMP": "bmp", "WEBP": "webp", "AVIF": "avif", "PPM": "ppm"}
Image.init()
FORMATS = {kind: ending for kind, ending in FORMATS.items() if kind in Image.SAVE}  # older Pillow writes no AVIF
MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "P", "I;16"), "TIFF": ("RGB", "L", "I;16", "F"), "GIF": ("P",)}
DAMAGES = ("cut off", "bytes flipped", "block zeroed", "header of another", "ending of another")
OUTCOMES = ("read", "refused", "traceback", "hang", "crash", "changed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="for one file")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    start, rows = time.perf_counter(), Counter()
    for number, outcome, text in outcomes(args.files, args.seed, args.workers, args.seconds):
        kind, damage = kind_of(number)
        rows[kind, damage, outcome] += 1
        if outcome not in ("read", "refused"):
            print(f"file {number} ({kind}, {damage}): {outcome}: {text}", flush=True)
    kept = [
        {"format": kind, "damage": damage, **{o: rows[kind, damage, o] for o in OUTCOMES}}
        for kind in FORMATS
        for damage in DAMAGES
    ]
    bad = sum(row[outcome] for row in kept for outcome in OUTCOMES[2:])
    print(f"{args.files} files in {time.perf_counter() - start:.0f} s: {bad} faults", file=sys.stderr)
    print(json.dumps({"files": args.files, "seed": args.seed, "rows": kept}))
    return int(bad > 0)


def kind_of(number: int) -> tuple[str, str]:
    """The format and the damage of a file."""
    return list(FORMATS)[number % len(FORMATS)], DAMAGES[number // len(FORMATS) % len(DAMAGES)]


def damaged(number: int, seed: int) -> tuple[bytes, str]:
    """(content, ending) of a file; a function of its number and the seed."""
    draw, (kind, damage) = random.Random(f"{seed} {number}"), kind_of(number)
    content, ending = intact(kind, draw), FORMATS[kind]
    if damage == "cut off":
        content = content[: draw.randrange(len(content))]
    elif damage == "bytes flipped":
        changed = bytearray(content)
        for _ in range(draw.choice((1, 3, 10, 50))):
            changed[draw.randrange(len(changed))] ^= draw.randrange(1, 256)
        content = bytes(changed)
    elif damage == "block zeroed":
        at, size = draw.randrange(len(content)), draw.choice((4, 16, 64, 256))
        content = content[:at] + bytes(min(size, len(content) - at)) + content[at + size :]
    elif damage == "header of another":
        other, size = intact(draw.choice([name for name in FORMATS if name != kind]), draw), draw.choice((4, 8, 16, 32, 64))
        content = other[:size] + content[size:]
    else:
        ending = draw.choice([other for other in FORMATS.values() if other != ending])
    return content, ending


def intact(kind: str, draw: random.Random) -> bytes:
    """A file of a format: noise on a slope, of one of its modes, some turned by EXIF."""
    numbers = np.random.RandomState(draw.randrange(2**32))
    height, width = (draw.randrange(1, 40) for _ in range(2))
    slope = np.linspace(0, 200, height * width * 3).reshape(height, width, 3)
    image = Image.fromarray((slope + numbers.randint(0, 56, (height, width, 3))).astype(np.uint8))
    mode = draw.choice(MODES.get(kind, ("RGB", "L")))
    if mode == "F":
        image = Image.fromarray(np.asarray(image.convert("L"), np.float32) / 255)
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    else:
        image = image.convert(mode)
    options = {"compression": draw.choice((None, "tiff_lzw", "tiff_deflate"))} if kind == "TIFF" else {}
    if kind in ("JPEG", "PNG", "WEBP") and draw.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = draw.randrange(1, 9)
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def outcome_of(content: bytes, ending: str, folder: str) -> tuple[str, str]:
    """(outcome, what was said) of a file that is read twice, and once by Pillow."""
    file = Path(folder) / f"damaged.{ending}"
    file.write_bytes(content)
    seen = []
    for _ in range(2):
        try:
            image = read_image(file)
            seen.append((image.size, hashlib.blake2b(image.tobytes()).hexdigest()))
        except RecipeError as error:
            seen.append(str(error))
            if "\n" in str(error) or str(file) not in str(error):
                return "traceback", f"not one line with the path: {error!r}"
        except BaseException as error:  # whatever it is, a person would see a traceback
            return "traceback", repr(error)
    if seen[0] != seen[1]:
        return "changed", f"{seen[0]}, then {seen[1]}"
    theirs = pillows(content)
    if isinstance(seen[0], str):
        return ("refused", seen[0]) if theirs is None else ("changed", f"Pillow reads it: {seen[0]}")
    if theirs is not None and (theirs.size, hashlib.blake2b(theirs.tobytes()).hexdigest()) != seen[0]:
        return "changed", "Pillow has other pixels"
    return "read", ""


def pillows(content: bytes) -> Image.Image | None:
    """What Pillow alone makes of plain 8-bit colours or greys; None of other modes, and where it can't."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr") or image.has_transparency_data:
                return None
            number = image.getexif().get(0x0112)
            return (ImageOps.exif_transpose(image) if number in range(2, 9) else image).convert("RGB")
    except Exception:
        return None


def work(connection, seed: int) -> None:
    """Answer for one file after the other, as asked."""
    warnings.simplefilter("ignore")  # of Pillow's, on damaged tags
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff's own
    with tempfile.TemporaryDirectory() as folder:
        while (number := connection.recv()) is not None:
            connection.send(outcome_of(*damaged(number, seed), folder))


def outcomes(files: int, seed: int, workers: int, seconds: float):
    """(number, outcome, text) of each file."""
    context = multiprocessing.get_context("fork")

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, seed), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    todo = iter(range(files))
    running = [[*start(), None, 0.0] for _ in range(min(workers, files))]
    for slot in running:
        slot[2], slot[3] = next(todo, None), time.monotonic()
        slot[1].send(slot[2])
    while running:
        ready = multiprocessing.connection.wait([slot[1] for slot in running], timeout=1)
        for slot in list(running):
            process, connection, number, since = slot
            if connection in ready:
                try:
                    yield number, *connection.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    yield number, "crash", f"exit code {process.exitcode}"
                    slot[:2] = start()
            elif time.monotonic() - since > seconds:
                process.kill()
                yield number, "hang", f"more than {seconds:g} s"
                slot[:2] = start()
            else:
                continue
            slot[2], slot[3] = next(todo, None), time.monotonic()
            slot[1].send(slot[2])
            if slot[2] is None:
                slot[0].join()
                running.remove(slot)


if __name__ == "__main__":
    sys.exit(main())
