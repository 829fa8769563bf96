"""A file that was in order is known again as long as it is the same, and no longer."""

import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from finetune.data.dataset import ImageList, check_files
from finetune.images import read
from finetune.images.read import look_into, read_image
from finetune.utils import known_files
from finetune.utils.errors import RecipeError
from finetune.utils.files import file_digest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the time of change is known")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Four pictures of the same size in bytes, in a set that counts as large, and at rest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setattr(known_files, "FEW", 4)
    monkeypatch.setattr(known_files, "SETTLED", 0)
    (tmp_path / "photos").mkdir()
    files = [tmp_path / "photos" / f"{i}.bmp" for i in range(4)]
    for i, file in enumerate(files):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(file)
    time.sleep(0.02)
    return files


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that were looked into since the last call."""
    names, look = [], read.look
    monkeypatch.setattr(read, "look", lambda channels, file: names.append(file.name) or look(channels, file))

    def since():
        found, names[:] = list(names), []
        return found

    return since


def check(files, channels=None):
    """What `look_into` finds, with each digest held against the file's own."""
    faults, digests = look_into(files, channels, shown=False)
    assert digests == ["" if str(file) in faults else file_digest(file) for file in files]
    return faults


def test_a_file_is_opened_once(photos, opened):
    """In a second start none is, whatever the order; one that is new is; another question is asked anew."""
    assert not check(photos) and len(opened()) == 4
    assert not check(photos) and not opened()
    assert not check(photos[::-1]) and not opened()
    shutil.copy(photos[0], new := photos[0].with_name("x.bmp"))
    assert not check([*photos, new]) and opened() == ["x.bmp"]
    check(photos, channels=3)
    assert len(opened()) == 4


def change_in_place(file):
    with open(file, "r+b") as opened:
        opened.seek(60)
        opened.write(b"\xff" * 60)


def change_by_renaming(file):
    change_in_place(shutil.copy(file, file.with_suffix(".new")))
    os.replace(file.with_suffix(".new"), file)


def swap_with_another(file):
    other = file.with_name("2.bmp")
    file.rename(file.with_suffix(".tmp")), other.rename(file), file.with_suffix(".tmp").rename(other)


@pytest.mark.parametrize("change", [change_in_place, change_by_renaming, swap_with_another])
def test_a_changed_file_is_opened(photos, opened, change):
    """Although its size and the time when it was written are what they were."""
    check(photos), opened()
    before = os.stat(photos[1])
    change(photos[1])
    os.utime(photos[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(photos[1])
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert not check(photos) and "1.bmp" in opened()


def test_what_is_not_in_order_is_opened_each_time(photos, opened):
    """A fault is told again, and gone once the file is mended; one that is gone is named."""
    whole = photos[2].read_bytes()
    photos[2].write_bytes(b"no picture")
    for _ in range(2):
        assert list(check(photos)) == [str(photos[2])] and "2.bmp" in opened()
    photos[2].write_bytes(whole)
    assert not check(photos) and opened() == ["2.bmp"]
    photos[3].unlink()
    assert list(check(photos)) == [str(photos[3])]


def test_a_file_in_motion_is_not_kept(photos, opened, monkeypatch):
    """One that has just changed may change again within the same tick of the file system's clock."""
    monkeypatch.setattr(known_files, "SETTLED", 10**12)
    for _ in range(2):
        assert not check(photos) and len(opened()) == 4


@pytest.mark.parametrize("damage", [lambda kept: kept[:100], lambda kept: b"", lambda kept: b"\0" * len(kept)])
def test_a_damaged_record_is_made_anew(photos, opened, damage, tmp_path):
    """As is one of another version."""
    check(photos), opened()
    (file,) = (tmp_path / "kept").rglob("*.npy")
    file.write_bytes(damage(file.read_bytes()))
    assert not check(photos) and len(opened()) == 4
    np.save(file, np.zeros(4, [("inode", np.uint64)]))
    assert not check(photos) and len(opened()) == 4
    assert not check(photos) and not opened()


def test_no_place_to_keep_it(photos, opened, monkeypatch):
    """Then each start looks into all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos[0]))  # a file
    for _ in range(2):
        assert not check(photos) and len(opened()) == 4


def test_few_files_leave_nothing(photos, opened, tmp_path):
    """Below a number that is opened within a second."""
    for _ in range(2):
        assert not check(photos[:3]) and len(opened()) == 3
    assert not (tmp_path / "kept").exists()


def test_the_lists_know_their_digests(photos):
    """Each its own, and of parts of them those of the parts; a file that can't be read stops the check."""
    parts = [ImageList(photos[:3], [0, 1, 0], read_image), ImageList(photos[3:], [1], read_image)]
    for _ in range(2):
        check_files(parts, "stop")
        assert [digest for part in parts for digest in part.digests] == [file_digest(file) for file in photos]
        assert parts[0].part([2, 0]).read_with(background=(0, 0, 0)).digests == [file_digest(photos[2]), file_digest(photos[0])]
    photos[1].write_bytes(b"no picture")
    with pytest.raises(RecipeError, match="can't read the image .*1.bmp"):
        check_files(parts, "stop")


def test_a_disk_that_numbers_no_files(photos, monkeypatch):
    """Where all have the same number and time, as on some file systems of programs, none is taken for another."""
    one = os.stat(photos[0])
    monkeypatch.setattr(known_files, "os", SimpleNamespace(**vars(os) | {"stat": lambda file: one}))
    for _ in range(2):
        assert not check(photos)
