"""Do batch-norm statistics and weights stand still in a backbone that is frozen?

Theirs: BackboneFinetuning(train_bn=False), in the epochs before it unfreezes. Ours: the group of lr=0, batch_norm="frozen".
"""

import json
import tempfile
from pathlib import Path

import lightning
import safetensors.torch
import timm
from lightning.pytorch.callbacks import BackboneFinetuning

from benchmarks.elsewhere.small import Ours, furthest, lightning_net, lightning_trainer, weights_of

net = lightning_net()
before = {name: value.clone() for name, value in net.backbone.state_dict().items()}
callback = BackboneFinetuning(unfreeze_backbone_at_epoch=9, train_bn=False)
lightning_trainer(callbacks=[callback], max_epochs=1, enable_checkpointing=False).fit(net)
after = net.backbone.state_dict()


def moved(kind: str) -> float:
    return furthest({name: value for name, value in before.items() if kind in name}, after)


file = Path(tempfile.mkdtemp()) / "start.safetensors"
start = timm.create_model("test_resnet", num_classes=10).state_dict()
safetensors.torch.save_file(start, file)
run = Ours(weights=str(file), lr=0, unfreeze_at=0).run()
trained = {name: value for name, value in weights_of(run).items() if not name.startswith("fc.")}
found = {
    "theirs": f"means move by up to {moved('running_mean'):.2f}, convolutions by {moved('.conv'):g}",
    "ours": f"nothing of the backbone moves: by {furthest(trained, start):g}",
}
print(json.dumps({**found, "versions": f"lightning {lightning.__version__}"}))
