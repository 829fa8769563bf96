"""The parser of the command line: one line for what is wrong, and the nearest word that is right."""

import argparse
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from finetune.cli.flags import add_model_verbs, add_rank, add_recipe_verbs, add_result_verbs, add_run_verbs
from finetune.recipe.load import RECIPES
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
    add_rank(add)
    add_recipe_verbs(add)
    add_result_verbs(add)
    complete(parser)
    if words and not words[0].startswith("-") and words[0] not in subs.choices:
        raise RecipeError(unknown_verb(words[0], list(subs.choices)))
    args, rest = parser.parse_known_args(words)
    if rest:
        subs.choices[words[0]].error(f"unrecognized arguments: {rest[0]}")
    return args


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
