"""The metrics that can choose model-best: their names, the losses they fit, which way is better, how they are written."""

from collections.abc import Sequence
from typing import Literal

Loss = Literal["cross_entropy", "binary", "multi_label", "mse", "huber", "l1"]
Metric = Literal[
    "top1",
    "macro_f1",
    "mean_average_precision",
    "balanced_accuracy",
    "auroc",
    "kappa",
    "quadratic_kappa",
    "log_loss",
    "brier",
    "ece",
    "mae",
    "rmse",
    "r2",
    "spearman",
]
MEAN_AP = {"mean_average_precision": "mean average precision"}
OF_PROBABILITIES = {"log_loss": "log loss", "brier": "Brier score", "ece": "calibration error"}
OF_GRADES = {"quadratic_kappa": "quadratic kappa"}  # classes named by whole numbers, or numbers that are whole
OF_NUMBERS = {"mae": "MAE", "rmse": "RMSE", "r2": "R2", "spearman": "Spearman", **OF_GRADES}
METRICS = {  # in words
    "top1": "top-1",
    "macro_f1": "macro F1",
    **MEAN_AP,
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "kappa": "kappa",
    **OF_PROBABILITIES,
    **OF_NUMBERS,
}
REPORTED_METRICS = {  # as a run's last lines name them
    "top1": "top-1",
    "top5": "top-5",
    "macro_f1": "macro F1",
    **MEAN_AP,
    **OF_NUMBERS,
}
LOWER_IS_BETTER = (*OF_PROBABILITIES, "mae", "rmse")
NO_SHARES = (*OF_NUMBERS, *OF_PROBABILITIES)  # written, and judged, as numbers
NUMBER_LOSSES = ("mse", "huber", "l1")  # of labels that are numbers
KINDS = {  # of labels: the losses, and the metrics that measure them
    "One label an image": (
        ("cross_entropy", "binary"),
        ("top1", "macro_f1", "balanced_accuracy", "auroc", "kappa", *OF_GRADES, *OF_PROBABILITIES),
    ),
    "several labels": (("multi_label",), ("mean_average_precision", "auroc", *OF_PROBABILITIES)),
    "numbers": (NUMBER_LOSSES, tuple(OF_NUMBERS)),
}


def fits(loss: str, metric: str) -> bool:
    """Whether a metric measures what a loss learns."""
    return any(loss in losses and metric in metrics for losses, metrics in KINDS.values())


def direction(metric: str) -> int:
    """1 where more is better, -1 where less is: times it, a metric's values can be compared."""
    return -1 if metric in LOWER_IS_BETTER else 1


def beats(metric: str, value: float, other: float) -> bool:
    """Whether a value of the metric is better than another."""
    return direction(metric) * value > direction(metric) * other


def write_value(metric: str, value: float, digits: int = 2, sign: str = "%") -> str:
    """A metric's value as text: a share in percent, with so many digits; what is no share, in its own unit, in four digits."""
    return write_number(value) if metric in NO_SHARES else f"{100 * value:.{digits}f}{sign}"


def scale_of(metric: str) -> int:
    """What an axis multiplies a metric by: shares are in percent."""
    return 1 if metric in NO_SHARES else 100


def unit_of(metric: str) -> str:
    """What an axis adds to a metric's name."""
    return "" if metric in NO_SHARES else ", %"


def write_number(value: float, digits: int = 4) -> str:
    """A number of any size in so many digits, like 0.01234, 56.78 and 1.2e+06."""
    return f"{value:.{digits}g}"


def name_numbers(values: Sequence[float], names: Sequence[str]) -> str:
    """Numbers in words, in six digits: of several, each with its name."""
    written = [write_number(value, 6) for value in values]
    return written[0] if len(names) == 1 else ", ".join(map(" ".join, zip(names, written, strict=True)))
