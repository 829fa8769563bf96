"""A study: trials of a recipe, kept in a file that several processes and later commands share, and what the best is worth."""

import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from finetune.recipe.load import load_recipe, override
from finetune.recipe.metrics import METRICS, NO_SHARES, direction, write_value
from finetune.recipe.serialize import diff
from finetune.training.run_dir import lock
from finetune.tuning.space import Plan
from finetune.tuning.trials import Job, RunFailed, Start, follow, try_lock
from finetune.utils.errors import RecipeError
from finetune.utils.files import write_file
from finetune.utils.text import duration, fill_lines

try:
    import optuna as optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    from optuna.trial import FrozenTrial, Trial
    from optuna.trial import TrialState as TrialState
except ImportError:
    raise RecipeError("finetune tune needs the package optuna, which is not installed: pip install optuna") from None

RANDOM = 5  # trials, the recipe as it is among them, before the sampler looks at what came out
COMPARED = 5  # finished trials before one is pruned
FEWEST = 10  # finished trials from which on it is said which field matters: the best tenth of them is looked at
UNPRUNED = 250  # thousandths of a trial in which none is pruned: what starts high may end higher
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
PATIENCE = 60.0  # seconds to wait for another process to have chosen its trial


def open_study(plan: Plan, text: str) -> "optuna.Study":
    """The study in the plan's folder, made there if there is none; `text` is that of the recipe's file.

    Raises:
        RecipeError: if the folder holds another study, or other files.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    there = {path.name for path in plan.folder.iterdir()} if plan.folder.is_dir() else set()
    if there and not there & {"locks", "study.log"}:
        raise RecipeError(f"{plan.folder} holds files already, and no study; name another --output")
    asked = {"space": [repr(one) for one in plan.space], "splits": [list(split) for split in plan.splits]}
    with turn(plan):
        if not plan.file.is_file():
            write_file(plan.file, text)
        changes = [f"{path}: {was} before, {now} now" for path, was, now in diff(load_recipe(str(plan.file))[0], plan.recipe)]
        file = str(plan.folder / "study.log")
        backend = JournalFileBackend(file, None if can_link(plan.folder) else JournalFileOpenLock(file))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="tune",
            direction=direction_of(plan.recipe.metric),
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=COMPARED, n_warmup_steps=UNPRUNED),
        )
        if not study.user_attrs:
            study.set_user_attr("asked", asked)
            study.enqueue_trial({one.path: one.own for one in plan.space if one.own is not None})
    before = study.user_attrs["asked"]
    changes += [f"{name}: {before[name]} before, {asked[name]} now" for name in asked if before[name] != asked[name]]
    if changes:
        raise RecipeError("\n  ".join([f"the study in {plan.folder} is another one; name another --output:", *changes]))
    return study


def direction_of(metric: str) -> Literal["minimize", "maximize"]:
    """Which way a metric is better, in optuna's word."""
    return "minimize" if direction(metric) < 0 else "maximize"


def can_link(folder: Path) -> bool:
    """Whether there can be symbolic links in a folder, which is the surest lock on network disks."""
    link = folder / "locks" / "link"
    try:
        link.symlink_to("nowhere")
        link.unlink()
    except OSError:
        return False
    return True


@contextmanager
def turn(plan: Plan) -> Iterator[None]:
    """Within, no other process makes a study or chooses a trial here."""
    deadline = time.monotonic() + PATIENCE
    while not (held := try_lock(plan.folder / "locks" / "turn")) and time.monotonic() < deadline:
        time.sleep(0.1)
    with held or lock(plan.folder / "locks" / "turn"):  # which says why there is none
        yield


def claim(plan: Plan, study: "optuna.Study") -> tuple[Trial, TextIO] | None:
    """(a trial, the lock on it) for this process: one that broke off, else a new one; None if there are none left to start.

    The sampler is seeded by the recipe's seed and the trial's number, so that a study that is gone on with does not draw the
    same numbers again.
    """
    with turn(plan):
        trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
        for one in trials:
            if one.state == TrialState.RUNNING and (held := try_lock(lock_folder(plan, one.number))):
                study.sampler = sampler(plan, one.number)
                return Trial(study, one._trial_id), held
        if len(trials) >= plan.trials:
            return None
        study.sampler = sampler(plan, len(trials))
        trial = study.ask()
        return trial, lock(lock_folder(plan, trial.number))


def sampler(plan: Plan, number: int) -> "optuna.samplers.TPESampler":
    """What chooses the values of a trial of that number."""
    return optuna.samplers.TPESampler(seed=(plan.recipe.seed * 10_007 + number) % 2**32, n_startup_trials=RANDOM)


def lock_folder(plan: Plan, number: int) -> Path:
    return plan.folder / "locks" / f"trial-{number:03}"


def search(plan: Plan, study: "optuna.Study", start: Start, seconds: float = float("inf")) -> None:
    """Do the trials that are left, one after another; after so many `seconds` none is started.

    Raises:
        RecipeError: if the first trial fails before it trains, as all others would.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (claimed := claim(plan, study)):
        trial, held = claimed
        with held:
            run_trial(plan, study, trial, start)
        print(fill_lines(describe_trial(plan, study, trial.number)), file=sys.stderr, flush=True)


def run_trial(plan: Plan, study: "optuna.Study", trial: Trial, start: Start) -> None:
    """Do a trial's runs, and tell the study what came out."""
    values = [(one, one.suggest(trial)) for one in plan.space if trial.number or one.own is not None]
    changes = [one.assignment(value) for one, value in values] if trial.number else []  # the first is the recipe as it is
    trial.set_user_attr("changes", changes)
    scores: list[float] = []
    told = set(study.trials[trial.number].intermediate_values)
    started, metric = time.time(), plan.recipe.metric
    epochs = override(plan.recipe, changes).epochs if changes else plan.recipe.epochs

    def goes_on(rows: Sequence[dict[str, Any]]) -> bool:
        # Compared at equal shares of a trial: with it schedules are stretched, whatever the number of epochs.
        for row in rows:
            share = (len(scores) + (row["epoch"] + 1) / epochs) / len(plan.splits)
            if (step := round(1000 * share)) not in told:
                trial.report(statistics.mean([*scores, row[metric]]), step)
                told.add(step)
                if trial.number and share < 1 and trial.should_prune():
                    return False
        return True

    images, state = 0, TrialState.COMPLETE
    try:
        for job in jobs_of(plan, trial.number, changes):
            result = follow(job, start, goes_on)
            if result is None:
                state = TrialState.PRUNED
                break
            scores.append(result[metric])
            images += result["val_images"]
    except RunFailed as failed:
        if not failed.began and not any(one.state in ENDED for one in study.trials):
            raise RecipeError(f"the first trial failed before it trained, as all would: {failed}\n  {job.log}") from None
        trial.set_user_attr("reason", str(failed))
        state = TrialState.FAIL
    finally:
        trial.set_user_attr("seconds", trial.user_attrs.get("seconds", 0.0) + time.time() - started)
    trial.set_user_attr("scores", scores)
    trial.set_user_attr("val_images", images)
    for job in jobs_of(plan, trial.number, changes):
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)  # large, and nothing goes on from them
    study.tell(trial.number, statistics.mean(scores) if state == TrialState.COMPLETE else None, state)


def jobs_of(plan: Plan, number: int, changes: Sequence[str]) -> list[Job]:
    """The runs of a trial: one in its folder, or one for each fold in a folder there."""
    folder = plan.folder / f"trial-{number:03}"
    if len(plan.splits) == 1:
        return [Job(plan.file, [*changes, *plan.splits[0]], folder)]
    return [Job(plan.file, [*changes, *split], folder / f"fold-{i}") for i, split in enumerate(plan.splits)]


def describe_trial(plan: Plan, study: "optuna.Study", number: int) -> str:
    """What came out of a trial, in a line."""
    trial = study.trials[number]
    what = ", ".join(trial.user_attrs["changes"]) or "the recipe as it is"
    return f"trial {number}, {what}: {outcome(trial, plan.recipe.metric)} ({duration(trial.user_attrs['seconds'])})"


def outcome(trial: FrozenTrial, metric: str) -> str:
    """A trial's score, or why it has none."""
    score = "" if trial.value is None else write_value(metric, trial.value)
    if trial.state == TrialState.COMPLETE:
        return f"{METRICS[metric]} {score}"
    if trial.state == TrialState.PRUNED:
        return f"pruned at {(trial.last_step or 0) / 1000:.0%}, with {score}"
    return f"failed: {trial.user_attrs.get('reason', '')}" if trial.state == TrialState.FAIL else trial.state.name.lower()


def importances(plan: Plan, study: "optuna.Study") -> dict[str, float]:
    """The share of each field in what tells the best trials from the others (PED-ANOVA, arXiv 2304.10255), by optuna.

    Empty for one field, and for fewer than `FEWEST` trials that were finished with a value for each.
    """
    names = {one.path for one in plan.space}
    whole = [one for one in study.trials if one.state == TrialState.COMPLETE and names == one.params.keys()]
    if len(whole) < FEWEST or len(names) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and that few trials say little
        alone = optuna.create_study(direction=direction_of(plan.recipe.metric))
        alone.add_trials(whole)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(alone, evaluator=evaluator))


def compare(plan: Plan, changes: Sequence[str], start: Start) -> dict[str, Any]:
    """The recipe as it is and the best one, each trained once on all training images and scored on the validation images.

    "p_value" is McNemar's, exact: the probability that of the images on which one of the two alone is right, chance gives one
    of them so many more. None without a change, and for several labels an image. Of a metric that is no share of the images
    there is "difference", by the bootstrap.

    Raises:
        RecipeError: if a run fails.
    """
    from finetune.metrics.intervals import wilson
    from finetune.results.compare import predictions_of
    from finetune.results.paired import compare as compare_predictions
    from finetune.results.paired import mcnemar

    metric, final = plan.recipe.metric, dict[str, Any]()
    jobs = {"recipe": Job(plan.file, [], plan.folder / "final-recipe")}
    if changes:
        jobs["best"] = Job(plan.file, changes, plan.folder / "final-best")
    for name, job in jobs.items():
        print(f"{job.folder}: on all training images", file=sys.stderr, flush=True)
        try:
            result = follow(job, start, lambda rows: True)
        except RunFailed as failed:
            raise RecipeError(f"the run in {job.folder} failed: {failed}") from None
        assert result  # it is never told to stop
        final[name] = {"value": result[metric], "images": result["val_images"], "run": str(job.folder)}
        if metric == "top1":
            final[name]["interval"] = wilson(result[metric], result["val_images"])
        elif metric in NO_SHARES and metric in result.get("intervals", {}):
            final[name]["interval"] = result["intervals"][metric]
    final["p_value"] = None
    if changes and metric in NO_SHARES:
        (before, labels), (after, _) = (predictions_of(job.folder) for job in jobs.values())
        final["difference"] = compare_predictions(plan.recipe, after, [before], labels)
    elif changes and plan.recipe.loss != "multi_label":
        known = [predictions_of(job.folder) for job in jobs.values()]
        right = [(logits.argmax(1) == labels)[labels >= 0] for logits, labels in known]
        only_recipe, only_best = (int((one & ~other).sum()) for one, other in (right, right[::-1]))
        found = mcnemar(only_best, only_recipe, len(right[0]))
        final |= {"only_recipe": only_recipe, "only_best": only_best, "p_value": found["p_value"]}
    return final
