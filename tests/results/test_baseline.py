"""What a recipe promises, what its record is made of, and whether a run keeps it."""

import json
import statistics
import sys

import numpy as np
import pytest
from scipy.stats import norm

from finetune.__main__ import main as verb
from finetune.recipe import Data
from finetune.recipe.load import load_recipe
from finetune.recipe.serialize import to_dict
from finetune.results import baseline, reproduce
from finetune.results.baseline import Baseline, baseline_of, interval, odds, promise, record_runs, summary, with_baseline
from finetune.utils.errors import RecipeError
from helpers import ROOT, small_recipe


def finished(folder, recipe, top1, **result):
    """A run folder with a result."""
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    scores = {
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
    (folder / "result.json").write_text(json.dumps(scores | result))
    return folder


def test_a_record_is_made_of_runs_of_one_recipe(tmp_path):
    """Runs that differ in their seeds alone make a record; others, repeated seeds and smoke runs do not."""
    runs = [finished(tmp_path / str(seed), small_recipe(seed=seed), 0.9 + seed / 100) for seed in range(3)]
    assert summary(record_runs(runs)) == "91.0 % (90.0 to 92.0, 3 seeds)"
    assert summary(record_runs(runs[:1])) == "90.0 % (1 seed)"
    for name, recipe, result in (
        ("other", small_recipe(epochs=5, seed=7), {}),
        ("again", small_recipe(), {}),
        ("smoke", small_recipe(seed=8), {"smoke": True}),
    ):
        with pytest.raises(RecipeError):
            record_runs([*runs, finished(tmp_path / name, recipe, 0.9, **result)])
    with pytest.raises(RecipeError, match="no finished run"):
        record_runs([tmp_path / "nowhere"])


def test_a_promise_is_about_the_recipe_as_measured(tmp_path):
    """The number is promised for any seed, and for nothing that was changed."""
    record = record_runs([finished(tmp_path / "run", small_recipe(), 0.9)])
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines" / "mine.json").write_text(json.dumps(record))
    assert promise(tmp_path / "mine.py", small_recipe(seed=5)) == "top-1 90.0 % (1 seed)"
    assert promise(tmp_path / "mine.py", small_recipe(epochs=5)) == "nothing: epochs differs from what was measured"
    other = small_recipe(data=Data("digits", 24, 8))
    assert promise(tmp_path / "mine.py", other) == "nothing: data differs from what was measured"
    assert promise(tmp_path / "yours.py", small_recipe()) == "nothing: not measured"


def test_records_name_no_machine():
    """The records in the repository hold no absolute path."""
    files = [file for file in (ROOT / "recipes" / "baselines").rglob("*.json*")]
    assert len(files) > 5 and not [file.name for file in files if '"/' in file.read_text()]


def record_of(scores, val_images=400):
    return {
        "recipe": to_dict(small_recipe()),
        "runs": [{"seed": seed, "top1": score, "val_images": val_images, "seconds": 90.0} for seed, score in enumerate(scores)],
        "versions": {"torch": "2.15.0+cu132"},
        "hardware": {"device": "cpu", "name": "CPU", "processes": 1, "threads": 2},
    }


@pytest.mark.parametrize("seeds,new", [(1, 1), (3, 1), (3, 3), (5, 2)])
def test_the_interval_holds_as_often_as_it_says(seeds, new):
    """Of simulated records and repetitions, each image right or wrong by chance, 95 % lie inside; their odds are uniform.

    The bound is the largest of two errors, so it may hold a little more often, and never less than 3 standard errors below.
    """
    random = np.random.default_rng(0)
    tries = 2000
    inside, chances = [], []
    for _ in range(tries):
        drawn = random.binomial(500, 0.9, seeds + new) / 500
        record = record_of(drawn[:seeds].tolist(), 500)
        low, high = interval(record, new)
        inside.append(low <= drawn[seeds:].mean() <= high)
        chances.append(odds(record, drawn[seeds:].tolist()))
    assert 0.95 - 3 * (0.95 * 0.05 / tries) ** 0.5 <= np.mean(inside) <= 0.99
    assert 0.3 < np.mean(np.array(chances) > 0.5) < 0.7


def test_the_interval_is_the_normal_distributions():
    """Wide spread over seeds decides where it is wider than the images' error; odds are scipy's; it never has no width."""
    record = record_of([0.80, 0.90, 0.85])
    error = statistics.stdev([0.80, 0.90, 0.85]) * (1 / 3 + 1 / 2) ** 0.5
    assert interval(record, 2) == pytest.approx(norm.interval(0.95, 0.85, error), abs=1e-4)
    assert odds(record, [0.95, 0.97]) == pytest.approx(2 * norm.sf((0.96 - 0.85) / error))
    low, high = interval(record_of([1.0, 1.0, 1.0]), 1)
    assert 0.97 < low < 0.995 and high == 1.0


def test_a_baseline_is_written_into_its_recipe(tmp_path, monkeypatch, capsys):
    """python -m finetune.baseline keeps the runs and writes what they promise into the recipe, again and again the same."""
    file = tmp_path / "mine.py"
    (tmp_path / "baselines").mkdir()
    recipe = load_recipe("efficientnet_lite0_digits")[0]
    file.write_text((ROOT / "recipes" / "efficientnet_lite0_digits.py").read_text().partition("\nbaseline = ")[0])
    runs = [
        finished(tmp_path / str(seed), small_recipe(**{**vars(recipe), "seed": seed}), top1)
        for seed, top1 in enumerate((0.95, 0.97))
    ]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["baseline", str(file), *map(str, runs)])
        assert baseline.main() == 0 and "96.0 % (95.0 to 97.0, 2 seeds)" in capsys.readouterr().out
        scope = {}
        exec(file.read_text(), scope)
        record = json.loads((tmp_path / "baselines" / "mine.json").read_text())
        assert scope["recipe"] == recipe and scope["baseline"] == baseline_of(record)
        assert file.read_text().count("Baseline(") == 1
        assert promise(file, recipe) == "top-1 96.0 % (95.0 to 97.0, 2 seeds)"
    made = scope["baseline"]
    assert made.mean == 0.96 and made.low < 0.94 and made.high > 0.98 and made.minutes == 0.0 and made.val_images == 400
    assert made.hardware == "1 x 2 CPU cores (CPU)" and made.versions == "torch 2.15.0"
    other = Baseline(**{**vars(made), "mean": 0.5})
    assert with_baseline(with_baseline(file.read_text(), other), made) == file.read_text()


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "recipes" / "baselines").glob("*.json")))
def test_each_baseline_is_its_records(name):
    """The baseline in a recipe is what its kept runs give, and nothing else."""
    scope = {}
    exec((ROOT / "recipes" / f"{name}.py").read_text(), scope)
    record = json.loads((ROOT / "recipes" / "baselines" / f"{name}.json").read_text())
    assert scope["baseline"] == baseline_of(record)
    assert promise(ROOT / "recipes" / f"{name}.py", scope["recipe"]).startswith("top-1")


QUICK = '''"""Quick."""
from finetune.lr_schedule import Constant
from finetune.recipe import AdamW, Data, LayerDecay, Recipe

recipe = Recipe(backbone="resnet10t", weights="none", data=Data("digits", 32, 64), epochs=1, batch_norm="train",
                groups=LayerDecay(head_lr=1e-3, stem_ratio=0.1), optimizer=AdamW(), schedule=Constant())
'''


def kept(tmp_path, monkeypatch, record_score):
    """The file of a recipe that trains a little, with a record of one run of it that reached `record_score`."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "quick.py"
    file.write_text(QUICK)
    (tmp_path / "baselines").mkdir()
    run = finished(tmp_path / "run", load_recipe(str(file))[0], record_score, val_images=359)
    monkeypatch.setattr(sys, "argv", ["baseline", str(file), str(run)])
    assert baseline.main() == 0
    return file


def test_reproduce_says_inside_or_outside(tmp_path, monkeypatch, capfd):
    """The recipe is really run, in a process of its own; its score decides the words and the exit code; nothing runs twice."""
    file = kept(tmp_path, monkeypatch, record_score=0.999)
    assert verb(["reproduce", str(file), "--output", "again"]) == 1
    out = capfd.readouterr().out
    reached = json.loads((tmp_path / "again" / "seed-0" / "result.json").read_text())["top1"]
    assert reached < 0.9 and f"seed 0: {reached:.2%}, recorded 99.90%" in out and "OUTSIDE" in out
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *args, **kwargs: pytest.fail("a finished run was run again"))
    record = json.loads((tmp_path / "baselines" / "quick.json").read_text())
    record["runs"][0]["top1"] = reached
    (tmp_path / "baselines" / "quick.json").write_text(json.dumps(record))
    assert verb(["reproduce", str(file), "--output", "again"]) == 0
    assert "lies inside" in (said := capfd.readouterr().out) and "100.0% of such tries would differ as much" in said


def test_reproduce_needs_a_promise(tmp_path, monkeypatch, capsys):
    """A recipe without a number, one that was changed, and one measured on a folder that is not named: one message each."""
    file = kept(tmp_path, monkeypatch, record_score=0.5)
    assert verb(["reproduce", "resnet50_cifar100"]) == 2 and "promises nothing: not measured" in capsys.readouterr().err
    record = json.loads((tmp_path / "baselines" / "quick.json").read_text())
    (tmp_path / "baselines" / "quick.json").write_text(json.dumps({**record, "images": "my photographs"}))
    assert verb(["reproduce", str(file)]) == 2
    assert "was measured on my photographs: name their folder, --data DIR" in capsys.readouterr().err
    file.write_text(file.read_text().replace("epochs=1", "epochs=2"))
    assert verb(["reproduce", str(file)]) == 2 and "epochs differs from what was measured" in capsys.readouterr().err
