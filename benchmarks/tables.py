"""Tables of what was reached, in Markdown, made of the kept records."""

import json
from pathlib import Path
from statistics import mean

from benchmarks import ablations, peers_report

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RECIPES = ROOT / "benchmarks" / "results", ROOT / "recipes"
IMAGES = {  # what the records call them
    "cifar": "CIFAR-10, JPEG copy",
    "digits": "digits",
    "resnet18_short": "ResNet-18, 1,000 images, 3 epochs",
    "resnet18_long": "ResNet-18, 1,000 images, 30 epochs",
    "resnet18_many": "ResNet-18, 10,000 images, 10 epochs",
    "resnet18_signs": "sign-language digits, 10 a class, 10 epochs",
}
NETWORKS = [f"tf_efficientnet_lite{i}" for i in range(3)]


def read(name: str):
    """A kept result; of a .jsonl, its lines."""
    text = (RESULTS / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)


def record(name: str) -> dict:
    """The record of a recipe's runs."""
    return json.loads((RECIPES / "baselines" / f"{name}.json").read_text())


def table(header: str, rows: list[tuple]) -> str:
    """Rows in Markdown, under column names divided by |."""
    columns = [name.strip() for name in header.split("|")]
    lines = [f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines).replace("|  |", "| |")


def mean_of(kept: dict, key: str = "top1") -> str:
    """The mean of one metric over a record's runs."""
    return f"{mean(run[key] for run in kept['runs']):.1%}"


def with_range(kept: dict) -> str:
    """A record's top-1, or its own metric by name: mean, range and number of seeds."""
    from finetune.recipe.metrics import METRICS, NO_SHARES
    from finetune.results.baseline import metric_of

    metric = metric_of(kept)
    name = "" if metric == "top1" else f"{METRICS[metric]} "
    values = [run[metric] for run in kept["runs"]]
    if metric in NO_SHARES:
        return f"{name}{mean(values):.3g} ({min(values):.3g} to {max(values):.3g}, {len(values)} seeds)"
    return f"{name}{mean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f}, {len(values)} seeds)"


def cost(kept: dict) -> str:
    """What one run took, and on what."""
    threads = kept["hardware"]["threads"]
    return f"{mean(run['seconds'] for run in kept['runs']) / 60:.1f} min, {threads} CPU core{'s' * (threads > 1)}"


def recipes(which: str = "all") -> str:
    """A row for each recipe, or for the `measured` ones."""
    from finetune.recipe.load import load_recipe
    from finetune.results.baseline import measured_with

    rows = []
    for file in sorted(RECIPES.glob("*.py")):
        recipe, _ = load_recipe(str(file))
        reached, paid = "not measured", "-"
        if (RECIPES / "baselines" / f"{file.stem}.json").is_file():
            kept = record(file.stem)
            reached, paid = with_range(kept), cost(kept)
            if words := measured_with(kept):
                reached += f" on {words}"
        elif which == "measured":
            continue
        images = f"{recipe.data.source}, {recipe.data.image_size} px"
        rows.append((f"`{file.stem}`", f"`{recipe.backbone}`", images, reached, paid))
    return table("recipe | network | images | top-1 | cost of a run", rows)


def top1(name: str) -> str:
    """The mean of a recipe's runs."""
    return mean_of(record(name))


def networks() -> str:
    """The recipes on larger networks of the family."""
    names = [file.stem for file in sorted((RECIPES / "baselines").glob("*.json"))]
    kept = [record(name) for name in names] + read("lite.json")
    cells = {
        (one["recipe"]["backbone"], one["recipe"]["data"]["source"]): f"{with_range(one)}; probe "
        f"{mean_of(one, 'linear_probe_top1')}"
        for one in kept
        if one["recipe"]["backbone"] in NETWORKS
    }
    rows = [(f"`{net}`", *(cells[net, source] for source in ("--data", "digits", "elpv"))) for net in NETWORKS]
    return table("network | CIFAR-10, JPEG copy, 100 a class | digits | solar cells", rows)


def backbones() -> str:
    """What each network is, takes and asks for."""
    usual = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    rows = []
    for row in read("backbones.json")["rows"]:
        watch = [f"{row['registers']} registers"] * bool(row["registers"])
        watch += ["batch norm"] * row["batch_norm"] + ["attention pool"] * row["attention_pool"]
        watch += ['`batch_norm="train"`: one in the head'] * row["head_norm"]
        watch += [f"mean {row['mean'][0]:.2g}, std {row['std'][0]:.2g}"] * ([row["mean"], row["std"]] != list(usual))
        sizes = {0: "no other", 1: "any"}.get(row["sizes"], f"by {row['sizes']}")
        rows.append(
            (
                f"`{row['network']}`",
                f"{row['parameters'] / 1e6:.1f}",
                f"{row['gmacs']:.1f}",
                f"{row['image_size']}; {sizes}",
                row["licence"],
                row["groups"] or "rows only",
                "yes" if row["probe"] else f"no: {row['head']}",
                f"`{row['lora']}`" if row["lora"] else "-",
                "; ".join(watch) or "-",
            )
        )
    header = "network | M parameters | GMACs | px; other sizes | licence | groups | linear probe | LoRA | watch for"
    return table(header, rows)


def cifar() -> str:
    """The CIFAR-10 recipe on more images."""
    rows = [
        (images, with_range(kept), mean_of(kept, "linear_probe_top1"), cost(kept))
        for images, kept in (
            ("100 a class to train on, 100 to validate", record("efficientnet_lite0_cifar")),
            ("1,000 a class to train on, 200 to validate", read("cifar_10000.json")),
        )
    ]
    return table("CIFAR-10, JPEG copy | top-1 | linear probe | cost of a run", rows)


def resnet18_choices() -> str:
    """What the learning rates of resnet18_cifar were chosen by."""
    rows = [(run["changed"], f"{run['top1']:.1%}") for run in read("resnet18_choices.json")["runs"]]
    return table("held-out training images | top-1", rows)


def solar_cells() -> str:
    """The solar cells, all and by type."""
    kept = record("efficientnet_lite0_elpv")
    rows = [("all", kept["runs"][0]["val_images"], mean_of(kept), mean_of(kept, "macro_f1"))]
    for kind, name in (("mono", "monocrystalline"), ("poly", "polycrystalline")):
        part = {"runs": [run["by_subgroup"][kind] for run in kept["runs"]]}
        rows.append((name, part["runs"][0]["val_images"], mean_of(part), mean_of(part, "macro_f1")))
    return table("cells | validation images | top-1 | macro F1", rows)


def xray_choices() -> str:
    """Augmentation of X-rays, measured on images like those trained on and on others."""
    rows = []
    for run in read("xray_choices.json")["runs"]:
        values = run.get("validation", [])
        ends = f" ({100 * min(values):.1f} to {100 * max(values):.1f}, {len(values)} seeds)" if len(values) > 1 else ""
        left_out = (f"{run[key]:.1%}" if key in run else "-" for key in ("others", "other_patients"))
        rows.append((run["network"], run["augmentation"], *left_out, f"{mean(values):.1%}{ends}" if values else "-"))
    return table("network | augmentation | others, at random | others, of other patients | validation images", rows)


def ablation(images: str) -> str:
    """A recipe with one thing changed at a time."""
    rows = [row for row in read("ablations.jsonl") if row["images"].startswith(IMAGES[images])]
    return ablations.table(ablations.compare(rows))


def unfreezing() -> str:
    """All layers at once and one stage after the other, in about the same time; seconds are those of the fastest seed."""
    runs = [row for row in read("unfreezing.jsonl") if not row["held_out"]]
    rows = []
    for images, arm in dict.fromkeys((row["images"], row["arm"]) for row in runs):
        own = [row for row in runs if (row["images"], row["arm"]) == (images, arm)]
        (scale,) = {row["lr_scale"] for row in own}
        found = [row["top1"] for row in own]
        top1 = f"{mean(found):.1%} ({100 * min(found):.1f} to {100 * max(found):.1f})"
        rows.append((images, arm, f"{scale:g}", f"{min(row['seconds'] for row in own):.0f} s", top1))
    return table("images | what trains | `lr_scale` | a run | top-1", rows)


def section(images: str, tuned: bool) -> dict:
    """A part of the comparison with other tools."""
    parts = peers_report.sections(read("peers.jsonl")).values()
    return next(part for part in parts if (part["data"], part["tuned"]) == (IMAGES[images], tuned))


def peers(images: str, tuned: str = "") -> str:
    """One table of the comparison with other tools."""
    part = section(images, bool(tuned))
    return f"{peers_report.table(part)}\n\n{peers_report.first_there(part)}"


def peer(name: str, images: str, tuned: str = "") -> str:
    """Top-1 of one tool, or of the best other one."""
    part = section(images, bool(tuned))
    return f"{part['peers'][part['best_peer'] if name == 'best' else name]['mean_top1']:.1%}"


def long_runs() -> str:
    """Suggested recipes against other tools, twelve epochs of a ResNet-18."""
    rows = [row for row in read("peers_long.jsonl") if not row["held_out"]]
    sets, cells = list(dict.fromkeys(row["data"] for row in rows)), dict[tuple[str, str], str]()
    for tool, images in dict.fromkeys((row["peer"], row["data"]) for row in rows):
        own = [row for row in rows if (row["peer"], row["data"]) == (tool, images)]
        scores = []
        for name, key in (("", "top1"), ("macro F1 ", "macro_f1")):
            values = [row[key] for row in own]
            ends = f" ({100 * min(values):.1f} to {100 * max(values):.1f})" if len(values) > 1 else ", one seed"
            scores.append(f"{name}{mean(values):.1%}{ends}")
        cells[tool, images] = "; ".join(scores)
    tools = sorted({tool for tool, _ in cells}, key=lambda tool: -max(row["top1"] for row in rows if row["peer"] == tool))
    body = [(f"`{tool}`", *(cells.get((tool, images), "-") for images in sets)) for tool in tools]
    return table(" | ".join(["", *sets]), body)


def suggest() -> str:
    """Recipes that `finetune suggest` wrote, against a linear head on frozen features."""
    rows = [
        (one["images"], one["val_images"], f"{one['linear_head']:.1%}", f"{one[one['metric']]:.1%}")
        for one in read("suggest.json")
    ]
    return table("images | validation images | linear head | suggested recipe", rows)


def suggest_lrs() -> str:
    """Suggested recipes with their learning rates, and with three times those."""
    runs = [row for row in read("ablations.jsonl") if row["images"].startswith("suggested for ")]
    found = {(row["images"], row["arm"]): row["top1"] for row in runs}
    rows = []
    for images, number in {row["images"]: row["val_images"] for row in runs}.items():
        what, network = images.removeprefix("suggested for ").split(": ")
        arms = (f"{found[images, arm]:.1%}" for arm in ("the recipe", "three times every learning rate"))
        rows.append((what, network, f"{number:,}", *arms))
    return table("images | network | measured on | as suggested | three times the learning rates", rows)


def soup() -> str:
    """Soups of runs, against the mean and the best of them."""

    def points(found: dict) -> str:
        low, high = (round(100 * end, 1) + 0.0 for end in found["interval"])  # no -0.0
        verdict = {"gain": "gain", "loss": "loss", "chance": "within chance"}[found["verdict"]]
        return f"{100 * found['difference']:+.1f} ({low:+.1f} to {high:+.1f}), {verdict}"

    rows = []
    for one in read("soup.json"):
        values, kind = one["top1_of_runs"], f"{one['soup']}, {one['runs']} runs"
        if one["soup"] == "greedy":
            kind += f", {one['averaged']} averaged"
        if one["share_of_start"] is not None:
            kind += f", share {one['share_of_start']:g}"
        shares = [f"{share:.1%}" for share in (mean(values), max(values), one["top1"])]
        rows.append((one["images"], kind, one["val_images"], *shares, points(one["minus_mean"]), points(one["minus_best"])))
    header = "images | soup | measured on | mean of the runs | best run | soup | soup minus mean | soup minus best"
    return table(header, rows)


def lora() -> str:
    """What full fine-tuning and LoRA reach, each at the best of the learning rates that were tried on held-out images."""
    lines = read("lora.jsonl")
    kept, steps = [row for row in lines if row.get("holdout") == 0.0], {row["recipe"]: row for row in lines if "what" in row}
    rows, words = [], {"full": ("all layers", "times the recipe's"), "lora": ("LoRA, rank 8", "for the changes")}
    for name in dict.fromkeys(row["recipe"] for row in kept):
        own = [row for row in kept if row["recipe"] == name]
        images, probe = own[0]["val_images"], mean(row["linear_probe_top1"] for row in own)
        rows.append((f"`{name}`", "the linear probe", "", f"{probe:.1%} of {images:,}", "", ""))
        for way, lr in dict.fromkeys((row["way"], row["lr"]) for row in own):
            values = [row["top1"] for row in own if (row["way"], row["lr"]) == (way, lr)]
            (label, of), step = words[way], steps[name][way]
            score = f"{mean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f}, {len(values)} seeds)"
            rows.append((f"`{name}`", label, f"{lr:g} {of}", score, f"{32 / step['seconds']:.0f}", f"{step['gib']:.2f}"))
    return table("recipe | what trains | learning rates | top-1 | images/s | GiB", rows)


def inputs(question: str) -> str:
    """The same images, read in two or three ways."""
    kept = [row for row in read("inputs.jsonl") if row["question"] == question]
    rows = []
    for images, way in dict.fromkeys((row["images"], row["way"]) for row in kept):
        own = [row for row in kept if (row["images"], row["way"]) == (images, way)]
        cells = []
        for name in ("top1", "macro_f1", "auroc"):
            values = [row[name] for row in own]
            cells.append(f"{mean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f}, {len(values)} seeds)")
        rows.append((images, way, f"{own[0]['val_images']}", *cells))
    return table("images | read as | measured on | top-1 | macro F1 | AUROC", rows)


def find_lr() -> str:
    """What the range test's steepest point reached."""
    return f"{read('find_lr.json')['top1']:.1%}"
