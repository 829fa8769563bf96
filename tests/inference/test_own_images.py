"""A run's own images, found again by their content."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from finetune.__main__ import main as command
from finetune.data.dataset import fingerprint
from finetune.data.folders import find_images
from finetune.data.sources import load_data
from finetune.inference.evaluate import evaluate, load_labelled_images
from finetune.inference.predict import predict_images
from finetune.models.saved import load_model
from finetune.run import main
from helpers import on_folder, predict


@pytest.fixture(scope="module")
def grown(image_folder, tmp_path_factory):
    """A run on class folders without a split, to which other images were added afterwards."""
    root = tmp_path_factory.mktemp("grown")
    shutil.copytree(image_folder / "train", root / "images")
    assert main([*on_folder(root / "images", root / "run"), "--set", "epochs=1", "--quiet"]) == 0
    for path in sorted((image_folder / "val").rglob("*.png")):
        shutil.copy(path, root / "images" / path.parent.name / f"{path.stem}-new.png")
    return root


def kept(root, data):
    recipe = load_model(root / "run").recipe
    return load_labelled_images(str(data), recipe, ("blue", "green", "red"), root / "run")


@pytest.mark.parametrize("place", ["there", "linked", "copied", "renamed"])
def test_a_run_is_evaluated_on_the_images_it_kept(grown, tmp_path, capsys, place):
    """On its own images, grown, linked, moved or renamed since, a run's metrics are those of result.json."""
    data = grown / "images"
    if place == "linked":
        (tmp_path / "link").symlink_to(data)
        data = tmp_path / "link"
    elif place != "there":
        data = shutil.copytree(data, tmp_path / "copy")
    for path in sorted(data.rglob("*.png")) if place == "renamed" else ():
        path.rename(path.with_name(f"x{path.name}"))
    result = json.loads((grown / "run" / "result.json").read_text())
    found = evaluate(grown / "run" / "model", data)
    assert (found["val_images"], found["top1"]) == (result["val_images"], result["top1"])
    assert found["loss"] == pytest.approx(result["loss"], rel=1e-5)
    if place == "there":
        number = result["val_images"]
        said = f"the {number} images that the run kept for validation; left out: {30 - number} trained on, 15 new"
        assert said in capsys.readouterr().err


def test_trained_images_are_said(grown, tmp_path, capsys):
    """Of other images all count, and those that were trained on are counted on stderr; missing ones of the run's as well."""
    images = kept(grown, grown / "images")
    shutil.copytree(grown / "images", tmp_path / "rest")
    validated = {path.rpartition("images/")[2] for path in images.items}
    for name in validated:
        (tmp_path / "rest" / name).unlink()
    trained = 30 - len(validated)
    assert len(kept(grown, tmp_path / "rest")) == trained + 15
    assert f"{trained} of these {trained + 15} images were trained on" in capsys.readouterr().err
    one = sorted(validated)[0]
    shutil.copy(grown / "images" / one, tmp_path / "rest" / one)
    assert len(kept(grown, tmp_path / "rest")) == 1
    gone = len(validated) - 1
    assert f"{gone} of the images that the run kept for validation are not there any more" in capsys.readouterr().err


def test_a_table_is_evaluated_on_its_validation_rows(run_folder, image_folder, tmp_path):
    """evaluate takes a CSV: its validation rows, or of one without a split every row."""
    files = sorted((image_folder / "val").rglob("*.png"))
    (tmp_path / "a.csv").write_text("path,label\n" + "".join(f"{path},{path.parent.name}\n" for path in files))
    others = "".join(f"{path},{path.parent.name},train\n" for path in sorted((image_folder / "train").rglob("*.png")))
    rows = "".join(f"{path},{path.parent.name},val\n" for path in files)
    (tmp_path / "b.csv").write_text("path,label,split\n" + others + rows)
    result = json.loads((run_folder / "result.json").read_text())
    for name in ("a.csv", "b.csv"):
        found = evaluate(run_folder, tmp_path / name)
        assert (found["val_images"], found["top1"]) == (15, result["top1"])


def test_predict_finds_what_is_there(image_folder, tmp_path, capsys):
    """Brackets may be part of a name; hidden files are left aside; what is not looked at is counted."""
    folder = tmp_path / "photos [2024]"
    (folder / ".trash").mkdir(parents=True)
    for name in ("img[0].png", "img[1].png", ".trash/a.png", "._img[0].png", "b.heic", "notes.txt", "folder.jpg/c.gif"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name, "PNG")
    assert [path.name for path in find_images([f"{folder}/*.png"])] == ["img[0].png", "img[1].png"]
    assert [path.name for path in find_images([folder])] == ["c.gif", "img[0].png", "img[1].png"]
    find_images([tmp_path])
    err = capsys.readouterr().err
    for part in ("hidden folders: 1 (.trash)", "hidden files: 1", "files that end in .heic: 1 (b.heic)", ".txt: 1"):
        assert part in err


@pytest.mark.parametrize("kind", ["uint8", "uint16", "image", "float"])
def test_an_array_is_read_as_its_file_is(run_folder, tmp_path, kind):
    """An array of 8 or 16 bits, or a PIL image, gets the answer of the file; another array is refused in a line."""
    pixels = np.random.RandomState(0).randint(0, 256, (30, 40)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    given = {"uint8": pixels, "uint16": pixels.astype(np.uint16) * 257, "image": Image.fromarray(pixels), "float": pixels / 255}
    rows = predict_images(load_model(run_folder), [tmp_path / "a.png", given[kind]])
    if kind == "float":
        assert "given as ndarray: an array of float64, not of uint8" in rows[1]["error"]
    else:
        assert rows[0]["top"] == rows[1]["top"]


def test_a_name_that_is_no_utf8_is_printed(run_folder, image_folder, tmp_path, capsys):
    """predict answers for a file whose name can't be encoded."""
    name = b"caf\xe9.png".decode(errors="surrogateescape")
    shutil.copy(image_folder / "val" / "red" / "0.png", tmp_path / name)
    assert [row["file"] for row in predict(run_folder / "model", [tmp_path])] == [str(tmp_path / name)]
    assert command(["predict", str(run_folder), str(tmp_path)]) == 0
    assert "caf\\udce9.png" in capsys.readouterr().out


def test_another_split_than_the_runs_is_said(run_folder, tmp_path, capsys):
    """Of a named set, images that are not those which the run kept are said, not the run's own, nor those of another set."""
    recipe, classes = load_model(run_folder).recipe, tuple("0123456789")
    recipe = replace(recipe, data=replace(recipe.data, source="digits", holdout=0.3))
    images = load_data(recipe)
    for seen, said in ((images.train, True), (images.val, False)):
        start = {"images": {"validation": fingerprint(seen, classes)}}
        (tmp_path / "run.json").write_text(json.dumps(start))
        assert len(load_labelled_images("digits", recipe, classes, tmp_path)) == len(images.val)
        assert ("the run kept for validation were others" in capsys.readouterr().err) == said
    other = replace(recipe, data=replace(recipe.data, source="generated"))
    assert len(load_labelled_images("digits", other, classes, tmp_path)) == 359  # without that run's holdout
    assert not capsys.readouterr().err
