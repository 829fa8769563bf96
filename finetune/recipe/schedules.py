"""Learning-rate schedules: pure functions that scale the peak learning rate of each parameter group."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

from finetune.recipe.checks import Checked
from finetune.recipe.metrics import direction

ROUNDING = 1e-9  # epochs: 3 x 0.1 epochs are 0.3 epochs, though not in floating point


class Time(NamedTuple):
    """Where a run is."""

    step: int  # from 0
    epoch: float  # a fraction, from 0
    progress: float  # the share of the steps after warmup that is done, 0 to 1
    steps: int  # after warmup, in all


@dataclass(frozen=True, kw_only=True)
class Schedule(Checked):
    """A linear warmup, times `shape`. It keeps no state, so it can't drift, be stepped twice or be lost on resume."""

    warmup_epochs: Annotated[float, "[0, inf)"] = 0.0
    warmup_start: Annotated[float, "(0, 1]"] = 0.01  # the first step's share of the peak: LinearLR's start_factor

    def scale(self, step: int, steps_per_epoch: int, epochs: int, metrics: Sequence[float] = ()) -> float:
        """The factor on every peak learning rate at `step` (from 0), given one validation metric per finished epoch."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        steps = max(1, epochs * steps_per_epoch - warmup)
        time = Time(step, step / steps_per_epoch, min(max(step - warmup, 0) / steps, 1.0), steps)
        return ramp(step, warmup, self.warmup_start) * self.shape(time, metrics)

    def shape(self, time: Time, metrics: Sequence[float]) -> float:
        """The factor, warmup aside."""
        raise NotImplementedError

    def watched_metric(self, metric: str) -> str:
        """The name of the validation metric to pass to `scale`, where the recipe's is `metric`."""
        return metric

    def toward(self, metric: str) -> "Schedule":
        """The schedule as it runs where the recipe's metric is `metric`, of which more may be better, or less."""
        return self


def ramp(step: float, steps: int, start: float) -> float:
    """A straight line from `start` at step 0 to 1 at step `steps`, and 1 from there on: torch's LinearLR."""
    return 1.0 if step >= steps else start + (1 - start) * step / steps


def cosine_between(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak learning rate throughout."""

    def shape(self, time: Time, metrics: Sequence[float]) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from the peak, where warmup ends, to `floor` (Loshchilov & Hutter, arXiv 1608.03983).

    torch's CosineAnnealingLR with eta_min = floor * peak. An absolute floor would lift slow groups above their own peak.
    """

    floor: Annotated[float, "[0, 1)", "a share of the peak"] = 0.0

    def shape(self, time: Time, metrics: Sequence[float]) -> float:
        return cosine_between(1.0, self.floor, time.progress)


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from the peak, where warmup ends, to `end`: torch's LinearLR."""

    end: Annotated[float, "[0, 1]", "a share of the peak"] = 0.0

    def shape(self, time: Time, metrics: Sequence[float]) -> float:
        return 1 + (self.end - 1) * time.progress


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """Times `factor` every `every` epochs, counted from the run's start: torch's StepLR."""

    every: Annotated[float, "(0, inf)"]  # epochs, or a fraction of one
    factor: Annotated[float, "(0, 1)"] = 0.1

    def shape(self, time: Time, metrics: Sequence[float]) -> float:
        return self.factor ** math.floor(time.epoch / self.every + ROUNDING)


@dataclass(frozen=True, kw_only=True)
class MultiStep(Schedule):
    """Times `factor` at each of the epochs `at`, counted from the run's start: torch's MultiStepLR."""

    at: tuple[Annotated[float, "(0, inf)"], ...]  # rising epochs, or fractions
    factor: Annotated[float, "(0, 1)"] = 0.1

    def shape(self, time: Time, metrics: Sequence[float]) -> float:
        return self.factor ** sum(time.epoch + ROUNDING >= epoch for epoch in self.at)

    def conflicts(self) -> Iterator[str]:
        if not self.at or list(self.at) != sorted(set(self.at)):
            yield f"at must be rising epochs above 0, not {self.at}"


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """Times `factor` each epoch, a little with each step: torch's ExponentialLR with factor ** (1 / steps per epoch)."""

    factor: Annotated[float, "(0, 1)"]

    def shape(self, time: Time, metrics: Sequence[float]) -> float:
        return self.factor**time.epoch


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(Schedule):
    """Cosines from the peak to `floor`, each `stretch` times as long as the one before (arXiv 1608.03983).

    From the run's start: torch's CosineAnnealingWarmRestarts with T_0 = period and T_mult = stretch.
    """

    period: Annotated[float, "(0, inf)"]  # epochs of the first cosine
    stretch: Annotated[int, "[1, inf)"] = 1
    floor: Annotated[float, "[0, 1)", "a share of the peak"] = 0.0

    def shape(self, time: Time, metrics: Sequence[float]) -> float:
        start, length = 0.0, self.period
        while time.epoch + ROUNDING >= start + length:
            start, length = start + length, length * self.stretch
        return cosine_between(1.0, self.floor, (time.epoch - start) / length)


@dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    """Up over the first `rise` of the run, then down to nearly nothing, by cosines. It is its own warmup.

    Smith & Topin, arXiv 1708.07120; torch's OneCycleLR with pct_start, div_factor and final_div_factor.
    """

    rise: Annotated[float, "(0, 1)"] = 0.3  # share of the run
    start_div: Annotated[float, "[1, inf]"] = 25.0  # the peak over the first learning rate
    end_div: Annotated[float, "[1, inf]"] = 1e4  # the first learning rate over the last

    def shape(self, time: Time, metrics: Sequence[float]) -> float:
        top, last, start = self.rise * time.steps - 1, time.steps - 1, 1 / self.start_div
        if time.step < top:
            return cosine_between(start, 1.0, time.step / top)
        return cosine_between(1.0, start / self.end_div, min(1.0, (time.step - top) / (last - top)))

    def conflicts(self) -> Iterator[str]:
        if self.warmup_epochs:
            yield "a OneCycle is its own warmup: leave out warmup_epochs"


@dataclass(frozen=True, kw_only=True)
class Lambda(Schedule):
    """Any function of the epoch (a fraction, from 0) that returns the factor: torch's LambdaLR."""

    function: Callable[[float], float]

    def shape(self, time: Time, metrics: Sequence[float]) -> float:
        return self.function(time.epoch)


@dataclass(frozen=True, kw_only=True)
class Plateau(Schedule):
    """Times `factor` when the validation metric has not improved for more than `patience` epochs.

    torch's ReduceLROnPlateau, replayed over the finished epochs.
    """

    mode: Literal["max", "min"] = "max"  # max watches the recipe's metric, min the validation loss
    factor: Annotated[float, "(0, 1)"] = 0.1
    patience: Annotated[int, "[0, inf)"] = 2
    threshold: Annotated[float, "[0, inf)"] = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: Annotated[int, "[0, inf)"] = 0
    min_scale: Annotated[float, "[0, 1)", "a share of the peak"] = 0.0  # the lowest

    def watched_metric(self, metric: str) -> str:
        return metric if self.mode == "max" else "loss"

    def toward(self, metric: str) -> Schedule:
        return replace(self, mode="min") if self.mode == "max" and direction(metric) < 0 else self

    def shape(self, time: Time, metrics: Sequence[float]) -> float:
        scale, bad_epochs, cooling = 1.0, 0, 0
        best = -math.inf if self.mode == "max" else math.inf
        for metric in metrics:
            if self.improves(metric, best):
                best, bad_epochs = metric, 0
            else:
                bad_epochs += 1
            if cooling:
                cooling, bad_epochs = cooling - 1, 0
            if bad_epochs > self.patience:
                scale, bad_epochs, cooling = max(scale * self.factor, self.min_scale), 0, self.cooldown
        return scale

    def improves(self, metric: float, best: float) -> bool:
        """Whether `metric` beats `best` by more than the threshold."""
        sign = 1 if self.mode == "max" else -1
        margin = best * (1 + sign * self.threshold) if self.threshold_mode == "rel" else best + sign * self.threshold
        return sign * metric > sign * margin
