"""Images that can't be read: all are named, none is left out without a word, and no damage is more than a sentence."""

import os
import shutil
import time
from collections import Counter

import pytest

from benchmarks import fuzz
from finetune.data.loader import name_others
from finetune.data.sources import load_data
from finetune.recipe import Data
from finetune.utils.errors import RecipeError
from helpers import run_here, small_recipe
from image_files import source, write_csv

FAULTS = {
    "traceback": lambda: 1 / 0,
    "hang": lambda: time.sleep(60),
    "crash": lambda: os._exit(3),
    "changed": lambda: os.urandom(12),
}


def break_off(file):
    """A whole header, and half of the pixels."""
    file.write_bytes(file.read_bytes()[:300])


@pytest.fixture
def spoilt(image_folder, tmp_path):
    """Folders of images of which 12 of 30 for training break off."""
    root = shutil.copytree(image_folder, tmp_path / "images")
    for label, number in (("red", 7), ("blue", 5)):
        for file in sorted((root / "train" / label).iterdir())[:number]:
            break_off(file)
    return root


@pytest.mark.parametrize("kind,workers", [("folder", 0), ("folder", 2), ("csv", 0)])
def test_images_that_break_off_are_all_named(spoilt, tmp_path, kind, workers):
    """The first image that breaks off stops a run with the names of the first ten and their number, as bad headers do."""
    data = spoilt
    if kind == "csv":
        files = [(path, part) for part in ("train", "val") for path in sorted((spoilt / part).rglob("*.png"))]
        data = write_csv(tmp_path, [f"{path},{path.parent.name},{part}" for path, part in files])
    with pytest.raises(RecipeError) as caught:
        run_here(source(data), tmp_path / "run", workers=workers)
    lines = str(caught.value).splitlines()
    assert lines[0] == "can't read 12 of 30 images:" and "and 2 more" in lines[11] and "on_bad_image=skip" in lines[12]
    assert len({line.partition(": ")[0] for line in lines[1:11]}) == 10 and len(lines) == 13


def test_headers_are_read_once_on_each_machine(image_folder, tmp_path, monkeypatch):
    """By its first process; the others, which come after it, leave it at that."""
    root = shutil.copytree(image_folder, tmp_path / "images")
    next((root / "train" / "red").iterdir()).write_bytes(b"no image")
    with pytest.raises(RecipeError, match="can't read the image"):
        load_data(source(root))
    monkeypatch.setenv("LOCAL_RANK", "1")
    load_data(source(root))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "2")  # of another machine
    with pytest.raises(RecipeError, match="can't read the image"):
        load_data(source(root))


def test_the_search_for_others_ends(spoilt):
    """Looking for more takes no longer than it may; another error, or a set that is no list, stays as it is."""
    images = load_data(source(spoilt)).train
    first = RecipeError(f"can't read the image {images.items[0]}: broken", one_process=True)
    assert name_others(first, images, seconds=0) is first
    assert name_others(other := RecipeError("image 3 has label 9"), images) is other
    assert name_others(first, [images[10]]) is first


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_without_a_readable_image_stops_before_the_first_step(image_folder, tmp_path, part):
    """With on_bad_image="skip", a class whose images all break off is refused, with or without a linear probe."""
    root = shutil.copytree(image_folder, tmp_path / "images")
    files = sorted((root / part / "red").iterdir())
    for file in files[1:]:
        break_off(file)
    recipe = small_recipe(data=Data(str(root), 24, 8, on_bad_image="skip"))
    assert len(load_data(recipe).train) == 30
    break_off(files[0])
    word = {"train": "training", "val": "validation"}[part]
    with pytest.raises(RecipeError, match=f"no image of class 'red' in the {word} images of .* can be read, such as: can't"):
        run_here(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="worker processes are forked")
def test_damaged_files_are_read_or_refused():
    """Of damaged files of every format each is read as Pillow reads it or refused in a line, in its time."""
    found = Counter(outcome for _, outcome, _ in fuzz.outcomes(320, seed=1, workers=1, seconds=20))
    assert found.keys() == {"read", "refused"} and min(found.values()) > 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="worker processes are forked")
@pytest.mark.parametrize("outcome", FAULTS)
def test_each_fault_of_reading_is_seen(monkeypatch, outcome):
    """A reader that raises, hangs, dies or changes its answer is found out, and the next file has its turn."""

    class Image:
        size = (1, 1)

        def __init__(self, file):
            self.pixels = FAULTS[outcome]()

        def tobytes(self):
            return self.pixels

    monkeypatch.setattr(fuzz, "read_image", Image)
    assert [each for _, each, _ in fuzz.outcomes(2, seed=1, workers=1, seconds=0.3)] == [outcome] * 2
