"""What the tests share: small recipes, small networks, small folders of images."""

import dataclasses
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # processes side by side, spinning, slow each other down tenfold

import numpy as np
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.data.batches import plan_epoch
from finetune.data.loader import load
from finetune.data.sources import load_data
from finetune.inference.inputs import find_inputs
from finetune.inference.predict import predict_images
from finetune.models.backbone import build_backbone
from finetune.models.pretrained import pretrained_state
from finetune.models.saved import load_model
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import SGD, AdamW, Constant, Cosine, Data, Group, Recipe
from finetune.training import loop as train_loop
from finetune.training.logger import Logger
from finetune.training.loop import train
from finetune.training.setup import RunOptions, build_datasets
from finetune.utils.seed import seed_all

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
        batch_norm="frozen",
    )
    return dataclasses.replace(recipe, **changes)


def prepare(recipe: Recipe):
    """(network, groups, datasets) as run.py makes them."""
    data = load_data(recipe)
    seed_all(recipe.seed)
    net = build_backbone(recipe, len(data.classes), pretrained_state(recipe))
    return net, build_param_groups(recipe, net), build_datasets(recipe, net, data)


def run_here(recipe: Recipe, folder: Path, accelerator: Accelerator | None = None, **options):
    """train() in this process; returns the network and the metrics' rows."""
    folder.mkdir(parents=True, exist_ok=True)
    net, _, datasets = prepare(recipe)
    accelerator = accelerator or Accelerator(cpu=True, mixed_precision=recipe.mixed_precision)
    net = train(recipe, net, datasets, Logger(folder, accelerator, recipe), accelerator, RunOptions(**options))
    return net, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


ALL = (Group("all", ".", lr=1e-2),)


class DroppingNet(SmallNet):
    """With dropout and batch norm: random numbers and running statistics must go on, too."""

    def __init__(self):
        super().__init__()
        self.drop.p = 0.5
        self.norm = nn.BatchNorm2d(8)


class Cut(Exception):
    pass


def cut_before(monkeypatch, function, call):
    """Let train() die as it calls one of its functions for the call-th time."""
    real, calls = getattr(train_loop, function), []

    def cutting(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise Cut
        return real(*args, **options)

    monkeypatch.setattr(train_loop, function, cutting)


def cut_at(real, call):
    """The function, which dies as it is called after `call` calls."""
    calls = []

    def cutting(*args, **options):
        calls.append(1)
        if len(calls) > call:
            raise Cut
        return real(*args, **options)

    return cutting


def scaling_accelerator():
    """An Accelerator that scales losses as for fp16, by so much that the first gradients overflow.

    Accelerate gives a CPU neither scaler nor fp16, so torch's own for the CPU are put in.
    """
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.autocast = lambda: torch.autocast("cpu", torch.float16)
    return accelerator


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def plain(**changes):
    """Two epochs of SGD at one rate, everything trained, nothing clipped."""
    return small_recipe(
        **{"groups": ALL, "optimizer": SGD(momentum=0.9), "schedule": Constant(), "epochs": 2, "clip_norm": None, **changes}
    )


def bare_loop(recipe, loss_of, clip_gradients=lambda parameters: None):
    """(network, its weights after each step) of a bare SGD loop over the recipe's batches."""
    net, _, images = prepare(recipe)
    optimizer, trail = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9), []
    for epoch in range(recipe.epochs):
        for plan in plan_epoch(22, 8, recipe.seed, epoch):
            ((batch, labels),) = load(images[0], epoch, plan.micro_batches, 0)
            optimizer.zero_grad()
            loss_of(net, net(batch), labels).backward()
            clip_gradients(net.parameters())
            optimizer.step()
            trail.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    return net, trail


def mean_loss(net, logits, labels):
    return cross_entropy(logits, labels)


def assert_same_weights(net, reference, tolerance=1e-6):
    for name, tensor in reference.items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=0, atol=tolerance)


class Coloured:
    """Images of one colour for each label."""

    def __init__(self, labels, classes=("dark", "light")):
        self.targets, self.classes = labels, list(classes)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError
        label = self.targets[index]
        level = 60 + 40 * sum((i + 1) * int(bit) for i, bit in enumerate(np.atleast_1d(label)))
        return Image.new("RGB", (20, 20), (level, level // 2, 255 - level)), label


PREPROCESSING = {
    "input_size": (3, 32, 32),
    "interpolation": "bilinear",
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def on_folder(images, output, *fields):
    """The arguments of a run of resnet18_cifar on a folder of images, small and from random weights."""
    small = ("data.image_size=32", "data.batch_size=8", "mixed_precision=no", "epochs=4")
    words = [word for field in (*small, *fields) for word in ("--set", field)]
    return ["--recipe", "resnet18_cifar", "--data", str(images), "--weights", "none", "--output", str(output), *words]


def timm_alone(folder, files):
    """The logits that timm gives of images, with the network and the preprocessing that it finds in a folder."""
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    with torch.no_grad():
        return net(torch.stack([transform(Image.open(file).convert("RGB")) for file in files]))


# Largest difference of logits where libraries round a resized pixel to one side or the other (torch 2.6 against PIL:
# 0.011 on the run of `run_folder`); the least mistake in preprocessing, bicubic for bilinear, makes 0.098 there.
PIXEL_ROUNDING = 2e-2

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


def predict(source, paths, top=5):
    """The rows of a model's predictions for images, folders and globs."""
    return predict_images(load_model(source), find_inputs(paths), top)


def seeded(name, size, **options):
    """A timm network of 5 classes with random weights, none of them 0, in eval mode."""
    torch.manual_seed(0)
    sized = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    net = timm.create_model(name, num_classes=5, **sized | options).eval()
    for layer in net.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():  # heads and gates that timm starts at 0
            nn.init.normal_(layer.weight, std=0.02)
    return net


def noise(n, size, seed=0):
    """Images [n, 3, size, size]."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def likeliest(net, images):
    """The class that a network gives the largest logit, of each image."""
    with torch.no_grad():
        return net(images).argmax(1)
