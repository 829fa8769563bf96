"""The fine-tuned model in the formats other programs load."""

import copy
import errno
import json
from pathlib import Path

import safetensors.torch
import timm.models
import torch
from torch import nn

from finetune.checkpoint import plain_state, write_folder


def save_model(folder: Path, net: nn.Module, preprocessing: dict, classes: tuple[str, ...]) -> None:
    """Write a folder with the network, its classes and its preprocessing, replacing what was there in one step.

    A timm model is loaded again by timm.create_model("local-dir:FOLDER", pretrained=True). Of any other network the folder has
    model.safetensors (its state dict) and config.json (classes and preprocessing).
    """
    def write(aside: Path) -> None:
        if hasattr(net, "pretrained_cfg"):
            plain = copy.deepcopy(net).cpu().to(memory_format=torch.contiguous_format)
            try:
                timm.models.save_for_hf(plain, aside, model_config={"label_names": list(classes)}, safe_serialization=True,
                                        data_config=preprocessing)
            except safetensors.SafetensorError as error:  # how safetensors says that a disk is full
                raise OSError(errno.EIO, str(error)) from error
        else:
            (aside / "model.safetensors").write_bytes(safetensors.torch.save(plain_state(net)))
            config = {"label_names": list(classes), "preprocessing": preprocessing}
            (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    write_folder(folder, write)
