"""Fixtures: what a test is given by naming it."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # processes side by side, spinning, slow each other down tenfold

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from file_server import serving
from helpers import ROOT, on_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory, image_folder):
    """A run of resnet18_cifar on the image folder, with its terminal's output; nobody writes into its folder."""
    output = tmp_path_factory.mktemp("run") / "out"
    words = [str(ROOT / "finetune" / "run.py"), *on_folder(image_folder, output), "--seed", "3"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done.stdout, done.stderr


@pytest.fixture(scope="session")
def run_folder(finished):
    """The folder of that run."""
    return finished[0]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state in the process; each test starts without."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # a later test's fixtures come before this one


@pytest.fixture
def asked(monkeypatch):
    """Whom this process tries to reach: (host, port) of each connection."""
    tried, connect = [], socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: tried.append(to) or connect(self, to))
    return tried


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """train/ and val/ with 3 classes of 10 and 5 photographs that can be told apart by their colour."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 10), ("val", 5)):
        for label, name in enumerate(("blue", "green", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.RandomState(100 * label + i + count).randint(0, 128, (40, 48, 3))
                pixels[..., 2 - label] += 127
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def command():
    """The interpreter and the script, as a person starts them."""
    return [sys.executable, str(ROOT / "finetune" / "run.py")]


@pytest.fixture
def web():
    """A web server on this machine, whose files and faults a test sets."""
    pytest.importorskip("aiohttp")  # which reads from it
    with serving() as server:
        yield server
