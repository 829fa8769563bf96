"""One process and two compute the same."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from launching import ACCELERATE, command, contents, finish, free_port, several

pytestmark = pytest.mark.launches


def assert_same_run(a, b):
    """The same steps and learning rates exactly; losses and weights to float32 rounding."""
    (one, rows, weights), (two, others, same_weights) = a, b
    assert one["steps"] == two["steps"] == 20 and one["val_images"] == two["val_images"] == 15
    assert one["top1"] == two["top1"] and one["loss"] == pytest.approx(two["loss"], abs=1e-6)
    for row, other in zip(rows, others, strict=True):
        assert row.get("lr") == other.get("lr") and row["step"] == other["step"]
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert weights.keys() == same_weights.keys()
    assert max((weights[n] - same_weights[n]).abs().max().item() for n in weights) < 1e-6


@pytest.fixture(scope="module")
def alone(tmp_path_factory, image_folder):
    """One process, whole batches: 20 steps through three stages, the last of each epoch short (30 images, 8 a step)."""
    folder = tmp_path_factory.mktemp("alone")
    finish(command(folder, image_folder, folder / "out", [sys.executable]))
    return contents(folder / "out")


@pytest.mark.parametrize("count,accumulate", [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_any_number_of_processes_computes_the_same(tmp_path, image_folder, alone, count, accumulate):
    """Processes and accumulation change no step, no learning rate and no count, and no weight by 1e-6. One process speaks."""
    launcher = [sys.executable] if count == 1 else several(count)
    out = finish(command(tmp_path, image_folder, tmp_path / "out", launcher, ["--accumulate", str(accumulate)]))
    run = contents(tmp_path / "out")
    assert run[0]["hardware"]["processes"] == count
    assert_same_run(run, alone)
    assert len(re.findall("^epoch ", out, re.M)) == 5


SET = (
    "augment.mixup=0.4",
    "augment.cutmix=1.0",
    "augment.rot90=0.5",
    "augment.auto_augment=ta_wide",
    "data.sampling=balanced",
    "data.image_size=(24, 40)",
    "data.start_size=(16, 24)",
    "data.test_size=(32, 48)",
    "data.resize=squash",
    "ema_decay=0.6",
    "l2_sp=0.1",
    "flip_test=True",
    "class_weights=(0.5, 1.5, 1.0)",
    "clip_value=0.1",
    "linear_probe.views=2",
)


STEM = "lr=1e-3, unfreeze_at=2"  # as the recipe of launching.py has it
OWN = {
    "recipe = ": "def darker(image, rng):\n    return image.point(lambda value: value * rng.uniform(0.5, 1))\n\n\nrecipe = ",
    "batch_norm=": "augment=Augment(function=darker), batch_norm=",
}


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        (SET, OWN | {STEM: "lr=1e-3, optimizer=SGD(momentum=0.9), unfreeze_at=2"}),
        (("clip_norm=None",), {'"fc", lr=1e-2': '"fc", lr=0.1, optimizer=Optimizer("LBFGS", max_iter=2)'}),
        (("augment.frozen_views=1", "groups.body.unfreeze_at=2"), {STEM: "lr=0"}),
        (("ema_decay=0.6", "groups.body.rank=2"), {'Group("body"': 'Lora("body"', STEM: "lr=0"}),
    ],
    ids=["a function, mixing, averaging, two optimizers", "LBFGS", "what frozen layers return is kept", "adapters"],
)
def test_two_processes_do_alike_with_every_option(tmp_path, image_folder, fields, changes):
    """Whatever option is set, two processes take the steps of one, and their weights are the same to rounding."""
    runs = []
    for name, launcher in (("one", [sys.executable]), ("two", several(2))):
        (tmp_path / name).mkdir()
        line = command(
            tmp_path / name,
            image_folder,
            tmp_path / name / "out",
            launcher,
            [word for field in fields for word in ("--set", field)],
        )
        recipe = Path(line[line.index("--recipe") + 1])
        text = recipe.read_text().replace("import AdamW,", "import SGD, AdamW, Augment, Lora, Optimizer,")
        for before, after in changes.items():
            assert before in text
            text = text.replace(before, after)
        recipe.write_text(text)
        finish(line)
        runs.append(contents(tmp_path / name / "out"))
    assert [run[0]["hardware"]["processes"] for run in runs] == [1, 2]
    assert_same_run(*runs)


def test_three_processes_share_a_batch_of_twelve(tmp_path, image_folder):
    """Three processes take the same steps at the same learning rates as one, with 30 images in batches of 12."""
    runs = []
    for count in (1, 3):
        launcher = [sys.executable] if count == 1 else several(count)
        finish(command(tmp_path, image_folder, tmp_path / str(count), launcher, ["--set", "data.batch_size=12"]))
        runs.append(contents(tmp_path / str(count)))
    assert runs[1][0]["hardware"]["processes"] == 3 and runs[0][0]["steps"] == 15
    assert [row.get("lr") for row in runs[0][1]] == [row.get("lr") for row in runs[1][1]]
    assert max((runs[0][2][n] - runs[1][2][n]).abs().max().item() for n in runs[0][2]) < 1e-6


def test_processes_decide_from_one_metric(tmp_path, image_folder):
    """A plateau cuts the learning rate in the same epochs on two processes as on one: each sees the metric of all images."""
    runs = []
    for count, launcher in ((1, [sys.executable]), (2, several(2))):
        line = command(tmp_path, image_folder, tmp_path / str(count), launcher)
        file = tmp_path / "net.py"
        file.write_text(
            file.read_text()
            .replace("AdamW, Cosine,", "AdamW, Plateau,")
            .replace("Cosine(warmup_epochs=0.5)", "Plateau(mode='min', patience=0, factor=0.5, threshold=0.3)")
        )
        finish(line)
        runs.append(contents(tmp_path / str(count)))
    lrs = [[row["lr"]["head"] for row in rows if "lr" in row] for _, rows, _ in runs]
    assert lrs[0] == lrs[1] and len(set(lrs[0])) > 1
    assert max((runs[0][2][n] - runs[1][2][n]).abs().max().item() for n in runs[0][2]) < 1e-6


def test_two_machines_finish_with_the_result_of_one(tmp_path, image_folder, alone):
    """Two launches that find each other on a loopback address are one run."""
    port, machines = free_port(), []
    for rank in ("0", "1"):
        launcher = [
            *ACCELERATE,
            "--multi_gpu",
            "--num_machines",
            "2",
            "--num_processes",
            "2",
            "--machine_rank",
            rank,
            "--main_process_ip",
            "127.0.0.1",
            "--main_process_port",
            port,
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ]
        machines.append(
            subprocess.Popen(
                command(tmp_path, image_folder, tmp_path / "out", launcher),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = [machine.communicate(timeout=180)[1] for machine in machines]
    assert (tmp_path / "out" / "result.json").is_file(), errors
    assert_same_run(contents(tmp_path / "out"), alone)


def test_two_processes_with_batch_norm_share_one_models_statistics(tmp_path, image_folder):
    """The repository's configuration file starts them, too; statistics that move stay finite and move."""
    config = [*ACCELERATE, "--config_file", str(ROOT / "accelerate_config.yaml"), "--num_processes", "2"]
    finish(command(tmp_path, image_folder, tmp_path / "two", config, ["--accumulate", "4"], norm="BatchNorm2d(8)"))
    result, _, weights = contents(tmp_path / "two")
    assert result["hardware"]["processes"] == 2
    assert torch.isfinite(weights["norm.running_var"]).all() and not torch.equal(weights["norm.running_mean"], torch.zeros(8))
    assert int(weights["norm.num_batches_tracked"]) == 48  # the first process's in epochs 2, 3 and 4; the second had fewer


def test_the_configuration_file_as_it_stands_starts_one_process(tmp_path, image_folder):
    """accelerate_config.yaml works unchanged on a machine without GPUs."""
    config = [*ACCELERATE, "--config_file", str(ROOT / "accelerate_config.yaml")]
    finish(command(tmp_path, image_folder, tmp_path / "out", config))
    assert contents(tmp_path / "out")[0]["hardware"]["processes"] == 1
