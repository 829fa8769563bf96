"""What a recipe promises, and what its record is made of."""

import json

import pytest

from conftest import ROOT, small_recipe
from finetune.baseline import promise, record_runs, summary
from finetune.recipe import Data, RecipeError
from finetune.recipe_file import as_dict


def finished(folder, recipe, top1, **result):
    """A run folder with a result."""
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(as_dict(recipe)))
    scores = {"top1": top1, "loss": 0.1, "macro_f1": top1, "best_top1": top1, "seconds": 1.0, "images_per_second": 1.0,
              "peak_memory_gib": 1.0, "seed": recipe.seed, "versions": {}, "hardware": {}}
    (folder / "result.json").write_text(json.dumps(scores | result))
    return folder


def test_a_record_is_made_of_runs_of_one_recipe(tmp_path):
    """Runs that differ in their seeds alone make a record; others, repeated seeds and smoke runs do not."""
    runs = [finished(tmp_path / str(seed), small_recipe(seed=seed), 0.9 + seed / 100) for seed in range(3)]
    assert summary(record_runs(runs)) == "91.0 % (90.0 to 92.0, 3 seeds)"
    assert summary(record_runs(runs[:1])) == "90.0 % (1 seed)"
    for name, recipe, result in (("other", small_recipe(epochs=5, seed=7), {}), ("again", small_recipe(), {}),
                                 ("smoke", small_recipe(seed=8), {"smoke": True})):
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
    for file in (ROOT / "recipes" / "baselines").glob("*.json"):
        assert '"/' not in file.read_text()
