"""The command line: finetune VERB, or python -m finetune VERB."""

import sys

from finetune.cli.models import embed, evaluate, export, predict, push, soup
from finetune.cli.parser import Verb, arguments
from finetune.cli.recipes import check, cp, diff, find_lr, ls, rank, show, show_plan, suggest, tune, validate
from finetune.cli.training import compare, report, reproduce, resume, runs, train
from finetune.utils.errors import RecipeError
from finetune.utils.files import REFUSED
from finetune.utils.text import STDOUT, drop_output, escape_output, print_error

VERBS: dict[str, Verb] = {
    "train": train,
    "predict": predict,
    "embed": embed,
    "evaluate": evaluate,
    "export": export,
    "push": push,
    "soup": soup,
    "runs": runs,
    "compare": compare,
    "report": report,
    "rank": rank,
    "suggest": suggest,
    "check": check,
    "ls": ls,
    "show": show,
    "cp": cp,
    "plan": show_plan,
    "find-lr": find_lr,
    "tune": tune,
    "resume": resume,
    "reproduce": reproduce,
    "diff": diff,
    "validate": validate,
}


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


if __name__ == "__main__":
    sys.exit(main())
