"""Nine equal batches, accumulated by four: how large is the step of the one batch that is left over?

Theirs: `with accelerator.accumulate(net)`. Ours: --accumulate 4, against the same run without it.
"""

import json

import accelerate
import torch
from torch.utils.data import DataLoader

from benchmarks.elsewhere.small import Ours, furthest, weights_of

accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
net = torch.nn.Linear(1, 1, bias=False)
optimizer, loader = torch.optim.SGD(net.parameters(), lr=1.0), DataLoader(torch.ones(9, 1), batch_size=1)
net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
steps = []
for batch in loader:
    with accelerator.accumulate(net):
        before = net.weight.item()
        accelerator.backward(net(batch).mean())  # its gradient is 1
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.sync_gradients:
            steps.append(before - net.weight.item())

ours = Ours()
difference = furthest(weights_of(ours.run("--accumulate", "4")), weights_of(ours.run()))
print(
    json.dumps(
        {
            "theirs": f"{steps[-1] / steps[0]:g} of the others",
            "ours": f"that of its images' mean: after two epochs, weights differ from an undivided run's by {difference:.0e}",
            "versions": f"accelerate {accelerate.__version__}",
        }
    )
)
