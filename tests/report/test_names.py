"""Class names of any kind, a picture that can't be drawn, and images that can't be read: the result is there."""

import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from finetune.page import gallery
from finetune.recipe import Data, LinearProbe
from finetune.report import confusion, sheets
from finetune.report.confusion import plot_confusion_matrix
from finetune.report.drawing import drawable, style
from finetune.report.sheets import Tile, draw_sheet
from finetune.run import main
from finetune.utils.errors import RecipeError
from helpers import on_folder, run_here, small_recipe
from image_files import source

NAMES = ["$10_to_$20", "$20_to_$50", "100%_{x}", "$\\frac{$", "猫", "собака", "🐦 bird", "two\nlines", "a\udce9", "x" * 250]


def test_any_name_is_drawn_as_text(tmp_path):
    """Formulas, scripts without a font, line breaks, bytes that are no UTF-8 and long names draw without a warning."""
    labels = torch.arange(len(NAMES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusion_matrix(tmp_path, torch.eye(len(NAMES)), labels, NAMES, drawable(" on ".join(NAMES)))
        tiles = [Tile(np.zeros((8, 8, 3)), drawable(name)) for name in NAMES]
        draw_sheet(tiles, drawable(NAMES[0]), tmp_path / "sheet.png")
        many = [f"{NAMES[i % len(NAMES)]} {i}" for i in range(30)]
        plot_confusion_matrix(tmp_path, torch.eye(30).roll(1, 0), torch.arange(30), many)


def test_long_names_that_are_cut_to_the_same_are_told_apart(tmp_path, monkeypatch):
    """On the axes of the confusion matrix they have their numbers."""
    shown = []
    monkeypatch.setattr(confusion, "write_cells", lambda axes, cells, names: shown.extend(names))
    names = ["a" * 20 + middle + "b" * 20 for middle in ("one", "two")] + ["short"]
    plot_confusion_matrix(tmp_path, torch.eye(3), torch.arange(3), names)
    assert len(set(shown)) == 3 and shown[0].startswith("0: aaa") and shown[1].startswith("1: aaa") and shown[2] == "short"


def test_what_no_font_has_is_escaped():
    """Characters that can be drawn stay, all others become escapes that Python reads back."""
    assert drawable("собака, café $5") == "собака, café $5"
    assert drawable("a\udce9\n") == "a\\udce9\\n"
    for one in ("猫", "🐦", "\U0010fffd"):  # whether a font has them depends on the machine
        text = drawable(one)
        assert text == one and len(style(one)["fontfamily"]) > 1 or text.encode().decode("unicode_escape") == one


def test_names_of_any_kind_end_in_a_result(image_folder, tmp_path, capsys):
    """A run on classes called so has its result and its pictures."""
    names = {"blue": "$10_to_$20", "green": "猫 $", "red": "a\udce9"}
    for part in ("train", "val"):
        for name, other in names.items():
            (tmp_path / "data" / part).mkdir(parents=True, exist_ok=True)
            os.symlink(image_folder / part / name, os.fsencode(f"{tmp_path}/data/{part}/{other}"))
    assert main([*on_folder(tmp_path / "data", tmp_path / "run"), "--set", "epochs=1"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["val_images"] == 15
    for name in ("confusion", "predictions", "curves", "augmented"):
        assert (tmp_path / "run" / f"{name}.png").is_file()
    out = capsys.readouterr().out
    assert "classes: $10_to_$20, a\ufffd, 猫 $" in out


def test_a_picture_that_fails_is_a_warning(image_folder, tmp_path, monkeypatch, capsys):
    """result.json is there before the first picture, and a fault in one, or in the page, is said in a line."""

    def fail(self, *given, **options):
        assert (tmp_path / "run" / "result.json").is_file()
        raise RuntimeError("no font")

    monkeypatch.setattr(sheets, "plot_augmented", lambda *given: None)  # which is drawn before the first step
    monkeypatch.setattr(Figure, "savefig", fail)
    monkeypatch.setattr(gallery.Pictures, "encode", fail)
    assert main([*on_folder(image_folder, tmp_path / "run"), "--set", "epochs=1"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["val_images"] == 15
    out, err = capsys.readouterr()
    assert "plot_confusion_matrix failed: RuntimeError: no font" in err
    assert "write_page failed: RuntimeError: no font" in err and "report.html" not in out


@pytest.mark.parametrize("bad,said", [(2, "2 of 15 images could not be read and were left out (validation)"), (5, "")])
def test_unreadable_validation_images_are_counted(image_folder, tmp_path, capsys, bad, said):
    """With on_bad_image="skip" they are counted on stderr; a class whose images all break off stops the run."""
    shutil.copytree(image_folder, tmp_path / "data")
    for i in range(bad):
        file = tmp_path / "data" / "val" / "red" / f"{i}.png"
        file.write_bytes(file.read_bytes()[:300])
    recipe = small_recipe(epochs=3, data=Data(str(tmp_path / "data"), 24, 8, on_bad_image="skip"))
    if said:
        assert run_here(recipe, tmp_path / "run")[1][-1]["val_images"] == 13
        assert said in capsys.readouterr().err
    else:
        with pytest.raises(RecipeError, match="no image of class 'red' in the validation images of .* can be read"):
            run_here(recipe, tmp_path / "run")


def test_images_that_are_all_alike_are_said(tmp_path):
    """A linear probe on images without a difference is refused for that reason, not for its learning rates."""
    for path in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / path).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (24, 24), (90, 120, 30)).save(tmp_path / path / f"{i}.png")
    with pytest.raises(RecipeError, match="the same for every image: look whether these are alike"):
        run_here(source(tmp_path, linear_probe=LinearProbe()), tmp_path / "run")
