"""The search of a recipe's fields from the first trial to the verdict; or a recipe's cross-validated score."""

import argparse
import csv
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.recipe.load import assignments_of
from finetune.recipe.metrics import METRICS, NO_SHARES, direction, scale_of, unit_of, write_number, write_value
from finetune.recipe.serialize import flatten, to_dict
from finetune.tools.library import copy_recipe
from finetune.tuning.space import Dimension, Plan, check_plan, make_plan
from finetune.tuning.study import FEWEST, TrialState, compare, describe_trial, importances, open_study, optuna, search, turn
from finetune.tuning.trials import Start, start_run, stop_as_by_ctrl_c, try_lock
from finetune.utils.errors import RecipeError
from finetune.utils.files import write_file
from finetune.utils.text import WIDTH, align_columns, duration, fill_lines, print_error

BETTER, WORSE = "better by more than chance", "worse by more than chance, so keep the recipe as it is"
Found = dict[str, Any]


def tune(args: argparse.Namespace, start: Start = start_run) -> Found | None:
    """Do the trials that are left of a study, and say what they found: nothing while other processes go on, None if stopped.

    `start` starts the run of a job.

    Raises:
        RecipeError: for what `make_plan` and `check_plan` refuse, and if no trial can be trained.
    """
    plan = make_plan(args)
    given = assignments_of(args)
    text = copy_recipe(args.recipe, plan.file, given)
    check_plan(plan)
    study = open_study(plan, text)
    try:
        with stop_as_by_ctrl_c():
            search(plan, study, start, 60 * args.minutes if args.minutes else math.inf)
            with turn(plan):
                running = [one.number for one in study.trials if one.state == TrialState.RUNNING]
                held = None if running else try_lock(plan.folder / "locks" / "final")
            if held is None:
                print_error(f"other processes go on with this study, in {plan.folder}: the last of them says what came out")
                return {}
            with held:
                found = report_trials(plan, study)
                if args.trials is None:
                    return found
                best = found["best"]["changes"]
                file = plan.folder / "best.py"
                write_file(file, copy_recipe(args.recipe, file, [*given, *best]))
                return found | {"recipe": str(file), "final": compare(plan, best, start)}
    except KeyboardInterrupt:
        print_error("stopped; the same command goes on, and does no finished trial again")
        return None


def report_trials(plan: Plan, study: "optuna.Study") -> Found:
    """What the trials found, with their table and their picture written to the study's folder.

    Raises:
        RecipeError: if none was finished.
    """
    finished = [one for one in study.trials if one.state == TrialState.COMPLETE]
    if not finished:
        reasons = "\n  ".join(describe_trial(plan, study, one.number) for one in study.trials if one.user_attrs.get("seconds"))
        raise RecipeError(f"no trial was finished:\n  {reasons}")
    metric, sign = plan.recipe.metric, direction(plan.recipe.metric)
    best = max(finished, key=lambda one: (sign * (one.value or 0.0), -one.number))
    own = {one.path: own_value(plan, one) for one in plan.space}
    rows = []
    for one in study.trials:
        if one.state == TrialState.WAITING:
            continue
        chosen = dict(change.split("=", 1) for change in one.user_attrs.get("changes", ()))
        rows.append(
            {
                "trial": one.number,
                "state": {"COMPLETE": "finished", "FAIL": "failed"}.get(one.state.name, one.state.name.lower()),
                "score": one.value,
                **{path: chosen.get(path, value) for path, value in own.items()},
                "seconds": round(one.user_attrs.get("seconds", 0.0), 1),
                "reason": one.user_attrs.get("reason", ""),
            }
        )
    scores = best.user_attrs["scores"]
    found: Found = {
        "metric": metric,
        "folder": str(plan.folder),
        "images": best.user_attrs["val_images"],
        "scores": scores,
        "mean": best.value,
        "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
    }
    if not plan.space:
        return found
    write_file(plan.folder / "trials.csv", as_csv(rows))
    values = {"number": best.number, "score": best.value, "changes": best.user_attrs["changes"], "scores": scores}
    first = next((one for one in finished if one.number == 0), None)
    return found | {
        "trials": rows,
        "best": values,
        "as_it_is": first.value if first else None,
        "importances": importances(plan, study),
        "table": str(plan.folder / "trials.csv"),
        "picture": str(plot_trials(plan.folder / "trials.png", rows, plan.space, best.number, metric)),
    }


def own_value(plan: Plan, dimension: Dimension) -> str:
    """What the recipe itself has in a field, as it would be typed; "" where it lacks the part."""
    own = dimension.own
    if own is None:
        own = {path.replace(".options.", "."): value for path, value in flatten(to_dict(plan.recipe)).items()}.get(
            dimension.path, ""
        )
    return f"{own:g}" if isinstance(own, float) else str(own)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as comma-separated values."""
    writer = csv.DictWriter(text := io.StringIO(), list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plot_trials(file: Path, rows: Sequence[dict[str, Any]], space: Sequence[Dimension], best: int, metric: str) -> Path:
    """Draw the score of each trial against each field; a pruned trial has its last score."""
    from matplotlib.figure import Figure

    from finetune.report.drawing import save_figure, shorten, style

    columns = min(2, len(space))
    lines = math.ceil(len(space) / columns)
    figure = Figure(figsize=(8, 0.8 + 2.7 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten().tolist()
    worse = "lower still" if direction(metric) > 0 else "higher still"
    marks = {
        "finished": ("o", "C0"),
        "pruned": ("x", "0.6"),
        "the recipe as it is": ("D", "C1"),
        worse: ("v", "0.6") if direction(metric) > 0 else ("^", "0.6"),
    }
    shown = [row for row in rows if row["score"] is not None]
    # What has failed would squash the rest: of errors the worst are the highest.
    sign, values = direction(metric), [direction(metric) * row["score"] for row in shown]
    spread = max(values) - statistics.median(values)
    floor = max(values) - 4 * spread - (0.01 * abs(max(values)) if metric in NO_SHARES else 0.01)
    for axes, one in zip(panels, space, strict=False):
        kinds = list(dict.fromkeys([*one.values, *(row[one.path] for row in rows if one.values)]))
        for label, (mark, colour) in {**marks, "best": ("o", "C2")}.items():
            names = {
                "best": [row for row in shown if row["trial"] == best],
                "the recipe as it is": [row for row in shown if row["trial"] == 0 and sign * row["score"] >= floor],
                worse: [row for row in shown if sign * row["score"] < floor],
            }
            others = [row for row in shown if row["state"] == label and row["trial"] and sign * row["score"] >= floor]
            drawn = [row for row in names.get(label, others) if kinds or is_number(row[one.path])]
            at = [kinds.index(row[one.path]) if kinds else float(row[one.path]) for row in drawn]
            form = {"s": 28, "color": colour}
            if label == "best":
                form = {"s": 130, "facecolors": "none", "edgecolors": colour, "linewidths": 2}
            if drawn:
                scores = [scale_of(metric) * sign * max(floor, sign * row["score"]) for row in drawn]
                axes.scatter(at, scores, marker=mark, label=label, zorder=3, **form)
        set_ticks(axes, one, kinds)
    for axes in panels[::columns]:
        axes.set_ylabel(f"{METRICS[metric]} on held-out images{unit_of(metric)}", fontsize="small")
    for axes in panels[len(space) :]:
        axes.remove()
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    title = f"{shorten(file.parent.name, 60)}: {len(shown)} trials"
    figure.suptitle(title, fontsize="medium", **style(title))
    return save_figure(figure, panels[: len(space)], file)


def set_ticks(axes: Any, field: Dimension, kinds: Sequence[str]) -> None:
    """The field's name below its choices, or its range with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from finetune.report.drawing import style

    axes.set_xlabel(field.path, **style(field.path))
    if kinds:
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_xlim(-0.5, len(kinds) - 0.5)
    elif field.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if field.high / field.low <= 100 else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(field.low / 1.15, field.high * 1.15)
    else:
        room = 0.05 * (field.high - field.low)
        axes.set_xlim(field.low - room, field.high + room)


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def describe_tuning(found: Found) -> str:
    """What was found, in 80 columns."""
    from finetune.results.summary import fold

    metric, scores = found["metric"], found["scores"]
    if "trials" not in found:
        mean, low, high = (write_value(metric, value) for value in (found["mean"], min(scores), max(scores)))
        apart = write_number(found["deviation"]) if metric in NO_SHARES else f"{100 * found['deviation']:.2f} points"
        where = f"on {found['images']} training images, each held out once; the runs: {found['folder']}"
        spread = f"{low} to {high}, standard deviation {apart}"
        return fill_lines(f"{METRICS[metric]} {mean}, the mean of {len(scores)} folds ({spread}), {where}")
    return "\n".join([trials_as_table(found), "", *(fold(*line) for line in lines_of(found)), ""]).rstrip("\n")


def trials_as_table(found: Found) -> str:
    """A line a trial."""
    fixed = ("trial", "state", "score", "seconds", "reason")
    paths = [name for name in found["trials"][0] if name not in fixed]
    ends = [path.rpartition(".")[2] for path in paths]
    heads = [end if ends.count(end) == 1 else path for path, end in zip(paths, ends, strict=True)]
    table = [["trial", METRICS[found["metric"]], *heads, "time"]]
    for row in found["trials"]:
        score = "failed"
        if row["score"] is not None:
            score = write_value(found["metric"], row["score"]) + " pruned" * (row["state"] == "pruned")
        table.append([str(row["trial"]), score, *(row[path] for path in paths), duration(row["seconds"])])
    return align_columns(table, width=WIDTH)


def lines_of(found: Found) -> list[tuple[str, str]]:
    """The lines below the table: each with its label."""
    from finetune.models.saved import beyond_chance

    best, final, first, metric = found["best"], found["final"], found["as_it_is"], found["metric"]
    lines = [("failed", f"trial {row['trial']}: {row['reason']}") for row in found["trials"] if row["reason"]]
    what = ", ".join(best["changes"]) or "the recipe as it is"
    before = ""
    if best["changes"] and first is not None:
        before = f"; the recipe as it is: {write_value(metric, first)}"
    if before and metric not in NO_SHARES and not beyond_chance(first, best["score"], found["images"]):
        before += ", and the difference may be chance"
    reached = f"{write_value(metric, best['score'])} on {found['images']} held-out images"
    lines.append(("chosen", f"trial {best['number']}, {what}: {reached}{before}"))
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found["importances"].items())
    lines.append(("matters", shares or f"not known: it takes {FEWEST} finished trials and two fields"))
    return lines + [("final", text) for text in verdict(final, metric)] + [
        ("recipe", f"{found['recipe']}; to run it: finetune train {found['recipe']}"),
        ("files", f"{found['table']}, {found['picture']}"),
    ]  # fmt: skip


def verdict(final: Found, metric: str) -> list[str]:
    """What the choice was worth, on validation images that no trial has seen."""
    from finetune.results.paired import in_points

    said = []
    for name, words in (("recipe", "the recipe as it is"), ("best", "the one chosen")):
        if row := final.get(name):
            ends = " to ".join(write_value(metric, end, 1, "") for end in row.get("interval", ()))
            value = write_value(metric, row["value"]) + f" (95 % interval {ends})" * bool(ends)
            said.append(f"{words}: {METRICS[metric]} {value} of {row['images']} validation images")
    if "best" not in final:
        return [*said, "no trial was better than the recipe as it is: keep it"]
    if difference := final.get("difference"):
        verdicts = {"gain": BETTER, "loss": WORSE, "chance": "within chance"}
        return [*said, f"{verdicts[difference['verdict']]}: {in_points(difference, metric)} by the bootstrap; one run each"]
    if final["p_value"] is None:
        return [*said, f"one run each, and for {METRICS[metric]} no test is made: other seeds say whether that is chance"]
    words = "within chance"
    if final["p_value"] < 0.05:
        better = final["only_best"] > final["only_recipe"]
        words = BETTER if better else WORSE
    counts = f"the one chosen alone is right on {final['only_best']} of them, the other alone on {final['only_recipe']}"
    return [*said, f"{words}: {counts} (McNemar, p = {final['p_value']:.2g}); one run each"]
