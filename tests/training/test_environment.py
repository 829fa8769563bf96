"""What a machine may lack: locks, memory, readers of the output, letters, forked loader processes."""

import errno
import gc
import json
import mmap
import multiprocessing
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from finetune.data import loader
from finetune.data.sources import load_data
from finetune.recipe import Data
from finetune.run import main
from finetune.training import run_dir, setup
from finetune.training.setup import make_accelerator
from finetune.utils.errors import RecipeError
from helpers import ROOT, on_folder, prepare, run_here, small_recipe

RUN = [sys.executable, str(ROOT / "finetune" / "run.py")]


def arguments(images, output):
    return on_folder(images, output, "backbone=test_resnet", "epochs=1")


def fail(code):
    def failing(*args, **options):
        raise OSError(code, os.strerror(code))

    return failing


@pytest.mark.parametrize("fault", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_used_with_a_word(tmp_path, monkeypatch, capsys, fault):
    """Only a lock that another process holds keeps a run out."""
    monkeypatch.setattr(run_dir.fcntl, "lockf", fail(fault))
    run_dir.lock(tmp_path).close()
    assert f"{tmp_path} can't be locked ({os.strerror(fault)})" in capsys.readouterr().err
    monkeypatch.setattr(run_dir.fcntl, "lockf", fail(errno.EAGAIN))
    with pytest.raises(RecipeError, match="is alive and writes its run"):
        run_dir.lock(tmp_path)


def test_a_folder_that_cannot_be_written_is_no_interrupted_run(tmp_path):
    """Before anything was written there is nothing to go on with: another folder is the way."""
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="can't write to .*file/out: Not a directory; name another --output"):
        run_dir.lock(tmp_path / "file" / "out")


def test_images_need_not_be_kept(tmp_path, image_folder, monkeypatch, capsys):
    """Without memory to keep images in, a run says so and ends with the same bits."""
    assert main(arguments(image_folder, tmp_path / "kept")) == 0
    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", fail(errno.ENOMEM))
        assert main(arguments(image_folder, tmp_path / "not")) == 0
    assert capsys.readouterr().err.count("no memory can be had to keep images") == 1
    first, second = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("kept", "not"))
    assert first == second


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("out of shared memory")])
def test_full_shared_memory_is_called_so(tmp_path, monkeypatch, fault):
    """What loader processes find full is /dev/shm, not the run's folder; another error stays what it is."""

    def full(*args, **options):
        raise fault

    monkeypatch.setattr(loader.DataLoader, "__iter__", full)
    with pytest.raises(RecipeError, match="no room in /dev/shm, through which 2 loader processes"):
        run_here(small_recipe(), tmp_path, workers=2)
    monkeypatch.setattr(loader.DataLoader, "__iter__", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        run_here(small_recipe(), tmp_path, workers=2)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_full_shared_memory_is_said_once(monkeypatch, room):
    """Wherever room ends as the loader processes are made, nothing of Python's follows, and none of them stays."""
    queue, made = torch.multiprocessing.Queue, []

    def cramped(*args):
        made.append(1)
        if len(made) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return queue(*args)

    monkeypatch.setattr(torch.multiprocessing, "Queue", cramped)
    images, shown = prepare(small_recipe())[2][0], []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    with pytest.raises(RecipeError, match="no room in /dev/shm, through which 2 loader processes"):
        next(loader.load(images, 0, [[0]], workers=2))
    gc.collect()
    assert not shown and not multiprocessing.active_children() and sys.unraisablehook == shown.append


@pytest.mark.launches
@pytest.mark.parametrize("shell", ["| head -1", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full"])
def test_output_that_goes_nowhere_ends_no_run(tmp_path, image_folder, shell):
    """A reader that has seen enough, closed streams and a full one do not matter: the run ends as with a terminal."""
    words = " ".join([*RUN, *map(str, arguments(image_folder, tmp_path / "out"))])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words} {shell}"], capture_output=True, text=True)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "result.json").is_file() and (tmp_path / "out" / "curves.png").is_file()


@pytest.mark.launches
def test_names_in_letters_that_the_locale_does_not_know(tmp_path, image_folder):
    """In an ASCII locale a run on folders with other letters ends, with its pictures, and writes the names as UTF-8."""
    images = tmp_path / "B\u00e4ume"
    for split in ("train", "val"):
        for name in ("blue", "green", "red"):
            (images / split).mkdir(parents=True, exist_ok=True)
            (images / split / name.replace("green", "gr\u00fcn")).symlink_to(image_folder / split / name)
    ascii_locale = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([*RUN, *arguments(images, tmp_path / "out")], capture_output=True, env={**os.environ, **ascii_locale})
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (tmp_path / "out" / "result.json").is_file() and config["label_names"] == ["blue", "gr\u00fcn", "red"]


OWN = """
import numpy as np
from PIL import Image

from finetune import AdamW, Augment, Cosine, Data, LayerDecay, Recipe


class Squares:
    classes = ["dark", "bright"]

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return Image.new("RGB", (32, 32), (90 + 100 * (i % 2),) * 3), i % 2


def images():
    return Squares(16), Squares(4)


def noise(image, rng):
    return (np.asarray(image) * rng.uniform(0.5, 1, 3)).astype(np.uint8)


recipe = Recipe(backbone="test_resnet", weights="none", data=Data(images, image_size=32, batch_size=8),
                augment=Augment(function=noise), groups=LayerDecay(head_lr=1e-2, stem_ratio=0.1), optimizer=AdamW(),
                schedule=Cosine(), epochs=1, batch_norm="frozen")
"""


@pytest.mark.launches
def test_loader_processes_that_are_started_afresh(tmp_path):
    """As on macOS and Windows, they read images of a recipe's own class and call its function, as a run without them."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "start.py").write_text(
        f"import multiprocessing, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "if __name__ == '__main__':\n    multiprocessing.set_start_method('spawn')\n    from finetune.run import main\n"
        "    sys.exit(max(main(['--recipe', 'own.py', '--workers', n, '--output', n]) for n in '01'))\n"
    )
    done = subprocess.run([sys.executable, "start.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0" / "metrics.jsonl").read_text() == (tmp_path / "1" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("source", ["digits", "generated"])
def test_named_sets_can_be_sent_to_loader_processes(source):
    """A set that comes with a package, or is generated for --smoke, is pickled whole."""
    images = load_data(small_recipe(data=Data(source, 24, 8))).train
    sent = pickle.loads(pickle.dumps(images))
    assert sent[3][0].tobytes() == images[3][0].tobytes() and sent[3][1] == images[3][1]


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path, monkeypatch, capsys):
    """While the head is fitted there is nothing to save: the run stops at once, and says how to go on."""
    import signal

    from finetune.training import loop

    monkeypatch.setattr(loop, "fit", lambda *args: signal.raise_signal(signal.SIGINT))
    assert main(["--recipe", "resnet18_cifar", "--smoke", "--output", str(tmp_path / "out")]) == 75
    assert f"stopped before the first step; to go on:\nfinetune resume {tmp_path / 'out'}" in capsys.readouterr().out


def test_two_runs_of_one_program_may_differ_in_precision(tmp_path, image_folder):
    """The command's function, called twice in one Python, is two runs."""
    for precision in ("no", "bf16"):
        assert main([*arguments(image_folder, tmp_path / precision), "--set", f"mixed_precision={precision}"]) == 0


def test_more_processes_than_gpus(monkeypatch):
    """They are refused by name before NCCL fails on them, and on the CPU they may be as many as asked for."""
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in (places | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match="2 processes .* needs a GPU of its own, and there are 1: .* ACCELERATE_USE_CPU=1"):
        make_accelerator(small_recipe())
    reached = []
    monkeypatch.setattr(setup, "Accelerator", lambda **options: reached.append(options["cpu"]) or SimpleNamespace(log_with=[]))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    make_accelerator(small_recipe())
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    make_accelerator(small_recipe())
    assert reached == [True, False]


@pytest.mark.parametrize("asked,cores,threads", [(None, 1, 1), (None, 64, 3), ("3", 1, 3)])
def test_threads_are_no_more_than_a_container_has_time_for(monkeypatch, asked, cores, threads):
    """Unless a person has said how many; and no more than torch would take."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(setup, "num_cores", lambda: cores)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        make_accelerator(small_recipe())
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
