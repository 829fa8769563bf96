"""Fine-tuning recipes for pretrained vision backbones: what a recipe file imports, and train and load."""

from pathlib import Path
from typing import Any

from finetune.recipe import *  # noqa: F403
from finetune.recipe import __all__ as __all__  # without train and load: import * is for recipe files

if not (Path(__file__).parent / "recipes").is_dir():  # a clone has recipes/ beside the package: finetune.recipes.NAME
    __path__.append(str(Path(__file__).parent.parent))  # noqa: F405


def __getattr__(name: str) -> Any:
    """train and load, whose modules import torch, which a recipe file does without."""
    if name in ("train", "load"):
        from finetune.utils.text import import_tqdm

        import_tqdm()  # before huggingface_hub does, with a warning
    if name == "train":
        from finetune.api import train

        return train
    if name == "load":
        from finetune.inference.model import load

        return load
    raise AttributeError(f"module 'finetune' has no attribute '{name}'")
