"""The fine-tuned model in the formats other programs load."""

import importlib.util
import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch import nn

from finetune.data.builtin import generated
from finetune.data.sources import load_data
from finetune.inference.model_card import card
from finetune.models.saved import Settings, load_model, locate, read_json
from finetune.utils.errors import RecipeError
from finetune.utils.files import write_folder

OPSET = 18
TOLERANCE = 1e-4  # between the logits of torch and of an exported file, as a share of the largest, or of 1
RESIZE = {
    "center": "the shorter side becomes {0} pixels, the shape stays",
    "squash": "{0} x {0} pixels, whatever the shape",
    "border": "the longer side becomes {0} pixels, the shape stays, the rest is filled with the mean",
}
TORCHSCRIPT = """\
TorchScript: net = torch.jit.load("model.pt"). It needs torch, not timm nor this project. The file holds code: load it only from
those you trust. It takes images of exactly this size, any number at once, and is in eval mode for good. torch has deprecated
TorchScript in favour of torch.export."""


def export(run: Path, to: str, output: Path | None = None) -> Path:
    """Write a run's model as a folder that another program loads, and return that folder.

    `run` is a run folder, or model-best/ in it; for "onnx" and "torchscript" any source of finetune.predict. "timm": what
    timm.create_model("local-dir:FOLDER", pretrained=True) and the Hugging Face hub take, with a model card. "onnx" and
    "torchscript": a network in float32 for any number of images, and model.json with its classes and preprocessing; its logits
    are compared with torch's first. `output` is RUN/model-TO if not given.

    Raises:
        RecipeError: if there is no such model, a package is missing, files are in the way, or the logits differ.
    """
    makers = {"timm": timm_files, "onnx": onnx_files, "torchscript": torchscript_files}
    if to not in makers:
        raise RecipeError(f"--to {to}: there are {', '.join(makers)}")
    model, owner = locate(run)
    if output is None and owner is None:
        raise RecipeError(f"{run} is no run folder to write into: name one with --output")
    folder = output or model.with_name(f"{model.name}-{to}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"output folder {folder} already holds files; name another --output")
    files = makers[to](run)  # in memory: a folder begun is a folder finished

    def write(aside: Path) -> None:
        for name, content in files.items():
            (aside / name).write_bytes(content)

    write_folder(folder, write)
    return folder


def onnx_files(source: Path) -> dict[str, bytes]:
    """model.onnx, with classes and preprocessing in its metadata as well, and model.json."""
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise RecipeError("--to onnx needs packages that are not installed: pip install onnx onnxscript onnxruntime")
    import onnx

    net, about, images, kind = prepared(source)
    about["opset"] = OPSET
    try:
        program = torch.onnx.export(
            net,
            (images[:2],),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: "batch"},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise RecipeError(f"torch can't export this network to ONNX ({reason}); --to torchscript may") from error
    assert program is not None  # as with dynamo=True
    model = program.model_proto  # made anew at each access
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
    content = model.SerializeToString()
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        about["checked"] = compare(
            net, images, kind, lambda batch: torch.tensor(session.run(None, {"images": batch.numpy()})[0])
        )
    else:
        about["checked"] = "no: onnxruntime is not installed"
    return {"model.onnx": content, "model.json": as_json(about)}


def torchscript_files(source: Path) -> dict[str, bytes]:
    """model.pt, with model.json in it as an extra file as well, and model.json."""
    net, about, images, kind = prepared(source)
    about["use"] = TORCHSCRIPT.replace("\n", " ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated, and of shapes held fixed, model.json says
        torch.jit.save(torch.jit.trace(net, images[:2]), file := io.BytesIO(), _extra_files={"model.json": as_json(about)})
        file.seek(0)
        about["checked"] = compare(net, images, kind, torch.jit.load(file))
    return {"model.pt": file.getvalue(), "model.json": as_json(about)}


def prepared(source: Path) -> tuple[nn.Module, dict[str, Any], torch.Tensor, str]:
    """(the network as exporters take it, what goes into model.json, images [8, 3, H, W] to try it on, their kind in words).

    They are validation images of the run's, fetched if need be, or generated ones where these can't be had.
    """
    net, classes, preprocessing, settings = load_model(source)
    try:
        images, kind = load_data(settings).val, "validation images"
    except RecipeError:
        images, kind = generated().val, "generated images"
    transform = create_transform(**preprocessing)
    chosen = torch.stack([transform(images[i * len(images) // 8][0].convert("RGB")) for i in range(8)])
    return net.to(memory_format=torch.contiguous_format), described(classes, preprocessing, settings), chosen, f"8 {kind}"


def described(classes: tuple[str, ...], preprocessing: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """All that a program needs beside the network to get from an image file to probabilities."""
    size, chance = preprocessing["input_size"][1], "softmax" if settings.loss == "cross_entropy" else "sigmoid"
    resize = math.floor(size / preprocessing["crop_pct"])
    steps = [
        f"RGB; resized by PIL, {preprocessing['interpolation']}: {RESIZE[preprocessing['crop_mode']].format(resize)}",
        f"the middle {size} x {size} pixels",
        "divided by 255, minus mean, divided by std, channel by channel",
        "float32 [batch, 3, height, width]",
    ]
    return {
        "classes": list(classes),
        "input": "images",
        "output": "logits",
        "probabilities": f"the logits' {chance}",
        "preprocessing": {**preprocessing, "resize": resize, "steps": steps},
        "flip_test": settings.flip_test,
    }


@torch.no_grad()
def compare(
    net: nn.Module, images: torch.Tensor, kind: str, exported: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """How far the exported network is from torch's, on all images at once and on one alone; RecipeError if too far."""
    pairs = [(net(batch), exported(batch)) for batch in (images, images[:1])]
    worst = torch.stack([(theirs - ours).abs().max() / ours.abs().max().clamp(min=1) for ours, theirs in pairs]).max().item()
    if not worst <= TOLERANCE:
        raise RecipeError(
            f"the exported network's logits differ from torch's by {worst:.1e} of the largest, more than "
            f"{TOLERANCE:g}: nothing was written"
        )
    return {"on": kind, "largest_difference": worst, "torch": torch.__version__}


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def timm_files(source: Path) -> dict[str, bytes]:
    """config.json and model.safetensors as the run has them, a model card, and the run's curves."""
    folder, run = locate(source)
    if run is None or not (run / "result.json").is_file():
        raise RecipeError(f"--to timm describes a finished run, and there is none in {run or source}")
    config = read_json(folder / "config.json")
    if "architecture" not in config:
        raise RecipeError(f"--to timm: the network of {run} is not one of timm's; --to onnx and torchscript take any")
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    if (run / "curves.png").is_file():
        files["curves.png"] = (run / "curves.png").read_bytes()
    return files | {"README.md": card(run, config, best=folder.name == "model-best").encode()}
