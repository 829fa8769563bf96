"""Finished runs side by side."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from PIL import Image
from scipy.stats import binomtest

from finetune.__main__ import main
from finetune.results.compare import compare_runs, comparison_as_text
from finetune.utils.errors import RecipeError


@pytest.fixture
def pair(run_folder, tmp_path):
    """A run, and a copy that says "red" of every image, at another learning rate and with a longer name."""
    other = shutil.copytree(run_folder, tmp_path / "the-other-run")
    kept = safetensors.torch.load_file(other / "predictions.safetensors")
    kept["logits"] = torch.eye(3)[[2] * len(kept["logits"])]
    (other / "predictions.safetensors").write_bytes(safetensors.torch.save(kept))
    change(other / "recipe.json", lr_scale=0.5)
    change(other / "result.json", top1=(kept["labels"] == 2).double().mean().item())
    return run_folder, other


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def right(run):
    kept = safetensors.torch.load_file(run / "predictions.safetensors")
    return kept["logits"].argmax(1) == kept["labels"]


def test_differences_are_those_of_the_same_images(pair):
    """The difference is that of the two results, its p-value SciPy's of the images that only one has right."""
    found = compare_runs(pair)
    first, other = found["runs"]
    ours, theirs = map(right, pair)
    minus, alone = other["minus_first"], int((theirs & ~ours).sum())
    assert minus["difference"] == pytest.approx(other["top1"] - first["top1"]) and "minus_first" not in first
    assert minus["p_value"] == pytest.approx(binomtest(alone, int((theirs ^ ours).sum())).pvalue)
    assert found["fields"] == [{"field": "lr_scale", "values": [1.0, 0.5]}]


def test_other_images_are_said(pair):
    """Runs whose validation images or labels differ are shown, without a difference."""
    first, other = pair
    for change_it in (
        lambda: change(other / "run.json", images={"validation": "others"}),
        lambda: relabel(other / "predictions.safetensors"),
    ):
        before = {file: file.read_bytes() for file in (other / "run.json", other / "predictions.safetensors")}
        change_it()
        row = compare_runs(pair)["runs"][1]
        assert row["not_compared"] == "other validation images" and "minus_first" not in row
        for file, content in before.items():
            file.write_bytes(content)
    assert "minus_first" in compare_runs(pair)["runs"][1]


def relabel(file):
    kept = safetensors.torch.load_file(file)
    kept["labels"] = (kept["labels"] + 1) % 3
    file.write_bytes(safetensors.torch.save(kept))


def test_the_command_prints_tables_and_draws(pair, tmp_path, capsys):
    """Eighty columns, both runs in each table, a picture; as JSON what compare_runs returns."""
    words = ["compare", *map(str, pair)]
    assert main([*words, "--output", str(tmp_path / "pictures")]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:12])) <= 80 and text.count("the-other-run") == 3 and "lr_scale" in text
    assert comparison_as_text(compare_runs(pair)) in text
    with Image.open(tmp_path / "pictures" / "compare.png") as picture:
        assert picture.size[0] > 1000
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == compare_runs(pair)


def test_what_can_not_be_compared_is_refused(pair):
    """One run, the same twice, other metrics, a file that was cut."""
    first, other = pair
    for runs in ([first], [first, first], [first, first / ".." / first.name]):
        with pytest.raises(RecipeError, match="two different runs"):
            compare_runs(runs)
    change(other / "recipe.json", metric="macro_f1")
    with pytest.raises(RecipeError, match="is measured by macro_f1, .* by top1: name runs of one metric"):
        compare_runs(pair)
    change(other / "recipe.json", metric="top1")
    (other / "predictions.safetensors").write_bytes(b"cut")
    with pytest.raises(RecipeError, match="can't read the predictions of"):
        compare_runs(pair)
