"""The verbs that find, read, write and choose recipes."""

import argparse
import sys
import tempfile
from pathlib import Path

from finetune.recipe.load import check_source, chosen_recipe
from finetune.training.launch import STOPPED
from finetune.utils.files import check_folder, check_new, write_file
from finetune.utils.text import fill_lines, show_result


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
        f"{file.name} is a valid recipe: {backbone}, {parameters:,} parameters, on {source} at {recipe.data.sizes} "
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

    from finetune.report.curves import plot_plan
    from finetune.tools.plan import describe_plan, epoch_lrs, make_plan, plot_images

    plan = make_plan(recipe)
    steps = recipe.data.steps_per_epoch(plan.size[0])
    show_result(args, epoch_lrs(plan.groups, steps, recipe.epochs), lambda: describe_plan(name, recipe, plan, args.wide))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        picture = plot_plan(args.output / f"{name}-plan.png", plan.groups, steps, recipe.epochs)
        lines = [f"picture  {file}" for file in (picture, *plot_images(args.output, name, recipe, plan))]
        print("", *lines, sep="\n", file=sys.stderr if args.json else sys.stdout)


def suggest(args: argparse.Namespace) -> None:
    """Look at your images and write a complete recipe for them, each choice with its reason."""
    check_source(args.data)

    from finetune.ranking.rank import choose
    from finetune.recipe.load import load_recipe
    from finetune.recipe.serialize import to_dict
    from finetune.tools.image_stats import compute_image_stats
    from finetune.tools.plan import describe_classes
    from finetune.tuning.suggest import suggest_recipe

    if args.output:
        check_new(args.output, ".py")
    ranked = choose(args.ranking, args.data, args.backbone, args.weights) if args.ranking else None
    stats = compute_image_stats(args.data, args.loss, args.channels)
    print(fill_lines(describe_classes(stats.classes, bool(stats.ranges))), file=sys.stderr)
    text = suggest_recipe(stats, args.backbone, args.weights, str(args.output or "my_recipe.py"), args.minutes, ranked)
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


def rank(args: argparse.Namespace) -> None:
    """Compare pretrained networks on your training images, by what a linear head makes of their frozen features."""
    check_source(args.data)
    check_folder(args.output)

    from finetune.ranking.candidates import Wanted
    from finetune.ranking.rank import report

    wanted = Wanted(args.backbones, args.shelf, args.weights, args.image_size, args.minutes, args.loss)
    result, text = report(args.data, wanted, args.output, args.cache, args.wide)
    show_result(args, result, lambda: text)


def find_lr(args: argparse.Namespace) -> None:
    """Try learning rates from very low to very high on the network, and compare them with the recipe's."""
    folder = args.output or Path()
    check_folder(folder)
    recipe, _, name = chosen_recipe(args)

    from finetune.optim.param_groups import build_param_groups
    from finetune.training.setup import make_accelerator, setup
    from finetune.tuning.lr_finder import compare_factors, line_to_paste, plot_range_test, range_test, suggest_factors

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


def tune(args: argparse.Namespace) -> int:
    """Search values of a recipe's fields on training images held out; with --folds alone, cross-validate it."""
    from finetune.tuning.tune import describe_tuning, tune

    if found := tune(args):
        show_result(args, found, lambda: describe_tuning(found))
    return STOPPED if found is None else 0
