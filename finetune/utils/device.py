"""Which device a run computes on."""

import os

import torch


def uses_cpu() -> bool:
    """Whether it is the CPU: there is no other device, or Accelerate is asked for the CPU (ACCELERATE_USE_CPU)."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("y", "yes", "t", "true", "on", "1")
    return asked or not torch.accelerator.is_available()
