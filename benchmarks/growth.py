"""What the start of a run costs by the number of its files, and the end by the number of its classes.

    python -m benchmarks.growth

Files: small JPEGs in class folders, listed, checked, compared and recorded, as a run does before its network is built: once,
and once more, as a later run does. A million take 5 GB of the disk. They were just written, so the system has them in memory;
a disk that has to look for each takes longer. Classes: all that is measured of 2,000 validation images, in the last epoch and
once at the end; these seconds are those of the processor.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES, CLASSES, IMAGES = (1000, 10_000, 100_000, 1_000_000), (10, 1000, 20_000), 2000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=lambda text: [int(word) for word in text.split(",")], default=FILES)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, number = args.worker
        print(json.dumps({"files": of_files, "classes": of_classes}[kind](int(number))))
        return 0
    rows = {"files": [worker("files", number) for number in args.files], "classes": [worker("classes", n) for n in CLASSES]}
    print("| files | s | us a file | s of a later start | us a file | KiB a file |\n|---|---|---|---|---|---|")
    for row in rows["files"]:
        print("| {files:,} | {seconds:.1f} | {us:.0f} | {later_seconds:.1f} | {later_us:.0f} | {kib:.2f} |".format(**row))
    print(f"of a file of the last, by one process: {rows['files'][-1]['parts_us']}")
    print("\n| classes | s | MiB beside the logits |\n|---|---|---|")
    for row in rows["classes"]:
        print("| {classes:,} | {seconds:.1f} | {mib:.0f} |".format(**row))
    (few, *_, many), (_, some, most) = rows["files"], rows["classes"]
    holds = {
        "start_at_most_linear": many["us"] <= 1.2 * few["us"],
        "end_at_most_linear": most["seconds"] / some["seconds"] <= 1.2 * most["classes"] / some["classes"],
    }
    print(json.dumps(rows | {"holds": holds}))
    return 0


def worker(kind: str, number: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth", "--worker", kind, str(number)], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def write_files(root: Path, number: int, classes: int) -> None:
    """So many JPEGs for training, and a fiftieth for validation: one picture, with another comment in each file."""
    import numpy as np
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(out, "JPEG")
    start, rest = out.getvalue()[:2], out.getvalue()[2:]
    for part, count in (("train", number), ("val", max(classes, number // 50))):
        for i in range(count):
            file = root / part / f"{i % classes:03}" / f"{i:07}.jpg"
            if i < classes:
                file.parent.mkdir(parents=True)
            text = f"{part} {i}".encode()
            file.write_bytes(start + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + rest)


def of_files(number: int) -> dict:
    """The seconds of a first and of a later start with so many files, and the memory of the first."""
    from dataclasses import replace

    import torch

    from benchmarks.loop import recipe_of
    from finetune.data.dataset import file_rows, fingerprint, record_files
    from finetune.data.sources import load_data
    from finetune.images.read import header_fault
    from finetune.recipe import Data
    from finetune.utils.device import peak_memory
    from finetune.utils.files import file_digest

    def start():
        data = load_data(recipe)
        for part in (data.train, data.val):
            fingerprint(part, data.classes)
        record_files(Path(folder) / "images.csv", file_rows(data.train, data.val, data.classes))
        return data

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        write_files(Path(folder) / "images", number, classes=100)
        recipe = replace(recipe_of("test_resnet", 32, 32, 1), data=Data(f"{folder}/images", 32, 32))
        time.sleep(2)  # what is written while it is looked at is looked at again
        before, began = peak_memory(torch.device("cpu")), time.perf_counter()
        data = start()
        seconds, files = time.perf_counter() - began, len(data.train) + len(data.val)
        kib = (peak_memory(torch.device("cpu")) - before) * 2**20 / files
        began = time.perf_counter()
        start()
        later = time.perf_counter() - began
        parts = {}
        for name, part in (("its header read", header_fault), ("its two ends read", file_digest)):
            began = time.perf_counter()
            for path in data.train.items[:1000]:
                part(path)
            parts[name] = round(1e3 * (time.perf_counter() - began), 1)
    row = {"files": number, "seconds": seconds, "us": 1e6 * seconds / files}
    return row | {"later_seconds": later, "later_us": 1e6 * later / files, "kib": kib, "parts_us": parts}


def of_classes(number: int) -> dict:
    """The seconds and the memory of the metrics of so many classes."""
    import torch

    from benchmarks.loop import recipe_of
    from finetune.metrics.compute import compute_metrics
    from finetune.metrics.measure import measure
    from finetune.utils.device import peak_memory

    torch.manual_seed(0)
    recipe, labels, logits = recipe_of("test_resnet", 32, 32, 1), torch.arange(IMAGES) % number, torch.randn(IMAGES, number)
    measure(recipe, logits[:20, :5].clone(), labels[:20] % 5)  # what the first call of each function needs
    before, start = peak_memory(torch.device("cpu")), time.process_time()
    compute_metrics(recipe, logits, labels)
    measure(recipe, logits, labels)
    return {
        "classes": number,
        "seconds": time.process_time() - start,
        "mib": (peak_memory(torch.device("cpu")) - before) * 2**10,
    }


if __name__ == "__main__":
    sys.exit(main())
