"""The parser of the command line: one line for what is wrong, and the nearest word that is right."""

import argparse
import difflib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from finetune.cli.flags import add_model_verbs, add_rank, add_recipe_verbs, add_result_verbs, add_run_verbs
from finetune.recipe.load import RECIPES
from finetune.recipe.recipe import minimal_recipe
from finetune.recipe.serialize import flatten, to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.text import nearest, print_error

Verb: TypeAlias = Callable[[argparse.Namespace], int | None]

OTHER_WORDS = {"run": "train", "fit": "train", "launch": "train", "finetune": "train", "list": "ls", "copy": "cp",
               "eval": "evaluate", "test": "evaluate", "continue": "resume", "lr": "find-lr"}  # fmt: skip
OTHER_FLAGS = {  # of other programs, and what they are here: the first that the command takes
    "--lr --learning-rate": ["--lr-scale X, a factor on all, or --set groups.NAME.lr=X"],
    "--model --arch --model-name --model-name-or-path": ["--backbone NAME"],
    "--recipe --config": ["--recipe NAME|FILE.py", "a recipe's name or file, without a flag"],
    "--pretrained": ["--weights FILE|none"],
    "--dataset --data-path --train-dir --train-data": ["--data DIR"],
    "--val-split --val-size --test-split": ["--set data.val_share=X"],
    "--num-classes": ["nothing: classes are those of the images"],
    "--train-batch-size --per-device-train-batch-size": ["--batch-size N, over all processes"],
    "--opt --optim --optimizer": ["--set optimizer=NAME"],
    "--wd": ["--set optimizer.weight_decay=X"],
    "--warmup": ["--set schedule.warmup_epochs=N"],
    "--sched --scheduler --schedule --lr-scheduler --lr-scheduler-type": ["--set schedule=NAME"],
    "--clip-grad --grad-clip --max-grad-norm --gradient-clip-val": ["--set clip_norm=X"],
    "--aa --randaug --randaugment": ["--set augment.auto_augment=rand-m9-mstd0.5"],
    "--ema --model-ema": ["--set ema_decay=0.99"],
    "--freeze --freeze-backbone": ["--set groups.NAME.lr=0"],
    "--patience --early-stopping": ["--set early_stop.patience=N"],
    "--amp --fp16 --bf16 --precision --dtype": ["--set mixed_precision=bf16, or fp16"],
    "--compile": ["--set torch_compile=True"],
    "--accumulate-grad-batches --grad-accum-steps --gradient-accumulation-steps": ["--accumulate N"],
    "--device": ["CUDA_VISIBLE_DEVICES=N before the command: a run takes the GPUs that it sees"],
    "--devices --gpus --num-gpus --num-processes --nproc-per-node": ["--processes N", "accelerate launch --num_processes N"],
    "--resume --resume-from-checkpoint --ckpt-path": ["--resume RUN", "finetune resume RUN"],
    "--force --overwrite --overwrite-output-dir": ["another --output DIR: no run is written over"],
    "--name --out-dir --save-dir": ["--output DIR"],
    "--wandb --tensorboard --report-to --logger": ["--track wandb, or tensorboard"],
}


class Parser(argparse.ArgumentParser):
    """argparse, with one line for what is wrong and the nearest word that is right; options are written whole."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)  # --lr would be --lr-scale

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes one says it
            print_error(f"{self.explain(unknown[1]) if unknown else f'{message}.'} All options: {self.prog} --help")
        self.exit(2)

    def explain(self, word: str) -> str:
        """What to type in place of a word that the command does not take."""
        known = [flag[2:] for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            here = "--recipe" if "recipe" in known else "--data" if "data" in known and os.path.exists(word) else None
            return f"one word too many: '{word}'." + (f" Here: {here} {word}." if here else "")
        name = flag.lstrip("-").replace("_", "-").lower()
        ways = [way for names, ways in OTHER_FLAGS.items() if f"--{name}" in names.split() for way in ways]
        ways = [way for way in ways if not way.startswith("--") or way.split()[0][2:] in known]
        if ways:
            return f"no option {flag}. Here: {ways[0]}."
        fields = recipe_fields() if "set" in known else {}
        close = difflib.get_close_matches(name, [*known, *fields], n=1)
        meant = "".join(f"--{word}" if word in known else f"--set {fields[word]}=VALUE" for word in close)
        return f"no option {flag}." + (f" Did you mean {meant}?" if meant else "")


def recipe_fields() -> dict[str, str]:
    """The paths of a recipe's fields by what a flag for each would be called; the shortest, where several fields are."""
    paths = sorted(flatten(to_dict(minimal_recipe("resnet18", "digits", 64))), key=lambda path: -path.count("."))
    ends = {path.rpartition(".")[2]: path for path in paths if not path.startswith("groups.")}
    return {end.replace("_", "-"): path for end, path in ends.items() if end not in ("name", "options", "type")}


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
