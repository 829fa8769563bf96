"""Transforms: augmentation for training, preprocessing for evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil, floor
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torchvision.transforms import Compose, InterpolationMode, RandomRotation, TrivialAugmentWide
from torchvision.transforms.v2 import functional

from finetune.recipe import Augment, Recipe
from finetune.recipe.data import in_pixels
from finetune.utils.errors import RecipeError

ImageTransform = Callable[[Image.Image], Any]
BLUR = 12  # pixels of a side that timm's Gaussian blur needs: its kernel of 23 reflects them at the edges


class Pixels:
    """timm's basic transforms, faster: crop, resize and flip uint8 images one by one, then normalise the batch.

    From the same seed the results are timm's but for rounding, since timm's pass through PIL. Without `augment`, images are
    preprocessed for evaluation: resized and cropped in the middle. `further`, of timm and torchvision, changes the crop as a
    PIL image.
    """

    def __init__(self, preprocessing: dict[str, Any], augment: Augment | None = None, further: ImageTransform | None = None):
        self.preprocessing, self.augment, self.size = preprocessing, augment, preprocessing["input_size"][1:]
        self.further = further
        self.interpolation = InterpolationMode(preprocessing["interpolation"])
        self.mean, self.std = (255 * torch.tensor(preprocessing[name]) for name in ("mean", "std"))

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        """Pixels [H, W, channels] -> [height, width, channels]: uint8 as they are, others as floats."""
        augment = self.augment
        kind = np.uint8 if pixels.dtype == np.uint8 else np.float32
        pixels = np.require(pixels, kind, "W")  # torch warns of arrays that can't be written to, as Pillow's
        if augment is None:
            height, width = resized_sides(pixels.shape[0], pixels.shape[1], self.preprocessing)
            image = self.resize(pixels, height, width)
            top, left = (whole - part for whole, part in zip((height, width), self.size, strict=True))
            return torch.from_numpy(cut(image.numpy(), (middle(top), middle(left), *self.size), border(self.preprocessing)))
        image = self.resize(random_crop(pixels, augment, self.preprocessing), *self.size)
        if augment.hflip and torch.rand(1) < augment.hflip:
            image = image.flip(1)
        if augment.vflip and torch.rand(1) < augment.vflip:
            image = image.flip(0)
        return torch.from_numpy(np.array(self.further(Image.fromarray(image.numpy())))) if self.further else image

    def resize(self, pixels: np.ndarray, height: int, width: int) -> torch.Tensor:
        """Pixels of another size."""
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return functional.resize_image(image, [height, width], self.interpolation, antialias=True).permute(1, 2, 0)

    def batch(self, images: torch.Tensor) -> torch.Tensor:
        """[n, H, W, channels] -> normalised floats [n, channels, H, W], channels last in memory."""
        rows = images.flatten(2).float()  # [n, H, channels x W]: long rows are what makes this fast
        mean, std = (values.to(images.device).repeat(images.shape[2]) for values in (self.mean, self.std))
        return rows.sub_(mean).div_(std).view(images.shape).permute(0, 3, 1, 2)


class Timm:
    """Any of timm's transforms, which turn one PIL image into normalised floats."""

    def __init__(self, preprocessing: dict[str, Any], transform: ImageTransform):
        self.preprocessing, self.transform = preprocessing, transform

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 pixels [H, W, 3] -> floats [3, size, size]."""
        return self.transform(Image.fromarray(pixels))

    def batch(self, images: torch.Tensor) -> torch.Tensor:
        return images


class RandomCrop:
    """`random_crop` in place of timm's, for images of PIL's."""

    def __init__(self, preprocessing: dict[str, Any], augment: Augment):
        self.preprocessing, self.augment = preprocessing, augment

    def __call__(self, image: Image.Image) -> Image.Image:
        crop = Image.fromarray(random_crop(np.asarray(image), self.augment, self.preprocessing))
        _, height, width = self.preprocessing["input_size"]
        return crop.resize((width, height), str_to_pil_interp(self.preprocessing["interpolation"]))


def resized_sides(height: int, width: int, preprocessing: dict[str, Any]) -> tuple[int, int]:
    """(height, width) to which evaluation resizes an image of these sides, before it takes the middle, as timm does."""
    mode, (_, *sides) = preprocessing["crop_mode"], preprocessing["input_size"]
    high, wide = (floor(side / preprocessing["crop_pct"]) for side in sides)
    if mode == "squash":
        return high, wide
    if mode == "center" and high == wide:  # as torchvision's Resize
        short = min(height, width)
        return int(high * height / short), int(high * width / short)
    ratio = (max if mode == "border" else min)(height / high, width / wide)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def random_crop(pixels: np.ndarray, augment: Augment, preprocessing: dict[str, Any]) -> np.ndarray:
    """A crop of uint8 pixels [H, W, 3], first turned by `rot90`, that is still to be resized; drawn as timm draws it.

    It is drawn from what evaluation shows of an image: from the image, from the image with borders, or from the image as it is
    when squashed to the network's shape. `crop_ratio` is that of the crop as the network sees it.
    """
    if augment.rot90 and torch.rand(1) < augment.rot90:
        pixels = np.rot90(pixels, int(torch.randint(4, (1,))))
    height, width = pixels.shape[:2]
    mode, (_, high, wide) = preprocessing["crop_mode"], preprocessing["input_size"]
    shape = wide / high
    tall, broad = (height, width) if mode == "center" else (max(height, ceil(width / shape)), max(width, ceil(height * shape)))
    canvas = torch.empty(1, 1, 1).expand(3, tall, broad)  # takes no memory
    ratio = tuple(side * shape for side in augment.crop_ratio)
    box = RandomResizedCropAndInterpolation.get_params(canvas, augment.crop_scale, ratio)
    if mode == "border":
        box = box[0] - (tall - height) // 2, box[1] - (broad - width) // 2, *box[2:]
    elif mode == "squash":
        down, across = height / tall, width / broad
        top, left = min(round(box[0] * down), height - 1), min(round(box[1] * across), width - 1)
        box = top, left, max(1, round(box[2] * down)), max(1, round(box[3] * across))
    return cut(pixels, box, border(preprocessing))


def cut(pixels: np.ndarray, box: tuple[int, int, int, int], colour: Sequence[float]) -> np.ndarray:
    """The box (top, left, height, width) of pixels [H, W, channels]; what lies outside of them has the colour."""
    top, left, height, width = box
    inside = pixels[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    if inside.shape[:2] == (height, width):
        return np.ascontiguousarray(inside)
    whole = np.empty((height, width, pixels.shape[2]), pixels.dtype)
    whole[:] = np.rint(colour) if pixels.dtype == np.uint8 else colour
    whole[max(0, -top) :, max(0, -left) :][: inside.shape[0], : inside.shape[1]] = inside
    return whole


def middle(rest: int) -> int:
    """Where a crop begins that leaves `rest` pixels, or one that lacks as many, as timm rounds it."""
    return round(rest / 2) if rest >= 0 else -(-rest // 2)


def border(preprocessing: dict[str, Any]) -> list[float]:
    """The colour of borders, as timm has it: the mean, which normalises to 0; black where none are meant to be."""
    return [255 * value * (preprocessing["crop_mode"] != "center") for value in preprocessing["mean"]]


def mean_colour(preprocessing: dict[str, Any]) -> list[int]:
    """The colour that normalises to 0."""
    return [round(255 * value) for value in preprocessing["mean"]]


def training_transforms(recipe: Recipe, preprocessing: dict[str, Any]) -> list[Pixels | Timm]:
    """`training_transform` of each epoch: one for all, or one for each size."""
    sizes = [recipe.data.shape_of(recipe.sides_in(epoch)) for epoch in range(recipe.epochs)]
    made = {size: training_transform(recipe, preprocessing | {"input_size": size}) for size in dict.fromkeys(sizes)}
    return [made[size] for size in sizes]


def training_transform(recipe: Recipe, preprocessing: dict[str, Any]) -> Pixels | Timm:
    """The augmentation of training images of one size, without the recipe's own function.

    Raises:
        RecipeError: for a policy that timm can't read, and for images that are too small to be blurred.
    """
    augment = replace(recipe.augment, function=None)  # another start method than fork could not send every one
    if "pixels" in preprocessing:  # arrays, for which a recipe asks nothing else
        return Pixels(preprocessing, augment)
    mean, turn = mean_colour(preprocessing), list[ImageTransform]()
    if augment.rotation:
        turn.append(RandomRotation(augment.rotation, InterpolationMode.BILINEAR, fill=mean))
    trivial = augment.auto_augment == "ta_wide"
    if trivial:
        turn.append(TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR, fill=mean))
    _, height, width = preprocessing["input_size"]
    if augment.gaussian_blur_prob and min(height, width) < BLUR:
        raise RecipeError(f"augment: gaussian_blur_prob needs images of {BLUR} px or more, not {in_pixels((height, width))}")
    options = preprocessing | {
        "is_training": True,
        "separate": True,
        "color_jitter": augment.color_jitter or None,
        "scale": augment.crop_scale,
        "ratio": augment.crop_ratio,
        "hflip": augment.hflip,
        "vflip": augment.vflip,
        "auto_augment": None if trivial else augment.auto_augment,
        "grayscale_prob": augment.grayscale_prob,
        "gaussian_blur_prob": augment.gaussian_blur_prob,
        "re_prob": augment.erasing,
        "re_mode": "pixel",
    }
    try:
        (crop, *flips), colours, last = (part.transforms for part in create_transform(**options))
        assert isinstance(crop, RandomResizedCropAndInterpolation)
        Compose(colours)(Image.new("RGB", (width, height)))  # timm 1.0.26 has an AugMix for squares alone
    except (AssertionError, ValueError) as error:
        raise RecipeError(
            f"augment: timm can't read auto_augment={augment.auto_augment!r}, written like 'rand-m9-mstd0.5-inc1', or can't "
            f"apply it at {in_pixels((height, width))} px: {error}"
        ) from error
    if not matches_timm(preprocessing) or augment.erasing:  # which draws noise among normalised floats
        return Timm(preprocessing, Compose([RandomCrop(preprocessing, augment), *flips, *turn, *colours, *last]))
    return Pixels(preprocessing, augment, Compose([*turn, *colours]) if turn or colours else None)


def eval_transform(preprocessing: dict[str, Any]) -> Pixels | Timm:
    """The preprocessing of images for evaluation."""
    return Pixels(preprocessing) if matches_timm(preprocessing) else Timm(preprocessing, create_transform(**preprocessing))


def matches_timm(preprocessing: dict[str, Any]) -> bool:
    """Whether `Pixels` knows how these images are resized."""
    return preprocessing["interpolation"] in ("bilinear", "bicubic")
