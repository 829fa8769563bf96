"""One run of one peer, in a process of its own: `python -m benchmarks.peers_runs JOB`, as benchmarks/peers.py starts it.

Each function fine-tunes by one tool's documented way, with its own defaults and augmentation. The network, the weights, the
mean and deviation they want, the image size, the epochs and the seed are given.
"""

import importlib
import inspect
import json
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
from sklearn.metrics import f1_score
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

from finetune.models.backbone import build_backbone
from finetune.models.pretrained import preprocessing, pretrained_state
from finetune.recipe import AdamW, Constant, Data, LayerDecay, Recipe
from finetune.recipe.load import load_recipe
from finetune.utils.device import peak_memory

SAME = ("data", "per_class", "size", "epochs", "peer", "seed", "factor", "held_out")  # tells a run from others
HEAVY = {"transformers": "transformers.trainer", "fastai": "fastai.vision.all", "lightning": "lightning"}


# https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html, "Finetuning the ConvNet"; the last epoch, not the
# one that is best on the validation images
def tutorial(job, clock, batch_size=4):
    transform = Compose([RandomResizedCrop(job.size), RandomHorizontalFlip(), ToTensor(), Normalize(job.mean, job.std)])
    loader = DataLoader(ImageFolder(job.train, transform), batch_size, shuffle=True)
    net = job.network()
    optimizer = torch.optim.SGD(net.parameters(), lr=job.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    clock.start()
    for _ in range(job.epochs):
        net.train()
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()
            optimizer.step()
        scheduler.step()
        clock.validate(net)


# examples/pytorch/image-classification/run_image_classification.py: its transforms, TrainingArguments' defaults
def transformers(job, clock):
    from transformers import Trainer, TrainingArguments

    transform = Compose([RandomResizedCrop(job.size), RandomHorizontalFlip(), ToTensor(), Normalize(job.mean, job.std)])

    def collate(examples):
        return {"pixel_values": torch.stack([image for image, _ in examples]), "labels": torch.tensor([y for _, y in examples])}

    args = TrainingArguments(
        job.scratch,
        num_train_epochs=job.epochs,
        learning_rate=job.lr,
        seed=job.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
    )
    images = ImageFolder(job.train, transform)
    trainer = Trainer(job.network_with_loss(), args, collate, images, callbacks=[clock.transformers()])
    clock.start()
    trainer.train()


# https://docs.fast.ai/tutorial.vision.html: from_folder, Resize, aug_transforms, vision_learner, fine_tune with their defaults
def fastai(job, clock):
    from fastai.vision.all import ImageDataLoaders, Resize, aug_transforms, vision_learner

    dls = ImageDataLoaders.from_folder(
        job.folder, valid="val", item_tfms=Resize(job.size), batch_tfms=aug_transforms(), bs=64, num_workers=0
    )
    learn = vision_learner(dls, job.architecture, pretrained_cfg_overlay={"file": job.weights}, cbs=clock.fastai())
    clock.start()
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(job.epochs - 1, base_lr=job.lr, freeze_epochs=1)


# lightning.pytorch.callbacks.BackboneFinetuning; its base class: "Make sure to filter the parameters based on requires_grad"
def lightning(job, clock):
    import lightning as L
    from lightning.pytorch.callbacks import BackboneFinetuning

    class Classifier(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = job.network()
            self.head = self.backbone.get_classifier()
            self.backbone.reset_classifier(0)

        def forward(self, images):
            return self.head(self.backbone(images))

        def training_step(self, batch, _):
            return cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=job.lr)

    transform = Compose([RandomResizedCrop(job.size), RandomHorizontalFlip(), ToTensor(), Normalize(job.mean, job.std)])
    loader = DataLoader(ImageFolder(job.train, transform), 32, shuffle=True)
    trainer = L.Trainer(
        max_epochs=job.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BackboneFinetuning(1), clock.lightning()],
    )
    net = Classifier()
    clock.start()
    trainer.fit(net, loader)


# timm's train.py: its smoothing, and the schedule stepped once an epoch; no warmup, as create_scheduler_v2 has it (the script's
# own 5 epochs of it would be longer than the run)
def timm_script(job, clock, frozen_norms=False):
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils.model import freeze_batch_norm_2d

    transform = timm.data.create_transform(job.size, is_training=True, mean=job.mean, std=job.std)
    loader = DataLoader(ImageFolder(job.train, transform), 32, shuffle=True)
    net, loss = job.network(), LabelSmoothingCrossEntropy(0.1)
    optimizer = create_optimizer_v2(net, opt="adamw", lr=job.lr, weight_decay=0.05, layer_decay=0.75)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=job.epochs)
    clock.start()
    if frozen_norms:
        net = freeze_batch_norm_2d(net)
    for epoch in range(job.epochs):
        net.train()
        for images, labels in loader:
            optimizer.zero_grad()
            loss(net(images), labels).backward()
            optimizer.step()
        scheduler.step(epoch + 1)
        clock.validate(net)


def ours(job, clock):
    """The command; what counts as its lines are those of the recipe."""
    from finetune.run import main

    recipe, file = load_recipe(job.recipe)
    table = recipe.groups
    peak = table.head_lr if isinstance(table, LayerDecay) else max(group.lr for group in table)
    changes = {"epochs": job.epochs, "data.image_size": job.size, "lr_scale": job.factor}
    out = Path(job.scratch) / "run"
    if main(
        [
            "--recipe",
            job.recipe,
            "--data",
            job.folder,
            "--output",
            str(out),
            "--seed",
            str(job.seed),
            "--quiet",
            *(word for name, value in changes.items() for word in ("--set", f"{name}={value!r}")),
        ]
    ):
        sys.exit("ours: the run failed")
    epochs = [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "top1" in row]
    moments = json.loads((out / "result.json").read_text())["clock"]  # one for each row of metrics
    clock.curve = [[moment, row["top1"]] for row, moment in zip(epochs, moments, strict=True)]
    clock.macro_f1 = epochs[-1]["macro_f1"]
    job.lr, clock.lines = peak * job.factor, code_lines(file.read_text())


def ours_memory_returned(job, clock):
    """The same, with memory as the C library has it by default: what is freed goes back to the system at once."""
    from finetune.training import setup

    setup.keep_freed_memory = lambda: None
    ours(job, clock)


PEERS = {
    "tutorial": (tutorial, 1e-3),
    "tutorial_batch32": (partial(tutorial, batch_size=32), 1e-3),
    "transformers": (transformers, 5e-5),
    "fastai": (fastai, 2e-3),
    "lightning": (lightning, 1e-3),
    "timm": (timm_script, 1e-3),
    "timm_frozen_norms": (partial(timm_script, frozen_norms=True), 1e-3),
    "ours": (ours, 0),
    "ours_memory_returned": (ours_memory_returned, 0),
}  # and the default learning rate


class Clock:
    """Seconds of training, and top-1 after each epoch, whose own time does not count."""

    def __init__(self, images: list, transform, lines: int):
        self.images, self.transform, self.lines, self.curve, self.validating = images, transform, lines, [], 0.0

    def start(self) -> None:
        self.started = time.perf_counter()

    @torch.no_grad()
    def validate(self, net: nn.Module, then: type[Exception] | None = None) -> None:
        """A point of the curve; `then` is raised: fastai's way to leave out its own validation."""
        began = time.perf_counter()
        training = [module for module in net.modules() if module.training]
        net.eval()
        labels, predicted = [], []
        for i in range(0, len(self.images), 32):
            images, batch = zip(*(self.images[j] for j in range(i, min(i + 32, len(self.images)))), strict=True)
            predicted += net(torch.stack(list(map(self.transform, images)))).argmax(1).tolist()
            labels += batch
        for module in training:
            module.training = True
        self.curve.append([began - self.started - self.validating, np.mean(np.equal(predicted, labels))])
        self.macro_f1 = f1_score(labels, predicted, average="macro", zero_division=0)
        self.validating += time.perf_counter() - began
        if then:
            raise then

    def transformers(self):
        from transformers import TrainerCallback

        return type("Validate", (TrainerCallback,), {"on_epoch_end": lambda *args, model, **more: self.validate(model.net)})()

    def lightning(self):
        from lightning import Callback

        return type("Validate", (Callback,), {"on_train_epoch_end": lambda _, trainer, module: self.validate(module)})()

    def fastai(self):
        from fastai.learner import Callback, CancelValidException

        return type("Validate", (Callback,), {"before_validate": lambda now: self.validate(now.model, CancelValidException)})()


class WithLoss(nn.Module):
    """A network as transformers' Trainer calls one."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, pixel_values, labels):
        logits = self.net(pixel_values)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def code_lines(source: str) -> int:
    """Lines of a recipe or a peer's function, without blank ones, the docstring and the clock's."""
    lines = [line.strip() for line in source.split('"""')[-1].splitlines()]
    return sum(bool(line) and not line.startswith("clock.") for line in lines)


def start(images: str, size: int, backbone: str, weights: str) -> Recipe:
    """What all share: the network, its weights, the images and their size."""
    return Recipe(
        backbone=backbone,
        weights=weights,
        epochs=1,
        data=Data(images, size, 32, crop_pct=1.0),
        groups=LayerDecay(head_lr=1e-3, stem_ratio=0.1),
        optimizer=AdamW(),
        schedule=Constant(),
        batch_norm="train",
    )


def work(job: dict) -> dict:
    """One run, in this process."""
    peer, lr = PEERS[job["peer"]]
    importlib.import_module(HEAVY.get(job["peer"], "torch"))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(job["seed"])
    folder, recipe = Path(job["folder"]), start(job["folder"], job["size"], job["backbone"], job["weights"])
    state = pretrained_state(recipe)
    images, inputs = ImageFolder(folder / "val"), preprocessing(recipe, build_backbone(recipe, 2))

    def network():  # with its weights laid out as timm.create_model leaves them
        return build_backbone(recipe, len(images.classes), state).to(memory_format=torch.contiguous_format)

    with tempfile.TemporaryDirectory() as scratch:
        weights = f"{scratch}/weights.pth"
        torch.save(state, weights)
        job |= {"lr": lr * job["factor"], "weights": weights}
        given = SimpleNamespace(
            **job,
            train=str(folder / "train"),
            mean=inputs["mean"],
            std=inputs["std"],
            network=network,
            network_with_loss=lambda: WithLoss(network()),
            architecture=recipe.backbone,
            scratch=scratch,
        )
        clock = Clock(images, timm.data.create_transform(**inputs), code_lines(inspect.getsource(getattr(peer, "func", peer))))
        peer(given, clock)
    curve = [[round(moment, 2), round(top1, 5)] for moment, top1 in clock.curve]
    seconds, top1 = curve[-1]
    trained = len(ImageFolder(folder / "train"))
    return {
        **{key: job[key] for key in (*SAME, "tuned")},
        "lr": given.lr,
        "top1": top1,
        "macro_f1": round(clock.macro_f1, 5),
        "seconds": seconds,
        "images_per_second": round(trained * job["epochs"] / seconds, 2),
        "lines": clock.lines,
        "peak_memory_gib": round(peak_memory(torch.device("cpu")), 3),
        "train_images": trained,
        "val_images": len(images),
        "curve": curve,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(work(json.loads(sys.argv[1]))))
