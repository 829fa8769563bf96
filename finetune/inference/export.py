"""The fine-tuned model in the formats other programs load."""

import importlib.util
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.data import create_transform
from torch import nn

from finetune.data.builtin import generated
from finetune.data.decode import WHITE, to_rgb
from finetune.data.sources import load_data
from finetune.inference.model_card import model_card
from finetune.models.saved import SavedModel, find_model, load_model
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.files import check_folder, read_json, write_folder
from finetune.utils.text import progress

if TYPE_CHECKING:
    from tqdm.std import tqdm

OPSET = 18  # of ONNX
TOLERANCE = 1e-4  # between the logits of the original and of an exported file, as a share of the largest, or of 1
RESIZE = {
    "center": "the shorter side becomes {0} pixels, the shape stays",
    "squash": "{0} x {0} pixels, whatever the shape",
    "border": "the longer side becomes {0} pixels, the shape stays, the rest is filled with the mean",
}
TORCH = """\
net = torch.export.load("model.pt2").module(). It needs torch, not timm nor this project. It takes images of exactly this size,
any number at once, and is in eval mode for good. Loading may run code in the file: load it only from those you trust."""


class Examples(NamedTuple):
    """Images to compare logits on, [8, 3, H, W], and what they are."""

    images: torch.Tensor
    kind: str


def export(run: Path, to: str, output: Path | None = None) -> Path:
    """Write a run's model as a folder that another program loads, and return that folder.

    `run` is a run folder, or model-best/ in it; for "onnx" and "torch" whatever load_model takes. "timm": what
    timm.create_model("local-dir:FOLDER", pretrained=True) and the Hugging Face hub take, with a model card. "onnx" and "torch"
    (torch.export): a network in float32 for any number of images, and model.json with its classes and preprocessing; its logits
    are compared with the original's first. `output` is RUN/model-TO if not given.

    Raises:
        RecipeError: if there is no such model, a package is missing, files are in the way, or the logits differ.
    """
    makers = {"timm": timm_files, "onnx": onnx_files, "torch": torch_files}
    if to not in makers:
        hint = "; torch has deprecated TorchScript: --to torch writes what replaces it" if to == "torchscript" else ""
        raise RecipeError(f"--to {to}: there are {', '.join(makers)}{hint}")
    model, owner = find_model(run)
    if output is None and owner is None:
        raise RecipeError(f"{run} is no run folder to write into: name one with --output")
    folder = output or model.with_name(f"{model.name}-{to}")
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"output folder {folder} already holds files; name another --output")
    with progress(None, 3, f"export to {to}: load") as bar:  # 3 steps, named when they begin
        files = makers[to](run, bar)  # in memory: a folder that was started is finished

    def write(aside: Path) -> None:
        for name, content in files.items():
            (aside / name).write_bytes(content)

    write_folder(folder, write)
    return folder


def next_step(bar: "tqdm[Any]", words: str) -> None:
    """Show that a step is done, and what comes next."""
    bar.set_description_str(words, refresh=False)
    bar.update()
    bar.refresh()


def onnx_files(source: Path, bar: "tqdm[Any]") -> dict[str, bytes]:
    """model.onnx, with classes and preprocessing in its metadata as well, and model.json."""
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise RecipeError("--to onnx needs packages that are not installed: pip install onnx onnxscript onnxruntime")
    import onnx

    net, about, examples = load_for_export(source)
    next_step(bar, "export to onnx: convert")
    about["opset"] = OPSET
    try:
        program = torch.onnx.export(
            net,
            (examples.images[:2],),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: "batch"},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise RecipeError(f"torch can't export this network to ONNX: {first_line(error.__cause__ or error)}") from error
    assert program is not None  # as with dynamo=True
    proto = program.model_proto  # made anew at each access
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in about.items()})
    content = proto.SerializeToString()
    next_step(bar, "export to onnx: compare with the original")
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        except Exception as error:  # of an operator that it does not have, such as a convolution in double precision
            raise RecipeError(f"onnxruntime can't run this network: {first_line(error)}") from error
        about["checked"] = compare_logits(
            net, lambda batch: torch.tensor(session.run(None, {"images": batch.numpy()})[0]), examples
        )
    else:
        about["checked"] = "no: onnxruntime is not installed"
    return {"model.onnx": content, "model.json": to_json(about)}


def torch_files(source: Path, bar: "tqdm[Any]") -> dict[str, bytes]:
    """model.pt2 by torch.export, with model.json in it as an extra file as well, and model.json."""
    net, about, examples = load_for_export(source)
    next_step(bar, "export to torch: convert")
    about["use"] = TORCH.replace("\n", " ")
    try:
        with torch.no_grad():
            program = torch.export.export(net, (examples.images[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    except Exception as error:  # each network fails its own way
        raise RecipeError(f"torch can't export this network for any number of images: {first_line(error)}") from error
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"model.json": to_json(about).decode()})
    file.seek(0)
    next_step(bar, "export to torch: compare with the original")
    about["checked"] = compare_logits(net, torch.export.load(file).module(), examples)
    return {"model.pt2": file.getvalue(), "model.json": to_json(about)}


def load_for_export(source: Path) -> tuple[nn.Module, dict[str, Any], Examples]:
    """(network with its weights laid out as exporters expect, what model.json says of it, images to try it on)."""
    model = load_model(source)
    return model.net.to(memory_format=torch.contiguous_format), describe_use(model), example_images(model)


def example_images(model: SavedModel) -> Examples:
    """Validation images of the run's, downloaded if need be, or generated ones where these can't be had."""
    try:
        images, kind = load_data(model.recipe).val, "8 validation images"
    except RecipeError:
        images, kind = generated().val, "8 generated images"
    transform = create_transform(**model.preprocessing)
    chosen = [transform(to_rgb(images[i * len(images) // 8][0], model.recipe.data.background)) for i in range(8)]
    return Examples(torch.stack(chosen), kind)


def describe_use(model: SavedModel) -> dict[str, Any]:
    """All that a program needs beside the network to get from an image file to probabilities."""
    inputs, size = model.preprocessing, model.preprocessing["input_size"][1]
    resize = math.floor(size / inputs["crop_pct"])
    background = "white" if model.recipe.data.background == WHITE else f"RGB {model.recipe.data.background}"
    steps = [
        "upright, as the EXIF orientation says",
        "8 bits: of 16 the higher 8; of floats from 0 to 1, 255 times as much, rounded",
        f"what is transparent composited on {background}",
        f"RGB; resized by PIL, {inputs['interpolation']}: {RESIZE[inputs['crop_mode']].format(resize)}",
        f"the middle {size} x {size} pixels",
        "divided by 255, minus mean, divided by std, channel by channel",
        "float32 [batch, 3, height, width]",
    ]
    return {
        "classes": list(model.classes),
        "input": "images",
        "output": "logits",
        "probabilities": f"the logits' {'softmax' if model.recipe.loss == 'cross_entropy' else 'sigmoid'}",
        "preprocessing": {**inputs, "resize": resize, "steps": steps},
        "flip_test": model.recipe.flip_test,
    }


@torch.no_grad()
def compare_logits(net: nn.Module, exported: Callable[[torch.Tensor], torch.Tensor], examples: Examples) -> dict[str, Any]:
    """How far the exported network's logits are from the original's, on all images at once and on one alone.

    Raises:
        RecipeError: if they are too far.
    """
    pairs = [(net(batch), exported(batch)) for batch in (examples.images, examples.images[:1])]
    worst = torch.stack([(theirs - ours).abs().max() / ours.abs().max().clamp(min=1) for ours, theirs in pairs]).max().item()
    if not worst <= TOLERANCE:
        raise RecipeError(
            f"the exported network's logits differ from the original's by {worst:.1e} of the largest, more than "
            f"{TOLERANCE:g}: nothing was written"
        )
    return {"on": examples.kind, "largest_difference": worst, "torch": torch.__version__}


def to_json(content: dict[str, Any]) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(content, indent=1) + "\n").encode()


def timm_files(source: Path, bar: "tqdm[Any]") -> dict[str, bytes]:
    """config.json and model.safetensors as the run has them, a model card, and the run's curves."""
    folder, run = find_model(source)
    if run is None or not (run / "result.json").is_file():
        raise RecipeError(f"--to timm describes a finished run, and there is none in {run or source}")
    config = read_json(folder / "config.json")
    if "architecture" not in config:
        raise RecipeError(f"--to timm: the network of {run} is not one of timm's; --to onnx and torch take any")
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    if (run / "curves.png").is_file():
        files["curves.png"] = (run / "curves.png").read_bytes()
    return files | {"README.md": model_card(run, config, best=folder.name == "model-best").encode()}
