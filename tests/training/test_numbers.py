"""Training on numbers: standardised inside, in their own units outside."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from regression import write_numbers
from sklearn.linear_model import Ridge, RidgeCV
from torch.nn.functional import huber_loss, l1_loss, mse_loss

from finetune.data.batches import plan_epoch
from finetune.data.loader import load
from finetune.metrics.compute import compute_metrics
from finetune.models.backbone import meta_backbone
from finetune.models.linear_probe import (
    NUM_FOLDS,
    RIDGE_PENALTIES,
    Units,
    fit,
    give_units,
    make_folds,
    units_of,
)
from finetune.models.saving import plain_head
from finetune.optim.loss import Criterion
from finetune.recipe import Augment, Data, LinearProbe
from finetune.training import checkpoint
from finetune.training.setup import check_recipe
from finetune.utils.errors import RecipeError
from helpers import Cut, SmallNet, cut_before, plain, prepare, run_here, same_tensors, small_recipe

YEARS = 2000 + 10 * np.random.RandomState(0).normal(size=24)
THREE = np.stack([YEARS * 1e6, YEARS[::-1] * 1e-6, np.where(np.arange(24) % 5, YEARS % 7, -100)], 1)
NAMES = ("label_Mass", "target_size", "label_minus")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """24 images, of which 16 train, with one number."""
    return write_numbers(tmp_path_factory.mktemp("one"), YEARS, splits=["val" if i % 3 == 0 else "train" for i in range(24)])


def of_numbers(table, recipe=small_recipe, **changes):
    options = {"loss": "mse", "metric": "mae", "augment": Augment(crop_scale=(0.9, 1.0)), **changes}
    return recipe(data=Data(str(table), 24, 8), **options)


@pytest.mark.parametrize("loss,reference", [("mse", mse_loss), ("huber", huber_loss), ("l1", l1_loss)])
def test_losses_are_torchs_of_standardised_numbers(tmp_path, loss, reference):
    """Each loss is torch's of what is standardised by the training labels, the mean over numbers, summed over images."""
    recipe = of_numbers(write_numbers(tmp_path, THREE, NAMES), loss=loss)
    net, _, (train, _) = prepare(recipe)
    labels = np.stack([train.images.labels[i] for i in range(len(train))])
    outputs = torch.tensor(labels + labels.std(0), dtype=torch.float32)[torch.randperm(len(labels))]
    mean, deviation = torch.tensor(labels.mean(0)), torch.tensor(labels.std(0))
    ours, theirs = ((values.double() - mean) / deviation for values in (outputs, torch.tensor(labels)))
    criterion = Criterion(recipe, net, train, torch.device("cpu"))
    found = criterion.loss(ours.float(), torch.tensor(labels, dtype=torch.float32)).item()
    assert found == pytest.approx(len(labels) * reference(ours, theirs).item(), rel=1e-4)
    row = compute_metrics(recipe, outputs, torch.tensor(labels), criterion.units)
    assert row["loss"] == pytest.approx(reference(ours, theirs).item(), rel=1e-5)
    assert tuple(train.classes) == ("Mass", "size", "minus")


def test_an_epoch_is_that_of_a_bare_loop_on_standardised_numbers(table):
    """The run's steps are those of torch alone on a plain network and labels that were standardised beforehand."""
    recipe = of_numbers(table, plain)
    labels = prepare(recipe)[2][0].images.labels

    def loss_of(net, outputs, batch):
        return mse_loss(outputs, (batch - labels.mean()) / labels.std())

    net, _ = run_here(recipe, table.parent / "run")
    bare, _, images = prepare(recipe)
    bare.fc._forward_hooks.clear()
    optimizer = torch.optim.SGD(bare.parameters(), lr=1e-2, momentum=0.9)
    for epoch in range(recipe.epochs):
        for step in plan_epoch(16, 8, recipe.seed, epoch):
            ((batch, numbers),) = load(images[0], epoch, step.micro_batches, 0)
            optimizer.zero_grad()
            loss_of(bare, bare(batch), numbers).backward()
            optimizer.step()
    for name, value in bare.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [2.0**20, 2.0**-20])
def test_units_change_the_metrics_by_their_factor_alone(tmp_path, table, factor):
    """A run on the same numbers in another unit ends with the same weights, and errors times the factor, to the bit."""
    other = write_numbers(tmp_path, YEARS * factor, splits=["val" if i % 3 == 0 else "train" for i in range(24)])
    recipe = replace(of_numbers(table), epochs=2, groups=plain().groups)
    (net, rows), (scaled, others) = (
        run_here(replace(recipe, data=Data(str(one), 24, 8)), tmp_path / str(i)) for i, one in enumerate((table, other))
    )
    assert same_tensors(net.state_dict(), scaled.state_dict())
    assert [row["mae"] * factor for row in rows if "mae" in row] == [row["mae"] for row in others if "mae" in row]
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]


def test_a_run_that_was_cut_goes_on_to_the_bit(tmp_path, table, monkeypatch):
    """A run on numbers, cut in its third epoch and resumed, ends with the weights and metrics of an unbroken one."""
    recipe = of_numbers(table, linear_probe=LinearProbe(), ema_decay=0.9)
    whole, rows = run_here(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut_before(patch, "train_step", 6)
        with pytest.raises(Cut):
            run_here(recipe, tmp_path / "cut")
    again, others = run_here(recipe, tmp_path / "cut")
    assert same_tensors(whole.state_dict(), again.state_dict()) and rows == others
    assert min(row["mae"] for row in rows if "mae" in row) < 0.9 * np.abs(YEARS - YEARS.mean()).mean()


def test_changed_images_change_no_prediction():
    """A head that goes on with the mean and deviation of other images returns what it did."""
    net, images = SmallNet().eval(), torch.randn(5, 3, 24, 24)
    give_units(net.fc, Units((2000.0,) * 7, (10.0,) * 7))
    before, kept = net(images), units_of(net)
    give_units(net.fc, Units((1990.0,) * 7, (20.0,) * 7))
    checkpoint.keep_units(net, kept)
    torch.testing.assert_close(net(images), before, rtol=0, atol=1e-3)


def test_a_head_in_its_own_units_needs_no_hook():
    """Within plain_head the bare weights compute what the hook does; after it they are as before, to the bit."""
    net, images = SmallNet().eval(), torch.randn(5, 3, 24, 24)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    give_units(net.fc, Units(tuple(range(7)), (1e6, 1e-6, 1.0, 2.0, 3.0, 4.0, 5.0)))
    wanted = net(images)
    with plain_head(net):
        bare = SmallNet()
        bare.load_state_dict(net.state_dict())
        torch.testing.assert_close(net(images), wanted, rtol=1e-5, atol=0)
        torch.testing.assert_close(bare(images), wanted, rtol=1e-5, atol=0)
    assert same_tensors(net.state_dict(), state) and torch.equal(net(images), wanted)
    with torch.autocast("cpu", torch.bfloat16):  # of what comes before the head alone
        years = net(images)
    assert years.dtype == torch.float32 and (years / wanted - 1).abs().max() < 0.1


@pytest.mark.parametrize("images,features", [(90, 12), (24, 40)])
def test_the_linear_probe_is_scikit_learns_ridge(images, features):
    """Of more images than features, and of fewer, the fit is Ridge's, and its penalty the one that RidgeCV chooses."""
    random = np.random.RandomState(0)
    inputs = random.normal(size=(images, features)) * np.linspace(0.5, 2, features) + 3
    labels = inputs[:, :2] @ [[1e6, 0], [0, 1e-6]] + random.normal(size=(images, 2)) * [3e6, 3e-6]
    layer = torch.nn.Linear(features, 2)
    give_units(layer, Units(tuple(labels.mean(0)), tuple(labels.std(0))))
    l2 = fit(layer, torch.tensor(inputs), torch.tensor(labels), None, None)
    scaled = (inputs - inputs.mean(0)) / np.sqrt(inputs.var(0).mean())
    wanted = (labels - labels.mean(0)) / labels.std(0)
    folds = make_folds(torch.tensor(labels), torch.arange(images)).numpy()
    cuts = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in range(NUM_FOLDS)]
    alphas = np.array(RIDGE_PENALTIES) * images
    chosen = RidgeCV(alphas, cv=cuts, scoring="neg_mean_squared_error").fit(scaled, wanted)
    assert l2 * images == pytest.approx(chosen.alpha_)
    ridge = Ridge(l2 * images).fit(scaled, wanted)
    with torch.no_grad():
        found = layer.eval()(torch.tensor(inputs, dtype=torch.float32)).double().numpy()
    np.testing.assert_allclose((found - labels.mean(0)) / labels.std(0), ridge.predict(scaled), atol=1e-5)


def test_an_image_that_cannot_be_read_is_left_out(table, tmp_path):
    """With on_bad_image="skip" a broken image has neither a loss nor a metric, and -100 in the others has."""
    values = YEARS.copy()
    values[4] = -100
    broken = write_numbers(tmp_path, values, splits=["val" if i % 3 == 0 else "train" for i in range(24)])
    for i in (1, 3):
        file = broken.parent / f"{i}.png"
        file.write_bytes(file.read_bytes()[:200])
    recipe = of_numbers(broken, plain)
    recipe = replace(recipe, data=replace(recipe.data, on_bad_image="skip"))
    _, rows = run_here(recipe, tmp_path / "run")
    last = rows[-1]
    assert (last["val_images"], last["skipped_images"]) == (7, 1) and np.isfinite([last["mae"], last["train_loss"]]).all()


def test_what_numbers_cannot_have_is_refused(tmp_path, table):
    """A recipe of numbers names what does not fit: options for classes, sets of classes, heads and constants."""
    for changes, words in (
        ({"metric": "top1"}, "metric='top1' and loss='mse' do not go together"),
        ({"label_smoothing": 0.1}, "label_smoothing: loss='mse' is for numbers"),
        ({"class_weights": "balanced"}, "class_weights: loss='mse' is for numbers"),
        ({"data": Data("digits", 24, 8)}, "'digits' has classes"),
    ):
        with pytest.raises(RecipeError, match=words):
            replace(of_numbers(table), **changes)
    for name in "a1":
        (tmp_path / "folder" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "folder" / name / "x.png")
    for data, words in (
        (str(tmp_path / "folder"), "need numbers: a CSV, or folders named by them; .* has a/"),
        (str(write_numbers(tmp_path / "flat", np.full(10, 3.0))), "is 3, or nearly, in all training images"),
    ):
        with pytest.raises(RecipeError, match=words):
            prepare(replace(of_numbers(table), data=Data(data, 24, 8)))
    headless = replace(of_numbers(table), head=None)
    with pytest.raises(RecipeError, match="loss='mse' needs a head that is one linear layer"):
        check_recipe(headless, meta_backbone(headless))


def test_mixed_images_have_mixed_numbers(table):
    """Mixup mixes numbers by the shares of the images, whatever their unit: the mean over a batch stays."""
    recipe = of_numbers(table, plain, augment=Augment(mixup=1.0))
    net, _, (train, _) = prepare(recipe)
    criterion = Criterion(recipe, net, train, torch.device("cpu"))
    labels = torch.tensor(YEARS[:8, None], dtype=torch.float32)
    _, mixed = criterion.mix(torch.rand(8, 3, 24, 24), labels, 3)
    assert mixed.mean().item() == pytest.approx(labels.mean().item(), rel=1e-6) and not torch.equal(mixed, labels)
