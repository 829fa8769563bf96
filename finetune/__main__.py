"""What can be asked of a recipe besides running it: python -m finetune VERB."""

import argparse
import sys
from pathlib import Path

from finetune.recipe import RecipeError
from finetune.recipe_file import add_recipe_arguments, chosen_recipe


def main(argv: list[str] | None = None) -> int:
    """Do what the verb says; an error that a person can put right is one message and exit code 2."""
    args = arguments(argv)
    try:
        args.verb(args)
    except RecipeError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m finetune", description="Ask something of a recipe.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, verb, example in (("plan", plan, "resnet18_cifar --output plans"),
                                ("find-lr", find_lr, "efficientnet_lite0_digits --output rates")):
        sub = verbs.add_parser(name, help=verb.__doc__, description=verb.__doc__,
                               epilog=f"example: python -m finetune {name} {example}")
        sub.add_argument("recipe", metavar="NAME|FILE.py", help="a recipe of recipes/, or your own file")
        add_recipe_arguments(sub)
        sub.add_argument("--output", type=Path, metavar="DIR", help="draw a picture there, too")
        sub.set_defaults(verb=verb)
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> None:
    """Show groups, rates, stages, memory and layers, without weights or training."""
    recipe, file = chosen_recipe(args)

    from finetune import plan
    from finetune.backbone import outline
    from finetune.image_data import data_size
    from finetune.plots import planned

    num_images, num_classes = data_size(recipe)
    net = outline(recipe, num_classes)
    plan.check(recipe, net)
    print(f"{file.stem}: {plan.text(recipe, net, num_images, num_classes)}")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        print(f"\npicture  {planned(args.output / f'{file.stem}-plan.png', recipe, net, num_images)}")


def find_lr(args: argparse.Namespace) -> None:
    """Try rates from very low to very high on a copy of the network, and suggest two."""
    recipe, file = chosen_recipe(args)

    from finetune import lr_finder
    from finetune.assemble import assemble, make_accelerator
    from finetune.param_groups import split_parameters

    accelerator = make_accelerator(recipe)
    _, net, _, images = assemble(recipe, accelerator)
    multipliers, losses = lr_finder.range_test(recipe, net, images, accelerator)
    suggested = lr_finder.suggestions(multipliers, losses)
    for name, multiplier in suggested.items():
        print(f"{name:8}  {multiplier:.2g} times the recipe's rates: {lr_finder.line_to_paste(recipe, multiplier)}")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        rates = {group.name: group.lr for group in split_parameters(recipe, net) if group.ever_trains}
        picture = args.output / f"{file.stem}-lr.png"
        print(f"picture   {lr_finder.picture(picture, multipliers, losses, suggested, rates)}")


if __name__ == "__main__":
    sys.exit(main())
