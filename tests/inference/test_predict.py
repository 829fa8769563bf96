"""What a loaded model predicts."""

import csv
import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import classification_report
from sklearn.metrics import confusion_matrix as sklearn_confusion

from finetune.data.folders import find_images
from finetune.data.sources import load_data
from finetune.inference.evaluate import evaluate, evaluation_as_text, load_labelled_images
from finetune.inference.predict import predictions_as_table
from finetune.inference.predictions import predictions_as_csv
from finetune.models.saved import load_model
from finetune.models.saving import save_model
from finetune.recipe.recipe import minimal_recipe
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError
from helpers import PREPROCESSING, ROOT, predict, timm_alone


@pytest.fixture
def mixed(image_folder, tmp_path):
    """The validation photographs, some of them under another class's name: 6 blue, 4 green, 5 red."""
    for path in sorted((image_folder / "val").rglob("*.png")):
        label = {"green": "blue", "red": "green"}.get(path.parent.name) if path.stem in "01" else path.parent.name
        label = "red" if (path.parent.name, path.stem) in (("blue", "1"), ("red", "1")) else label or "blue"
        (tmp_path / label).mkdir(exist_ok=True)
        shutil.copyfile(path, tmp_path / label / f"{path.parent.name}{path.name}")
    return tmp_path


@pytest.mark.parametrize("part", ["", "val"])
def test_evaluate_gives_the_runs_own_number(run_folder, image_folder, part):
    """On the run's validation images a loaded model has the metrics of result.json, and its loss to rounding."""
    found, result = evaluate(run_folder, image_folder / part), json.loads((run_folder / "result.json").read_text())
    assert {key: found[key] for key in ("top1", "macro_f1", "val_images")} == {
        key: result[key] for key in ("top1", "macro_f1", "val_images")
    }
    assert found["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert [row["recall"] for row in found["classes"]] == result["class_accuracy"]


def test_evaluate_agrees_with_scikit_learn(run_folder, mixed):
    """Precision, recall, F1, support, macro F1, top-1 and the confusion matrix are scikit-learn's, of timm's predictions."""
    names, files = ["blue", "green", "red"], sorted(mixed.rglob("*.png"))
    truth = [names.index(path.parent.name) for path in files]
    said = timm_alone(run_folder / "model", files).argmax(1).tolist()
    report = classification_report(truth, said, target_names=names, output_dict=True, zero_division=0)
    found = evaluate(run_folder, mixed, mixed / "out")
    assert 0.2 < found["top1"] < 1 and found["top1"] == pytest.approx(report["accuracy"])
    assert found["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"])
    for row in found["classes"]:
        theirs = report[row["class"]]
        assert [row[key] for key in ("images", "precision", "recall", "f1")] == pytest.approx(
            [theirs[key] for key in ("support", "precision", "recall", "f1-score")]
        )
    assert found["confusion"] == sklearn_confusion(truth, said).tolist()
    with Image.open(mixed / "out" / "confusion.png") as picture:
        assert picture.size[0] > 300
    lines = evaluation_as_text(found).splitlines()
    assert f"top-1 {found['top1']:.2%}" in lines[0] and lines[-3].split() == ["blue", *map(str, found["confusion"][0])]
    with pytest.raises(RecipeError, match="is there already"):
        evaluate(run_folder, mixed, mixed / "out")


def test_a_run_is_not_evaluated_on_what_it_was_trained_on(image_folder):
    """Of class folders that a run trained on, only what it kept counts; of any other folder, every image."""
    data = image_folder / "train"
    recipe = minimal_recipe("resnet18", str(data), 32)
    kept = load_data(recipe).val.items
    assert load_labelled_images(str(data), recipe, ("red", "green", "blue")).items == kept and 0 < len(kept) < 15
    recipe = minimal_recipe("resnet18", "elsewhere", 32)
    whole = load_labelled_images(str(data), recipe, ("red", "green", "blue"))
    pairs = {(Path(item).parent.name, label) for item, label in zip(whole.items, whole.labels, strict=True)}
    assert len(whole) == 30 and pairs == {("red", 0), ("green", 1), ("blue", 2)}


def test_predictions_are_those_of_timm_alone(run_folder, image_folder):
    """Each file's classes and probabilities are the softmax of timm's logits over the temperature, the likeliest first."""
    files = sorted((image_folder / "val").rglob("*.png"))
    temperature = json.loads((run_folder / "model" / "config.json").read_text())["temperature"]
    probs = (timm_alone(run_folder / "model", files) / temperature).softmax(1)
    rows = predict(run_folder / "model", [image_folder / "val"], top=3)
    assert [row["file"] for row in rows] == list(map(str, files))
    for row, expected in zip(rows, probs, strict=True):
        theirs = dict(zip(("blue", "green", "red"), expected.tolist(), strict=True))
        assert dict(row["top"]) == pytest.approx(theirs, abs=5e-3)  # pixels are rounded elsewhere
        assert [prob for _, prob in row["top"]] == sorted(dict(row["top"]).values(), reverse=True)
        assert [row["predicted"], row["probability"]] == row["top"][0]


def test_predictions_can_be_read_back(run_folder, image_folder):
    """The CSV and the table hold what the rows hold, an image a line."""
    rows = predict(run_folder, [image_folder / "val" / "red"])
    back = list(csv.DictReader(io.StringIO(predictions_as_csv(rows))))
    assert [(row["file"], row["predicted"], float(row["probability_1"]), row["class_3"]) for row in back] == [
        (row["file"], row["predicted"], row["probability"], row["top"][2][0]) for row in rows
    ]
    lines = predictions_as_table(rows).splitlines()
    assert len(lines) == 6 and lines[1].split()[:2] == [rows[0]["file"], rows[0]["predicted"]]
    assert f"{rows[0]['top'][0][0]} {rows[0]['probability']:.1%}" in lines[1]


def test_images_are_found_in_files_folders_and_patterns(image_folder, monkeypatch):
    """A file under any name, folders however deep, patterns; each image once, in the order asked for; else an error."""
    monkeypatch.chdir(image_folder)
    red = [Path("val/red") / f"{i}.png" for i in range(5)]
    assert find_images(["val/red/3.png", "val/red"]) == [red[3], *red[:3], red[4]]
    assert find_images(["val/*/0.png"]) == [Path("val") / name / "0.png" for name in ("blue", "green", "red")]
    assert find_images(["val/**/red"]) == red and len(find_images(["."])) == 45
    for nothing in ("nowhere", "val/*.jpg", str(ROOT / "recipes" / "*.py")):
        with pytest.raises(RecipeError, match="no images in"):
            find_images(["val", nothing])


def test_an_unreadable_image_has_a_row_with_the_reason(run_folder, image_folder, tmp_path, capsys):
    """It is named and counted on stderr, the others keep their predictions; where none can be read, that is the error."""
    good, bad = tmp_path / "b.png", tmp_path / "a.png"
    shutil.copyfile(image_folder / "val" / "red" / "0.png", good)
    bad.write_bytes(good.read_bytes()[:200])
    rows = predict(run_folder, [tmp_path])
    err = capsys.readouterr().err
    alone = predict(run_folder, [image_folder / "val" / "red" / "0.png"])[0]
    assert [row["file"] for row in rows] == [str(bad), str(good)]
    assert dict(rows[1]["top"]) == pytest.approx(dict(alone["top"]), abs=1e-6) and "error" not in rows[1]
    assert (
        rows[0]["predicted"] is None and rows[0]["top"] == [] and rows[0]["error"].startswith(f"can't read the image {bad}: ")
    )
    assert f"can't read the image {bad}" in err and "1 of 2 images could not be read" in err
    assert predictions_as_table(rows).splitlines()[1].split(maxsplit=2)[1:] == ["-", "can't be read"]
    with pytest.raises(RecipeError, match="no image could be read"):
        predict(run_folder, [bad])


def test_several_labels_an_image_are_sigmoids(tmp_path, image_folder):
    """Of a run with loss="multi_label", the classes above a sigmoid of 0.5 are predicted: none, or several."""
    torch.manual_seed(1)
    net = timm.create_model("test_resnet", num_classes=3).eval()
    save_model(tmp_path / "model", net, PREPROCESSING, ("a", "b", "c"))
    recipe = minimal_recipe("test_resnet", "gone", 32, batch_size=4)
    recipe = dataclasses.replace(recipe, loss="multi_label", metric="mean_average_precision")
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    rows = predict(tmp_path, [image_folder / "val"])
    transform = timm.data.create_transform(**PREPROCESSING)
    for row in rows:
        with torch.no_grad():
            probs = dict(zip("abc", net(transform(Image.open(row["file"]))[None])[0].sigmoid().tolist(), strict=True))
        assert dict(row["top"]) == pytest.approx(probs, abs=5e-3)
        assert set(row["predicted"]) == {name for name in "abc" if probs[name] > 0.5}
        assert row["probability"] == [dict(row["top"])[name] for name in row["predicted"]]
    assert len({len(row["predicted"]) for row in rows}) > 1 or len(rows[0]["predicted"]) != 1


def test_what_is_wrong_is_named(run_folder, image_folder, tmp_path):
    """Classes that differ, with both lists' differences; a folder that is not there; a top that is none."""
    for name in ("blue", "green", "violet"):
        shutil.copytree(image_folder / "val" / "red", tmp_path / "data" / name)
    for call, fault in (
        (lambda: evaluate(run_folder, tmp_path / "data"), "differ: only the model has: red; only .*data has: violet"),
        (lambda: evaluate(run_folder, tmp_path / "nowhere"), "no data set or folder '.*nowhere'"),
        (lambda: predict(run_folder, [image_folder], top=0), "--top starts at 1"),
        (lambda: load_model(run_folder.parent), "Wanted: the folder of a finished run"),
    ):
        with pytest.raises(RecipeError, match=fault):
            call()
