"""A network in shards over two processes (FSDP2): the run of one process."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from finetune.models.sharding import blocks, laid_out_like
from finetune.run import main
from finetune.training.launch import OPTIMIZERS_IN_SHARDS
from finetune.training.run_dir import newest_checkpoint
from finetune.training.setup import check_micro_batches, shard_and_try
from finetune.utils.errors import RecipeError
from helpers import ROOT, SmallNet, prepare, small_recipe
from launching import ACCELERATE, contents

RECIPE = """
from finetune import AdamW, Cosine, Data, Group, LinearProbe, Recipe

recipe = Recipe(backbone="test_resnet", weights="none", data=Data("IMAGES", image_size=32, batch_size=14),
                linear_probe=LinearProbe(),
                groups=(Group("head", "fc", lr=1e-2, weight_decay=0.2), Group("body", r"layer[34]", lr=3e-3, unfreeze_at=1),
                        Group("stem", ".", lr=1e-3, unfreeze_at=2)),
                optimizer=AdamW(weight_decay=0.05), schedule=Cosine(warmup_epochs=0.5), batch_norm="frozen", epochs=4,
                clip_norm=0.5)
"""
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_state_dict_type: SHARDED_STATE_DICT}
machine_rank: 0
mixed_precision: 'no'
num_machines: 1
num_processes: 2
"""
DIES = """
import os, sys
sys.path.insert(0, ROOT)
from finetune.training import loop
real, calls = loop.save_checkpoint, []

def save_checkpoint(*arguments):
    real(*arguments)
    calls.append(1)
    if len(calls) == int(os.environ["DIES_AFTER"]):
        os._exit(9)

loop.save_checkpoint = save_checkpoint
from finetune.run import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory, image_folder):
    """Runs the recipe in a folder by a launcher, with a checkpoint each step; `dies_after` so many, it ends at once."""
    here = tmp_path_factory.mktemp("fsdp")
    (here / "net.py").write_text(RECIPE.replace("IMAGES", str(image_folder)))
    (here / "dies.py").write_text(DIES.replace("ROOT", repr(str(ROOT))))

    def run(launcher, output, dies_after=0, config=None):
        script = here / "dies.py" if dies_after else ROOT / "finetune" / "run.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIES_AFTER": str(dies_after)}
        if config:
            (here / "accelerate").mkdir()
            (here / "accelerate" / "default_config.yaml").write_text(config)
            environment["HF_HOME"] = str(here)
        words = ["--recipe", here / "net.py", "--output", output, "--resume", "auto", "--checkpoint-every", "1"]
        done = subprocess.run([*launcher, script, *words], capture_output=True, text=True, env=environment)
        assert dies_after or (output / "result.json").is_file(), done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory, launch):
    """The run on one process."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    launch([sys.executable], folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, launch):
    """The run on two, as a person's default config of Accelerate asks, and what it printed."""
    folder = tmp_path_factory.mktemp("sharded") / "out"
    return folder, launch(ACCELERATE, folder, config=CONFIG).stdout


def moments(folder):
    """The optimizer's state in the last checkpoint, by parameter."""
    return torch.load(newest_checkpoint(folder) / "optimizer.pt", weights_only=True)


def assert_same_run(folder, other):
    """Steps and learning rates are the same, and losses, gradients' norms, weights and moments to float32 rounding.

    AdamW divides by the gradient's own size, which enlarges rounding: 5e-7 was seen, and a step is 1e-2.
    """
    (one, rows, weights), (two, others, same_weights) = contents(folder), contents(other)
    assert one["steps"] == two["steps"] == 12 and one["top1"] == two["top1"]
    for row, same in zip(rows, others, strict=True):
        assert row.get("lr") == same.get("lr") and row["step"] == same["step"]
        assert row["loss"] == pytest.approx(same["loss"], abs=1e-5)
        assert row.get("grad_norm", 0) == pytest.approx(same.get("grad_norm", 0), rel=1e-5)
    assert weights.keys() == same_weights.keys()
    assert max((weights[name] - same_weights[name]).abs().max().item() for name in weights) < 1e-5
    state, same_state = moments(folder), moments(other)
    assert state.keys() == same_state.keys()
    for name, values in state.items():
        for key, value in values.items():
            torch.testing.assert_close(value, same_state[name][key], rtol=1e-3, atol=1e-6)


@pytest.mark.launches
def test_two_processes_in_shards_are_the_run_of_one(alone, sharded):
    """Probe, three stages, groups' own learning rates, decay and clipping, uneven shares of images: the same to rounding.

    What is kept is whole and plain: the model's folders have the same files, and timm's config.
    """
    folder, out = sharded
    assert "2 x cpu, FSDP2 in 4 blocks" in out and contents(folder)[0]["hardware"]["processes"] == 2
    assert_same_run(folder, alone)
    norms = [row["grad_norm"] for row in contents(folder)[1] if "grad_norm" in row]
    assert min(norms) < 0.5 < max(norms)  # some are clipped
    for file in ("model/config.json", "model-best/config.json", "groups.txt"):
        assert (folder / file).read_text() == (alone / file).read_text()
    drifts = [json.loads((run / "result.json").read_text())["drift"] for run in (folder, alone)]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-3)


@pytest.mark.launches
def test_a_killed_run_in_shards_goes_on(tmp_path, launch, sharded, alone):
    """On as many processes with the same bits; on one, and from there in shards again, with the same numbers to rounding."""
    launch([*ACCELERATE, *FSDP2], tmp_path / "a", dies_after=6)
    assert newest_checkpoint(tmp_path / "a").name.startswith("step-00000005")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    launch([*ACCELERATE, *FSDP2], tmp_path / "a")
    (_, rows, weights), (_, same_rows, same_weights) = contents(tmp_path / "a"), contents(sharded[0])
    assert rows == same_rows and all(torch.equal(weights[name], same_weights[name]) for name in weights)
    launch([sys.executable], tmp_path / "b", dies_after=5)
    launch([*ACCELERATE, *FSDP2], tmp_path / "b")
    assert_same_run(tmp_path / "b", alone)


STEPS = """
import sys
import torch
sys.path.insert(0, ROOT)
from finetune.models.sharding import gather_state, laid_out_like, shard
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import Optimizer, Recipe
from finetune.recipe.recipe import minimal_recipe
from finetune.training.launch import OPTIMIZERS_IN_SHARDS
from dataclasses import replace
import timm

torch.distributed.init_process_group("gloo")
for name in OPTIMIZERS_IN_SHARDS:
    recipe = replace(minimal_recipe("test_resnet", "generated", 32), optimizer=Optimizer(name))
    nets = []
    for sharded in (False, True):
        torch.manual_seed(0)
        net = timm.create_model("test_resnet", num_classes=3).to(memory_format=torch.channels_last)
        if sharded:
            shard(net, torch.device("cpu"))
        optimizer = build_optimizer(build_param_groups(recipe, net))
        for step in range(3):
            for parameter in net.parameters():
                parameter.grad = laid_out_like(parameter, torch.randn(parameter.shape))
            optimizer.step()
        nets.append(gather_state(net.state_dict()))
    if torch.distributed.get_rank() == 0:
        print(name, max((nets[0][key] - value).abs().max().item() for key, value in nets[1].items()))
torch.distributed.destroy_process_group()
"""


@pytest.mark.launches
def test_optimizers_step_in_shards_as_they_do_whole(tmp_path):
    """Each that is let through, by the same gradients, to rounding: the fused steps round otherwise."""
    (tmp_path / "steps.py").write_text(STEPS.replace("ROOT", repr(str(ROOT))))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "steps.py"]
    done = subprocess.run(torchrun, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    differences = dict(line.split() for line in done.stdout.splitlines())
    assert tuple(differences) == OPTIMIZERS_IN_SHARDS, done.stderr[-2000:]
    assert max(map(float, differences.values())) < 1e-6, differences


ASKED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def asked_for(monkeypatch):
    """The environment of the first of two processes that are asked for FSDP2."""
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "setting,name",
    [
        ("ema_decay=0.9", "ema_decay"),
        ("l2_sp=0.1", "l2_sp"),
        ("clip_adaptive=0.1", "clip_adaptive"),
        ("torch_compile=True", "torch_compile"),
        ("mixed_precision=fp16", "mixed_precision=fp16"),
        ("batch_norm=sync", "batch_norm=sync"),
        ("optimizer.name=lamb", "optimizer lamb"),
        ("backbone=dict", "a function as backbone"),
        ("fused=True", "an optimizer's option fused"),
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing (a recipe has gradient_checkpointing=True)"),
        ("FSDP_IGNORED_MODULES", "fsdp_ignored_modules"),
    ],
)
def test_what_does_not_go_with_shards_is_refused_by_name(here, capsys, monkeypatch, asked_for, setting, name):
    """Before anything is read or written, in a sentence."""
    in_the_file = {
        "backbone=dict": ('backbone="test_resnet"', 'backbone=dict, head="fc"'),
        "fused=True": ("0.05", "0.05, fused=True"),
    }
    field = [] if setting in in_the_file or setting.isupper() else ["--set", setting]
    if setting.isupper():
        monkeypatch.setenv(setting, "True")
    text = RECIPE.replace("AdamW,", "Optimizer,").replace("AdamW(", 'Optimizer("AdamW", ')
    (here / "net.py").write_text(text.replace(*in_the_file.get(setting, ("", ""))))
    assert main(["--recipe", "net.py", *field]) == 2
    error = capsys.readouterr().err
    assert f"does not go with {name}" in error and len(error.splitlines()) == 1
    assert [path.name for path in here.iterdir()] == ["net.py"]


def test_a_network_that_can_not_be_sharded_is_refused():
    """Such as one of tied weights: torch shards a parameter once."""

    class Tied(SmallNet):
        def __init__(self):
            super().__init__()
            self.norm.bias = self.stem.bias

    with pytest.raises(RecipeError, match="it ties weights; launch with --multi_gpu"):
        shard_and_try(small_recipe(), Tied(), torch.device("cpu"))


def test_micro_batches_are_refused_that_some_process_would_not_have(request):
    """All take part in each: 22 images in batches of 8 leave 6, which make no 8 micro-batches."""
    recipe = small_recipe()
    images = prepare(recipe)[2][0]
    check_micro_batches(recipe, images, 2, 4)
    request.getfixturevalue("asked_for")
    check_micro_batches(recipe, images, 8, 1)
    with pytest.raises(RecipeError, match="leave out --accumulate"):
        check_micro_batches(recipe, images, 2, 4)


def test_blocks_are_what_a_network_repeats():
    """Elements of lists of modules that are more than one layer; not the layers of a downsampling path."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.down = nn.Conv2d(1, 1, 1), nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))

    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(Block(), Block()), nn.ModuleList([Block()]))
    assert [type(part) for part in blocks(net)] == [Block] * 3


def test_moments_take_their_parameters_layout():
    """A step by moments that were kept contiguous is that of moments in the layout of a weight that is channels last."""
    torch.manual_seed(0)
    steps = []
    for keep in (lambda value: value, lambda value: value.contiguous()):
        weight = nn.Parameter(torch.ones(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW([weight], fused=True)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            weight.grad = torch.randn(weight.shape, generator=generator).contiguous(memory_format=torch.channels_last)
            optimizer.step()
            saved = optimizer.state_dict()
            state = {key: laid_out_like(weight, keep(value)) for key, value in saved["state"][0].items()}
            optimizer.load_state_dict({"state": {0: state}, "param_groups": saved["param_groups"]})
        steps.append(weight.detach().clone())
    assert torch.equal(*steps)
