"""A model of several labels an image at work: its thresholds, tables to evaluate on, what it is exported as."""

import json
import math
import shutil

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from sklearn.metrics import f1_score, precision_score

from finetune.export.export import export
from finetune.inference.evaluate import evaluate, evaluation_as_text
from finetune.inference.predict import predict_images
from finetune.metrics.thresholds import choose_thresholds
from finetune.models.saved import load_model
from finetune.run import main
from finetune.utils.errors import RecipeError
from helpers import on_folder, timm_alone
from image_files import write_csv

NAMES = ("blue", "green", "red")
LEAST = (0.2, 0.9, 0.45)


def labels_of(i):
    """Blue is rare; some images have no label."""
    return [name for name, there in zip(NAMES, (i % 7 == 0, i % 3 == 0, i % 2 == 0), strict=True) if there]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on 60 images with a stripe of each of their colours, and of labels.csv."""
    root = tmp_path_factory.mktemp("several")
    for i in range(60):
        pixels = np.random.RandomState(i).randint(0, 100, (32, 33, 3)).astype(np.uint8)
        for name in labels_of(i):
            k = NAMES.index(name)
            pixels[:, 11 * k : 11 * k + 11, 2 - k] += 150
        Image.fromarray(pixels).save(root / f"{i}.png")
    write_csv(root, [f"{i}.png,{';'.join(labels_of(i))}" for i in range(60)], "path,label")
    several = ("loss=multi_label", "metric=mean_average_precision", "epochs=1", "data.val_share=0.4")
    assert main([*on_folder(root / "labels.csv", root / "run", *several), "--quiet"]) == 0
    return root


@pytest.fixture
def chosen(trained, tmp_path):
    """A network of the run, in it, with thresholds that are known."""
    run = shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("model-best", "checkpoint*"))
    change(run / "model", LEAST)
    return run / "model"


def change(model, thresholds):
    """Write these thresholds to a model's config.json."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"thresholds": thresholds}))


def table(root, rows):
    """A table of these labels, by the numbers of images."""
    (root / "table.csv").write_text("path,label\n" + "".join(f"{i}.png,{cell}\n" for i, cell in rows))
    return root / "table.csv"


def test_a_run_keeps_its_thresholds(trained):
    """Those of the logits it kept are in result.json and in config.json; model-best has its own, and the halves stay."""
    result, kept = json.loads((trained / "run" / "result.json").read_text()), trained / "run" / "predictions.safetensors"
    logits, labels = map(safetensors.torch.load_file(kept).get, ("logits", "labels"))
    config = json.loads((trained / "run" / "model" / "config.json").read_text())
    thresholds, predicted = choose_thresholds(logits, labels, result["calibration"]["temperature"])
    assert result["thresholds"] == config["thresholds"] == thresholds
    assert result["macro_f1_at_thresholds"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    assert result["macro_f1"] == pytest.approx(f1_score(labels, logits > 0, average="macro", zero_division=0))
    assert len(json.loads((trained / "run" / "model-best" / "config.json").read_text())["thresholds"]) == 3


def test_what_is_above_its_threshold_is_predicted(chosen, trained, tmp_path):
    """By predict, with or without the run; by evaluate, whose table has the thresholds; of a model without any, above 0.5."""
    files = [trained / f"{i}.png" for i in range(60)]
    for source in (chosen, shutil.copytree(chosen, tmp_path / "alone")):
        model = load_model(source)
        assert model.thresholds == LEAST and model.recipe.loss == "multi_label"
        for row in predict_images(model, files, top=3):
            assert row["predicted"] == [name for name, prob in row["top"] if prob > LEAST[NAMES.index(name)]]
    probs = (timm_alone(chosen, files).double() / model.temperature).sigmoid().numpy()
    truth = np.array([[name in labels_of(i) for name in NAMES] for i in range(60)])
    found = evaluate(tmp_path / "alone", trained / "labels.csv")
    assert found["macro_f1_at_thresholds"] == pytest.approx(f1_score(truth, probs > LEAST, average="macro"), abs=0.05)
    wanted = precision_score(truth, probs > LEAST, average=None, zero_division=0)
    assert [row["precision"] for row in found["classes"]] == pytest.approx(wanted, abs=0.1)
    assert [row["threshold"] for row in found["classes"]] == list(LEAST) and found["thresholds"] == list(LEAST)
    assert "macro F1, own thresholds" in (text := evaluation_as_text(found)) and "threshold" in text
    change(chosen, None)  # as of an earlier version
    assert load_model(chosen).thresholds == (0.5, 0.5, 0.5)


def test_thresholds_that_are_none_are_one_sentence(chosen):
    """Too few, beyond a probability, no numbers, no list."""
    for wrong in ([0.5, 0.5], [0.5, 0.5, 2], [0.5, 0.5, True], [0.5, 0.5, math.nan], 0.5, {"red": 0.5}, [0.1, 0.2, "0.3"], []):
        change(chosen, wrong)
        with pytest.raises(RecipeError, match="config.json: thresholds must be 3 numbers from 0 to 1, one for each class"):
            load_model(chosen)


def test_exports_have_the_thresholds(chosen, tmp_path):
    """model.json, the model card and the page to try it on."""
    about = json.loads((export(chosen, "torch", tmp_path / "torch") / "model.json").read_text())
    assert about["thresholds"] == list(LEAST) and "above its threshold" in about["predicted"]
    folder = export(chosen, "gradio", tmp_path / "demo")
    assert "is above its threshold: blue 0.2, green 0.9, red 0.45." in (folder / "model" / "README.md").read_text()


def test_tables_are_evaluated_as_they_come(trained, capsys):
    """Another order of rows and classes, other marks and spaces give the same metrics; cells may be empty, a class missing."""
    rows = [(i, ";".join(labels_of(i))) for i in range(60)]
    plain = evaluate(trained / "run" / "model", table(trained, rows))
    others = [(i, f" {' | '.join(reversed(labels_of(i)))} |") for i in range(60)][::-1]
    again = evaluate(trained / "run" / "model", table(trained, others))
    assert again["val_images"] == plain["val_images"] < 60  # those that the run kept
    for name in ("mean_average_precision", "macro_f1", "auroc"):
        assert again[name] == pytest.approx(plain[name], abs=1e-6)
    rare = [(i, ";".join(name for name in labels_of(i) if name != "blue")) for i in range(60)]
    found = evaluate(trained / "run" / "model", table(trained, rare))
    assert [row["images"] > 0 for row in found["classes"]] == [False, True, True]
    assert "table.csv has no labelled image of class 'blue': no metric tells" in capsys.readouterr().err
    one = evaluate(trained / "run" / "model", table(trained, [(i, "red") for i in range(60) if labels_of(i) == ["red"]]))
    assert "auroc" not in one and [row["images"] > 0 for row in one["classes"]] == [False, False, True]


@pytest.mark.parametrize(
    "cell,fault", [("red;violet", "only .*table.csv has: violet"), ("", "no row of .*table.csv has a label")]
)
def test_a_table_that_says_nothing_is_refused(trained, cell, fault):
    """A class that the model does not know, and no class at all."""
    with pytest.raises(RecipeError, match=fault):
        evaluate(trained / "run" / "model", table(trained, [(i, cell) for i in range(3)]))


def test_a_class_may_be_missing_in_validation(trained, capsys):
    """A table with a split trains though no row for validation has some class, and says so; the other way it is refused."""
    rows = [f"{i}.png,{';'.join(labels_of(i))},{'val' if i % 7 else 'train'}" for i in range(60)]
    several = ("loss=multi_label", "metric=mean_average_precision")
    write_csv(trained, rows)
    assert main([*on_folder(trained / "labels.csv", trained / "none", *several), "--dry-run"]) == 0
    assert "no validation image of class 'blue'" in capsys.readouterr().err
    write_csv(trained, [row.replace("val", "x").replace("train", "val").replace("x", "train") for row in rows])
    assert main([*on_folder(trained / "labels.csv", trained / "none", *several), "--dry-run"]) == 2
    assert "only in val: blue" in capsys.readouterr().err
