"""The run folder and the terminal: resolved recipe, group table, metrics, result, the finished model."""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import safetensors.torch
import timm
import torch
import torchvision
from accelerate import Accelerator
from tqdm import tqdm

from finetune.data.loader import Batch, BatchPlan, is_unreadable
from finetune.recipe import Recipe
from finetune.recipe.recipe import METRICS
from finetune.recipe.serialize import flat, to_dict
from finetune.train.run_dir import newest_checkpoint
from finetune.utils.errors import RecipeError

FLUSH_EVERY = 20  # updates between two looks at the losses: each look makes a GPU wait


class Waiting(NamedTuple):
    """An update whose numbers still lie on the device."""

    step: int
    epoch: int
    update: BatchPlan
    share: torch.Tensor  # this process's of the mean loss, and of the images that could not be read [2]
    norm: torch.Tensor
    rates: dict[str, float]


class Logger:
    """What a run writes. Every process has one and calls it alike; the first process alone writes and speaks."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        save_model: Callable[[Path, torch.nn.Module], None],
        score: str = "top1",
        quiet: bool = False,
    ):
        """`save_model(folder, net)` writes a network, for keeping the best by `score`."""
        self.folder, self.accelerator, self.save_model, self.metric = folder, accelerator, save_model, score
        self.quiet = quiet
        self.epochs: list[dict[str, Any]] = []  # a row of scores for each finished epoch
        self.head: dict[str, Any] | None = None  # the scores of the head alone, before the first epoch
        self.clock: list[float] = []  # seconds at which each of these was there
        self.losses: list[float] = []  # of the running epoch's updates
        self.skipped = 0  # images that could not be read in the running epoch
        self.waiting: list[Waiting] = []
        self.best_epoch: int | None = None
        self.seconds, self.images = 0.0, 0

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def begin(self) -> None:
        """Start the metrics file, and the clock."""
        if self.accelerator.is_main_process:
            self.metrics.write_text("")
        self.started = time.monotonic()

    def go_on(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; lines written after it are cut off, for these updates are done again."""
        self.epochs, self.best_epoch = state["epochs"], state["best_epoch"]
        self.head, self.clock = state.get("head"), state.get("clock", [])
        self.seconds, self.images, self.skipped = state["seconds"], state["images"], state["skipped"]
        if self.accelerator.is_main_process:
            os.truncate(self.metrics, state["metrics_bytes"])
        lines = self.metrics.read_text().splitlines() if self.accelerator.is_main_process else []
        rows = [json.loads(line) for line in lines]
        self.losses = [row["loss"] for row in rows if "grad_norm" in row and row["epoch"] == len(self.epochs)]
        self.started = time.monotonic()
        self.say(f"going on after update {state['step']}, {len(self.epochs)} epochs done")

    def state(self) -> dict[str, Any]:
        """What `go_on` needs; asked for after a flush, on the first process."""
        return {
            "epochs": self.epochs,
            "head": self.head,
            "clock": self.clock,
            "best_epoch": self.best_epoch,
            "images": self.images,
            "skipped": self.skipped,
            "seconds": self.elapsed(),
            "metrics_bytes": self.metrics.stat().st_size,
        }

    def elapsed(self) -> float:
        """Seconds of this run so far, those before it broke off among them."""
        return self.seconds + time.monotonic() - self.started

    def progress(
        self, updates: Iterator[tuple[BatchPlan, list[Batch]]], epoch: int, total: int
    ) -> Iterator[tuple[BatchPlan, list[Batch]]]:
        """The updates, with a bar on a terminal."""
        shown = self.accelerator.is_main_process and sys.stderr.isatty() and not self.quiet
        self.bar = tqdm(total=total, desc=f"epoch {epoch}", unit=" updates", leave=False, disable=not shown)
        self.epoch_started, self.epoch_images = time.monotonic(), 0
        with self.bar:
            for update, batches in updates:
                yield update, batches
                self.bar.update()
            self.flush()
        self.epoch_seconds = time.monotonic() - self.epoch_started

    def log_step(
        self,
        step: int,
        epoch: int,
        update: BatchPlan,
        batches: list[Batch],
        loss: torch.Tensor,
        norm: torch.Tensor,
        rates: dict[str, float],
    ) -> None:
        """A line for an update. `loss` is this process's share of the mean loss; it is added up over processes on flushing."""
        missing = update.weight * is_unreadable(torch.cat([labels for _, labels in batches])).sum()
        self.waiting.append(Waiting(step, epoch, update, torch.stack([loss, missing.to(loss)]), norm, rates))
        self.images += update.size
        self.epoch_images += update.size
        if len(self.waiting) >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Fetch the waiting losses in one go and write their lines.

        Raises:
            RecipeError: on all processes, if a loss is no number: what came after it is worth nothing.
        """
        if not self.waiting:
            return
        sums = self.accelerator.reduce(torch.stack([one.share for one in self.waiting]), "sum")
        losses, norms = sums[:, 0].tolist(), torch.stack([one.norm for one in self.waiting]).tolist()
        rows = []
        for one, loss, norm in zip(self.waiting, losses, norms, strict=True):
            rows.append({"step": one.step, "epoch": one.epoch, "loss": loss, "grad_norm": norm, "lr": one.rates})
            if not math.isfinite(loss):
                rates = ", ".join(f"{name} {rate:.2e}" for name, rate in one.rates.items())
                raise RecipeError(
                    f"the loss of update {one.step} (epoch {one.epoch}) is {loss}, at rates {rates}\n"
                    f"  its images, by index: {', '.join(map(str, one.update.images))}\n"
                    f"  lower the rates, or clip_norm. The last good checkpoint is kept in {self.folder}"
                )
        self.losses += losses
        self.skipped += int(sums[:, 1].sum())
        self.write(rows)
        rate = self.epoch_images / (time.monotonic() - self.epoch_started)
        fastest = max(self.waiting[-1].rates.values())
        self.bar.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{fastest:.1e}", images_s=f"{rate:.0f}")
        self.waiting = []

    def log_linear_probe(self, scores: dict[str, Any]) -> None:
        """A line, as of epoch -1, for the head alone: what the epochs after it are to beat."""
        self.head = {"epoch": -1, "step": 0, **scores}
        self.clock.append(self.elapsed())
        self.write([self.head])
        self.say(
            f"the head alone, on features computed once:  validation loss {scores['loss']:.4f}  "
            f"{METRICS[self.metric]} {scores[self.metric]:7.2%}  in {self.clock[0]:.0f} s"
        )

    def log_epoch(self, step: int, epoch: int, scores: dict[str, Any], logits: torch.Tensor, labels: torch.Tensor) -> None:
        """A line for an epoch, in the file and on the terminal; what was scored goes to predictions.safetensors."""
        row = {"epoch": epoch, "step": step, "train_loss": sum(self.losses) / max(1, len(self.losses)), **scores}
        if not math.isfinite(row["loss"]):
            raise RecipeError(
                f"the validation loss after epoch {epoch} is {row['loss']}: lower the rates, or clip_norm. "
                f"The last good checkpoint is kept in {self.folder}"
            )
        if self.skipped:
            row["skipped_images"] = self.skipped
            self.say(f"epoch {epoch}: {self.skipped} training images could not be read and were skipped")
        self.losses, self.skipped = [], 0
        self.epochs.append(row)
        self.clock.append(self.elapsed())
        self.write([row])
        if self.accelerator.is_main_process:
            (self.folder / "predictions.safetensors").write_bytes(safetensors.torch.save({"logits": logits, "labels": labels}))
        self.say(
            f"epoch {epoch:3d}  training loss {row['train_loss']:.4f}  validation loss {row['loss']:.4f}  "
            f"{METRICS[self.metric]} {row[self.metric]:7.2%}  {self.epoch_images / self.epoch_seconds:6.0f} images/s"
        )

    def save_best(self, net: torch.nn.Module) -> None:
        """Write model-best/ if what was just logged has the highest score so far."""
        latest = self.rows()[-1]
        if self.best_epoch is None or latest[self.metric] > self.best()[self.metric]:
            self.best_epoch = latest["epoch"]
            if self.accelerator.is_main_process:
                self.save_model(self.folder / "model-best", net)

    def best(self) -> dict[str, Any]:
        """The row of scores with the highest: an epoch's, or of the head alone."""
        return next(row for row in self.rows() if row["epoch"] == self.best_epoch)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of scores so far, that of the head alone first."""
        return [self.head, *self.epochs] if self.head else self.epochs

    def write(self, rows: list[dict[str, Any]]) -> None:
        if self.accelerator.is_main_process:
            with open(self.metrics, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            self.accelerator.log(*as_scalars(row))

    def say(self, text: str, even_if_quiet: bool = False) -> None:
        if self.accelerator.is_main_process and (even_if_quiet or not self.quiet):
            tqdm.write(text)
            sys.stdout.flush()

    def result(self, seed: int) -> dict[str, Any]:
        """The run in numbers: the last epoch's scores (not the best's: that one was chosen on these very images)."""
        last, best, seconds = self.epochs[-1], self.best(), self.elapsed()
        head = {f"head_{self.metric}": self.head[self.metric]} if self.head else {}
        return {
            **{key: value for key, value in last.items() if key not in ("epoch", "step")},
            "epochs": len(self.epochs),
            "updates": last["step"],
            **head,
            "best_epoch": self.best_epoch,
            f"best_{self.metric}": best[self.metric],
            "seed": seed,
            "seconds": round(seconds, 1),
            "clock": [round(moment, 1) for moment in self.clock],
            "images_per_second": round(self.images / seconds, 1),
            "peak_memory_gib": round(peak_memory(self.accelerator.device), 3),
            **surroundings(self.accelerator),
        }


def peak_memory(device: torch.device) -> float:
    """The most memory ever taken, in GiB: of the GPU on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def surroundings(accelerator: Accelerator) -> dict[str, Any]:
    """Versions and hardware: what a number must be read with."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
            "accelerate": accelerate.__version__,
        },
        "hardware": {
            "device": device.type,
            "name": name,
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
        },
    }


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_scalars(row: dict[str, Any]) -> tuple[dict[str, float], int]:
    """A line of the metrics under the names that a tracker sorts into panels, and its update: an epoch's is its last one."""
    panel, step = ("train", row["step"]) if "grad_norm" in row else ("val", max(row["step"] - 1, 0))
    values = {f"{panel}/{key}": value for key, value in row.items() if isinstance(value, float | int) and key != "step"}
    return values | {f"lr/{name}": rate for name, rate in row.get("lr", {}).items()}, step


def start_trackers(accelerator: Accelerator, folder: Path, recipe: Recipe) -> None:
    """Begin what --track asked for, with the recipe as its configuration.

    A resumed run goes on in the same one, and TensorBoard forgets what was logged after the checkpoint.
    """
    checkpoint = newest_checkpoint(folder)
    step = checkpoint and int(checkpoint.name.split("-")[1])
    config = {
        key: value if isinstance(value, int | float | str | bool) else str(value)
        for key, value in flat(to_dict(recipe)).items()
    }
    accelerator.init_trackers(
        "finetune",
        config,
        init_kwargs={"tensorboard": {"purge_step": step}, "wandb": {"id": folder.name, "resume": "allow", "dir": str(folder)}},
    )
