"""A search from the command line to the verdict."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import safetensors.numpy
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from finetune.__main__ import main
from finetune.recipe.load import load_recipe
from finetune.recipe.serialize import diff, to_dict
from finetune.training.launch import STOPPED
from finetune.tuning import trials, tune
from finetune.tuning.space import Dimension
from finetune.tuning.study import compare, search
from finetune.tuning.tune import describe_tuning, importances, plot_trials, report_trials, verdict
from finetune.utils.errors import RecipeError
from studies import SMALL, SPACE, asked, opened, stand_in


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(trials, "POLL", 0.02)
    monkeypatch.setattr("finetune.tuning.study.COMPARED", 99)  # a stand-in is over before it can be pruned, or is not


def searched(output, *words):
    plan, study = opened(asked(output, *words))
    search(plan, study, stand_in())
    return plan, study


def test_the_report_is_optunas(here):
    """The best trial, its score and the shares of the fields are those that optuna has; the table has a row for each trial."""
    plan, study = searched(here / "out", "--trials", "14", "--space", "lr_scale=0.1..5:log,label_smoothing=0..0.2")
    found = report_trials(plan, study)
    best = study.best_trial
    assert (found["best"]["number"], found["best"]["score"]) == (best.number, best.value)
    assert found["best"]["changes"] == best.user_attrs["changes"] and found["as_it_is"] == study.trials[0].value
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    assert found["importances"] == optuna.importance.get_param_importances(study, evaluator=evaluator)
    rows = list(csv.DictReader(Path(found["table"]).read_text().splitlines()))
    assert [float(row["score"]) for row in rows] == pytest.approx([trial.value for trial in study.trials])
    assert [float(row["lr_scale"]) for row in rows] == pytest.approx(
        [trial.params["lr_scale"] for trial in study.trials], rel=5e-3
    )
    assert rows[0]["label_smoothing"] == "0.1" and Path(found["picture"]).stat().st_size > 10_000


def test_importances_need_trials_and_fields(here):
    """Of one field there is none, nor of three trials; a first trial whose values are outside of the space does not count."""
    plan, study = searched(here / "one", "--trials", "5", "--space", "lr_scale=0.1..5:log")
    assert importances(plan, study) == {}
    plan, study = searched(here / "few", "--trials", "4", "--space", "lr_scale=2..5:log,label_smoothing=0..0.2")
    assert importances(plan, study) == {} and study.trials[0].params == {"label_smoothing": 0.1}


def test_a_study_without_a_finished_trial_says_why(here):
    """Each trial's reason."""
    plan, study = opened(asked(here / "out", "--trials", "2", "--space", "lr_scale=7..9"))
    search(plan, study, lambda job: stand_in()(job._replace(assignments=["lr_scale=7"])))
    fault = "no trial was finished:\n  trial 0, the recipe as it is: failed: the loss .*\n  trial 1"
    with pytest.raises(RecipeError, match=fault):
        report_trials(plan, study)


def test_the_text_fits_80_columns(here):
    """Also with long names, failed and pruned trials."""
    plan, study = searched("out", "--trials", "9", "--space", SPACE + ",augment.auto_augment=none|rand-m9-mstd0.5-inc1")
    found = report_trials(plan, study) | {"recipe": "out/best.py"}
    final = {"value": 0.9, "images": 100, "run": "x", "interval": (0.83, 0.94)}
    found["final"] = {"recipe": final, "best": final, "only_recipe": 3, "only_best": 5, "p_value": 0.73}
    text = describe_tuning(found)
    assert max(map(len, text.splitlines())) <= 80 and "within chance: the one chosen alone is right on 5" in text
    assert len(text.split("\n\n")[0].splitlines()) == 10 and "failed" in text and "rand-m9" in text and "None" not in text
    found["final"] = {"recipe": final, "p_value": None}
    assert "keep it" in describe_tuning(found)


def test_the_picture_takes_numbers_choices_and_none(tmp_path):
    """Values that are no numbers, such as none, are drawn among choices, and left out of a range."""
    rows = [
        {"trial": i, "state": state, "score": score, "a": a, "b": b}
        for i, (state, score, a, b) in enumerate(
            [("finished", 0.5, "None", "x"), ("pruned", 0.2, "1", "y"), ("failed", None, "2", "y"), ("finished", 0.6, "3", "x")]
        )
    ]
    space = [Dimension("a", 1, 3), Dimension("b", values=("x", "y"))]
    assert plot_trials(tmp_path / "trials.png", rows, space, 3, "top1").is_file()


NUMBERS = ["--set", "loss=mse", "--set", "metric=mae", "--set", "label_smoothing=0"]


def test_of_errors_the_least_is_the_best(here):
    """On labels that are numbers the best trial is that of the least error, as optuna's, in no percent."""
    words = [*NUMBERS, "--trials", "10", "--space", "lr_scale=0.1..5:log,optimizer.weight_decay=0.01..0.1"]
    plan, study = searched("out", *words)
    found = report_trials(plan, study)
    assert study.direction.name == "MINIMIZE" and found["best"]["number"] == study.best_trial.number
    assert found["best"]["score"] == min(row["score"] for row in found["trials"] if row["score"] is not None)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    assert found["importances"] == optuna.importance.get_param_importances(study, evaluator=evaluator)
    found |= {"recipe": "best.py", "final": {"recipe": {"value": 2.5, "images": 9, "interval": (2, 3)}, "p_value": None}}
    text = describe_tuning(found)
    assert f": {found['best']['score']:.4g} on" in text and "%" not in text.split("matters")[0]
    assert "MAE 2.5 (95 % interval 2 to 3)" in text
    folds = tune.tune(asked(here / "folds", *NUMBERS, "--folds", "3"), stand_in())
    assert folds["mean"] == pytest.approx(np.mean(folds["scores"])) and "%" not in describe_tuning(folds)


@pytest.mark.parametrize("metric", ["mae", "quadratic_kappa"])
def test_what_a_choice_of_errors_is_worth(here, metric):
    """The two runs on all training images are compared by the bootstrap of their predictions; a lower error is a gain."""
    plan, _ = opened(asked(here / "out", *NUMBERS, "--set", f"metric={metric}", "--trials", "2", "--space", "lr_scale=1..2"))
    labels = np.arange(40.0)[:, None] % 5

    def start(job):
        said = labels + (0.1 if "best" in job.folder.name else 1.4) * np.where(np.arange(40) % 3, 1, -1)[:, None]
        (job.folder / "model").mkdir(parents=True)
        safetensors.numpy.save_file({"logits": said, "labels": labels}, job.folder / "predictions.safetensors")
        ends = {"mean": [2], "deviation": [1], "lowest": [0], "highest": [4]}
        files = {"recipe.json": to_dict(plan.recipe), "model/config.json": {"training_labels": ends}}
        files["result.json"] = {metric: 0.5, "val_images": 40, "intervals": {metric: [0.4, 0.6]}}
        for name, content in files.items():
            (job.folder / name).write_text(json.dumps(content))
        return subprocess.Popen([sys.executable, "-S", "-c", ""])

    final = compare(plan, ["lr_scale=2"], start)
    assert final["difference"]["verdict"] == "gain" and final["p_value"] is None
    off = (labels + 1.4 * np.where(np.arange(40) % 3, 1, -1)[:, None]).round().clip(0, 4)
    kappa = cohen_kappa_score(labels, off, weights="quadratic")
    assert final["difference"]["difference"] == pytest.approx(-1.3 if metric == "mae" else 1 - kappa)
    said = verdict(final, metric)
    assert said[-1].startswith("better by more than chance: ") and "0.5 (95 % interval 0.4 to 0.6)" in said[0]


def test_optuna_is_asked_for(capsys, monkeypatch, here):
    """Without it there is one sentence with the command that installs it."""
    for name in ("finetune.tuning.study", "finetune.tuning.tune", "optuna"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", "resnet18_cifar", "--trials", "2"]) == 2
    assert "optuna, which is not installed: pip install optuna" in capsys.readouterr().err


def test_cross_validation_is_a_mean_with_its_spread(here, image_folder, capsys, monkeypatch):
    """With --folds alone the recipe is scored once a fold, and nothing is searched or chosen."""
    monkeypatch.setattr(tune, "check_plan", lambda plan: None)
    found = tune.tune(asked(here / "out", "--folds", "4"), stand_in())
    assert found["mean"] == pytest.approx(np.mean(found["scores"])) and len(found["scores"]) == 4
    assert found["deviation"] == pytest.approx(np.std(found["scores"], ddof=1)) and "best" not in found
    assert "the mean of 4 folds (81.53% to 84.53%, standard deviation 1.29 points)" in " ".join(describe_tuning(found).split())


def test_ctrl_c_has_the_exit_code_of_a_run_that_was_stopped(here, capsys, monkeypatch):
    """And the way to go on."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "check_plan", lambda plan: None)
    monkeypatch.setattr(tune, "search", interrupt)
    assert main(["tune", "efficientnet_lite0_digits", "--trials", "2", "--output", "out"]) == STOPPED
    assert capsys.readouterr().err == "finetune: stopped; the same command goes on, and does no finished trial again\n"


WORDS = ["--epochs", "1", "--set", "schedule=Constant", "--trials", "2", "--space", "lr_scale=0.5..50:log", "--holdout", "0.4"]


@pytest.mark.launches
def test_a_search_from_start_to_verdict(here, image_folder, capsys):
    """Trials are runs that hold out training images; the best one's recipe is written, trained on all of them, and compared."""
    line = ["tune", "resnet18_cifar", "--data", str(image_folder), *SMALL, *WORDS, "--output", "out"]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    storage = optuna.storages.JournalStorage(JournalFileBackend("out/study.log"))
    study = optuna.load_study(study_name="tune", storage=storage)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    for trial in study.trials:
        result = json.loads(Path(f"out/trial-{trial.number:03}/result.json").read_text())
        assert result["top1"] == trial.value and result["val_images"] == trial.user_attrs["val_images"]
        assert 6 <= result["val_images"] <= 18  # of the 30 training images: drawn, and not the 15 that validate
    recipe, _ = load_recipe("out/recipe.py")
    changed = diff(recipe, load_recipe("out/best.py")[0])
    assert [f"{path}={value:g}" for path, _, value in changed] == found["best"]["changes"]
    final = found["final"]
    assert final["recipe"]["images"] == 15 and Path("out/final-recipe/result.json").is_file()
    if changed:
        said = [safetensors.numpy.load_file(f"out/final-{name}/predictions.safetensors") for name in ("recipe", "best")]
        right = [one["logits"].argmax(1) == one["labels"] for one in said]
        assert final["only_best"] - final["only_recipe"] == right[1].sum() - right[0].sum()
        alone = final["only_best"]
        assert final["p_value"] == pytest.approx(binomtest(alone, max(1, alone + final["only_recipe"])).pvalue)
    assert main(line) == 0 and "trial  top-1" in capsys.readouterr().out
