"""What is minimised and clipped."""

import math

import numpy as np
import pytest
import timm.data
import timm.layers
import timm.loss
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn.functional import cross_entropy, multilabel_soft_margin_loss, one_hot

from finetune.data.loader import ImageDataset
from finetune.models.backbone import build_backbone, head_parameters
from finetune.models.linear_probe import fit
from finetune.optim.loss import Criterion
from finetune.recipe import Augment
from finetune.training.loop import clip_gradients
from finetune.utils.errors import RecipeError
from helpers import SmallNet, assert_same_weights, bare_loop, mean_loss, plain, prepare, run_here, small_recipe


def criterion(recipe, labels=None, device="cpu"):
    """The criterion of SmallNet on a set of these labels."""
    images = prepare(recipe)[2][0] if labels is None else SimpleSet(labels)
    return Criterion(recipe, SmallNet(), images, torch.device(device))


class SimpleSet(ImageDataset):
    """Labels without images, of 4 classes."""

    def __init__(self, labels):
        super().__init__(self, None, 0, ("a", "b", "c", "d"))
        self.given = labels

    def __len__(self):
        return len(self.given)

    def labels(self):
        return np.asarray(self.given)


@pytest.mark.parametrize(
    "changes,theirs",
    [
        ({"clip_norm": 0.1, "clip_norm_type": math.inf}, lambda p: torch.nn.utils.clip_grad_norm_(p, 0.1, math.inf)),
        ({"clip_norm": 0.3, "clip_norm_type": 1.0}, lambda p: torch.nn.utils.clip_grad_norm_(p, 0.3, 1.0)),
        ({"clip_value": 0.01}, lambda p: torch.nn.utils.clip_grad_value_(p, 0.01)),
        ({"clip_adaptive": 0.01}, lambda p: timm.utils.adaptive_clip_grad(list(p), 0.01)),
    ],
    ids=["largest element", "sum", "value", "adaptive"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_is_torchs_and_timms(tmp_path, changes, theirs, accumulate):
    """Each way of clipping acts once a step on its whole gradient, as the library's own function in a bare loop."""
    recipe = plain(**changes)
    reference, trail = bare_loop(recipe, mean_loss, theirs)
    assert_same_weights(run_here(recipe, tmp_path / "a", accumulate=accumulate)[0], trail[-1])
    unclipped = bare_loop(recipe, mean_loss)[1][-1]
    assert (trail[-1]["fc.weight"] - unclipped["fc.weight"]).abs().max() > 1e-4


def test_the_logged_norm_is_from_before_clipping():
    """Norm, value and adaptive clipping follow each other; the returned norm is the raw one, of what trains alone."""
    net = SmallNet()
    net.stem.requires_grad_(False)
    net(torch.randn(4, 3, 24, 24)).sum().backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    raw = [p.grad.clone() for p in trained]
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    norm = clip_gradients(small_recipe(clip_norm=0.5, clip_value=0.01), optimizer)
    assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in raw)), rel=1e-5)
    scaled = [(g * 0.5 / norm).clamp(-0.01, 0.01) for g in raw]
    for parameter, gradient in zip(trained, scaled, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("changes", [{"clip_norm": None}, {"clip_norm": 1.0}, {"clip_norm": None, "clip_value": 0.1}])
def test_gradients_whose_squares_overflow_are_clipped_as_any(changes):
    """Gradients of 1e20 are left alone, scaled or cut off as torch does it in float64, and their norm is the one of float64."""
    scale = torch.tensor(1e20)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 3)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape) * scale
    wide = [nn.Parameter(torch.zeros(n).double()) for n in (5, 3)]
    for other, parameter in zip(wide, parameters, strict=True):
        other.grad = parameter.grad.double()
    recipe = small_recipe(**changes)
    norm = clip_gradients(recipe, torch.optim.SGD(parameters))
    expected = torch.nn.utils.clip_grad_norm_(wide, recipe.clip_norm or float("inf"))
    if recipe.clip_value:
        torch.nn.utils.clip_grad_value_(wide, recipe.clip_value)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for parameter, other in zip(parameters, wide, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad.float())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_loss_is_timms(smoothing):
    """loss="binary" equals timm's BinaryCrossEntropy with its smoothing, on labels of one class."""
    logits, labels = torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    ours = criterion(small_recipe(loss="binary", label_smoothing=smoothing), [0]).loss(logits, labels) / 6
    theirs = timm.loss.BinaryCrossEntropy(smoothing=smoothing)(logits, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_multi_label_loss_is_torchs():
    """loss="multi_label" equals torch's multilabel_soft_margin_loss; an unreadable image counts for nothing."""
    logits, labels = torch.randn(6, 4), torch.randint(0, 2, (6, 4)).float()
    ours = criterion(small_recipe(loss="multi_label", metric="mean_average_precision"), [0])
    torch.testing.assert_close(ours.loss(logits, labels) / 6, multilabel_soft_margin_loss(logits, labels))
    labels[2] = torch.nan
    seen = [0, 1, 3, 4, 5]
    torch.testing.assert_close(ours.loss(logits, labels) / 5, multilabel_soft_margin_loss(logits[seen], labels[seen]))


def test_smoothing_mixed_targets_is_timms():
    """Smoothing after mixing gives timm's mixed and smoothed targets, for one label and for several."""
    pytest.importorskip("timm", minversion="1.0.31", reason="timm mixes several labels an image from 1.0.31 on")
    labels = torch.tensor([0, 3, 1, 1])
    for several, kind in ((False, "binary"), (True, "multi_label")):
        targets = one_hot(labels, 4).float() if several else labels
        theirs = timm.data.mixup.mixup_target(targets, 4, 0.3, smoothing=0.2, multi_label=several)
        mixed = timm.data.mixup.mixup_target(targets, 4, 0.3, smoothing=0.0, multi_label=several)
        logits = torch.randn(4, 4)
        metric = "mean_average_precision" if several else "top1"
        ours = criterion(small_recipe(loss=kind, label_smoothing=0.2, metric=metric), [0])
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, theirs) * 4
        torch.testing.assert_close(ours.loss(logits, mixed), expected)
    theirs = timm.loss.SoftTargetCrossEntropy()(logits, timm.data.mixup.mixup_target(labels, 4, 0.3, smoothing=0.2)) * 4
    mixed = timm.data.mixup.mixup_target(labels, 4, 0.3)
    torch.testing.assert_close(criterion(small_recipe(label_smoothing=0.2), [0]).loss(logits, mixed), theirs)


def test_balanced_class_weights_are_scikit_learns(tmp_path):
    """class_weights="balanced" is scikit-learn's formula, and a run with weights takes a bare loop's weighted steps."""
    labels = [0] * 7 + [1] * 2 + [2] * 3 + [3]
    found = criterion(small_recipe(class_weights="balanced"), labels).class_weights
    assert found.tolist() == pytest.approx(compute_class_weight("balanced", classes=np.arange(4), y=labels).tolist())
    assert found[labels].mean().item() == pytest.approx(1.0)
    weights = tuple(float(i + 1) for i in range(10))
    recipe = plain(class_weights=weights)
    trail = bare_loop(
        recipe, lambda net, logits, labels: cross_entropy(logits, labels, torch.tensor(weights), reduction="sum") / len(labels)
    )[1]
    assert_same_weights(run_here(recipe, tmp_path, accumulate=2)[0], trail[-1], 1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["cross_entropy", "binary"])
def test_a_class_weight_is_that_of_the_images_own_class(kind, smoothing):
    """A weighted loss is the sum of torch's or timm's losses of single images, each times its class's weight, mixed or not."""
    weights = torch.tensor([0.2, 1.0, 30.0, 4.0])
    ours = criterion(small_recipe(loss=kind, label_smoothing=smoothing, class_weights=tuple(weights.tolist())), [0]).loss
    logits, labels, others = torch.randn(6, 4).double(), torch.tensor([0, 3, 1, 1, 2, 0]), torch.tensor([2, 2, 1, 0, 0, 3])
    binary = timm.loss.BinaryCrossEntropy(smoothing=smoothing, reduction="none")

    def reference(labels):
        if kind == "binary":
            return weights[labels].double() * binary(logits, labels).mean(1)
        return weights[labels].double() * cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)

    torch.testing.assert_close(ours(logits, labels), reference(labels).sum())
    mixed = 0.3 * one_hot(labels, 4) + 0.7 * one_hot(others, 4)
    torch.testing.assert_close(ours(logits, mixed), (0.3 * reference(labels) + 0.7 * reference(others)).sum())
    unreadable = torch.cat([labels[:-1], torch.tensor([-100])])
    torch.testing.assert_close(ours(logits, unreadable), reference(labels)[:-1].sum())


def test_the_probe_learns_very_uneven_classes():
    """Class weights and smoothing together leave a head that tells separable classes of 300 and 5 images apart."""
    labels = torch.tensor([0] * 300 + [1] * 5)
    features = torch.randn(305, 3, generator=torch.Generator().manual_seed(0)) + 8.0 * labels[:, None]
    images, layer = SimpleSet(labels), nn.Linear(3, 2)
    images.classes = ("common", "rare")
    recipe = small_recipe(class_weights="balanced", label_smoothing=0.1)
    fit(layer, features, labels, Criterion(recipe, SmallNet(), images, torch.device("cpu")).loss, l2=1e-3)
    assert torch.equal(layer(features).argmax(1), labels)


@pytest.mark.parametrize("weights,fault", [((1.0, 2.0), "class_weights: 2 for 10 classes"), ("balanced", "a list `targets`")])
def test_class_weights_that_do_not_fit_are_refused(weights, fault):
    """A wrong number of weights, and a data set that does not give its labels, each get one message."""

    class Unlabelled:
        classes = tuple("0123456789")

        def __len__(self):
            return 3

    with pytest.raises(RecipeError, match=fault):
        Criterion(
            small_recipe(class_weights=weights), SmallNet(), ImageDataset(Unlabelled(), None, 0, Unlabelled.classes), "cpu"
        )


def test_l2_sp_is_its_closed_form(tmp_path):
    """The pull is l2_sp times the distance from the start, on the backbone's weights only, once a step however it is cut."""
    recipe = plain(l2_sp=0.5)
    start = {name: p.detach().clone() for name, p in prepare(recipe)[0].named_parameters()}

    def loss(net, logits, labels):
        pulled = [p for name, p in net.named_parameters() if name in ("stem.weight", "body.weight")]
        return cross_entropy(logits, labels) + 0.25 * sum(
            (p - start[name]).square().sum() for name, p in net.named_parameters() if any(p is one for one in pulled)
        )

    trail = bare_loop(recipe, loss)[1]
    for accumulate in (1, 2):
        assert_same_weights(run_here(recipe, tmp_path / str(accumulate), accumulate=accumulate)[0], trail[-1])
    without = bare_loop(recipe, mean_loss)[1][-1]
    assert (trail[-1]["body.weight"] - without["body.weight"]).abs().max() > 1e-5


@pytest.mark.parametrize(
    "backbone,head,expected",
    [
        ("test_resnet", None, {"fc.weight", "fc.bias"}),
        ("torchvision/resnet18", None, {"fc.weight", "fc.bias"}),
        (SmallNet, "fc", {"fc.weight", "fc.bias"}),
        (SmallNet, None, set()),
    ],
)
def test_the_new_head_is_known(backbone, head, expected):
    """The parameters that no pretrained weights have are the classifier's, or the named layer's."""
    recipe = small_recipe(backbone=backbone, head=head)
    assert head_parameters(recipe, SmallNet() if callable(backbone) else build_backbone(recipe, 10)) == expected


def test_each_step_and_each_seed_mixes_by_its_own_draw():
    """Two steps, and two seeds, mix the same images differently; the same step mixes them the same again."""
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4

    def mixed(step, seed=0):
        recipe = small_recipe(augment=Augment(mixup=0.4, cutmix=1.0), seed=seed)
        return criterion(recipe, [0]).mix(images.clone(), labels, step)[1]

    assert torch.equal(mixed(3), mixed(3))
    assert not torch.equal(mixed(3), mixed(4)) and not torch.equal(mixed(3), mixed(3, seed=1))
