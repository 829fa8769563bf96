"""What can be typed after each verb, and after finetune/run.py."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.recipe.load import FLAGS, RECIPES, add_recipe_arguments, flag_name
from finetune.training.run_dir import RESUME_FLAGS


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
    sub = add("compare", "runs/one runs/other --output pictures")
    add_run(sub, "runs", nargs="+", help="finished runs' names or folders; the first is what others are compared with")
    sub.add_argument("--output", type=Path, metavar="DIR", help="draw their curves there")
    sub = add("report", "last")
    add_run(sub, "run", help="a finished run's name or folder")
    sub.add_argument("--output", type=Path, metavar="FILE.html", help="the file to write (default: RUN/report.html)")
    sub.add_argument("--data", metavar="DIR", help="where its images lie now: the same ones")


def add_resume_anyway(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume-anyway", action="store_true", help="resume although the recipe, or the images, were changed")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a run that leave its result as it is."""
    parser.set_defaults(minutes=None)
    parser.add_argument("--output", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME-TIME)")
    parser.add_argument("--checkpoint-every", type=int, default=0, metavar="N", help="steps (default: once an epoch)")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, then stop")
    parser.add_argument("--smoke", action="store_true", help="try the whole path on generated images: no result")
    parser.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="cut each process's share of the batch in N, for less memory; the result stays, but for batch norm that trains",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images, for each training process")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep decoded images there, for later epochs and runs")
    parser.add_argument("--cache-limit", type=float, metavar="GIB", help="of the disk (default: half of what is free)")
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="tensorboard|wandb|...",
        help="log to a tracker that Accelerate knows, too; may be given again",
    )
    parser.add_argument("--quiet", action="store_true", help="print the summary and errors only")
    parser.add_argument("--verbose", action="store_true", help="say at the end how far each group moved, and the files")


def add_model_verbs(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The verbs that take a trained network."""
    model = "a run's name or folder, a timm model's folder, hf-hub:OWNER/NAME or its address"
    on_images = add("predict", "last photographs/ 'more/*.jpg' --top 3 --csv")
    add_run(on_images, "model", help=model)
    on_images.add_argument("--top", type=int, default=5, metavar="N", help="classes to name for each image (default: 5)")
    on_images.add_argument("--csv", action="store_true", help="print comma-separated values")
    on_images.add_argument(
        "--output", type=Path, metavar="FILE", help="write FILE.csv, .jsonl or .parquet as they come; cut off, it goes on"
    )
    text = "mark the images whose class has a probability below P, and count them"
    on_images.add_argument("--unsure-below", type=float, metavar="P", help=text)
    on_images.add_argument("--explain", type=Path, metavar="DIR", help="draw there what in each image speaks for its class")
    on_images.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images (default: 0)")
    text = "with --output: processes that share the images, each with a GPU of its own (default: 1)"
    on_images.add_argument("--processes", type=int, default=1, metavar="N", help=text)
    to_features = add("embed", "last photographs/ --output features.safetensors --picture features.png")
    add_run(to_features, "model", help=model)
    for sub in (on_images, to_features):
        text = "images, folders, globs; a .txt or .csv of paths; - for paths on stdin"
        sub.add_argument("paths", nargs="+", metavar="PATH", help=text)
    to_features.add_argument(
        "--output", type=Path, default=Path("features.safetensors"), metavar="FILE.safetensors",
        help="the file to write: features, and in its metadata the images' paths (default: features.safetensors)",
    )  # fmt: skip
    to_features.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="draw two principal components, coloured by folder"
    )
    to_features.add_argument("--umap", action="store_true", help="draw it by UMAP (pip install umap-learn)")
    on_classes = add("evaluate", "last --data DIR")
    add_run(on_classes, "model", help=model)
    on_classes.add_argument(
        "--data", required=True, metavar="DIR", help="class folders, alone or under val/ or test/; or a named set"
    )
    on_classes.add_argument("--output", type=Path, metavar="DIR", help="draw the confusion matrix there")
    to_format = add("export", "last --to onnx")
    add_run(to_format, "model", help="a finished run's name or folder")
    to_format.add_argument(
        "--to", metavar="timm|onnx|torch|gradio", required=True, help="timm: a folder for the hub, too; gradio: a page"
    )
    text = "put normalisation and softmax inside: uint8 pixels in, probabilities out"
    to_format.add_argument("--preprocess", action="store_true", help=text)
    to_format.add_argument("--half", action="store_true", help="weights and computation in float16")
    text = "so many images at once, no other number (default: any)"
    to_format.add_argument("--batch-size", type=int, metavar="N", help=text)
    to_format.add_argument("--output", type=Path, metavar="DIR", help="the folder to write (default: RUN/model-FORMAT)")
    to_hub = add("push", "last OWNER/NAME --private")
    add_run(to_hub, "model", help="a finished run's name or folder")
    to_hub.add_argument("name", metavar="OWNER/NAME", help="the repository: it is made if need be")
    to_hub.add_argument("--private", action="store_true", help="make a repository that you alone can see")
    to_hub.add_argument("--revision", metavar="BRANCH", help="upload to a branch of this name (default: main)")
    to_hub.add_argument("--report", action="store_true", help="upload report.html, too: it shows validation images")
    add_soup(add("soup", "runs/mine-1 runs/mine-2 runs/mine-3 --output runs/soup"))
    for sub in (on_images, to_features, on_classes, to_format, to_hub):
        sub.add_argument(
            "--checkpoint", choices=("last", "best"), help="insist on the last or the best epoch (default: what the run says)"
        )


def add_soup(parser: argparse.ArgumentParser) -> None:
    """The arguments of an average of runs."""
    add_run(parser, "runs", nargs="+", help="finished runs of one recipe, such as with several seeds")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder to write (default: runs/NAME-soup-TIME)")
    text = "add the runs one by one, the best first, each if the average gets no worse"
    parser.add_argument("--greedy", action="store_true", help=f"{text}: on images that are not measured on")
    parser.add_argument("--toward", choices=("pretrained",), help="mix in the runs' start: pretrained, under the linear probe")
    text = "the start's part, 0 to 1 (default: the best of eight on images that are not measured on)"
    parser.add_argument("--share", type=float, metavar="X", help=text)
    parser.add_argument("--data", metavar="DIR", help="where the runs' images lie now: the same ones")
    parser.description = (
        f"{parser.description} What --greedy, and --toward without --share, choose is chosen on the runs' held-out training "
        "images (data.holdout); of runs without any, on half of their validation images, and the metrics are of the other half."
    )


def add_minutes(parser: argparse.ArgumentParser) -> None:
    """How long the run of a suggested recipe may take."""
    text = "suggest what this machine trains in about M minutes (default: what the number of images asks for)"
    parser.add_argument("--minutes", type=float, metavar="M", help=text)


def add_loss(parser: argparse.ArgumentParser) -> None:
    """What labels are, where a table leaves it open."""
    text = "take labels as classes, or as numbers (default: as a table has them; it says what it took where that is open)"
    parser.add_argument("--loss", choices=("cross_entropy", "huber", "mse", "l1"), help=text)


def add_channels(parser: argparse.ArgumentParser) -> None:
    """Images that are arrays."""
    text = "read images as arrays of N channels: 1 of grey or 16-bit pictures, N of .npy and TIFF (default: as photographs)"
    parser.add_argument("--channels", type=int, metavar="N", help=text)


def add_rank(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The verb that compares networks."""
    sub = add("rank", "--data DIR --shelf small --minutes 30")
    sub.add_argument(
        "--data", required=True, metavar="DIR", help="your images: train/CLASS/* and val/CLASS/*, or CLASS/*; a CSV"
    )
    which = sub.add_mutually_exclusive_group()
    text = "timm's names, or torchvision/NAME (default: those whose weights are installed or in the Hugging Face cache)"
    which.add_argument("--backbones", metavar="NAME,NAME,...", help=text)
    which.add_argument("--shelf", choices=("small", "large"), help="a list of today's networks; weights are downloaded")
    text = "a network with a file of weights, too; may be given again"
    sub.add_argument("--weights", action="append", default=[], metavar="NAME=FILE", help=text)
    sub.add_argument(
        "--minutes", type=float, metavar="M", help="for all, the fastest first; say what is left out (default: no limit)"
    )
    add_loss(sub)
    text = "pixels of each side, for all (default: what suggest takes for each)"
    sub.add_argument("--image-size", type=int, metavar="N", help=text)
    sub.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help="where to write rank.json and rank.png (default: here)"
    )
    text = "keep features there, for a second call (default: ~/.cache/finetune/features)"
    sub.add_argument("--cache", type=Path, metavar="DIR", help=text)
    sub.add_argument("--wide", action="store_true", help="all columns, whole: also licences")


def add_recipe_verbs(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The verbs that find, read and write recipes."""
    sub = add("suggest", "--data DIR --output mine.py")
    sub.add_argument("--data", required=True, metavar="DIR", help="your images: train/CLASS/* and val/CLASS/*, or CLASS/*")
    sub.add_argument(
        "--backbone", metavar="NAME", help="a timm name or torchvision/NAME (default: one whose weights are installed)"
    )
    sub.add_argument("--weights", metavar="FILE|none", help="a file of weights, or none for random ones")
    add_loss(sub)
    add_channels(sub)
    add_minutes(sub)
    text = "take backbone, weights and image size from the first row of what finetune rank wrote, or from --backbone's"
    sub.add_argument("--from", type=Path, dest="ranking", metavar="rank.json", help=text)
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
        where = (
            "where to draw the picture (default: here)"
            if name == "find-lr"
            else "draw pictures there, too: learning rates, images, classes"
        )
        sub.add_argument("--output", type=Path, metavar="DIR", help=where)
        if name == "plan":
            sub.add_argument("--wide", action="store_true", help="all columns and epochs, whole")
    add_tune(add("tune", "mine.py --trials 20 --space lr_scale=0.1..10:log,epochs=3|5"))
    sub = add("reproduce", "efficientnet_lite0_digits --seeds 3")
    add_recipe(sub, help="a recipe with a number")
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="runs to compare with it (default: 1)")
    sub.add_argument("--output", type=Path, metavar="DIR", help="where the runs lie (default: runs/NAME-reproduce)")
    sub.add_argument("--data", metavar="DIR", help="the images, where the recipe was measured on a folder")
    sub.add_argument("--weights", metavar="FILE", help="the weights, where it was measured with a file")


def add_tune(sub: argparse.ArgumentParser) -> None:
    """The arguments of a search."""
    add_recipe(sub)
    add_recipe_arguments(sub)
    sub.add_argument("--trials", type=int, metavar="N", help="values to try, the recipe's own first; of all such commands")
    sub.add_argument("--folds", type=int, metavar="K", help="score by the mean of K folds of the training images")
    sub.add_argument("--holdout", type=float, metavar="X", help="or on this share of them (default: 0.2)")
    sub.add_argument(
        "--space",
        metavar="FIELDS",
        help="FIELD=LOW..HIGH, FIELD=LOW..HIGH:log, FIELD=A|B|C, divided by commas (default: learning rates, weight decay, "
        "label smoothing)",
    )
    sub.add_argument("--minutes", type=float, metavar="M", help="start no trial after so long; two last runs come on top")
    sub.add_argument("--output", type=Path, metavar="DIR", help="the study's folder (default: runs/NAME-tune)")


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
