"""The folder that timm, transformers and the Hugging Face hub take."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.export.model_card import model_card
from finetune.models.saved import find_model
from finetune.utils.errors import RecipeError
from finetune.utils.files import read_json

if TYPE_CHECKING:
    from tqdm.std import tqdm


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
