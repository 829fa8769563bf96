"""A backbone that is unfrozen in the second epoch, on two processes: do both keep the same weights?

Theirs: BackboneFinetuning with the strategy ddp. Ours: see accelerate_unfreezing.
"""

import json
import os

import lightning
import torch
from lightning.pytorch.callbacks import BackboneFinetuning

from benchmarks.elsewhere.small import Ours, furthest, lightning_net, lightning_trainer, on_two_processes, weights_of


def largest_difference() -> str:
    net = lightning_net()
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    options = {"callbacks": [callback], "max_epochs": 3, "enable_checkpointing": False}
    trainer = lightning_trainer(strategy="ddp", devices=2, **options)
    trainer.fit(net)
    weights = torch.cat([param.detach().flatten() for param in net.backbone.parameters()])
    gathered = [torch.empty_like(weights) for _ in range(2)]
    torch.distributed.all_gather(gathered, weights)
    return f"{(gathered[0] - gathered[1]).abs().max().item():.0e}" if trainer.global_rank == 0 else ""


if "RANK" in os.environ:
    if difference := largest_difference():
        print(difference)
else:
    ours = Ours()
    difference = furthest(weights_of(ours.run("--processes", "2")), weights_of(ours.run()))
    found = {
        "theirs": f"they differ by {on_two_processes(__spec__.name)} after three epochs",
        "ours": f"they are the same; they differ by {difference:.0e} from those of one process",
    }
    print(json.dumps({**found, "versions": f"lightning {lightning.__version__}"}))
