"""Which device a run computes on, the memory that it took, and what its kernels can't do."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn


def uses_cpu() -> bool:
    """Whether it is the CPU: there is no other device, or Accelerate is asked for the CPU (ACCELERATE_USE_CPU)."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("y", "yes", "t", "true", "on", "1")
    return asked or not torch.accelerator.is_available()


def peak_memory(device: torch.device) -> float:
    """The most memory ever taken, in GiB: of the GPU on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError):  # Linux, where getrusage starts at the memory of the process that started this one
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) / 2**20
    if sys.platform == "win32":
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def overruns_channels_last(layer: nn.Module) -> bool:
    """Whether torch's CPU kernel for the layer's weight gradient writes outside its memory if images are channels last.

    So it does in torch 2.15, for 1 x 1 convolutions of even stride on 2 to 15 channels, such as the first layers of repvgg,
    mobileone and fastvit; the process then dies, at once or later.
    """
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.in_channels < 16
