"""How much of what is planted `finetune check` finds: copies of images that were changed, and wrong labels.

    python -m benchmarks.check --cifar DIR

DIR has CIFAR-10 as JPEG in class folders; digits come with scikit-learn. Copies of a fifth of the images are planted at random,
in the other part of the split and under other labels: encoded again, resized, cropped by a twentieth, mirrored; then, for the
features of the installed network, others: turned by 5 degrees, cropped by a tenth, faded. In another copy of the set 5 % of
the labels are wrong. What is found and was not planted counts as wrong, although sets have such of their own.
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

from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits

from finetune.tools.check import check

KINDS = ("encoded again", "resized", "cropped", "mirrored")
FARTHER = ("turned", "cropped by a tenth", "faded")  # what pixels alone don't show


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, metavar="DIR")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="class folders of photographs: a third set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrong", type=float, default=0.05, help="share of labels")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "digits")
        sets = {"CIFAR-10, JPEG copy": args.cifar, "digits": Path(folder) / "digits"}
        for name, source in (sets | ({"photographs": args.photos} if args.photos else {})).items():
            draw = random.Random(args.seed)
            copies = planted_copies(source, draw, KINDS, "none") | planted_labels(source, draw, args.wrong)
            rows.append({"images": name, **copies, "farther": planted_copies(source, draw, FARTHER, None)})
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
    if kind == "turned":
        return image.rotate(5, Image.Resampling.BICUBIC), "png"
    if kind == "cropped by a tenth":
        x, y = (draw.uniform(0, 0.1 * side) for side in image.size)
        return image.resize(image.size, Image.Resampling.BICUBIC, (x, y, x + 0.9 * width, y + 0.9 * height)), "png"
    if kind == "faded":
        return ImageEnhance.Color(image).enhance(0.4), "png"
    if kind == "mirrored":
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "png"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return Image.open(buffer), "bmp"


def planted_copies(source: Path, draw: random.Random, kinds: tuple[str, ...], weights: str | None) -> dict:
    """Recall of each kind of copy, by pixels and in all, and how many of the pairs that are found were planted."""
    with tempfile.TemporaryDirectory() as folder:
        root = shutil.copytree(source, Path(folder) / "set")
        members = classes_in(root)
        files = [path for paths in members.values() for path in paths]
        planted = {}
        for i, path in enumerate(draw.sample(files, len(files) // 5)):
            kind = kinds[i % len(kinds)]
            image, ending = changed(Image.open(path).convert("RGB"), kind, draw)
            target = root / draw.choice(list(members)) / f"planted{i}.{ending}"
            image.save(target)
            planted[path, target] = kind
        start = time.process_time()
        images, findings, _ = check(str(root), weights=weights)
        seconds = time.process_time() - start
        pairs = {frozenset(str(root / images.names[i]) for i in one.images): one for one in findings if len(one.images) == 2}
    found = {kind: [0, 0] for kind in kinds}  # by pixels, by the network alone
    for pair, kind in planted.items():
        if one := pairs.get(frozenset(map(str, pair))):
            found[kind][one.kind.startswith("alike")] += 1
    return {
        "number": len(files),
        "copies": {kind: sum(one == kind for one in planted.values()) for kind in kinds},
        "found": {kind: sum(number) for kind, number in found.items()},
        "found_by_pixels": {kind: number[0] for kind, number in found.items()},
        "pairs": len(pairs),
        "cpu_seconds": round(seconds, 1),
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
