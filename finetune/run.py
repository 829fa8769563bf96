"""Run a recipe: arguments, setup, train, summary."""

import argparse
import errno
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# `accelerate launch finetune/run.py` puts finetune/ first on sys.path. The repository root instead makes a fresh clone work
# without installing, and keeps every module under one name.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetune.cli.flags import add_resume_anyway, add_run_arguments  # noqa: E402
from finetune.cli.parser import Parser  # noqa: E402
from finetune.recipe import Recipe  # noqa: E402
from finetune.recipe.load import add_recipe_arguments, check_source, chosen_recipe  # noqa: E402
from finetune.training import run_dir  # noqa: E402
from finetune.training.launch import INTERRUPTED, REFUSED, STOPPED, TURN, check_launcher, stop_with_launcher  # noqa: E402
from finetune.utils.errors import RecipeError  # noqa: E402
from finetune.utils.text import escape_output, lasting_output, print_error  # noqa: E402
from finetune.utils.urls import stem_of  # noqa: E402


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="finetune/run.py",
        description="Fine-tune a pretrained vision backbone as a recipe says.",
        epilog="example: accelerate launch finetune/run.py --recipe efficientnet_lite0_cifar --set groups.head.lr=5e-3",
    )
    parser.add_argument("--recipe", metavar="NAME|FILE.py", help="a recipe of recipes/, or your own file")
    add_recipe_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN|auto",
        help="go on with that run, or this recipe's newest; auto: with the one in --output if there is one, else start",
    )
    add_resume_anyway(parser)
    args = parser.parse_args(argv)
    if not args.recipe and not args.resume:
        parser.error("--recipe NAME|FILE.py, or --resume RUN, is required")
    if args.resume == "auto" and not args.output:
        parser.error("--resume auto needs --output DIR: it starts there if there is nothing to go on with")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run; an error that a person can put right is one message and exit code 2, any other keeps its traceback."""
    escape_output()
    try:
        return start(arguments(argv))
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print_error("stopped at once")
        return INTERRUPTED


@lasting_output()
def start(args: argparse.Namespace) -> int:
    """The run that the arguments ask for; the exit code."""
    if "OMP_WAIT_POLICY" not in os.environ:  # before torch: its threads, spinning for long, stall beside other programs
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "RANK" in os.environ:  # before torch, which a recipe may import: DDP warns where it finds no unused parameter
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    stop_with_launcher()
    try:
        return run(args)
    except RecipeError as error:
        if not error.one_process and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(TURN)  # if the first process has failed, too, it says so, and the launcher ends this one
            print_error(f"process {os.environ.get('RANK')}: {error}")
        else:
            print_error(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO):
            raise
        print_error(
            f"{error.filename or 'the run folder'}: {error.strerror}. What was written before is whole: mend that, "
            "then go on with --resume"
        )
    return REFUSED


@contextmanager
def suggested_recipe(args: argparse.Namespace) -> Iterator[None]:
    """Within, a recipe that is suggested for the images stands in for one that is not named; the run copies its file."""
    if args.minutes and (args.recipe or args.epochs or os.environ.get("WORLD_SIZE", "1") != "1"):
        raise RecipeError("--minutes chooses epochs for a recipe that is suggested, on one process: no recipe, no --epochs")
    if args.recipe is not None or args.resume is not None:
        yield
        return
    check_source(args.data)

    from finetune.tools.image_stats import compute_image_stats
    from finetune.tuning.suggest import suggest_recipe

    asked = dict(text.split("=", 1) for text in args.assignments if text.startswith(("loss=", "data.channels=")))
    channels = asked.get("data.channels", "")
    stats = compute_image_stats(str(args.data), asked.get("loss"), int(channels) if channels.isdecimal() else None)
    text = suggest_recipe(stats, args.backbone, args.weights, "recipe.py", args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        args.recipe = str(Path(folder) / f"{stem_of(args.data)}.py")
        Path(args.recipe).write_text(text, encoding="utf-8")
        yield


class Request(NamedTuple):
    """What a run's arguments ask for."""

    recipe: Recipe
    file: Path | None  # of the recipe, if it has one
    name: str
    folder: Path
    resume: bool


def resolve(args: argparse.Namespace) -> Request:
    """What the arguments ask for; whatever is wrong without torch, data or weights is found here, and nothing is written.

    Raises:
        RecipeError: for a recipe, a folder or a launcher's setting that is not in order.
    """
    if args.smoke and (args.data or args.weights or args.resume is not None):
        raise RecipeError("--smoke brings its own images and weights: leave out --data, --weights and --resume")
    if args.accumulate < 1 or (args.workers or 0) < 0 or args.checkpoint_every < 0:
        raise RecipeError("--accumulate starts at 1, --workers and --checkpoint-every at 0")
    if args.cache_limit is not None and (args.cache is None or not args.cache_limit > 0):
        raise RecipeError("--cache-limit is the GiB, more than 0, that --cache DIR may take")
    if args.resume and args.resume != "auto":
        args.resume = str(run_dir.find_run(args.resume, "" if args.epochs else "unfinished"))
    recipe, file, name = run_dir.resumed_recipe(args) if args.recipe is None else chosen_recipe(args)
    check_launcher(recipe)
    parts = int(os.environ.get("WORLD_SIZE", 1)) * args.accumulate
    if recipe.data.batch_size % parts and not args.smoke:
        raise RecipeError(
            f"batch_size={recipe.data.batch_size}, the images of one step over all processes, can't be divided "
            f"by {parts // args.accumulate} processes x {args.accumulate} micro-batches"
        )
    if args.resume is None or args.resume == "auto" and not (args.output / "recipe.json").is_file():
        folder = Path("none") if args.dry_run else run_dir.new_run_dir(name, args.output)
        return Request(recipe, file, name, folder, resume=False)
    own = args.recipe is None  # the run's recipe, with no other change than of the epochs
    folder = Path(args.resume) if args.resume not in ("", "auto") else args.output
    folder = run_dir.unfinished_run_dir(name, folder, recipe.epochs if own or args.resume_anyway else 0, recipe)
    if not own and not args.resume_anyway:
        run_dir.check_same_recipe(folder, recipe, file)
    return Request(recipe, file, name, folder, resume=True)


def run(args: argparse.Namespace) -> int:
    """Resolve the arguments, check the recipe on its network, then run."""
    if args.resume == "auto" and (args.output / "result.json").is_file() and not args.resume_anyway:
        print(f"the run in {args.output} is finished")
        return 0
    request = resolve(args)
    recipe, args.folder = request.recipe, request.folder

    from finetune.models.backbone import meta_backbone  # from here on torch is needed, and seconds pass
    from finetune.tools.smoke import smoke_recipe
    from finetune.training.setup import check_recipe, own_accelerator_state

    if args.smoke:
        recipe = smoke_recipe(recipe, int(os.environ.get("WORLD_SIZE", 1)) * args.accumulate)
    check_recipe(recipe, meta_backbone(recipe))
    if args.dry_run:
        from finetune.tools.plan import describe_plan, epoch_lrs, make_plan

        plan = make_plan(recipe)
        steps = recipe.data.steps_per_epoch(plan.size[0])
        lrs = epoch_lrs(plan.groups, steps, recipe.epochs)
        print(json.dumps(lrs, indent=1) if args.json else describe_plan(request.name, recipe, plan))
        return 0
    with own_accelerator_state():
        return fine_tune(args, request._replace(recipe=recipe))


def fine_tune(args: argparse.Namespace, request: Request) -> int:
    """The run itself: data, weights, training, and the files in its folder; the exit code."""
    recipe, file, name, folder, resume = request
    from finetune.data.dataset import changed_files, file_rows, fingerprint, record_files
    from finetune.models.sharding import blocks, is_sharded
    from finetune.optim.param_groups import build_param_groups, describe_param_groups
    from finetune.report.sheets import plot_augmented
    from finetune.results.summary import copy_params, describe_result, finish_run
    from finetune.tools.plan import describe_classes, describe_run, describe_validation
    from finetune.training.checkpoint import check_resumable
    from finetune.training.distributed import Stopped, default_workers, join_processes, main_process_first
    from finetune.training.logger import Logger, start_trackers
    from finetune.training.loop import train
    from finetune.training.memory import disk_caches
    from finetune.training.setup import RunOptions, make_accelerator, setup
    from finetune.utils.text import fill_lines

    join_processes()
    accelerator = make_accelerator(recipe, args.track, folder)
    net, datasets = setup(recipe, accelerator, args.accumulate)
    parts = zip(("training", "validation"), datasets, strict=True)
    images = {part: fingerprint(dataset.images, dataset.classes) for part, dataset in parts}
    num_train, classes = len(datasets[0]), datasets[0].classes
    files = file_rows(datasets[0].images, datasets[1].images, classes) if accelerator.is_main_process else []
    rewritten = not resume or args.resume_anyway or (args.recipe is None and (args.epochs or args.data))
    if resume:
        run_dir.check_same_images(folder, images, classes, changed_files(folder / "images.csv", files), args.resume_anyway)
    if resume and rewritten:  # whatever is refused leaves the run as it is
        check_resumable(folder, recipe, net)
    groups = build_param_groups(recipe, net)
    group_table, short_table = (
        describe_param_groups(groups, recipe.data.steps_per_epoch(num_train), recipe.epochs, wide) for wide in (True, False)
    )

    # Held until the run's end.
    held = main_process_first(accelerator, lambda: run_dir.lock(folder) if accelerator.is_main_process else None)
    if accelerator.is_main_process and rewritten:
        record_files(folder / "images.csv", files)
        run_dir.start_run_dir(folder, file, name, recipe, group_table, {"images": images, "classes": classes})
        plot_augmented(folder, datasets[0], recipe.epochs)
    accelerator.wait_for_everyone()
    start_trackers(accelerator, folder, recipe)
    quiet = args.quiet or args.json
    logger = Logger(folder, accelerator, recipe, quiet)
    if args.smoke:
        logger.say("SMOKE RUN: random weights, generated images. It shows that the recipe runs, and is no result.")
    sharded = is_sharded(net)
    fsdp = f", FSDP2 in {len(blocks(net))} blocks" if sharded else ""
    setting = f"{accelerator.num_processes} x {accelerator.device.type}{fsdp}, precision {recipe.mixed_precision}"
    validation = describe_validation(recipe, datasets[1].images)
    run = f"{name}: {describe_run(recipe, num_train, len(classes))}; {validation}; {setting}"
    logger.say(f"{fill_lines(run)}\n{fill_lines(describe_classes(classes, recipe.of_numbers))}\n\n{short_table}\n")
    start = copy_params(groups) if accelerator.is_main_process or sharded else {}  # the first process alone reports
    options = RunOptions(args.accumulate, default_workers(args.workers, accelerator.device.type), args.checkpoint_every, quiet)
    try:
        with disk_caches(args.cache, args.cache_limit, datasets, files, accelerator, logger.say):
            evaluated = train(recipe, net, datasets, logger, accelerator, options)
    except Stopped as stopped:
        words = f"stopped {stopped}; to go on:\nfinetune resume {shlex.quote(str(folder))}"
        logger.say(words, even_if_quiet=not args.json)
        accelerator.end_training()
        return STOPPED
    if accelerator.is_main_process:
        result = finish_run(recipe, file, evaluated, start, datasets[1], logger, args.smoke)
        described = describe_result(recipe, file, result, folder, args.verbose)
        logger.say(json.dumps({"run": str(folder)} | result, indent=1) if args.json else described, even_if_quiet=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if held:
        held.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
