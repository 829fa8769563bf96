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
from torch.autograd.graph import Node

from finetune.data.channels import kind_of
from finetune.images.decode import to_rgb
from finetune.images.read import as_pil
from finetune.images.transforms import eval_transform
from finetune.models.batch_norm import eval_mode
from finetune.utils.seed import keep_random_state

AT_ONCE = 32  # images
CANCELLED = 1e-3  # of what is added up: a sum of so little is rounding
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
    parts = zip(images.split(AT_ONCE), classes.split(AT_ONCE), strict=True)
    with eval_mode(net), keep_random_state():
        heat = torch.cat([contributions(net, *part, places).relu() for part in parts])
    return (heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo().tiny)).cpu()


def contributions(net: nn.Module, images: torch.Tensor, classes: torch.Tensor, places: Places) -> torch.Tensor:
    """Activation times gradient of the class's logit at the places, summed over channels: float32 [n, h, w], of any sign."""
    kept: list[torch.Tensor] = []

    def keep(output: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(True)  # from here on: what comes before needs no graph, and a frozen layer is no matter
        kept[:] = output.detach().clone(), torch.zeros_like(output, requires_grad=True)
        return kept[0] + kept[1]

    with torch.no_grad(), changing(net, places, keep):
        logits = net.forward(images)
        score = logits.gather(1, classes.to(logits.device)[:, None]).sum()  # no image changes another's logits
        (gradient,) = torch.autograd.grad(score, kept[1])
    return places.sum_channels(kept[0].float() * gradient.float())


def prepare(net: nn.Module, images: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """The network as it was before torch.compile, whose code runs no hooks, and the images where it computes."""
    own: nn.Module = getattr(net, "_orig_mod", net)
    return own, images.to(next(own.parameters(), images).device).contiguous()  # a network of a recipe's function may call view


class Output(NamedTuple):
    """A module's output with places, the zeros that were added to it, whose gradient is its own, and its node in the graph.

    `pooled`: it lies within a module that pools, as the keys of attention pooling do.
    """

    places: Places
    value: torch.Tensor
    offset: torch.Tensor
    node: Node | None
    pooled: bool = False


def find_places(net: nn.Module, images: torch.Tensor) -> Places | None:
    """The last tensor with places that is all that the logits see of an image, or what a norm makes of it; None without one.

    Found by trial on the first image: the logits have a gradient at its places, and no way in autograd's graph leads from them
    to the image past it. So a tensor within a branch is none, nor are the last tokens where the class token alone goes on,
    which leaves those of the patches without a gradient: then it is what the last block is given.

    A norm of each token hides how long it is, so that activation times gradient adds up to 0 over the channels of what the norm
    is given (Euler's theorem). As blocks begin with one, it is then what this norm returns.
    """
    net, images = prepare(net, images)
    autocast = torch.autocast(images.device.type, enabled=False)
    with eval_mode(net), keep_random_state(), torch.enable_grad(), autocast:
        image = images[:1] + torch.zeros_like(images[:1], requires_grad=True)
        outputs, logits = outputs_with_places(net, image)
        # Not their plain sum, which has no gradient where logits add up to a constant.
        score = (logits * torch.linspace(1, 2, logits.numel(), device=logits.device)).sum()
        offsets = [output.offset for output in outputs]
        gradients = torch.autograd.grad(score, offsets, retain_graph=True, allow_unused=True) if offsets else ()
    with_gradient = [
        (output, output.value * gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and output.places.sum_channels(gradient.abs()).any()
    ]
    for last in reversed(range(len(with_gradient))):
        output = with_gradient[last][0]
        if not output.pooled and not leads_to(score.grad_fn, image.grad_fn, past=output.node):
            break
    else:
        return None
    for (places, *_), products in with_gradient[last:]:
        whole, apart = places.sum_channels(products).abs().sum(), places.sum_channels(products.abs()).sum()
        if whole > CANCELLED * apart:
            return places
    return None


def outputs_with_places(net: nn.Module, images: torch.Tensor) -> tuple[list[Output], torch.Tensor]:
    """(modules' outputs with places in the order in which they return, the logits)."""
    size, calls = (images.shape[2], images.shape[3]), Counter[str]()
    found, grids = list[Output](), set[tuple[int, int]]()
    own = getattr(net, "num_prefix_tokens", None)  # timm's
    prefixes = [own, *PREFIX_TOKENS] if isinstance(own, int) else PREFIX_TOKENS

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        layout, grid = lay_out(output, size, grids, prefixes)
        calls[name] += 1
        if layout and len(output) == len(images):
            if layout != "NLC":
                grids.add(grid)
            offset = torch.zeros_like(output, requires_grad=True)
            changed: torch.Tensor = output + offset
            places = Places(name, calls[name] - 1, layout, grid)
            found.append(Output(places, output.detach(), offset, changed.grad_fn))
            return changed
        if lay_out(inputs[0] if inputs else None, size, grids)[0] and inputs[0].shape[1] != 3:
            found[:] = [one._replace(pooled=one.pooled or one.places.module.startswith(f"{name}.")) for one in found]
        return None

    hooks = [part.register_forward_hook(partial(record, name)) for name, part in net.named_modules() if name]
    try:
        logits = net.forward(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [*found], logits  # checkpointing calls modules again in the backward pass


def leads_to(start: Node | None, end: Node | None, past: Node | None) -> bool:
    """Whether a way in autograd's graph leads from one node to another without the node `past`."""
    ahead, seen = [start], {past, None}
    while ahead:
        node = ahead.pop()
        if node is end and end is not None:
            return True
        if node not in seen and node is not None:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
    return False


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
    if kind_of(preprocessing):  # the picture of an array has three channels
        preprocessing = {**preprocessing, **dict.fromkeys(("mean", "std"), (0.5, 0.5, 0.5))}
    pixels = eval_transform(preprocessing).image(np.array(to_rgb(image) if isinstance(image, Image.Image) else image))
    return blend(pixels if pixels.dtype == torch.uint8 else to_pixels(pixels, preprocessing), heat)


def to_pixels(normalised: torch.Tensor, preprocessing: dict[str, Any]) -> torch.Tensor:
    """What a network gets for an image, [channels, H, W], as pixels to look at, uint8 [H, W, 3]."""
    mean, std = (torch.tensor(preprocessing[name])[:, None, None] for name in ("mean", "std"))
    values = 255 * (normalised.float().cpu() * std + mean).permute(1, 2, 0)
    if kind := kind_of(preprocessing):
        values = values.round().clamp(0, 255).byte() if kind.dtype == "uint8" else values
        return torch.from_numpy(np.array(as_pil(values.numpy())))
    return values.clamp(0, 255).round().byte()


def blend(pixels: torch.Tensor, heat: torch.Tensor) -> Image.Image:
    """An image of these pixels, uint8 [H, W, 3], with the heat [h, w] over it."""
    heat = heat.detach().float().cpu()[None, None]
    heat = nn.functional.interpolate(heat, pixels.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    colours = torch.from_numpy(colormaps[COLOURS](heat.numpy())[..., :3])
    mixed = (1 - OPACITY) * pixels / 255 + OPACITY * colours
    return Image.fromarray((255 * mixed).round().byte().numpy())
