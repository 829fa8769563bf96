"""What a power cut or a full disk leaves of a run."""

import os
import random
import subprocess
import sys

import pytest

from benchmarks import powercuts
from finetune.utils.files import write_file, write_folder
from helpers import ROOT


def in_place(folder):
    (folder / "file").write_text("old")
    (folder / "file").write_text("new, longer")


def one_file(folder):
    write_file(folder / "file", "old")
    write_file(folder / "file", "new, longer")


def one_folder(folder):
    write_folder(folder / "made" / "one", lambda aside: (aside / "file").write_text("new, longer"))


@pytest.fixture
def left_by(tmp_path, monkeypatch):
    """A function's files, with what is in them, after each of its power cuts."""
    monkeypatch.setattr(os, "fsync", os.fsync)  # put back in the end, as the recorder has its own

    def left_by(function):
        folder, found = tmp_path / "run", []
        folder.mkdir()
        recorder = powercuts.Recorder(folder)
        function(folder)
        recorder.note("open", str(folder))
        recorder.busy = True  # a hook stays for good: it hears no more
        for at in range(len(recorder.log) + 1):
            for i, way in enumerate(powercuts.WAYS * 5):
                left = tmp_path / f"{at}-{i}"
                powercuts.leave(powercuts.replay(recorder.log[:at]), left, way, random.Random(i))
                found.append({str(path.relative_to(left)): path.read_bytes() for path in left.rglob("*") if path.is_file()})
        return found

    return left_by


def test_a_file_that_is_written_in_place_is_lost(left_by):
    """The simulated file system loses what was not flushed."""
    contents = [found.get("file") for found in left_by(in_place)]
    assert {None, b"", b"new, longer"} <= {*contents} and any(content and not content.strip(b"\0") for content in contents)


def test_a_file_is_the_old_or_the_new_one(left_by):
    """After a power cut at any moment of its writing a file is as it was before, or as it is to be."""
    found = left_by(one_file)
    contents = [files.get("file") for files in found]
    assert {*contents} == {None, b"old", b"new, longer"} and contents[-1] == b"new, longer"


def test_a_folder_is_there_whole_or_not_at_all(left_by):
    """So is a folder, and with it the folder that was made for it."""
    contents = [{name: text for name, text in files.items() if ".tmp" not in name} for files in left_by(one_folder)]
    assert all(files in ({}, {"made/one/file": b"new, longer"}) for files in contents) and contents[-1]


@pytest.mark.launches
def test_a_run_goes_on_after_a_power_cut(tmp_path):
    """Runs whose power was cut, or whose disk was full, go on from the newest checkpoint that was there, to the bit."""
    small = ["--cuts", "6", "--epochs", "5", "--writes", "3", "--seed", "1"]
    done = subprocess.run([sys.executable, "-m", "benchmarks.powercuts", *small], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
