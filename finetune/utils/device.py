"""Which device a run computes on, and what its kernels can't do."""

import os

import torch
from torch import nn


def uses_cpu() -> bool:
    """Whether it is the CPU: there is no other device, or Accelerate is asked for the CPU (ACCELERATE_USE_CPU)."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("y", "yes", "t", "true", "on", "1")
    return asked or not torch.accelerator.is_available()


def overruns_channels_last(layer: nn.Module) -> bool:
    """Whether torch's CPU kernel for the layer's weight gradient writes outside its memory if images are channels last.

    So it does in torch 2.15, for 1 x 1 convolutions of even stride on 2 to 15 channels, such as the first layers of repvgg,
    mobileone and fastvit; the process then dies, at once or later.
    """
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.in_channels < 16
