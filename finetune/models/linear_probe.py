"""The linear probe: the head, fitted to the frozen backbone's features before the first epoch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from finetune.data.loader import is_unreadable
from finetune.models.backbone import head_parameters
from finetune.recipe import Recipe
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError

INSTEAD = "Remove the option, and train the head alone for an epoch first: unfreeze_at=1 for all other groups"


def head_layer(recipe: Recipe, net: nn.Module) -> nn.Linear:
    """The network's new head; raises RecipeError if it is anything but one linear layer with a bias."""
    paths = {name.rpartition(".")[0] for name in head_parameters(recipe, net)}
    layer = net.get_submodule(*paths) if len(paths) == 1 else None
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        found = ", ".join(sorted(paths)) or "unknown"
        raise RecipeError(
            f"linear_probe needs a head that is one linear layer with a bias; that of {to_dict(recipe.backbone)} is "
            f"{found}. {INSTEAD}"
        )
    return layer


def check_probe(recipe: Recipe, net: nn.Module) -> nn.Linear:
    """`head_layer`, once it is sure that a network in eval mode returns what this layer does, and nothing more."""
    layer, size = head_layer(recipe, net), recipe.data.image_size
    image = torch.zeros(1, 3, size, size, device=layer.weight.device)
    try:
        with torch.no_grad(), returns_features(layer):
            shape = tuple(net.eval()(image).shape)
    except Exception:  # from whatever is done with the logits
        shape = ()
    if shape != (1, layer.in_features):
        raise RecipeError(
            f"linear_probe needs a network whose logits are those of its head; {to_dict(recipe.backbone)} does more with them. "
            f"{INSTEAD}"
        )
    return layer


@contextmanager
def returns_features(layer: nn.Linear) -> Iterator[None]:
    """Within, the network returns the input of its head `layer`, [n, features], not its logits."""
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
    """Fit `layer` to features [n, d] and labels: the minimum of the mean loss plus `l2` / 2 times the squared weights.

    `loss(logits, labels)` is a sum over images. The penalty is on the weights, not the bias, for features that are centred and
    divided by one number, so that their variances average 1: one `l2` then serves any network. (Were each variance 1, features
    that hardly vary would get the largest weights.) L-BFGS in float64 finds the only minimum, without a learning rate.

    Raises:
        RecipeError: if the features tell no image from another.
    """
    readable = ~is_unreadable(labels)
    features, labels = features[readable].double(), labels[readable]
    variances, mean = torch.var_mean(features, 0, correction=0)
    scale = variances.mean().sqrt()
    if not scale > 1e-5 * features.abs().max():  # no more than rounding, or not finite
        raise RecipeError(
            "linear_probe: the frozen backbone's features are not finite, or the same for every image; look at its weights and "
            "at the images, or remove the option"
        )
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
