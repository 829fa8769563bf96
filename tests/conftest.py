"""What the tests share: small recipes, small networks, small folders of images."""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # processes side by side, spinning, slow each other down tenfold

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from finetune.augment import image_sets
from finetune.backbone import build_backbone, preprocessing
from finetune.batches import seed_all
from finetune.image_data import load_data
from finetune.lr_schedule import Cosine
from finetune.param_groups import split_parameters
from finetune.recipe import AdamW, Data, Group, Recipe
from finetune.run_record import RunRecord
from finetune.train_loop import train
from finetune.weights import pretrained_state

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(2)


class SmallNet(nn.Module):
    """A network without batch statistics, whose layers are told apart by name."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        self.body = nn.Conv2d(8, 16, 3, stride=2)
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(16, 7)

    def forward(self, images):
        features = self.body(self.norm(self.stem(images)).relu()).relu().mean((2, 3))
        return self.fc(self.drop(features))


def small_recipe(**changes) -> Recipe:
    """Three stages of SmallNet on the generated images, in float32."""
    recipe = Recipe(
        backbone=SmallNet,
        head="fc",
        weights="none",
        data=Data("generated", image_size=24, batch_size=8),
        groups=(
            Group("head", "fc", lr=1e-2),
            Group("body", "body", lr=3e-3, unfreeze_at=1),
            Group("stem", "stem|norm", lr=1e-3, unfreeze_at=2),
        ),
        optimizer=AdamW(weight_decay=0.05),
        schedule=Cosine(warmup_epochs=0.5),
        epochs=4,
        norm_stats="eval",
    )
    return dataclasses.replace(recipe, **changes)


def prepare(recipe: Recipe):
    """(network, groups, image sets) as run.py makes them."""
    data = load_data(recipe)
    seed_all(recipe.seed)
    net = build_backbone(recipe, len(data.classes), pretrained_state(recipe))
    return net, split_parameters(recipe, net), image_sets(recipe, data, preprocessing(recipe, net))


def run_here(
    recipe: Recipe,
    folder: Path,
    accumulate: int = 1,
    workers: int = 0,
    save_model=lambda path, net: None,
    checkpoint_every: int = 0,
    accelerator: Accelerator | None = None,
):
    """train() in this process; returns the network and the metrics' rows."""
    folder.mkdir(parents=True, exist_ok=True)
    net, _, images = prepare(recipe)
    accelerator = accelerator or Accelerator(cpu=True, mixed_precision=recipe.mixed_precision)
    net = train(
        recipe,
        net,
        images,
        RunRecord(folder, accelerator, save_model, recipe.score),
        accelerator,
        accumulate,
        workers,
        checkpoint_every,
    )
    return net, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state in the process; each test starts without."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """train/ and val/ with 3 classes of 10 and 5 photographs that can be told apart by their colour."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 10), ("val", 5)):
        for label, name in enumerate(("blue", "green", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.RandomState(100 * label + i + count).randint(0, 128, (40, 48, 3))
                pixels[..., 2 - label] += 127
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def command():
    """The interpreter and the script, as a person starts them."""
    return [sys.executable, str(ROOT / "finetune" / "run.py")]
