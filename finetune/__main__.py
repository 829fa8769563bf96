"""The command line: finetune VERB, or python -m finetune VERB."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from finetune.cli import Verb, arguments
from finetune.recipe.load import check_source, chosen_recipe
from finetune.run import resolve, start, suggested_recipe
from finetune.training.run_dir import find_run
from finetune.utils.errors import RecipeError
from finetune.utils.files import REFUSED, check_folder, check_new, write_file
from finetune.utils.text import STDOUT, drop_output, escape_output, fill_lines, print_error, show_result


def main(argv: list[str] | None = None) -> int:
    """Do what the verb says; an error that a person can put right is one message and exit code 2."""
    escape_output()
    try:
        args = arguments(argv, VERBS)
        code = args.verb(args)
        if sys.stdout:  # none where it was closed
            sys.stdout.flush()
    except RecipeError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print_error("stopped at once")
        return 130
    except BrokenPipeError:  # a reader such as `head` that has seen enough
        drop_output()
        return 0
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        print_error(f"{error.filename or 'the disk'}: {error.strerror}")
        if error.filename == STDOUT:
            drop_output()
        return 2
    return code or 0


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


def ls(args: argparse.Namespace) -> None:
    """List the recipes: result and cost of each."""
    from finetune.tools.library import list_recipes, recipes_as_table

    rows = list_recipes()
    show_result(args, rows, lambda: recipes_as_table(rows, args.wide))


def show(args: argparse.Namespace) -> None:
    """Print a recipe's file."""
    from finetune.recipe.load import load_recipe
    from finetune.recipe.serialize import to_dict

    recipe, file = load_recipe(args.recipe)
    show_result(args, to_dict(recipe), lambda: file.read_text(encoding="utf-8").rstrip("\n"))


def cp(args: argparse.Namespace) -> None:
    """Copy a recipe to a file of your own, changed as you ask; it runs from any folder."""
    from finetune.tools.library import copy_recipe

    check_new(args.target, ".py")
    write_file(args.target, copy_recipe(args.recipe, args.target, args.assignments))
    show_result(args, {"file": str(args.target)}, lambda: f"{args.target}; to run it: finetune train {args.target}")


def validate(args: argparse.Namespace) -> None:
    """Check a recipe against its network, without weights or data."""
    from finetune.recipe.load import load_recipe
    from finetune.recipe.serialize import to_dict

    recipe, file = load_recipe(args.recipe)

    from finetune.models.backbone import meta_backbone
    from finetune.training.setup import check_recipe

    net = meta_backbone(recipe)
    check_recipe(recipe, net)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    backbone, source, pixels = to_dict(recipe.backbone), to_dict(recipe.data.source), recipe.data.image_size
    result = {"recipe": str(file), "backbone": backbone, "parameters": parameters, "data": source, "image_size": pixels}
    text = (
        f"{file.name} is a valid recipe: {backbone}, {parameters:,} parameters, on {source} at {pixels} px "
        f"for {recipe.epochs} epochs"
    )
    show_result(args, result | {"epochs": recipe.epochs}, lambda: fill_lines(text))


def diff(args: argparse.Namespace) -> None:
    """Name the fields in which two recipes differ, or a recipe and a run."""
    from finetune.tools.library import compare_recipes
    from finetune.utils.text import align_columns

    rows = compare_recipes(args.one, args.other)
    table = [("field", args.one, args.other), *([str(cell) for cell in row] for row in rows)]
    result = [{"field": field, "one": one, "other": other} for field, one, other in rows]
    show_result(args, result, lambda: align_columns(table) if rows else "no difference")


def show_plan(args: argparse.Namespace) -> None:
    """Show groups, learning rates, stages, memory and layers, without weights or training."""
    if args.output:
        check_folder(args.output)
    recipe, _, name = chosen_recipe(args)

    from finetune.results.plots import plot_plan
    from finetune.tools.plan import describe_plan, epoch_lrs, make_plan

    plan = make_plan(recipe)
    steps = recipe.data.steps_per_epoch(plan.size[0])
    show_result(args, epoch_lrs(plan.groups, steps, recipe.epochs), lambda: describe_plan(name, recipe, plan, args.wide))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        picture = plot_plan(args.output / f"{name}-plan.png", plan.groups, steps, recipe.epochs)
        print(f"\npicture  {picture}", file=sys.stderr if args.json else sys.stdout)


def find_lr(args: argparse.Namespace) -> None:
    """Try learning rates from very low to very high on the network, and compare them with the recipe's."""
    folder = args.output or Path()
    check_folder(folder)
    recipe, _, name = chosen_recipe(args)

    from finetune.optim.param_groups import build_param_groups
    from finetune.tools.lr_finder import compare_factors, line_to_paste, plot_range_test, range_test, suggest_factors
    from finetune.training.setup import make_accelerator, setup

    accelerator = make_accelerator(recipe)
    net, (images, _) = setup(recipe, accelerator)
    factors, losses = range_test(recipe, net, images, accelerator)
    suggested = suggest_factors(factors, losses)
    better, verdict = compare_factors(factors, losses, suggested)
    folder.mkdir(parents=True, exist_ok=True)
    lrs = {group.name: group.lr for group in build_param_groups(recipe, net) if group.ever_trains}
    picture = plot_range_test(folder / f"{name}-lr.png", factors, losses, suggested | better, lrs)
    lines = [
        f"{rule:8}  {factor:.2g} times the recipe's learning rates: "
        f"{line_to_paste(recipe, factor) if rule in better else 'a higher loss than theirs'}"
        for rule, factor in (suggested | better).items()
    ]
    result = {"factors": factors, "losses": losses, "suggested": suggested, "better": better, "verdict": verdict}
    show_result(
        args, result | {"picture": str(picture)}, lambda: "\n".join([*lines, fill_lines(verdict), f"picture   {picture}"])
    )


def reproduce(args: argparse.Namespace) -> int:
    """Run a recipe again and compare its number with the baseline; exit code 1 if it is outside."""
    from finetune.results.reproduce import describe_reproduction, reproduce

    if args.seeds < 1:
        raise RecipeError("--seeds starts at 1")
    found = reproduce(args.recipe, args.seeds, args.output, args.data, args.weights, sys.stderr if args.json else sys.stdout)
    show_result(args, found, lambda: describe_reproduction(found))
    return 0 if found["inside"] else 1


def suggest(args: argparse.Namespace) -> None:
    """Look at your images and write a complete recipe for them, each choice with its reason."""
    check_source(args.data)

    from finetune.recipe.load import load_recipe
    from finetune.recipe.serialize import to_dict
    from finetune.tools.image_stats import compute_image_stats
    from finetune.tools.plan import describe_classes
    from finetune.tools.suggest import suggest_recipe

    if args.output:
        check_new(args.output, ".py")
    stats = compute_image_stats(args.data)
    print(fill_lines(describe_classes(stats.classes)), file=sys.stderr)
    text = suggest_recipe(stats, args.backbone, args.weights, str(args.output or "my_recipe.py"), args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        file = args.output or Path(folder) / "my_recipe.py"
        write_file(file, text)
        recipe = to_dict(load_recipe(str(file))[0])
    said = f"{args.output}; to run it: finetune train {args.output}" if args.output else text.rstrip("\n")
    show_result(args, recipe, lambda: said)


def check(args: argparse.Namespace) -> None:
    """Look at your images: duplicates, leaks between training and validation, likely wrong labels, odd ones."""
    check_source(args.data)
    check_folder(args.output)
    from finetune.tools.check import report

    result, text = report(args.data, args.backbone, args.weights, args.output, args.fix)
    show_result(args, result, lambda: text)


def find_model_run(args: argparse.Namespace) -> str:
    """The folder of a run's network by the run's name, said on stderr; what is on the hub, or a folder, as it is."""
    name = str(args.model)
    if not name.startswith(("hf-hub:", "https://")):
        name = str(find_run(name, "finished"))

    from finetune.models.saved import choose_model

    model, why = choose_model(name, args.checkpoint)
    if why:
        print(f"using {Path(model).name}: {why}", file=sys.stderr)
    return model


def export(args: argparse.Namespace) -> None:
    """Write a finished run's network for timm, ONNX or torch.export, checked against the original."""
    model = find_model_run(args)  # before the seconds that torch takes

    from finetune.inference.export import export

    folder = str(export(Path(model), args.to, args.output))
    show_result(args, {"folder": folder, "format": args.to}, lambda: folder)


def predict(args: argparse.Namespace) -> None:
    """Say what is on images: the likeliest classes of each."""
    if args.json and args.csv:
        raise RecipeError("--json or --csv, not both")

    from finetune.data.folders import find_images

    files, model = find_images(args.paths), find_model_run(args)  # before the seconds that torch takes

    from finetune.inference.predict import predict, predictions_as_csv, predictions_as_table

    rows = predict(model, files, args.top)
    show_result(args, rows, lambda: predictions_as_csv(rows).rstrip("\n") if args.csv else predictions_as_table(rows))


def evaluate(args: argparse.Namespace) -> None:
    """Measure a network on labelled images: totals, a table of the classes, the confusion matrix."""
    check_source(args.data)
    model = find_model_run(args)  # before the seconds that torch takes

    from finetune.inference.evaluate import evaluate, evaluation_as_text

    result = evaluate(model, args.data, args.output)
    show_result(args, result, lambda: evaluation_as_text(result))


VERBS: dict[str, Verb] = {
    "train": train,
    "predict": predict,
    "evaluate": evaluate,
    "export": export,
    "runs": runs,
    "suggest": suggest,
    "check": check,
    "ls": ls,
    "show": show,
    "cp": cp,
    "plan": show_plan,
    "find-lr": find_lr,
    "resume": resume,
    "reproduce": reproduce,
    "diff": diff,
    "validate": validate,
}

if __name__ == "__main__":
    sys.exit(main())
