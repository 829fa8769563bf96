"""A first session in a terminal of 80 columns, recorded as docs/terminal.md.

    pip install pyte
    python -m benchmarks.terminal --photos DIR

Clones this repository into an empty folder, makes an environment, and types the README's commands there, on class folders of
photographs. Ctrl-C comes after the second epoch's line.
"""

import argparse
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyte

from benchmarks.docs import ROOT

PROMPT = "$ "
PAGE = """\
# A first session

What you see from the installation to an exported model, in a terminal of 80 columns. `^C` is Ctrl-C. Bars, which come after a
second and go when their work is done, are not in it.

Recorded by `python -m benchmarks.terminal` on {cores} CPU cores with torch {torch}. The photographs are
{photos}.

```console
{text}
```
"""


class Terminal:
    """A shell in a terminal of 80 columns, as a person sees it."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.screen = pyte.HistoryScreen(80, 24, history=10_000)
        self.stream = pyte.ByteStream(self.screen)
        process, self.terminal = pty.fork()
        if process == 0:
            os.chdir(folder)
            os.execve("/bin/bash", ["bash", "--norc", "--noprofile"], environment | {"PS1": PROMPT, "TERM": "linux"})
        import fcntl
        import struct
        import termios

        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.read_until(lambda lines: lines[-1] == PROMPT.strip())

    def lines(self) -> list[str]:
        """All that was shown, without what was erased or written over."""
        rows = [*self.screen.history.top, *(self.screen.buffer[i] for i in range(self.screen.cursor.y + 1))]
        return ["".join(row[column].data for column in range(80)).rstrip() for row in rows]

    def read_until(self, done, limit: float = 900) -> None:
        """Read what is written until `done` says so of the lines."""
        deadline = time.monotonic() + limit
        while not done(self.lines()):
            if time.monotonic() > deadline:
                raise SystemExit("\n".join(self.lines()[-24:]))
            if select.select([self.terminal], [], [], 0.2)[0]:
                self.stream.feed(os.read(self.terminal, 65536))

    def type(self, line: str, press_after: str | None = None) -> list[str]:
        """What a command shows, its own line first; Ctrl-C is pressed when a line starts with `press_after`."""
        before = len(self.lines()) - 1
        os.write(self.terminal, f"{line}\n".encode())
        if press_after:
            self.read_until(lambda lines: any(one.startswith(press_after) for one in lines[before:]))
            time.sleep(2)
            os.write(self.terminal, b"\x03")
        self.read_until(lambda lines: len(lines) > before + 1 and lines[-1] == PROMPT.strip())
        return self.lines()[before:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="class folders of photographs")
    parser.add_argument("--words", required=True, help="what these photographs are")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone, venv = Path(folder) / "finetune-recipes", Path(folder) / "venv"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        shutil.copytree(args.photos, clone / "photos")
        photo = next((clone / "photos").rglob("*.jpg"))
        photo.rename(clone / "photo.jpg")
        path = f"{venv / 'bin'}:{os.environ['PATH']}"
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        terminal = Terminal(clone, environment | {"PATH": path})
        started = time.monotonic()
        pip, *_ = terminal.type('pip install -e ".[quickstart]"')
        shown = [pip, f"[what pip prints; {time.monotonic() - started:.0f} s]"]
        shown += terminal.type("finetune train --data photos --epochs 8", press_after="epoch 2 of")
        shown += terminal.type("finetune resume")
        shown += terminal.type("finetune predict last photo.jpg")
        shown += terminal.type("finetune export last --to timm")
        shown += terminal.type("finetune runs")
        version = terminal.type("python -c 'import torch; print(torch.__version__)'")[1].partition("+")[0]
    text = re.sub(re.escape(str(clone)) + "/?", "", "\n".join(shown))
    page = PAGE.format(cores=len(os.sched_getaffinity(0)), torch=version, photos=args.words, text=text)
    (ROOT / "docs" / "terminal.md").write_text(page)


if __name__ == "__main__":
    main()
