"""The table that recipe resnet18_steel reads: how much of each image of NEU-DET its defects' boxes cover, in percent.

    python -m benchmarks.steel DIR

DIR holds NEU-DET (Song and Yan 2013): IMAGES/*.jpg and ANNOTATIONS/*.xml, as Pascal VOC writes them, and, if there,
Validation_Images and Validation_Annotations. The table is DIR/steel.csv; its subgroups are the kinds of defects.
"""

import argparse
import csv
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

PARTS = (("IMAGES", "ANNOTATIONS"), ("Validation_Images", "Validation_Annotations"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    with open(folder / "steel.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "label_covered", "subgroup"])
        for images, annotations in PARTS:
            for boxes in sorted((folder / annotations).glob("*.xml")):
                kind = boxes.stem.rpartition("_")[0]  # scratches_12
                table.writerow([f"{images}/{boxes.stem}.jpg", f"{100 * covered(boxes):.3f}", kind])
    print(folder / "steel.csv")
    return 0


def covered(file: Path) -> float:
    """The share of an image that the boxes of its annotation cover together."""
    root = ElementTree.parse(file).getroot()
    width, height = (int(root.findtext(f"size/{name}")) for name in ("width", "height"))
    mask = np.zeros((height, width), bool)
    for box in root.iter("bndbox"):
        left, top, right, bottom = (int(box.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax"))
        mask[top:bottom, left:right] = True
    return float(mask.mean())


if __name__ == "__main__":
    sys.exit(main())
