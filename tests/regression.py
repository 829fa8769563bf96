"""What the tests of numbers share."""

import csv

import numpy as np
from PIL import Image


def write_numbers(folder, values, names=("label",), splits=None, seed=0):
    """A CSV of images whose brightness rises with the first of their numbers, `values` [n, numbers]; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.asarray(values, float).reshape(len(values), -1)
    order = values[:, 0].argsort().argsort() / len(values)
    random = np.random.RandomState(seed)
    with open(folder / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", *names, *["split"] * bool(splits)])
        for i, row in enumerate(values.tolist()):
            level = 30 + 190 * order[i]
            pixels = random.normal(level, 6, (20, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            table.writerow([f"{i}.png", *row, *(splits or [])[i : i + 1]])
    return folder / "table.csv"
