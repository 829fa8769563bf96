"""The record behind a recipe's number: what it is made of, which recipe it is about, and whether new runs agree with it."""

import dataclasses
import json
import statistics
import sys

import numpy as np
import pytest
from scipy.stats import norm

from finetune.__main__ import main as verb
from finetune.recipe import Data
from finetune.recipe.load import load_recipe
from finetune.recipe.metrics import METRICS
from finetune.recipe.serialize import to_dict
from finetune.results import baseline, reproduce
from finetune.results.baseline import (
    describe_baseline,
    describe_hardware,
    describe_record,
    p_value,
    prediction_interval,
    record_runs,
)
from finetune.utils.errors import RecipeError
from helpers import ROOT, small_recipe


def finished(folder, recipe, top1, **result):
    """A run folder with a result."""
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    metrics = {
        "top1": top1,
        "loss": 0.1,
        "macro_f1": top1,
        "best_top1": top1,
        "seconds": 1.0,
        "images_per_second": 1.0,
        "peak_memory_gib": 1.0,
        "seed": recipe.seed,
        "val_images": 400,
        "versions": {"torch": "2.15.0+cu132"},
        "hardware": {"device": "cpu", "name": "CPU", "processes": 1, "threads": 2},
    }
    (folder / "result.json").write_text(json.dumps(metrics | result))
    return folder


def test_a_record_is_made_of_runs_of_one_recipe(tmp_path):
    """Runs that differ in their seeds alone make a record; others, repeated seeds and smoke runs do not."""
    runs = [finished(tmp_path / str(seed), small_recipe(seed=seed), 0.9 + seed / 100) for seed in range(3)]
    assert describe_record(record_runs(runs)) == "91.0 % (90.0 to 92.0, 3 seeds)"
    assert describe_record(record_runs(runs[:1])) == "90.0 % (1 seed)"
    for name, recipe, result in (
        ("other", small_recipe(epochs=5, seed=7), {}),
        ("again", small_recipe(), {}),
        ("smoke", small_recipe(seed=8), {"smoke": True}),
    ):
        with pytest.raises(RecipeError):
            record_runs([*runs, finished(tmp_path / name, recipe, 0.9, **result)])
    with pytest.raises(RecipeError, match="no finished run"):
        record_runs([tmp_path / "nowhere"])


def test_a_baseline_is_the_measured_recipes_alone(tmp_path):
    """The number holds for any seed, and for no recipe with another field changed."""
    record = record_runs([finished(tmp_path / "run", small_recipe(), 0.9)])
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines" / "mine.json").write_text(json.dumps(record))
    assert describe_baseline(tmp_path / "mine.py", small_recipe(seed=5)) == "top-1 90.0 % (1 seed)"
    assert describe_baseline(tmp_path / "mine.py", small_recipe(epochs=5)) == "none: epochs differ from the measured recipe"
    other = small_recipe(data=Data("digits", 24, 8))
    assert describe_baseline(tmp_path / "mine.py", other) == "none: data differ from the measured recipe"
    assert describe_baseline(tmp_path / "yours.py", small_recipe()) == "none: not measured"


def test_records_name_no_machine():
    """The records in the repository hold no absolute path."""
    files = [file for folder in ("recipes/baselines", "benchmarks/results") for file in (ROOT / folder).rglob("*.json*")]
    assert len(files) > 5 and not [file.name for file in files if '"/' in file.read_text()]


def record_of(values, val_images=400):
    return {
        "recipe": to_dict(small_recipe()),
        "runs": [{"seed": seed, "top1": value, "val_images": val_images, "seconds": 90.0} for seed, value in enumerate(values)],
        "versions": {"torch": "2.15.0+cu132"},
        "hardware": {"device": "cpu", "name": "CPU", "processes": 1, "threads": 2},
    }


@pytest.mark.parametrize("seeds,new", [(1, 1), (3, 1), (3, 3), (5, 2)])
def test_the_interval_holds_as_often_as_it_says(seeds, new):
    """Of simulated records and repetitions, each image right or wrong by chance, 95 % lie inside; their p-values are uniform.

    The bound is the largest of two errors, so it may hold a little more often, and never less than 3 standard errors below.
    """
    random = np.random.default_rng(0)
    tries = 2000
    inside, p_values = [], []
    for _ in range(tries):
        drawn = random.binomial(500, 0.9, seeds + new) / 500
        record = record_of(drawn[:seeds].tolist(), 500)
        low, high = prediction_interval(record, new)
        inside.append(low <= drawn[seeds:].mean() <= high)
        p_values.append(p_value(record, drawn[seeds:].tolist()))
    assert 0.95 - 3 * (0.95 * 0.05 / tries) ** 0.5 <= np.mean(inside) <= 0.99
    assert 0.3 < np.mean(np.array(p_values) > 0.5) < 0.7


def test_the_interval_is_the_normal_distributions():
    """Wide spread over seeds decides where it is wider than the images' error; p-values are scipy's; it never has no width."""
    record = record_of([0.80, 0.90, 0.85])
    error = statistics.stdev([0.80, 0.90, 0.85]) * (1 / 3 + 1 / 2) ** 0.5
    assert prediction_interval(record, 2) == pytest.approx(norm.interval(0.95, 0.85, error), abs=1e-4)
    assert p_value(record, [0.95, 0.97]) == pytest.approx(2 * norm.sf((0.96 - 0.85) / error))
    low, high = prediction_interval(record_of([1.0, 1.0, 1.0]), 1)
    assert 0.97 < low < 0.995 and high == 1.0


def test_the_command_writes_the_record_alone(tmp_path, monkeypatch, capsys):
    """python -m finetune.results.baseline keeps the runs, again and again the same, and leaves the recipe as it is."""
    file, text = tmp_path / "mine.py", (ROOT / "recipes" / "efficientnet_lite0_digits.py").read_text()
    (tmp_path / "baselines").mkdir()
    file.write_text(text)
    recipe = load_recipe(str(file))[0]
    runs = [
        finished(tmp_path / str(seed), dataclasses.replace(recipe, seed=seed), top1) for seed, top1 in enumerate((0.95, 0.97))
    ]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["baseline", str(file), *map(str, runs)])
        assert baseline.main() == 0 and capsys.readouterr().out == "96.0 % (95.0 to 97.0, 2 seeds)\n"
        record = json.loads((tmp_path / "baselines" / "mine.json").read_text())
        assert record == json.loads(json.dumps(record_runs(runs))) and file.read_text() == text
        assert describe_baseline(file, recipe) == "top-1 96.0 % (95.0 to 97.0, 2 seeds)"
    assert [run["top1"] for run in record["runs"]] == [0.95, 0.97] and describe_hardware(
        record["hardware"]
    ) == "1 x 2 CPU cores"


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "recipes" / "baselines").glob("*.json")))
def test_each_record_is_about_its_recipe(name):
    """A record in the repository is of the recipe as it stands there."""
    file = ROOT / "recipes" / f"{name}.py"
    record = json.loads((ROOT / "recipes" / "baselines" / f"{name}.json").read_text())
    recipe, _ = load_recipe(name)
    assert describe_baseline(file, recipe) == f"{METRICS[recipe.metric]} {describe_record(record)}"


QUICK = '''"""Quick."""
from finetune import AdamW, Constant, Data, LayerDecay, Recipe

recipe = Recipe(backbone="resnet10t", weights="none", data=Data("digits", 32, 64), epochs=1, batch_norm="train",
                groups=LayerDecay(head_lr=1e-3, stem_ratio=0.1), optimizer=AdamW(), schedule=Constant())
'''


def recorded(tmp_path, monkeypatch, top1):
    """The file of a recipe that trains a little, with a record of one run of it that reached `top1`."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "quick.py"
    file.write_text(QUICK)
    (tmp_path / "baselines").mkdir()
    run = finished(tmp_path / "run", load_recipe(str(file))[0], top1, val_images=359)
    monkeypatch.setattr(sys, "argv", ["baseline", str(file), str(run)])
    assert baseline.main() == 0
    return file


def test_reproduce_says_inside_or_outside(tmp_path, monkeypatch, capfd):
    """The recipe is really run, in a process of its own; its metric decides the words and the exit code; nothing runs twice."""
    file = recorded(tmp_path, monkeypatch, top1=0.999)
    assert verb(["reproduce", str(file), "--output", "again"]) == 1
    out = capfd.readouterr().out
    reached = json.loads((tmp_path / "again" / "seed-0" / "result.json").read_text())["top1"]
    assert reached < 0.9 and f"seed 0: {reached:.2%}, recorded 99.90%" in out and "OUTSIDE" in out
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *args, **kwargs: pytest.fail("a finished run was run again"))
    record = json.loads((tmp_path / "baselines" / "quick.json").read_text())
    record["runs"][0]["top1"] = reached
    (tmp_path / "baselines" / "quick.json").write_text(json.dumps(record))
    assert verb(["reproduce", str(file), "--output", "again"]) == 0
    assert "lies inside" in (said := capfd.readouterr().out) and "(p = 1.00)" in said


def test_reproduce_needs_a_record(tmp_path, monkeypatch, capsys):
    """A recipe without a number, one that was changed, and one measured on a folder that is not named: one message each."""
    file = recorded(tmp_path, monkeypatch, top1=0.5)
    assert (
        verb(["reproduce", "resnet50_cifar100"]) == 2
        and "has no baseline to compare with (none: not measured)" in capsys.readouterr().err
    )
    record = json.loads((tmp_path / "baselines" / "quick.json").read_text())
    (tmp_path / "baselines" / "quick.json").write_text(json.dumps({**record, "images": "my photographs"}))
    assert verb(["reproduce", str(file)]) == 2
    assert "was measured on my photographs: name their folder, --data DIR" in capsys.readouterr().err
    (tmp_path / "baselines" / "quick.json").write_text(json.dumps({**record, "weights": "my weights"}))
    assert verb(["reproduce", str(file)]) == 2
    assert "was measured with my weights: name their file, --weights FILE" in capsys.readouterr().err
    file.write_text(file.read_text().replace("epochs=1", "epochs=2"))
    assert verb(["reproduce", str(file)]) == 2 and "epochs differ from the measured recipe" in capsys.readouterr().err
