"""Decoded images on a disk: for later epochs, later runs, and several processes at once."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from finetune.images import cache, read
from finetune.images.cache import BOOT, CHUNK, FLUSHED, DiskCache
from finetune.report import sheets
from finetune.run import main
from helpers import ROOT, on_folder

RUN = [sys.executable, str(ROOT / "finetune" / "run.py")]
FIELDS = ("backbone=test_resnet", "epochs=2")


def image(index):
    return np.random.RandomState(index).randint(0, 256, (5 + index % 3, 7, 3), np.uint8)


def kept(cache, number=30):
    """Which images it has; each with its own pixels."""
    there = [i for i in range(number) if cache.get(i) is not None]
    assert all(np.array_equal(cache.get(i), image(i)) for i in there)
    return there


def keep_some(file, start, number, step):
    cache = DiskCache(file, 30, 10**6)
    for i in range(start, number, step):
        cache.keep(i, image(i))
        assert np.array_equal(cache.get(i), image(i))


def test_processes_and_runs_share_it(tmp_path):
    """Four processes that open it each for itself, two by two with the same images, leave all of them to a later one."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=keep_some, args=(tmp_path / "a", i % 2, 30, 2)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert kept(DiskCache(tmp_path / "a", 30, 10**6)) == list(range(30))
    assert os.stat(tmp_path / "a.pixels").st_size == 10**6 < CHUNK  # no more than allowed


def test_after_a_power_cut_only_what_was_flushed_counts(tmp_path):
    """Another start of the machine forgets what was kept after the last flush; the same start, as after a kill, does not."""
    keep_some(tmp_path / "a", 0, 10, 1)
    assert len(kept(DiskCache(tmp_path / "a", 30, 10**6))) == 10
    cache = DiskCache(tmp_path / "a", 30, 10**6)
    cache.header[BOOT] = 1
    assert kept(DiskCache(tmp_path / "a", 30, 10**6)) == [] and os.stat(tmp_path / "a.pixels").st_size == 0
    keep_some(tmp_path / "a", 0, 10, 1)
    cache = DiskCache(tmp_path / "a", 30, 10**6)
    cache.flush()
    cache.header[BOOT] = 1
    assert len(kept(DiskCache(tmp_path / "a", 30, 10**6))) == 10 and cache.header[FLUSHED]
    cache.keep(11, image(11))
    assert not cache.header[FLUSHED]


def test_it_ends_at_its_limit_and_at_the_disks(tmp_path, monkeypatch):
    """What has no room is not kept, and no byte is written where the disk has none."""
    size = image(0).size
    cache = DiskCache(tmp_path / "a", 30, 2 * size)
    for i in (0, 3, 6, 9):  # of the same size
        cache.keep(i, image(i))
    assert kept(cache) == [0, 3]
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: (_ for _ in ()).throw(OSError(28, "full")))
    full = DiskCache(tmp_path / "b", 30, CHUNK)
    full.keep(0, image(0))
    assert kept(full) == [] and os.stat(tmp_path / "b.pixels").st_size == 0


def run(images, folder, cache, *words):
    return main([*on_folder(images, folder, *FIELDS), "--cache", str(cache), *words])


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_second_run_decodes_nothing(tmp_path, image_folder, monkeypatch, capsys):
    """Runs with and without end with the same bits; the second reads no image, and other content is another cache."""
    decoded, real = [], read.read_image
    monkeypatch.setattr("finetune.data.loader.read_image", lambda *args: decoded.append(1) or real(*args))
    monkeypatch.setattr(sheets, "plot_augmented", lambda *args: None)  # it draws before the cache is opened
    assert main(on_folder(image_folder, tmp_path / "plain", *FIELDS)) == 0
    for number in range(2):
        decoded.clear()
        assert run(image_folder, tmp_path / str(number), tmp_path / "cache") == 0
        found, total = re.search(r"cache has (\d+) of (\d+) images, decoded", capsys.readouterr().out).groups()
        assert (found, len(decoded)) == ((total, 0) if number else ("0", int(total)))
        assert weights(tmp_path / str(number)) == weights(tmp_path / "plain")
    changed = shutil.copytree(image_folder, tmp_path / "changed")
    one, other, *_ = sorted(changed.glob("train/*/*"))
    one.write_bytes(other.read_bytes())
    for number, words in enumerate(((), ("--set", "data.background=(0, 0, 0)"))):
        assert run(changed, tmp_path / f"changed{number}", tmp_path / "cache", *words) == 0
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == 2 + 1 + 2  # the validation images are the same at first


@pytest.mark.launches
def test_two_processes_and_loaders_share_it(tmp_path, image_folder):
    """Two processes with a loader process each end with the bits of such without a cache, and leave it flushed."""
    command = [*RUN, *on_folder(image_folder, tmp_path / "a", *FIELDS), "--workers", "1"]
    launch = [sys.executable, "-m", "finetune", "train", *command[3:], "--processes", "2"]
    plain = [str(tmp_path / "b") if word == str(tmp_path / "a") else word for word in launch]
    with_cache = [*launch, "--cache", str(tmp_path / "cache")]
    done = subprocess.run(plain, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(with_cache, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    opened = DiskCache(next((tmp_path / "cache").glob("*.places")).with_suffix(""), 1, 10**6)
    assert opened.header[FLUSHED]


@pytest.mark.parametrize("what", ["set", "folder", "system", "limit"])
def test_what_can_not_be_kept_is_refused(tmp_path, image_folder, monkeypatch, capsys, what):
    """A set that is no files, a folder that is a file, a system without a number for its start, no limit: one sentence each."""
    (tmp_path / "file").write_text("")
    if what == "set":
        code = main(["--recipe", "resnet18_cifar", "--smoke", "--cache", str(tmp_path / "c"), "--output", str(tmp_path / "r")])
        said = "--cache keeps images that are files, in folders or of a table; these are not: leave it out"
    elif what == "folder":
        code, said = run(image_folder, tmp_path / "r", tmp_path / "file"), "file: File exists; it takes a folder"
    elif what == "limit":
        code, said = run(image_folder, tmp_path / "r", tmp_path / "c", "--cache-limit", "0"), "--cache-limit is the GiB"
    else:
        monkeypatch.setattr(cache, "BOOT_ID", tmp_path / "none")
        code, said = run(image_folder, tmp_path / "r", tmp_path / "c"), "on a disk of a Linux machine"
    assert code == 2 and said in capsys.readouterr().err
