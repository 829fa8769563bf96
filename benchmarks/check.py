"""How much of what is planted `finetune check` finds: copies of images that were changed, and wrong labels.

    python -m benchmarks.check --cifar DIR

DIR has CIFAR-10 as JPEG in class folders; digits come with scikit-learn. Copies of a fifth of the images are planted at random,
in the other part of the split and under other labels: encoded again, resized, cropped by a twentieth, mirrored. In another copy
of the set 5 % of the labels are wrong. What is found and was not planted counts as wrong, although sets have such of their own.
"""

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from finetune.data.dataset import note_same_files
from finetune.data.sources import load_data
from finetune.recipe.recipe import minimal_recipe
from finetune.tools.check import check

KINDS = ("encoded again", "resized", "cropped", "mirrored")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrong", type=float, default=0.05, help="share of labels")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "digits")
        for name, source in (("CIFAR-10, JPEG copy", args.cifar), ("digits", Path(folder) / "digits")):
            draw = random.Random(args.seed)
            rows.append({"images": name, **planted_copies(source, draw), **planted_labels(source, draw, args.wrong)})
            print(json.dumps(rows[-1]), file=sys.stderr)
    print(json.dumps({"seed": args.seed, "rows": rows}))
    return 0


def write_digits(root: Path) -> None:
    """scikit-learn's digits as class folders of PNGs."""
    scans = load_digits()
    for i, (pixels, label) in enumerate(zip(scans.images, scans.target, strict=True)):
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(folder / f"{i}.png")


def classes_in(root: Path) -> dict[str, list[Path]]:
    """The files of each class folder, by the folder's path below the root."""
    folders = sorted({path.parent for path in root.rglob("*.*")})
    return {str(folder.relative_to(root)): sorted(folder.iterdir()) for folder in folders}


def changed(image: Image.Image, kind: str, draw: random.Random) -> tuple[Image.Image, str]:
    """The image, changed, and the ending to save it with."""
    width, height = image.size
    if kind == "resized":
        return image.resize((max(4, width * 3 // 4), max(4, height * 3 // 4)), Image.Resampling.BICUBIC), "png"
    if kind == "cropped":
        x, y = (draw.uniform(0, 0.05 * side) for side in image.size)
        return image.resize(image.size, Image.Resampling.BICUBIC, (x, y, x + 0.95 * width, y + 0.95 * height)), "png"
    if kind == "mirrored":
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "png"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return Image.open(buffer), "bmp"


def planted_copies(source: Path, draw: random.Random) -> dict:
    """Recall of each kind of copy, and how many of the pairs that are found were planted."""
    with tempfile.TemporaryDirectory() as folder:
        root = shutil.copytree(source, Path(folder) / "set")
        members = classes_in(root)
        files = [path for paths in members.values() for path in paths]
        planted = {}
        for i, path in enumerate(draw.sample(files, len(files) // 5)):
            kind = KINDS[i % len(KINDS)]
            image, ending = changed(Image.open(path).convert("RGB"), kind, draw)
            target = root / draw.choice(list(members)) / f"planted{i}.{ending}"
            image.save(target)
            planted[path, target] = kind
        start = time.process_time()
        images, findings, _ = check(str(root), weights="none")
        seconds = time.process_time() - start
        pairs = {tuple(str(root / images.names[i]) for i in one.images) for one in findings if len(one.images) == 2}
        data = load_data(minimal_recipe("resnet18", str(root), 32))
        start = time.process_time()
        note_same_files(data, "")
        short = time.process_time() - start
    hit = {pair: {str(path) for path in pair} in [set(found) for found in pairs] for pair in planted}
    rates = {kind: sum(hit[pair] for pair in planted if planted[pair] == kind) for kind in KINDS}
    number = {kind: sum(one == kind for one in planted.values()) for kind in KINDS}
    return {
        "number": len(files),
        "copies": number,
        "found": rates,
        "pairs": len(pairs),
        "cpu_seconds": round(seconds, 1),
        "start_cpu_seconds": round(short, 3),
    }


def planted_labels(source: Path, draw: random.Random, share: float) -> dict:
    """How many wrong labels are found, and how many of those that are found were planted: of all, and of the first so many."""
    with tempfile.TemporaryDirectory() as folder:
        root = shutil.copytree(source, Path(folder) / "set")
        members, planted = classes_in(root), set()
        files = [(name, path) for name, paths in members.items() for path in paths]
        for name, path in draw.sample(files, round(share * len(files))):
            part = name.rpartition("/")[0]
            other = draw.choice([one for one in members if one != name and one.rpartition("/")[0] == part])
            planted.add(str(path.rename(root / other / f"wrong-{path.parent.name}-{path.name}")))
        images, findings, facts = check(str(root))
    found = [str(root / images.names[one.images[0]]) for one in findings if one.kind == "label"]
    return {
        "wrong": len(planted),
        "flagged": len(found),
        "flagged_wrong": len(planted & {*found}),
        "first_wrong": len(planted & {*found[: len(planted)]}),
        "agreed": round(facts["agreed"], 4),
    }


if __name__ == "__main__":
    sys.exit(main())
