"""One process and two: real processes, started as a person starts them."""

import json
import os
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from conftest import ROOT

RECIPE = '''
from torch import nn

from finetune.lr_schedule import Cosine
from finetune.recipe import AdamW, Data, Group, Recipe


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.body, self.fc = nn.Conv2d(3, 8, 3, 2), nn.{norm}, nn.Conv2d(8, 16, 3, 2), nn.Linear(16, 3)

    def forward(self, images):
        return self.fc(self.body(self.norm(self.stem(images)).relu()).relu().mean((2, 3)))


recipe = Recipe(backbone=Net, head="fc", data=Data("IMAGES", image_size=24, batch_size=8),
                groups=(Group("head", "fc", lr=1e-2), Group("body", "body", lr=3e-3, unfreeze_at=1),
                        Group("stem", "stem|norm", lr=1e-3, unfreeze_at=2)),
                optimizer=AdamW(weight_decay=0.05), schedule=Cosine(warmup_epochs=0.5), norm_stats="train", epochs=5)
'''


def launch(folder, images, output, *launcher, arguments=(), norm="GroupNorm(2, 8)"):
    """Start the recipe; returns its result, metrics and weights."""
    file = folder / "net.py"
    file.write_text(RECIPE.replace("{norm}", norm).replace("IMAGES", str(images)))
    done = subprocess.run([*launcher, str(ROOT / "finetune" / "run.py"), "--recipe", str(file), "--output", str(output),
                           *arguments], capture_output=True, text=True, cwd=folder,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    # Tearing processes down can abort after everything is written: the result file decides.
    assert (output / "result.json").is_file(), done.stderr[-3000:]
    result = json.loads((output / "result.json").read_text())
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return result, rows, safetensors.torch.load_file(output / "model" / "model.safetensors"), done.stdout


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
       "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.mark.parametrize("arguments", [(), ("--accumulate", "2")], ids=["whole", "accumulated"])
def test_two_processes_compute_what_one_does(tmp_path, image_folder, arguments):
    """Through three stages and a short last batch (30 images, 8 an update): the same updates, rates, losses and weights.

    20 updates of a network without batch statistics stay within 1e-6 in float32. One process speaks.
    """
    one, rows, weights, _ = launch(tmp_path, image_folder, tmp_path / "one", sys.executable)
    two, others, same_weights, out = launch(tmp_path, image_folder, tmp_path / "two", *TWO, arguments=arguments)
    assert (one["hardware"]["processes"], two["hardware"]["processes"]) == (1, 2)
    assert one["updates"] == two["updates"] == 20 and one["val_images"] == two["val_images"] == 15
    assert one["top1"] == two["top1"] and one["loss"] == pytest.approx(two["loss"], abs=1e-6)
    for row, other in zip(rows, others, strict=True):
        assert row.get("lr") == other.get("lr") and row["step"] == other["step"]
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert weights.keys() == same_weights.keys()
    assert max((weights[n] - same_weights[n]).abs().max().item() for n in weights) < 1e-6
    assert len(re.findall("^epoch ", out, re.M)) == 5


def test_two_processes_with_batch_norm_share_one_models_statistics(tmp_path, image_folder):
    """The repository's configuration file starts them, too; statistics that move stay finite and move."""
    config = [*ACCELERATE, "--config_file", str(ROOT / "accelerate_config.yaml"), "--num_processes", "2"]
    result, _, weights, _ = launch(tmp_path, image_folder, tmp_path / "two", *config, norm="BatchNorm2d(8)")
    assert result["hardware"]["processes"] == 2
    assert torch.isfinite(weights["norm.running_var"]).all() and not torch.equal(weights["norm.running_mean"], torch.zeros(8))
    assert int(weights["norm.num_batches_tracked"]) == 12  # epochs 2, 3 and 4


def test_the_configuration_file_as_it_stands_starts_one_process(tmp_path, image_folder):
    """accelerate_config.yaml works unchanged on a machine without GPUs."""
    config = [*ACCELERATE, "--config_file", str(ROOT / "accelerate_config.yaml")]
    assert launch(tmp_path, image_folder, tmp_path / "out", *config)[0]["hardware"]["processes"] == 1


def test_an_error_is_said_once_by_two_processes(tmp_path):
    """What every process finds out, one says, and nothing hangs."""
    done = subprocess.run([*TWO, str(ROOT / "finetune" / "run.py"), "--recipe", "efficientnet_lite0_digits", "--weights",
                           "nowhere.pth", "--output", str(tmp_path / "out")], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("finetune: no weights file nowhere.pth") == 1
    assert not (tmp_path / "out").exists()


def test_processes_that_were_asked_for_and_not_started_are_missed(tmp_path):
    """Without GPUs `accelerate launch --num_processes 2` starts one process: that is refused, with what does start two."""
    if torch.cuda.device_count() > 1:
        pytest.skip("with several GPUs it starts two")
    done = subprocess.run([*ACCELERATE, "--num_processes", "2", str(ROOT / "finetune" / "run.py"), "--recipe",
                           "efficientnet_lite0_digits", "--output", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode != 0 and "finetune: accelerate launch was asked for several processes" in done.stderr
    assert "--multi_gpu" in done.stderr
