"""What the runs of peers.py make: a table for each set of images, with default and with tuned learning rates; one picture.

python -m benchmarks.peers_report benchmarks/results/peers.jsonl --picture peers.png
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np

PEERS = ("tutorial", "tutorial_batch32", "transformers", "fastai", "lightning", "timm", "timm_frozen_norms", "ours")
SET = ("data", "size", "epochs", "per_class")  # tells one set of images and budget from others


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    report(read(args.file), args.picture)
    return 0


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def report(rows: list[dict], picture: Path | None = None) -> None:
    """Print the tables, draw the picture, and print as the last line a JSON object."""
    parts = sections(rows)
    for title, part in parts.items():
        print(f"\n{title}; {part['train_images']} training images, {part['val_images']} validation images\n\n{table(part)}")
        if "best_peer" in part:
            print(f"\n{first_there(part)}")
    if picture:
        draw(parts, picture)
    every = [part["holds"] for part in parts.values() if "holds" in part]
    holds = {name: all(one[name] for one in every) for name in every[0]} if every else None
    print(json.dumps({**parts, "holds": holds}))


def sections(rows: list[dict]) -> dict[str, dict]:
    """By title: the figures of all peers on one set of images, with default or with tuned learning rates."""
    rows, found = [row for row in rows if not row["held_out"]], {}
    for one in dict.fromkeys(tuple(row[key] for key in SET) for row in rows):
        for tuned in (False, True):
            own = [row for row in rows if tuple(row[key] for key in SET) == one and row["tuned"] == tuned]
            by_peer = {peer: [row for row in own if row["peer"] == peer] for peer in PEERS}
            by_peer = {
                peer: [row for row in runs if row["factor"] == runs[-1]["factor"]] for peer, runs in by_peer.items() if runs
            }
            if by_peer:
                title = f"{one[0]}, {one[1]} px, {one[2]} epochs: {'tuned' if tuned else 'default'} learning rates"
                about = {"data": one[0], "tuned": tuned, **{key: own[0][key] for key in ("train_images", "val_images")}}
                found[title] = about | compare({peer: figures(runs) for peer, runs in by_peer.items()})
    return found


def figures(rows: list[dict]) -> dict:
    """A peer's runs in numbers: means over seeds, the mean curve among them."""

    def mean(key):
        return statistics.mean(row[key] for row in rows)

    top1 = [row["top1"] for row in rows]
    curves = np.array([row["curve"] for row in rows])
    curve = curves.mean(0).round(5).tolist()
    return {
        "mean_top1": curve[-1][1],
        "range_top1": [min(top1), max(top1)],
        "seeds": len(rows),
        "factor": rows[0]["factor"],
        "lr": rows[0]["lr"],
        "seconds": round(mean("seconds"), 2),
        "images_per_second": round(mean("images_per_second"), 1),
        "peak_memory_gib": round(mean("peak_memory_gib"), 3),
        "lines": rows[0]["lines"],
        "curve": curve,
        "lowest": curves[:, :, 1].min(0).tolist(),
        "highest": curves[:, :, 1].max(0).tolist(),
    }


def compare(peers: dict[str, dict]) -> dict:
    """The figures by peer, the best one first, with what holds of ours compared with the best other."""
    peers = dict(sorted(peers.items(), key=lambda item: -item[1]["mean_top1"]))
    others = {name: peer for name, peer in peers.items() if name != "ours"}
    if "ours" not in peers or not others:
        return {"peers": peers}
    mine, best = peers["ours"], max(others, key=lambda name: (others[name]["mean_top1"], -others[name]["seconds"]))
    level = others[best]["mean_top1"]  # the last point of its curve
    times = {
        name: next(moment for moment, top1 in peer["curve"] if top1 >= level)
        for name, peer in peers.items()
        if max(top1 for _, top1 in peer["curve"]) >= level
    }
    return {
        "peers": peers,
        "best_peer": best,
        "first": min(times, key=times.get),
        "seconds_to_best_peer": times,
        "holds": {
            "best_mean_top1": mine["mean_top1"] >= level,
            "time_to_best_peer_at_most_half": "ours" in times and times["ours"] <= times[best] / 2,
            "peak_memory_not_above_best_peer": mine["peak_memory_gib"] <= others[best]["peak_memory_gib"],
        },
    }


def table(section: dict) -> str:
    """One of the sections in Markdown."""
    lines = ["| | learning rates | top-1 | seconds | images/s | GiB | lines |", "|---|---|---|---|---|---|---|"]
    for name, peer in section["peers"].items():
        low, high = peer["range_top1"]
        lines.append(
            f"| {name} | x {peer['factor']:g} | {peer['mean_top1']:.1%} ({low:.1%} to {high:.1%}, {peer['seeds']} seeds) | "
            f"{peer['seconds']:.1f} | {peer['images_per_second']:.1f} | {peer['peak_memory_gib']:.2f} | {peer['lines']} |"
        )
    return "\n".join(lines)


def first_there(section: dict) -> str:
    """When ours reaches what the best other peer ends with."""
    best, times = section["best_peer"], section["seconds_to_best_peer"]
    level = section["peers"][best]["mean_top1"]
    ours = f"there after {times['ours']:.1f} s" if "ours" in times else "never there"
    return f"The best other, {best}, ends at {level:.1%} after {times[best]:.1f} s; ours is {ours}."


def draw(sections: dict[str, dict], file: Path) -> None:
    """Top-1 over time, a panel for each table: a line for each peer, the range over seeds as a band."""
    from matplotlib.figure import Figure

    from finetune.report.drawing import save_figure

    figure = Figure(figsize=(4 * len(sections), 4.4), layout="constrained")
    panels = figure.subplots(1, len(sections), squeeze=False, sharey=True)
    lines = {}
    for axes, (title, part) in zip(panels.flat, sections.items(), strict=True):
        for label, peer in part["peers"].items():
            seconds, top1 = np.array(peer["curve"]).T
            ours = label == "ours"
            colour = "black" if ours else f"C{PEERS.index(label)}"
            style = {"color": colour, "linewidth": 2.5 if ours else 1.5, "markersize": 4}
            (lines[label],) = axes.plot(seconds, 100 * top1, "o-", **style)
            band = [100 * np.array(peer[edge]) for edge in ("lowest", "highest")]
            axes.fill_between(seconds, *band, color=colour, alpha=0.15, lw=0)
        axes.set(title=title.replace(": ", "\n"), xlabel="seconds of training; a dot for each epoch", xlim=(0, None))
    panels.flat[0].set_ylabel("validation top-1, %")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    save_figure(figure, list(panels.flat), file)


if __name__ == "__main__":
    sys.exit(main())
