"""What an exported network may have inside: normalisation and probabilities, half precision, a fixed number of images."""

from typing import Any, NamedTuple

import torch
from torch import nn

from finetune.recipe.metrics import NUMBER_LOSSES


class Inside(NamedTuple):
    """What is asked for."""

    preprocess: bool = False  # pixels in, probabilities out
    half: bool = False  # computes in float16
    batch: int | None = None  # so many images at once, no more and no fewer; None: any number


class PixelsToProbabilities(nn.Module):
    """A network that takes pixels [n, height, width, channels] of its own size, and returns probabilities [n, classes].

    One of numbers returns these.
    """

    def __init__(self, net: nn.Module, preprocessing: dict[str, Any], loss: str, temperature: float):
        super().__init__()
        self.net, self.loss, self.temperature = net, loss, temperature
        self.mean: torch.Tensor
        self.std: torch.Tensor
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(preprocessing[name]).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.net((images.permute(0, 3, 1, 2).float() - self.mean) / self.std) / self.temperature
        if self.loss in NUMBER_LOSSES:
            return logits
        return logits.softmax(1) if self.loss == "cross_entropy" else logits.sigmoid()


class Half(nn.Module):
    """A network in float16 that takes and returns float32; the network itself is changed."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.half()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images.half()).float()
