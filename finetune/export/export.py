"""The fine-tuned model in the formats other programs load."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.export.inside import Inside
from finetune.export.model_card import model_card
from finetune.export.programs import onnx_files, torch_files
from finetune.models.saved import find_model
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_folder, read_json, write_folder
from finetune.utils.text import progress

if TYPE_CHECKING:
    from tqdm.std import tqdm


def export(run: Path, to: str, output: Path | None = None, preprocess: bool = False, half: bool = False) -> Path:
    """Write a run's model as a folder that another program loads, and return that folder.

    `run` is a run folder, or model-best/ in it; for "onnx" and "torch" whatever load_model takes. "timm": what
    timm.create_model("local-dir:FOLDER", pretrained=True) and the Hugging Face hub take, with a model card. "onnx" and "torch"
    (torch.export): a network in float32 for any number of images, and model.json with its classes and preprocessing; its logits
    are compared with the original's first. With `preprocess` it takes uint8 pixels [n, height, width, 3] of its own size, and
    returns probabilities; with `half` it computes in float16. `output` is RUN/model-TO if not given.

    Raises:
        RecipeError: if there is no such model, a package is missing, files are in the way, or the logits differ.
    """
    makers = {"onnx": onnx_files, "torch": torch_files}
    if to not in (formats := ("timm", *makers)):
        hint = "; torch has deprecated TorchScript: --to torch writes what replaces it" if to == "torchscript" else ""
        raise RecipeError(f"--to {to}: there are {', '.join(formats)}{hint}")
    inside = Inside(preprocess, half)
    if to == "timm" and any(inside):
        raise RecipeError("--preprocess and --half are for --to onnx and torch: timm normalises by itself, in float32")
    model, owner = find_model(run)
    if output is None and owner is None:
        raise RecipeError(f"{run} is no run folder to write into: name one with --output")
    folder = output or model.with_name(f"{model.name}-{to}")
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"output folder {folder} already holds files; name another --output")
    with progress(None, 3, f"export to {to}: load") as bar:  # 3 steps, named when they begin
        files = (
            timm_files(run, bar) if to == "timm" else makers[to](run, bar, inside)
        )  # in memory: a folder that was started is finished

    def write(aside: Path) -> None:
        for name, content in files.items():
            (aside / name).write_bytes(content)

    write_folder(folder, write)
    return folder


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
