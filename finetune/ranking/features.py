"""Tensors kept on disk, such as features of a frozen network: computed once for the same images, network and weights."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from finetune.data.dataset import ImageList, Images, digests_of
from finetune.data.split import has_files
from finetune.utils.files import write_file

FORMAT = 1  # of the files: another number, and those that are there are computed anew
CHUNK = 1 << 20


def place_of(folder: Path, key: Mapping[str, Any]) -> Path:
    """The file in which a tensor with this key, in JSON's types, is kept."""
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    return folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"


def recall(file: Path) -> tuple[torch.Tensor, dict[str, Any]] | None:
    """(tensor, facts) as `keep` wrote them; None where there are none, or no whole file."""
    try:
        with safetensors.safe_open(file, "pt") as kept:
            return kept.get_tensor("tensor"), json.loads(kept.metadata()["facts"])
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        return None


def keep(file: Path, tensor: torch.Tensor, facts: Mapping[str, Any]) -> None:
    """Write a tensor and facts about it, in JSON's types."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, safetensors.torch.save({"tensor": tensor.contiguous()}, {"facts": json.dumps(dict(facts))}))


def digest_images(images: Images) -> str:
    """A digest of the content of all images, in their order: of each file's size and two ends, else of its pixels."""
    digest = hashlib.blake2b(str(len(images)).encode(), digest_size=16)
    if isinstance(images, ImageList) and has_files(images):
        digest.update("".join(digests_of(images)).encode())
    elif isinstance(images, ImageList) and isinstance(images.items, np.ndarray) and images.items.ndim > 2:
        digest.update(np.ascontiguousarray(images.items).ravel().data)
    else:
        for i in range(len(images)):
            pixels = np.asarray(images[i][0])
            digest.update(str(pixels.shape).encode() + pixels.tobytes())
    return digest.hexdigest()


def digest_file(path: Path) -> str:
    """A digest of all of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_array(values: Any) -> str:
    """A digest of numbers and of their shape."""
    array = np.ascontiguousarray(values)
    whole = array.astype(np.int64)
    array = whole if np.array_equal(whole, array) else array.astype(np.float64)
    return hashlib.blake2b(array.ravel().data, key=str(array.shape).encode(), digest_size=16).hexdigest()
