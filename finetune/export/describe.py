"""What an exported network needs beside it, and whether it computes what the original does."""

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.data import create_transform
from torch import nn

from finetune.data.builtin import generated
from finetune.data.channels import kind_of
from finetune.data.dataset import ImageList
from finetune.data.sources import load_data
from finetune.export.inside import Half, Inside, PixelsToProbabilities
from finetune.images.cache import PHOTOGRAPHS
from finetune.images.decode import WHITE, to_rgb
from finetune.images.read import read_image
from finetune.images.transforms import eval_transform
from finetune.models.saved import SavedModel, load_model
from finetune.utils.errors import RecipeError

if TYPE_CHECKING:
    from tqdm.std import tqdm

TOLERANCE = 1e-4  # between what the original and an exported file return, as a share of the largest, or of 1
HALF = 2e-2  # likewise in float16, whose rounding of 5e-4 adds up over some fifty layers
RESIZE = {
    "center": "the least that covers {0} x {1} pixels, the shape stays",
    "squash": "{0} x {1} pixels, whatever the shape",
    "border": "the most that fits into {0} x {1} pixels, the shape stays, the rest is filled with the mean",
}


class Examples(NamedTuple):
    """Images to compare logits on, [8, 3, H, W], and what they are."""

    images: torch.Tensor
    kind: str


class Prepared(NamedTuple):
    """A network to export, what is compared with it, what model.json says of it, and images to try it on."""

    net: nn.Module
    original: nn.Module
    about: dict[str, Any]
    examples: Examples
    tolerance: float


def load_for_export(source: Path, inside: Inside) -> Prepared:
    """The network with its weights laid out as exporters expect, and with what is asked for inside."""
    model = load_model(source)
    net, about, examples = model.net.to(memory_format=torch.contiguous_format), describe_use(model), example_images(model)
    original = copy.deepcopy(net) if inside.half else net
    if inside.half and model.recipe.of_numbers:
        raise RecipeError("--half rounds to three digits, also the numbers that this network predicts: leave it out")
    net = Half(net) if inside.half else net
    if inside.preprocess:
        wrap = partial(
            PixelsToProbabilities, preprocessing=model.preprocessing, loss=model.recipe.loss, temperature=model.temperature
        )
        net, original = wrap(net), wrap(original)
        examples = examples._replace(images=to_pixels(examples.images, model.preprocessing))
        kind = kind_of(model.preprocessing) or PHOTOGRAPHS
        taken = f"{'uint8' if kind.dtype == 'uint8' else 'float32'} [batch, height, width, {kind.channels}]"
        about["preprocessing"]["steps"] = [*about["preprocessing"]["steps"][:-2], taken]
        if not model.recipe.of_numbers:
            about |= {"output": "probabilities", "probabilities": "as they come: the temperature is inside"}
    if inside.batch:
        examples = examples._replace(images=examples.images[[i % 8 for i in range(inside.batch)]])
    return Prepared(net.eval(), original.eval(), about | inside._asdict(), examples, HALF if inside.half else TOLERANCE)


def to_pixels(images: torch.Tensor, preprocessing: dict[str, Any]) -> torch.Tensor:
    """Normalised images [n, channels, H, W] as the pixels [n, H, W, channels] that they were made of: uint8, or floats."""
    mean, std = (torch.tensor(preprocessing[name])[:, None, None] for name in ("mean", "std"))
    values = (255 * (images * std + mean)).permute(0, 2, 3, 1).contiguous()
    whole = (kind_of(preprocessing) or PHOTOGRAPHS).dtype == "uint8"
    return values.round().clamp(0, 255).to(torch.uint8) if whole else values


def example_images(model: SavedModel) -> Examples:
    """Validation images of the run's, downloaded if need be, or generated ones where these can't be had."""
    data = model.recipe.data
    try:
        images, kind = load_data(model.recipe).val, "8 validation images"
    except RecipeError:
        made = generated().val
        assert isinstance(made, ImageList)
        images, kind = made.read_as(data), "8 generated images"
    chosen = [images[i * len(images) // 8][0] for i in range(8)]
    if arrays := kind_of(model.preprocessing):
        transform = eval_transform(model.preprocessing)
        read = (read_image(image, lambda image: image, channels=arrays.channels) for image in chosen)
        return Examples(torch.cat([transform.batch(transform.image(array)[None]) for array in read]), kind)
    by_timm = create_transform(**model.preprocessing)
    return Examples(torch.stack([by_timm(to_rgb(image, data.background)) for image in chosen]), kind)


def describe_use(model: SavedModel) -> dict[str, Any]:
    """All that a program needs beside the network to get from an image file to probabilities."""
    inputs, (_, high, wide) = model.preprocessing, model.preprocessing["input_size"]
    resize = [math.floor(side / inputs["crop_pct"]) for side in (high, wide)]  # height, width
    background = "white" if model.recipe.data.background == WHITE else f"RGB {model.recipe.data.background}"
    steps = [
        "upright, as the EXIF orientation says",
        "8 bits: of 16 the higher 8; of floats from 0 to 1, 255 times as much, rounded",
        f"what is transparent composited on {background}",
        f"RGB; resized by PIL, {inputs['interpolation']}: {RESIZE[inputs['crop_mode']].format(*resize)}",
        f"the middle {high} x {wide} pixels",
        "divided by 255, minus mean, divided by std, channel by channel",
        "float32 [batch, 3, height, width]",
    ]
    if kind := kind_of(inputs):
        steps[:4] = [
            f"numbers [height, width, {kind.channels}] of {kind.dtype}, upright, as floats",
            f"resized, {inputs['interpolation']}, with antialiasing: {RESIZE[inputs['crop_mode']].format(*resize)}",
        ]
        steps[-1] = f"float32 [batch, {kind.channels}, height, width]"
    several = {
        "thresholds": list(model.thresholds or ()),
        "predicted": "each class whose probability is above its threshold; the thresholds are in the order of the classes",
    }
    function = "softmax" if model.recipe.loss == "cross_entropy" else "sigmoid"
    of_classes = {
        "classes": list(model.classes),
        "input": "images",
        "output": "logits",
        "temperature": model.temperature,
        "probabilities": f"the {function} of logits / temperature",
        **(several if model.thresholds else {}),
    }
    of_numbers: dict[str, Any] = {"numbers": list(model.classes), "input": "images", "output": "numbers"}  # in labels' units
    if model.units and model.units.lowest:
        lowest, highest = (list(map(int, ends)) for ends in (model.units.lowest, model.units.highest))
        of_numbers["grades"] = {"from": "numbers, rounded, and clipped to these", "lowest": lowest, "highest": highest}
    return {
        **(of_numbers if model.recipe.of_numbers else of_classes),
        "preprocessing": {**inputs, "resize": resize[0] if high == wide else resize, "steps": steps},
        "flip_test": model.recipe.flip_test,
    }


@torch.no_grad()
def compare_logits(
    net: nn.Module,
    exported: Callable[[torch.Tensor], torch.Tensor],
    examples: Examples,
    tolerance: float | None = None,
    any_number: bool = True,
) -> dict[str, Any]:
    """How far what the exported network returns is from the original's, on all images at once and, if it can, on one alone.

    Raises:
        RecipeError: if they are too far.
    """
    tolerance = TOLERANCE if tolerance is None else tolerance
    batches = [examples.images, *[examples.images[:1]] * any_number]
    pairs = [(net(batch), exported(batch)) for batch in batches]
    worst = torch.stack([(theirs - ours).abs().max() / ours.abs().max().clamp(min=1) for ours, theirs in pairs]).max().item()
    if not worst <= tolerance:
        raise RecipeError(
            f"the exported network's logits differ from the original's by {worst:.1e} of the largest, more than "
            f"{tolerance:g}: nothing was written"
        )
    return {"on": examples.kind, "largest_difference": worst, "torch": torch.__version__}


def to_json(content: dict[str, Any]) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(content, indent=1) + "\n").encode()


def next_step(bar: "tqdm[Any]", words: str) -> None:
    """Show that a step is done, and what comes next."""
    bar.set_description_str(words, refresh=False)
    bar.update()
    bar.refresh()
