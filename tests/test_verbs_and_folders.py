"""Every verb that writes finds out first whether it can."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import __main__ as command_line
from finetune.tools import image_stats
from finetune.tuning import lr_finder
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_folder

WRITES = {
    "train": ["train", "efficientnet_lite0_digits", "--processes", "1", "--output"],
    "plan": ["plan", "efficientnet_lite0_digits", "--output"],
    "find-lr": ["find-lr", "efficientnet_lite0_digits", "--output"],
    "tune": ["tune", "efficientnet_lite0_digits", "--trials", "2", "--output"],
    "reproduce": ["reproduce", "efficientnet_lite0_digits", "--output"],
    "evaluate": ["evaluate", "RUN", "--data", "digits", "--output"],
    "predict": ["predict", "RUN", "IMAGES", "--output"],
    "export": ["export", "RUN", "--to", "torch", "--output"],
    "soup": ["soup", "RUN", "RUN", "--output"],
    "suggest": ["suggest", "--data", "IMAGES", "--output"],
    "cp": ["cp", "efficientnet_lite0_digits"],
    "rank": ["rank", "--data", "IMAGES", "--output"],
    "rank --cache": ["rank", "--data", "IMAGES", "--cache"],
    "embed": ["embed", "RUN", "IMAGES", "--output"],
    "embed --picture": ["embed", "RUN", "IMAGES", "--picture"],
    "check": ["check", "--data", "IMAGES", "--output"],
    "check --fix": ["check", "--data", "IMAGES", "--fix"],
}
ENDINGS = {
    "suggest": ".py",
    "cp": ".py",
    "check --fix": ".csv",
    "predict": ".jsonl",
    "embed": ".safetensors",
    "embed --picture": ".png",
}  # of the verbs that write a file
PLACES = ("afile/x", "afile/x/y", f"{'n' * 300}/x", "n" * 300, f"new/{'n' * 300}", "n" * 249, "/proc/zz", "/proc/zz/x")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc, where there is no room")
@pytest.mark.parametrize("verb", WRITES)
def test_a_place_that_can_not_be_written_to_is_found_before_the_work(run_folder, image_folder, here, capsys, monkeypatch, verb):
    """Under a file, in /proc, and where a name is too long, be it while it is written aside: one sentence and exit code 2, and
    neither weights nor images are read."""

    def never(*args, **options):
        raise AssertionError("work was begun")

    for module, name in ((lr_finder, "range_test"), (image_stats, "compute_image_stats")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr("finetune.data.sources.load_data", never)
    (here / "afile").write_text("x")
    words = [{"RUN": str(run_folder), "IMAGES": str(image_folder)}.get(word, word) for word in WRITES[verb]]
    for place in PLACES:
        assert command_line.main([*words, place + ENDINGS.get(verb, "nnn")]) == 2
        text = capsys.readouterr().err.strip().splitlines()
        assert text[-1].startswith("finetune: ") and text[-1].endswith(("name another", "name another folder"))


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("verb,file", [("plan", "x/efficientnet_lite0_digits-plan.png"), ("suggest", "x.py"), ("cp", "x.py")])
def test_a_disk_that_fails_is_one_sentence(image_folder, here, capsys, monkeypatch, verb, file, fault):
    """It names the file and the reason, and half a file is not left."""

    def fail(path, content):
        path.touch()
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(Path, "write_bytes", fail)
    words = [{"IMAGES": str(image_folder)}.get(word, word) for word in WRITES[verb]]
    assert command_line.main([*words, f"x{ENDINGS.get(verb, '')}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"finetune: {file}: {os.strerror(fault)}"
    assert not [path for path in here.rglob("*") if path.is_file()]


def test_an_error_that_is_no_disks_keeps_its_traceback(monkeypatch):
    """Such as one of a program's own code."""

    def fail(args):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), "x")

    monkeypatch.setitem(command_line.VERBS, "ls", fail)
    with pytest.raises(FileNotFoundError):
        command_line.main(["ls"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_stdout_is_one_sentence():
    """Nothing of Python's follows as it ends."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "finetune", "ls"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "finetune: stdout: No space left on device\n")


def test_a_folder_that_is_read_only_is_said(tmp_path, monkeypatch):
    """A folder without the right to write is named, also as the parent of one that is to be made; others pass."""
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "er")
    monkeypatch.setattr("finetune.utils.files.os.access", lambda path, mode: path != tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "er"):
        with pytest.raises(RecipeError, match=f"no right to write into {tmp_path}; name another folder"):
            check_folder(folder)
