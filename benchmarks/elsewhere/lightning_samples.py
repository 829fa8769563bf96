"""A shuffled epoch of 64 images in batches of 8, cut off after five, and resumed: is each image trained on once?

Theirs: ModelCheckpoint, trainer.fit(ckpt_path=...), torch's DataLoader. Ours: SIGTERM and resume, against an unbroken run.
"""

import json
import tempfile
from collections import Counter

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from benchmarks.elsewhere.small import Ours, furthest, lightning_net, lightning_trainer, weights_of


def fit(steps: int, folder: str, checkpoint: str | None = None) -> Counter[int]:
    """How often each image was trained on, up to so many steps."""
    net, seen = lightning_net(), Counter[int]()
    (images, labels), step = net.train_dataloader().dataset.tensors, net.training_step

    def training_step(batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        seen.update(batch[1].tolist())
        return step((images[batch[1]], labels[batch[1]]), batch_idx)

    net.training_step = training_step
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    loader = DataLoader(list(zip(images, range(64), strict=True)), batch_size=8, shuffle=True)
    lightning_trainer(callbacks=[keep], max_steps=steps, max_epochs=1).fit(net, loader, ckpt_path=checkpoint)
    return seen


folder = tempfile.mkdtemp()
seen = fit(5, folder) + fit(8, folder, f"{folder}/last.ckpt")
ours = Ours()
whole, resumed = weights_of(ours.run()), weights_of(ours.run(resume=ours.cut_off()))
twice = sum(count > 1 for count in seen.values())
found = {
    "theirs": f"{twice} images twice, {64 - len(seen)} never",
    "ours": f"yes: the weights differ from an unbroken run's by {furthest(whole, resumed):g}",
}
print(json.dumps({**found, "versions": f"lightning {lightning.__version__}"}))
