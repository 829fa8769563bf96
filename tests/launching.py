"""One process and several, started as a person starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import safetensors.torch

from helpers import ROOT

RECIPE = """
from torch import nn

from finetune import AdamW, Cosine, Data, Group, Recipe


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.body, self.fc = nn.Conv2d(3, 8, 3, 2), nn.{norm}, nn.Conv2d(8, 16, 3, 2), nn.Linear(16, 3)

    def forward(self, images):
        return self.fc(self.body(self.norm(self.stem(images)).relu()).relu().mean((2, 3)))


recipe = Recipe(backbone=Net, head="fc", data=Data("IMAGES", image_size=24, batch_size=8),
                groups=(Group("head", "fc", lr=1e-2), Group("body", "body", lr=3e-3, unfreeze_at=1),
                        Group("stem", "stem|norm", lr=1e-3, unfreeze_at=2)),
                optimizer=AdamW(weight_decay=0.05), schedule=Cosine(warmup_epochs=0.5), batch_norm="train", epochs=5)
"""


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


QUIET = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def several(count):
    return [*ACCELERATE, "--multi_gpu", "--num_processes", str(count), *QUIET, "--main_process_port", free_port()]


def command(folder, images, output, launcher, arguments=(), norm="GroupNorm(2, 8)"):
    """The recipe, written to `folder`, as a command line."""
    file = folder / "net.py"
    file.write_text(RECIPE.replace("{norm}", norm).replace("IMAGES", str(images)))
    return [*launcher, str(ROOT / "finetune" / "run.py"), "--recipe", str(file), "--output", str(output), *arguments]


def finish(line):
    """Run a command line; returns what it printed, and fails unless a finished run is in its folder."""
    output = Path(line[line.index("--output") + 1])
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    # Tearing several processes down can abort after everything is written: the result file decides.
    assert (output / "result.json").is_file() and (done.returncode == 0 or "-m" in line), done.stderr[-3000:]
    return done.stdout


def contents(output):
    """A finished run's result, metrics and weights, and with these the labels in the order in which images were scored."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    weights = safetensors.torch.load_file(output / "model" / "model.safetensors")
    weights["scored labels"] = safetensors.torch.load_file(output / "predictions.safetensors")["labels"]
    return json.loads((output / "result.json").read_text()), rows, weights
