"""What a run costs beside its steps: the commands that need no torch, the way to the first step, validation and checkpoints.

    python -m benchmarks.start

Commands are started as a person starts them. The first step is looked for in the metrics of a quickstart run, after its linear
probe; validation, checkpoints and the best model are timed inside such a run, as shares of the epochs they belong to.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, str(ROOT / "finetune" / "run.py")]
COMMANDS = {
    "run.py --help": [*RUN, "--help"],
    "an unknown recipe": [*RUN, "--recipe", "resnet81"],
    "finetune ls": [sys.executable, "-m", "finetune", "ls"],
}
BESIDE = ("predict_logits", "compute_metrics", "save_if_best", "save_checkpoint")  # of the loop; and log_epoch of the logger


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="efficientnet_lite0_digits")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return inside(args.recipe, args.epochs)
    seconds = {name: statistics.median(timed(command) for _ in range(args.repeat)) for name, command in COMMANDS.items()}
    first = statistics.median(first_step(args.recipe) for _ in range(max(1, args.repeat // 2)))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.start", "--worker", "--recipe", args.recipe, "--epochs", str(args.epochs)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    shares = json.loads(done.stdout.splitlines()[-1])
    for name, each in seconds.items():
        print(f"{name:20} {each:.2f} s")
    print(
        f"{args.recipe}: first step after {first:.1f} s\nof the time of its epochs: "
        + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    )
    print(
        json.dumps(
            {
                "seconds": {name: round(each, 3) for name, each in seconds.items()},
                "first_step": round(first, 2),
                "shares": {name: round(share, 4) for name, share in shares.items()},
                "holds": {
                    "commands_under_half_a_second": max(seconds.values()) < 0.5,
                    "first_step_within_10_s": first < 10,
                    "validation_and_checkpoints_under_a_tenth": sum(shares.values()) < 0.1,
                },
            }
        )
    )
    return 0


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, cwd=ROOT)
    return time.perf_counter() - start


def first_step(recipe: str) -> float:
    """Seconds from the command to the first line of a step; a checkpoint each step has it written at once."""
    with tempfile.TemporaryDirectory() as folder:
        start, metrics = time.perf_counter(), Path(folder) / "run" / "metrics.jsonl"
        process = subprocess.Popen(
            [*RUN, "--recipe", recipe, "--output", str(metrics.parent), "--checkpoint-every", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        try:
            while not (metrics.is_file() and "grad_norm" in metrics.read_text()):
                if process.poll() is not None:
                    sys.exit(f"the run of {recipe} ended before its first step")
                time.sleep(0.02)
            return time.perf_counter() - start
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def inside(recipe: str, epochs: int) -> int:
    """A run with its parts timed; what comes before the first epoch does not count."""
    from finetune import run
    from finetune.training import logger
    from finetune.training import loop as train_loop

    spent, started = {}, []

    def watch(owner, name):
        original = getattr(owner, name)

        def timed_call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                if started:
                    spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed_call)

    for name in BESIDE:
        watch(train_loop, name)
    watch(logger.Logger, "log_epoch")
    original = train_loop.start_stage
    train_loop.start_stage = lambda *args: (started.append(time.perf_counter()), original(*args))[1]
    ended = []
    report = train_loop.StopRequest.__exit__
    train_loop.StopRequest.__exit__ = lambda *args: (ended.append(time.perf_counter()), report(*args))[1]
    with tempfile.TemporaryDirectory() as folder:
        if run.main(["--recipe", recipe, "--output", f"{folder}/run", "--quiet", "--set", f"epochs={epochs}"]):
            return 1
    whole = ended[0] - started[0]
    print("\n" + json.dumps({name: seconds / whole for name, seconds in spent.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
