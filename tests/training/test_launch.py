"""`finetune train --processes 2` in a terminal: what is asked of it and what goes wrong, told once and cleanly."""

import os
import pty
import re
import select
import sys
import time

import pytest

from helpers import ROOT

pytestmark = pytest.mark.launches
RECIPE = """
import os, time
from torch import nn
from finetune import AdamW, Cosine, Data, Group, Recipe

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.calls = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 16), 0

    def forward(self, images):
        self.calls += self.training
        if self.calls == 7 and self.training and os.environ.get("RANK") == "1":
            FAULT
        time.sleep(SECONDS * (self.training and not images.is_meta))
        return self.fc(self.conv(images).relu().mean((2, 3)))

recipe = Recipe(backbone=Net, head="fc", weights="none", data=Data("generated", image_size=24, batch_size=8),
                groups=(Group("all", ".", lr=1e-2),), optimizer=AdamW(), schedule=Cosine(warmup_epochs=0.5), epochs=99,
                batch_norm="frozen")
"""


def in_a_terminal(folder, fault="pass", seconds=0.0, presses=(), flags=()):
    """(exit code, output) of a run of two processes; Ctrl-C is pressed so many seconds after the first stage is told."""
    (folder / "mine.py").write_text(RECIPE.replace("FAULT", fault).replace("SECONDS", str(seconds)))
    words = [sys.executable, "-m", "finetune", "train", "mine.py", "--processes", "2", "--output", "out", *flags]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execvpe(words[0], words, {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"})
    out, started, presses, deadline = b"", 0.0, list(presses), time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            try:
                out += os.read(terminal, 65536)
            except OSError:  # the end of a terminal
                break
        if b"from epoch 1: trains" in out:
            started = started or time.monotonic()
        if started and presses and time.monotonic() - started > presses[0]:
            presses.pop(0)
            os.write(terminal, b"\x03")
    # Python's own words on locks of processes that were ended, which come or not, as the machine is busy
    said = re.sub(r"[^\n]*resource_tracker\.py[^\n]*\n[^\n]*warnings\.warn[^\n]*\n", "", out.decode())
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said


def test_ctrl_c_waits_for_the_checkpoint_and_says_so(tmp_path):
    """One line at once, one with the way on when the checkpoint is there, exit code 75, and nothing of any launcher's."""
    code, out = in_a_terminal(tmp_path, seconds=0.7, presses=[0.3])
    assert code == 75, out
    told = out[out.index("stopping") :].replace("\r", "\n").replace("\x1b[K", "").split("\n")
    lines = [line for line in told if line.strip() and not line.startswith("epoch ")]  # without the bar
    assert lines[0] == "stopping after this step, with a checkpoint; Ctrl-C again to stop at once"
    assert lines[1].startswith("stopped after step ") and lines[2:] == ["finetune resume out"]
    done = int(lines[1].split()[3].rstrip(","))
    assert [path.name[:13] for path in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step-{done:08d}"]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    """Without waiting for a long step, with exit code 130 and one line."""
    started = time.monotonic()
    code, out = in_a_terminal(tmp_path, seconds=60, presses=[1, 3])
    assert code == 130 and time.monotonic() - started < 60, out
    assert out.strip().endswith("finetune: stopped at once") and "Traceback" not in out


@pytest.mark.parametrize(
    "fault, code, said",
    [
        ("raise ValueError('of my own')", 1, "ValueError: of my own"),
        ("os.kill(os.getpid(), 9)", 1, "finetune: process 1 was ended by SIGKILL"),
    ],
)
def test_what_goes_wrong_in_one_process_is_told_once(tmp_path, fault, code, said):
    """Its traceback, or the signal that ended it, and neither the launcher's nor the other process's."""
    ended, out = in_a_terminal(tmp_path, fault)
    assert ended == code and out.count(said) == 1, out
    assert out.count("Traceback") == ("raise" in fault) and "gloo" not in out and "rank" not in out.lower()


def test_what_a_person_can_put_right_is_one_message(tmp_path):
    """A loss that is no number ends every process with exit code 2, and one of them says it."""
    code, out = in_a_terminal(tmp_path, flags=["--lr-scale", "1e30"])
    assert code == 2 and out.count("finetune: the loss of step ") == 1 and "Traceback" not in out, out


def test_an_error_of_any_length_ends_the_run(tmp_path):
    """One whose text is longer than a pipe holds is told from its end."""
    code, out = in_a_terminal(tmp_path, "raise ValueError('long ' * 40000 + 'end')")
    assert code == 1 and out.strip().endswith("long end"), out[-300:]
