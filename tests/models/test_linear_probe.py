"""The linear probe: against scikit-learn's logistic regression, and what a run makes of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.data.loader import load
from finetune.models import linear_probe
from finetune.models.backbone import build_backbone, meta_backbone
from finetune.models.linear_probe import check_probe, fit
from finetune.recipe import Data, Group, LinearProbe
from finetune.results.summary import describe_gain
from finetune.training import loop as train_loop
from finetune.training.evaluate import predict_logits
from finetune.training.setup import DEFAULTS, check_recipe, setup
from finetune.utils.errors import RecipeError
from helpers import ALL, SmallNet, prepare, run_here, small_recipe


def summed(logits, labels):
    return cross_entropy(logits, labels, reduction="sum")


def probed(**changes):
    """Everything is trained after a linear probe."""
    groups = (Group("all", ".", lr=1e-3),)
    return small_recipe(**{"linear_probe": LinearProbe(l2=0.1), "groups": groups, "epochs": 2, **changes})


def test_the_head_is_scikit_learns():
    """The fitted layer gives the probabilities of scikit-learn's logistic regression on features whose variances average 1.

    Both are the one minimum of the same function; scikit-learn's C is 1 / (l2 x images). One feature never changes, one image
    could not be read.
    """
    torch.manual_seed(0)
    features = torch.randn(200, 12) * torch.logspace(-1, 1, 12) + 5
    features[:, 3] = 7.0
    labels = torch.randint(0, 4, (200,))
    labels[:40] = features[:40, 0].gt(5).long()
    unread = torch.cat([labels, torch.tensor([-100])])
    layer = nn.Linear(12, 4)
    linear_probe.fit(
        layer,
        torch.cat([features, features[:1]]),
        unread,
        summed,
        l2=0.05,
    )
    scaled = features.double() - features.double().mean(0)
    scaled = scaled / scaled.square().mean().sqrt()
    theirs = LogisticRegression(C=1 / (0.05 * 200), tol=1e-10, max_iter=10_000).fit(scaled.numpy(), labels.numpy())
    logits, reference = layer(features).log_softmax(1), torch.tensor(theirs.predict_log_proba(scaled.numpy()))
    torch.testing.assert_close(logits.double(), reference, rtol=0, atol=1e-5)  # float32 weights, features up to 40


@pytest.mark.filterwarnings("ignore::FutureWarning")  # about names of scikit-learn's next version
@pytest.mark.parametrize("noise", [0.3, 3.0, 30.0])
def test_the_penalty_is_scikit_learns_choice(noise):
    """Without an l2, it is the one that LogisticRegressionCV chooses by log loss, with the same folds, of the same nine."""
    torch.manual_seed(0)
    labels = torch.arange(180) % 3
    features = torch.randn(3, 20)[labels] + noise * torch.randn(180, 20)
    features = (features - features.mean(0)) / features.std(correction=0)
    folds = linear_probe.make_folds(labels, torch.arange(180)).numpy()
    splits = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in range(3)]
    theirs = LogisticRegressionCV(
        Cs=[1 / (penalty * 120) for penalty in linear_probe.PENALTIES],
        cv=splits,
        scoring="neg_log_loss",
        tol=1e-8,
        max_iter=10_000,
    ).fit(features.numpy(), labels.numpy())
    l2 = linear_probe.choose_l2(features, labels, torch.arange(180), summed, 3)
    assert l2 == pytest.approx(1 / (120 * np.ravel(theirs.C_)[0]))


def test_folds_keep_views_together_and_classes_apart():
    """All views of an image are in one fold, and each fold has its share of each class, of two at least one."""
    labels = torch.tensor([0] * 31 + [1] * 14 + [2] * 3)
    folds = linear_probe.make_folds(labels.repeat(2), torch.arange(48).repeat(2)).view(2, 48)
    assert torch.equal(*folds)
    counts = [folds[0][labels == label].bincount(minlength=3).tolist() for label in range(3)]
    assert all(max(row) - min(row) <= 1 for row in counts)
    several = linear_probe.make_folds(torch.eye(9), torch.arange(9))
    assert several.bincount().tolist() == [3, 3, 3]


def test_a_run_keeps_the_penalty_it_chose(tmp_path):
    """The l2 is in the metrics, and gives the same head when it is asked for."""
    recipe = probed(linear_probe=LinearProbe(views=2), epochs=1, data=Data("digits", 24, 256))
    _, (row, *_) = run_here(recipe, tmp_path / "chosen")
    assert row["linear_probe_l2"] in linear_probe.PENALTIES
    asked = replace(recipe, linear_probe=LinearProbe(views=2, l2=row["linear_probe_l2"]))
    assert run_here(asked, tmp_path / "asked")[1][0] == row


@pytest.mark.parametrize("views", [1, 3])
def test_features_are_the_inputs_of_the_head(tmp_path, monkeypatch, views):
    """The head is fitted to its own inputs: of each image preprocessed for evaluation, then augmented anew for each view."""
    seen = []
    monkeypatch.setattr(train_loop, "fit", lambda layer, features, labels, *_: seen.append((features, labels)) or 1.0)
    recipe = probed(linear_probe=LinearProbe(views=views), epochs=1)
    net, _, (train_images, val_images) = prepare(recipe)
    inputs = []
    net.fc.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach()))
    everything = [list(range(len(train_images)))]
    with torch.no_grad():
        for view in range(views):
            ((images, labels),) = load(train_images if view else train_images.transformed_as(val_images), -view, everything, 0)
            net(images)
    run_here(recipe, tmp_path)
    ((features, targets),) = seen
    torch.testing.assert_close(features, torch.cat(inputs), rtol=0, atol=1e-6)
    assert torch.equal(targets, labels.repeat(views)) and len({part.sum().item() for part in inputs}) == views


def test_the_linear_probe_is_the_first_candidate(tmp_path):
    """Its metrics are the first line; epochs that only do harm leave it the best model."""
    recipe = probed(groups=(Group("all", ".", lr=10.0),), clip_norm=None, data=Data("digits", 24, 256))
    _, rows = run_here(recipe, tmp_path)
    top1 = [row["top1"] for row in rows if "top1" in row]
    assert rows[0]["epoch"] == -1 and rows[0]["top1"] == top1[0] > 2 * max(top1[1:])
    net, _, datasets = prepare(recipe)
    criterion = train_loop.Criterion(recipe, net, datasets[0], torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    train_loop.fit_linear_probe(recipe, net, criterion, datasets, Accelerator(cpu=True), DEFAULTS)
    saved = safetensors.torch.load_file(tmp_path / "model-best" / "model.safetensors")
    assert torch.equal(saved["fc.weight"], net.fc.weight)
    moved = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"fc.weight", "fc.bias"}
    logits, labels = predict_logits(recipe, net, datasets[1], Accelerator(cpu=True))
    assert (logits.argmax(1) == labels).double().mean().item() == rows[0]["top1"]


def test_the_average_starts_with_the_fitted_head(tmp_path):
    """With a moving average of the weights, the fitted head is evaluated first, too."""
    recipe = probed(data=Data("digits", 24, 256))
    firsts = [run_here(probed(data=recipe.data, ema_decay=decay), tmp_path / str(decay))[1][0] for decay in (None, 0.9999)]
    assert firsts[0] == firsts[1] and firsts[0]["epoch"] == -1


@pytest.mark.parametrize(
    "before,after,words",
    [
        (0.8, 0.8, "added nothing"),
        (0.8, 0.75, "did not pay; lower learning rates may: --lr-scale 0.3"),
        (0.8, 0.82, "added 2.00 points, which may be chance"),
        (0.7, 0.8, "added 10.00 points"),
    ],
)
def test_the_summary_says_whether_fine_tuning_paid(before, after, words):
    """Twenty of 1,000 images are no gain, and a hundred are: the standard error of the difference is 1.8 to 1.9 points."""
    said = describe_gain("top1", {"linear_probe_top1": before, "top1": after, "val_images": 1000})
    assert said.endswith(words) and f"{100 * before:.2f} %" in said
    assert describe_gain("top1", {"top1": after, "val_images": 1000}) == ""


def test_a_finished_run_has_both_metrics(tmp_path, capsys, monkeypatch):
    """result.json has the linear probe's metric, and the seconds at which each metric was there, in order."""
    from finetune.run import main

    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", "efficientnet_lite0_digits", "--smoke", "--output", "out", "--set", "linear_probe.l2=0.1"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert result["linear_probe_top1"] == rows[0]["top1"] and len(result["clock"]) == 1 + result["epochs"]
    assert result["clock"] == sorted(result["clock"]) and result["clock"][-1] <= result["seconds"]
    assert "\nlinear probe  " in (out := capsys.readouterr().out) and "\nprobe     linear probe " in out


@pytest.mark.parametrize("backbone", ["deit_tiny_distilled_patch16_224", "torchvision/squeezenet1_1"])
def test_a_head_that_is_no_linear_layer_is_refused(backbone):
    """Two heads, and a convolution, end in one message before anything is loaded; without the option they are fine."""
    recipe = small_recipe(backbone=backbone, head=None, groups=(Group("all", ".", lr=1e-3),), data=Data("digits", 224, 8))
    check_recipe(recipe, meta_backbone(recipe))
    probing = replace(recipe, linear_probe=LinearProbe())
    with pytest.raises(RecipeError, match="linear_probe needs a head that is one linear layer"):
        check_recipe(probing, meta_backbone(probing))


def test_values_out_of_range_are_refused():
    """No views, or no penalty, are faults of the recipe; both are named."""
    with pytest.raises(RecipeError) as caught:
        small_recipe(linear_probe=LinearProbe(views=0, l2=0.0))
    for fault in ("linear_probe.views must be 1 or more, not 0", "linear_probe.l2 must be above 0, or None, not 0.0"):
        assert fault in str(caught.value)


def test_a_head_that_is_not_the_last_thing_done_is_refused():
    """A head with an auxiliary one beside it in evaluation, and logits that are averaged afterwards, are refused."""

    class Scaled(SmallNet):
        def forward(self, images):
            return super().forward(images).unflatten(1, (2, -1)).mean(1)

    for backbone, head, size in (("volo_d1_224", None, 224), (Scaled, "fc", 24)):
        recipe = small_recipe(backbone=backbone, head=head, groups=ALL, data=Data("digits", size, 8))
        with pytest.raises(RecipeError, match="whose logits are those of its head; .* does more with them. Remove the option"):
            check_probe(replace(recipe, linear_probe=LinearProbe()), build_backbone(recipe, 10))


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.log_softmax(1),
        lambda logits: logits * 30,
        lambda logits: logits.clamp(-5, 5) / 0.05,
        lambda logits: logits.clamp(-5, 5),
        lambda logits: 0.1 * logits.tanh(),
        lambda logits: logits - logits.mean(1, keepdim=True),
    ],
)
def test_logits_that_are_changed_afterwards_are_refused(change):
    """Where the shape stays, the values tell: a run finds it before its folder is begun."""

    class Changed(SmallNet):
        def forward(self, images):
            return change(super().forward(images))

    recipe = small_recipe(backbone=Changed, groups=ALL, linear_probe=LinearProbe())
    with pytest.raises(RecipeError, match="whose logits are those of its head; .*Changed does more with them. Remove the opt"):
        setup(recipe, Accelerator(cpu=True))


def averaged(net, images):
    features = net.body(net.norm(net.stem(images))).relu().flatten(2).transpose(1, 2)
    return net.fc(features).mean(1)


@pytest.mark.parametrize(
    "forward",
    [
        averaged,
        lambda net, images: (SmallNet.forward(net, images) + SmallNet.forward(net, images.flip(-1))) / 2,
        lambda net, images: SmallNet.forward(net, images + 0.1 * torch.randn_like(images)),
        lambda net, images: SmallNet.forward(net, images)[:, :, None].squeeze(2),
    ],
    ids=["patches", "mirrored", "random", "squeezed"],
)
def test_logits_that_are_linear_in_the_features_pass(forward):
    """Averages over patches or views, noise and changes of form pass, and the check leaves no trace."""

    class Own(SmallNet):
        def forward(self, images):
            return forward(self, images)

    recipe = small_recipe(backbone=Own, groups=ALL, linear_probe=LinearProbe())
    net, state = build_backbone(recipe, 10), torch.get_rng_state()
    assert check_probe(recipe, net) is net.fc and torch.equal(torch.get_rng_state(), state) and not net.fc._forward_hooks


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf])
def test_features_that_tell_nothing_apart_are_one_sentence(value):
    """Constant features, ones that differ by rounding and ones that are no numbers are refused, and leave the head as it is."""
    layer = nn.Linear(4, 2)
    before, features = layer.weight.detach().clone(), value + 1e-9 * torch.randn(20, 4) * (value == 1)
    fault = (
        "the same for every image: look whether these are alike" if np.isfinite(value) else "not finite: look at its weights"
    )
    with pytest.raises(RecipeError, match=f"linear_probe: the frozen backbone's features are {fault}"):
        fit(layer, features, torch.arange(20) % 2, summed, 1.0)
    assert layer.weight.equal(before)
