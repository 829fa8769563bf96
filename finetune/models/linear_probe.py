"""The linear probe: the head, fitted to the frozen backbone's features before the first epoch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.nn.functional import linear

from finetune.data.loader import is_unreadable
from finetune.models.backbone import head_parameters
from finetune.models.sharding import laid_out_like
from finetune.recipe import Recipe
from finetune.recipe.serialize import to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.seed import keep_random_state, seed_all

PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # values of l2 to choose from
NUM_FOLDS = 3
Head = tuple[torch.Tensor, torch.Tensor]  # weight and bias, before they are a layer's
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of logits and labels: a sum over images
INSTEAD = "Remove the option, and train the head alone for an epoch first: unfreeze_at=1 for all other groups"


def head_layer(recipe: Recipe, net: nn.Module) -> nn.Linear:
    """The network's new head; raises RecipeError if it is anything but one linear layer with a bias."""
    paths = {name.rpartition(".")[0] for name in head_parameters(recipe, net)}
    layer = net.get_submodule(*paths) if len(paths) == 1 else None
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        found = ", ".join(f"{path} ({type(net.get_submodule(path)).__name__})" for path in sorted(paths)) or "unknown"
        raise RecipeError(
            f"linear_probe needs a head that is one linear layer with a bias; that of {to_dict(recipe.backbone)} is "
            f"{found}. {INSTEAD}"
        )
    return layer


def check_probe(recipe: Recipe, net: nn.Module) -> nn.Linear:
    """`head_layer`, once it is sure that a network in eval mode returns what this layer does, and nothing more.

    Of a network on torch's meta device, which has no values, the shape alone is known.
    """
    layer = head_layer(recipe, net)
    weight = torch.randn(layer.out_features, layer.in_features, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-100, 100, layer.out_features)  # so far apart that a limit on logits shows

    def other_head(features: torch.Tensor) -> torch.Tensor:
        return linear(features, weight.to(features), bias.to(features))

    outputs = []
    with keep_random_state(), torch.no_grad():
        image = torch.rand(1, *recipe.data.shape).to(layer.weight.device)
        try:
            for head in (nn.Identity(), other_head):
                seed_all("probe")
                with computes(layer, head):
                    outputs.append(net.eval()(image))
            features, logits = outputs
            fits = features.shape == (1, layer.in_features) and logits.shape == (1, layer.out_features)
            if fits and not layer.weight.is_meta:
                wanted = other_head(features)
                fits = not (logits - wanted).abs().max() > 1e-3 * wanted.abs().max()  # what is not finite `fit` refuses
        except Exception:  # from whatever is done with the logits
            fits = False
    if not fits:
        raise RecipeError(
            f"linear_probe needs a network whose logits are those of its head; {to_dict(recipe.backbone)} does more with them. "
            f"{INSTEAD}"
        )
    return layer


@contextmanager
def computes(layer: nn.Linear, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within, the layer returns this function of its input."""
    hook = layer.register_forward_hook(lambda module, inputs, output: function(inputs[0]))
    try:
        yield
    finally:
        hook.remove()


def returns_features(layer: nn.Linear) -> AbstractContextManager[None]:
    """Within, the network returns the input of its head `layer`, [n, features], not its logits."""
    return computes(layer, nn.Identity())


def fit(layer: nn.Linear, features: torch.Tensor, labels: torch.Tensor, loss: Loss, l2: float | None, views: int = 1) -> float:
    """Fit `layer` to features [n, d] and labels: the minimum of the mean loss plus `l2` / 2 times the squared weights.

    `loss(logits, labels)` is a sum over images. The penalty is on the weights, not the bias, for features that are centred and
    divided by one number, so that their variances average 1: one `l2` then serves any network. (Were each variance 1, features
    that hardly vary would get the largest weights.) Without an `l2`, `choose_l2` does; features then have `views` equal parts,
    one for each view of the same images. Returns the `l2`.

    Raises:
        RecipeError: if the features tell no image from another.
    """
    images = torch.arange(len(labels), device=labels.device) % (len(labels) // views)
    readable = ~is_unreadable(labels)
    features, labels, images = features[readable].double(), labels[readable], images[readable]
    variances, mean = torch.var_mean(features, 0, correction=0)
    scale = variances.mean().sqrt()
    if not scale > 1e-5 * features.abs().max():  # no more than rounding, or not finite
        alike = bool(features.isfinite().all())
        fault = "the same for every image: look whether these are alike, or" if alike else "not finite: look"
        raise RecipeError(f"linear_probe: the frozen backbone's features are {fault} at its weights; or remove the option")
    features = (features - mean) / scale
    if l2 is None:
        l2 = choose_l2(features, labels, images, loss, layer.out_features)
    head = new_head(features, layer.out_features)
    minimise(head, features, labels, loss, l2, tolerance=1e-8)
    with torch.no_grad():
        weight, bias = head
        layer.weight.copy_(laid_out_like(layer.weight, weight / scale))
        layer.bias.copy_(laid_out_like(layer.bias, bias - weight @ mean / scale))
    return l2


def choose_l2(features: torch.Tensor, labels: torch.Tensor, images: torch.Tensor, loss: Loss, num_outputs: int) -> float:
    """The penalty of `PENALTIES` with the lowest loss on images left out of the fit, in three folds, each with every class.

    From the strongest on, each fit goes on from the one before, until the loss rises: about the time of one exact fit. All
    views of an image, those with the same number in `images`, are in one fold.
    """
    folds, features = make_folds(labels, images), features.float()
    heads = [new_head(features, num_outputs) for _ in range(NUM_FOLDS)]
    losses: list[float] = []
    for l2 in PENALTIES:
        losses.append(0.0)
        for fold, head in enumerate(heads):
            left_out = folds == fold
            minimise(head, features[~left_out], labels[~left_out], loss, l2, tolerance=1e-3)
            with torch.no_grad():
                losses[-1] += loss(predict(head, features[left_out]), labels[left_out]).item()
        if losses[-1] > min(losses):
            break
    return PENALTIES[losses.index(min(losses))]


def make_folds(labels: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The fold of each row, [n]: the same for all views of an image, the classes dealt out evenly."""
    order = torch.randperm(int(images.max()) + 1, generator=torch.Generator().manual_seed(0)).to(images.device)
    if labels.ndim == 1:  # one label an image: sort by class
        label_of = labels.new_zeros(len(order)).index_copy(0, images, labels)
        order = order[label_of[order].argsort(stable=True)]
    folds = torch.empty_like(order)
    folds[order] = torch.arange(len(order), device=order.device) % NUM_FOLDS
    return folds[images]


def new_head(features: torch.Tensor, num_outputs: int) -> Head:
    """A weight [outputs, d] and a bias [outputs] of zeros, which train."""
    weight = features.new_zeros(num_outputs, features.shape[1], requires_grad=True)
    return weight, features.new_zeros(num_outputs, requires_grad=True)


def predict(head: Head, features: torch.Tensor) -> torch.Tensor:
    """Logits [n, outputs] of features [n, d]."""
    weight, bias = head
    return features @ weight.T + bias


def minimise(head: Head, features: torch.Tensor, labels: torch.Tensor, loss: Loss, l2: float, tolerance: float) -> None:
    """Go on to the only minimum, by L-BFGS, which needs no learning rate, until no gradient is above `tolerance`."""
    optimizer = torch.optim.LBFGS(
        head, max_iter=500, tolerance_grad=tolerance, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        objective = loss(predict(head, features), labels) / len(labels) + l2 / 2 * head[0].square().sum()
        objective.backward()
        return objective

    optimizer.step(closure)
