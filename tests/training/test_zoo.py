"""Networks of every kind through everything at once: each works to the bit, or is refused before the first step."""

import json

import pytest

from benchmarks import zoo
from benchmarks.networks import LIBRARIES, ODD
from finetune.models.backbone import meta_backbone
from finetune.recipe import Group
from finetune.training.setup import check_recipe
from finetune.utils.errors import RecipeError
from helpers import small_recipe

TRAINED = [name for name, (_, refusal) in ODD.items() if not refusal]
OF_LIBRARIES = [pytest.param(name, marks=pytest.mark.slow) for name in LIBRARIES]


@pytest.mark.parametrize("name", [*TRAINED, *OF_LIBRARIES])
def test_it_is_planned_trained_cut_resumed_saved_and_loaded(tmp_path, name):
    """Planned; cut in a step and resumed, it ends with the bits of an unbroken run; loaded, it gives the logits of the run."""
    assert zoo.on_one_process(name, tmp_path / "runs") == zoo.WORKS


@pytest.mark.parametrize("name", [name for name in ODD if name not in TRAINED])
def test_what_can_not_be_trained_is_refused_before_the_first_step(tmp_path, name):
    """In one sentence, and without a step."""
    verdict = zoo.on_one_process(name, tmp_path / "runs")
    assert ODD[name][1] in verdict and "\n" not in verdict


@pytest.mark.launches
@pytest.mark.parametrize(
    "names",
    [["weight norm by hook", "random branch", "extra state"], pytest.param([*TRAINED, *LIBRARIES], marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def test_two_processes_train_it_as_one(tmp_path, names):
    """One launch trains, cuts and resumes one network after another, to the bit; the logits are those of one process."""
    assert set(zoo.on_two_processes(names, tmp_path).values()) == {zoo.WORKS}


@pytest.mark.parametrize(
    "name", ["shared module", *(pytest.param(name, marks=pytest.mark.slow) for name in [*TRAINED, *LIBRARIES])]
)
def test_it_is_exported_or_says_why_not(tmp_path, name):
    """What the table in docs/backbones.md says can be exported can be, and nothing else."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    kept = {row["network"]: row for row in json.loads(zoo.RESULT.read_text())}[name]
    zoo.train(zoo.write_recipe(name, tmp_path / "runs", "train"), tmp_path / "run", accumulate=1)
    for to in ("onnx", "timm"):
        assert (zoo.exported(tmp_path / "run", to) == zoo.WORKS) == (kept[to] == zoo.WORKS)


def test_the_table_is_of_this_zoo():
    """The kept verdicts are on all of these networks, and refuse what the tests expect to be refused.

    But for timm's small test networks, of which each version has others, and dtypes that older safetensors can't hold.
    """
    kept = {row["network"]: row["one process"] for row in json.loads(zoo.RESULT.read_text())}
    assert {name for name in zoo.NAMES if not name.startswith("test_")} == {
        name for name in kept if not name.startswith("test_")
    }
    kept = {name: verdict for name, verdict in kept.items() if name not in ("many buffers", "complex weight")}
    assert all(verdict == zoo.WORKS for name, verdict in kept.items() if name in TRAINED or name not in ODD)
    assert all(ODD[name][1] in verdict for name, verdict in kept.items() if name in ODD and name not in TRAINED)


def test_extra_state_has_no_average():
    """An average of a network whose state dict holds other things than tensors is refused."""
    groups = (Group("head", "fc", lr=1e-2), Group("rest", ".", lr=1e-3))
    recipe = small_recipe(backbone=ODD["extra state"][0], groups=groups, ema_decay=0.9)
    with pytest.raises(RecipeError, match="ema_decay: of function ExtraState _extra_state is no tensor"):
        check_recipe(recipe, meta_backbone(recipe))
