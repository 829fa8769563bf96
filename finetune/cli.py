"""What can be typed after finetune: the parser of its verbs."""

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from finetune.recipe.load import FLAGS, RECIPES, add_recipe_arguments, flag_name
from finetune.run import add_run_arguments
from finetune.utils.errors import RecipeError
from finetune.utils.text import nearest

Verb: TypeAlias = Callable[[argparse.Namespace], int | None]

OTHER_WORDS = {"run": "train", "fit": "train", "launch": "train", "finetune": "train", "list": "ls", "copy": "cp",
               "eval": "evaluate", "test": "evaluate", "continue": "resume", "lr": "find-lr"}  # fmt: skip
OTHER_FLAGS = {  # of other programs
    "--lr": "--lr-scale X, a factor on all, or --set groups.NAME.lr=X",
    "--learning-rate": "--lr-scale X, a factor on all, or --set groups.NAME.lr=X",
    "--model": "--backbone NAME",
    "--device": "CUDA_VISIBLE_DEVICES=N before the command: a run takes the GPUs that it sees",
    "--gpus": "--processes N",
    "--num-processes": "--processes N",
    "--config": "a recipe's name or file, without a flag",
    "--pretrained": "--weights FILE|none",
    "--name": "--output DIR",
}


class Parser(argparse.ArgumentParser):
    """argparse, with one line for what is wrong and the nearest word that is right; options are written whole."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)  # --lr would be --lr-scale

    def error(self, message: str) -> NoReturn:
        text = message
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            flag, flags = unknown[1].partition("=")[0], [flag for action in self._actions for flag in action.option_strings]
            there = OTHER_FLAGS.get(flag.replace("_", "-"))
            text = f"no option {flag}." + (f" Here: {there}." if there else nearest(flag, flags))
        self.exit(2, f"finetune: {text} All options: {self.prog} --help\n")


def arguments(argv: list[str] | None, verbs: dict[str, Verb]) -> argparse.Namespace:
    """The arguments of a command; `verb` of them is the function that does it."""
    words = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="finetune",
        description="Fine-tune pretrained vision backbones by recipes.",
        epilog="start here: finetune train --data DIR, on your own images; or finetune ls, then finetune train NAME",
    )
    parser.add_argument("--version", action="version", version=f"finetune-recipes {version()}")
    subs = parser.add_subparsers(required=True, metavar="VERB", parser_class=Parser)

    def add(name: str, example: str) -> argparse.ArgumentParser:
        does = verbs[name].__doc__
        sub = subs.add_parser(name, help=does, description=does, epilog=f"example: finetune {name} {example}")
        sub.set_defaults(verb=verbs[name])
        return sub

    add_recipe_verbs(add)
    add_model_verbs(add)
    if words and not words[0].startswith("-") and words[0] not in subs.choices:
        raise RecipeError(unknown_verb(words[0], list(subs.choices)))
    args, rest = parser.parse_known_args(words)
    if rest:
        subs.choices[words[0]].error(f"unrecognized arguments: {rest[0]}")
    return args


def add_recipe_verbs(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The verbs that take a recipe, images, or an unfinished run."""
    sub = add("train", "efficientnet_lite0_digits --epochs 5")
    sub.add_argument("recipe", nargs="?", metavar="NAME|FILE.py", help="a recipe (default: one that is suggested for --data)")
    add_recipe_arguments(sub)
    add_run_arguments(sub)
    sub.add_argument("--processes", type=int, metavar="N", help="training processes (default: one for each GPU)")
    sub.set_defaults(resume=None, resume_anyway=False)
    sub = add("resume", "last")
    sub.add_argument("resume", nargs="?", default="last", metavar="RUN", help="an unfinished run (default: the last)")
    add_run_arguments(sub)
    sub.add_argument("--processes", type=int, metavar="N", help="training processes (default: one for each GPU)")
    sub.set_defaults(recipe=None, assignments=[], resume_anyway=False, **{flag_name(flag): None for flag in FLAGS})
    sub = add("runs", "--json")
    sub.add_argument("--json", action="store_true", help="as a JSON list")
    sub = add("ls", "--wide")
    sub.add_argument("--wide", action="store_true", help="all columns, whole: also backbone, data and hardware")
    sub.add_argument("--json", action="store_true", help="as a JSON list")
    add("show", "resnet18_cifar").add_argument("recipe", metavar="NAME")
    sub = add("cp", "resnet18_cifar mine.py --set epochs=5 --set data.image_size=96")
    sub.add_argument("recipe", metavar="NAME")
    sub.add_argument("target", type=Path, metavar="FILE.py")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="assignments",
        help="write a field into the copy; may be given again",
    )
    add("validate", "mine.py").add_argument("recipe", metavar="FILE.py")
    sub = add("diff", "resnet18_cifar mine.py")
    sub.add_argument("one", metavar="NAME|FILE.py|RUN")
    sub.add_argument("other", metavar="NAME|FILE.py|RUN")
    for name, example in (("plan", "resnet18_cifar --output plans"), ("find-lr", "efficientnet_lite0_digits")):
        sub = add(name, example)
        sub.add_argument("recipe", metavar="NAME|FILE.py", help="a recipe of recipes/, or your own file")
        add_recipe_arguments(sub)
        where = "where to draw the picture (default: here)" if name == "find-lr" else "draw a picture there, too"
        sub.add_argument("--output", type=Path, metavar="DIR", help=where)
        if name == "plan":
            sub.add_argument("--wide", action="store_true", help="all columns and epochs, whole")
            sub.add_argument("--json", action="store_true", help="each group's learning rate in each epoch, as JSON")
    sub = add("reproduce", "efficientnet_lite0_digits --seeds 3")
    sub.add_argument("recipe", metavar="NAME|FILE.py", help="a recipe with a number")
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="runs to compare with it (default: 1)")
    sub.add_argument("--output", type=Path, metavar="DIR", help="where the runs lie (default: runs/NAME-reproduce)")
    sub.add_argument("--data", metavar="DIR", help="the images, where the recipe was measured on a folder")
    sub = add("suggest", "--data DIR --output mine.py")
    sub.add_argument("--data", required=True, metavar="DIR", help="your images: train/CLASS/* and val/CLASS/*, or CLASS/*")
    sub.add_argument(
        "--backbone", metavar="NAME", help="a timm name or torchvision/NAME (default: one whose weights are installed)"
    )
    sub.add_argument("--weights", metavar="FILE|none", help="a file of weights, or none for random ones")
    sub.add_argument("--output", type=Path, metavar="FILE.py", help="the file to write (default: printed)")


def add_model_verbs(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The verbs that take a trained network."""
    to_format = add("export", "runs/RUN --to onnx")
    to_format.add_argument("model", metavar="RUN", help="a finished run's folder")
    to_format.add_argument("--to", metavar="timm|onnx|torch", required=True, help="timm: a folder for the hub, too")
    to_format.add_argument("--output", type=Path, metavar="DIR", help="the folder to write (default: RUN/model-FORMAT)")
    model = "a run's folder, a timm model's, hf-hub:OWNER/NAME or its address"
    on_images = add("predict", "runs/RUN photographs/ 'more/*.jpg' --top 3 --csv")
    on_images.add_argument("model", metavar="RUN", help=model)
    on_images.add_argument("paths", nargs="+", metavar="PATH", help="images, folders of images, globs")
    on_images.add_argument("--top", type=int, default=5, metavar="N", help="classes to name for each image (default: 5)")
    style = on_images.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_true", help="as a JSON list")
    style.add_argument("--csv", action="store_true", help="as comma-separated values")
    on_classes = add("evaluate", "runs/RUN --data DIR")
    on_classes.add_argument("model", metavar="RUN", help=model)
    on_classes.add_argument(
        "--data", required=True, metavar="DIR", help="class folders, alone or under val/ or test/; or a named set"
    )
    on_classes.add_argument("--output", type=Path, metavar="DIR", help="draw the confusion matrix there")
    for sub in (to_format, on_images, on_classes):
        sub.add_argument(
            "--checkpoint", choices=("last", "best"), help="insist on the last or the best epoch (default: what the run says)"
        )


def unknown_verb(word: str, verbs: list[str]) -> str:
    """What may have been meant."""
    if word == "help":
        return "finetune --help, or finetune VERB --help"
    if word.endswith(".py") or (RECIPES / f"{word}.py").is_file():
        return f"'{word}' is a recipe: finetune train {word}"
    meant = f" Did you mean {OTHER_WORDS[word]}?" if word in OTHER_WORDS else nearest(word, verbs)
    return f"no command '{word}'.{meant} There are: {', '.join(verbs)}"


def version() -> str:
    """The version that is installed, or that of a clone that is not."""
    try:
        return importlib.metadata.version("finetune-recipes")
    except importlib.metadata.PackageNotFoundError:
        return "of this clone"
