"""Pictures of the run."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)


def curves(run: Path) -> Path:
    """Draw a run's metrics.jsonl as curves.png: loss, top-1 and every group's rate over the epochs."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "grad_norm" in row]
    epochs = [row for row in rows if "top1" in row]
    per_epoch = epochs[0]["step"] / (epochs[0]["epoch"] + 1)
    time = [(row["step"] + 1) / per_epoch for row in updates]  # in epochs, so that all three share an axis
    ends = [row["epoch"] + 1 for row in epochs]

    figure, (loss, score, rate) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained",
                                               height_ratios=(3, 3, 4))
    loss.plot(time, [row["loss"] for row in updates], color="0.75", linewidth=0.8,
              label="training, each update (as augmented and smoothed)")
    loss.plot(ends, [row["train_loss"] for row in epochs], "o-", markersize=3, color="C0", label="training, epoch mean")
    loss.plot(ends, [row["loss"] for row in epochs], "o-", markersize=3, color="C1", label="validation")
    loss.set(ylabel="loss", ylim=(0, None))
    loss.legend()
    score.plot(ends, [100 * row["top1"] for row in epochs], "o-", markersize=3, color="C2")
    last = epochs[-1]["top1"]
    score.annotate(f"{last:.2%}", (ends[-1], 100 * last), xytext=(-4, -14), textcoords="offset points", ha="right")
    score.set(ylabel="validation top-1, %")
    names = list(updates[0]["lr"])
    colours = plt.get_cmap("viridis")
    for i, name in enumerate(names):
        shown = [row["lr"][name] or float("nan") for row in updates]  # frozen: no line
        rate.plot(time, shown, color=colours(0.92 * i / max(1, len(names) - 1)), label=name)
    lowest = min(max(row["lr"][name] for row in updates) for name in names)  # a cosine's last dive to 0 hides all else
    rate.set(ylabel="learning rate", xlabel="epoch", yscale="log", xlim=(0, ends[-1]), ylim=(lowest / 100 or None, None))
    rate.legend(ncols=min(6, len(names)), fontsize="small")
    for axes in (loss, score, rate):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(run / "curves.png", dpi=110)
    plt.close(figure)
    return run / "curves.png"
