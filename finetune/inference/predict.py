"""The classes that a trained model predicts for images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from finetune.data.channels import kind_of
from finetune.data.dataset import ImageList, Images
from finetune.data.loader import ImageDataset, is_unreadable, load
from finetune.images.decode import open_file
from finetune.images.read import read_image
from finetune.images.transforms import eval_transform
from finetune.metrics.calibration import probabilities
from finetune.metrics.numbers import to_grades
from finetune.models.backbone import memory_format
from finetune.models.linear_probe import Units, give_units, head_layer
from finetune.models.saved import SavedModel
from finetune.recipe import Recipe
from finetune.recipe.metrics import name_numbers
from finetune.training.evaluate import batch_logits, predict_logits
from finetune.training.setup import RunOptions, make_accelerator
from finetune.utils.errors import RecipeError
from finetune.utils.text import align_columns, print_error, progress

# Given a batch: the indices of its images that could be read, what the network gets for them, their probabilities [n, classes].
Look = Callable[[Sequence[int], torch.Tensor, torch.Tensor], None]


def compute_logits(model: SavedModel, images: Images, on_bad_image: str, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [n, classes], labels) of a map-style set of (PIL image, label), as the run's own evaluation computes them."""
    recipe, dataset, accelerator = prepare(model, images, on_bad_image)
    return predict_logits(recipe, model.net, dataset, accelerator, RunOptions(workers=workers))


def prepare(model: SavedModel, images: Images, on_bad_image: str) -> tuple[Recipe, ImageDataset, Accelerator]:
    """What evaluates these images as the run does; the model's network is moved to where it computes.

    A run in fp16 is evaluated in float32 where there is no GPU.
    """
    net, classes, preprocessing, recipe = model[:4]
    if recipe.mixed_precision == "fp16" and not torch.accelerator.is_available():
        recipe = replace(recipe, mixed_precision="no")
    accelerator, layout = make_accelerator(recipe), memory_format(recipe, net)
    net.to(accelerator.device).to(memory_format=layout)
    several, of_numbers = recipe.loss == "multi_label", recipe.of_numbers
    if of_numbers:  # whose head is computed in float32, as in training
        give_units(head_layer(recipe, net), Units((0.0,) * len(classes), (1.0,) * len(classes)))
    background, transform = recipe.data.background, eval_transform(preprocessing)
    dataset = ImageDataset(
        images, transform, recipe.seed, classes, on_bad_image, several, layout, background, of_numbers=of_numbers
    )
    return recipe, dataset, accelerator


def check_top(top: int) -> None:
    """Raise RecipeError for no number of classes."""
    if top < 1:
        raise RecipeError(f"--top starts at 1, not {top}")


def predict_images(
    model: SavedModel,
    images: Sequence[Any],
    top: int = 5,
    workers: int = 0,
    look: Look | None = None,
    unsure_below: float | None = None,
) -> list[dict[str, Any]]:
    """The likeliest classes of each image: {"file", "predicted", "probability", "top": [[class, probability], ...]}.

    Of numbers: {"file", "predicted": the number, or of several {name: number}}; of grades "grade" is the nearest, likewise.

    Images are paths, PIL images, or numpy arrays and torch tensors of uint8 [H, W, 3] or [H, W], where the network was trained
    on arrays of such [H, W, channels]; "file" is a path's own.

    Probabilities are a softmax over the classes, or sigmoids where the loss is binary or multi_label, of logits divided by the
    model's temperature. With several labels an image, "predicted" lists the classes above the model's thresholds, and
    "probability" theirs. An image that can't be read has neither, an empty "top" and an "error"; it is named on stderr and
    counted there. `look` is called with each batch. With `unsure_below` each row has "unsure": whether the probability is below
    that; of several labels, whether for some class neither its probability nor that of its absence reaches it.

    Raises:
        RecipeError: if no image could be read, for a `top` below 1, and for an `unsure_below` that is no probability.
    """
    check_top(top)
    check_unsure(unsure_below)
    rows = list(predict_rows(model, images, top, workers, look, unsure_below))
    count_unreadable(sum("error" in row for row in rows), len(rows))
    return rows


def count_unreadable(unreadable: int, total: int) -> None:
    """Say on stderr how many images could not be read; raise RecipeError if none could."""
    if unreadable and unreadable == total:
        raise RecipeError("no image could be read")
    if unreadable:
        print_error(f"{unreadable} of {total} images could not be read")


def count_unsure(unsure: int, total: int, below: float | None) -> None:
    """Say on stderr of how many images the network is unsure."""
    if below is not None:
        print_error(f"unsure of {unsure:,} of {total:,} images: a probability below {below:g}")


def predict_rows(
    model: SavedModel,
    images: Sequence[Any],
    top: int = 5,
    workers: int = 0,
    look: Look | None = None,
    unsure_below: float | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of `predict_images`, each as soon as its batch is computed; no more than some batches are held in memory."""
    check_unsure(unsure_below, model.recipe)
    read = reader_for(model)
    recipe, dataset, accelerator = prepare(model, ImageList(images, [0] * len(images), read), "skip")
    dataset.cache = None  # each image is read once
    size, total = recipe.data.batch_size, len(images)
    batches = [range(start, min(start + size, total)) for start in range(0, total, size)]
    loaded = load(dataset, 0, batches, workers, accelerator.device)
    with progress(None, total, "images") as bar:
        for indices, (batch, labels) in zip(batches, loaded, strict=True):
            with torch.no_grad():
                logits = batch_logits(recipe, model.net, batch, accelerator).cpu()
            missing = is_unreadable(labels).cpu()
            probs = logits if recipe.of_numbers else probabilities(recipe.loss, logits, model.temperature)
            if look and not missing.all():
                look([i for i, gone in zip(indices, missing, strict=True) if not gone], batch[~missing], probs[~missing])
            for i, row, unreadable in zip(indices, probs, missing.tolist(), strict=True):
                if unreadable:
                    yield unread_row(images[i], read, recipe)
                else:
                    yield as_row(model, images[i], row, top, unsure_below)
            bar.update(len(indices))


def check_unsure(below: float | None, recipe: Recipe | None = None) -> None:
    """Raise RecipeError for no probability, and for a recipe without probabilities."""
    if below is not None and recipe and recipe.of_numbers:
        raise RecipeError("--unsure-below is for probabilities; this network predicts numbers")
    if below is not None and not 0 < below <= 1:
        raise RecipeError(f"--unsure-below {below:g}: a probability above 0, up to 1")


def as_row(model: SavedModel, image: Any, probs: torch.Tensor, top: int, unsure_below: float | None = None) -> dict[str, Any]:
    """What is predicted of an image, from the probabilities [classes], or numbers."""
    if model.recipe.of_numbers:
        found = {"predicted": probs}
        if (grades := to_grades(probs[None], model.units)) is not None:
            found["grade"] = grades[0].long()
        named = {key: dict(zip(model.classes, part.tolist(), strict=True)) for key, part in found.items()}
        return {"file": file_of(image)} | {key: part if len(part) > 1 else found[key].item() for key, part in named.items()}
    ranked = [[model.classes[label], probs[label].item()] for label in probs.argsort(descending=True, stable=True).tolist()]
    row = {"file": file_of(image), "predicted": ranked[0][0], "probability": ranked[0][1], "top": ranked[:top]}
    if model.thresholds:
        enough = dict(zip(model.classes, model.thresholds, strict=True))
        yes = [(name, prob) for name, prob in ranked if prob > enough[name]]
        row |= {"predicted": [name for name, _ in yes], "probability": [prob for _, prob in yes]}
        probs = torch.maximum(probs, 1 - probs)  # that a class is there, or that it is not
    if unsure_below is not None:
        surest = probs.min() if model.recipe.loss == "multi_label" else probs.max()
        row["unsure"] = bool(surest < unsure_below)
    return row


def unread_row(image: Any, read: Callable[[Any], Any], recipe: Recipe) -> dict[str, Any]:
    """The row of an image that could not be read, with the reason."""
    reason = "read at the second try"
    try:
        read(image)
    except (OSError, RecipeError) as error:
        reason = str(error)
    of_classes: dict[str, Any] = {} if recipe.of_numbers else {"probability": None, "top": []}
    return {"file": file_of(image), "predicted": None, **of_classes, "error": reason}


def file_of(image: Any) -> str:
    """A path as text; of an image in memory, nothing."""
    return str(image) if isinstance(image, str | Path) else ""


def reader_for(model: SavedModel) -> Callable[[Any], Any]:
    """What reads any of the images of `predict_images` as the training images were read."""
    read = partial(read_image, where=name_of, background=model.recipe.data.background)
    if kind := kind_of(model.preprocessing):
        return partial(read, load=open_array, **kind._asdict())
    return partial(read, load=open_any)


def open_array(item: Any) -> Any:
    """Pillow's image of a path that is no array's; what is no path as it is."""
    return open_file(item) if isinstance(item, str | Path) else item


def open_any(item: Any) -> Image.Image:
    """Pillow's image of a path, a PIL image, an array or a tensor."""
    if isinstance(item, str | Path):
        return open_file(item)
    if isinstance(item, Image.Image):
        return item
    pixels = np.asarray(item)
    if pixels.dtype not in (np.uint8, np.uint16, np.bool_):
        raise ValueError(f"an array of {pixels.dtype}, not of uint8")
    return Image.fromarray(pixels)


def name_of(item: Any) -> str:
    """A path as it is; of all else, what it is."""
    return str(item) if isinstance(item, str | Path) else f"given as {type(item).__name__}"


def predictions_as_table(rows: Sequence[dict[str, Any]]) -> str:
    """An aligned line an image: the file, what is predicted, and the likeliest classes with their probabilities."""
    if not any("top" in row for row in rows):
        heads = [key for key in ("predicted", "grade") if any(key in row for row in rows)]
        said = [["can't be read"] if "error" in row else [name_predicted(row[key]) for key in heads] for row in rows]
        return align_columns([("file", *heads), *((row["file"], *cells) for row, cells in zip(rows, said, strict=True))])
    lines: list[tuple[str, ...]] = [("file", "predicted", "probabilities")]
    for row in rows:
        probs = ", ".join(f"{name} {prob:.1%}" for name, prob in row["top"])
        predicted = (joined(row["predicted"], ", ") or "-") + " (unsure)" * row.get("unsure", False)
        lines.append((row["file"], predicted, "can't be read" if "error" in row else probs))
    return align_columns(lines)


def name_predicted(predicted: float | dict[str, float]) -> str:
    """A number that is predicted, or several with their names."""
    several = predicted if isinstance(predicted, dict) else {"": predicted}
    return name_numbers([*several.values()], [*several])


def joined(predicted: str | Sequence[str] | None, mark: str) -> str:
    """A class, or several, in one cell."""
    return predicted if isinstance(predicted, str) else mark.join(predicted or ())
