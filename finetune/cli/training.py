"""The verbs that train, and that look at runs."""

import argparse
import os
import sys
from pathlib import Path

from finetune.recipe.load import check_source
from finetune.run import resolve, start, suggested_recipe
from finetune.training.run_dir import find_run
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_folder, check_new
from finetune.utils.text import show_result


def train(args: argparse.Namespace) -> int:
    """Train a recipe; with --data alone, one that is suggested for your images."""
    if args.recipe is None and not args.data:
        raise RecipeError("name a recipe, or your images: finetune train NAME, finetune train --data DIR; recipes: finetune ls")
    with suggested_recipe(args):
        return start_processes(args)


def resume(args: argparse.Namespace) -> int:
    """Go on with an unfinished run."""
    return start_processes(args)


def start_processes(args: argparse.Namespace) -> int:
    """The run of these arguments, in this process or in as many as there are GPUs; the exit code."""
    if args.processes is not None and args.processes < 1:
        raise RecipeError("--processes starts at 1")
    if args.processes == 1 or "RANK" in os.environ or args.dry_run:
        return start(args)
    resolve(args)  # before the seconds that torch takes, and once in place of once a process

    from finetune.training.launch import launch

    return launch(start, args, args.processes)


def runs(args: argparse.Namespace) -> None:
    """List the runs here: state, metric, data, epochs, when."""
    from finetune.results.runs import list_runs, runs_as_table

    found = list_runs(Path("runs"), args.sort)
    show_result(args, found, lambda: runs_as_table(found, args.wide))


def compare(args: argparse.Namespace) -> None:
    """Compare finished runs: metrics, whether chance explains the differences, curves, recipes."""
    if args.output:
        check_folder(args.output)
    folders = [find_run(name, "finished") for name in args.runs]

    from finetune.results.compare import compare_runs, comparison_as_text, plot_runs

    found = compare_runs(folders)
    show_result(args, found, lambda: comparison_as_text(found))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        picture = plot_runs(folders, found["metric"], args.output / "compare.png")
        print(f"\npicture  {picture}", file=sys.stderr if args.json else sys.stdout)


def report(args: argparse.Namespace) -> None:
    """Write a finished run's page again: report.html, with what it got wrong."""
    run = find_run(args.run, "finished")
    if args.data:
        check_source(args.data)
    if args.output:
        check_new(args.output, ".html")

    from finetune.results.report import write_report

    found = write_report(run, args.output, args.data)
    show_result(args, found, lambda: str(found["file"]))


def reproduce(args: argparse.Namespace) -> int:
    """Run a recipe again and compare its number with the baseline; exit code 1 if it is outside."""
    from finetune.results.reproduce import describe_reproduction, reproduce

    if args.seeds < 1:
        raise RecipeError("--seeds starts at 1")
    found = reproduce(args.recipe, args.seeds, args.output, args.data, args.weights, sys.stderr if args.json else sys.stdout)
    show_result(args, found, lambda: describe_reproduction(found))
    return 0 if found["inside"] else 1
