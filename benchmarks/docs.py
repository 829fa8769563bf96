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

from benchmarks.performance import cpu, performance, precision, shortfalls
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
    suggest_lrs,
    table,
    top1,
    unfreezing,
    xray_choices,
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
        xray_choices,
        ablation,
        unfreezing,
        peers,
        peer,
        long_runs,
        suggest,
        suggest_lrs,
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
        shortfalls,
        cpu,
        precision,
        gpu,
        elsewhere,
        copies,
        copies_farther,
        wrong_labels,
        fuzz,
    )
}

if __name__ == "__main__":
    sys.exit(main())
