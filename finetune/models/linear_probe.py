"""The head alone, fitted before the first epoch to features that the frozen backbone computes once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from finetune.data.loader import is_unreadable
from finetune.models.backbone import head_parameters
from finetune.recipe import Recipe
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError


def head_layer(recipe: Recipe, net: nn.Module) -> nn.Linear:
    """The new head of the network.

    Raises:
        RecipeError: if it is anything but one linear layer.
    """
    paths = {name.rpartition(".")[0] for name in head_parameters(recipe, net)}
    layer = net.get_submodule(*paths) if len(paths) == 1 else None
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        there = ", ".join(sorted(paths)) or "unknown"
        raise RecipeError(
            f"linear_probe needs a head that is one linear layer with a bias; that of {to_dict(recipe.backbone)} is "
            f"{there}. Remove the field, and let the head train alone first: unfreeze_at=1 for all else"
        )
    return layer


@contextmanager
def returns_features(layer: nn.Linear) -> Iterator[None]:
    """Within, the network whose head is `layer` returns what goes into it [N, features], not its logits."""
    hook = layer.register_forward_hook(lambda module, inputs, output: inputs[0])
    try:
        yield
    finally:
        hook.remove()


def fit(
    layer: nn.Linear,
    features: torch.Tensor,
    labels: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    l2: float,
) -> None:
    """Give `layer` the weights with the least mean loss plus `l2` / 2 times their square, for features [n, d] and labels.

    `loss(logits, labels)` is a sum over images. The penalty is on weights for features of mean 0 whose variances average 1, so
    that one value of it serves any network; the bias has none. (With a variance of 1 each, features that hardly ever change
    would get the largest weights.) This has one minimum, so there is no rate to choose:
    L-BFGS in float64 walks to it from 0. It needs 8 bytes a feature and image.
    """
    seen = ~is_unreadable(labels)
    features, labels = features[seen].double(), labels[seen]
    variances, mean = torch.var_mean(features, 0, correction=0)
    scale = variances.mean().sqrt()
    features = (features - mean) / scale
    weight = features.new_zeros(layer.weight.shape, requires_grad=True)
    bias = features.new_zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        objective = loss(features @ weight.T + bias, labels) / len(labels) + l2 / 2 * weight.square().sum()
        objective.backward()
        return objective

    optimizer.step(closure)
    with torch.no_grad():
        layer.weight.copy_(weight / scale)
        layer.bias.copy_(bias - weight @ mean / scale)
