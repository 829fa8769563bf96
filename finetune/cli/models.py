"""The verbs that take trained networks."""

import argparse
import sys
from pathlib import Path

from finetune.recipe.load import check_source
from finetune.training.run_dir import find_run, new_run_dir, run_name
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_new
from finetune.utils.text import show_result


def find_model_run(args: argparse.Namespace) -> str:
    """The folder of a run's network by the run's name, said on stderr; what is on the hub, or a folder, as it is."""
    name = str(args.model)
    if not name.startswith(("hf-hub:", "https://")):
        name = str(find_run(name, "finished"))

    from finetune.models.saved import choose_model

    model, why = choose_model(name, args.checkpoint)
    if why:
        print(f"using {Path(model).name}: {why}", file=sys.stderr)
    return model


def predict(args: argparse.Namespace) -> None:
    """Say what is on images: the likeliest classes of each."""
    if args.json and args.csv:
        raise RecipeError("--json or --csv, not both")
    if args.processes != 1 and not args.output:
        raise RecipeError("--processes is for --output FILE, which each process writes a part of")
    if args.output and args.csv:
        raise RecipeError("--output writes the format that its name says: leave out --csv")

    from finetune.inference.inputs import find_inputs, name_pictures, parts_of

    files, pictures = find_inputs(args.paths), list[Path]()
    if args.explain:
        pictures = name_pictures(files, args.explain, going_on=bool(args.output and parts_of(args.output)))
    model = find_model_run(args)  # before the seconds that torch takes

    from finetune.inference.explain import picture_writer
    from finetune.inference.parts import Asked
    from finetune.inference.predict import count_unsure, predict_images, predictions_as_table
    from finetune.inference.predictions import predictions_as_csv, write_predictions
    from finetune.models.saved import load_model

    if args.output:
        asked = Asked(args.top, args.unsure_below, args.workers, args.processes)
        done = write_predictions(model, files, args.output, asked, pictures)
        count_unsure(done.get("unsure", 0), done["images"], args.unsure_below)
        show_result(args, done, lambda: f"{done['file']}: {done['images']:,} images, {done['unreadable']:,} of them unreadable")
        return
    loaded = load_model(model)
    look = picture_writer(loaded, files, pictures) if pictures else None
    rows = predict_images(loaded, files, args.top, args.workers, look, args.unsure_below)
    count_unsure(sum(row.get("unsure", False) for row in rows), len(rows), args.unsure_below)
    show_result(args, rows, lambda: predictions_as_csv(rows).rstrip("\n") if args.csv else predictions_as_table(rows))


def embed(args: argparse.Namespace) -> None:
    """Write the features of images, what a trained network gives to its head, into a file."""
    check_new(args.output, ".safetensors")

    from finetune.inference.inputs import find_inputs

    files, model = find_inputs(args.paths), find_model_run(args)  # before the seconds that torch takes

    from finetune.inference.embed import write_embedding

    result, text = write_embedding(model, files, args.output, args.picture, args.umap)
    show_result(args, result, lambda: text)


def evaluate(args: argparse.Namespace) -> None:
    """Measure a network on labelled images: totals, a table of the classes, the confusion matrix."""
    check_source(args.data)
    model = find_model_run(args)  # before the seconds that torch takes

    from finetune.inference.evaluate import evaluate, evaluation_as_text

    result = evaluate(model, args.data, args.output)
    show_result(args, result, lambda: evaluation_as_text(result))


def export(args: argparse.Namespace) -> None:
    """Write a finished run's network for timm, ONNX or torch.export, checked against the original."""
    model = find_model_run(args)  # before the seconds that torch takes

    from finetune.export.export import export

    folder = str(export(Path(model), args.to, args.output, args.preprocess, args.half, args.batch_size))
    show_result(args, {"folder": folder, "format": args.to}, lambda: folder)


def push(args: argparse.Namespace) -> None:
    """Upload a finished run's network, with its card, to the Hugging Face hub."""
    model = find_model_run(args)  # before the seconds that torch takes

    from finetune.export.push import push

    done = push(Path(model), args.name, args.private, args.revision, args.report)
    seen = ("private" if done["private"] else "public") + ("" if done["new"] else ", which was there: a new commit")
    show_result(args, done, lambda: f"{done['address']} ({seen}): {', '.join(done['files'])}\n{done['load']}")


def soup(args: argparse.Namespace) -> None:
    """Average the weights of finished runs of one recipe into one network, and compare it with each."""
    folders = [find_run(name, "finished") for name in args.runs]
    if args.data:
        check_source(args.data)
    output = new_run_dir(f"{run_name(folders[0])}-soup", args.output)

    from finetune.tuning.soup import make_soup, soup_as_text

    result = make_soup(folders, output, args.greedy, bool(args.toward), args.share, args.data)
    show_result(args, result, lambda: soup_as_text(result))
