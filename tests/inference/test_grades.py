"""Finished runs on grades, as numbers and as classes: every place that a metric goes to."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from regression import write_numbers
from safetensors.torch import load_file
from sklearn.metrics import cohen_kappa_score

from finetune.export.describe import describe_use
from finetune.export.export import export
from finetune.inference.evaluate import evaluate, evaluation_as_text
from finetune.inference.predict import predict_images, predictions_as_table
from finetune.inference.predictions import predictions_as_csv
from finetune.models.saved import load_model
from finetune.results.compare import compare_runs, comparison_as_text
from finetune.results.runs import list_runs, runs_as_table
from finetune.run import main
from helpers import on_folder

GRADES = np.arange(44) % 11  # 10 is a grade of two digits
KAPPA = {"weights": "quadratic", "labels": range(11)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of two finished runs on a table of grades: "numbers" and "classes"."""
    folder = tmp_path_factory.mktemp("grades")
    table = write_numbers(folder, GRADES, splits=["val" if i % 11 % 4 == i // 11 else "train" for i in range(44)])
    for name, loss in (("numbers", "loss=mse"), ("classes", "loss=cross_entropy")):
        fields = (loss, "metric=quadratic_kappa", "label_smoothing=0", "groups.layer4.unfreeze_at=0", "linear_probe=none")
        assert main([*on_folder(table, folder / name, *fields), "--set", "epochs=1", "--quiet"]) == 0
    return folder


def predicted(run):
    """(labels, predicted grades) of a run's validation images, from its files alone."""
    kept = load_file(run / "predictions.safetensors")
    if kept["labels"].ndim == 1:
        names = torch.tensor([float(name) for name in load_model(run / "model").classes])
        return names[kept["labels"]], names[kept["logits"].argmax(1)]
    return kept["labels"][:, 0], kept["logits"][:, 0].round().clamp(0, 10)


@pytest.mark.parametrize("name", ["numbers", "classes"])
def test_a_result_has_the_kappa_of_its_predictions(runs, name):
    """result.json, the page, the model card, the list of runs and `evaluate` have scikit-learn's kappa of the predictions."""
    run, result = runs / name, json.loads((runs / name / "result.json").read_text())
    kappa = cohen_kappa_score(*predicted(run), **KAPPA)
    assert result["quadratic_kappa"] == pytest.approx(kappa, abs=1e-9)
    found = evaluate(run, runs / "table.csv")
    assert found["quadratic_kappa"] == pytest.approx(kappa, abs=1e-9) and len(found["intervals"]["quadratic_kappa"]) == 2
    said = f"{kappa:.4g}"
    card = (export(run, "timm", runs / f"{name} for timm") / "README.md").read_text()
    texts = (run / "report.html").read_text(), card, evaluation_as_text(found), runs_as_table(list_runs(runs))
    assert all("quadratic kappa" in text and said in text for text in texts)
    assert (run / "confusion.png").is_file() and (run / "model" / "config.json").is_file()


def test_folders_of_grades_are_evaluated(runs, tmp_path):
    """A network of grades, as numbers or as classes, is measured on folders that are called by them."""
    for i in range(22):
        folder = tmp_path / f"{GRADES[i]:.1f}"
        folder.mkdir(exist_ok=True)
        Image.open(runs / f"{i}.png").rotate(90).save(folder / f"{i}.png")  # other files than the run's
    found = {name: evaluate(runs / name, tmp_path) for name in ("numbers", "classes")}
    files = [tmp_path / f"{GRADES[i]:.1f}" / f"{i}.png" for i in range(22)]
    for name, key in (("numbers", "grade"), ("classes", "predicted")):
        said = [int(float(row[key])) for row in predict_images(load_model(runs / name / "model"), files)]
        assert found[name]["quadratic_kappa"] == pytest.approx(cohen_kappa_score(GRADES[:22], said, **KAPPA), abs=1e-9)


def test_predict_says_the_nearest_grade(runs):
    """Of numbers the table, the CSV and JSON have the number and the grade; of classes the class, in the order of grades."""
    files = [runs / f"{i}.png" for i in range(44)]
    model = load_model(runs / "numbers" / "model")
    rows = predict_images(model, files)
    assert [row["grade"] for row in rows] == [min(10, max(0, round(row["predicted"]))) for row in rows]
    assert "grade" in predictions_as_table(rows).splitlines()[0]
    first = next(csv.DictReader(predictions_as_csv(rows).splitlines()))
    assert [*first] == ["file", "predicted", "grade", "error"] and int(first["grade"]) == rows[0]["grade"]
    assert (model.units.lowest, model.units.highest) == ((0,), (10,))
    assert describe_use(model)["grades"] == {"from": "numbers, rounded, and clipped to these", "lowest": [0], "highest": [10]}
    assert (
        "clip them to those of training, from 0 to 10"
        in (export(runs / "numbers", "timm", runs / "out") / "README.md").read_text()
    )
    assert load_model(runs / "out").recipe.metric == "quadratic_kappa"  # told by the files alone
    assert [float(name) for name in load_model(runs / "classes" / "model").classes] == [*range(11)]


def test_runs_on_grades_are_compared(runs):
    """Of a run and its copy with other predictions the difference is that of scikit-learn's kappas."""
    found = compare_runs([runs / "numbers", runs / "classes"])
    assert found["runs"][1]["not_compared"] and "quadratic kappa" in comparison_as_text(found)
    low, high = found["runs"][0]["interval"]
    assert low <= cohen_kappa_score(*predicted(runs / "numbers"), **KAPPA) <= high
