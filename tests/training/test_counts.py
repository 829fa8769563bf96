"""Few images: in a micro-batch, in the last batch, for validation."""

import json
import math
import sys
from pathlib import Path

import pytest
import safetensors.torch
from PIL import Image

from finetune.data.batches import Cut, plan_epoch
from finetune.recipe import Augment, Data, LinearProbe
from finetune.training.setup import check_micro_batches
from finetune.utils.errors import RecipeError
from helpers import ALL, ROOT, Coloured, DroppingNet, prepare, run_here, small_recipe
from launching import finish, several

RECIPE = """
import torch
from torch import nn

from finetune import AdamW, Constant, Data, Group, Recipe


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)
        self.unused = nn.Linear(3, 3)

    def forward(self, images):
        x = self.stem(images).relu()
        if not self.training or torch.rand(()) < 0.5:
            x = x + self.block(x)
        return self.fc(x.mean((2, 3)))


recipe = Recipe(backbone=Net, data=Data("IMAGES", image_size=24, batch_size=12), groups=(Group("all", ".", lr=1e-2),),
                optimizer=AdamW(weight_decay=0.5), schedule=Constant(), batch_norm="frozen", epochs=3)
"""


@pytest.mark.parametrize("images", [16, 17, 18, 19, 23, 41])
@pytest.mark.parametrize("processes,accumulate", [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_no_micro_batch_has_one_image(images, processes, accumulate):
    """Where 2 are needed, every micro-batch has them, each image comes once, and there are as many steps as ever."""
    cuts = [Cut(process, processes, accumulate, fewest=2) for process in range(processes)]
    for plan, *others in zip(*(plan_epoch(images, 8, 0, 3, cut) for cut in cuts), strict=True):
        assert all(len(part) >= 2 for each in (plan, *others) for part in each.micro_batches)
        parts = [part for each in (plan, *others) if each.weight for part in each.micro_batches]
        assert [i for part in parts for i in part] == plan.images
    plans = plan_epoch(images, 8, 0, 3, cuts[0])
    assert sorted(i for plan in plans for i in plan.images) == list(range(images))
    assert [plan.step for plan in plans] == [plan.step for plan in plan_epoch(images, 8, 0, 3)]


def test_one_image_is_refused_only_where_it_can_not_be(tmp_path):
    """Batches of one are refused for norms that then see one value a channel, and no others; frozen norms take any."""

    def check(backbone, batch_norm, batch_size, accumulate=1):
        recipe = small_recipe(
            backbone=backbone,
            head=None if isinstance(backbone, str) else "fc",
            batch_norm=batch_norm,
            groups=ALL,
            data=Data("generated", image_size=32, batch_size=batch_size),
        )
        images = prepare(recipe)[2][0]
        check_micro_batches(recipe, images, 1, accumulate)

    for batch_norm, batch_size, accumulate in (("train", 1, 1), ("train", 8, 8), ("sync", 1, 1)):
        with pytest.raises(RecipeError, match=r"22 images in batches of .* leave one alone: change data.batch_size, or"):
            check("resnet18", batch_norm, batch_size, accumulate)
        check("resnet18", "frozen", batch_size, accumulate)
        check(DroppingNet, batch_norm, batch_size, accumulate)
    check("resnet18", "train", 3)  # 22 images: the last batch would have one


def test_branches_unused_layers_and_idle_processes_change_nothing(tmp_path):
    """On 3 processes, with 2 validation images, a random branch and a layer that is never used: the bits of one process."""
    for part, count in (("train", 7), ("val", 1)):
        for level, name in ((40, "dark"), (200, "light")):
            (folder := tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (24, 24), (level, level + 5 * i, level)).save(folder / f"{i}.png")
    (file := tmp_path / "net.py").write_text(RECIPE.replace("IMAGES", str(tmp_path / "images")))
    found = []
    for launcher, accumulate in (([sys.executable], 3), (several(3), 1)):
        output = tmp_path / f"out{accumulate}"
        words = [str(ROOT / "finetune" / "run.py"), "--recipe", str(file), "--output", str(output)]
        finish([*launcher, *words, "--accumulate", str(accumulate)])
        weights = safetensors.torch.load_file(Path(output) / "model" / "model.safetensors")
        found.append((weights, json.loads((output / "result.json").read_text())))
    assert found[0][1]["val_images"] == found[1][1]["val_images"] == 2
    for name, tensor in found[0][0].items():
        assert (tensor - found[1][0][name]).abs().max() < 1e-6, name


FEW = Coloured([0, 5, 7, 39, 3], [f"class {i}" for i in range(40)]), Coloured([1, 5])


@pytest.mark.parametrize(
    "changes",
    [
        {"linear_probe": LinearProbe()},
        {"data": Data(lambda: FEW, 24, batch_size=4, sampling="balanced"), "batch_norm": "train"},
        {"data": Data(lambda: FEW, 24, batch_size=64), "label_smoothing": 0.1, "augment": Augment(mixup=0.2)},
    ],
    ids=["probe", "balanced", "mixed"],
)
def test_there_may_be_more_classes_than_images(tmp_path, changes):
    """Most classes without an image, and a batch without most: it trains, and every metric is a finite number."""
    recipe = small_recipe(**{"backbone": DroppingNet, "data": Data(lambda: FEW, 24, batch_size=2), **changes})
    _, rows = run_here(recipe, tmp_path)
    assert len(rows) >= recipe.epochs and all(math.isfinite(row["loss"]) for row in rows)
    assert all(len(row["class_accuracy"]) == 40 for row in rows if "class_accuracy" in row)
