"""Options of evaluation and of the run: metrics, averages, early stopping, compilation."""

import random
import shutil

import numpy as np
import pytest
import timm.data
import timm.layers
import timm.loss
import torch
from accelerate import Accelerator
from sklearn.metrics import average_precision_score, f1_score, log_loss
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import hflip

from finetune.data.loader import load
from finetune.metrics.compute import compute_metrics
from finetune.models.backbone import build_backbone
from finetune.recipe import SGD, Data, EarlyStop, Group
from finetune.training import loop as train_loop
from finetune.training.evaluate import predict_logits
from finetune.utils.errors import RecipeError
from helpers import (
    ALL,
    Coloured,
    assert_same_weights,
    bare_loop,
    mean_loss,
    plain,
    prepare,
    run_here,
    same_tensors,
    small_recipe,
)


def test_several_labels_are_measured_as_scikit_learn_does(tmp_path):
    """A multi-label run from start to end; its metrics equal scikit-learn's on the same logits."""
    labels = [np.array([i % 2, (i // 2) % 2, 0], dtype=np.float32) for i in range(24)]

    def several():
        return Coloured(labels, ("red", "dark", "never")), Coloured(labels[:9], ("red", "dark", "never"))

    recipe = small_recipe(groups=ALL, data=Data(several, 24, 8), loss="multi_label", metric="mean_average_precision", epochs=3)
    net, rows = run_here(recipe, tmp_path)
    logits, truth = predict_logits(recipe, net, prepare(recipe)[2][1], Accelerator(cpu=True))
    found, probs = compute_metrics(recipe, logits, truth), logits.sigmoid().numpy()
    truth = truth.numpy()
    by_class = [average_precision_score(truth[:, i], probs[:, i]) for i in range(2)] + [0.0]
    assert found["class_average_precision"] == pytest.approx(by_class, abs=1e-6)
    assert found["mean_average_precision"] == pytest.approx(np.mean(by_class), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, probs > 0.5, average="macro", zero_division=0))
    losses = [log_loss(truth[:, i], probs[:, i], labels=[0, 1]) for i in range(3)]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert [row["mean_average_precision"] for row in rows if "val_images" in row][-1] == found["mean_average_precision"]


def test_flipped_logits_are_averaged():
    """flip_test gives the mean of the logits of each image and of its mirror image, made by torchvision."""
    recipe = small_recipe(flip_test=True)
    net, _, images = prepare(recipe)
    logits, _ = predict_logits(recipe, net, images[1], Accelerator(cpu=True))
    ((batch, _),) = load(images[1], 0, [list(range(len(images[1])))], 0)
    with torch.no_grad():
        torch.testing.assert_close(logits, (net(batch) + net(hflip(batch))) / 2)
        assert (logits - net(batch)).abs().max() > 1e-4


@pytest.mark.parametrize("metric,best", [("top1", [0, 1]), ("macro_f1", [0, 2, 4])])
def test_the_metric_chooses_the_best_epoch(tmp_path, monkeypatch, metric, best):
    """The network is kept after each epoch that beats all before it by the recipe's metric, not at a tie."""
    pairs = ((0.2, 0.3), (0.5, 0.2), (0.5, 0.6), (0.4, 0.6), (0.3, 0.7))
    made = [{"loss": 1.0, "val_images": 10, "top1": top1, "macro_f1": macro_f1} for top1, macro_f1 in pairs]
    done, kept = [], []
    monkeypatch.setattr(train_loop, "compute_metrics", lambda *given: done.append(made[len(done)]) or done[-1])
    recipe = small_recipe(groups=ALL, epochs=5, metric=metric)
    monkeypatch.setattr(train_loop, "save_model", lambda *given: kept.append(len(done) - 1))
    run_here(recipe, tmp_path)
    assert kept == best


def test_the_average_is_its_recurrence(tmp_path):
    """Metrics and network are of the average: a float64 recurrence over the weights of a bare loop, timm's warmup in it."""
    recipe = plain(ema_decay=0.6, epochs=3)
    net, rows = run_here(recipe, tmp_path)
    trail = bare_loop(recipe, mean_loss)[1]
    average = {}
    for step, weights in enumerate(trail, start=1):
        decay = 0.0 if step < 2 else min(0.6, 1 - step ** (-2 / 3))
        average = {name: decay * average.get(name, 0) + (1 - decay) * tensor.double() for name, tensor in weights.items()}
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=0, atol=1e-6)
    assert (net.fc.weight - trail[-1]["fc.weight"]).abs().max() > 1e-4
    logits, labels = predict_logits(recipe, net, prepare(recipe)[2][1], Accelerator(cpu=True))
    assert rows[-1]["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_early_stopping_counts_as_torchs_plateau(mode):
    """It stops after the very epoch at which torch's ReduceLROnPlateau with one epoch less of patience first cuts the lr."""
    stopped = set()
    for seed in range(40):
        draw, stop = random.Random(seed), EarlyStop(patience=3, mode=mode, threshold=0.01)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, patience=2, threshold=0.01, threshold_mode="abs")
        rows = []
        for epoch in range(20):
            rows.append({"top1": draw.random(), "loss": draw.random()})
            theirs.step(rows[-1]["top1" if mode == "max" else "loss"])
            cut = optimizer.param_groups[0]["lr"] < 1
            assert stop.should_stop(rows, "top1") == cut
            if cut:
                stopped.add(epoch)
                break
    assert len(stopped) > 5


def test_a_run_stops_early_and_stays_stopped(tmp_path):
    """A run whose metric never improves ends after `patience` more epochs; resumed, it trains no further."""
    recipe = small_recipe(groups=ALL, epochs=9, early_stop=EarlyStop(patience=2, threshold=0.9))
    rows = run_here(recipe, tmp_path)[1]
    assert [row["epoch"] for row in rows if "val_images" in row] == [0, 1, 2]
    assert run_here(recipe, tmp_path)[1] == rows


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(tmp_path, backbone):
    """The weights of a run are the same to rounding, and autograd keeps less for the backward pass."""
    kept, nets = [], []
    for checkpointing in (False, True):
        recipe = plain(
            backbone=backbone, head=None, data=Data("generated", 160, 8), epochs=1, gradient_checkpointing=checkpointing
        )
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            prepare(recipe)[0].train()(torch.randn(2, 3, 160, 160))
        kept.append(sum(sizes))
        nets.append(run_here(recipe, tmp_path / str(checkpointing))[0])
    assert kept[1] < 0.8 * kept[0]
    assert_same_weights(nets[1], nets[0].state_dict(), 1e-5)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_checkpointing_moves_statistics_once(tmp_path, backbone, accumulate):
    """Batch norm that trains ends with the weights and the statistics of the same run without, to the bit."""
    states = []
    for checkpointing in (False, True):
        recipe = plain(backbone=backbone, head=None, batch_norm="train", epochs=1, gradient_checkpointing=checkpointing)
        states.append(run_here(recipe, tmp_path / str(checkpointing), accumulate=accumulate)[0].state_dict())
    assert same_tensors(*states)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_run_is_the_same(tmp_path):
    """torch_compile compiles the network of each stage and changes the weights by rounding only; names stay."""
    compiled = []
    with pytest.MonkeyPatch.context() as patched:
        real = torch.compile
        patched.setattr(torch, "compile", lambda model: compiled.append(model) or real(model))
        recipe = small_recipe(
            groups=(Group("head", "fc", lr=1e-2), Group("rest", ".", lr=1e-3, unfreeze_at=1)),
            epochs=2,
            optimizer=SGD(),
            torch_compile=True,
        )
        fast, _ = run_here(recipe, tmp_path / "compiled")
    plain_run, _ = run_here(small_recipe(groups=recipe.groups, epochs=2, optimizer=SGD()), tmp_path / "plain")
    assert len(compiled) == 2
    assert_same_weights(fast, plain_run.state_dict(), 1e-5)


def test_dropout_and_drop_path_are_timms():
    """They reach timm: before the classifier, and rising over the blocks as timm lays them out."""
    recipe = small_recipe(backbone="resnet18", head=None, dropout=0.3, drop_path=0.2)
    net = build_backbone(recipe, 10)
    assert net.drop_rate == 0.3
    drops = [module.drop_prob for module in net.modules() if isinstance(module, timm.layers.DropPath)]
    theirs = timm.create_model("resnet18", drop_path_rate=0.2)
    assert drops == [m.drop_prob for m in theirs.modules() if isinstance(m, timm.layers.DropPath)] and max(drops) == 0.2


@pytest.mark.parametrize(
    "changes,fault",
    [
        ({"backbone": "vgg11", "drop_path": 0.1}, "vgg11 does not take dropout=0.0, drop_path=0.1"),
        ({"backbone": "vgg11", "gradient_checkpointing": True}, "gradient_checkpointing=True"),
    ],
)
def test_a_network_without_the_option_is_named(changes, fault):
    """A timm network that does not know drop path or checkpointing is named with the option."""
    with pytest.raises(RecipeError) as caught:
        build_backbone(small_recipe(head=None, **changes), 10)
    assert fault in str(caught.value)
