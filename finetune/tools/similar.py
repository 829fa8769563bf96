"""Images that are the same, or nearly so: encoded again, resized, mirrored, cropped by a twentieth."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image

SIDE = 32  # pixels of a thumbnail
CROPS = [0.05 * SIDE * i / 3 for i in range(4)]  # what is cut off at the left or the top, of a twentieth in all
Box = tuple[float, float, float, float]
WHOLE: Box = (0, 0, SIDE, SIDE)
BOXES: list[Box] = [WHOLE, *((x, y, x + 0.95 * SIDE, y + 0.95 * SIDE) for x in CROPS for y in CROPS)]
FLAT = 2.0  # standard deviation, of 255 levels, below which an image shows nothing
ALIKE, NEAR = 0.2, 0.015  # 1 - correlation of candidates at 8 x 8 pixels, of near duplicates at 12 x 12
NEIGHBOURS = 10  # candidates for each image
COSINE, CLOSER = 0.8, 0.4  # of features; the distance, of that to the tenth neighbour: sets of look-alikes have none
MOST = 60_000  # images; each is compared with each
Pair = tuple[int, int, float]  # two indices, the lower first, and 1 - correlation


def thumbnail(image: Image.Image) -> np.ndarray:
    """uint8 [32, 32, 3], whatever the image's shape."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def describe(thumbs: Iterable[np.ndarray], size: int, boxes: Sequence[Box] = (WHOLE,)) -> np.ndarray:
    """Unit vectors [n, boxes, d] of colours around their mean: the product of two is their correlation."""
    pixels = [
        [np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box)).ravel() for box in boxes]
        for image in map(Image.fromarray, thumbs)
    ]
    vectors = np.array(pixels, np.float32)
    vectors -= vectors.mean(2, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-6)


def same_pairs(digests: Sequence[bytes], order: Iterable[int]) -> list[Pair]:
    """Each image whose digest one before it has, in this order, with the first that has it."""
    first: dict[bytes, int] = {}
    pairs = [(first.setdefault(digests[i], i), i) for i in order]
    return [(min(pair), max(pair), 0.0) for pair in pairs if pair[0] != pair[1]]


def near_pairs(thumbs: Sequence[np.ndarray]) -> list[Pair]:
    """Pairs of thumbnails that are nearly the same, the nearest first; of flat ones, which show nothing, there are none.

    The whole of one is compared with the whole, and with 16 crops, of the other; so is its mirror image.
    """
    shown = [i for i, thumb in enumerate(thumbs) if thumb.std((0, 1)).max() >= FLAT]
    if len(shown) < 2:
        return []
    kept = np.stack([thumbs[i] for i in shown])
    candidates = candidate_pairs(kept)
    used = sorted({i for pair in candidates for i in pair})
    place = {i: at for at, i in enumerate(used)}
    crops, mirrored = describe(kept[used], 12, BOXES).astype(np.float16), describe(kept[used][:, :, ::-1], 12)[:, 0]
    found = []
    for i, j in candidates:
        a, b = place[i], place[j]
        correlation = max(
            float((crops[one].astype(np.float32) @ whole).max())
            for one, other in ((a, b), (b, a))
            for whole in (crops[other, 0].astype(np.float32), mirrored[other])
        )
        if 1 - correlation <= NEAR:
            found.append((shown[i], shown[j], round(max(0.0, 1 - correlation), 4)))
    return sorted(found, key=lambda pair: pair[2])


def candidate_pairs(thumbs: np.ndarray) -> list[tuple[int, int]]:
    """Pairs that may be nearly the same: of each thumbnail, the nearest, mirrored or not."""
    whole, mirrored = (describe(each, 8)[:, 0] for each in (thumbs, thumbs[:, :, ::-1]))
    pairs, most = set(), min(NEIGHBOURS, len(thumbs) - 1)
    for start in range(0, len(whole), 500):
        alike = np.maximum(whole[start : start + 500] @ whole.T, mirrored[start : start + 500] @ whole.T)
        rows = np.arange(len(alike))
        alike[rows, start + rows] = -1
        nearest = np.argpartition(-alike, most - 1)[:, :most]
        for row, column in zip(*np.nonzero(np.take_along_axis(alike, nearest, 1) >= 1 - ALIKE), strict=True):
            i, j = start + int(row), int(nearest[row, column])
            pairs.add((min(i, j), max(i, j)))
    return sorted(pairs)


def alike_pairs(features: torch.Tensor) -> list[Pair]:
    """Pairs whose features [n, d] are far closer to each other than to their tenth neighbours, the nearest first.

    A network sees what pixels don't show: copies that were turned a little, cropped more, or have other colours.
    """
    units = torch.nn.functional.normalize(features.float() - features.float().mean(0))
    if len(units) <= NEIGHBOURS:
        return []
    nearest = [(part @ units.T).topk(NEIGHBOURS + 1) for part in units.split(1000)]  # the first is itself
    cosines, others = (torch.cat(rows)[:, 1:].numpy() for rows in zip(*nearest, strict=True))
    tenth = 1 - cosines[:, -1]
    pairs = {}
    for i, k in zip(*np.nonzero(cosines >= COSINE), strict=True):
        j, distance = int(others[i, k]), 1 - float(cosines[i, k])
        if distance <= CLOSER * min(tenth[i], tenth[j]):
            pairs[min(int(i), j), max(int(i), j)] = round(distance, 4)
    return sorted(((i, j, distance) for (i, j), distance in pairs.items()), key=lambda pair: pair[2])


def without(pairs: Iterable[Pair], digests: Sequence[bytes]) -> list[Pair]:
    """The pairs whose images have not the same digest."""
    return [pair for pair in pairs if digests[pair[0]] != digests[pair[1]]]
