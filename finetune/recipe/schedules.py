"""Learning-rate schedules as pure functions: a multiplier of each group's peak rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from finetune.recipe.checks import Rules, broken


class Time(NamedTuple):
    """Where a run is: updates done, the epoch as a fraction, and the share of the updates after warmup that is done."""

    step: int
    epoch: float
    progress: float
    steps: int  # after warmup, in all


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A linear warmup, times `shape`. Nothing is remembered, so nothing can drift, be stepped twice or be lost on resume.

    `warmup_epochs` may be a fraction; `warmup_start` is the very first update's multiplier (LinearLR's start_factor).
    """

    warmup_epochs: float = 0.0
    warmup_start: float = 0.01

    def scale(self, step: int, steps_per_epoch: int, epochs: int, scores: Sequence[float] = ()) -> float:
        """The multiplier of every peak rate for update `step` (from 0), given one validation score per finished epoch."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        steps = max(1, epochs * steps_per_epoch - warmup)
        time = Time(step, step / steps_per_epoch, min(max(step - warmup, 0) / steps, 1.0), steps)
        return ramp(step, warmup, self.warmup_start) * self.shape(time, scores)

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        """The multiplier, warmup aside."""
        raise NotImplementedError

    def watches(self, score: str) -> str:
        """The name of the validation score to hand to `scale`, where the recipe's is `score`."""
        return score

    def faults(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        rules = [
            (self.warmup_epochs >= 0, f"warmup_epochs must be 0 or more, not {self.warmup_epochs}"),
            (0 < self.warmup_start <= 1, f"warmup_start must be above 0 and at most 1, not {self.warmup_start}"),
            *self.rules(),
        ]
        return broken(rules, "schedule: ")

    def rules(self) -> Rules:
        """What the values of this kind of schedule must be, and whether they are."""
        return []


def ramp(step: float, steps: int, start: float) -> float:
    """A straight line from `start` at step 0 to 1 at step `steps`, and 1 from there on: torch's LinearLR."""
    return 1.0 if step >= steps else start + (1 - start) * step / steps


def cosine_between(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak rate throughout."""

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from the peak, where warmup ends, to `floor`, a fraction of it (Loshchilov & Hutter, arXiv 1608.03983).

    torch's CosineAnnealingLR with eta_min = floor * peak. An absolute floor would lift slow groups above their own peak.
    """

    floor: float = 0.0

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        return cosine_between(1.0, self.floor, time.progress)

    def rules(self) -> Rules:
        return [
            (0 <= self.floor < 1, f"floor is a fraction of the peak, at least 0 and below 1, not {self.floor}"),
        ]


@dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
    """From the peak, where warmup ends, to 0 as (1 - progress) ** power: torch's PolynomialLR; power 1 is a straight line."""

    power: float = 1.0

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        return (1 - time.progress) ** self.power

    def rules(self) -> Rules:
        return [
            (self.power > 0, f"power must be above 0, not {self.power}"),
        ]


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from the peak, where warmup ends, to `end`, a fraction of it: torch's LinearLR."""

    end: float = 0.0

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        return 1 + (self.end - 1) * time.progress

    def rules(self) -> Rules:
        return [
            (0 <= self.end <= 1, f"end is a fraction of the peak, at least 0 and at most 1, not {self.end}"),
        ]


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """Times `factor` every `every` epochs (a fraction may be given), counted from the run's start: torch's StepLR."""

    every: float
    factor: float = 0.1

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        return self.factor ** math.floor(time.epoch / self.every + 1e-9)  # 3 x 0.1 epochs are 0.3 epochs, rounding or not

    def rules(self) -> Rules:
        return [
            (self.every > 0, f"every must be above 0, not {self.every}"),
            (0 < self.factor < 1, f"factor must be above 0 and below 1, not {self.factor}"),
        ]


@dataclass(frozen=True, kw_only=True)
class MultiStep(Schedule):
    """Times `factor` at each of the epochs `at` (fractions may be given), counted from the run's start: torch's MultiStepLR."""

    at: tuple[float, ...]
    factor: float = 0.1

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        return self.factor ** sum(time.epoch + 1e-9 >= epoch for epoch in self.at)

    def rules(self) -> Rules:
        rising = all(a < b for a, b in zip((0, *self.at), self.at, strict=False))
        return [
            (rising and len(self.at) > 0, f"at must be rising epochs above 0, not {self.at}"),
            (0 < self.factor < 1, f"factor must be above 0 and below 1, not {self.factor}"),
        ]


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """Times `factor` each epoch, a little with each update: torch's ExponentialLR with factor ** (1 / updates an epoch)."""

    factor: float

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        return self.factor**time.epoch

    def rules(self) -> Rules:
        return [
            (0 < self.factor < 1, f"factor must be above 0 and below 1, not {self.factor}"),
        ]


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(Schedule):
    """Cosines from the peak to `floor`, the first `period` epochs long, each `stretch` times the one before (arXiv 1608.03983).

    From the run's start: torch's CosineAnnealingWarmRestarts with T_0 = period and T_mult = stretch.
    """

    period: float
    stretch: int = 1
    floor: float = 0.0

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        begun, length = 0.0, self.period
        while time.epoch + 1e-9 >= begun + length:
            begun, length = begun + length, length * self.stretch
        return cosine_between(1.0, self.floor, (time.epoch - begun) / length)

    def rules(self) -> Rules:
        return [
            (self.period > 0, f"period must be above 0, not {self.period}"),
            (self.stretch >= 1, f"stretch must be 1 or more, not {self.stretch}"),
            (0 <= self.floor < 1, f"floor is a fraction of the peak, at least 0 and below 1, not {self.floor}"),
        ]


@dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    """Up from 1 / `start_div` of the peak over the first `rise` of the run, down to 1 / `end_div` of that start, by cosines.

    Smith & Topin, arXiv 1708.07120; torch's OneCycleLR with div_factor and final_div_factor. It is its own warmup.
    """

    rise: float = 0.3
    start_div: float = 25.0
    end_div: float = 1e4

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        top, last, start = self.rise * time.steps - 1, time.steps - 1, 1 / self.start_div
        if time.step < top:
            return cosine_between(start, 1.0, time.step / top)
        return cosine_between(1.0, start / self.end_div, min(1.0, (time.step - top) / (last - top)))

    def rules(self) -> Rules:
        return [
            (0 < self.rise < 1, f"rise must be above 0 and below 1, not {self.rise}"),
            (self.start_div >= 1, f"start_div must be at least 1, not {self.start_div}"),
            (self.end_div >= 1, f"end_div must be at least 1, not {self.end_div}"),
            (self.warmup_epochs == 0, "a OneCycle is its own warmup: leave out warmup_epochs"),
        ]


@dataclass(frozen=True, kw_only=True)
class Lambda(Schedule):
    """Any function of the epoch (a fraction, from 0) that returns the multiplier: torch's LambdaLR."""

    function: Callable[[float], float]

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        return self.function(time.epoch)


@dataclass(frozen=True, kw_only=True)
class Plateau(Schedule):
    """Multiply by `factor` when the validation score has not improved for more than `patience` epochs.

    Replays torch's ReduceLROnPlateau over the finished epochs: mode "max" watches the recipe's `score`, "min" the loss;
    `threshold` is relative or absolute by `threshold_mode`; `min_scale` is the lowest multiplier.
    """

    mode: Literal["max", "min"] = "max"
    factor: float = 0.1
    patience: int = 2
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    min_scale: float = 0.0

    def watches(self, score: str) -> str:
        return score if self.mode == "max" else "loss"

    def shape(self, time: Time, scores: Sequence[float]) -> float:
        return self.replayed(scores)

    def replayed(self, scores: Sequence[float]) -> float:
        """The multiplier after epochs with these scores."""
        scale, bad_epochs, cooling = 1.0, 0, 0
        best = -math.inf if self.mode == "max" else math.inf
        for score in scores:
            if self.improves(score, best):
                best, bad_epochs = score, 0
            else:
                bad_epochs += 1
            if cooling:
                cooling, bad_epochs = cooling - 1, 0
            if bad_epochs > self.patience:
                scale, bad_epochs, cooling = max(scale * self.factor, self.min_scale), 0, self.cooldown
        return scale

    def improves(self, score: float, best: float) -> bool:
        """Whether `score` beats `best` by more than the threshold."""
        sign = 1 if self.mode == "max" else -1
        margin = best * (1 + sign * self.threshold) if self.threshold_mode == "rel" else best + sign * self.threshold
        return sign * score > sign * margin

    def rules(self) -> Rules:
        return [
            (0 < self.factor < 1, f"factor must be above 0 and below 1, not {self.factor}"),
            (self.patience >= 0, f"patience must be 0 or more, not {self.patience}"),
            (self.threshold >= 0, f"threshold must be 0 or more, not {self.threshold}"),
            (self.cooldown >= 0, f"cooldown must be 0 or more, not {self.cooldown}"),
            (0 <= self.min_scale < 1, f"min_scale must be at least 0 and below 1, not {self.min_scale}"),
        ]
