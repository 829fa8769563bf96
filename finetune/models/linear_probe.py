"""The head: fitted to the frozen backbone's features before the first epoch, and, of numbers, in the labels' own units."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import numpy as np
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
RIDGE_PENALTIES = tuple(10.0**-exponent for exponent in range(-3, 7))  # of numbers, where each costs next to nothing
NUM_FOLDS = 3
Head = tuple[torch.Tensor, torch.Tensor]  # weight and bias, before they are a layer's
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of logits and labels: a sum over images


class Units(NamedTuple):
    """The mean and the standard deviation of the training images' numbers, [numbers] each, by which they are standardised."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    lowest: tuple[float, ...] = ()  # and highest: of grades, whose predictions stay between them
    highest: tuple[float, ...] = ()


def needs_head(recipe: Recipe) -> tuple[str, str]:
    """(what in the recipe needs to know the head, what to do where it is not of that kind)."""
    if recipe.of_numbers:
        return f"loss='{recipe.loss}'", "Name another backbone, or a function's last layer: head='fc'"
    return "linear_probe", "Remove the option, and train the head alone for an epoch first: unfreeze_at=1 for all other groups"


def head_layer(recipe: Recipe, net: nn.Module) -> nn.Linear:
    """The network's new head; raises RecipeError if it is anything but one linear layer with a bias."""
    paths = {name.rpartition(".")[0] for name in head_parameters(recipe, net)}
    layer = net.get_submodule(*paths) if len(paths) == 1 else None
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        found = ", ".join(f"{path} ({type(net.get_submodule(path)).__name__})" for path in sorted(paths)) or "unknown"
        what, instead = needs_head(recipe)
        raise RecipeError(
            f"{what} needs a head that is one linear layer with a bias; that of {to_dict(recipe.backbone)} is "
            f"{found}. {instead}"
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
        what, instead = needs_head(recipe)
        raise RecipeError(
            f"{what} needs a network whose logits are those of its head; {to_dict(recipe.backbone)} does more with "
            f"them. {instead}"
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


def standardise(recipe: Recipe, net: nn.Module, labels: np.ndarray, names: Sequence[str]) -> None:
    """Let the head of a network that learns numbers have its output in their own units.

    Its weights learn them standardised, by the mean and deviation of the training images' `labels`, [n, numbers] or [n].

    Raises:
        RecipeError: for a number that is the same, or nearly, in all of them.
    """
    table = labels.reshape(len(labels), -1).astype(float)
    mean, deviation = table.mean(0), table.std(0)
    for name, centre, spread in zip(names, mean, deviation, strict=True):
        if not spread > 1e-5 * abs(centre):
            raise RecipeError(
                f"data: '{name}' is {centre:g}, or nearly, in all training images: nothing to learn; of a large number, "
                "such as a date, leave out what all have in common"
            )
    ends = (table.min(0), table.max(0)) if recipe.metric == "quadratic_kappa" else ()
    give_units(head_layer(recipe, net), Units(*(tuple(part.tolist()) for part in (mean, deviation, *ends))))


class InUnits:
    """The forward hook of a head of numbers: in eval mode they come in their own units, in training mode standardised.

    It computes the layer in float32 whatever the precision: in bfloat16 a year would be known to 8 years.
    """

    def __init__(self, units: Units):
        self.set(units)

    def set(self, units: Units) -> None:
        self.units, self.table = units, torch.tensor(units[:2])

    def __call__(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        with torch.autocast(output.device.type, enabled=False):
            standardised = linear(inputs[0].float(), layer.get_parameter("weight"), layer.get_parameter("bias"))
            if layer.training:  # what the loss is computed of: beside a large mean it would lose digits
                return standardised
            if self.table.device != standardised.device:
                self.table = self.table.to(standardised.device)
            mean, deviation = self.table
            return standardised * deviation + mean


def give_units(layer: nn.Linear, units: Units) -> None:
    """Let a head return numbers in these units, in place of those that it has."""
    for key, hook in [*layer._forward_hooks.items()]:
        if isinstance(hook, InUnits):
            del layer._forward_hooks[key]
    layer.register_forward_hook(InUnits(units))


def head_with_units(net: nn.Module) -> tuple[nn.Linear, InUnits] | None:
    """The head of a network of numbers, and its hook; None of one of classes."""
    found = ((layer, hook) for layer in net.modules() for hook in layer._forward_hooks.values())
    return next(((layer, hook) for layer, hook in found if isinstance(layer, nn.Linear) and isinstance(hook, InUnits)), None)


def units_of(net: nn.Module) -> Units | None:
    """What a network's numbers are standardised by; None where it gives classes."""
    head = head_with_units(net)
    return head[1].units if head else None


def fit(layer: nn.Linear, features: torch.Tensor, labels: torch.Tensor, loss: Loss, l2: float | None, views: int = 1) -> float:
    """Fit `layer` to features [n, d] and labels: the minimum of the mean loss plus `l2` / 2 times the squared weights.

    `loss(logits, labels)` is a sum over images. The penalty is on the weights, not the bias, for features that are centred and
    divided by one number, so that their variances average 1: one `l2` then serves any network. (Were each variance 1, features
    that hardly vary would get the largest weights.) Without an `l2`, `choose_l2` does; features then have `views` equal parts,
    one for each view of the same images. Returns the `l2`.

    Of numbers, the loss is the squared error of what is standardised, whatever the recipe's: ridge regression, where `l2`
    times the images is scikit-learn's `alpha`.

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
    if units := units_of(layer):
        centre, deviation = torch.tensor(units[:2], dtype=torch.float64, device=labels.device)
        labels = (labels.double() - centre) / deviation
        l2 = choose_ridge(features, labels, images) if l2 is None else l2
        head = ridge(features, labels, [l2 * len(labels)])[0]
    else:
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


def ridge(features: torch.Tensor, labels: torch.Tensor, alphas: Sequence[float]) -> list[Head]:
    """The head of least squared error plus alpha times the squared weights, for each alpha: scikit-learn's Ridge.

    Of features [n, d] in float64 and labels [n, numbers]; all from the eigenvalues of the smaller of [d, d] and [n, n].
    """
    centre, level = features.mean(0), labels.mean(0)
    x, y = features - centre, labels - level
    few = len(x) < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if few else x.T @ x)
    rotated = vectors.T @ (y if few else x.T @ y)
    heads = []
    for alpha in alphas:
        solution = vectors @ (rotated / (values + alpha)[:, None])
        weight = (x.T @ solution if few else solution).T
        heads.append((weight, level - weight @ centre))
    return heads


def choose_ridge(features: torch.Tensor, labels: torch.Tensor, images: torch.Tensor) -> float:
    """The penalty of `RIDGE_PENALTIES` with the least squared error in three folds, as of scikit-learn's RidgeCV."""
    folds, errors = make_folds(labels, images), features.new_zeros(len(RIDGE_PENALTIES))
    for fold in range(NUM_FOLDS):
        out = folds == fold
        heads = ridge(features[~out], labels[~out], [l2 * len(labels) for l2 in RIDGE_PENALTIES])
        errors += torch.stack([(predict(head, features[out]) - labels[out]).square().sum() for head in heads])
    return RIDGE_PENALTIES[int(errors.argmin())]
