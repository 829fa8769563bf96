"""A function of many items is that of each, whatever process computes it."""

import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from finetune.utils import cores
from finetune.utils.cores import num_cores, on_all_cores
from finetune.utils.errors import RecipeError

MANY = range(3 * cores.AT_ONCE)
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="where processes fork")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """As on a machine of two cores, on which this many items are worth it."""
    monkeypatch.setattr(cores, "num_cores", lambda: 2)
    monkeypatch.setattr(cores, "WORTH_IT", len(MANY))


TOGETHER = multiprocessing.get_context("fork").Barrier(2, timeout=60) if sys.platform.startswith("linux") else None


def square_here(number):
    return number * number, os.getpid()


def square_together(number):
    if number in (0, cores.AT_ONCE):
        TOGETHER.wait()  # so that no process has done all before another starts
    return square_here(number)


@ON_LINUX
def test_many_are_spread():
    """In their order, by two processes, neither of them this one."""
    squares, processes = zip(*on_all_cores(square_together, MANY), strict=True)
    assert list(squares) == [i * i for i in MANY]
    assert len(set(processes)) == 2 and os.getpid() not in processes


def test_few_stay_here():
    """Without another process."""
    assert set(on_all_cores(square_here, MANY[1:])) == {(i * i, os.getpid()) for i in MANY[1:]}


def refuse_the_400th(number):
    if number == 400:
        raise RecipeError("install a package", one_process=True)
    return number


def test_what_it_raises_arrives():
    """With its words, after the items before it."""
    found = on_all_cores(refuse_the_400th, MANY)
    with pytest.raises(RecipeError, match="install a package") as raised:
        for _ in found:
            pass
    assert raised.value.one_process


GRANTED = {  # /proc/self/cgroup, files below /sys/fs/cgroup, cores of 64
    "docker run --cpus 2.5": ("0::/", {"cpu.max": "250000 100000"}, 2),
    "a pod's limit of half a core": ("0::/", {"cpu.max": "50000 100000"}, 1),
    "no limit": ("0::/", {"cpu.max": "max 100000"}, 64),
    "no limit, version 1": ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
    "version 1, seen from within": (
        "4:memory:/docker/1f\n3:cpu,cpuacct:/docker/1f\n0::/docker/1f",
        {"cpu/cpu.cfs_quota_us": "765000", "cpu/cpu.cfs_period_us": "100000"},
        7,
    ),
    "the slice around a session": (
        "0::/user.slice/session.scope",
        {"user.slice/cpu.max": "400000 100000", "user.slice/session.scope/cpu.max": "max 100000"},
        4,
    ),
    "of another's group": ("0::/mine", {"yours/cpu.max": "100000 100000"}, 64),
    "more than there are": ("0::/", {"cpu.max": "9900000 100000"}, 64),
    "not read": ("0::/", {"cpu.max": ""}, 64),
    "not Linux": (None, {}, 64),
}


@pytest.mark.parametrize("own,files,cores_there", GRANTED.values(), ids=GRANTED)
def test_a_container_may_have_the_time_of_fewer_cores(monkeypatch, tmp_path, own, files, cores_there):
    """Its whole cores: the affinity is that of the machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64), raising=False)
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "groups")
    if own is not None:
        (tmp_path / "own").write_text(f"{own}\n")
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(f"{text}\n")
    assert num_cores() == cores_there


WAITING = """
import os, sys, time
from finetune.utils import cores

def tell(number):
    if number % cores.AT_ONCE:
        return time.sleep(0.01)
    os.write(1, f"{os.getpid()}\\n".encode())  # print writes "\\n" by itself where PYTHONUNBUFFERED is set

cores.num_cores = lambda: 2
list(cores.on_all_cores(tell, range(5_000)))
"""


def goes_on(process):
    """Whether it runs; one that has ended may stay listed until somebody asks how."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


@ON_LINUX
def test_none_is_left_behind():
    """Once the process that they work for is killed."""
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True) as parent:
        workers = set()
        while len(workers) < 2:
            workers.add(int(parent.stdout.readline()))
        assert parent.pid not in workers
        parent.kill()
        for _ in range(100):
            if not any(map(goes_on, workers)):
                return
            time.sleep(0.1)
    raise AssertionError("they go on")


PARENT = os.getpid()


def die_elsewhere(number):
    if os.getpid() != PARENT and number == 400:
        os._exit(9)  # as the system ends a process for want of memory
    return number


def test_a_dead_process_is_made_up_for():
    """The rest is done here, each item once."""
    assert list(on_all_cores(die_elsewhere, MANY)) == list(MANY)


@pytest.mark.parametrize("step", ["__init__", "submit"])
def test_no_process_is_to_be_had(monkeypatch, step):
    """No shared memory for their locks, or a limit on processes: all is done here."""

    def refuse(*args, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(ProcessPoolExecutor, step, refuse)
    assert list(on_all_cores(square_here, MANY)) == [(i * i, os.getpid()) for i in MANY]
