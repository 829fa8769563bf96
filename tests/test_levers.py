"""Every lever of training against a library or a closed form: what is minimised, clipped, averaged, sampled, scored."""

import math
import random
import shutil

import numpy as np
import pytest
import timm.data
import timm.layers
import timm.loss
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, log_loss
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy, multilabel_soft_margin_loss, one_hot
from torchvision.transforms.functional import hflip

from conftest import SmallNet, prepare, run_here, small_recipe
from finetune.augment import mix_neighbours, scoring_transform, training_transform
from finetune.backbone import build_backbone, head_parameters, preprocessing
from finetune.batches import SeededImages, balanced_chances, load, plan_epoch
from finetune.lr_schedule import Constant
from finetune.objective import Objective, clip
from finetune.param_groups import split_parameters
from finetune.recipe import SGD, Augment, Data, EarlyStop, Frozen, Group, RecipeError
from finetune.scores import scores
from finetune.train_loop import evaluate

ALL = (Group("all", ".", lr=1e-2),)


def plain(**changes):
    """Two epochs of SGD at one rate, everything trained, nothing clipped."""
    return small_recipe(
        **{"groups": ALL, "optimizer": SGD(momentum=0.9), "schedule": Constant(), "epochs": 2, "clip_norm": None, **changes}
    )


def bare_loop(recipe, loss_of, clip_gradients=lambda parameters: None):
    """(network, its weights after each update) of a bare SGD loop over the recipe's batches."""
    net, _, images = prepare(recipe)
    optimizer, trail = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9), []
    for epoch in range(recipe.epochs):
        for update in plan_epoch(22, 8, recipe.seed, epoch):
            ((batch, labels),) = load(images[0], epoch, update.micro_batches, 0)
            optimizer.zero_grad()
            loss_of(net, net(batch), labels).backward()
            clip_gradients(net.parameters())
            optimizer.step()
            trail.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    return net, trail


def mean_loss(net, logits, labels):
    return cross_entropy(logits, labels)


def assert_same_weights(net, reference, tolerance=1e-6):
    for name, tensor in reference.items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=0, atol=tolerance)


def objective(recipe, labels=None, device="cpu"):
    """The objective of SmallNet on a set of these labels."""
    images = prepare(recipe)[2][0] if labels is None else SimpleSet(labels)
    return Objective(recipe, SmallNet(), images, torch.device(device))


class SimpleSet(SeededImages):
    """Labels without images, of 4 classes."""

    def __init__(self, labels):
        super().__init__(self, None, 0, ("a", "b", "c", "d"))
        self.given = labels

    def __len__(self):
        return len(self.given)

    def labels(self):
        return np.asarray(self.given)


# clipping


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
    """Each way of clipping acts once an update on its whole gradient, as the library's own function in a bare loop."""
    recipe = plain(**changes)
    reference, trail = bare_loop(recipe, mean_loss, theirs)
    assert_same_weights(run_here(recipe, tmp_path / "a", accumulate)[0], trail[-1])
    unclipped = bare_loop(recipe, mean_loss)[1][-1]
    assert (trail[-1]["fc.weight"] - unclipped["fc.weight"]).abs().max() > 1e-4


def test_the_logged_norm_is_from_before_clipping():
    """Norm, value and adaptive clipping follow each other; the returned norm is the raw one, of what trains alone."""
    net = SmallNet()
    net.stem.requires_grad_(False)
    net(torch.randn(4, 3, 24, 24)).sum().backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    raw = [p.grad.clone() for p in trained]
    norm = clip(small_recipe(clip_norm=0.5, clip_value=0.01), trained)
    assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in raw)), rel=1e-5)
    scaled = [(g * 0.5 / norm).clamp(-0.01, 0.01) for g in raw]
    for parameter, gradient in zip(trained, scaled, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


# losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_loss_is_timms(smoothing):
    """loss="binary" equals timm's BinaryCrossEntropy with its smoothing, on labels of one class."""
    logits, labels = torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    ours = objective(small_recipe(loss="binary", label_smoothing=smoothing), [0]).loss(logits, labels) / 6
    theirs = timm.loss.BinaryCrossEntropy(smoothing=smoothing)(logits, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_multi_label_loss_is_torchs():
    """loss="multi_label" equals torch's multilabel_soft_margin_loss; an unreadable image counts for nothing."""
    logits, labels = torch.randn(6, 4), torch.randint(0, 2, (6, 4)).float()
    ours = objective(small_recipe(loss="multi_label", score="mean_average_precision"), [0])
    torch.testing.assert_close(ours.loss(logits, labels) / 6, multilabel_soft_margin_loss(logits, labels))
    labels[2] = -100
    seen = [0, 1, 3, 4, 5]
    torch.testing.assert_close(ours.loss(logits, labels) / 5, multilabel_soft_margin_loss(logits[seen], labels[seen]))


def test_smoothing_mixed_targets_is_timms():
    """Smoothing after mixing gives timm's mixed and smoothed targets, for one label and for several."""
    labels = torch.tensor([0, 3, 1, 1])
    for several, kind in ((False, "binary"), (True, "multi_label")):
        targets = one_hot(labels, 4).float() if several else labels
        theirs = timm.data.mixup.mixup_target(targets, 4, 0.3, smoothing=0.2, multi_label=several)
        mixed = timm.data.mixup.mixup_target(targets, 4, 0.3, smoothing=0.0, multi_label=several)
        logits = torch.randn(4, 4)
        score = "mean_average_precision" if several else "top1"
        ours = objective(small_recipe(loss=kind, label_smoothing=0.2, score=score), [0])
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, theirs) * 4
        torch.testing.assert_close(ours.loss(logits, mixed), expected)
    theirs = timm.loss.SoftTargetCrossEntropy()(logits, timm.data.mixup.mixup_target(labels, 4, 0.3, smoothing=0.2)) * 4
    mixed = timm.data.mixup.mixup_target(labels, 4, 0.3)
    torch.testing.assert_close(objective(small_recipe(label_smoothing=0.2), [0]).loss(logits, mixed), theirs)


def test_balanced_class_weights_are_scikit_learns(tmp_path):
    """class_weights="balanced" is scikit-learn's formula, and a run with weights takes a bare loop's weighted steps."""
    labels = [0] * 7 + [1] * 2 + [2] * 3 + [3]
    found = objective(small_recipe(class_weights="balanced"), labels).class_weights
    assert found.tolist() == pytest.approx(compute_class_weight("balanced", classes=np.arange(4), y=labels).tolist())
    assert found[labels].mean().item() == pytest.approx(1.0)
    weights = tuple(float(i + 1) for i in range(10))
    recipe = plain(class_weights=weights)
    trail = bare_loop(
        recipe, lambda net, logits, labels: cross_entropy(logits, labels, torch.tensor(weights), reduction="sum") / len(labels)
    )[1]
    assert_same_weights(run_here(recipe, tmp_path, 2)[0], trail[-1], 1e-5)


@pytest.mark.parametrize("weights,fault", [((1.0, 2.0), "class_weights: 2 for 10 classes"), ("balanced", "a list `targets`")])
def test_class_weights_that_do_not_fit_are_refused(weights, fault):
    """A wrong number of weights, and a data set that does not tell its labels, each get one message."""

    class Untold:
        classes = tuple("0123456789")

        def __len__(self):
            return 3

    with pytest.raises(RecipeError, match=fault):
        Objective(small_recipe(class_weights=weights), SmallNet(), SeededImages(Untold(), None, 0, Untold.classes), "cpu")


def test_l2_sp_is_its_closed_form(tmp_path):
    """The pull is l2_sp times the distance from the start, on the backbone's weights only, once an update however it is cut."""
    recipe = plain(l2_sp=0.5)
    start = {name: p.detach().clone() for name, p in prepare(recipe)[0].named_parameters()}

    def loss(net, logits, labels):
        pulled = [p for name, p in net.named_parameters() if name in ("stem.weight", "body.weight")]
        return cross_entropy(logits, labels) + 0.25 * sum(
            (p - start[name]).square().sum() for name, p in net.named_parameters() if any(p is one for one in pulled)
        )

    trail = bare_loop(recipe, loss)[1]
    for accumulate in (1, 2):
        assert_same_weights(run_here(recipe, tmp_path / str(accumulate), accumulate)[0], trail[-1])
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


# mixing


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}], ids=str)
def test_neighbours_are_mixed_as_timm_mixes(alphas):
    """Each pair of neighbours comes out as timm's Mixup of that pair alone under the same draw; a last odd one stays itself."""
    mixup = timm.data.Mixup(alphas.get("mixup", 0), alphas.get("cutmix", 0), label_smoothing=0.0, num_classes=10)
    images, labels = torch.randn(7, 3, 16, 16), torch.randint(0, 10, (7,))
    from finetune.batches import seed_all

    for key in range(4):
        mixed, targets = mix_neighbours(mixup, images.clone(), labels, (0, key))
        order = [0, 2, 4, 6, 5, 3, 1]
        for first in (0, 2, 4):
            seed_all("mix", 0, key)
            theirs, soft = mixup(images[first : first + 2].clone(), labels[first : first + 2])
            for i in (0, 1):
                at = order.index(first + i)
                assert torch.equal(mixed[at], theirs[i]) and torch.equal(targets[at], soft[i])
        torch.testing.assert_close(mixed[3], images[6])
        assert targets[3, labels[6]] == pytest.approx(1.0)


@pytest.mark.parametrize("processes,accumulate", [(1, 2), (2, 1), (1, 3), (3, 2), (4, 1)])
def test_pairs_stay_together_however_an_update_is_cut(processes, accumulate):
    """Over all micro-batches the same pairs come together, in the same updates, as when nothing is cut."""

    def pairs(processes, accumulate):
        found = []
        for update in zip(
            *(plan_epoch(23, 12, 0, 1, p, processes, accumulate, pairs=True) for p in range(processes)), strict=True
        ):
            cuts = [cut for part in update if part.weight for cut in part.micro_batches]
            assert sorted(i for cut in cuts for i in cut) == sorted(update[0].images)
            found.append({tuple(cut[i : i + 2]) for cut in cuts for i in range(0, len(cut), 2)})
        return found

    assert pairs(processes, accumulate) == pairs(1, 1)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_mixed_run_is_the_same_however_it_is_cut(tmp_path, accumulate):
    """Mixup and cutmix with accumulation give the weights of whole batches, and other weights than without mixing."""
    recipe = plain(augment=Augment(mixup=0.4, cutmix=1.0))
    whole, _ = run_here(recipe, tmp_path / "whole")
    assert_same_weights(run_here(recipe, tmp_path / "cut", accumulate)[0], whole.state_dict())
    unmixed, _ = run_here(plain(), tmp_path / "unmixed")
    assert (whole.fc.weight - unmixed.fc.weight).abs().max() > 1e-3


def test_each_update_and_each_seed_mixes_by_its_own_draw():
    """Two updates, and two seeds, mix the same images differently; the same update mixes them the same again."""
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4

    def mixed(step, seed=0):
        recipe = small_recipe(augment=Augment(mixup=0.4, cutmix=1.0), seed=seed)
        return objective(recipe, [0]).mix(images.clone(), labels, step)[1]

    assert torch.equal(mixed(3), mixed(3))
    assert not torch.equal(mixed(3), mixed(4)) and not torch.equal(mixed(3), mixed(3, seed=1))


# sampling


def test_balanced_sampling_draws_each_class_equally():
    """Chances are those of torch's WeightedRandomSampler with weights 1 / count; drawn classes come equally often, by epoch."""
    labels = np.array([0] * 700 + [1] * 200 + [2] * 100)
    chances = balanced_chances(labels)
    weights = torch.tensor(1 / np.bincount(labels)[labels])
    torch.testing.assert_close(torch.tensor(chances), weights / weights.sum())
    draw = [i for update in plan_epoch(1000, 64, 0, 3, chances=chances) for i in update.images]
    assert len(draw) == 1000 and len(set(draw)) < 1000
    drawn = np.bincount(labels[draw])
    assert abs(drawn - 1000 / 3).max() < 4 * math.sqrt(1000 * 1 / 3 * 2 / 3)  # four standard deviations of a binomial
    again, other = (
        [i for update in plan_epoch(1000, 64, 0, epoch, chances=chances) for i in update.images] for epoch in (3, 4)
    )
    assert draw == again != other


def test_balanced_sampling_reaches_the_run(tmp_path):
    """The rare class of an uneven folder is seen as often as the common one."""
    seen = []

    class Watching(SeededImages):
        def __getitem__(self, key):
            seen.append(self.labels()[key[1]])
            return super().__getitem__(key)

    def uneven():
        train = Coloured([0] * 40 + [1] * 5)
        return train, Coloured([0, 1, 0, 1])

    from finetune import augment

    recipe = small_recipe(groups=ALL, epochs=8, data=Data(uneven, 24, 8, sampling="balanced"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(augment, "SeededImages", Watching)
        run_here(recipe, tmp_path)
    drawn = np.bincount([label for i, label in enumerate(seen)])
    assert drawn[1] > 100  # of 360 drawn; 40 if every image came once an epoch


class Coloured:
    """Images of one colour for each label."""

    def __init__(self, labels, classes=("dark", "light")):
        self.targets, self.classes = labels, list(classes)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError
        label = self.targets[index]
        level = 60 + 40 * sum((i + 1) * int(bit) for i, bit in enumerate(np.atleast_1d(label)))
        return Image.new("RGB", (20, 20), (level, level // 2, 255 - level)), label


# what is scored


def test_several_labels_are_scored_as_scikit_learn_does(tmp_path):
    """A multi-label run from start to end; its scores equal scikit-learn's on the same logits."""
    labels = [np.array([i % 2, (i // 2) % 2, 0], dtype=np.float32) for i in range(24)]

    def several():
        return Coloured(labels, ("red", "dark", "never")), Coloured(labels[:9], ("red", "dark", "never"))

    recipe = small_recipe(groups=ALL, data=Data(several, 24, 8), loss="multi_label", score="mean_average_precision", epochs=3)
    net, rows = run_here(recipe, tmp_path)
    logits, truth = evaluate(recipe, net, prepare(recipe)[2][1], Accelerator(cpu=True))
    found, chances = scores(recipe, logits, truth), logits.sigmoid().numpy()
    truth = truth.numpy()
    by_class = [average_precision_score(truth[:, i], chances[:, i]) for i in range(2)] + [0.0]
    assert found["class_average_precision"] == pytest.approx(by_class, abs=1e-6)
    assert found["mean_average_precision"] == pytest.approx(np.mean(by_class), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, chances > 0.5, average="macro", zero_division=0))
    losses = [log_loss(truth[:, i], chances[:, i], labels=[0, 1]) for i in range(3)]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert [row["mean_average_precision"] for row in rows if "val_images" in row][-1] == found["mean_average_precision"]


def test_flipped_logits_are_averaged():
    """flip_test gives the mean of the logits of each image and of its mirror image, made by torchvision."""
    recipe = small_recipe(flip_test=True)
    net, _, images = prepare(recipe)
    logits, _ = evaluate(recipe, net, images[1], Accelerator(cpu=True))
    ((batch, _),) = load(images[1], 0, [list(range(len(images[1])))], 0)
    with torch.no_grad():
        torch.testing.assert_close(logits, (net(batch) + net(hflip(batch))) / 2)
        assert (logits - net(batch)).abs().max() > 1e-4


def test_the_score_chooses_the_best_epoch(tmp_path):
    """score="macro_f1" keeps the epoch of the highest macro F1."""
    kept = []
    recipe = small_recipe(groups=ALL, epochs=6, score="macro_f1")
    _, rows = run_here(recipe, tmp_path, save_model=lambda path, net: kept.append(1))
    found = [row["macro_f1"] for row in rows if "val_images" in row]
    assert len(kept) == sum(value > max([-1.0, *found[:i]]) for i, value in enumerate(found))


# averaging, stopping, saving memory


def test_the_average_is_its_recurrence(tmp_path):
    """Scores and network are of the average: a float64 recurrence over the weights of a bare loop, timm's warmup in it."""
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
    logits, labels = evaluate(recipe, net, prepare(recipe)[2][1], Accelerator(cpu=True))
    assert rows[-1]["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_early_stopping_counts_as_torchs_plateau(mode):
    """It stops after the very epoch at which torch's ReduceLROnPlateau with one epoch less of patience first cuts the rate."""
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
            assert stop.stops(rows, "top1") == cut
            if cut:
                stopped.add(epoch)
                break
    assert len(stopped) > 5


def test_a_run_stops_early_and_stays_stopped(tmp_path):
    """A run whose score never improves ends after `patience` more epochs; resumed, it trains no further."""
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


# the network's and the transforms' own


def test_dropout_and_drop_path_are_timms():
    """The rates reach timm: before the classifier, and rising over the blocks as timm lays them out."""
    recipe = small_recipe(backbone="resnet18", head=None, dropout=0.3, drop_path=0.2)
    net = build_backbone(recipe, 10)
    assert net.drop_rate == 0.3
    rates = [module.drop_prob for module in net.modules() if isinstance(module, timm.layers.DropPath)]
    theirs = timm.create_model("resnet18", drop_path_rate=0.2)
    assert rates == [m.drop_prob for m in theirs.modules() if isinstance(m, timm.layers.DropPath)] and max(rates) == 0.2


@pytest.mark.parametrize(
    "changes,fault",
    [
        ({"backbone": "vgg11", "drop_path": 0.1}, "vgg11 does not take dropout=0.0, drop_path=0.1"),
        ({"backbone": "vgg11", "gradient_checkpointing": True}, "gradient_checkpointing=True"),
    ],
)
def test_a_network_without_the_lever_is_said(changes, fault):
    """A timm network that does not know drop path or checkpointing is named with the option."""
    with pytest.raises(RecipeError) as caught:
        build_backbone(small_recipe(head=None, **changes), 10)
    assert fault in str(caught.value)


def test_random_erasing_is_timms():
    """erasing is the probability that a rectangle of the normalised image becomes noise, in training alone."""
    recipe = small_recipe(augment=Augment(erasing=1.0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0))
    inputs = preprocessing(recipe, SmallNet())
    image = np.full((24, 24, 3), (200, 100, 50), np.uint8)

    def seen(transform):
        return transform.batch(transform.image(image)[None])[0]

    torch.manual_seed(0)
    erased = (seen(training_transform(recipe, inputs)) - seen(scoring_transform(inputs))).abs().amax(0) > 1e-4
    rows, columns = erased.any(1).nonzero().flatten(), erased.any(0).nonzero().flatten()
    assert 0.02 <= erased.float().mean() <= 1 / 3 + 0.1  # timm's range of areas
    assert erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one rectangle
    plain = small_recipe(augment=Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0))
    torch.testing.assert_close(seen(training_transform(plain, inputs)), seen(scoring_transform(inputs)))


# rates of single groups


def test_a_groups_own_schedule_and_warmup_are_torchs():
    """Every 5 epochs times 0.9 is torch's StepLR; warmup from the unfreezing on is torch's LinearLR begun at that epoch."""
    from finetune.lr_schedule import Step

    recipe = small_recipe(
        epochs=20,
        schedule=Constant(),
        groups=(
            Group("head", "fc", lr=1e-2, schedule=Step(every=5, factor=0.9)),
            Group("late", "body", lr=1e-3, unfreeze_at=4, warmup_epochs=1.5),
            Frozen("rest", "."),
        ),
    )
    head, late, rest = split_parameters(recipe, SmallNet())
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5 * 6, gamma=0.9)
    for step in range(120):
        assert head.rate(step, 6, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=9)
    assert [late.rate(step, 6, 20) for step in range(24)] == [0.0] * 24
    for step in range(24, 120):
        assert late.rate(step, 6, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()
    assert {rest.rate(step, 6, 20) for step in range(120)} == {0.0}


def test_a_default_rate_for_what_is_not_named():
    """Two linear layers of a classifier at 1e-2 and everything else at 1e-5, by two rows."""
    recipe = small_recipe(
        backbone="torchvision/vgg11",
        head=None,
        data=Data("digits", 64, 8),
        groups=(Group("classifier", r"classifier\.[36]", lr=1e-2), Group("rest", ".", lr=1e-5)),
    )
    with torch.device("meta"):
        net = build_backbone(recipe, 10)
    rates = {name: group.lr for group in split_parameters(recipe, net) for name in group.params}
    assert {name for name, rate in rates.items() if rate == 1e-2} == {
        f"classifier.{i}.{kind}" for i in (3, 6) for kind in ("weight", "bias")
    }
    assert set(rates) == {name for name, _ in net.named_parameters()} and set(rates.values()) == {1e-2, 1e-5}
