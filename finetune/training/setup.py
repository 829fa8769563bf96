"""What a run starts with: accelerator, network and images of a recipe, and the checks before them."""

import copy
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import filter_trackers
from accelerate.utils import parse_flag_from_env
from torch import nn

from finetune.data.batches import Cut
from finetune.data.channels import fit_preprocessing
from finetune.data.dataset import ImageData, ImageList, Images, labels_of
from finetune.data.loader import ImageDataset, Transform, epoch_batches
from finetune.data.sources import is_downloaded, load_data
from finetune.images.own_function import OwnFunction
from finetune.images.transforms import eval_transform, training_transforms
from finetune.models.backbone import build_backbone, fresh_norms, memory_format, meta_backbone
from finetune.models.batch_norm import convert_sync_batch_norm, set_train_mode
from finetune.models.linear_probe import check_probe, standardise
from finetune.models.pretrained import preprocessing, pretrained_state
from finetune.models.saved import try_saving
from finetune.models.sharding import shard
from finetune.optim.lora import check_called
from finetune.optim.optimizers import build_optimizer
from finetune.optim.param_groups import ParamGroup, build_param_groups
from finetune.recipe import Recipe
from finetune.recipe.serialize import to_dict
from finetune.training.distributed import main_process_first
from finetune.training.launch import asks_for_fsdp, check_processes, chosen_threads
from finetune.training.memory import keep_freed_memory
from finetune.utils.cores import num_cores
from finetune.utils.device import uses_cpu
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.seed import seed_all
from finetune.utils.text import print_error


@dataclass(frozen=True)
class RunOptions:
    """What suits the machine and leaves the result as it is."""

    accumulate: int = 1  # micro-batches of each process's share of a batch, which norms that train see; more if memory asks
    workers: int = 0  # processes that load images, for each training process
    checkpoint_every: int = 0  # steps; 0: once an epoch
    quiet: bool = False  # no progress bars


DEFAULTS = RunOptions()


def usable_threads() -> int:
    """torch's threads: those that a person chose, else no more than the cores that this process may use."""
    threads = torch.get_num_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else min(threads, num_cores())


def make_accelerator(recipe: Recipe, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """The Accelerator; on a machine without GPUs its processes use the CPU, with all cores if there is one process.

    Raises:
        RecipeError: for processes that are not those of a launch, or more than there are GPUs; for settings that Accelerate
            can't read; for fp16 on a CPU, which it would quietly compute in float32; for a tracker that is not there.
    """
    check_processes()
    check_device_settings()
    cpu, processes = uses_cpu(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not cpu and processes > torch.accelerator.device_count():
        raise RecipeError(
            f"{processes} processes were started on this machine, each needs a GPU of its own, and there are "
            f"{torch.accelerator.device_count()}: start as many, or all on the CPU with ACCELERATE_USE_CPU=1"
        )
    if recipe.mixed_precision == "fp16" and cpu:
        raise RecipeError("mixed_precision='fp16' needs a GPU; on this CPU: --set mixed_precision=bf16 or no")
    if cpu and processes == 1:
        threads = usable_threads() if chosen_threads() else num_cores()
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
    if cpu:
        keep_freed_memory()
    torch.backends.cudnn.deterministic = True  # of a GPU's ways to compute a layer, one that gives the same bits each time
    try:
        filter_trackers(list(trackers), folder)
    except ValueError as error:
        raise RecipeError(f"--track: {error}") from error
    except RuntimeError:
        pass  # before there is an Accelerator, accelerate 1.3 can't log that a package is missing; that is said below
    with no_fsdp_of_its_own():
        accelerator = Accelerator(
            cpu=cpu, mixed_precision=recipe.mixed_precision, log_with=list(trackers) or None, project_dir=folder
        )
    missing = set(trackers) - {getattr(tracker, "value", tracker) for tracker in accelerator.log_with}
    if missing:
        raise RecipeError(f"--track {sorted(missing)[0]}: that package is not installed: pip install {sorted(missing)[0]}")
    return accelerator


def check_device_settings() -> None:
    """Raise RecipeError for settings in the environment that Accelerate would fail on."""
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_TORCH_DEVICE"):
        if name in os.environ:
            try:
                torch.empty(0, device=os.environ[name]) if name.endswith("DEVICE") else parse_flag_from_env(name)
            except Exception as error:  # of each device that is not here another
                text = f"{name}={os.environ[name]} in the environment: {first_line(error)}; unset {name}"
                raise RecipeError(text) from error


@contextmanager
def no_fsdp_of_its_own() -> Iterator[None]:
    """Within, an Accelerator is one of plain processes: the network is sharded here, see `shard`."""
    asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_FSDP"] = asked


@contextmanager
def own_accelerator_state() -> Iterator[None]:
    """Within, Accelerate starts afresh, as another run may have had another precision; then its state is as before.

    Accelerate keeps one state for all Accelerators of a process: a program's own one goes on with what it had.
    """
    kept = {kind: dict(kind._shared_state) for kind in (AcceleratorState, PartialState, GradientState)}
    for kind in kept:
        kind._shared_state.clear()
    try:
        yield
    finally:
        for kind, state in kept.items():
            kind._shared_state.clear()
            kind._shared_state.update(state)


def setup(recipe: Recipe, accelerator: Accelerator, accumulate: int = 1) -> tuple[nn.Module, tuple[ImageDataset, ImageDataset]]:
    """(network, (training images, validation images)) as a run starts with them.

    What lies here is checked first, then come weights over the network, then data.

    Raises:
        RecipeError: if network, images and micro-batches do not go together.
    """
    data = None if is_downloaded(recipe.data.source) else main_process_first(accelerator, lambda: load_data(recipe))
    state = main_process_first(accelerator, lambda: pretrained_state(recipe))
    data = data or main_process_first(accelerator, lambda: load_data(recipe))
    seed_all(recipe.seed)  # the new head's first values
    net = convert_sync_batch_norm(build_backbone(recipe, len(data.classes), state), recipe.batch_norm, accelerator)
    datasets = build_datasets(recipe, net, data)
    check_micro_batches(recipe, datasets[0], accelerator.num_processes, accumulate)

    def try_once() -> None:
        if (recipe.linear_probe or recipe.of_numbers) and accelerator.is_main_process:
            check_probe(recipe, net)  # by values, which the recipe's check had not
        if (function := datasets[0].function) and accelerator.is_main_process:
            function.try_on(datasets[0].read, len(datasets[0]))
        if callable(recipe.backbone) and accelerator.is_main_process:
            try_saving(recipe, net, preprocessing(recipe, net), data.classes)

    main_process_first(accelerator, try_once)
    if accelerator.is_main_process and any(isinstance(part.images, ImageList) and part.cache is None for part in datasets):
        print_error("no memory can be had to keep images: they are decoded again in each epoch, which is slower")
    if asks_for_fsdp():
        shard_and_try(recipe, net, accelerator.device)
    return net, datasets


def shard_and_try(recipe: Recipe, net: nn.Module, device: torch.device) -> None:
    """Shard the network over the processes, and try it on an image; raises RecipeError if it can't be."""
    names = [{name for name, _ in net.named_parameters(remove_duplicate=unique)} for unique in (True, False)]
    fault = "it ties weights" if names[0] != names[1] else ""
    try:
        if not fault:
            shard(net, device, os.environ.get("FSDP_RESHARD_AFTER_FORWARD") != "false")
            with torch.no_grad():
                net.eval()(torch.zeros(1, *recipe.data.shape, device=device))
    except Exception as error:  # whatever this torch says of this network on this device
        fault = first_line(error)
    if fault:
        what = f"FSDP: torch {torch.__version__} can't shard {to_dict(recipe.backbone)} on this {device.type}"
        raise RecipeError(f"{what}: {fault}; launch with --multi_gpu instead")


def build_datasets(recipe: Recipe, net: nn.Module, data: ImageData) -> tuple[ImageDataset, ImageDataset]:
    """The training images, augmented, and the validation images, preprocessed, as the network takes them."""
    inputs = fit_preprocessing(preprocessing(recipe, net), data.train, recipe.data)
    if recipe.metric in ("auroc", "r2", "spearman", "quadratic_kappa") and len(np.unique(labels_of(data.val), axis=0)) < 2:
        same = "all validation images have the same label"
        raise RecipeError(f"metric='{recipe.metric}' is not defined: {same}; name another metric")
    if recipe.of_numbers:
        standardise(recipe, net, labels_of(data.train), data.classes)

    def dataset(images: Images, transform: Transform, function: OwnFunction | None = None) -> ImageDataset:
        several, layout = recipe.loss == "multi_label", memory_format(recipe, net)
        bad, background = recipe.data.on_bad_image, recipe.data.background
        options = (recipe.seed, data.classes, bad, several, layout, background, function, recipe.of_numbers)
        return ImageDataset(images, transform, *options)

    train = data.train
    if recipe.data.reduced_decode and isinstance(train, ImageList):  # what is evaluated is decoded as `predict` does
        largest = max(*recipe.data.sides, *recipe.data.test_sides)  # a linear probe sees training images at test_size
        train = train.read_with(shortest=math.ceil(recipe.data.reduced_decode * largest))
    function = recipe.augment.function and OwnFunction(recipe.augment.function)
    epochs = training_transforms(recipe, inputs)
    augmented = dataset(train, epochs[-1], function)
    if recipe.data.start_size:
        augmented.growing = epochs
    return augmented, dataset(data.val, eval_transform(inputs))


def check_recipe(recipe: Recipe, net: nn.Module) -> list[ParamGroup]:
    """The recipe's parameter groups on this network, once its optimizers and transforms have been tried on it as well.

    Raises:
        RecipeError: for whatever is wrong with one of them.
    """
    groups = build_param_groups(recipe, net)
    check_called(net, recipe.data.shape)
    if recipe.data.sampling == "balanced" and recipe.class_weights == "balanced":  # here: a run that has both still predicts
        raise RecipeError(
            "class_weights='balanced' and data.sampling='balanced' would make up for rare classes twice: leave out one"
        )
    build_optimizer(groups)
    training_transforms(recipe, preprocessing(recipe, net))
    if recipe.augment.color_jitter and "3a" not in (policy := recipe.augment.auto_augment or "3a"):
        raise RecipeError(f"augment: timm leaves out color_jitter beside auto_augment={policy!r}: leave out one of them")
    if recipe.batch_norm == "frozen" and recipe.weights != "none" and (fresh := fresh_norms(recipe, net)):
        raise RecipeError(
            f"batch_norm='frozen' keeps pretrained statistics, and {fresh[0]}, in the new head of "
            f"{to_dict(recipe.backbone)}, has none: --set batch_norm=train"
        )
    if recipe.linear_probe or recipe.of_numbers:
        check_probe(recipe, net)
    if recipe.ema_decay:
        try:
            copy.deepcopy(net)
        except Exception as error:  # each object that can't be copied has its own
            raise RecipeError(f"ema_decay: {to_dict(recipe.backbone)} can't be copied, as an average needs: {error}") from error
        if others := [name for name, value in net.state_dict().items() if not isinstance(value, torch.Tensor)]:
            raise RecipeError(f"ema_decay: of {to_dict(recipe.backbone)} {others[0]} is no tensor, and has no average")
    return groups


def check_micro_batches(recipe: Recipe, images: ImageDataset, processes: int, accumulate: int) -> None:
    """Raise RecipeError if a micro-batch has one image, and batch norm can't take statistics of one; or with FSDP has none."""
    whole = epoch_batches(recipe, images, 0, Cut(micro_batches=processes * accumulate))
    if asks_for_fsdp() and accumulate > 1 and any(len(plan.micro_batches) < processes * accumulate for plan in whole):
        raise RecipeError(
            f"FSDP: {len(images)} images in batches of {recipe.data.batch_size} over {processes} processes x {accumulate} "
            "micro-batches leave some process without one, and all must take part in each: leave out --accumulate"
        )
    fewest = min(len(part) for plan in whole for part in plan.micro_batches)
    if fewest > 1 or recipe.batch_norm == "frozen" or recipe.batch_norm == "sync" and processes > 1:
        return
    net = meta_backbone(recipe, len(images.classes))
    set_train_mode(net, recipe.batch_norm)
    try:
        smallest = recipe.data.shape_of(recipe.data.start_sides)
        net(torch.zeros(1, *smallest, device=next(net.parameters()).device))
    except ValueError as error:  # which torch's norms raise
        raise RecipeError(
            f"batch_norm='{recipe.batch_norm}' needs 2 images or more at once; {len(images)} images in batches of "
            f"{recipe.data.batch_size} over {processes} processes x {accumulate} micro-batches leave one alone: change "
            "data.batch_size, or --set batch_norm=frozen"
        ) from error
