"""Folders that are whole or absent."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from finetune.utils.files import write_folder
from helpers import Cut, cut_at


def write(text):
    return lambda folder: (folder / "file").write_text(text)


@pytest.mark.parametrize("renames,there", [(0, "old"), (1, None), (2, "new")])
def test_a_folder_that_is_replaced_is_never_half(tmp_path, monkeypatch, renames, there):
    """A death at a rename, or before the old one is removed, leaves the old one, the new one or none; the next tidies up."""
    folder = tmp_path / "parent" / "best"
    write_folder(folder, write("old"))
    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(Path, "rename", cut_at(Path.rename, renames))
        patched.setattr(shutil, "rmtree", cut_at(shutil.rmtree, 2))
        write_folder(folder, write("new"))
    assert ((folder / "file").read_text() if folder.exists() else None) == there
    for text in ("newer", "newest"):  # over a whole one, and over what the death left
        write_folder(folder, write(text))
        assert (folder / "file").read_text() == text and [path.name for path in folder.parent.iterdir()] == ["best"]


def test_a_write_that_fails_leaves_nothing_and_has_a_name(tmp_path):
    """An error of the disk has the file's name, or the folder's where it has none, and half a folder is not left to fill it."""
    for named in (None, "that file"):

        def fail(folder, named=named):
            write("half")(folder)
            if named:
                shutil.rmtree(folder)  # as when the disk itself is gone
            raise OSError(28, "No space left on device", named)

        with pytest.raises(OSError) as error:
            write_folder(tmp_path / "best", fail)
        assert error.value.filename == (named or str(tmp_path / "best")) and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file and the folder are flushed before the rename, and the rename itself after it, as a power cut would need."""
    events, rename = [], Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(Path(os.readlink(f"/proc/self/fd/{handle}"))))
    monkeypatch.setattr(Path, "rename", lambda path, to: events.append("rename") or rename(path, to))
    handles = len(os.listdir("/proc/self/fd"))
    write_folder(tmp_path / "best", write("text"))
    assert events == [tmp_path / ".best.tmp" / "file", tmp_path / ".best.tmp", "rename", tmp_path]
    assert len(os.listdir("/proc/self/fd")) == handles


@pytest.mark.parametrize("fault,kept", [(errno.EINVAL, True), (errno.ENOSYS, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_flush_keeps_the_folder(tmp_path, monkeypatch, fault, kept):
    """That it knows no fsync, as CIFS of folders, is let pass; that the disk fails is not."""

    def fsync(handle):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "fsync", fsync)
    if kept:
        write_folder(tmp_path / "best", write("text"))
        assert (tmp_path / "best" / "file").read_text() == "text"
    else:
        with pytest.raises(OSError):
            write_folder(tmp_path / "best", write("text"))
        assert not (tmp_path / "best").exists()
