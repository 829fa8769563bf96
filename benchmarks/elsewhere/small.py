"""The small network and images of all claims, for Lightning and for this project."""

import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

RECIPE = """
from finetune import SGD, Constant, Data, Group, Plateau, Recipe

recipe = Recipe(
    backbone="test_resnet",
    weights={weights!r},
    data=Data("digits", image_size=32, batch_size=128),
    groups=(Group("head", "fc", lr=1e-2), Group("rest", ".", lr={lr}, unfreeze_at={unfreeze_at})),
    optimizer=SGD(momentum=0.9),
    schedule={schedule},
    batch_norm="frozen",
    epochs={epochs},
)
"""
FIELDS = {"weights": "none", "lr": 1e-2, "unfreeze_at": 1, "schedule": "Constant()", "epochs": 2}


class Ours:
    """Runs of the small recipe, by the command line, each in a folder of its own."""

    def __init__(self, **fields: Any):
        self.folder = Path(tempfile.mkdtemp())
        self.recipe = self.folder / "small.py"
        self.recipe.write_text(RECIPE.format(**FIELDS | fields))

    def run(self, *options: str, resume: Path | None = None) -> Path:
        """The folder of a finished run with these options."""
        run = resume or self.folder / f"run{len(list(self.folder.iterdir()))}"
        start = ["resume", str(run)] if resume else ["train", str(self.recipe), "--output", str(run)]
        command = [sys.executable, "-m", "finetune", *start, "--quiet", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return run

    def cut_off(self) -> Path:
        """The folder of a run that SIGTERM ended in mid-epoch."""
        run = self.folder / "cut"
        command = [sys.executable, "-m", "finetune", "train", str(self.recipe), "--output", str(run), "--checkpoint-every", "1"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not [*run.glob("checkpoints/step-*")] and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        if process.wait() != 75:
            raise RuntimeError("the run was not cut off")
        return run


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "model" / "model.safetensors")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between numbers of the same name."""
    return max((value.double() - other[name].double()).abs().max().item() for name, value in one.items())


def on_two_processes(module: str) -> str:
    """What a script of this folder prints last when torch's launcher starts it twice."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", module]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return printed.splitlines()[-1]


def lightning_trainer(**options: Any) -> Any:
    """A Lightning trainer on the CPU that draws and logs nothing."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(**quiet | options)


def lightning_net() -> Any:
    """A network of a backbone and a head, as Lightning's BackboneFinetuning wants it."""
    import lightning

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = timm.create_model("test_resnet", num_classes=0)
            self.head = nn.Linear(self.backbone.num_features, 10)

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            images, labels = batch
            return nn.functional.cross_entropy(self.head(self.backbone(images)), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([param for param in self.parameters() if param.requires_grad], lr=1e-2, momentum=0.9)

        def train_dataloader(self) -> DataLoader:
            torch.manual_seed(1)
            return DataLoader(TensorDataset(torch.randn(64, 3, 32, 32), torch.arange(64) % 10), batch_size=8)

    return Net()
