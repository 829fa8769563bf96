"""What other launchers say in the environment: obeyed, or refused in one sentence with what to type instead."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from finetune.run import main
from finetune.training.launch import STOPPED, check_processes
from finetune.utils.cores import num_cores
from finetune.utils.errors import RecipeError
from helpers import ROOT, on_folder
from launching import ACCELERATE, QUIET, command, contents, free_port, several

pytestmark = pytest.mark.launches

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "variable,value,fault",
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed (ACCELERATE_USE_DEEPSPEED=true)"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("ACCELERATE_USE_SAGEMAKER", "true", "asks for SageMaker"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asks for a parallelism config"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "precision belongs to the recipe: --set mixed_precision=bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "precision belongs to the recipe: launch with --mixed_precision no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compiling belongs to the recipe: --set torch_compile=True"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "asked for with --accumulate"),
        ("MASTER_PORT", "0", "name one with --main_process_port"),
        ("SLURM_STEP_NUM_TASKS", "4", "srun started 4 processes without RANK and WORLD_SIZE"),
        ("OMPI_COMM_WORLD_SIZE", "2", "mpirun started 2 processes"),
        ("PMI_SIZE", "2", "mpirun started 2 processes"),
    ],
)
def test_what_a_run_would_not_do_is_refused(here, capsys, monkeypatch, variable, value, fault):
    """A launcher's setting without effect, or with one on the result, ends in one message that names it, and no folder."""
    monkeypatch.setenv(variable, value)
    assert main(["--recipe", "efficientnet_lite0_digits"]) == 2
    err = capsys.readouterr().err
    assert fault in err and err.startswith("finetune: ") and len(err.splitlines()) == 1 and not list(here.iterdir())


def test_fsdp_of_one_process_is_a_plain_run(here, monkeypatch):
    """There is nothing to share: whatever the version and the recipe."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["--recipe", "efficientnet_lite0_digits", "--set", "ema_decay=0.9", "--dry-run"]) == 0


def test_torch_xla_is_refused(here, capsys, monkeypatch):
    """Where torch_xla is installed, Accelerate would take it: the message says how not to."""
    (here / "torch_xla").mkdir()
    (here / "torch_xla" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(here))
    assert main(["--recipe", "efficientnet_lite0_digits"]) == 2 and "USE_TORCH_XLA=0" in capsys.readouterr().err
    monkeypatch.setenv("USE_TORCH_XLA", "0")
    assert main(["--recipe", "efficientnet_lite0_digits", "--dry-run"]) == 0


@pytest.mark.parametrize(
    "left,unset",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"RANK": "1"}, "RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK WORLD_SIZE"),
        (TORCHRUN | {"RANK": "2"}, "RANK WORLD_SIZE LOCAL_RANK"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "RANK WORLD_SIZE LOCAL_RANK"),
    ],
)
def test_what_is_left_over_of_another_launch_is_named(here, capsys, monkeypatch, left, unset):
    """An environment of no whole launch ends in a message that says what to unset, whichever process it seems to be."""
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert main(["--recipe", "efficientnet_lite0_digits"]) == 2
    assert f"To run alone, unset {unset};" in capsys.readouterr().err and not list(here.iterdir())


@pytest.mark.parametrize("value", ["1", ""])
def test_a_process_of_no_known_rank_says_so_at_once(here, capsys, monkeypatch, value):
    """LOCAL_RANK alone is no launch, in which another process would say it first."""
    monkeypatch.setenv("LOCAL_RANK", value)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    assert main(["--recipe", "efficientnet_lite0_digits"]) == 2
    assert capsys.readouterr().err.startswith(f"finetune: the environment has LOCAL_RANK={value}, without RANK")


@pytest.mark.parametrize(
    "name,value",
    [
        ("ACCELERATE_USE_CPU", "perhaps"),
        ("ACCELERATE_DEBUG_MODE", "perhaps"),
        ("ACCELERATE_CPU_AFFINITY", ""),
        ("ACCELERATE_TORCH_DEVICE", "xpu"),
        ("ACCELERATE_TORCH_DEVICE", "nowhere"),
        ("ACCELERATE_TORCH_DEVICE", ""),
    ],
)
def test_a_setting_that_accelerate_fails_on_is_named(here, capsys, monkeypatch, name, value):
    """A word that is neither yes nor no, and a device that is not there: one sentence, and no folder."""
    monkeypatch.setenv(name, value)
    assert main(["--recipe", "resnet18_cifar", "--smoke"]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"finetune: {name}={value} in the environment: ") and err.endswith(f"; unset {name}")
    assert len(err.splitlines()) == 1 and not list(here.iterdir())


@pytest.mark.parametrize(
    "environment",
    [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}, TORCHRUN, TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"}],
)
def test_one_process_alone_and_one_of_a_launch_pass(monkeypatch, environment):
    """What torch's own launcher sets is taken as it is, also within srun, and so is what is true of one process."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_processes()
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(RecipeError, match="LOCAL_RANK=x"):
        check_processes()


@pytest.mark.parametrize(
    "config,fault",
    [
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 1}", "a run does version 2: --fsdp_version 2"),
        ("distributed_type: 'NO'\nnum_processes: 1\ndynamo_config: {dynamo_backend: INDUCTOR}", "the dynamo backend inductor"),
        ("distributed_type: MULTI_CPU\nnum_processes: 2", "accelerate launch was asked for several processes"),
    ],
    ids=["FSDP", "dynamo", "MULTI_CPU"],
)
def test_what_a_person_once_answered_to_accelerate_config_is_seen(tmp_path, config, fault):
    """The default configuration file, which nobody names on the command line, is obeyed or refused, once."""
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(
        f"compute_environment: LOCAL_MACHINE\nmachine_rank: 0\nnum_machines: 1\nmixed_precision: 'no'\n{config}\n"
    )
    line = [
        *ACCELERATE,
        str(ROOT / "finetune" / "run.py"),
        "--recipe",
        "efficientnet_lite0_digits",
        "--output",
        tmp_path / "out",
    ]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path)})
    assert done.returncode and done.stderr.count(fault) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_torchrun_starts_the_module(tmp_path, image_folder):
    """`torchrun -m finetune.run` is one run of two processes."""
    line = command(tmp_path, image_folder, tmp_path / "out", [])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "finetune.run"]
    done = subprocess.run([*torchrun, *line[1:]], capture_output=True, text=True, cwd=ROOT)
    assert (tmp_path / "out" / "result.json").is_file(), done.stderr
    assert contents(tmp_path / "out")[0]["hardware"]["processes"] == 2


NOTEBOOK = """
from accelerate import LAUNCHER
from finetune.run import main

LAUNCHER(main, (ARGUMENTS,), num_processes=2OPTIONS)
"""


@pytest.mark.parametrize("launcher", ["notebook_launcher", "debug_launcher"])
def test_accelerates_launchers_of_functions(tmp_path, image_folder, launcher):
    """notebook_launcher is obeyed; debug_launcher, whose processes do not know which they are, is refused."""
    arguments = command(tmp_path, image_folder, tmp_path / "out", [])[1:]
    (tmp_path / "book.py").write_text(
        NOTEBOOK.replace("LAUNCHER", launcher)
        .replace("ARGUMENTS", repr(list(map(str, arguments))))
        .replace("OPTIONS", f", use_port='{free_port()}'" if launcher == "notebook_launcher" else "")  # 29500 may be another's
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "book.py"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if launcher == "debug_launcher":
        assert "the environment has WORLD_SIZE=2, without RANK" in done.stderr and not (tmp_path / "out").exists()
    else:
        assert (tmp_path / "out" / "result.json").is_file(), done.stderr
        assert contents(tmp_path / "out")[0]["hardware"]["processes"] == 2


def test_what_one_process_alone_finds_wrong_is_said(tmp_path):
    """A process that lacks the recipe's file, as on a second machine, says so, although it is not the first."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.py").write_text((ROOT / "recipes" / "efficientnet_lite0_digits.py").read_text())
    (tmp_path / "start.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom finetune.run import main\n"
        f"os.chdir({str(tmp_path)!r} + ('' if os.environ['RANK'] == '1' else '/there'))\n"
        "sys.exit(main(['--recipe', 'mine.py', '--output', 'out']))\n"
    )
    done = subprocess.run([*several(2), tmp_path / "start.py"], capture_output=True, text=True)
    assert done.returncode and done.stderr.count("finetune: process 1: no recipe file mine.py") == 1, done.stderr


@pytest.mark.parametrize("asked,threads", [({}, num_cores()), ({"OMP_NUM_THREADS": "1"}, 1)])
def test_accelerate_launch_takes_the_threads_that_were_asked_for(tmp_path, image_folder, asked, threads):
    """One process takes all cores, unless a person gave it fewer: the launcher alone would give it one."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    line = command(tmp_path, image_folder, tmp_path / "out", [*ACCELERATE, "--num_processes", "1", *QUIET])
    subprocess.run(line, capture_output=True, env=environment | asked, check=True)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["hardware"]["threads"] == threads


def wait_for_a_checkpoint(folder, started):
    while not list((folder / "checkpoints").glob("step-*")):
        assert started.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("launcher", [[*ACCELERATE, "--num_processes", "1", *QUIET], several(2)], ids=["one", "two"])
def test_a_run_stops_with_a_checkpoint_when_its_launcher_is_gone(tmp_path, image_folder, launcher):
    """SIGKILL to `accelerate launch`, and for one process SIGTERM, which it does not pass on: the run does not go on alone."""
    line = command(tmp_path, image_folder, tmp_path / "out", launcher, ["--set", "epochs=500", "--checkpoint-every", "1"])
    with open(tmp_path / "log", "w") as log:
        started = subprocess.Popen(line, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for_a_checkpoint(tmp_path / "out", started)
    processes = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(signal.SIGTERM if "--multi_gpu" not in launcher else signal.SIGKILL)
    started.wait()
    assert not psutil.wait_procs(processes, timeout=60)[1]
    assert "stopped after step" in (tmp_path / "log").read_text() and not (tmp_path / "out" / "result.json").exists()


def test_a_closed_terminal_leaves_a_checkpoint(tmp_path, image_folder):
    """SIGHUP stops a run as SIGTERM does; under nohup it is not heard."""
    for output, nohup in (("a", []), ("b", ["nohup"])):
        arguments = on_folder(image_folder, tmp_path / output, "backbone=test_resnet", "epochs=600")
        started = subprocess.Popen(
            [*nohup, sys.executable, str(ROOT / "finetune" / "run.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup themselves
        )
        wait_for_a_checkpoint(tmp_path / output, started)
        started.send_signal(signal.SIGHUP)
        if nohup:
            time.sleep(0.5)
            started.send_signal(signal.SIGTERM)
        out = started.communicate(timeout=60)[0].decode()
        assert started.returncode == STOPPED and "stopped after step" in out
