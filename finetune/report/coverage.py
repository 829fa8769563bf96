"""How the error falls where a network may leave out images."""

from pathlib import Path

import torch

from finetune.metrics.coverage import SHARES, coverage_table, risk_by_coverage
from finetune.report.drawing import new_figure, save_figure, style


def plot_coverage(
    folder: Path, loss: str, logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, title: str = ""
) -> Path:
    """coverage.png: the share of errors among the images that are kept, the surest first; marked, the thresholds of a table."""
    confidence, errors = risk_by_coverage(loss, logits, labels, temperature)
    figure, axes = new_figure()
    axes.plot(100 * torch.arange(1, len(errors) + 1) / len(errors), 100 * errors, color="C0")
    for row in coverage_table(loss, logits, labels, temperature):
        axes.plot(100 * row["coverage"], 100 * row["error"], "o", color="C0", clip_on=False)
        axes.annotate(
            f"{row['threshold']:.2f}", (100 * row["coverage"], 100 * row["error"]), (0, 7), textcoords="offset points",
            ha="right" if row["coverage"] == SHARES[0] else "center", fontsize="small",
        )  # fmt: skip
    axes.set(xlim=(0, 100), ylim=(0, None), xlabel="images kept, the surest first, %", ylabel="of these predicted wrongly, %")
    axes.set_title("at the marks: the probability of the least sure image kept", fontsize="small", loc="left")
    figure.suptitle(title, fontsize="medium", **style(title))
    return save_figure(figure, [axes], folder / "coverage.png")
