"""A finished run on numbers: its folder, and every program that its network goes to."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from regression import write_numbers
from safetensors.torch import load_file, save_file
from sklearn.metrics import mean_absolute_error, root_mean_squared_error

from finetune.export.export import export
from finetune.inference.embed import embed
from finetune.inference.evaluate import evaluate, evaluation_as_text
from finetune.inference.explain import explain_images
from finetune.inference.inputs import find_inputs
from finetune.inference.predict import predict_images, predictions_as_table
from finetune.inference.predictions import predictions_as_csv, write_predictions
from finetune.models.saved import load_model
from finetune.results.compare import compare_runs, comparison_as_text
from finetune.results.runs import list_runs, runs_as_table
from finetune.run import main
from finetune.utils.errors import RecipeError
from helpers import on_folder, timm_alone

YEARS = 2000 + 10 * np.random.RandomState(0).normal(size=30)
SIZES = 1e-6 * np.random.RandomState(1).normal(size=30)
NAMES = ("label_year", "label_size")
TRAIN = np.arange(30) % 3 > 0


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """30 images, of which 20 train, with two numbers."""
    splits = ["val" if i % 3 == 0 else "train" for i in range(30)]
    return write_numbers(tmp_path_factory.mktemp("table"), np.stack([YEARS, SIZES], 1), NAMES, splits)


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    """A finished run in bf16."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    fields = ("loss=huber", "metric=rmse", "label_smoothing=0", "mixed_precision=bf16", "groups.layer4.unfreeze_at=0")
    assert main([*on_folder(table, folder, *fields), "--set", "epochs=2", "--quiet"]) == 0
    return folder


def outputs_of(run):
    kept = load_file(run / "predictions.safetensors")
    return kept["logits"], kept["labels"]


def test_a_run_says_what_it_reached(run):
    """result.json has the metrics of each number beside the training mean's; the folder has its pictures and its page."""
    result, (outputs, labels) = json.loads((run / "result.json").read_text()), outputs_of(run)
    assert result["mae"] == pytest.approx(mean_absolute_error(labels, outputs), rel=1e-6)
    assert [row["name"] for row in result["numbers"]] == ["year", "size"] and "calibration" not in result
    years = YEARS[TRAIN]
    assert result["baseline"]["numbers"]["mae"][0] == pytest.approx(np.abs(YEARS[~TRAIN] - years.mean()).mean(), rel=1e-4)
    assert {"numbers.png", "mistakes.png", "predictions.png", "report.html"} <= {file.name for file in run.iterdir()}
    assert not (run / "confusion.png").exists()
    page = (run / "report.html").read_text()
    assert "Largest errors" in page and "always the training images" in page and "<h2>Classes" not in page


def test_predict_says_the_runs_own_numbers(run, table, tmp_path):
    """The saved network, in bf16 as the run was, says of each validation image what the run said, by the numbers' names."""
    files = [table.parent / f"{i}.png" for i in range(0, 30, 3)]
    rows = predict_images(load_model(run / "model"), files)
    found = torch.tensor([[row["predicted"]["year"], row["predicted"]["size"]] for row in rows])
    spread = torch.tensor([YEARS.std(), SIZES.std()])
    assert ((found - outputs_of(run)[0]).abs() / spread).max() < 1e-4
    assert rows[0].keys() == {"file", "predicted"} and "year 20" in predictions_as_table(rows)
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:100])
    given = [files[0], tmp_path / "cut.png"]
    write_predictions(run / "model", given, tmp_path / "out.csv")
    text = (tmp_path / "out.csv").read_text()
    assert text == predictions_as_csv(predict_images(load_model(run / "model"), given))
    first, second = csv.DictReader(text.splitlines())
    assert float(first["predicted_year"]) == rows[0]["predicted"]["year"] and second["predicted_size"] == "" != second["error"]


def test_evaluate_finds_the_runs_own_metrics(run, table, tmp_path):
    """On the run's own table the metrics are the run's; on numbers of another name it says so."""
    found, result = evaluate(run / "model", table, tmp_path / "drawn"), json.loads((run / "result.json").read_text())
    for name in ("mae", "rmse", "r2", "spearman", "loss"):
        assert found[name] == pytest.approx(result[name], rel=1e-4)
    assert found["val_images"] == 10 and (tmp_path / "drawn" / "numbers.png").is_file()
    assert found["baseline"]["mae"] == pytest.approx(result["baseline"]["mae"], rel=1e-4)
    assert "mean of the numbers" in evaluation_as_text(found)
    other = write_numbers(tmp_path / "other", np.stack([YEARS, SIZES], 1), ("label_year", "label_length"))
    with pytest.raises(RecipeError, match="only the model has: size; only"):
        evaluate(run / "model", other)


def test_other_programs_get_the_labels_units(run, table, tmp_path):
    """timm alone, ONNX and torch.export give the numbers in their own units, with no file but the model's own."""
    files = [table.parent / f"{i}.png" for i in range(4)]
    model, spread = load_model(run / "model"), torch.tensor([YEARS.std(), SIZES.std()])
    ours = torch.tensor([[*row["predicted"].values()] for row in predict_images(model, files)])
    assert ((timm_alone(run / "model", files) - ours) / spread).abs().max() < 0.1  # in float32, of pixels that PIL resized
    assert model.units.deviation[0] == pytest.approx(YEARS[TRAIN].std(), rel=1e-4)
    card = export(run, "timm", tmp_path / "timm") / "README.md"
    assert "image-regression" in card.read_text() and "Always saying their mean" in card.read_text()
    exported = export(run, "torch", tmp_path / "torch", preprocess=True)
    about = json.loads((exported / "model.json").read_text())
    assert about["numbers"] == ["year", "size"] and about["output"] == "numbers" and "temperature" not in about
    app = (export(run, "gradio", tmp_path / "gradio") / "app.py").read_text()
    compile(app, "app.py", "exec")
    assert "sigmoid" not in app and "JSON" in app
    with pytest.raises(RecipeError, match="--half rounds"):
        export(run, "torch", tmp_path / "half", half=True)


def test_runs_are_compared_by_who_errs_less(run, tmp_path):
    """Of two runs the one of smaller errors is better, by more than chance where the interval says so, and is listed last."""
    outputs, labels = outputs_of(run)
    for name, share in (("worse", 2.0), ("better", 0.1)):
        shutil.copytree(run, tmp_path / name)
        said = labels + share * (outputs - labels)
        save_file({"logits": said, "labels": labels}, tmp_path / name / "predictions.safetensors")
        result = json.loads((run / "result.json").read_text())
        rmse = root_mean_squared_error(labels, said)
        (tmp_path / name / "result.json").write_text(json.dumps(result | {"rmse": rmse, "best_rmse": rmse}))
    found = compare_runs([run, tmp_path / "worse", tmp_path / "better"])
    _, worse, better = (row.get("minus_first") for row in found["runs"])
    assert (worse["verdict"], better["verdict"]) == ("loss", "gain")
    assert better["difference"] == pytest.approx(-0.9 * found["runs"][0]["rmse"], rel=1e-4) and better["interval"][1] < 0
    assert "%," not in comparison_as_text(found)
    ordered = list_runs(tmp_path, "result")
    assert [row["run"] for row in ordered] == ["worse", "better"] and "RMSE" in runs_as_table(ordered)


def test_what_is_of_classes_is_refused(run, table):
    """A threshold of probabilities and heat maps are for classes; features are of any network."""
    model, files = load_model(run / "model"), find_inputs([table.parent / "0.png"])
    with pytest.raises(RecipeError, match="this network predicts numbers"):
        predict_images(model, files, unsure_below=0.5)
    with pytest.raises(RecipeError, match="this network predicts numbers"):
        explain_images(model, files)
    assert embed(run / "model", files).features.shape == (1, 512)
