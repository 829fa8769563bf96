"""Write the tables of README.md and docs/ from the kept records.

    python -m benchmarks.docs            # rewrite what stands between <!-- generated: NAME --> and <!-- end -->
    python -m benchmarks.docs --check    # change nothing; exit code 1 if something would change

NAME is a function of `BLOCKS` and its arguments. A table becomes a block of its own, a number stays within its line.
"""

import argparse
import ast
import html
import re
import sys
from pathlib import Path

from benchmarks.tables import (
    ROOT,
    ablation,
    backbones,
    cifar,
    find_lr,
    inputs,
    long_runs,
    lora,
    networks,
    peer,
    peers,
    read,
    recipes,
    resnet18_choices,
    solar_cells,
    soup,
    suggest,
    table,
    top1,
)

BLOCK = re.compile(r"<!-- generated: ([\w ]+) -->.*?<!-- end -->", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something would change")
    args = parser.parse_args()
    stale = {page: new for page in pages() if (new := rewritten(page.read_text())) != page.read_text()}
    for page, new in stale.items():
        print(f"{page.relative_to(ROOT)} {'is not what the records say' if args.check else 'rewritten'}")
        if not args.check:
            page.write_text(new)
    return int(args.check and bool(stale))


def pages() -> list[Path]:
    """What people read, as files."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewritten(text: str) -> str:
    """A page with its blocks made anew."""

    def made(block: re.Match) -> str:
        name, *arguments = block[1].split()
        content = re.sub(r"(\d)%", r"\1 %", BLOCKS[name](*arguments))
        space = "\n\n" if "\n" in content else ""
        return f"<!-- generated: {block[1]} -->{space}{content}{space}<!-- end -->"

    return BLOCK.sub(made, text)


def kills(rows: list[dict] | None = None) -> str:
    """Runs that were killed, resumed and compared with an unbroken one."""
    rows = rows or read("kills.json")["runs"]
    sums = {key: sum(row[key] for row in rows) for key in ("kills", "resumed", "bitwise_equal")}
    lines = [
        (*(row[key] for key in ("killed", "processes", *sums)), row["kills"] - row["bitwise_equal"])
        for row in [*rows, {"killed": "all", "processes": "", **sums}]
    ]
    return table("killed | processes | kills | resumed | bitwise equal | lost", lines)


def killed() -> str:
    """How many killed runs ended with the bits of an unbroken one."""
    rows = read("kills.json")["runs"]
    return f"{sum(row['bitwise_equal'] for row in rows)} of {sum(row['kills'] for row in rows)}"


def powercuts(rows: list[dict] | None = None) -> str:
    """Runs whose power was cut, or whose disk was full, and that went on."""
    rows = rows or read("powercuts.json")
    lines = [(row["what"], row["trials"], row["as unbroken"], row["trials"] - row["as unbroken"]) for row in rows]
    return table("what happens | trials | bitwise equal in the end | lost", lines)


def zoo() -> str:
    """The verdicts on each network."""
    columns = ("one process", "two processes", "onnx", "timm")

    def said(verdict: str) -> str:
        return (
            "-"
            if "is not one of timm's" in verdict
            else html.escape(verdict.replace("|", "/").replace("](", "] ("), quote=False)
        )

    rows = [(f"`{row['network']}`", *(said(row.get(column, "-")) for column in columns)) for row in read("zoo.json")]
    return table("network | one process | two processes | ONNX | timm's folder", rows)


def performance() -> str:
    """The benchmarks, what was required of them, and whether it holds."""
    kept = read("benchmarks.json")
    now, before = kept["now"], kept["before"]

    def holds(benchmark: str, *names: str) -> str:
        return "yes" if all(now[benchmark]["holds"][name] for name in names or now[benchmark]["holds"]) else "no"

    def images(kind: str) -> str:
        row = now["images"][kind]
        return (
            f"{row['ours_us']:.0f} us; timm {row['timm_us']:.0f}, torchvision {row['torchvision_us']:.0f}: "
            f"{row['times_faster']:.1f} times"
        )

    def two_processes(part: dict) -> str:
        return f"{part['scale']['images_per_second']['2'] / part['scale']['images_per_second']['1']:.2f}"

    def of_each(rows: list[dict], key: str, unit: str) -> str:
        return ", ".join(f"{row[key]:.3g}{unit}" for row in (rows[-1], rows[0]))

    few, *_, many = now["scale"]["images"]
    fewest, *_, most_files = now["growth"]["files"]
    _, some, most_classes = now["growth"]["classes"]
    photo = now["images"]["photographs"]
    once = before["scale"]["load_us"]
    rows = [
        ("`images`", "an image of 32 px brought to 128", "5 times faster", f"{before['images']['small_us']} us",
         images("small"), holds("images", "small_5_times_faster")),
        ("`images`", "an image of 300 px cropped to 224", "2 times faster", f"{before['images']['large_us']} us",
         images("large"), holds("images", "large_2_times_faster")),
        ("`images`", "decoding a photograph of 3,000 px for 224, `reduced_decode=2`", "-", "-",
         f"{photo['reduced_us'] / 1000:.0f} ms; whole {photo['ours_us'] / 1000:.0f}, timm {photo['timm_us'] / 1000:.0f}: "
         f"{photo['times_faster']:.1f} times", "-"),
        ("`images`", "the same from `--cache`, in a later run", "-", "-",
         f"{photo['kept_us'] / 1000:.1f} ms: {photo['times_faster_kept']:.0f} times", "-"),
        *(
            (
                "`loop`",
                f"`train()` against a bare loop: {case['case']}, {case['processes']} process{'es' * (case['processes'] > 1)}",
                "0.98 of its images/s",
                f"{old['ratio']:.2f}",
                f"{case['ratio']:.2f}",
                holds("loop", f"{case['case']}, {case['processes']} processes"),
            )
            for old, case in zip(before["loop"]["cases"], now["loop"]["cases"], strict=True)
        ),
        ("`frozen`", "memory while only the head trains, of that of all layers (ResNet-18, 128 px)", "40%",
         f"{before['frozen']['memory_share']:.0%}", f"{now['frozen']['memory_share']:.0%}",
         holds("frozen", "memory_at_most_40_percent")),
        ("`frozen`", "a pass over kept features, against computing them", "10 times faster",
         f"{before['frozen']['times_faster']:.0f} times", f"{now['frozen']['times_faster']:.0f} times",
         holds("frozen", "kept_features_10_times_faster")),
        *(
            ("`frozen_views`", f"an epoch, validation included, in which {what} of ResNet-18 train{s} at 128 px", goal, "-",
             f"{now['frozen_views'][stage]['times_faster']} times", holds("frozen_views", held))
            for stage, what, s, goal, held in (
                ("head", "the head", "s", "10 times faster", "head_10_times_faster"),
                ("head and layer4", "head and layer4", "", "3 times faster", "layer4_3_times_faster"),
            )
        ),
        ("`start`", "`--help`, `finetune ls`, an unknown recipe", "0.5 s", f"{max(before['start']['seconds'].values()):.2f} s",
         f"{max(now['start']['seconds'].values()):.2f} s", holds("start", "commands_under_half_a_second")),
        ("`start`", "the quickstart's first step, after its linear probe", "10 s", f"{before['start']['first_step']:.1f} s",
         f"{now['start']['first_step']:.1f} s", holds("start", "first_step_within_10_s")),
        ("`start`", "validation and checkpoints, of the epochs' time", "10%", f"{sum(before['start']['shares'].values()):.1%}",
         f"{sum(now['start']['shares'].values()):.1%}", holds("start", "validation_and_checkpoints_under_a_tenth")),
        ("`predict`", "`predict --output`, images/s, against a bare loop of loader and network", "0.9", "-",
         f"{now['predict']['share_of_bare']:.2f}", holds("predict", "within_10_percent")),
        ("`predict`", f"memory of {now['predict']['many']:,} images, beyond that of one batch", "50 MiB", "-",
         f"{now['predict']['mib'][str(now['predict']['many'])] - now['predict']['mib']['32']} MiB",
         holds("predict", "memory_constant")),
        ("`scale`", "two processes against one on the same two cores, images/s", "0.95", two_processes(before),
         two_processes(now), holds("scale", "two_processes_not_slower")),
        ("`scale`", "loading an image of 1,000,000, against one of 1,000", "1.2 times the time",
         f"{once['1000000']:.0f} us, {once['1000']:.0f} us", f"{many['load_us']:.0f} us, {few['load_us']:.0f} us",
         holds("scale", "loading_time_flat")),
        ("`growth`", f"a start with {most_files['files']:,} files, against one with {fewest['files']:,}",
         "1.2 times the time a file", of_each(before["growth"]["files"], "us", " us"),
         of_each(now["growth"]["files"], "us", " us"), holds("growth", "start_at_most_linear")),
        ("`growth`", f"the metrics of {most_classes['classes']:,} classes, against those of {some['classes']:,}",
         "1.2 times the time a class", of_each(before["growth"]["classes"], "seconds", " s"),
         of_each(now["growth"]["classes"][1:], "seconds", " s"), holds("growth", "end_at_most_linear")),
        ("`growth`", f"memory of the metrics of {most_classes['classes']:,} classes, beside the logits of 2,000 images", "-",
         f"{before['growth']['classes'][-1]['mib']:,.0f} MiB", f"{most_classes['mib']:,.0f} MiB", "-"),
    ]  # fmt: skip
    return table("benchmark | what | required | before | now | holds", rows)


def gpu() -> str:
    """Images a second on a GPU, of a run and of what feeds the same network otherwise."""
    kept = read("gpu.json")["sections"]
    rows = []
    for one in (row for name, row in kept.items() if name.startswith("speed ")):
        speeds = one["images_per_second"]
        others = [f"{speeds[name]:,} ({one[f'of_{name}']:.2f})" for name in ("resident", "timm_loader", "transformers")]
        rows.append((f"`{one['recipe']}`", f"{speeds['ours']:,}", f"{speeds['our_loader']:,}", *others))
    header = "recipe | a run | its loader alone | batches on the GPU already | timm's loader, bare loop | transformers' Trainer"
    return table(header, rows)


def elsewhere() -> str:
    """What each script of benchmarks/elsewhere asks, and what came of it."""
    rows = []
    for name, found in read("elsewhere.json").items():
        question, how = ast.get_docstring(ast.parse((ROOT / "benchmarks" / "elsewhere" / f"{name}.py").read_text())).split(
            "\n\n"
        )
        theirs = how.replace("\n", " ").removeprefix("Theirs: ").split(" Ours: ")[0].rstrip(".")
        rows.append((question, f"{found['versions']}: {theirs}", found["theirs"], found["ours"]))
    return table("question | elsewhere | what comes of it | here", rows)


def copies() -> str:
    """Copies of images that were planted, and found."""
    rows = []
    for one in read("check.json")["rows"]:
        found, number = sum(one["found"].values()), sum(one["copies"].values())
        rates = [f"{one['found'][kind] / one['copies'][kind]:.0%}" for kind in one["found"]]
        rows.append((one["images"], one["number"], number, *rates, f"{found / one['pairs']:.0%}"))
    kinds = " | ".join(read("check.json")["rows"][0]["copies"])
    return table(f"images | number | copies | {kinds} | planted, of all found", rows)


def copies_farther() -> str:
    """Copies that pixels alone hardly show: found by pixels, and with the network."""
    rows = []
    for one in (row["farther"] | {"images": row["images"]} for row in read("check.json")["rows"]):
        number, found = one["copies"], one["found"]
        rates = [f"{one['found_by_pixels'][kind] / number[kind]:.0%}, {found[kind] / number[kind]:.0%}" for kind in found]
        rows.append((one["images"], sum(number.values()), *rates, f"{sum(found.values()) / max(1, one['pairs']):.0%}"))
    kinds = " | ".join(read("check.json")["rows"][0]["farther"]["copies"])
    return table(f"images | copies | {kinds} | planted, of all found", rows)


def same_files() -> str:
    """What the short form of the check costs at a run's start."""
    one = read("check.json")["rows"][0]
    return f"{1000 * one['start_cpu_seconds']:.0f} ms for {one['number'] + sum(one['copies'].values()):,} files"


def wrong_labels() -> str:
    """Wrong labels that were planted, and found."""
    rows = [
        (
            one["images"],
            one["wrong"],
            f"{one['agreed']:.0%}",
            f"{one['flagged_wrong'] / one['wrong']:.0%}",
            f"{one['flagged_wrong'] / one['flagged']:.0%}",
            f"{one['first_wrong'] / one['wrong']:.0%}",
        )
        for one in read("check.json")["rows"]
    ]
    return table("images | wrong labels | the head agrees with | found | planted, of all found | of the first as many", rows)


def fuzz(what: str) -> str:
    """Damaged files: how many, or how many had an outcome."""
    kept = read("fuzz.json")
    return f"{kept['files'] if what == 'files' else sum(row[what] for row in kept['rows']):,}"


BLOCKS = {
    made.__name__: made
    for made in (
        recipes,
        top1,
        networks,
        cifar,
        resnet18_choices,
        solar_cells,
        ablation,
        peers,
        peer,
        long_runs,
        suggest,
        soup,
        lora,
        inputs,
        find_lr,
        kills,
        killed,
        powercuts,
        zoo,
        backbones,
        performance,
        gpu,
        elsewhere,
        copies,
        copies_farther,
        same_files,
        wrong_labels,
        fuzz,
    )
}

if __name__ == "__main__":
    sys.exit(main())
