"""A recipe in loops that are not ours: the other library runs for real, with the recipe's learning rates, decays and stages."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from finetune.data.batches import plan_epoch
from finetune.data.loader import load
from finetune.optim.adapters import make_lr_scheduler, make_optimizer, unfreeze
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups, planned_lrs
from finetune.recipe import SGD, Group, LayerDecay, Plateau, Switch
from finetune.utils.errors import RecipeError
from helpers import prepare, run_here, small_recipe

STEPS = 3  # an epoch: 22 images in batches of 8


def recipe_of(**changes):
    """Three stages of a small network with batch norm whose pretrained statistics must not move."""
    return small_recipe(
        **{
            "backbone": "test_resnet",
            "head": None,
            "batch_norm": "frozen",
            "groups": (
                Group("head", "fc", lr=1e-2),
                Group("late", r"layer[34]", lr=3e-3, unfreeze_at=1, warmup_epochs=0.5),
                Group("rest", ".", lr=1e-3, unfreeze_at=2, optimizer=SGD(momentum=0.9), weight_decay=0.3),
            ),
            **changes,
        }
    )


class Watch:
    """What the other loop really did: each step's lrs, each epoch's trained groups, statistics that moved."""

    def __init__(self, recipe):
        self.recipe, (self.net, _, (images, _)) = recipe, prepare(recipe)
        self.images = [(batch[0], labels[0]) for batch, labels in load(images, 0, [[i] for i in range(22)], 0)]
        self.optimizer = make_optimizer(recipe, self.net)
        self.scheduler = make_lr_scheduler(recipe, self.net, self.optimizer, STEPS)
        self.start = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        self.lrs, self.trained = [], []

    def note(self, epoch=None):
        if epoch is not None:
            unfreeze(self.recipe, self.net, epoch)
        self.lrs.append({row["name"]: row["lr"] for row in self.optimizer.param_groups})
        self.trained.append(
            {
                group.name
                for group in build_param_groups(self.recipe, self.net)
                if all(p.requires_grad for p in group.params.values())
            }
        )

    def check(self):
        """Learning rates are the plan's, to the bit; decays and optimizers are ours; stages came in time; norms stayed."""
        planned = planned_lrs(build_param_groups(self.recipe, self.net), range(4 * STEPS), STEPS, 4)
        assert self.lrs == [{name: values[step] for name, values in planned.items()} for step in range(4 * STEPS)]
        ours = build_optimizer(build_param_groups(self.recipe, self.net))
        assert [(row["name"], row["weight_decay"], len(row["params"])) for row in self.optimizer.param_groups] == [
            (row["name"], row["weight_decay"], len(row["params"])) for row in ours.param_groups
        ]
        assert self.trained == [{"head"}] * 3 + [{"head", "late"}] * 3 + [{"head", "late", "rest"}] * 6
        moved = {name for name, tensor in self.net.state_dict().items() if not torch.equal(tensor, self.start[name])}
        assert not any("running" in name or "batches" in name for name in moved)
        assert {"fc.weight", "layer4.0.conv1.weight", "conv1.0.weight"} <= moved

    def loader(self):
        """The training images in batches; a fresh order is the loop's own business."""
        return DataLoader(self.images, batch_size=8, shuffle=True)


def test_a_bare_pytorch_loop_is_ours_to_the_bit(tmp_path):
    """Four lines in a bare loop give the very weights of a run of this repository on the same batches."""
    recipe = small_recipe(clip_norm=None)
    net, _, (images, _) = prepare(recipe)
    optimizer = make_optimizer(recipe, net)
    scheduler = make_lr_scheduler(recipe, net, optimizer, STEPS)
    for epoch in range(recipe.epochs):
        unfreeze(recipe, net, epoch)
        for plan in plan_epoch(22, 8, recipe.seed, epoch):
            ((batch, labels),) = load(images, epoch, plan.micro_batches, 0)
            optimizer.zero_grad()
            (cross_entropy(net(batch.contiguous()), labels, reduction="sum") / len(labels)).backward()
            optimizer.step()
            scheduler.step()
    ours, _ = run_here(recipe, tmp_path)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_a_plateau_follows_the_metrics_the_loop_appends():
    """In another loop a Plateau cuts the learning rate when the metrics given to it have stalled."""
    recipe = small_recipe(schedule=Plateau(patience=0, factor=0.5), groups=(Group("all", ".", lr=1e-2),))
    net, history = prepare(recipe)[0], []
    optimizer = make_optimizer(recipe, net)
    scheduler = make_lr_scheduler(recipe, net, optimizer, STEPS, history)
    seen = []
    for epoch in range(4):
        unfreeze(recipe, net, epoch)
        for _ in range(STEPS):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if _ == STEPS - 1:
                history.append({"top1": 0.5, "loss": 1.0})
            scheduler.step()
    assert seen == [1e-2] * 6 + [5e-3] * 3 + [2.5e-3] * 3


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_norms_hold_still_whatever_the_loop_calls(batch_norm):
    """After net.train() frozen norms keep their statistics, others move if the recipe says so, however often one unfreezes."""
    recipe = recipe_of(batch_norm=batch_norm)
    net = prepare(recipe)[0]
    for epoch in (0, 0, 1):
        unfreeze(recipe, net, epoch)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items() if "running_mean" in name}
    net.train()(torch.randn(4, 3, 32, 32))
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, net.state_dict()[name])}
    assert moved == ({name for name in before if name.startswith(("layer3", "layer4"))} if batch_norm == "train" else set())
    assert max(len(module._forward_pre_hooks) for module in net.modules()) == 1


def test_what_has_no_place_in_another_loop_is_refused():
    """A switch of optimizers needs two of them: refused with the remedy."""
    recipe = recipe_of(switch=Switch(at=1, optimizer=SGD()))
    with pytest.raises(RecipeError, match=r"make a second optimizer yourself, from dataclasses.replace\(recipe, ...\)"):
        make_optimizer(recipe, prepare(recipe)[0])


def test_a_layer_decay_recipe_travels_too():
    """LayerDecay's rows reach another loop with their learning rates."""
    recipe = recipe_of(groups=LayerDecay(head_lr=1e-2, stem_ratio=0.1))
    net = prepare(recipe)[0]
    lrs = {row["name"]: row["lr"] for row in make_optimizer(recipe, net).param_groups}
    assert lrs == {group.name: group.lr for group in build_param_groups(recipe, net)} and len(lrs) > 3


def test_transformers_trainer(tmp_path):
    """transformers' Trainer, by its `optimizers` pair and a callback of three lines."""
    transformers = pytest.importorskip("transformers")
    watch = Watch(recipe_of())

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = watch.net

        def forward(self, pixel_values, labels):
            logits = self.net(pixel_values)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    class Stages(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            unfreeze(watch.recipe, watch.net, round(state.epoch or 0))

        def on_step_begin(self, args, state, control, **kwargs):
            watch.note()

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=4,
        per_device_train_batch_size=8,
        max_grad_norm=watch.recipe.clip_norm,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    data = [{"pixel_values": image, "labels": label} for image, label in watch.images]
    transformers.Trainer(
        WithLoss(), arguments, train_dataset=data, callbacks=[Stages()], optimizers=(watch.optimizer, watch.scheduler)
    ).train()
    watch.check()


def test_lightning(tmp_path):
    """Lightning, by configure_optimizers and one hook."""
    lightning = pytest.importorskip("lightning")
    watch = Watch(recipe_of())

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = watch.net

        def training_step(self, batch, index):
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return {"optimizer": watch.optimizer, "lr_scheduler": {"scheduler": watch.scheduler, "interval": "step"}}

        def on_train_epoch_start(self):
            unfreeze(watch.recipe, self.net, self.current_epoch)

        def on_train_batch_start(self, batch, index):
            watch.note()

    lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(Module(), watch.loader())
    watch.check()


def test_fastai():
    """fastai's Learner, by an OptimWrapper and a callback of its own kind."""
    fastai = pytest.importorskip("fastai.vision.all")
    watch = Watch(recipe_of())

    class Stages(fastai.Callback):
        def before_fit(self):  # fit() has set one learning rate for all
            for row, lr in zip(watch.optimizer.param_groups, watch.scheduler.get_last_lr(), strict=True):
                row["lr"] = lr

        def before_train(self):
            unfreeze(watch.recipe, watch.net, self.epoch)

        def before_batch(self):
            if self.training:
                watch.note()

        def after_step(self):
            watch.scheduler.step()

    loaders = fastai.DataLoaders(watch.loader(), watch.loader())
    learner = fastai.Learner(
        loaders,
        watch.net,
        loss_func=cross_entropy,
        cbs=[Stages()],
        opt_func=lambda params, **options: fastai.OptimWrapper(opt=watch.optimizer),
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(4)
    watch.check()
