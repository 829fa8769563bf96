"""The network as a program that needs neither timm nor this project: ONNX and torch.export."""

import importlib.util
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.export.describe import compare_logits, load_for_export, next_step, to_json
from finetune.export.inside import Inside
from finetune.utils.errors import RecipeError, first_line

if TYPE_CHECKING:
    from tqdm.std import tqdm

OPSET = 18  # of ONNX
TORCH = """\
net = torch.export.load("model.pt2").module(). It needs torch, not timm nor this project. It takes images of exactly this size,
{} at once, and is in eval mode for good. Loading may run code in the file: load it only from those you trust."""


def onnx_files(source: Path, bar: "tqdm[Any]", inside: Inside) -> dict[str, bytes]:
    """model.onnx, with classes and preprocessing in its metadata as well, and model.json."""
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise RecipeError("--to onnx needs packages that are not installed: pip install onnx onnxscript onnxruntime")
    import onnx

    net, original, about, examples, tolerance = load_for_export(source, inside)
    next_step(bar, "export to onnx: convert")
    about["opset"] = OPSET
    try:
        program = torch.onnx.export(
            net,
            (examples.images[: inside.batch or 2],),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=None if inside.batch else ({0: "batch"},),
            input_names=["images"],
            output_names=[about["output"]],
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
            original,
            lambda batch: torch.tensor(session.run(None, {"images": batch.numpy()})[0]),
            examples,
            tolerance,
            any_number=not inside.batch,
        )
    else:
        about["checked"] = "no: onnxruntime is not installed"
    return {"model.onnx": content, "model.json": to_json(about)}


def torch_files(source: Path, bar: "tqdm[Any]", inside: Inside) -> dict[str, bytes]:
    """model.pt2 by torch.export, with model.json in it as an extra file as well, and model.json."""
    net, original, about, examples, tolerance = load_for_export(source, inside)
    next_step(bar, "export to torch: convert")
    about["use"] = TORCH.format(inside.batch or "any number").replace("\n", " ")
    try:
        with torch.no_grad():
            shapes = None if inside.batch else ({0: torch.export.Dim.DYNAMIC},)
            program = torch.export.export(net, (examples.images[: inside.batch or 2],), dynamic_shapes=shapes)
    except Exception as error:  # each network fails its own way
        remedy = "" if inside.batch else "; for a fixed number: --batch-size 1"
        number = inside.batch or "any number of"
        raise RecipeError(f"torch can't export this network for {number} images: {first_line(error)}{remedy}") from error
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"model.json": to_json(about).decode()})
    file.seek(0)
    next_step(bar, "export to torch: compare with the original")
    about["checked"] = compare_logits(original, torch.export.load(file).module(), examples, tolerance, not inside.batch)
    return {"model.pt2": file.getvalue(), "model.json": to_json(about)}
