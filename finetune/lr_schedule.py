"""Learning-rate schedules as pure functions: a multiplier of each group's peak rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A linear warmup, then `shape`. Nothing is remembered, so nothing can drift, be stepped twice or be lost on resume.

    `warmup_epochs` may be a fraction; `warmup_start` is the multiplier of the very first update (torch's LinearLR calls it
    `start_factor`). `monitor` names the validation score whose history is handed to `scale`.
    """

    warmup_epochs: float = 0.0
    warmup_start: float = 0.01

    monitor = "top1"

    def scale(self, step: int, steps_per_epoch: int, epochs: int, scores: Sequence[float] = ()) -> float:
        """The multiplier of every peak rate for update `step` (from 0), given one validation score per finished epoch."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        ramp = 1.0 if step >= warmup else self.warmup_start + (1 - self.warmup_start) * step / warmup
        decay_steps = max(1, epochs * steps_per_epoch - warmup)
        return ramp * self.shape(min(max(step - warmup, 0) / decay_steps, 1.0), scores)

    def shape(self, progress: float, scores: Sequence[float]) -> float:
        """The multiplier after warmup; `progress` runs from 0 (warmup over) to 1 (the run's end)."""
        raise NotImplementedError

    def faults(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        faults = []
        if not self.warmup_epochs >= 0:
            faults.append(f"schedule: warmup_epochs must be 0 or more, not {self.warmup_epochs}")
        if not 0 < self.warmup_start <= 1:
            faults.append(f"schedule: warmup_start must be above 0 and at most 1, not {self.warmup_start}")
        return faults


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak rate throughout."""

    def shape(self, progress, scores):
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from the peak to `floor`, a fraction of the peak (Loshchilov & Hutter 2017, arXiv 1608.03983).

    Equals torch's CosineAnnealingLR with eta_min = floor * peak. The floor is a fraction because an absolute one would lift
    slow groups above their own peak.
    """

    floor: float = 0.0

    def shape(self, progress, scores):
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2

    def faults(self):
        bad = not 0 <= self.floor < 1
        return super().faults() + bad * [f"schedule: floor is a fraction of the peak, at least 0 and below 1, not {self.floor}"]


@dataclass(frozen=True, kw_only=True)
class Plateau(Schedule):
    """Multiply by `factor` when the validation score has not improved for more than `patience` epochs.

    Replays torch's ReduceLROnPlateau over the scores of the finished epochs: mode "max" watches top-1, "min" the loss;
    `threshold` is relative or absolute by `threshold_mode`; `min_scale` is the lowest multiplier.
    """

    mode: Literal["max", "min"] = "max"
    factor: float = 0.1
    patience: int = 2
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    min_scale: float = 0.0

    @property
    def monitor(self):
        return "top1" if self.mode == "max" else "loss"

    def shape(self, progress, scores):
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

    def faults(self):
        rules = {
            f"factor must be above 0 and below 1, not {self.factor}": 0 < self.factor < 1,
            f"patience must be 0 or more, not {self.patience}": self.patience >= 0,
            f"threshold must be 0 or more, not {self.threshold}": self.threshold >= 0,
            f"cooldown must be 0 or more, not {self.cooldown}": self.cooldown >= 0,
            f"min_scale must be at least 0 and below 1, not {self.min_scale}": 0 <= self.min_scale < 1,
        }
        return super().faults() + [f"schedule: {rule}" for rule, kept in rules.items() if not kept]
