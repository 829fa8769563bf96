"""A run that unfreezes its backbone in the second epoch, cut off after the third, and resumed: do its convolutions train?

Theirs: BackboneFinetuning, and trainer.fit(ckpt_path=...). Ours: --resume, against an unbroken run.
"""

import json
import tempfile
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import BackboneFinetuning

from benchmarks.elsewhere.small import Ours, furthest, lightning_net, lightning_trainer, weights_of


def fit(epochs: int, checkpoint: Path | None = None) -> lightning.Trainer:
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer = lightning_trainer(callbacks=[callback], max_epochs=epochs, enable_checkpointing=False)
    trainer.fit(lightning_net(), ckpt_path=checkpoint, **({"weights_only": False} if checkpoint else {}))
    return trainer


first, file = fit(3), Path(tempfile.mkdtemp()) / "third.ckpt"
first.save_checkpoint(file)
resumed = fit(5, file)
before = {name: value for name, value in first.model.backbone.state_dict().items() if ".conv" in name}
after = resumed.model.backbone.state_dict()

ours = Ours(epochs=5)
cut = ours.run("--epochs", "3")
whole, resumed_run = weights_of(ours.run()), weights_of(ours.run("--epochs", "5", resume=cut))
found = {
    "theirs": f"in the two epochs after, its convolutions move by {furthest(before, after):g}",
    "ours": f"they train: all weights differ from an unbroken run's by {furthest(whole, resumed_run):g}",
}
print(json.dumps({**found, "versions": f"lightning {lightning.__version__}"}))
