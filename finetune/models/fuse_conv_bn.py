"""Batch norms with fixed statistics, computed within the convolutions before them: the same function in less memory."""

from functools import partial

import torch
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from torch import nn

from finetune.recipe import Recipe

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


def fuse_conv_bn(recipe: Recipe, net: nn.Module) -> list[Pair]:
    """Let each convolution with a batch norm behind it do that norm's part as well; returns these pairs.

    With fixed statistics a norm is a factor and a summand for each channel, and so is a convolution's weight times that factor:
    one pass over the activations less, forward and backward, and none kept for it. Parameters and buffers stay where they are
    and get the same gradients but for rounding. In exchange there are some passes over the weight: not worth it in the last
    layers of a network, where a batch has fewer activations than there are weights.

    Only where the recipe keeps all statistics, in float32, and where the network still says the same afterwards (an outline
    can't be asked): not where a convolution's own output is used elsewhere.
    """
    if recipe.batch_norm != "frozen" or recipe.mixed_precision != "no":
        return []
    net.eval()
    size, some = recipe.data.image_size, next(net.parameters())
    images = torch.linspace(-2, 2, 2 * 3 * size * size, device=some.device, dtype=some.dtype).sin().view(2, 3, size, size)
    with torch.no_grad():
        pairs, before = neighbours(net, images, recipe.data.batch_size)
        for conv, norm in pairs:
            conv.forward, norm.forward = partial(folded, conv, norm), partial(after_norm, norm)  # type: ignore[method-assign]
        if some.is_meta or torch.allclose(net(images), before, rtol=1e-3, atol=1e-3 * before.abs().max().item()):
            return pairs
    unfuse_conv_bn(pairs)
    return []


def unfuse_conv_bn(pairs: list[Pair]) -> None:
    """Have convolutions and norms do their own part again."""
    for pair in pairs:
        for module in pair:
            del module.forward


def neighbours(net: nn.Module, images: torch.Tensor, batch: int) -> tuple[list[Pair], torch.Tensor]:
    """The convolutions and batch norms of which the second takes what the first returns; and what the network says.

    Left out are those with more than half as many weights as activations in a batch of that size.
    """
    made: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    pairs, hooks = [], []

    def meet(norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor, ...]) -> None:
        conv, _ = made.get(id(inputs[0]), (None, None))
        if conv is not None and batch * inputs[0][0].numel() > 2 * conv.weight.numel():
            pairs.append((conv, norm))

    for module in net.modules():
        if type(module) in (nn.Conv2d, Conv2dSame):
            hooks.append(module.register_forward_hook(lambda conv, _, output: made.update({id(output): (conv, output)})))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.affine and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(meet))
    logits = net(images)
    for hook in hooks:
        hook.remove()
    return pairs, logits


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, images: torch.Tensor) -> torch.Tensor:
    """What `norm` in eval mode makes of what `conv` returns."""
    assert norm.running_mean is not None and norm.running_var is not None  # as of those that `neighbours` finds
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, bias = conv.weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor
    if conv.bias is not None:
        bias = bias + conv.bias * factor
    if type(conv) is Conv2dSame:
        return conv2d_same(images, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
    return conv._conv_forward(images, weight, bias)


def after_norm(norm: nn.BatchNorm2d, images: torch.Tensor) -> torch.Tensor:
    """What a norm module does beside norming."""
    return norm.act(norm.drop(images)) if type(norm) is BatchNormAct2d else images
