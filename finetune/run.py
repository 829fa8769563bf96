"""Launch one recipe: arguments, load, make the Accelerator, call train."""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

# `accelerate launch finetune/run.py` puts finetune/ first on sys.path. The repository root instead makes a fresh clone work
# without installing, and keeps every module under one name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetune.recipe import Data, Group, Recipe, RecipeError  # noqa: E402
from finetune.recipe_file import as_dict, load_recipe, override  # noqa: E402


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py", description="Fine-tune a pretrained vision backbone as a recipe says.",
        epilog="example: accelerate launch finetune/run.py --recipe resnet18_cifar --set epochs=3 --set groups.head.lr=5e-3")
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE.py", help="a recipe of recipes/, or your own file")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="assignments",
                        help="change a field of the recipe; may be given again")
    parser.add_argument("--data", metavar="DIR", help="your images: train/CLASS/* and val/CLASS/*, or CLASS/*")
    parser.add_argument("--weights", metavar="FILE|none", help="a file of weights, or none for random ones")
    parser.add_argument("--seed", type=int, metavar="N", help="the recipe's seed")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME-TIME)")
    parser.add_argument("--resume", nargs="?", const="", metavar="DIR",
                        help="go on with the run in DIR (default: the --output, or this recipe's newest in runs/)")
    parser.add_argument("--dry-run", action="store_true", help="show groups and rates, then stop")
    parser.add_argument("--smoke", action="store_true", help="try the whole path on generated images: no result")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N",
                        help="cut each process's share of the batch in N, for less memory; the result stays")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images, for each training process")
    args = parser.parse_args(argv)
    if args.smoke and (args.data or args.weights or args.resume is not None):
        parser.error("--smoke brings its own images and weights: leave out --data, --weights and --resume")
    if args.accumulate < 1 or (args.workers or 0) < 0:
        parser.error("--accumulate starts at 1, --workers at 0")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run; an error that a person can put right is one message and exit code 2, any other keeps its traceback."""
    try:
        launch(arguments(argv))
    except RecipeError as error:
        if error.one_process or int(os.environ.get("RANK", 0)) == 0:
            print(f"finetune: {error}", file=sys.stderr)
        return 2
    return 0


def launch(args: argparse.Namespace) -> None:
    recipe, file = load_recipe(args.recipe)
    flags = {"data.source": args.data, "weights": args.weights, "seed": args.seed}
    recipe = override(recipe, args.assignments + [f"{field}={value!r}" for field, value in flags.items() if value is not None])
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if not args.smoke and recipe.data.batch_size % (processes * args.accumulate):
        raise RecipeError(f"batch_size={recipe.data.batch_size}, the images of one update over all processes, can't be divided "
                          f"by {processes} processes x {args.accumulate} micro-batches")
    folder = output_folder(args, file)
    check_launcher(recipe)

    # From here on torch is needed, and seconds pass.
    from finetune.augment import transforms
    from finetune.backbone import build_backbone, outline, preprocessing
    from finetune.batches import SeededImages, seed_all
    from finetune.image_data import known_size, load_data
    from finetune.param_groups import build_optimizer, split_parameters, table

    if args.smoke:
        recipe = smoke(recipe, processes * args.accumulate)
    net = outline(recipe)
    groups = split_parameters(recipe, net)
    build_optimizer(recipe, groups)
    transforms(recipe, preprocessing(recipe, net))
    resolved = as_dict(recipe)
    group_table = table(groups, recipe.optimizer.weight_decay)
    if args.dry_run:
        size = known_size(recipe) or (len((data := load_data(recipe)).train), len(data.classes))
        print(f"{file.stem}: {plan(recipe, *size)}\n\n{group_table}\n\n{rates(recipe, groups, size[0])}")
        return

    accelerator = make_accelerator(recipe)
    data = first_on_main(accelerator, lambda: load_data(recipe))
    seed_all(recipe.seed)  # the new head's first values
    net = first_on_main(accelerator, lambda: build_backbone(recipe, len(data.classes)))
    inputs = preprocessing(recipe, net)
    images = tuple(SeededImages(part, transform, recipe.seed, data.classes)
                   for part, transform in zip((data.train, data.val), transforms(recipe, inputs), strict=True))
    groups = split_parameters(recipe, net)
    group_table = table(groups, recipe.optimizer.weight_decay)
    train_and_report(args, recipe, file, folder, resolved, group_table, net, groups, images, inputs, accelerator)


def train_and_report(args, recipe, file, folder, resolved, group_table, net, groups, images, inputs, accelerator) -> None:
    """The run itself, between its folder's first file and its last."""
    from finetune.baseline import promise
    from finetune.export import save_model
    from finetune.plots import curves
    from finetune.run_record import RunRecord, create_folder
    from finetune.train_loop import train

    def save(path, network):
        save_model(path, network, inputs, images[0].classes)

    record = RunRecord(folder, accelerator, save)
    if args.resume is not None:
        check_same_recipe(folder, resolved)
    elif accelerator.is_main_process:
        create_folder(folder, file, resolved, group_table)
    accelerator.wait_for_everyone()
    if args.smoke:
        record.say("SMOKE RUN: random weights, generated images. It shows that the recipe runs, and is no result.")
    record.say(f"{file.stem}: {plan(recipe, len(images[0]), len(images[0].classes))}; {len(images[1])} validation images; "
               f"{accelerator.num_processes} x {accelerator.device.type}, precision {recipe.mixed_precision}\n\n{group_table}\n")
    train(recipe, net, groups, images, record, accelerator, args.accumulate, default_workers(args, accelerator))
    if accelerator.is_main_process:
        result = {"recipe": file.stem, **record.result(recipe.seed)}
        if args.smoke:
            result["smoke"] = True
        save(folder / "model", net)
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        curves(folder)
        top5 = f", top-5 {result['top5']:.2%}" if "top5" in result else ""
        record.say(f"\nreached   top-1 {result['top1']:.2%}{top5}, loss {result['loss']:.4f}, macro F1 {result['macro_f1']:.4f}; "
                   f"{result['seconds']:.0f} s, {result['images_per_second']:.0f} images/s, {result['peak_memory_gib']:.1f} GiB\n"
                   f"promised  {'nothing: a smoke run' if args.smoke else promise(file, resolved)}\n"
                   f"best      top-1 {result['best_top1']:.2%} in epoch {result['best_epoch']}: {folder / 'model-best'}\n"
                   f"model     {folder / 'model'}\n"
                   f"all else  {folder}: result.json, metrics.jsonl, curves.png, groups.txt, recipe.json")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def plan(recipe: Recipe, num_images: int, num_classes: int) -> str:
    """The run in one line."""
    updates = -(-num_images // recipe.data.batch_size)
    return (f"{as_dict(recipe.backbone)} on {as_dict(recipe.data.source)}, {num_images} images of {num_classes} classes at "
            f"{recipe.data.image_size} px; {recipe.epochs} epochs of {updates} updates of {recipe.data.batch_size} images")


def rates(recipe: Recipe, groups: list, num_images: int) -> str:
    """For a dry run: every group's rate at the start of each epoch, '-' where it is frozen; scores taken as ever better."""
    from finetune.unfreeze import trains

    updates = -(-num_images // recipe.data.batch_size)
    width = max(5, *(len(group.name) for group in groups))
    lines = ["rate at the start of each epoch", "epoch".ljust(width) + "".join(f"{epoch:>9}" for epoch in range(recipe.epochs))]
    for group in groups:
        cells = [f"{group.lr * recipe.schedule.scale(epoch * updates, updates, recipe.epochs):9.1e}" if trains(group, epoch)
                 else f"{'-':>9}" for epoch in range(recipe.epochs)]
        lines.append(group.name.ljust(width) + "".join(cells))
    return "\n".join(lines)


def smoke(recipe: Recipe, parts: int) -> Recipe:
    """The recipe cut down to seconds: every stage for one epoch, a batch that divides by `parts`, small generated images."""
    from finetune.backbone import outline

    layered = not isinstance(recipe.groups, tuple)
    stages = sorted({0, recipe.groups.unfreeze_at} if layered else {group.unfreeze_at for group in recipe.groups})
    if layered:
        groups = dataclasses.replace(recipe.groups, unfreeze_at=stages.index(recipe.groups.unfreeze_at))
    else:
        groups = tuple(Group(g.name, g.pattern, g.lr, stages.index(g.unfreeze_at)) for g in recipe.groups)
    schedule = dataclasses.replace(recipe.schedule, warmup_epochs=min(0.5, recipe.schedule.warmup_epochs))
    small = dataclasses.replace(recipe, weights="none", groups=groups, schedule=schedule, epochs=len(stages) + 1,
                                data=Data("generated", 32, parts * -(-8 // parts), recipe.data.crop_pct))
    try:
        outline(small)
    except RecipeError:  # a network for one size only
        small = override(small, [f"data.image_size={recipe.data.image_size}"])
    return small


def output_folder(args: argparse.Namespace, file: Path) -> Path:
    """Where the run is written, or goes on.

    Raises:
        RecipeError: if it would overwrite something, or there is no run to go on with.
    """
    if args.resume is None:
        folder = args.output or Path("runs") / f"{file.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        if not args.dry_run and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RecipeError(f"output folder {folder} already holds {'a run' if (folder / 'recipe.json').exists() else 'files'}; "
                              "name another --output, or go on with the run in it: --resume")
        return folder
    folder = Path(args.resume) if args.resume else args.output
    folder = folder or max((path.parent for path in Path("runs").glob(f"{file.stem}-*/recipe.json")), default=None,
                           key=lambda path: path.stat().st_mtime)
    if folder is None or not (folder / "recipe.json").is_file():
        raise RecipeError(f"no run to resume in {folder or 'runs/'}; name its folder: --resume DIR")
    if (folder / "result.json").is_file():
        raise RecipeError(f"the run in {folder} is finished: nothing to resume")
    return folder


def check_same_recipe(folder: Path, resolved: dict) -> None:
    """Raise RecipeError, with the fields that differ, unless the run in `folder` was started with this recipe."""
    before, now = json.loads((folder / "recipe.json").read_text()), json.loads(json.dumps(resolved))
    changed = [f"{key}: {before.get(key)} before, {now.get(key)} now" for key in now if before.get(key) != now.get(key)]
    if changed:
        raise RecipeError("\n  ".join([f"the run in {folder} was started with another recipe:", *changed]))


def check_launcher(recipe: Recipe) -> None:
    """Raise RecipeError for launcher settings that would be without effect, or change what the recipe computes."""
    environment = os.environ
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", recipe.mixed_precision):
        raise RecipeError(f"the launcher asks for mixed precision {precision}, the recipe for {recipe.mixed_precision}; "
                          f"precision belongs to the recipe: --set mixed_precision={precision}")
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise RecipeError("gradient accumulation is asked for with --accumulate N, not by the launcher")
    if "MASTER_ADDR" in environment and "RANK" not in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        raise RecipeError("accelerate launch was asked for several processes, but without several GPUs it starts one; "
                          "give it --multi_gpu as well (it then starts them on the CPU, too), or "
                          "--config_file accelerate_config.yaml, which says so")


def make_accelerator(recipe: Recipe):
    """The Accelerator; on a machine without GPUs its processes use the CPU, with all cores if there is one process.

    Raises:
        RecipeError: for fp16 on a CPU, which Accelerate would quietly compute in float32.
    """
    import torch
    from accelerate import Accelerator

    cpu = not torch.accelerator.is_available()
    if recipe.mixed_precision == "fp16" and cpu:
        raise RecipeError("mixed_precision='fp16' needs a GPU; on this CPU: --set mixed_precision=bf16 or no")
    if cpu and os.environ.get("LOCAL_WORLD_SIZE", "1") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return Accelerator(cpu=cpu, mixed_precision=recipe.mixed_precision)


def first_on_main(accelerator, make):
    """make() on each machine's first process, so that one downloads, then on the others; a failure anywhere is raised by all."""
    from accelerate.utils import gather_object

    made = None
    for first in (True, False):
        fault = ""
        if first == accelerator.is_local_main_process:
            try:
                made = make()
            except RecipeError as error:
                fault = str(error)
        faults = [text for text in gather_object([fault]) if text]
        if faults:
            raise RecipeError(faults[0])
    return made


def default_workers(args: argparse.Namespace, accelerator) -> int:
    """Loader processes: those asked for; else none beside a CPU that trains, up to 8 a process for a GPU."""
    if args.workers is not None:
        return args.workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if accelerator.device.type == "cpu" else min(8, os.cpu_count() // local)


if __name__ == "__main__":
    sys.exit(main())
