"""The memory format that is chosen leaves the process alive."""

import os
import subprocess
import sys

import timm
import torch

from finetune.models.backbone import memory_format
from helpers import ROOT, small_recipe

SCRIPT = """
import torch
from finetune.models.backbone import memory_format
from finetune.recipe.recipe import minimal_recipe

for channels in (2, 3, 15, 16):
    for kernel, stride in ((1, 1), (1, 2), (1, 3), (1, 4), (1, (2, 1)), (2, 2), (3, 2), (4, 4)):
        layer = torch.nn.Conv2d(channels, 16, kernel, stride, bias=False)
        layout = memory_format(minimal_recipe("resnet18", "digits", 224), layer)
        print(channels, kernel, stride, layout, flush=True)
        layer.to(memory_format=layout)
        for _ in range(2):
            layer(torch.randn(4, channels, 224, 224).contiguous(memory_format=layout)).square().mean().backward()
"""


def test_no_layer_overruns_its_memory():
    """The weight gradients of narrow convolutions, in the memory format chosen for them, do not end the process."""
    on_cpu = os.environ | {"ACCELERATE_USE_CPU": "true"}  # where there is a GPU, too
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, env=on_cpu)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
    assert "channels_last" in done.stdout and "contiguous" in done.stdout


def test_channels_last_is_given_up_only_where_it_must_be(monkeypatch):
    """For a network with such a layer, on a CPU, whether it is all there is or asked for; others keep it."""
    given_up = set()
    for gpu, asked in ((False, "false"), (True, "false"), (True, "yes")):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
        for name in ("resnet18", "tf_efficientnet_lite0", "test_vit", "repvgg_a0", "mobileone_s0", "fastvit_t8"):
            with torch.device("meta"):
                layout = memory_format(small_recipe(backbone=name, head=None), timm.create_model(name))
            if layout == torch.contiguous_format:
                given_up.add((name, gpu, asked))
    on_cpu = ((False, "false"), (True, "yes"))
    assert given_up == {(name, *where) for name in ("repvgg_a0", "mobileone_s0", "fastvit_t8") for where in on_cpu}
