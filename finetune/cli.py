"""What can be typed after finetune: the parser of its verbs."""

import argparse
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from finetune.recipe.load import FLAGS, RECIPES, add_recipe_arguments, flag_name
from finetune.run import add_resume_anyway, add_run_arguments
from finetune.training.run_dir import RESUME_FLAGS
from finetune.utils.errors import RecipeError
from finetune.utils.text import nearest, print_error

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
        print_error(f"{text} All options: {self.prog} --help")
        self.exit(2)


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

    parsers = {name: subs.add_parser(name, help=verb.__doc__, description=verb.__doc__) for name, verb in verbs.items()}

    def add(name: str, example: str) -> argparse.ArgumentParser:
        sub = parsers[name]
        sub.epilog = f"example: finetune {name} {example}"
        sub.set_defaults(verb=verbs[name])
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        return sub

    add_run_verbs(add)
    add_model_verbs(add)
    add_recipe_verbs(add)
    add_result_verbs(add)
    complete(parser)
    if words and not words[0].startswith("-") and words[0] not in subs.choices:
        raise RecipeError(unknown_verb(words[0], list(subs.choices)))
    args, rest = parser.parse_known_args(words)
    if rest:
        subs.choices[words[0]].error(f"unrecognized arguments: {rest[0]}")
    return args


def add_run_verbs(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The verbs that train."""
    train = add("train", "efficientnet_lite0_digits --epochs 5")
    add_recipe(train, nargs="?", help="a recipe (default: one that is suggested for --data)")
    add_recipe_arguments(train)
    train.set_defaults(resume=None, resume_anyway=False)
    resume = add("resume", "last")
    add_run(resume, "resume", nargs="?", default="last", help="an unfinished run (default: the last)")
    resume.add_argument("--epochs", metavar="N", help="train so many in all: for more than a finished run did")
    resume.add_argument("--data", metavar="DIR", help="where its images lie now: the same ones")
    add_resume_anyway(resume)
    resume.set_defaults(recipe=None, assignments=[], **{flag_name(flag): None for flag in FLAGS if flag not in RESUME_FLAGS})
    for sub in (train, resume):
        add_run_arguments(sub)
        sub.add_argument("--processes", type=int, metavar="N", help="training processes (default: one for each GPU)")
    add_minutes(train)
    sub = add("runs", "--sort result")
    orders = ("started", "result", "run")
    sub.add_argument("--sort", choices=orders, default="started", help="what the last line has most of (default: started)")
    sub.add_argument("--wide", action="store_true", help="all columns, whole")


def add_model_verbs(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The verbs that take a trained network."""
    model = "a run's name or folder, a timm model's folder, hf-hub:OWNER/NAME or its address"
    on_images = add("predict", "last photographs/ 'more/*.jpg' --top 3 --csv")
    add_run(on_images, "model", help=model)
    on_images.add_argument("paths", nargs="+", metavar="PATH", help="images, folders of images, globs")
    on_images.add_argument("--top", type=int, default=5, metavar="N", help="classes to name for each image (default: 5)")
    on_images.add_argument("--csv", action="store_true", help="print comma-separated values")
    on_classes = add("evaluate", "last --data DIR")
    add_run(on_classes, "model", help=model)
    on_classes.add_argument(
        "--data", required=True, metavar="DIR", help="class folders, alone or under val/ or test/; or a named set"
    )
    on_classes.add_argument("--output", type=Path, metavar="DIR", help="draw the confusion matrix there")
    to_format = add("export", "last --to onnx")
    add_run(to_format, "model", help="a finished run's name or folder")
    to_format.add_argument("--to", metavar="timm|onnx|torch", required=True, help="timm: a folder for the hub, too")
    to_format.add_argument("--output", type=Path, metavar="DIR", help="the folder to write (default: RUN/model-FORMAT)")
    for sub in (on_images, on_classes, to_format):
        sub.add_argument(
            "--checkpoint", choices=("last", "best"), help="insist on the last or the best epoch (default: what the run says)"
        )


def add_minutes(parser: argparse.ArgumentParser) -> None:
    """How long the run of a suggested recipe may take."""
    text = "suggest what this machine trains in about M minutes (default: what the number of images asks for)"
    parser.add_argument("--minutes", type=float, metavar="M", help=text)


def add_recipe_verbs(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The verbs that find, read and write recipes."""
    sub = add("suggest", "--data DIR --output mine.py")
    sub.add_argument("--data", required=True, metavar="DIR", help="your images: train/CLASS/* and val/CLASS/*, or CLASS/*")
    sub.add_argument(
        "--backbone", metavar="NAME", help="a timm name or torchvision/NAME (default: one whose weights are installed)"
    )
    sub.add_argument("--weights", metavar="FILE|none", help="a file of weights, or none for random ones")
    add_minutes(sub)
    sub.add_argument("--output", type=Path, metavar="FILE.py", help="the file to write (default: printed)")
    sub = add("check", "--data DIR --fix good.csv")
    sub.add_argument(
        "--data", required=True, metavar="DIR", help="your images: train/CLASS/* and val/CLASS/*, or CLASS/*; a CSV"
    )
    sub.add_argument("--backbone", metavar="NAME", help="a network to look with (default: one whose weights are installed)")
    sub.add_argument("--weights", metavar="FILE|none", help="its weights, or none: look without a network")
    sub.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="where to draw the picture (default: here)")
    sub.add_argument(
        "--fix", type=Path, metavar="FILE.csv", help="write a table of the images without what is wrong; no file is touched"
    )
    sub = add("ls", "--wide")
    sub.add_argument("--wide", action="store_true", help="all columns, whole: also backbone, data and hardware")
    add_recipe(add("show", "resnet18_cifar"))
    sub = add("cp", "resnet18_cifar mine.py --set epochs=5 --set data.image_size=96")
    add_recipe(sub)
    sub.add_argument("target", type=Path, metavar="FILE.py")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="assignments",
        help="write a field into the copy; may be given again",
    )
    add_recipe(add("validate", "mine.py"))
    sub = add("diff", "resnet18_cifar mine.py")
    for name in ("one", "other"):
        add_recipe(sub, name, metavar="NAME|FILE.py|RUN")


def add_result_verbs(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The verbs that look ahead of a run, and that run a recipe for its number."""
    for name, example in (("plan", "resnet18_cifar --output plans"), ("find-lr", "efficientnet_lite0_digits")):
        sub = add(name, example)
        add_recipe(sub)
        add_recipe_arguments(sub)
        where = "where to draw the picture (default: here)" if name == "find-lr" else "draw a picture there, too"
        sub.add_argument("--output", type=Path, metavar="DIR", help=where)
        if name == "plan":
            sub.add_argument("--wide", action="store_true", help="all columns and epochs, whole")
    sub = add("reproduce", "efficientnet_lite0_digits --seeds 3")
    add_recipe(sub, help="a recipe with a number")
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="runs to compare with it (default: 1)")
    sub.add_argument("--output", type=Path, metavar="DIR", help="where the runs lie (default: runs/NAME-reproduce)")
    sub.add_argument("--data", metavar="DIR", help="the images, where the recipe was measured on a folder")
    sub.add_argument("--weights", metavar="FILE", help="the weights, where it was measured with a file")


def add_recipe(parser: argparse.ArgumentParser, name: str = "recipe", **options: Any) -> None:
    """An argument that names a recipe; a shell completes it."""
    options = {"metavar": "NAME|FILE.py", "help": "a recipe of recipes/, or your own file"} | options
    parser.add_argument(name, **options).completer = (  # type: ignore[attr-defined]  # argcomplete's
        lambda **typed: [file.stem for file in RECIPES.glob("*.py")] + [str(file) for file in Path().glob("*.py")]
    )


def add_run(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """An argument that names a run; a shell completes it."""
    parser.add_argument(name, metavar="RUN", **options).completer = (  # type: ignore[attr-defined]  # argcomplete's
        lambda **typed: ["last", *(file.parent.name for file in Path("runs").glob("*/recipe.json"))]
    )


def complete(parser: argparse.ArgumentParser) -> None:
    """Where a shell asks what may come next, answer and exit."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


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
