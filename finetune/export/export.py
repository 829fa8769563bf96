"""The fine-tuned model in the formats other programs load."""

from pathlib import Path

from finetune.export.demo import demo_files
from finetune.export.inside import Inside
from finetune.export.programs import onnx_files, torch_files
from finetune.export.timm_folder import timm_files
from finetune.models.saved import find_model
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_folder, write_folder
from finetune.utils.text import progress


def export(
    run: Path,
    to: str,
    output: Path | None = None,
    preprocess: bool = False,
    half: bool = False,
    batch_size: int | None = None,
) -> Path:
    """Write a run's model as a folder that another program loads, and return that folder.

    `run` is a run folder, or model-best/ in it; for "onnx" and "torch" whatever load_model takes. "timm": what
    timm.create_model("local-dir:FOLDER", pretrained=True) and the Hugging Face hub take, with a model card. "gradio": that, and
    a page to try it on. "onnx" and "torch" (torch.export): a network in float32 for any number of images, and model.json with
    its classes and preprocessing; its logits are compared with the original's first. With `preprocess` it takes uint8 pixels
    [n, height, width, 3] of its own size, and returns probabilities; with `half` it computes in float16; with `batch_size` it
    takes so many images at once and no other number, as some accelerators need it. `output` is RUN/model-TO if not given.

    Raises:
        RecipeError: if there is no such model, a package is missing, files are in the way, or the logits differ.
    """
    plain, makers = {"timm": timm_files, "gradio": demo_files}, {"onnx": onnx_files, "torch": torch_files}
    if to not in (formats := (*plain, *makers)):
        hint = "; torch has deprecated TorchScript: --to torch writes what replaces it" if to == "torchscript" else ""
        raise RecipeError(f"--to {to}: there are {', '.join(formats)}{hint}")
    inside = Inside(preprocess, half, batch_size)
    if batch_size is not None and batch_size < 1:
        raise RecipeError(f"--batch-size starts at 1, not {batch_size}")
    if to in plain and any(inside):
        raise RecipeError(
            "--preprocess, --half and --batch-size are for --to onnx and torch: timm normalises by itself, in float32, and "
            "takes any number of images"
        )
    model, owner = find_model(run)
    if output is None and owner is None:
        raise RecipeError(f"{run} is no run folder to write into: name one with --output")
    folder = output or model.with_name(f"{model.name}-{to}")
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"output folder {folder} already holds files; name another --output")
    with progress(None, 3, f"export to {to}: load") as bar:  # 3 steps, named when they begin
        # In memory: a folder that was started is finished.
        files = plain[to](run, bar) if to in plain else makers[to](run, bar, inside)

    def write(aside: Path) -> None:
        for name, content in files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_bytes(content)

    write_folder(folder, write)
    return folder
