"""Leaving out what a network is unsure of: what that gains, and which images it is."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.__main__ import main as verb
from finetune.inference.evaluate import evaluate
from finetune.inference.predict import predict_images
from finetune.metrics.calibration import probabilities
from finetune.metrics.coverage import SHARES, coverage_table
from finetune.models.saved import load_model
from finetune.utils.errors import RecipeError


@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
def test_a_table_of_coverage_is_the_one_made_by_hand(loss):
    """Thresholds by numpy's order statistics, the error of the images at or above each; ties are kept together."""
    rng = np.random.default_rng(0)
    logits, labels = torch.tensor(rng.normal(0, 2, (200, 4)).round(1)), torch.tensor(rng.integers(0, 4, 200))
    rows = coverage_table(loss, logits, labels, temperature=1.5)
    probs = probabilities(loss, logits, 1.5).numpy()
    sure, right = probs.max(1), probs.argmax(1) == labels.numpy()
    for share, row in zip(SHARES, rows, strict=True):
        threshold = np.sort(sure)[::-1][round(share * 200) - 1]
        kept = sure >= threshold
        assert row == pytest.approx({"coverage": kept.mean(), "threshold": threshold, "error": 1 - right[kept].mean()})
    assert coverage_table(loss, logits, torch.full((200,), -100)) == []


def test_evaluate_has_it(run_folder, image_folder, tmp_path):
    """In its result, drawn beside the confusion matrix, and printed."""
    result = evaluate(run_folder, image_folder, tmp_path / "out")
    assert [row["coverage"] for row in result["coverage"]][0] == 1
    assert result["coverage"][0]["error"] == pytest.approx(1 - result["top1"])
    assert (tmp_path / "out" / "coverage.png").stat().st_size > 10_000


def test_the_terminal_has_metrics_and_thresholds_in_80_columns(run_folder, image_folder, capsys):
    """A line for each metric with its interval; the thresholds; the temperature."""
    assert verb(["evaluate", str(run_folder), "--data", str(image_folder)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for words in ("balanced accuracy", "AUROC", "kappa", "log loss", "Brier score", "calibration error", "95 % interval"):
        assert words in out
    assert "images kept" in out and "at the model's temperature" in out


def test_what_is_unsure_is_marked_and_counted(run_folder, image_folder, tmp_path, capsys):
    """On the terminal, in JSON and in each kind of file, at one threshold; without it no column is added."""
    files = sorted((image_folder / "val").rglob("*.png"))
    (broken := tmp_path / "broken.png").write_bytes(b"no image")
    probs = [row["probability"] for row in predict_images(load_model(run_folder), files)]
    below = float(np.median(probs))
    wanted = [prob < below for prob in probs]
    words = ["predict", str(run_folder), *map(str, [*files, broken]), "--unsure-below", str(below)]
    assert verb([*words, "--json"]) == 0
    shown = capsys.readouterr()
    assert [row.get("unsure") for row in json.loads(shown.out)] == [*wanted, None]
    assert f"unsure of {sum(wanted)} of {len(files) + 1} images" in shown.err
    assert verb(words) == 0 and capsys.readouterr().out.count("(unsure)") == sum(wanted)
    read_parquet = pytest.importorskip("pyarrow.parquet").read_table
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        assert verb([*words, "--output", str(tmp_path / name)]) == 0
    with open(tmp_path / "out.csv") as lines:
        assert [row["unsure"] for row in csv.DictReader(lines)] == [*map(str, wanted), ""]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row.get("unsure") for row in rows] == [*wanted, None]
    assert read_parquet(tmp_path / "out.parquet")["unsure"].to_pylist() == [*wanted, None]
    capsys.readouterr()
    assert verb(["predict", str(run_folder), str(files[0]), "--csv"]) == 0
    assert "unsure" not in capsys.readouterr().out.splitlines()[0]


def test_of_several_labels_the_least_sure_class_counts(tmp_path, run_folder):
    """A class whose presence and absence are both less likely than the threshold makes an image unsure."""
    model = load_model(run_folder)
    recipe = replace(model.recipe, loss="multi_label", metric="mean_average_precision")
    model = model._replace(recipe=recipe, thresholds=(0.5,) * len(model.classes))
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 48, 3)).astype(np.uint8))
    probs = [prob for _, prob in predict_images(model, [image], top=3)[0]["top"]]
    least = min(max(prob, 1 - prob) for prob in probs)
    for below, unsure in ((least - 1e-6, False), (min(1.0, least + 1e-6), True)):
        assert predict_images(model, [image], unsure_below=below)[0]["unsure"] is unsure


@pytest.mark.parametrize("below", [0.0, -1.0, 1.5, float("nan")])
def test_a_threshold_is_a_probability(run_folder, below):
    """Anything else is refused before the first image."""
    with pytest.raises(RecipeError, match="--unsure-below"):
        predict_images(load_model(run_folder), [], unsure_below=below)
