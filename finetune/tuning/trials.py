"""One trial: its runs are ordinary ones, in processes of their own, which are watched and stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from finetune.recipe.load import HERE
from finetune.training.launch import STOPPED, stop_signals
from finetune.training.run_dir import lock
from finetune.utils.errors import RecipeError
from finetune.utils.files import read_json
from finetune.utils.text import note

POLL = 0.5  # seconds between two looks at a run
LONGEST = 300  # characters of the reason why a run failed


class Job(NamedTuple):
    """A run: a recipe's file, what is changed in it, and the run's folder, beside which FOLDER.log has what it says."""

    file: Path
    assignments: Sequence[str]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of the run, once it is finished."""
        file = self.folder / "result.json"
        return read_json(file) if file.is_file() else None


Start = Callable[[Job], "subprocess.Popen[bytes]"]


class RunFailed(Exception):
    """A run ended without a result; `began` tells whether it had come to training."""

    def __init__(self, reason: str, began: bool):
        super().__init__(reason)
        self.began = began


def start_run(job: Job) -> "subprocess.Popen[bytes]":
    """Start `finetune train`, or go on with the run that is in the folder, on what a run takes: every GPU, or the CPU.

    It has a session of its own, so that Ctrl-C in a terminal reaches it once, by the process that started it.
    """
    changes = [word for assignment in job.assignments for word in ("--set", assignment)]
    fresh = ["train", str(job.file), *changes, "--output", str(job.folder)]
    line = ["resume", str(job.folder)] if (job.folder / "recipe.json").is_file() else fresh
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "finetune", *line, "--quiet"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )


def follow(job: Job, start: Start, goes_on: Callable[[Sequence[dict[str, Any]]], bool]) -> dict[str, Any] | None:
    """The result of a job, started or gone on with; None if it was stopped, with a checkpoint, as it was not to go on.

    `goes_on` is asked after each epoch, with the metrics of all epochs so far.

    Raises:
        RunFailed: if the run ends without a result.
        KeyboardInterrupt: as it comes, once the run has stopped as well.
    """
    wait_until_free(job.folder)  # of a run that outlived who had started it
    if job.result is None:
        size = job.log.stat().st_size if job.log.is_file() else 0
        process = start(job)
        try:
            while process.poll() is None:
                time.sleep(POLL)
                if not goes_on(epoch_rows(job.folder)):
                    stop(process)
                    return None
            if process.returncode == STOPPED:  # with a whole group of processes: the signal to this one is on its way
                time.sleep(4 * POLL)
        except BaseException:
            stop(process)
            raise
        if job.result is None:
            began = (job.folder / "metrics.jsonl").is_file()
            raise RunFailed(reason_of(job.log, size, process.returncode), began)
    goes_on(epoch_rows(job.folder))
    return job.result


def epoch_rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each epoch so far of a run that may be writing them."""
    try:
        lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]  # what follows is still being written
        return [row for row in map(json.loads, lines) if "val_images" in row and row["epoch"] >= 0]
    except (OSError, ValueError):
        return []


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask a run to stop and wait until it has written its checkpoint; a second Ctrl-C in the meantime ends it at once."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()
        raise


def wait_until_free(folder: Path) -> None:
    """Wait while another process writes a run there, and say so."""
    while folder.is_dir():
        if held := try_lock(folder):
            held.close()
            return
        note(f"waiting for the run in {folder}, which goes on although what started it has ended")
        time.sleep(POLL)


def try_lock(folder: Path) -> TextIO | None:
    """The lock on a folder, or None if another process has it."""
    try:
        return lock(folder)
    except RecipeError:
        return None


def reason_of(log: Path, size: int, code: int) -> str:
    """Why a run failed, in a line: what it said last, after the first `size` bytes of its log, or the signal that ended it."""
    if code < 0:
        memory = ": out of memory, perhaps" if code == -9 else ""
        return f"it was ended by {signal.Signals(-code).name}{memory}"
    said = log.read_bytes()[size:].decode(errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    found = next((i for i in reversed(range(len(lines))) if lines[i].startswith("finetune: ")), len(lines) - 1)
    words = " ".join(lines[found : found + 2] if lines and lines[found].endswith(":") else lines[found : found + 1])
    return (words.removeprefix("finetune: ") or f"it ended with exit code {code}")[:LONGEST]


@contextmanager
def stop_as_by_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP do what Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
