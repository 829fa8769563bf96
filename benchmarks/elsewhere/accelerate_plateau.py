"""A loss that stays the same, and a plateau schedule on two processes: after how many epochs is the learning rate cut?

Theirs: ReduceLROnPlateau given to accelerator.prepare(), stepped once an epoch. Ours: Plateau.
"""

import json
import os

import accelerate
import torch

from benchmarks.elsewhere.small import Ours, metrics_of, on_two_processes


def epochs_until_cut() -> int:
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    epochs = 0
    while optimizer.param_groups[0]["lr"] == 1.0:
        optimizer.step()
        scheduler.step(1.0)
        epochs += 1
    return epochs


def ours(*options: str) -> int:
    run = Ours(schedule="Plateau(patience=3, threshold=9.0)", epochs=6).run(*options)  # no epoch is ten times the first
    return min(row["epoch"] for row in metrics_of(run) if row.get("lr", {}).get("head", 1e-2) < 1e-2)


if "RANK" in os.environ:
    if (epochs := epochs_until_cut()) and os.environ["RANK"] == "0":
        print(epochs)
else:
    told = "{} epochs on one process, {} on two"
    found = {
        "theirs": told.format(epochs_until_cut(), on_two_processes(__spec__.name)),
        "ours": told.format(ours(), ours("--processes", "2")),
    }
    print(json.dumps({**found, "versions": f"accelerate {accelerate.__version__}"}))
