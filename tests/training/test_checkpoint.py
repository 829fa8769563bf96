"""A checkpoint alone: what is written, in which order, and what is taken back."""

import json
import os
import re
import shutil
from functools import partial

import pytest
import timm
import timm.optim
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from finetune.optim.optimizers import SeveralOptimizers
from finetune.recipe import Data
from finetune.training.checkpoint import read_state, restore, restore_optimizer, save_checkpoint
from finetune.training.logger import Logger
from finetune.training.run_dir import newest_checkpoint
from finetune.utils.errors import RecipeError
from helpers import ALL, Cut, DroppingNet, SmallNet, cut_at, same_tensors, scaling_accelerator, small_recipe

AFRESH = "to start again from the pretrained weights, name another --output"
IMAGES = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
SGD, AdamW = partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW


class Spectral(DroppingNet):
    """With a buffer that moves in training, and is no statistic of a norm."""

    def __init__(self):
        super().__init__()
        torch.nn.utils.spectral_norm(self.stem)


def logger_in(folder, accelerator=None):
    folder.mkdir(exist_ok=True)
    return Logger(folder, accelerator or Accelerator(cpu=True), small_recipe(), quiet=True)


def save(folder, net, optimizer, average=None, step=3, accelerator=None):
    """The checkpoint's folder."""
    logger = logger_in(folder, accelerator)
    logger.start()
    save_checkpoint(logger, net, average or net, optimizer, logger.accelerator, step, 100)
    return newest_checkpoint(folder)


def go_on(logger, net, average=None, optimizer=None, recipe=None):
    """restore(), of an optimizer without state if none is given."""
    optimizer = optimizer or torch.optim.SGD(net.parameters())
    return restore(recipe or small_recipe(), logger, net, average or net, optimizer, logger.accelerator, num_images=800)


def go_on_optimizer(folder, net, optimizer):
    """Give the optimizer what the folder's checkpoint has of it, and nothing else."""
    checkpoint = newest_checkpoint(folder)
    restore_optimizer(checkpoint, read_state(checkpoint), net, optimizer)


def train(net, optimizer, steps=1):
    def closure():
        optimizer.zero_grad()
        loss = net(IMAGES).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def head_and_rest(net):
    return [*net.fc.parameters()], [p for name, p in net.named_parameters() if not name.startswith("fc.")]


def each(head, rest):
    """An optimizer for the head and one for the rest, as one."""
    return lambda net: SeveralOptimizers([make([part], lr=0.01) for make, part in zip((head, rest), rows(net), strict=True)])


def rows(net):
    return [{"params": part} for part in head_and_rest(net)]


OPTIMIZERS = {
    "SGD": lambda net: SGD(rows(net), lr=0.01),
    "AdamW": lambda net: AdamW(rows(net), lr=0.01),
    "LBFGS": lambda net: torch.optim.LBFGS(net.parameters(), lr=0.01, max_iter=2),
    "timm's": lambda net: timm.optim.Lamb(rows(net), lr=0.01),
    "AdamW of the head": lambda net: AdamW(rows(net)[:1], lr=0.01),
    "timm's Adan": lambda net: timm.optim.Adan(rows(net), lr=0.01),
    "SGD, timm's": each(SGD, timm.optim.Lamb),
    "SGD, AdamW": each(SGD, AdamW),
    "AdamW, SGD": each(AdamW, SGD),
    "torch's": lambda net: torch.optim.Adafactor(rows(net), lr=0.01),
    "its namesake of timm": lambda net: timm.optim.Adafactor(rows(net), lr=0.01),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "LBFGS", "timm's", "timm's Adan", "SGD, timm's"])
def test_an_optimizer_goes_on(tmp_path, kind, old):
    """A step after restoring, with a layer unfrozen, is the unbroken one to the bit; also if the checkpoint has no kinds."""
    net, again, afresh = SmallNet(), SmallNet(), SmallNet()
    optimizer = OPTIMIZERS[kind](net)
    net.stem.requires_grad_(False)
    train(net, optimizer, steps=3)
    net.stem.requires_grad_(True)
    folder = save(tmp_path, net, optimizer)
    if old:
        state = json.loads((folder / "state.json").read_text())
        del state["optimizers"]
        (folder / "state.json").write_text(json.dumps(state))
    restored = OPTIMIZERS[kind](again)
    assert go_on(logger_in(tmp_path), again, optimizer=restored) == 3
    afresh.load_state_dict(again.state_dict())
    for one, its in ((net, optimizer), (again, restored), (afresh, OPTIMIZERS[kind](afresh))):
        train(one, its)
    assert same_tensors(net.state_dict(), again.state_dict())
    assert not same_tensors(net.state_dict(), afresh.state_dict())


def test_moments_follow_their_parameters(tmp_path):
    """Where param_groups change places, each parameter keeps its own moments."""
    net = SmallNet()
    optimizer = AdamW(rows(net), lr=0.01)
    train(net, optimizer)
    save(tmp_path, net, optimizer)
    turned = AdamW(rows(net)[::-1], lr=0.01)
    go_on_optimizer(tmp_path, net, turned)
    for parameter in net.parameters():
        assert same_tensors(optimizer.state[parameter], turned.state[parameter])


@pytest.mark.parametrize(
    "before,now,fault",
    [
        ("AdamW", "SGD", "has torch.AdamW's state of fc.weight, not torch.SGD's"),
        ("SGD", "AdamW", "has torch.SGD's state of fc.weight, not torch.AdamW's"),
        ("AdamW", "LBFGS", "has torch.AdamW's state of fc.weight, not torch.LBFGS's"),
        ("LBFGS", "AdamW", "has torch.LBFGS's state of stem.weight, not torch.AdamW's"),
        ("timm's", "SGD", "has timm.Lamb's state of fc.weight, not torch.SGD's"),
        ("torch's", "its namesake of timm", "has torch.Adafactor's state of fc.weight, not timm.Adafactor's"),
        ("SGD, AdamW", "AdamW, SGD", "has torch.SGD's state of fc.weight, not torch.AdamW's"),
        ("SGD", "SGD, AdamW", "has torch.SGD's state of stem.weight, not torch.AdamW's"),
        ("AdamW", "AdamW of the head", "is of another network, or other groups, than this recipe's"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(tmp_path, before, now, fault):
    """What one optimizer has gathered is not given to another, nor dropped without a word."""
    net = SmallNet()
    optimizer = OPTIMIZERS[before](net)
    train(net, optimizer)
    folder = save(tmp_path, net, optimizer)
    with pytest.raises(RecipeError, match=re.escape(f"checkpoint {folder} {fault}; {AFRESH}") + "$"):
        go_on_optimizer(tmp_path, net, Accelerator(cpu=True).prepare(OPTIMIZERS[now](net)))


def test_an_optimizer_without_state_may_be_changed(tmp_path):
    """SGD without momentum leaves nothing behind that another optimizer could mistake."""
    net = SmallNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    train(net, optimizer)
    save(tmp_path, net, optimizer)
    other = AdamW(net.parameters())
    go_on_optimizer(tmp_path, net, other)
    assert not other.state


@pytest.mark.parametrize("layer", ["stem", "fc"])
def test_a_network_of_other_shapes_is_refused(tmp_path, layer):
    """The same names with other shapes, such as those of one more class, are another network."""
    net, other = SmallNet(), SmallNet()
    other.stem, other.fc = {"stem": (torch.nn.Conv2d(3, 8, 5, 2), net.fc), "fc": (net.stem, torch.nn.Linear(16, 8))}[layer]
    folder = save(tmp_path, net, SGD(net.parameters()))
    fault = re.escape(f"checkpoint {folder} is of another network, or other classes, than this recipe's; {AFRESH}")
    for pair in ((other, other), (net, other)):  # the network, and then its moving average alone
        shutil.copyfile(folder / "model.safetensors", folder / "average.safetensors")
        with pytest.raises(RecipeError, match=fault):
            go_on(logger_in(tmp_path), *pair)


def test_a_checkpoint_holds_network_and_average(tmp_path):
    """Parameters and buffers of both come back to the bit, in any memory format; without an average no file is written."""
    net, average = DroppingNet().to(memory_format=torch.channels_last), DroppingNet()
    train(net, optimizer := SGD(net.parameters()))
    folder = save(tmp_path, net, optimizer, average)
    assert same_tensors(load_file(folder / "average.safetensors"), average.state_dict())
    again, its_average = DroppingNet(), DroppingNet()
    go_on(logger_in(tmp_path), again, its_average, SGD(again.parameters()))
    assert same_tensors(again.state_dict(), net.state_dict()) and same_tensors(its_average.state_dict(), average.state_dict())
    folder = save(tmp_path, net, optimizer, step=4)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "optimizer.pt", "state.json"]


def test_a_run_without_a_checkpoint_starts(tmp_path):
    """It starts at step 0, and what an earlier try left in the metrics is gone."""
    logger = logger_in(tmp_path)
    logger.metrics_file.write_text("old\n")
    assert go_on(logger, SmallNet()) == 0 and logger.metrics_file.read_text() == ""


def test_a_checkpoint_of_version_0_1_goes_on_and_says_what_differs(tmp_path, capsys):
    """Its names are read, and one sentence says why the bits may not be those of an unbroken run."""
    net = SmallNet()
    folder = save(tmp_path, net, SGD(net.parameters()))
    state = json.loads((folder / "state.json").read_text())
    state = {**state, "epochs": [{"epoch": 0, "top1": 0.5}], "head": {"epoch": -1, "top1": 0.4}, "best_epoch": 0}
    (folder / "state.json").write_text(json.dumps({key: state[key] for key in state if key not in ("history", "linear_probe")}))
    logger = Logger(tmp_path, Accelerator(cpu=True), small_recipe())
    assert go_on(logger, net) == 3
    assert [row["top1"] for row in logger.rows()] == [0.4, 0.5]
    assert "started by version 0.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes,spoken",
    [
        ({}, ""),
        ({"label_smoothing": 0.1, "ema_decay": 0.9, "batch_norm": "train"}, ""),
        ({"class_weights": "balanced"}, ""),
        ({"class_weights": "balanced", "label_smoothing": 0.1}, "class weights of smoothed or mixed targets"),
        ({"backbone": "test_resnet", "head": None, "gradient_checkpointing": True, "batch_norm": "train"}, "checkpointing of"),
        ({"batch_norm": "train", "data": Data("generated", 24, batch_size=17)}, "last batch of one image"),  # 1 of 800
        ({"backbone": Spectral}, "spectral norm of frozen layers"),
        ({"backbone": Spectral, "groups": ALL}, ""),
    ],
)
def test_a_run_of_an_earlier_version_says_what_is_no_longer_as_before(tmp_path, capsys, changes, spoken):
    """Only where the recipe has something that was corrected: all others go on to the bit."""
    recipe = small_recipe(**{"backbone": DroppingNet, **changes})
    net = timm.create_model("test_resnet", num_classes=10) if recipe.backbone == "test_resnet" else recipe.backbone()
    folder = save(tmp_path, net, SGD(net.parameters()))
    state = json.loads((folder / "state.json").read_text())
    for now in (state, {key: state[key] for key in state if key != "steps_per_epoch"}):
        (folder / "state.json").write_text(json.dumps(now))
        capsys.readouterr()
        go_on(Logger(tmp_path, Accelerator(cpu=True), recipe), net, recipe=recipe)
        out = capsys.readouterr().out
        assert ("was started by an earlier version" in out) == (bool(spoken) and now is not state) and (
            now is state or spoken in out
        )


@pytest.mark.parametrize("before,now", [(False, False), (False, True), (True, False), (True, True)])
def test_the_scaler_goes_on_where_there_was_one(tmp_path, before, now):
    """A precision may change (--resume-anyway): fp16 then starts with a fresh scaler, and others leave the old one."""
    net = SmallNet()
    accelerator = scaling_accelerator() if before else None
    if before:
        accelerator.scaler.load_state_dict(accelerator.scaler.state_dict() | {"scale": 8.0, "_growth_tracker": 2})
    save(tmp_path, net, SGD(net.parameters()), accelerator=accelerator)
    logger = logger_in(tmp_path, scaling_accelerator() if now else None)
    fresh = now and logger.accelerator.scaler.state_dict()
    assert go_on(logger, net) == 3
    if now:
        assert logger.accelerator.scaler.state_dict() == (accelerator.scaler.state_dict() if before else fresh)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "average.safetensors", "optimizer.pt"])
@pytest.mark.parametrize(
    "spoil",
    [lambda file: file.write_bytes(file.read_bytes()[:20]), lambda file: torch.save(print, file), os.remove],
    ids=["cut", "code", "missing"],
)
def test_a_damaged_file_is_named(tmp_path, name, spoil):
    """The one message has the checkpoint, the file, the reason in one line, and what to do."""
    net, average = SmallNet(), SmallNet()
    train(net, optimizer := AdamW(net.parameters()))
    folder = save(tmp_path, net, optimizer, average)
    spoil(folder / name)
    with pytest.raises(RecipeError) as error:
        go_on(logger_in(tmp_path), net, average, optimizer)
    reason = str(error.value.__cause__).splitlines()[0]
    assert str(error.value) == f"checkpoint {folder} can't be read: {name}: {reason}; {AFRESH}"


def test_the_newest_of_two_checkpoints_counts(tmp_path, monkeypatch):
    """A kill after a checkpoint was written and before older ones are removed leaves two; the next one removes both."""
    net = SmallNet()
    optimizer = SGD(net.parameters())
    save(tmp_path, net, optimizer, step=9)
    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(shutil, "rmtree", cut_at(shutil.rmtree, 1))  # the first call clears the place to write in
        save(tmp_path, net, optimizer, step=10)
    (tmp_path / "checkpoints" / "notes").touch()  # a file is not removed, and stops nothing
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000009-epochs-00000", "step-00000010-epochs-00000"]
    assert newest_checkpoint(tmp_path).name == names[1]
    save(tmp_path, net, optimizer, step=11)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["notes", "step-00000011-epochs-00000"]
