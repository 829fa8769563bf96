"""Tensors kept on disk: they come back as they were, under a key that tells one set of images from another."""

import numpy as np
import torch
from PIL import Image

from finetune.data.dataset import ImageList
from finetune.images.read import read_image
from finetune.ranking.features import digest_images, keep, place_of, recall
from finetune.utils.files import cache_folder


def test_a_kept_file_that_was_cut_is_computed_anew(tmp_path):
    """What was kept comes back bit for bit with its facts; half a file is none."""
    tensor, file = torch.randn(5, 3), tmp_path / "new" / "x.safetensors"
    assert recall(file) is None
    keep(file, tensor, {"speed": 3.5})
    assert torch.equal(recall(file)[0], tensor) and recall(file)[1] == {"speed": 3.5}
    file.write_bytes(file.read_bytes()[:-8])
    assert recall(file) is None


def test_images_are_told_by_content(tmp_path):
    """Names and folders do not count; the order, a byte, and pixels in memory do."""
    for name, level in (("a", 10), ("b", 20)):
        Image.new("RGB", (9, 9), (level, 0, 0)).save(tmp_path / f"{name}.png")

    def digest(*names):
        return digest_images(ImageList([tmp_path / f"{name}.png" for name in names], [0] * len(names), read_image))

    before = digest("a", "b")
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    assert digest("c", "b") == before != digest("b", "c")
    Image.new("RGB", (9, 9), (11, 0, 0)).save(tmp_path / "c.png")
    assert digest("c", "b") != before
    pixels = np.arange(2 * 9 * 9 * 3).reshape(2, 9, 9, 3).astype(np.uint8)
    in_memory = [digest_images(ImageList(values, [0, 0], read_image)) for values in (pixels, pixels.copy(), pixels[::-1])]
    assert in_memory[0] == in_memory[1] != in_memory[2]


def test_the_folder_is_xdgs(monkeypatch, tmp_path):
    """XDG_CACHE_HOME, else ~/.cache, unless a folder is named; each key has its own file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "finetune"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "finetune"
    assert place_of(tmp_path, {"a": 1, "b": 2}) == place_of(tmp_path, {"b": 2, "a": 1}) != place_of(tmp_path, {"a": 2, "b": 1})
