"""One process and two: real processes, started as a person starts them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from conftest import ROOT

RECIPE = """
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
"""


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
QUIET = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def several(count):
    return [*ACCELERATE, "--multi_gpu", "--num_processes", str(count), *QUIET]


def command(folder, images, output, launcher, arguments=(), norm="GroupNorm(2, 8)"):
    """The recipe, written to `folder`, as a command line."""
    file = folder / "net.py"
    file.write_text(RECIPE.replace("{norm}", norm).replace("IMAGES", str(images)))
    return [*launcher, str(ROOT / "finetune" / "run.py"), "--recipe", str(file), "--output", str(output), *arguments]


def finish(line):
    """Run a command line; returns what it printed, and fails unless a finished run is in its folder."""
    output = Path(line[line.index("--output") + 1])
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    # Tearing processes down can abort after everything is written: the result file decides.
    assert (output / "result.json").is_file(), done.stderr[-3000:]
    return done.stdout


def contents(output):
    """A finished run's result, metrics and weights, and with these the labels in the order in which images were scored."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    weights = safetensors.torch.load_file(output / "model" / "model.safetensors")
    weights["scored labels"] = safetensors.torch.load_file(output / "predictions.safetensors")["labels"]
    return json.loads((output / "result.json").read_text()), rows, weights


def assert_same_run(a, b):
    """The same updates and rates exactly; losses and weights to float32 rounding."""
    (one, rows, weights), (two, others, same_weights) = a, b
    assert one["updates"] == two["updates"] == 20 and one["val_images"] == two["val_images"] == 15
    assert one["top1"] == two["top1"] and one["loss"] == pytest.approx(two["loss"], abs=1e-6)
    for row, other in zip(rows, others, strict=True):
        assert row.get("lr") == other.get("lr") and row["step"] == other["step"]
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert weights.keys() == same_weights.keys()
    assert max((weights[n] - same_weights[n]).abs().max().item() for n in weights) < 1e-6


@pytest.fixture(scope="module")
def alone(tmp_path_factory, image_folder):
    """One process, whole batches: 20 updates through three stages, the last of each epoch short (30 images, 8 an update)."""
    folder = tmp_path_factory.mktemp("alone")
    finish(command(folder, image_folder, folder / "out", [sys.executable]))
    return contents(folder / "out")


@pytest.mark.parametrize("count,accumulate", [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_any_number_of_processes_computes_the_same(tmp_path, image_folder, alone, count, accumulate):
    """Processes and accumulation change no update, no rate and no count, and no weight by 1e-6. One process speaks."""
    launcher = [sys.executable] if count == 1 else several(count)
    out = finish(command(tmp_path, image_folder, tmp_path / "out", launcher, ["--accumulate", str(accumulate)]))
    run = contents(tmp_path / "out")
    assert run[0]["hardware"]["processes"] == count
    assert_same_run(run, alone)
    assert len(re.findall("^epoch ", out, re.M)) == 5


SET = (
    "augment.mixup=0.4",
    "augment.cutmix=1.0",
    "data.sampling=balanced",
    "ema_decay=0.6",
    "l2_sp=0.1",
    "flip_test=True",
    "class_weights=balanced",
    "clip_value=0.1",
    "linear_probe.views=2",
)


@pytest.mark.parametrize(
    "fields,head,stem",
    [
        (SET, "lr=1e-2", "lr=1e-3, optimizer=SGD(momentum=0.9)"),
        (("clip_norm=None",), 'lr=0.1, optimizer=Optimizer("LBFGS", max_iter=2)', "lr=1e-3"),
    ],
    ids=["mixing, averaging, two optimizers", "LBFGS"],
)
def test_two_processes_pull_every_lever_alike(tmp_path, image_folder, fields, head, stem):
    """Whatever lever is pulled, two processes take the updates of one, and their weights are the same to rounding."""
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
        text = recipe.read_text().replace("import AdamW,", "import SGD, AdamW, Optimizer,")
        text = text.replace('"fc", lr=1e-2', f'"fc", {head}')
        recipe.write_text(text.replace("lr=1e-3, unfreeze_at=2", f"{stem}, unfreeze_at=2"))
        finish(line)
        runs.append(contents(tmp_path / name / "out"))
    assert [run[0]["hardware"]["processes"] for run in runs] == [1, 2]
    assert_same_run(*runs)


def test_three_processes_share_a_batch_of_twelve(tmp_path, image_folder):
    """Three processes take the same updates at the same rates as one, with 30 images in batches of 12."""
    runs = []
    for count in (1, 3):
        launcher = [sys.executable] if count == 1 else several(count)
        finish(command(tmp_path, image_folder, tmp_path / str(count), launcher, ["--set", "data.batch_size=12"]))
        runs.append(contents(tmp_path / str(count)))
    assert runs[1][0]["hardware"]["processes"] == 3 and runs[0][0]["updates"] == 15
    assert [row.get("lr") for row in runs[0][1]] == [row.get("lr") for row in runs[1][1]]
    assert max((runs[0][2][n] - runs[1][2][n]).abs().max().item() for n in runs[0][2]) < 1e-6


def test_processes_decide_from_one_score(tmp_path, image_folder):
    """A plateau cuts the rate in the same epochs on two processes as on one: each sees the score of all images."""
    runs = []
    for count, launcher in ((1, [sys.executable]), (2, several(2))):
        line = command(tmp_path, image_folder, tmp_path / str(count), launcher)
        file = tmp_path / "net.py"
        file.write_text(
            file.read_text()
            .replace("import Cosine", "import Plateau")
            .replace("Cosine(warmup_epochs=0.5)", "Plateau(mode='min', patience=0, factor=0.5, threshold=0.3)")
        )
        finish(line)
        runs.append(contents(tmp_path / str(count)))
    rates = [[row["lr"]["head"] for row in rows if "lr" in row] for _, rows, _ in runs]
    assert rates[0] == rates[1] and len(set(rates[0])) > 1
    assert max((runs[0][2][n] - runs[1][2][n]).abs().max().item() for n in runs[0][2]) < 1e-6


def test_two_machines_finish_with_the_result_of_one(tmp_path, image_folder, alone):
    """Two launches that find each other on a loopback address are one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = []
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


LONGER = ["--set", "epochs=30", "--checkpoint-every", "1", "--resume", "auto"]


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory, image_folder):
    """A longer run of two processes to which nothing happens."""
    folder = tmp_path_factory.mktemp("unharmed")
    finish(command(folder, image_folder, folder / "out", several(2), LONGER))
    return contents(folder / "out")


def launched(folder, images, launcher):
    """The same run, started and well on its way."""
    started = subprocess.Popen(
        command(folder, images, folder / "out", launcher, LONGER),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not list((folder / "out" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    return started


def assert_same_bits(a, b):
    assert a[1] == b[1] and all(torch.equal(tensor, b[2][name]) for name, tensor in a[2].items())


def test_a_killed_process_costs_nothing_but_time(tmp_path, image_folder, unharmed):
    """With --max_restarts and --resume auto the launcher starts again after a SIGKILL, and the run ends as if unharmed."""
    run = launched(tmp_path, image_folder, [*several(2), "--max_restarts", "2"])
    ranks = [p for p in psutil.Process(run.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    ranks[0].kill()
    out = run.communicate(timeout=120)[0]
    assert (tmp_path / "out" / "result.json").is_file(), out[-3000:]
    assert "going on after update" in out
    assert_same_bits(contents(tmp_path / "out"), unharmed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_after_the_same_update(tmp_path, image_folder, unharmed, number):
    """A signal to the launcher, or to one process alone, stops both with one checkpoint, and the run then ends as unharmed."""
    run = launched(tmp_path, image_folder, several(2))
    ranks = [p for p in psutil.Process(run.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    (run if number == signal.SIGTERM else ranks[0]).send_signal(number)
    out = run.communicate(timeout=60)[0]
    assert len(re.findall("^stopped after update", out, re.M)) == 1 and not (tmp_path / "out" / "result.json").exists(), out
    finish(command(tmp_path, image_folder, tmp_path / "out", several(2), LONGER))
    assert_same_bits(contents(tmp_path / "out"), unharmed)


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


def test_an_error_is_said_once_by_two_processes(tmp_path):
    """What every process finds out, one says, and nothing hangs."""
    done = subprocess.run(
        [
            *several(2),
            str(ROOT / "finetune" / "run.py"),
            "--recipe",
            "efficientnet_lite0_digits",
            "--weights",
            "nowhere.pth",
            "--output",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and done.stderr.count("finetune: no weights file nowhere.pth") == 1
    assert not (tmp_path / "out").exists()


def test_processes_that_were_asked_for_and_not_started_are_missed(tmp_path):
    """Without GPUs `accelerate launch --num_processes 2` starts one process: that is refused, with what does start two."""
    if torch.cuda.device_count() > 1:
        pytest.skip("with several GPUs it starts two")
    done = subprocess.run(
        [
            *ACCELERATE,
            "--num_processes",
            "2",
            str(ROOT / "finetune" / "run.py"),
            "--recipe",
            "efficientnet_lite0_digits",
            "--output",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "finetune: accelerate launch was asked for several processes" in done.stderr
    assert "--multi_gpu" in done.stderr


def drifting(answers):
    """One of two processes, whose norm statistics are made to differ."""
    from accelerate import Accelerator

    from finetune.processes import check_agreement

    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    accelerator = Accelerator(cpu=True)
    for parameter in net.parameters():
        torch.nn.init.ones_(parameter)
    check_agreement(net, accelerator)
    if accelerator.process_index:
        net[1].running_mean[1] += 1e-7
    try:
        check_agreement(net, accelerator)
        text = "agreed"
    except RuntimeError as error:
        text = str(error)
    (Path(answers) / str(accelerator.process_index)).write_text(text)


def test_processes_that_went_apart_are_found(tmp_path):
    """A single number that differs between processes stops both, with the tensor's name."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        f"import test_processes; test_processes.drifting({str(tmp_path)!r})"
    )
    (tmp_path / "drift.py").write_text(code)
    subprocess.run([*several(2), str(tmp_path / "drift.py")], capture_output=True)
    for rank in ("0", "1"):
        assert "different values in 1 of 7 tensors, the first of them '1.running_mean'" in (tmp_path / rank).read_text()


def test_killed_runs_end_as_if_unharmed():
    """A short version of the benchmark: processes killed in each of its ways go on to the bits of an unbroken run."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "benchmarks" / "kills.py"), "--kills", "6"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 and "| all | | 6 | 6 | 6 | 0 |" in done.stdout, done.stdout + done.stderr


ALLOCATES = """
import resource, sys, torch
from finetune.assemble import make_accelerator
from finetune.recipe_file import load_recipe

if sys.argv[1] == "kept":
    make_accelerator(load_recipe("efficientnet_lite0_digits")[0])
for _ in range(10):
    torch.empty(2**24).fill_(1)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.empty(2**24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about Linux's C library")
def test_freed_memory_is_kept_for_the_next_update():
    """A large tensor made anew takes the memory of the one before it: the system maps none, where otherwise it maps all."""
    faults = {
        name: int(
            subprocess.run(
                [sys.executable, "-c", ALLOCATES, name],
                capture_output=True,
                text=True,
                check=True,
                cwd=ROOT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            ).stdout.split()[-1]
        )
        for name in ("kept", "returned")
    }
    assert faults["kept"] < faults["returned"] / 10 and faults["returned"] > 100
