"""`finetune predict --output` against a bare loop of timm's transform, a DataLoader and the network; memory of many images.

    python -m benchmarks.predict

Images are JPEGs of 400 px made of scikit-learn's photographs, the network a ResNet-18 of random weights at 224 px, without
loader processes. The two take turns. Memory is the process's peak, of one batch and of many, each in a process of its own, with
a small network and images of 40 px.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset

from benchmarks.images import write_images
from finetune.inference.predictions import write_predictions
from finetune.models.saving import save_model
from finetune.utils.device import peak_memory

ROOT = Path(__file__).resolve().parents[1]
BATCH = 32  # of a model folder without a run


class Files(Dataset):
    def __init__(self, files, transform):
        self.files, self.transform = files, transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return self.transform(Image.open(self.files[index]).convert("RGB"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many", type=int, default=100_000, help="images whose memory is compared with that of one batch")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(peak(Path(args.memory), args.many)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model, files = prepare(Path(folder) / "speed", "resnet18", args.images, 400)
        prepare(Path(folder) / "memory", "test_resnet", 100, 40)
        ways = {"ours": lambda: ours(model, files), "bare": lambda: bare(model, files)}
        seconds = {name: [] for name in ways}
        for _ in range(args.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
        rates = {name: len(files) / statistics.median(times[1:]) for name, times in seconds.items()}
        share = statistics.median(bare / ours for ours, bare in zip(seconds["ours"][1:], seconds["bare"][1:], strict=True))
        memory = {many: in_process(f"{folder}/memory", many) for many in (BATCH, args.many)}
    grown = memory[args.many] - memory[BATCH]
    print(f"ours {rates['ours']:.0f} images/s, bare {rates['bare']:.0f}: {share:.2f}")
    print(f"{args.many} images take {grown:.0f} MiB more than {BATCH}")
    holds = {"within_10_percent": share >= 0.9, "memory_constant": grown < 50}
    rounded = {many: round(mib) for many, mib in memory.items()}
    print(json.dumps({"share_of_bare": round(share, 3), "mib": rounded, "many": args.many, "holds": holds}))
    return 0


def prepare(folder: Path, name: str, images: int, pixels: int) -> tuple[Path, list[Path]]:
    """A model's folder and so many images."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10).eval()
    config = resolve_data_config({"crop_pct": 1.0} | ({} if pixels > 100 else {"img_size": 32}), model=net)
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    save_model(folder / "model", net, {name: config[name] for name in names}, [str(i) for i in range(10)])
    write_images(folder / "images", images, pixels, "jpg")
    return folder / "model", sorted((folder / "images").rglob("*.jpg"))


def ours(model: Path, files: list[Path]) -> None:
    target = model.parent / "said.csv"
    write_predictions(model, files, target)
    target.unlink()


def bare(model: Path, files: list[Path]) -> None:
    """What a script of twenty lines does: the same files, transform, batches, network and answers."""
    net = timm.create_model(f"local-dir:{model}", pretrained=True).eval().to(memory_format=torch.channels_last)
    transform = create_transform(**resolve_data_config({}, model=net))
    with torch.no_grad(), open(model.parent / "bare.csv", "w") as lines:
        for batch in DataLoader(Files(files, transform), BATCH):
            for row in net(batch.contiguous(memory_format=torch.channels_last)).softmax(1):
                top = row.topk(5)
                lines.write(",".join(map(str, [*top.indices.tolist(), *top.values.tolist()])) + "\n")


def in_process(folder: str, many: int) -> float:
    line = [sys.executable, "-m", "benchmarks.predict", "--memory", folder, "--many", str(many)]
    return json.loads(subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()[-1])


def peak(folder: Path, many: int) -> float:
    """MiB at the highest, of predictions for so many images: the same ones by many names."""
    files = sorted((folder / "images").rglob("*.jpg"))
    write_predictions(folder / "model", [files[i % len(files)] for i in range(many)], folder / f"{many}.csv")
    return 2**10 * peak_memory(torch.device("cpu"))


if __name__ == "__main__":
    sys.exit(main())
