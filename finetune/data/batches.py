"""The order of the images in an epoch, and the share of each process and micro-batch."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from finetune.utils.seed import keyed_seed


class Cut(NamedTuple):
    """How each batch is cut: over processes, and each process's part into micro-batches."""

    process: int = 0
    processes: int = 1
    micro_batches: int = 1
    fewest: int = 1  # images in a micro-batch, if there are as many: batch norm takes no statistics of a single one


WHOLE = Cut()


@dataclass(frozen=True)
class BatchPlan:
    """One step's batch: the indices of its images over all processes, and this process's micro-batches of them.

    `step` counts over the run, `positions` over the micro-batches of all processes: 2 processes with 2 micro-batches each
    compute what 1 process with 4 does. `weight` is 0 if a short last batch has no image for this process, which then computes
    on one all the same, because every process must take part in averaging the gradients.
    """

    step: int
    images: list[int]
    micro_batches: list[list[int]]
    positions: list[int]
    weight: float = 1.0

    @property
    def size(self) -> int:
        return len(self.images)


def plan_epoch(
    num_images: int,
    batch_size: int,
    seed: int,
    epoch: int,
    cut: Cut = WHOLE,
    sample_weights: np.ndarray | None = None,
    pairs: bool = False,
) -> list[BatchPlan]:
    """The batches of an epoch: every image once, in an order that depends on seed and epoch alone.

    With `sample_weights` [num_images], which add up to 1, as many images are drawn with replacement. With `pairs`, images 0 and
    1 of each batch, 2 and 3, and so on, stay together in one micro-batch. Where a micro-batch must have 2 images, a last batch
    of one is given another by the batch before.
    """
    random = np.random.RandomState(keyed_seed(seed, epoch))
    if sample_weights is None:
        order = random.permutation(num_images).tolist()
    else:
        order = random.choice(num_images, num_images, p=sample_weights).tolist()
    own = range(cut.process * cut.micro_batches, (cut.process + 1) * cut.micro_batches)
    starts = [*range(0, num_images, batch_size), num_images]
    if starts[-1] - starts[-2] < cut.fewest < batch_size and len(starts) > 2:
        starts[-2] = num_images - cut.fewest
    plans = []
    for step, (start, end) in enumerate(pairwise(starts), epoch * (len(starts) - 1)):
        batch = order[start:end]
        parts = split_batch(batch, cut.processes * cut.micro_batches, pairs, cut.fewest)
        positions = [i for i in own if parts[i]]
        if positions:
            plans.append(BatchPlan(step, batch, [parts[i] for i in positions], positions))
        else:
            plans.append(BatchPlan(step, batch, [batch[: cut.fewest]], [own[0]], weight=0.0))
    return plans


def split_batch(batch: list[int], num_parts: int, pairs: bool, fewest: int = 1) -> list[list[int]]:
    """A batch in parts of nearly equal size, pair by pair if `pairs` stay together; of a short batch the last are empty, so
    that none has fewer than `fewest` images, or an image without its neighbour."""
    unit = 2 if pairs else 1
    filled = min(num_parts, max(1, len(batch) // max(unit, fewest)))
    sizes = [unit * len(units) for units in np.array_split(range(max(1, len(batch) // unit)), filled)]
    ends = [*np.cumsum(sizes)[:-1], len(batch)]
    return [batch[start:end] for start, end in pairwise([0, *ends])] + [[]] * (num_parts - filled)


def balanced_sample_weights(labels: np.ndarray) -> np.ndarray:
    """Sample weights [n], adding up to 1, with which each class is drawn equally often."""
    weights = 1 / np.bincount(labels)[labels]
    return weights / weights.sum()
