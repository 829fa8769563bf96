"""What a GPU is given and what it takes: speed next to other loaders, precision, memory, resuming. One JSON, in some 9 minutes.

    python -m benchmarks.gpu --output gpu.json
    python -m benchmarks.gpu --output gpu.json --only profile

Networks have random weights and images are generated JPEGs: nothing is downloaded. Each section is a process of its own, and a
section that fails is recorded with its error. Images a second are of whole epochs after the first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.loop import Watched
from finetune.data.batches import plan_epoch
from finetune.data.loader import ImageDataset, load_batches
from finetune.models.backbone import meta_backbone
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import build_param_groups
from finetune.recipe import Recipe
from finetune.recipe.load import load_recipe, override
from finetune.tools.memory_estimate import stage_memory
from finetune.training import loop
from finetune.training.distributed import Stopped, default_workers
from finetune.training.setup import RunOptions, make_accelerator, own_accelerator_state, setup
from finetune.utils.cores import num_cores

CASES = {  # recipe, images, their size in pixels
    "resnet18_cifar": (6_400, 32),
    "resnet50_cifar100": (3_200, 32),
    "vit_small_cifar100": (3_200, 32),
    "resnet50_photos": (1_920, 400),
}
EPOCHS = 3
CLASSES = 10


def generated_images(folder: Path, number: int, size: int) -> Path:
    """train/CLASS/*.jpg and val/CLASS/*.jpg: smooth random colours with some noise, which compress as photographs do."""
    random = np.random.RandomState(0)
    for part, count in (("train", number), ("val", 10 * CLASSES)):
        for i in range(count):
            file = folder / part / f"class{i % CLASSES}" / f"{i:06}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(random.randint(0, 256, (8, 8, 3), np.uint8)).resize(
                (size, size * 3 // 4 if size > 64 else size)
            )
            pixels = np.asarray(coarse, np.int16)
            pixels = pixels + random.randint(-8, 9, pixels.shape, np.int16)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return folder


def prepared(name: str, folder: Path | str, *changes: str) -> Recipe:
    """A recipe on generated images, all layers from the first epoch, with random weights and no linear probe."""
    recipe, _ = load_recipe(name)
    if isinstance(recipe.groups, tuple):
        recipe = replace(recipe, groups=tuple(replace(row, unfreeze_at=0) for row in recipe.groups))
    first = ["weights=none", "linear_probe=None", f"epochs={EPOCHS}", f"data.source={str(folder)!r}"]
    return override(recipe, [*first, *changes])


def train(recipe: Recipe, folder: Path, record: type[Watched] = Watched, **options) -> tuple[Watched, nn.Module]:
    """A run of the recipe by the loop itself; (its log, the network)."""
    folder.mkdir(parents=True, exist_ok=True)
    with own_accelerator_state():
        accelerator = make_accelerator(recipe)
        net, datasets = setup(recipe, accelerator)
        log = record(folder, accelerator, recipe, quiet=True)
        given = {"workers": default_workers(None, accelerator.device.type), "quiet": True} | options
        return log, loop.train(recipe, net, datasets, log, accelerator, RunOptions(**given))


def bare(recipe: Recipe, batches: Callable[[], Iterator], epochs: int = EPOCHS, half=torch.bfloat16, **how) -> float:
    """Images a second of a loop without anything else: the median over epochs after the first, on batches of (images, labels).

    `how`: memory_format, compile.
    """
    with own_accelerator_state():
        net, _ = setup(recipe, make_accelerator(recipe))
    net.to("cuda", memory_format=how.get("memory_format", torch.channels_last)).train()
    if recipe.batch_norm == "frozen":
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    parameters, optimizer = list(net.parameters()), build_optimizer(build_param_groups(recipe, net))
    model, scaler = (
        torch.compile(net) if how.get("compile") is not None else net,
        torch.amp.GradScaler(enabled=half == torch.float16),
    )
    speeds, started = [], time.perf_counter()
    for _ in range(epochs + 1):
        torch.cuda.synchronize()
        start, count = time.perf_counter(), 0
        for images, labels in batches():
            optimizer.zero_grad()
            with torch.autocast("cuda", half, enabled=half is not None):
                logits = model(images)
            scaler.scale(cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            count += len(images)
        torch.cuda.synchronize()
        speeds.append(count / (time.perf_counter() - start))
        if how.get("compile") is not None and len(speeds) == 1:
            how["compile"]["first_epoch_s"] = round(time.perf_counter() - started, 1)
    return statistics.median(speeds[1:])


def resident(recipe: Recipe, batches: int = 40, memory_format=torch.channels_last) -> Callable[[], Iterator]:
    """Batches that lie on the GPU already."""
    size = recipe.data.image_size
    shape = (recipe.data.batch_size, 3, size, size)
    parts = [torch.randn(shape, device="cuda").contiguous(memory_format=memory_format) for _ in range(4)]
    labels = torch.randint(CLASSES, shape[:1], device="cuda")
    return lambda: ((parts[i % 4], labels) for i in range(batches))


def timm_loader(recipe: Recipe, folder: Path) -> Callable[[], Iterator]:
    """The loader of timm's train script, with its defaults and this recipe's auto_augment."""
    dataset = timm.data.create_dataset("", str(folder / "train"))
    loader = timm.data.create_loader(
        dataset, (3, recipe.data.image_size, recipe.data.image_size), recipe.data.batch_size, is_training=True,
        auto_augment=recipe.augment.auto_augment, color_jitter=None, num_workers=8, persistent_workers=True,
    )  # fmt: skip
    return lambda: iter(loader)


def our_loader(recipe: Recipe, images: ImageDataset) -> float:
    """Images a second that the loader alone puts on the GPU, in the second epoch."""
    for epoch in range(2):
        plans, start = plan_epoch(len(images), recipe.data.batch_size, 0, epoch), time.perf_counter()
        for _ in load_batches(images, epoch, plans, default_workers(None, "cuda"), "cuda"):
            pass
        torch.cuda.synchronize()
    return len(images) / (time.perf_counter() - start)


def transformers_trainer(recipe: Recipe, folder: Path) -> float:
    """transformers' Trainer in bf16 with 8 loader processes, on its image-classification example's transforms."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from benchmarks.peers import WithLoss

    size = recipe.data.image_size
    images = ImageFolder(
        folder / "train",
        Compose([RandomResizedCrop(size), RandomHorizontalFlip(), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)]),
    )
    moments = []

    class Clock(TrainerCallback):
        def on_epoch_end(self, *args, **more):
            torch.cuda.synchronize()
            moments.append(time.perf_counter())

    def collate(examples):
        return {"pixel_values": torch.stack([one for one, _ in examples]), "labels": torch.tensor([y for _, y in examples])}

    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            scratch, num_train_epochs=EPOCHS, per_device_train_batch_size=recipe.data.batch_size, bf16=True, disable_tqdm=True,
            remove_unused_columns=False, save_strategy="no", logging_strategy="no", report_to="none", dataloader_num_workers=8,
            dataloader_persistent_workers=True,
        )  # fmt: skip
        net = timm.create_model(recipe.backbone, num_classes=CLASSES)
        Trainer(WithLoss(net), args, collate, images, callbacks=[Clock()]).train()
    return len(images) / statistics.median(np.diff(moments))


def speed(name: str) -> dict:
    """Images a second of train(), of the loader alone, and of the same network elsewhere."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = generated_images(Path(scratch) / "images", *CASES[name])
        recipe = prepared(name, folder)
        log, _ = train(recipe, Path(scratch) / "run")
        _, (images, _) = setup(recipe, make_accelerator(recipe))
        found = {
            "ours": statistics.median(log.speeds[1:]),
            "our_loader": our_loader(recipe, images),
            "resident": bare(recipe, resident(recipe)),
            "timm_loader": bare(recipe, timm_loader(recipe, folder), 2),
            "transformers": transformers_trainer(recipe, folder),
        }
    rounded = {key: round(value) for key, value in found.items()}
    ratios = {f"of_{key}": round(found["ours"] / found[key], 3) for key in ("resident", "timm_loader", "transformers")}
    return {"recipe": name, "images_per_second": rounded, **ratios}


def precision(name: str) -> dict:
    """Images a second on resident batches, of each choice alone; float32 in channels last is 1."""
    recipe = prepared(name, "generated")
    compiled: dict = {}
    plain = {"half": None}
    choices = {
        "float32": plain,
        "float32, contiguous": plain | {"memory_format": torch.contiguous_format},
        "TF32": plain,
        "bf16": {"half": torch.bfloat16},
        "fp16": {"half": torch.float16},
        "bf16, contiguous": {"half": torch.bfloat16, "memory_format": torch.contiguous_format},
        "bf16, compiled": {"half": torch.bfloat16, "compile": compiled},
    }
    speeds = {}
    for choice, how in choices.items():
        torch.set_float32_matmul_precision("high" if choice == "TF32" else "highest")
        torch.backends.cudnn.allow_tf32 = choice == "TF32"
        layout = how.get("memory_format", torch.channels_last)
        speeds[choice] = bare(recipe, resident(recipe, 10, layout), 2, **how)
    first = speeds["float32"]
    return {
        "network": recipe.backbone,
        "image_size": recipe.data.image_size,
        "batch_size": recipe.data.batch_size,
        "images_per_second": {key: round(value) for key, value in speeds.items()},
        "times": {key: round(value / first, 2) for key, value in speeds.items()},
        "compile_first_epoch_s": compiled["first_epoch_s"],
    }


def profile(name: str) -> dict:
    """Where the time of an epoch goes: the GPU's share, its kernels, and what the CPU does for them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    class Profiled(Watched):
        """Looks at the second epoch, the first of which all is warm."""

        def progress(self, batches, epoch, total):
            if epoch != 1:
                yield from super().progress(batches, epoch, total)
                return
            with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as self.profiler:
                start = time.perf_counter()
                yield from super().progress(batches, epoch, total)
                torch.cuda.synchronize()
                self.wall = time.perf_counter() - start

    with tempfile.TemporaryDirectory() as scratch:
        folder = generated_images(Path(scratch) / "images", *CASES[name])
        recipe = prepared(name, folder, "epochs=2")
        log, _ = train(recipe, Path(scratch) / "run", Profiled)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in log.profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy, reached = busy + max(0.0, end - max(start, reached)), max(reached, end)
    averages = log.profiler.key_averages()
    kernels = sorted(averages, key=lambda row: -row.self_device_time_total)[:15]
    calls = sorted(averages, key=lambda row: -row.self_cpu_time_total)[:20]
    steps = recipe.data.steps_per_epoch(CASES[name][0])
    return {
        "recipe": name,
        "step_ms": round(1000 * log.wall / steps, 2),
        "gpu_busy": round(busy / 1e6 / log.wall, 3),
        "kernels_ms": {row.key[:90]: round(row.self_device_time_total / 1000 / steps, 3) for row in kernels},
        "cpu_ms": {row.key[:60]: [round(row.self_cpu_time_total / 1000 / steps, 3), row.count // steps] for row in calls},
    }


def memory(name: str) -> dict:
    """The peak of a step against what `finetune plan` says, in float32 and bf16."""
    row = {"recipe": name}
    for kind in ("no", "bf16"):
        recipe = prepared(name, "generated", f"mixed_precision={kind}")
        planned = meta_backbone(recipe, CLASSES)
        estimate = sum(stage_memory(recipe, planned, build_param_groups(recipe, planned), 0, recipe.data.batch_size).values())
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        bare(recipe, resident(recipe, 3), 1, torch.bfloat16 if kind == "bf16" else None)
        batches = 4 * 3 * 4 * recipe.data.batch_size * recipe.data.image_size**2
        peak = torch.cuda.max_memory_allocated() - batches
        row[kind] = {"plan_mib": estimate // 2**20, "peak_mib": peak // 2**20, "ratio": round(peak / estimate, 2)}
    return row


def weights_of(net: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().float().cpu() for value in net.state_dict().values()])


def resume() -> dict:
    """Runs of two epochs: twice unbroken, and stopped by SIGTERM in the middle of the second and resumed; how far apart."""
    import signal

    class StopsAt(Watched):
        def log_step(self, batch, *args):
            super().log_step(batch, *args)
            if batch.plan.step == 20:
                os.kill(os.getpid(), signal.SIGTERM)

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        images = generated_images(Path(scratch) / "images", 1920, 32)
        for name, kind in (
            ("resnet18_cifar", "no"),
            ("resnet18_cifar", "bf16"),
            ("resnet18_cifar", "fp16"),
            ("vit_small_cifar100", "bf16"),
        ):
            recipe = prepared(
                name, images, "epochs=2", f"mixed_precision={kind}", "data.image_size=64" if "18" in name else "seed=0"
            )
            place = Path(scratch) / f"{name}-{kind}"
            first, second = (weights_of(train(recipe, place / str(i))[1]) for i in range(2))
            try:
                train(recipe, place / "cut", StopsAt)
                raise SystemExit("the run was not stopped")
            except Stopped:
                resumed = weights_of(train(recipe, place / "cut")[1])
            found[f"{name}, {kind}"] = {
                "unbroken_twice": (first - second).abs().max().item(),
                "resumed": (first - resumed).abs().max().item(),
            }
    return found


def out_of_memory() -> dict:
    """A batch that doesn't fit: the same steps in smaller parts, on a part of the card and on all of it."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        images = generated_images(Path(scratch) / "images", 1024, 32)
        whole = prepared("resnet18_cifar", images, "epochs=1", "data.batch_size=512", "mixed_precision=no")
        (roomy, net), total = train(whole, Path(scratch) / "whole"), torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(3 * 2**30 / total)  # a card of 3 GiB: the allocator itself refuses
        said: list[str] = []

        class Heard(Watched):
            def say(self, text, *args, **more):
                said.append(text)

        log, small = train(whole, Path(scratch) / "small", Heard)
        far = (weights_of(net) - weights_of(small)).abs().max().item()
        found["3 GiB"] = {"said": [text for text in said if "memory" in text], "apart": far, "steps": len(log.history)}
        torch.cuda.set_per_process_memory_fraction(1.0)
        del net, small
        torch.cuda.empty_cache()
        said.clear()
        huge = override(whole, ["data.image_size=896", "data.batch_size=1024"])
        train(huge, Path(scratch) / "huge", Heard)
        found["the card"] = {"said": [text for text in said if "memory" in text]}
        roomy.history.clear()
    return found


SECTIONS: dict[str, Callable[[], dict]] = {
    "profile": partial(profile, "resnet18_cifar"),
    **{f"speed {name}": partial(speed, name) for name in CASES},
    "resume": resume,
    "out_of_memory": out_of_memory,
    **{f"memory {name}": partial(memory, name) for name in ("resnet50_cifar100", "vit_small_cifar100")},
    **{f"precision {name}": partial(precision, name) for name in ("resnet50_cifar100", "vit_small_cifar100")},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="sections with such words, divided by commas, in their names"
    )
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        print(json.dumps(SECTIONS[args.section]()), flush=True)
        return 0
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here")
    result = {"gpu": torch.cuda.get_device_name(0), "cores": num_cores(), "torch": torch.__version__, "sections": {}}
    for name in SECTIONS:
        if not any(words in name for words in args.only.split(",")):
            continue
        start = time.perf_counter()
        words = [sys.executable, "-m", "benchmarks.gpu", "--section", name]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        found = json.loads(lines[-1]) if lines and not done.returncode else {"error": done.stderr[-1500:]}
        result["sections"][name] = found | {"seconds": round(time.perf_counter() - start, 1)}
        print(name, json.dumps(result["sections"][name]), flush=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
