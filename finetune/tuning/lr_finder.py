"""The learning-rate range test: all groups' learning rates rise by one factor; the network is then given back as it was."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from finetune.data.batches import Cut
from finetune.data.loader import ImageDataset, epoch_batches, load_batches
from finetune.models.batch_norm import set_train_mode
from finetune.optim.freezing import start_stage
from finetune.optim.loss import Criterion
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups, set_lrs
from finetune.recipe import Lambda, Recipe
from finetune.report.drawing import new_figure, save_figure
from finetune.tools.memory_estimate import keep_state
from finetune.training.loop import train_step
from finetune.training.memory import find_micro_batches
from finetune.utils.errors import RecipeError
from finetune.utils.seed import keep_random_state
from finetune.utils.text import progress

FEWEST = 10  # steps that make a curve


def range_test(
    recipe: Recipe,
    net: nn.Module,
    images: ImageDataset,
    accelerator: Accelerator,
    low: float = 1e-3,
    high: float = 1e3,
    num_steps: int = 100,
) -> tuple[list[float], list[float]]:
    """(factors, losses) of steps whose learning rates rise from `low` to `high` times each group's peak.

    The range test of Smith (arXiv 1506.01186) for many learning rates at once: their ratios stay. All groups that ever train
    do so from the first step; `net` gets its tensors back in the end, and random generators their state. There is no
    linear probe first: from there the loss falls too little to show anything. `images` are the training images. Ends early once
    the smoothed loss is over 4 times its lowest, or a loss is not finite.

    Raises:
        RecipeError: on several processes, for a range that does not rise, and for too few steps.
    """
    if accelerator.num_processes > 1:
        raise RecipeError("find-lr runs on one process")
    if not 0 < low < high < math.inf or num_steps < FEWEST:
        raise RecipeError(f"find-lr needs 0 < low < high and {FEWEST} steps or more, not {low:g}, {high:g} and {num_steps}")
    # One of its own: `prepare` keeps every optimizer, and fp16's loss scale moves with each step.
    accelerator = Accelerator(mixed_precision=accelerator.mixed_precision)
    rise = Lambda(function=lambda epoch: low * (high / low) ** (epoch * num_steps / (num_steps - 1)))
    device, factors, losses = accelerator.device, [], []
    with keep_random_state(), keep_tensors(net.to(device)), keep_state(net):
        criterion = Criterion(recipe, net, images, device)
        groups = [
            replace(group, schedule=rise, warmup_epochs=0.0, unfreeze_at=0 if group.ever_trains else math.inf)
            for group in build_param_groups(recipe, net)
        ]
        optimizer = accelerator.prepare(build_optimizer(groups))
        start_stage(groups, optimizer, 0)
        set_train_mode(net, recipe.batch_norm)
        cut = Cut(micro_batches=find_micro_batches(recipe, net, accelerator, 1, print))
        epochs = (load_batches(images, i, epoch_batches(recipe, images, i, cut), 0, device) for i in count())
        for step, batch in zip(progress(range(num_steps), num_steps, "find-lr"), chain.from_iterable(epochs), strict=False):
            set_lrs(optimizer, groups, step, num_steps, 1, ())
            loss, norm = (value.item() for value in train_step(recipe, net, criterion, optimizer, batch, accelerator))
            if not math.isfinite(loss) or not (math.isfinite(norm) or accelerator.scaler):
                break
            factors.append(rise.scale(step, num_steps, 1))
            losses.append(loss)
            if (smoothed := smooth(losses))[-1] > 4 * min(smoothed):
                break
    return factors, losses


@contextmanager
def keep_tensors(net: nn.Module) -> Iterator[None]:
    """Give parameters and buffers their values back in the end; not every network can be copied instead."""
    kept = {name: tensor.detach().clone() for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
                tensor.copy_(kept[name])


def smooth(losses: Sequence[float], beta: float = 0.8) -> list[float]:
    """The exponential moving average with its bias corrected: of all losses up to each, weighted by beta ** their age.

    The average lags by about 1 / (1 - beta) steps: with fastai's 0.98, by half of a test of 100.
    """
    total = weight = 0.0
    smoothed = []
    for loss in losses:
        total, weight = beta * total + loss, beta * weight + 1
        smoothed.append(total / weight)
    return smoothed


def suggest_factors(factors: Sequence[float], losses: Sequence[float]) -> dict[str, float]:
    """Factors on the recipe's learning rates at which to train, by the name of the rule that finds them.

    "steepest": where the smoothed loss falls fastest per decade, of the points up to its lowest. "valley": fastai's of that
    name (arXiv 2002.04688), of the longest sequence of ever lower smoothed losses, which may skip some, the point half its
    length before its end (fastai's text says two thirds along it; this is what its code does). Where there are enough, the
    first 10 points, means of few losses, and the last 5, of the explosion, do not count.
    """
    if len(losses) < FEWEST:
        raise RecipeError(f"find-lr: {len(losses)} steps before the loss exploded are too few: start at a lower factor")
    part = slice(10, -5) if len(losses) >= 25 else slice(None)
    scales, smoothed = np.array(factors)[part], np.array(smooth(losses))[part]
    lowest = smoothed.argmin()
    if not smoothed[: lowest + 1].max() - smoothed[lowest] > scatter(losses):
        raise RecipeError(
            f"find-lr: the loss does not fall between the factors {factors[0]:.2g} and "
            f"{factors[-1]:.2g}: start lower if it rises, end higher if it stays"
        )
    lengths: list[int] = []  # of the longest such sequence up to each point
    for i, loss in enumerate(smoothed):
        lengths.append(1 + max((lengths[j] for j in range(i) if smoothed[j] > loss), default=0))
    end, length = int(np.argmax(lengths)), max(lengths)
    return {
        "steepest": float(scales[np.gradient(smoothed, np.log10(scales))[: lowest + 1].argmin()]),
        "valley": float(scales[max(0, end - length + length // 3 + length // 6)]),
    }


def scatter(losses: Sequence[float]) -> float:
    """What chance makes of the smoothed losses: twice the median of the differences between one step and the next."""
    return float(2 * np.median(np.abs(np.diff(losses))))


def compare_factors(
    factors: Sequence[float], losses: Sequence[float], suggested: dict[str, float]
) -> tuple[dict[str, float], str]:
    """(those of the suggested factors that are better than 1, the recipe's own, what to do): by the smoothed losses.

    Where the loss at 1 is within chance of the lowest up to there, and no suggestion has a lower one, nothing is better than
    the recipe's own learning rates. Where it is above, and no suggestion is below it, the factor with the lowest is.
    """
    logs, smoothed = np.log(factors), np.array(smooth(losses))
    if factors[-1] < 1:
        return suggested, f"the recipe's learning rates are too high: the loss explodes at {factors[-1]:.2g} times theirs"
    at_one = float(np.interp(0, logs, smoothed))
    better = {name: factor for name, factor in suggested.items() if np.interp(np.log(factor), logs, smoothed) < at_one}
    lowest = int(smoothed[logs <= 0].argmin())
    if at_one - smoothed.min() <= scatter(losses) or not better and at_one - smoothed[lowest] <= scatter(losses):
        return {}, (
            f"the recipe's learning rates are on the flat part: keep them (loss {at_one:.3g}, lowest up to there "
            f"{smoothed[lowest]:.3g}, chance {scatter(losses):.2g})"
        )
    if better:
        return better, f"the loss at the recipe's own learning rates is {at_one:.3g}, at these it is lower"
    factor = float(factors[lowest])
    return {"lowest": factor}, (
        f"the recipe's learning rates are too high: loss {at_one:.3g}, and {smoothed[lowest]:.3g} at {factor:.2g} times theirs"
    )


def plot_range_test(
    file: Path, factors: Sequence[float], losses: Sequence[float], suggested: dict[str, float], lrs: dict[str, float]
) -> Path:
    """Draw the losses by factor, with the suggestions; `lrs` are the recipe's peak learning rates by group."""
    smoothed = smooth(losses)
    figure, axes = new_figure()
    axes.plot(factors, losses, color="0.75", linewidth=0.8, label="each step")
    axes.plot(factors, smoothed, color="C0", label="smoothed")
    axes.axvline(1, color="0.3", linestyle="--", linewidth=1, label="1: the recipe")
    for i, (name, factor) in enumerate(suggested.items()):
        height = np.interp(np.log(factor), np.log(factors), smoothed)
        axes.axvline(factor, color=f"C{i + 1}", linestyle=":", linewidth=1)
        axes.plot(factor, height, "o", color=f"C{i + 1}", label=f"{name}: {factor:.2g}")
    lowest, highest = min(losses), max(losses[: int(np.argmin(smoothed)) + 1])  # the explosion would squash the valley
    room = 0.1 * (highest - lowest)
    axes.set(xscale="log", xlabel="factor on every group's peak learning rate", ylabel="training loss")
    axes.set_ylim(lowest - room, highest + 2 * room)
    axes.legend(loc="lower left", fontsize="small")
    shown = [f"{name} {lr:.2g}" for name, lr in lrs.items()]
    text = ", ".join(shown) if len(", ".join(shown)) <= 80 else f"{shown[0]} .. {shown[-1]}"
    figure.suptitle(f"the recipe's peak learning rates: {text}", fontsize="medium")
    return save_figure(figure, [axes], file)


def line_to_paste(recipe: Recipe, factor: float) -> str:
    """The option that makes every learning rate `factor` times the recipe's, to two digits."""
    return f"--lr-scale {recipe.lr_scale * factor:.2g}"
