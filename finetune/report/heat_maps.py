"""Heat maps: which places of an image speak for a class (HiResCAM: Draelos and Carin 2020, arXiv 2011.08891)."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import nn

from finetune.data.decode import to_rgb
from finetune.data.transforms import eval_transform
from finetune.models.batch_norm import eval_mode
from finetune.utils.seed import keep_random_state

TOLERANCE = 1e-3  # of logits that must be another image's, relative to how far those of the two images differ
TRIES = 32  # tensors, the last first; most networks need up to 4
PREFIX_TOKENS = range(9)  # class and register tokens before those of the places, where a network does not say how many
COLOURS, OPACITY = "inferno", 0.65  # of the heat, over the image


class Places(NamedTuple):
    """The tensor of a network that its heat maps are made of: the output of a module's `call`, counted from 0.

    It is [n, C, h, w], [n, h, w, C], or tokens [n, p + h * w, C] of which the first p stand for no place: `layout` is "NCHW",
    "NHWC" or "NLC".
    """

    module: str
    call: int
    layout: str
    grid: tuple[int, int]

    def sum_channels(self, values: torch.Tensor) -> torch.Tensor:
        """Such a tensor's sums over the channels, [n, h, w]."""
        if self.layout == "NLC":
            return values.sum(2)[:, -math.prod(self.grid) :].unflatten(1, self.grid)
        return values.sum(1 if self.layout == "NCHW" else 3)


def heat_maps(net: nn.Module, images: torch.Tensor, classes: torch.Tensor, places: Places | None = None) -> torch.Tensor | None:
    """How much each place speaks for a class: float32 [n, h, w] from 0 to 1, of images [n, 3, H, W] and class indices [n].

    Activation times gradient of the class's logit, summed over channels, where it is positive; 1 is the place of each image
    that speaks most for it. For pooling and a linear layer after it, this is each place's part of the logit. The network is in
    eval mode meanwhile, and afterwards as it was. None for a network without places; `places` spares looking for them again.
    """
    net, images = prepare(net, images)
    places = places or find_places(net, images)
    if places is None:
        return None
    kept: list[torch.Tensor] = []

    def keep(output: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(True)  # from here on: what comes before needs no graph, and a frozen layer is no matter
        kept[:] = output.detach(), torch.zeros_like(output, requires_grad=True)
        return kept[0] + kept[1]

    with eval_mode(net), keep_random_state(), torch.no_grad(), changing(net, places, keep):
        logits = net.forward(images)
        score = logits.gather(1, classes.to(logits.device)[:, None]).sum()  # no image changes another's logits
        (gradient,) = torch.autograd.grad(score, kept[1])
    heat = places.sum_channels(kept[0].float() * gradient.float()).relu()
    return (heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo().tiny)).cpu()


def prepare(net: nn.Module, images: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """The network as it was before torch.compile, whose code runs no hooks, and the images where it computes."""
    own: nn.Module = getattr(net, "_orig_mod", net)
    return own, images.to(next(own.parameters()).device).contiguous()  # a network of a recipe's function may call view


def find_places(net: nn.Module, images: torch.Tensor) -> Places | None:
    """The last tensor with places that is all that the logits see of an image; None if there is none.

    Found by trial on the first image and on noise, in float32: the logits must have a gradient at its places, and with these
    tensors of the two swapped they must be those of the other. So a tensor within a branch is none, nor are the last tokens
    where the class token alone goes on: then it is what the last block is given.
    """
    net, images = prepare(net, images)
    noise = torch.randn(images[:1].shape, generator=torch.Generator().manual_seed(0))
    pair = torch.cat([images[:1], noise.to(images)])
    with eval_mode(net), keep_random_state(), torch.autocast(pair.device.type, enabled=False):
        outputs, logits = outputs_with_places(net, pair)
        with torch.no_grad():
            for places in outputs[: -TRIES - 1 : -1]:
                with changing(net, places, partial(torch.flip, dims=(0,))):
                    swapped = net.forward(pair)
                if (swapped.flip(0) - logits).abs().max() <= TOLERANCE * (logits[0] - logits[1]).abs().max():
                    return places
    return None


def outputs_with_places(net: nn.Module, images: torch.Tensor) -> tuple[list[Places], torch.Tensor]:
    """(modules' outputs with places at which the logits have a gradient, in the order of their calls; the logits).

    What lies within a module that pools, such as the keys of attention pooling, is left out.
    """
    size, calls = (images.shape[2], images.shape[3]), Counter[str]()
    found, grids = list[tuple[Places, torch.Tensor]](), set[tuple[int, int]]()
    own = getattr(net, "num_prefix_tokens", None)  # timm's
    prefixes = [own, *PREFIX_TOKENS] if isinstance(own, int) else PREFIX_TOKENS

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        layout, grid = lay_out(output, size, grids, prefixes)
        calls[name] += 1
        if layout and len(output) == len(images):
            if layout != "NLC":
                grids.add(grid)
            found.append((Places(name, calls[name] - 1, layout, grid), torch.zeros_like(output, requires_grad=True)))
            return output + found[-1][1]
        if lay_out(inputs[0] if inputs else None, size, grids)[0] and inputs[0].shape[1] != 3:
            found[:] = [row for row in found if not row[0].module.startswith(f"{name}.")]
        return None

    hooks = [part.register_forward_hook(partial(record, name)) for name, part in net.named_modules() if name]
    try:
        with torch.enable_grad():
            logits = net.forward(images)
            recorded = [*found]  # checkpointing calls modules again in the backward pass
            weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
            offsets = [offset for _, offset in recorded]
            gradients = torch.autograd.grad((logits * weights).sum(), offsets, allow_unused=True) if offsets else ()
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [(places, gradient) for (places, _), gradient in zip(recorded, gradients, strict=True) if gradient is not None]
    return [places for places, gradient in pairs if places.sum_channels(gradient.abs()).any()], logits.detach()


def lay_out(
    output: Any, size: tuple[int, int], grids: set[tuple[int, int]], prefixes: Sequence[int] = PREFIX_TOKENS
) -> tuple[str, tuple[int, int]]:
    """(layout, grid) of a tensor with places of an image of this size, which the grid is as wide as high as; ("", ...) if none.

    Tokens are laid out in one of the `grids` that were seen before, such as that of the patches, if one has as many.
    """
    none = "", (0, 0)
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        return none
    shape = tuple(output.shape)
    if len(shape) == 4:
        for layout, grid in (("NCHW", (shape[2], shape[3])), ("NHWC", (shape[1], shape[2]))):
            if math.prod(grid) > 1 and has_shape_of(grid, size):
                return layout, grid
    if len(shape) == 3:
        numbers = [shape[1] - prefix for prefix in prefixes if shape[1] - prefix > 1]
        if known := [grid for number in numbers for grid in grids if math.prod(grid) == number]:
            return "NLC", known[0]
        for number in numbers:
            rows = max(1, round(math.sqrt(number * size[0] / size[1])))
            if number % rows == 0 and has_shape_of((rows, number // rows), size):
                return "NLC", (rows, number // rows)
    return none


def has_shape_of(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a grid is as wide as high as an image of this size, but for less than a place."""
    return abs(grid[0] * size[1] - grid[1] * size[0]) < max(size)


@contextmanager
def changing(net: nn.Module, places: Places, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within, the tensor at these places goes on as `change` makes it."""
    calls = Counter[str]()

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls["past"] += 1
        return change(output) if calls["past"] - 1 == places.call else output

    handle = net.get_submodule(places.module).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def overlay(image: Image.Image | np.ndarray, heat: torch.Tensor, preprocessing: dict[str, Any]) -> Image.Image:
    """The image as the network sees it, resized and cropped, with the heat [h, w] over it."""
    seen = as_seen(image, preprocessing)
    heat = heat.detach().float().cpu()[None, None]
    heat = nn.functional.interpolate(heat, seen.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    colours = torch.from_numpy(colormaps[COLOURS](heat.numpy())[..., :3])
    mixed = (1 - OPACITY) * torch.from_numpy(seen) / 255 + OPACITY * colours
    return Image.fromarray((255 * mixed).round().byte().numpy())


def as_seen(image: Image.Image | np.ndarray, preprocessing: dict[str, Any]) -> np.ndarray:
    """The pixels, uint8 [H, W, 3], that the network gets for an image."""
    transform = eval_transform(preprocessing)
    pixels = transform.image(np.asarray(to_rgb(image)) if isinstance(image, Image.Image) else image)
    if pixels.dtype == torch.uint8:
        return np.asarray(pixels)
    mean, std = (torch.tensor(preprocessing[name])[:, None, None] for name in ("mean", "std"))
    return (255 * (pixels * std + mean).clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
