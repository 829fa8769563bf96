"""Which validation images a run's page shows, how it names them, and how small they are."""

import base64
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from finetune.data.channels import kind_of, unchanged
from finetune.data.dataset import ImageList, Images
from finetune.data.loader import is_unreadable
from finetune.images.decode import Colour
from finetune.images.read import as_pil, read_image
from finetune.images.transforms import eval_transform
from finetune.models.saved import load_model
from finetune.optim.loss import binary_losses
from finetune.recipe import Recipe
from finetune.report.heat_maps import find_places, heat_maps, overlay
from finetune.utils.errors import first_line
from finetune.utils.text import print_error, readable
from finetune.utils.urls import as_path

WORST, UNSURE, OF_A_GROUP = 24, 12, 24  # images shown, at the most
MATRIX_CLASSES = 20  # up to which every cell of the confusion matrix has its images; of more, confusions alone
LISTED = 10_000  # images named in all groups together
LARGE, SMALL = 224, 112  # pixels of a picture's longer side: in a gallery, in a group
ROOM, SECONDS = 3_000_000, 15.0  # characters of all pictures together, and the time they may take
HEAT_SECONDS = 10.0  # that heat maps may take
PLACES = 4  # along a side: a heat map of fewer says little
CHUNK = 1000  # images of which the probabilities are in memory at a time


class Group(NamedTuple):
    """Images of one label and one prediction, the highest loss first; with several labels an image either may be None."""

    label: int | None
    guess: int | None
    number: int
    images: list[tuple[int, float]]  # (image, the probability of the class that was predicted, else of the missed one)


class Judged(NamedTuple):
    """What the network made of each validation image, [n] each; of those that could not be read, too."""

    losses: torch.Tensor
    margins: torch.Tensor  # how sure it was, 0 least
    probs: torch.Tensor  # of the class predicted
    guesses: torch.Tensor
    right: torch.Tensor
    seen: torch.Tensor  # whether the image could be read


def probabilities(recipe: Recipe, logits: torch.Tensor) -> torch.Tensor:
    """As `predict` has them: a softmax over the classes, or sigmoids where the loss is binary or multi_label; for NaN, 0."""
    return (logits.softmax(-1) if recipe.loss == "cross_entropy" else logits.sigmoid()).nan_to_num()


def judge(recipe: Recipe, logits: torch.Tensor, labels: torch.Tensor) -> Judged:
    """The loss of each image without label smoothing, how sure the network was, and whether it was right.

    It is sure where the likeliest class is far above the second or, with several labels an image, where each class is far from
    a probability of 0.5.
    """
    parts = [judge_part(recipe, *part) for part in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True)]
    return Judged(*map(torch.cat, zip(*parts, strict=True)))


def judge_part(recipe: Recipe, logits: torch.Tensor, labels: torch.Tensor) -> Judged:
    """The same of some of the images."""
    logits, seen, several = logits.double(), ~is_unreadable(labels), labels.ndim == 2
    labels, probs = labels.clamp(min=0), probabilities(recipe, logits)
    if recipe.loss == "cross_entropy":
        losses = cross_entropy(logits, labels, reduction="none")
    else:
        losses = binary_losses(logits, labels, 0.0, several)
    first, second = probs.topk(2, dim=1).values.unbind(1)
    margins = (probs - 0.5).abs().mean(1) if several else first - second
    guesses = logits.argmax(1)
    right = ((logits > 0) == labels.bool()).all(1) if several else guesses == labels
    return Judged(losses, margins, first, guesses, right & seen, seen)


def worst_mistakes(judged: Judged) -> list[int]:
    """The wrongly predicted images with the highest loss."""
    order = judged.losses.argsort(descending=True, stable=True)
    return order[(judged.seen & ~judged.right)[order]][:WORST].tolist()


def most_unsure(judged: Judged) -> list[int]:
    """The images, rightly predicted or not, of which the network was least sure."""
    order = judged.margins.argsort(stable=True)
    return order[judged.seen[order]][:UNSURE].tolist()


def find_groups(judged: Judged, logits: torch.Tensor, labels: torch.Tensor) -> list[Group]:
    """The groups of images, the largest first: the cells of the confusion matrix; of more classes those off its diagonal.

    With several labels an image, those that lack a class in the prediction, and those that have one too many.
    """
    groups = groups_of_several(logits, labels) if labels.ndim == 2 else groups_of_one(judged, labels, logits.shape[1])
    room, kept = LISTED, []
    for group in sorted(groups, key=lambda group: -group.number):
        kept.append(group._replace(images=group.images[: max(0, room)]))
        room -= len(group.images)
    return kept


def groups_of_one(judged: Judged, labels: torch.Tensor, num_classes: int) -> list[Group]:
    """The groups of one label an image."""
    chosen = judged.seen if num_classes <= MATRIX_CLASSES else judged.seen & ~judged.right
    at = chosen.nonzero().flatten().numpy()
    pairs, losses = (labels * num_classes + judged.guesses).numpy()[at], judged.losses.numpy()[at]
    order = np.lexsort((-losses, pairs))
    found, starts, counts = np.unique(pairs[order], return_index=True, return_counts=True)
    groups = []
    for pair, start, count in zip(found.tolist(), starts.tolist(), counts.tolist(), strict=True):
        images = at[order[start : start + min(count, OF_A_GROUP)]].tolist()
        groups.append(Group(pair // num_classes, pair % num_classes, count, [(i, judged.probs[i].item()) for i in images]))
    return groups


def groups_of_several(logits: torch.Tensor, labels: torch.Tensor) -> list[Group]:
    """The groups of several labels an image: of each class those that were missed, and those that were found too many."""
    groups = []
    for label, (column, truth) in enumerate(zip(logits.unbind(1), labels.unbind(1), strict=True)):
        probs = column.double().sigmoid()
        for missed, wrong in ((True, (truth == 1) & (column <= 0)), (False, (truth == 0) & (column > 0))):
            at = wrong.nonzero().flatten()
            at = at[probs[at].argsort(descending=not missed, stable=True)]
            if len(at):
                images = [(i, probs[i].item()) for i in at[:OF_A_GROUP].tolist()]
                groups.append(Group(label if missed else None, None if missed else label, len(at), images))
    return groups


def thumbnail_order(groups: Sequence[Group]) -> list[int]:
    """The images of the groups in the order in which they get a picture: wrong ones first, and one of each group in turn."""
    ranked = [(group.label == group.guess, rank, i) for group in groups for rank, (i, _) in enumerate(group.images)]
    return list(dict.fromkeys(i for _, _, i in sorted(ranked, key=lambda row: row[:2])))


@dataclass
class Pictures:
    """Small copies of validation images, until their room or their time is used up; what can't be read has none.

    `images` is None where they are not to be had at all.
    """

    images: Images | None
    background: Colour
    room: int = ROOM
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        self.made, self.unreadable = 0, set[int]()
        self.end = time.monotonic() + self.seconds

    def name(self, index: int) -> str:
        """A file with the folder it lies in, or its number in the data set."""
        items = getattr(self.images, "items", None)
        item = items[index] if isinstance(items, Sequence) else None
        return readable("/".join(as_path(item).parts[-2:])) if isinstance(item, str | Path) else f"image {index}"

    def picture(self, index: int, side: int) -> str:
        """An image as a data URL of a JPEG, no larger than `side`; "" without one."""
        image = self.read(index, side) if self.room > 0 and time.monotonic() < self.end else None
        return self.encode(image, side) if image else ""

    def read(self, index: int, side: int) -> Image.Image | None:
        """An image, a large JPEG at a part of its size, for a picture of this side; None if it can't be read."""
        image = self.original(index, side)
        return None if image is None else as_pil(image, self.background)

    def original(self, index: int, side: int) -> Any:
        """The same as the data set has it: an array may be one."""
        if self.images is None:
            return None
        try:
            fast = self.images.read_with(shortest=2 * side) if isinstance(self.images, ImageList) else self.images
            image = fast[index][0]
            as_pil(image, self.background)  # which decodes it
            return image
        except Exception:  # moved, cut, or of whatever a data set of one's own raises
            self.unreadable.add(index)
            return None

    def encode(self, image: Image.Image, side: int) -> str:
        """The same of an image that is in memory."""
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(file := io.BytesIO(), "JPEG", quality=75)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        self.room -= len(url)
        self.made += 1
        return url


def heat_pictures(run: Path, indices: Sequence[int], classes: torch.Tensor, pictures: Pictures) -> dict[int, str]:
    """What speaks for each image's class, as data URLs, as far as the time goes; none of a network without places,
    or with few.

    The network is that of the last epoch, whose predictions the page shows.
    """
    found, end = dict[int, str](), time.monotonic() + HEAT_SECONDS
    if pictures.images is None or not (run / "model").is_dir():
        return found
    try:
        model = load_model(run / "model")
        net, transform, places = model.net, eval_transform(model.preprocessing), None
        for index in indices:
            if time.monotonic() > end or pictures.room <= 0:
                break
            image = pictures.original(index, max(model.preprocessing["input_size"][1:]))
            if image is None:
                continue
            shown, kind = as_pil(image, pictures.background), kind_of(model.preprocessing)
            pixels = read_image(image, unchanged, channels=kind.channels) if kind else np.array(shown)
            batch = transform.batch(transform.image(pixels)[None])
            places = places or find_places(net, batch)
            heat = heat_maps(net, batch, classes[index : index + 1], places) if places else None
            if heat is None or min(heat.shape[1:]) < PLACES:
                break
            found[index] = pictures.encode(overlay(shown, heat[0], model.preprocessing), LARGE)
    except Exception as error:  # of a network of one's own, which may do anything
        print_error(f"no heat maps: {type(error).__name__}: {first_line(error)}")
    return found


def name_classes(labels: torch.Tensor, classes: Sequence[str]) -> str:
    """The name of a label [], or the names of several [classes] of 0 and 1."""
    if labels.ndim == 0:
        return classes[int(labels)]
    return ", ".join(classes[i] for i in labels.nonzero().flatten().tolist()) or "none"


def name_predicted(probs: torch.Tensor, several: bool, classes: Sequence[str], percent: Callable[[float], str]) -> str:
    """The class predicted of an image with its probability; of several labels each above 0.5."""
    at = (probs > 0.5).nonzero().flatten().tolist() if several else [int(probs.argmax())]
    return ", ".join(f"{classes[i]} ({percent(probs[i].item())})" for i in at) or "none"
