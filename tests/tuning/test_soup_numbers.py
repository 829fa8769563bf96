"""Soups of networks that predict numbers: averaged, chosen and compared in the labels' own units."""

import csv
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.metrics import cohen_kappa_score, mean_absolute_error, r2_score
from torch.optim.swa_utils import AveragedModel

from finetune.inference.predict import predict_images
from finetune.models.saved import load_model
from finetune.recipe.serialize import from_dict
from finetune.run import main
from finetune.tuning.soup import make_soup, soup_as_text
from helpers import on_folder

GRADES = np.arange(48) // 2 % 6


def write_table(folder, channels):
    """48 images, half of them to train, with a grade and a large number, a subgroup and a group; returns the table."""
    random, folder = np.random.RandomState(0), folder / "images"
    folder.mkdir()
    with open(folder / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label_grade", "label_size", "split", "subgroup", "group"])
        for i, grade in enumerate(GRADES.tolist()):
            pixels = random.normal(40 + 30 * grade, 25, (24, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(folder / f"{i}.png")
            table.writerow([f"{i}.png", grade, 5000 + 100 * grade, "val" if i % 2 else "train", "ab"[i % 4 // 2], i // 6])
    return folder / "table.csv"


@pytest.fixture(scope="module", params=["grades", "holdout"])
def runs(request, tmp_path_factory):
    """Three runs in grey on two numbers, two of them the first with noise: of grades, by kappa; of a holdout, by MAE."""
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    weights = timm.create_model("test_resnet", num_classes=3, in_chans=3).state_dict()
    safetensors.torch.save_file(weights, root / "weights.safetensors")
    asked = ["metric=quadratic_kappa"] if request.param == "grades" else ["metric=mae", "data.holdout=0.4"]
    fields = ("loss=huber", *asked, "label_smoothing=0", "data.channels=1", "linear_probe.l2=1", "epochs=1")
    words = ["--backbone", "test_resnet", "--weights", str(root / "weights.safetensors"), "--quiet"]
    assert main([*on_folder(write_table(root, 1), root / "run", *fields), *words]) == 0
    result = json.loads((root / "run" / "result.json").read_text()) | {"use": "model"}
    (root / "run" / "result.json").write_text(json.dumps(result))
    made = [root / "run"]
    for i in (1, 2):
        made.append(shutil.copytree(root / "run", root / f"run-{i}"))
        state = safetensors.torch.load_file(made[-1] / "model" / "model.safetensors")
        random = torch.Generator().manual_seed(i)
        for name, value in state.items():
            if value.is_floating_point() and "running" not in name:
                value.mul_(1 + 0.02 * i * torch.randn(value.shape, generator=random))
        safetensors.torch.save_file(state, made[-1] / "model" / "model.safetensors")
    return made


def said_of(run, files, net=None):
    """What a run's network, or another in its place, predicts of files: [n, numbers]."""
    model = load_model(run / "model")
    rows = predict_images(model if net is None else model._replace(net=net), files)
    return np.array([[*row["predicted"].values()] for row in rows])


def reference(metric, labels, said):
    """scikit-learn's metric, the mean over both numbers."""
    if metric == "mae":
        return mean_absolute_error(labels, said)
    said = said.round().clip(labels.min(0), labels.max(0)).astype(int)
    pairs = zip(labels.astype(int).T, said.T, strict=True)
    return np.mean(
        [cohen_kappa_score(*pair, weights="quadratic", labels=range(pair[0].min(), pair[0].max() + 1)) for pair in pairs]
    )


def test_a_soup_of_numbers_is_torchs_average_in_their_units(runs, tmp_path):
    """Its predictions are those of AveragedModel on the same networks, and its metrics scikit-learn's of them."""
    result = make_soup(runs, tmp_path / "soup")
    recipe = from_dict(json.loads((tmp_path / "soup" / "recipe.json").read_text()))
    average = AveragedModel(load_model(runs[0] / "model").net)
    for run in runs:
        average.update_parameters(load_model(run / "model").net)
    files = [runs[0].parent / "images" / f"{i}.png" for i in range(1, 48, 2)]
    labels = np.stack([GRADES[1::2], 5000 + 100 * GRADES[1::2]], 1).astype(float)
    said = said_of(tmp_path / "soup", files)
    np.testing.assert_allclose(said, said_of(runs[0], files, average.module.eval()), rtol=1e-4)
    assert result[recipe.metric] == pytest.approx(reference(recipe.metric, labels, said), rel=1e-4)
    assert result["r2"] == pytest.approx(r2_score(labels, said), rel=1e-3) and len(result["numbers"]) == 2
    assert {*result["by_subgroup"]} == {"a", "b"} and recipe.metric in result["by_subgroup"]["a"]
    for run, row in zip(runs, result["soup"]["runs"], strict=True):
        theirs = reference(recipe.metric, labels, said_of(run, files))
        assert row[recipe.metric] == pytest.approx(theirs, rel=1e-4)
        assert row["soup_minus_run"]["difference"] == pytest.approx(result[recipe.metric] - theirs, abs=1e-3)
    kept = [json.loads((one / "model" / "config.json").read_text())["training_labels"] for one in (runs[0], tmp_path / "soup")]
    assert (
        kept[0] == kept[1] and (tmp_path / "soup" / "numbers.png").is_file() and (tmp_path / "soup" / "report.html").is_file()
    )
    assert "%" not in soup_as_text(result).replace("95 %", "")


def test_what_is_chosen_is_better_by_the_metrics_direction(runs, tmp_path):
    """The greedy soup takes the runs from the best on, each if the average gets no worse; the share of the start likewise."""
    result = make_soup(runs, tmp_path / "soup", greedy=True, toward=True)
    sign = 1 if "quadratic_kappa" in result else -1
    tried = [row for row in result["soup"]["tried"] if "run" in row]
    assert [row["alone"] for row in tried] == sorted((row["alone"] for row in tried), reverse=sign > 0)
    best = float("-inf")
    for row in tried:
        assert row["added"] == (sign * row["average"] >= best)
        best = max(best, sign * row["average"])
    shares = {row["share_of_start"]: sign * row["average"] for row in result["soup"]["tried"] if "share_of_start" in row}
    assert shares[result["soup"]["share_of_start"]] == max(shares.values())


def test_the_start_is_the_linear_probes(runs, tmp_path):
    """A soup that is all start has the metrics that the run itself had of its linear probe."""
    made, result = (
        make_soup(runs[:1], tmp_path / "soup", toward=True, share=1.0),
        json.loads((runs[0] / "result.json").read_text()),
    )
    if "holdout" not in str(runs[0].parent):  # whose run was measured on other images
        assert made["quadratic_kappa"] == pytest.approx(result["linear_probe_quadratic_kappa"], abs=1e-6)
