"""Processes that are killed, stopped, missing or apart."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from helpers import ROOT
from launching import ACCELERATE, command, contents, finish, several

pytestmark = pytest.mark.launches
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
    assert "resuming after step" in out
    assert_same_bits(contents(tmp_path / "out"), unharmed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_after_the_same_update(tmp_path, image_folder, unharmed, number):
    """A signal to the launcher, or to one process alone, stops both with one checkpoint, and the run then ends as unharmed."""
    run = launched(tmp_path, image_folder, several(2))
    ranks = [p for p in psutil.Process(run.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    (run if number == signal.SIGTERM else ranks[0]).send_signal(number)
    out = run.communicate(timeout=60)[0]
    assert len(re.findall("^stopped after step", out, re.M)) == 1 and not (tmp_path / "out" / "result.json").exists(), out
    finish(command(tmp_path, image_folder, tmp_path / "out", several(2), LONGER))
    assert_same_bits(contents(tmp_path / "out"), unharmed)


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

    from finetune.training.distributed import check_same_weights

    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    accelerator = Accelerator(cpu=True)
    for parameter in net.parameters():
        torch.nn.init.ones_(parameter)
    check_same_weights(net, accelerator)
    if accelerator.process_index:
        net[1].running_mean[1] += 1e-7
    try:
        check_same_weights(net, accelerator)
        text = "agreed"
    except RuntimeError as error:
        text = str(error)
    (Path(answers) / str(accelerator.process_index)).write_text(text)


def test_processes_that_went_apart_are_found(tmp_path):
    """A single number that differs between processes stops both, with the tensor's name."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}, {str(ROOT / 'tests' / 'training')!r}]\n"
        f"import test_process_faults; test_process_faults.drifting({str(tmp_path)!r})"
    )
    (tmp_path / "drift.py").write_text(code)
    subprocess.run([*several(2), str(tmp_path / "drift.py")], capture_output=True)
    for rank in ("0", "1"):
        assert "different values in 1 of 7 tensors, the first of them '1.running_mean'" in (tmp_path / rank).read_text()


def test_killed_runs_end_as_if_unharmed():
    """A short version of the benchmark: processes killed in each of its ways go on to the bits of an unbroken run."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", "--kills", "6"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 and "| all | | 6 | 6 | 6 | 0 |" in done.stdout, done.stdout + done.stderr
