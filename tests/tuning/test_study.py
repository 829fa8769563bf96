"""A study: which trials are done, once each, whatever breaks off, and whichever process does them."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from finetune.tuning import study as studies_module
from finetune.tuning import trials
from finetune.tuning.study import claim, search
from finetune.utils.errors import RecipeError
from helpers import ROOT
from studies import SPACE, asked, opened, stand_in, started


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(trials, "POLL", 0.02)
    monkeypatch.setattr(studies_module, "COMPARED", 99)  # a stand-in is over before it can be pruned, or is not


def loaded(output):
    """The study, as optuna itself reads it."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(output / "study.log")))
    return optuna.load_study(study_name="tune", storage=storage)


def searched(output, *words):
    plan, study = opened(asked(output, *words))
    search(plan, study, stand_in())
    return study


def in_processes(output, count, *words, pause=0.0):
    """As many processes that search there at once."""
    line = [sys.executable, "-m", "studies", str(output), str(pause), *words]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return [subprocess.Popen(line, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE) for _ in range(count)]


def params(study):
    return [trial.params for trial in study.trials]


def test_a_study_is_optunas(here):
    """Optuna loads the study: its trials, states and best value are those of the runs, the first is the recipe as it is."""
    searched(here / "out", "--trials", "7", "--space", SPACE)
    study = loaded(here / "out")
    assert Counter(trial.state for trial in study.trials).keys() <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    assert len(study.trials) == 7 and started(here / "out") == {f"trial-{i:03}": 1 for i in range(7)}
    assert study.trials[0].params == {"lr_scale": 1.0, "label_smoothing": 0.1} and not study.trials[0].user_attrs["changes"]
    for trial in study.trials:
        if trial.state == TrialState.COMPLETE:
            said = dict(word.split("=") for word in trial.user_attrs["changes"]) or {"lr_scale": 1}
            assert trial.value == pytest.approx(0.9 - 0.2 * np.log10(float(said["lr_scale"]) / 0.3) ** 2)
    assert study.best_value == max(trial.value for trial in study.trials if trial.state == TrialState.COMPLETE)


def test_a_killed_study_goes_on_as_if_unbroken(here):
    """Killed in its third trial, then started again: as many trials, of the same values, and no finished one done again."""
    words = ("--trials", "6", "--space", SPACE)
    (process,) = in_processes(here / "out", 1, *words, pause=0.5)
    while len(started(here / "out")) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert [trial.state.is_finished() for trial in loaded(here / "out").trials] == [True, True, False]
    broken, whole = searched(here / "out", *words), searched(here / "whole", *words)
    assert params(broken) == params(whole) and len(broken.trials) == 6
    assert [trial.value for trial in broken.trials] == [trial.value for trial in whole.trials]
    assert {name: times for name, times in started(here / "out").items() if times > 1}.keys() <= {"trial-002"}
    more = searched(here / "out", "--trials", "8", "--space", SPACE)
    assert len(more.trials) == 8 and params(more)[:6] == params(whole)


def test_ctrl_c_stops_the_run_and_keeps_the_trial(here):
    """The run is asked to stop, the trial is not over, and the next command does it first."""
    words = ("--trials", "2", "--space", SPACE)
    (process,) = in_processes(here / "out", 1, *words, pause=30)
    while not (here / "out" / "trial-000" / "metrics.jsonl").is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert (here / "out" / "trial-000" / "stopped").is_file()
    assert [trial.state for trial in loaded(here / "out").trials] == [TrialState.RUNNING]
    assert [trial.state.is_finished() for trial in searched(here / "out", *words).trials] == [True, True]
    assert started(here / "out") == {"trial-000": 2, "trial-001": 1}


def test_two_processes_share_the_trials(here):
    """Started twice at once, there are as many trials as asked for, each done once, and both have done some."""
    found = in_processes(here / "out", 2, "--trials", "8", "--space", SPACE, pause=0.3)
    lines = [process.communicate(timeout=120)[1].decode().count("trial ") for process in found]
    study = loaded(here / "out")
    assert sum(lines) == len(study.trials) == 8 and min(lines) > 0
    assert set(started(here / "out").values()) == {1} and len({str(one) for one in params(study)}) == 8


def test_pruning_is_optunas_median(here, monkeypatch):
    """A trial is stopped where optuna's MedianPruner, given the same scores in memory, says so; its checkpoints are deleted."""
    monkeypatch.setattr(studies_module, "COMPARED", 2)
    study = opened(asked(here / "out", "--trials", "10", "--space", "lr_scale=0.01..5:log"))
    search(*study, stand_in(pause=0.15, epochs=2))
    replay = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(2, n_warmup_steps=250))
    states = []
    for trial in loaded(here / "out").trials:
        again = replay.ask()
        pruned = False
        for step, value in trial.intermediate_values.items():
            again.report(value, step)
            pruned = step < 1000 and trial.number > 0 and again.should_prune()
        failed = trial.state == TrialState.FAIL
        states.append(TrialState.FAIL if failed else TrialState.PRUNED if pruned else TrialState.COMPLETE)
        replay.tell(again, state=states[-1], values=trial.value if states[-1] == TrialState.COMPLETE else None)
        folder = here / "out" / f"trial-{trial.number:03}"
        assert (folder / "stopped").exists() == (trial.state == TrialState.PRUNED) and not (folder / "checkpoints").exists()
    assert states == [trial.state for trial in loaded(here / "out").trials] and TrialState.PRUNED in states


def test_lengths_are_compared_at_equal_shares(here):
    """An epoch of 2 and two of 4 are one step to the pruner, and a third of a run is none of these."""
    shares = {}
    for epochs in (2, 3, 4):
        plan, study = opened(asked(here / str(epochs), "--trials", "1", "--epochs", str(epochs)))
        search(plan, study, stand_in(epochs=epochs))
        shares[epochs] = [*study.trials[0].intermediate_values]
    assert shares == {2: [500, 1000], 3: [333, 667, 1000], 4: [250, 500, 750, 1000]}


def test_a_trial_that_fails_is_named_and_the_study_goes_on(here):
    """Its reason is what the run said, in a line; the trials after it are done."""
    study = searched(here / "out", "--trials", "4", "--space", "lr_scale=7..9")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "FAIL", "FAIL"]
    assert study.trials[2].user_attrs["reason"] == "the loss of step 3 is nan"


def test_a_first_trial_that_fails_as_all_would_ends_the_study(here):
    """Before it trains: its reason is said at once, no trial is over, and once it is mended the same command does all."""
    plan, study = opened(asked(here / "out", "--trials", "3", "--space", SPACE))

    def on_bad_images(job):
        return stand_in()(job._replace(assignments=[*job.assignments, "data.source=unreadable"]))

    with pytest.raises(RecipeError, match="the first trial failed before it trained, as all would: the images can't be read"):
        search(plan, study, on_bad_images)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
    assert all(trial.state.is_finished() for trial in searched(here / "out", "--trials", "3", "--space", SPACE).trials)


def test_folds_are_runs_of_one_trial(here):
    """A trial's score is the mean of its folds, each a run that holds out another one, and is reported as the mean so far."""
    study = searched(here / "out", "--folds", "3")
    (trial,) = study.trials
    best = 0.9 - 0.2 * np.log10(1 / 0.3) ** 2
    assert trial.user_attrs["scores"] == pytest.approx([best, best - 0.01, best - 0.02])
    assert trial.value == pytest.approx(best - 0.01) and trial.user_attrs["val_images"] == 33
    assert list(trial.intermediate_values) == [167, 333, 500, 667, 833, 1000]
    assert trial.intermediate_values[667] == pytest.approx(best - 0.005)


def test_another_study_or_other_files_are_refused(here):
    """A folder's study goes on with the recipe, the space and the holdout that it was started with, or not at all."""
    searched(here / "out", "--trials", "1", "--space", SPACE)
    for words, fault in (
        (["--space", SPACE, "--epochs", "5"], "epochs: 2 before, 5 now"),
        (["--space", "lr_scale=0.1..1"], "space: "),
        (["--space", SPACE, "--folds", "3"], "splits: "),
    ):
        with pytest.raises(RecipeError, match="the study in .* is another one; name another --output") as caught:
            opened(asked(here / "out", "--trials", "2", *words))
        assert fault in str(caught.value)
    (here / "own").mkdir()
    (here / "own" / "recipe.py").touch()
    with pytest.raises(RecipeError, match="own holds files already, and no study"):
        opened(asked(here / "own", "--trials", "2"))


def test_without_symbolic_links_the_study_is_locked_otherwise(here, monkeypatch):
    """Where links can't be made, the file is locked by a file that is opened: optuna's other lock."""

    def refuse(*args, **options):
        raise OSError

    monkeypatch.setattr("os.symlink", refuse)
    plan, study = opened(asked(here / "out", "--trials", "1", "--space", SPACE))
    trial, held = claim(plan, study)
    held.close()
    assert loaded(here / "out").trials[0].state == TrialState.RUNNING and trial.number == 0
