"""Cut the power of simulated runs, resume them, and count those that lose more than what was not on the disk.

    python -m benchmarks.powercuts --cuts 100 --keep

A real run is recorded: what it writes, makes, renames and removes in its folder, and what of that it flushes. From the record
come folders as a power cut can leave them. The same command is given again in each, and the end compared with a run that
nothing happened to. Then the disk is full at each write once, and has room again.
"""

import argparse
import builtins
import errno
import io
import json
import os
import pickle
import random
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.docs import powercuts as table
from benchmarks.kills import RECIPE, ROOT, contents, start, wait
from finetune.data.builtin import patch
from finetune.report import sheets
from finetune.results import summary
from finetune.training import loop

RESULT = ROOT / "benchmarks" / "results" / "powercuts.json"
WAYS = ("all that was not flushed is lost", "names are there, content is cut", "names are there, content is zeros", "by chance")
FILES = ("recipe.py", "images.csv", "model/model.safetensors", "model-best/model.safetensors")
REFUSED = 2  # a message, not a traceback


class Recorder:
    """What this process does in a folder from now on, in order: (what, name, ...), names being relative to it."""

    def __init__(self, folder: Path):
        self.folder, self.log, self.known, self.busy = folder, [], {}, False
        sys.addaudithook(self.heard)
        real = os.fsync

        def fsync(handle: int) -> None:
            real(handle)
            self.note("flush", os.readlink(f"/proc/self/fd/{handle}"))

        os.fsync = fsync

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python tells of each of these before it happens."""
        if self.busy:
            return
        match event, arguments:
            case "open", (str() | os.PathLike() as path, _, _):
                self.note("open", path)
            case "os.mkdir", (path, _, handle):
                self.note("make", inside(handle, path))
            case "os.remove" | "os.rmdir", (path, handle):
                self.note("remove", inside(handle, path))
            case "os.rename", (path, new, handle, other):
                self.note("rename", inside(handle, path), inside(other, new))

    def note(self, what: str, *paths: str) -> None:
        """Log the content that has been written by now, then this."""
        names = [os.path.relpath(path, self.folder) for path in paths]
        if names[0].startswith(".."):
            return
        self.busy = True
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name, content = str(path.relative_to(self.folder)), path.read_bytes()
            if self.known.get(name) != content:
                self.known[name] = content
                self.log.append(("write", name, content))
        if what in ("rename", "remove"):
            for name in [name for name in self.known if name == names[0] or name.startswith(f"{names[0]}/")]:
                content = self.known.pop(name)
                if what == "rename":
                    self.known[names[1] + name.removeprefix(names[0])] = content
        if what != "open":
            self.log.append((what, *names))
        self.busy = False


def inside(handle: int, path: str) -> str:
    """A path that may be relative to an open folder."""
    return os.path.join(os.readlink(f"/proc/self/fd/{handle}"), path) if handle >= 0 else path


@dataclass(eq=False)
class File:
    content: bytes = b""
    flushed: bytes = b""


@dataclass(eq=False)
class Folder:
    """Changes of its entries in order, each (the name that goes, the name that comes, what comes); `flushed` counts them."""

    changes: list[tuple[str, str, Any]] = field(default_factory=list)
    flushed: int = 0

    def entries(self, count: int | None = None) -> dict[str, Any]:
        """Its entries after so many changes."""
        found: dict[str, Any] = {}
        for gone, come, node in self.changes[:count]:
            found.pop(gone, None)
            if come:
                found[come] = node
        return found

    def find(self, name: str) -> Any:
        """What lies there, or None."""
        node: Any = self
        for part in Path(name).parts:
            node = node.entries().get(part) if isinstance(node, Folder) else None
        return node


def replay(log: list[tuple[Any, ...]]) -> Folder:
    """The run's folder after these events, with all that is flushed and all that is not."""
    root = Folder()
    for what, name, *more in log:
        parent, own, node = root.find(str(Path(name).parent)), Path(name).name, root.find(name)
        if what == "write":
            if node is None:
                parent.changes.append(("", own, node := File()))
            node.content = more[0]
        elif what == "make" and node is None and parent is not None:
            parent.changes.append(("", own, Folder()))
        elif what == "remove" and node is not None:
            parent.changes.append((own, "", None))
        elif what == "rename" and node is not None:
            assert Path(more[0]).parent == Path(name).parent, more  # within one folder, so it happens at once or not at all
            parent.changes.append((own, Path(more[0]).name, node))
        elif what == "flush" and node is not None:
            node.flushed = node.content if isinstance(node, File) else len(node.changes)
    return root


def leave(folder: Folder, path: Path, way: str, rng: random.Random) -> None:
    """Write what is left of a folder after a power cut."""
    path.mkdir()
    everything = len(folder.changes)
    count = {WAYS[0]: folder.flushed, WAYS[3]: rng.randint(folder.flushed, everything)}.get(way, everything)
    for name, node in folder.entries(count).items():
        if isinstance(node, Folder):
            leave(node, path / name, way, rng)
        else:
            (path / name).write_bytes(left_of(node, rng.choice(WAYS) if way == WAYS[3] else way, rng))


def left_of(file: File, way: str, rng: random.Random) -> bytes:
    """What is left of a file's content: what was appended to is there as far as it was flushed."""
    old, new = file.flushed, file.content
    if way == WAYS[0] or old == new:
        return old
    kept = rng.randint(len(old) if new.startswith(old) else 0, len(new))
    return new[:kept] + (bytes(len(new) - kept) if way == WAYS[2] else b"")


def record(folder: Path) -> list[tuple[Any, ...]]:
    """The events of a run in that folder, with ("saved", ".", step) once a checkpoint is there, and ("finished", ".")."""
    kept = folder.with_suffix(".events")

    def before() -> None:
        without_pictures()
        recorder, save, finish = Recorder(folder), loop.save_checkpoint, summary.finish_run

        def save_checkpoint(*arguments: Any) -> None:
            save(*arguments)
            recorder.log.append(("saved", ".", arguments[5]))

        def finish_run(*arguments: Any) -> dict[str, Any]:
            result = finish(*arguments)
            recorder.note("open", str(folder))
            kept.write_bytes(pickle.dumps([*recorder.log, ("finished", ".")]))
            return result

        loop.save_checkpoint, summary.finish_run = save_checkpoint, finish_run

    assert wait(start(folder, 1, 0, before)) == [0], printed(folder)
    return pickle.loads(kept.read_bytes())


def without_pictures() -> None:
    """They take seconds, and come after everything else."""
    summary.try_to = sheets.plot_augmented = lambda *arguments: None


def printed(folder: Path) -> str:
    """What its runs printed."""
    return (folder.parent / f"{folder.name}.log").read_text()


def equal(folder: Path, whole: Path) -> bool:
    """Whether a finished run ended with the bits of another; lines of single steps may be missing where the run says so."""
    one, other = contents(folder), contents(whole)
    rows = [[row for row in rows.splitlines() if "grad_norm" not in row] for rows in (one[1], other[1])]
    json.loads((folder / "result.json").read_text())
    return (
        (one[1] == other[1] or "metrics.jsonl had been cut" in printed(folder) and rows[0] == rows[1])
        and one[0].keys() == other[0].keys()
        and all(one[0][name].equal(other[0][name]) for name in one[0])
        and all((folder / name).read_bytes() == (whole / name).read_bytes() for name in FILES)
    )


def try_cut(events: list[tuple[Any, ...]], at: int, way: str, folder: Path, whole: Path, rng: random.Random) -> str:
    """Cut the power after `at` events, and give the same command again; what went wrong, or ""."""
    leave(replay(events[:at]), folder, way, rng)
    saved = max([0, *(event[2] for event in events[:at] if event[0] == "saved")])
    if wait(start(folder, 1, 0, without_pictures)) != [0]:
        return f"not resumed\n{printed(folder)[-3000:]}"
    found = re.findall(r"resuming after step (\d+)", printed(folder))
    finished = "is finished" in printed(folder)
    if not finished and int([0, *found][-1]) < saved:
        return f"a checkpoint after step {saved} was lost\n{printed(folder)[-1000:]}"
    return "" if equal(folder, whole) else "other bits"


class FullDisk(io.FileIO):
    """A file whose next write finds no room, once `left`, of all files together, have been written."""

    left, folder = 0, Path()

    def write(self, content: Any) -> int:
        FullDisk.left -= 1
        if FullDisk.left == 0:
            Path(f"{FullDisk.folder}.full").touch()
            super().write(bytes(content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        return super().write(content)


def fill_disk(folder: Path, after: int) -> Callable[[], None]:
    """Let the disk be full at a run's write number `after`, counted from 1; RUN.full then says so."""

    def before() -> None:
        without_pictures()
        real, FullDisk.left, FullDisk.folder = io.open, after, folder

        def open_full(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            **more: Any,
        ) -> Any:
            if not set(mode) & set("wax") or not str(file).startswith(str(folder)):
                return real(file, mode, buffering, encoding, errors, newline, **more)
            raw = io.BufferedWriter(FullDisk(file, mode.replace("b", "")))
            return raw if "b" in mode else io.TextIOWrapper(raw, encoding or "utf-8", errors, newline)

        builtins.open = io.open = open_full

    return before


def try_full(at: int, folder: Path, whole: Path) -> str | None:
    """Fill the disk at that write, then give the same command again; what went wrong, "", or None if there are fewer writes."""
    codes = wait(start(folder, 1, 0, fill_disk(folder, at)))
    if not Path(f"{folder}.full").exists():
        return None
    if codes != [REFUSED] or "No space left" not in printed(folder) or "Traceback" in printed(folder):
        return f"not said\n{printed(folder)[-3000:]}"
    if wait(start(folder, 1, 0, without_pictures)) != [0]:
        return f"not resumed\n{printed(folder)[-3000:]}"
    return "" if equal(folder, whole) else "other bits"


def benchmark(cuts: int, epochs: int, writes: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each way: how many trials, and how many of them ended as the run that nothing happened to."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_images(root / "images")
        recipe = RECIPE.replace('"generated"', repr(str(root / "images"))).replace("epochs=8", f"epochs={epochs}")
        (root / "recipe.py").write_text(recipe)
        whole = root / "whole"
        events = record(whole)
        outcomes = {way: [] for way in WAYS}
        for trial in range(cuts):
            at, way = rng.randint(1, len(events)), WAYS[trial % len(WAYS)]
            outcomes[way].append(try_cut(events, at, way, root / f"cut{trial}", whole, rng))
            if outcomes[way][-1]:
                print(
                    f"LOST: cut after event {at} of {len(events)}, {events[at - 1][:2]}: {way}: {outcomes[way][-1]}", flush=True
                )
        full = outcomes["the disk is full at a write"] = []
        for at in range(1, writes + 1):
            if (outcome := try_full(at, root / f"full{at}", whole)) is None:
                break
            full.append(outcome)
            if outcome:
                print(f"LOST: full at write {at}: {outcome}", flush=True)
    return [{"what": what, "trials": len(found), "as unbroken": found.count("")} for what, found in outcomes.items()]


def make_images(folder: Path) -> None:
    """Class folders with 22 patches to train on and 10 to validate."""
    for split, numbers in (("train", range(22)), ("val", range(22, 32))):
        for number in numbers:
            file = folder / split / f"patch {number % 10}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            patch(number).save(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--writes", type=int, default=1000, help="at most, at which the disk is full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write the result file, of which the docs' table is made")
    arguments = parser.parse_args()
    rows = benchmark(arguments.cuts, arguments.epochs, arguments.writes, arguments.seed)
    print(table(rows))
    if arguments.keep:
        RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["trials"] != row["as unbroken"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
