"""A backbone that is unfrozen after the network was prepared for two processes: do both processes keep the same weights?

Theirs: requires_grad_ after accelerator.prepare(). Ours: unfreeze_at=1, two processes against one.
"""

import json
import os

import accelerate
import torch
from torch import nn

from benchmarks.elsewhere.small import Ours, furthest, on_two_processes, weights_of


def largest_difference() -> float:
    """Between the processes' weights of the late layer, after five steps on each one's images."""
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    plain[0].requires_grad_(False)
    net, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    torch.manual_seed(accelerator.process_index)
    for step in range(10):
        plain[0].requires_grad_(step >= 5)
        accelerator.backward(net(torch.randn(4, 8)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    weights = accelerator.gather(plain[0].weight.detach()[None])
    return (weights[0] - weights[1]).abs().max().item()


if "RANK" in os.environ:
    difference = largest_difference()
    accelerate.PartialState().print(f"{difference:.0e}")
else:
    ours = Ours()
    difference = furthest(weights_of(ours.run("--processes", "2")), weights_of(ours.run()))
    found = {
        "theirs": f"they differ by {on_two_processes(__spec__.name)} after five steps",
        "ours": f"they are the same; they differ by {difference:.0e} from those of one process",
    }
    print(json.dumps({**found, "versions": f"accelerate {accelerate.__version__}"}))
