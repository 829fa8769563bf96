"""The log of a run: metrics.jsonl, the terminal with its progress bar, trackers."""

import json
import math
import operator
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from accelerate import Accelerator
from tqdm import tqdm

from finetune.data.batches import BatchPlan
from finetune.data.loader import Batch, is_unreadable
from finetune.metrics.compute import best_row
from finetune.recipe import Recipe
from finetune.recipe.data import in_pixels
from finetune.recipe.metrics import METRICS, write_value
from finetune.recipe.serialize import flatten, to_dict
from finetune.training.run_dir import newest_checkpoint
from finetune.utils.errors import RecipeError
from finetune.utils.text import colour, duration, progress

SHORT = {"mean_average_precision": "mAP", "balanced_accuracy": "balanced"}  # names for a column
FLUSH_EVERY = 20  # steps between two looks at the losses: each look makes a GPU wait


class PendingStep(NamedTuple):
    """A step whose numbers still lie on the device."""

    plan: BatchPlan
    epoch: int
    sums: torch.Tensor  # this process's share of the mean loss, and of the images that could not be read [2]
    norm: torch.Tensor
    lrs: dict[str, float]


class Logger:
    """The log of a run. Every process has one and calls it alike; the first process alone writes and prints.

    Epochs and steps count from 0 in files and from 1 in what is printed.

    `history` has the metrics of each finished epoch, `linear_probe` those from before the first.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, recipe: Recipe, quiet: bool = False):
        self.folder, self.accelerator, self.quiet = folder, accelerator, quiet
        self.metric, self.epochs, self.sides_in = recipe.metric, recipe.epochs, recipe.sides_in
        self.sides = None if recipe.data.start_size else recipe.data.sides  # of images, as it was said last
        self.headed = False  # whether the columns of the epochs' lines have been named
        self.history: list[dict[str, Any]] = []
        self.linear_probe: dict[str, Any] | None = None
        self.clock: list[float] = []  # seconds at which each of these was reached
        self.losses: list[float] = []  # of the running epoch's steps
        self.sizes: list[int] = []  # the images of each of them
        self.skipped = 0  # images that could not be read in the running epoch
        self.overflowed = 0  # steps of the running epoch that the scaler of fp16 left out
        self.pending: list[PendingStep] = []
        self.seconds, self.images = 0.0, 0

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def predictions_file(self) -> Path:
        return self.folder / "predictions.safetensors"

    def start(self) -> None:
        """Start the metrics file, and the clock."""
        if self.accelerator.is_main_process:
            self.metrics_file.write_text("")
        self.started = time.monotonic()

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; lines written after it are cut off, for these steps are done again.

        Raises:
            RecipeError: if more epochs are done than the recipe has.
        """
        self.history, self.linear_probe, self.clock = state["history"], state["linear_probe"], state["clock"]
        self.seconds, self.images, self.skipped = state["seconds"], state["images"], state["skipped"]
        self.overflowed = state.get("overflowed", 0)
        if len(self.history) > self.epochs:
            raise RecipeError(f"{len(self.history)} epochs of the run in {self.folder} are done, and epochs={self.epochs}")
        if self.accelerator.is_main_process:
            rows = self.restored_rows(state["metrics_bytes"])
            running = [row["loss"] for row in rows if "grad_norm" in row and row["epoch"] == len(self.history)]
            self.losses = state.get("losses", running)  # older checkpoints leave them to the file
            self.sizes = state.get("sizes", [1] * len(self.losses))
        self.started = time.monotonic()
        done = len(self.history)
        self.say(f"resuming after step {state['step']}, {done} epoch{'s' * (done != 1)} done")

    def restored_rows(self, size: int) -> list[dict[str, Any]]:
        """The lines of the metrics file up to a checkpoint, its first `size` bytes, to which it is cut.

        Where some are missing, which a power failure can do, the metrics of epochs are written again.
        """
        content = self.metrics_file.read_bytes() if self.metrics_file.is_file() else b""
        lines, rows = content[:size].splitlines(keepends=True), []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        whole = b"".join(lines[: len(rows)])
        if len(whole) == size:
            os.truncate(self.metrics_file, size)
            return rows
        written = {row["epoch"] for row in rows if "grad_norm" not in row}
        rows += [row for row in self.rows() if row["epoch"] not in written]
        self.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.say("metrics.jsonl had been cut: the epochs' metrics are whole again, lines of single steps are missing")
        return rows

    def state(self) -> dict[str, Any]:
        """What `resume` needs; asked for after a flush, on the first process."""
        return {
            "history": self.history,
            "linear_probe": self.linear_probe,
            "clock": self.clock,
            "losses": self.losses,
            "sizes": self.sizes,
            "images": self.images,
            "skipped": self.skipped,
            "overflowed": self.overflowed,
            "seconds": self.elapsed(),
            "metrics_bytes": self.metrics_file.stat().st_size,
        }

    def elapsed(self) -> float:
        """Seconds of this run so far, those before it was cut off included."""
        return self.seconds + time.monotonic() - self.started

    def rows(self) -> list[dict[str, Any]]:
        """The metrics so far, the linear probe's first."""
        return [self.linear_probe, *self.history] if self.linear_probe else self.history

    def progress(self, batches: Iterator[Batch], epoch: int, total: int) -> Iterator[Batch]:
        """The batches, with a bar; the size of their images is said where it is another than before."""
        if (sides := self.sides_in(epoch)) != self.sides:
            self.say(f"from epoch {epoch + 1}: images of {in_pixels(sides)} px")
            self.sides = sides
        shown = self.accelerator.is_main_process and not self.quiet
        self.bar = progress(batches, total, f"epoch {epoch + 1} of {self.epochs}", shown)
        self.epoch_started, self.epoch_images = time.monotonic(), 0
        with self.bar:
            yield from self.bar
            self.flush()
        self.epoch_seconds = time.monotonic() - self.epoch_started

    def log_step(self, batch: Batch, epoch: int, loss: torch.Tensor, norm: torch.Tensor, lrs: dict[str, float]) -> None:
        """A line for a step. `loss` is this process's share of the mean loss; it is added up over processes on flushing."""
        missing = batch.plan.weight * is_unreadable(torch.cat([labels for _, labels in batch.micro_batches])).sum()
        self.pending.append(PendingStep(batch.plan, epoch, torch.stack([loss, missing.to(loss)]), norm, lrs))
        self.images += batch.plan.size
        self.epoch_images += batch.plan.size
        if len(self.pending) >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Fetch the pending losses in one go and write their lines.

        Raises:
            RecipeError: on all processes, if a loss or a gradient is not finite: what came after it is worth nothing.
        """
        if not self.pending:
            return
        sums = self.accelerator.reduce(torch.stack([one.sums for one in self.pending]), "sum")
        losses, norms = sums[:, 0].tolist(), torch.stack([one.norm for one in self.pending]).tolist()
        rows = []
        for one, loss, norm in zip(self.pending, losses, norms, strict=True):
            rows.append({"step": one.plan.step, "epoch": one.epoch, "loss": loss, "grad_norm": norm, "lr": one.lrs})
            finite = math.isfinite(norm) or self.accelerator.scaler  # which leaves out a step whose gradient overflows
            if not math.isfinite(loss) or not finite:
                lrs = ", ".join(f"{name} {lr:.2e}" for name, lr in one.lrs.items())
                raise RecipeError(
                    f"the loss of step {one.plan.step + 1} (epoch {one.epoch + 1}) is {loss:.4g}, the norm of its gradient "
                    f"{norm:.4g}, at learning rates {lrs}\n"
                    f"  its images, by index (0 is line 2 of images.csv): {', '.join(map(str, one.plan.images))}\n"
                    f"  look at these images, or lower the learning rates, or clip_norm. {self.kept()}"
                )
        self.losses += losses
        self.sizes += [one.plan.size for one in self.pending]
        self.skipped += int(sums[:, 1].sum())
        self.overflowed += sum(not math.isfinite(norm) for norm in norms)
        self.write(rows)
        images_per_second = self.epoch_images / (time.monotonic() - self.epoch_started)
        self.bar.set_postfix_str(f"loss {losses[-1]:.3f}, {images_per_second:.0f} images/s", refresh=False)
        self.pending = []

    def kept(self) -> str:
        """The checkpoint that an error leaves behind, in words."""
        checkpoint = newest_checkpoint(self.folder)
        return f"The last good checkpoint is kept: {checkpoint}" if checkpoint else "There is no checkpoint yet"

    def log_linear_probe(self, metrics: dict[str, Any]) -> None:
        """A line, as of epoch -1, for the linear probe: what the epochs after it are to beat."""
        if not math.isfinite(metrics["loss"]):
            raise RecipeError(
                f"the validation loss of the linear probe is {metrics['loss']}: look at the weights and the images"
            )
        self.linear_probe = {"epoch": -1, "step": 0, **metrics}
        self.clock.append(self.elapsed())
        self.write([self.linear_probe])
        self.say_row("linear probe", "", self.linear_probe, "")

    def log_epoch(self, step: int, epoch: int, metrics: dict[str, Any], logits: torch.Tensor, labels: torch.Tensor) -> None:
        """A line for an epoch, in the file and on the terminal; logits and labels go to predictions.safetensors."""
        train_loss = sum(map(operator.mul, self.losses, self.sizes)) / max(1, sum(self.sizes))
        row = {"epoch": epoch, "step": step, "train_loss": train_loss, **metrics}
        if not math.isfinite(row["loss"]):
            what = f"the validation loss after epoch {epoch + 1} is {row['loss']}"
            raise RecipeError(f"{what}: lower the learning rates, or clip_norm. {self.kept()}")
        if self.skipped:
            row["skipped_images"] = self.skipped
            self.say(f"epoch {epoch + 1}: {self.skipped} training images could not be read and were skipped")
        if self.overflowed:
            row["skipped_steps"] = self.overflowed
            which = f"{self.overflowed} of {len(self.losses)} steps were left out: in fp16 their gradients are not finite"
            self.say(f"epoch {epoch + 1}: {which}")
        self.losses, self.sizes, self.skipped, self.overflowed = [], [], 0, 0
        self.history.append(row)
        self.clock.append(self.elapsed())
        self.write([row])
        if self.accelerator.is_main_process:
            self.predictions_file.write_bytes(safetensors.torch.save({"logits": logits, "labels": labels}))
        started = self.clock[0] if self.linear_probe else 0.0
        left = (self.clock[-1] - started) / len(self.history) * (self.epochs - len(self.history))
        self.say_row(f"epoch {epoch + 1} of {self.epochs}", f"{row['train_loss']:.4f}", row, duration(left))

    def say_row(self, label: str, train_loss: str, row: dict[str, Any], left: str) -> None:
        """An epoch's line, under the names of its columns: up to 1000 epochs fit 80 columns."""
        metric = SHORT.get(self.metric, METRICS[self.metric])
        now, best = (write_value(self.metric, one[self.metric]) for one in (row, best_row(self.rows(), self.metric)))
        cells = (label, train_loss, f"{row['loss']:.4f}", now, best, left)
        heads = ("", "training loss", "validation loss", metric, "best", "time left")
        for line in (cells,) if self.headed else (heads, cells):
            first = f"{line[0]:<{max(12, 10 + 2 * len(str(self.epochs)))}}"
            rest = [f"{cell:>{max(7, len(head))}}" for cell, head in zip(line[1:], heads[1:], strict=True)]
            if line[3] == line[4]:  # the best so far
                rest[2] = colour(rest[2], "bold")
            self.say("  ".join([first, *rest]).rstrip())
        self.headed = True

    def write(self, rows: list[dict[str, Any]]) -> None:
        if self.accelerator.is_main_process:
            with open(self.metrics_file, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            self.accelerator.log(*as_scalars(row))

    def say(self, text: str, even_if_quiet: bool = False) -> None:
        if self.accelerator.is_main_process and (even_if_quiet or not self.quiet):
            tqdm.write(text)
            sys.stdout.flush()


def as_scalars(row: dict[str, Any]) -> tuple[dict[str, float], int]:
    """A line of the metrics under the names that a tracker sorts into panels, and its step: an epoch's is its last one."""
    panel, step = ("train", row["step"]) if "grad_norm" in row else ("val", max(row["step"] - 1, 0))
    values = {f"{panel}/{key}": value for key, value in row.items() if isinstance(value, float | int) and key != "step"}
    return values | {f"lr/{name}": lr for name, lr in row.get("lr", {}).items()}, step


def start_trackers(accelerator: Accelerator, folder: Path, recipe: Recipe) -> None:
    """Start what --track asked for, with the recipe as its configuration.

    A resumed run goes on in the same one, and TensorBoard forgets what was logged after the checkpoint.
    """
    checkpoint = newest_checkpoint(folder)
    step = checkpoint and int(checkpoint.name.split("-")[1])
    config = {
        key: value if isinstance(value, int | float | str | bool) else str(value)
        for key, value in flatten(to_dict(recipe)).items()
    }
    accelerator.init_trackers(
        "finetune",
        config,
        init_kwargs={"tensorboard": {"purge_step": step}, "wandb": {"id": folder.name, "resume": "allow", "dir": str(folder)}},
    )
