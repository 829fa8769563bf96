"""Studies whose runs are a stand-in: a process that writes a run's files in a moment, and stops as a run does."""

import argparse
import subprocess
import sys
from pathlib import Path

from finetune.__main__ import VERBS
from finetune.cli.parser import arguments
from finetune.recipe.load import assignments_of
from finetune.tools.library import copy_recipe
from finetune.tuning import study, trials
from finetune.tuning.space import make_plan

SMALL = ["--backbone", "test_resnet", "--image-size", "32", "--batch-size", "8", "--weights", "none",
         "--set", "mixed_precision=no"]  # fmt: skip
SPACE = "lr_scale=0.1..10:log,label_smoothing=0..0.2"
RUN = """
import json, math, signal, sys, time
from pathlib import Path

folder, epochs, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
said = dict(word.split("=", 1) for word in sys.argv[4:])
scale, fold = float(said.get("lr_scale", 1)), int(said.get("data.holdout_fold", 0))
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write("x")

def stop(number, frame):
    (folder / "stopped").touch()
    sys.exit(75)

signal.signal(signal.SIGINT, stop)
if "unreadable" in said.get("data.source", ""):
    sys.exit("finetune: some note\\nfinetune: the images can't be read")
score = 0.9 - 0.2 * math.log10(scale / 0.3) ** 2 - 0.01 * fold
rows = []
for epoch in range(epochs):
    top1 = score * (epoch + 1) / epochs
    rows.append({"epoch": epoch, "top1": top1, "mae": 10 - 10 * top1, "val_images": 10 + fold})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows) + '{"cut')
    if scale > 6:
        sys.exit("finetune: the loss of step 3 is nan\\n  its images are")
    time.sleep(pause)
(folder / "result.json").write_text(json.dumps(rows[-1]))
"""


def stand_in(pause=0.0, epochs=2):
    """A function that starts a stand-in for the run of a job, whose epochs take so many seconds."""

    def start(job):
        job.folder.mkdir(parents=True, exist_ok=True)
        words = [str(job.folder), str(epochs), str(pause), *job.assignments]
        with open(job.log, "ab") as log:
            line = [sys.executable, "-S", "-c", RUN, *words]
            return subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)

    return start


def asked(output, *words) -> argparse.Namespace:
    """The arguments of a small search."""
    line = ["tune", "resnet18_cifar", *SMALL, "--data", "generated", "--epochs", "2", "--output", str(output), *words]
    return arguments(line, VERBS)


def opened(args):
    """(plan, study) of these arguments."""
    plan = make_plan(args)
    return plan, study.open_study(plan, copy_recipe(args.recipe, plan.file, assignments_of(args)))


def started(output: Path) -> dict[str, int]:
    """How often each trial's run was started."""
    return {file.parent.name: len(file.read_text()) for file in output.glob("trial-*/starts")}


def main(output: str, pause: str, *words: str) -> None:
    """Search with stand-ins, in a process of its own."""
    trials.POLL, study.COMPARED = 0.02, 99
    with trials.stop_as_by_ctrl_c():
        study.search(*opened(asked(output, *words)), stand_in(float(pause)))


if __name__ == "__main__":
    main(*sys.argv[1:])
