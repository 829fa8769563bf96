"""Networks of every kind through everything at once: each works to the bit, or is refused before the first step."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from finetune.data.sources import load_data
from finetune.inference.predict import compute_logits
from finetune.models.backbone import meta_backbone, preprocessing
from finetune.models.linear_probe import check_probe
from finetune.models.saved import SavedModel, load_network, read_json
from finetune.recipe import Data, Group, LinearProbe
from finetune.tools.plan import describe_plan, make_plan
from finetune.training.logger import Logger
from finetune.training.loop import train
from finetune.training.run_dir import newest_checkpoint
from finetune.training.setup import RunOptions, check_recipe, setup
from finetune.utils.errors import RecipeError
from helpers import Cut, cut_before, small_recipe
from zoo import ZOO

GROUPS = (
    Group("head", r"fc|head\.", lr=1e-2),
    Group("stem", r"stem|trunk\.conv1|conv1|patch_embed", lr=1e-3, unfreeze_at=2),
    Group("body", ".", lr=3e-3, unfreeze_at=1),
)


def zoo_recipe(name):
    """Three stages of that network in 3 epochs, with an average, and a linear probe first where the head is one layer."""
    recipe = small_recipe(
        backbone=ZOO[name][0],
        head="head" if name == "timm, changed" else "fc",
        groups=GROUPS,
        epochs=3,
        ema_decay=None if name == "extra state" else 0.9,
        batch_norm="train",
        data=Data("generated", image_size=32, batch_size=8),
    )
    probing = replace(recipe, linear_probe=LinearProbe())
    try:
        check_probe(probing, meta_backbone(probing))
    except RecipeError:
        return recipe
    return probing


def run(recipe, folder):
    """As run.py trains it, in this process; returns the metrics' rows."""
    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True)
    check_recipe(recipe, meta_backbone(recipe))
    net, datasets = setup(recipe, accelerator, 2)
    train(recipe, net, datasets, Logger(folder, accelerator, recipe), accelerator, RunOptions(accumulate=2, checkpoint_every=2))
    return (folder / "metrics.jsonl").read_text()


def tensors(folder):
    """All that is in a run's last checkpoint."""
    last = newest_checkpoint(folder)
    found = {}
    for file in last.glob("*.safetensors"):
        found |= {f"{file.stem} {name}": tensor for name, tensor in safetensors.torch.load_file(file).items()}
    for name, state in torch.load(last / "optimizer.pt", weights_only=True).items():
        found |= {f"{name} {key}": torch.as_tensor(value) for key, value in state.items()}
    return found


@pytest.mark.parametrize("name", [name for name, (_, refusal) in ZOO.items() if not refusal])
def test_it_is_planned_trained_cut_resumed_saved_and_loaded(tmp_path, monkeypatch, name):
    """Planned; cut in a step and resumed, it ends with the bits of an unbroken run; loaded, its best network predicts."""
    recipe = zoo_recipe(name)

    assert describe_plan(name, recipe, make_plan(recipe))
    rows = run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patched:
        cut_before(patched, "train_step", 6)
        with pytest.raises(Cut):
            run(recipe, tmp_path / "cut")
    same_rows = run(recipe, tmp_path / "cut")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert rows == same_rows and one.keys() == other.keys()
    assert not [key for key in one if not one[key].equal(other[key])]
    data, folder = load_data(recipe), tmp_path / "whole" / "model-best"
    config = read_json(folder / "config.json")
    loaded = load_network(folder, config, recipe).eval()
    model = SavedModel(loaded, data.classes, preprocessing(recipe, loaded), recipe)
    logits, _ = compute_logits(model, data.val, "stop", 0)
    assert logits.shape == (len(data.val), len(data.classes)) and logits.isfinite().all()


@pytest.mark.parametrize("name", [name for name, (_, refusal) in ZOO.items() if refusal])
def test_what_can_not_be_trained_is_refused_before_the_first_step(tmp_path, monkeypatch, name):
    """In one sentence, and without a step."""
    monkeypatch.setattr("finetune.training.loop.train_step", lambda *args: pytest.fail("a step was taken"))
    recipe = small_recipe(backbone=ZOO[name][0], head="fc", groups=GROUPS[:1] + (Group("rest", ".", lr=1e-3),))
    with pytest.raises(RecipeError, match=ZOO[name][1]) as caught:
        run(recipe, tmp_path)
    assert "\n" not in str(caught.value)


def test_extra_state_has_no_average():
    """An average of a network whose state dict holds other things than tensors is refused."""
    recipe = small_recipe(backbone=ZOO["extra state"][0], groups=GROUPS[:1] + (Group("rest", ".", lr=1e-3),), ema_decay=0.9)
    with pytest.raises(RecipeError, match="ema_decay: of function ExtraState _extra_state is no tensor"):
        check_recipe(recipe, meta_backbone(recipe))
