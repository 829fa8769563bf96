"""Checkpoints: complete or absent, and exact to resume from."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from finetune.models.batch_norm import has_statistics
from finetune.models.linear_probe import Units, head_with_units, units_of
from finetune.models.saving import decode_state, plain_state
from finetune.models.sharding import gather_state, laid_out_like, whole
from finetune.optim.optimizers import build_optimizer, just_switched, plain_optimizers, start_epoch
from finetune.optim.param_groups import build_param_groups, fixed_parameters
from finetune.recipe import Recipe
from finetune.recipe.checks import parts
from finetune.training.logger import Logger
from finetune.training.run_dir import CHECKPOINT, newest_checkpoint
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.files import flush, write_folder

T = TypeVar("T")
AFRESH = "to start again from the pretrained weights, name another --output"
OLD_VERSION = (
    "the run was started by version 0.1, which fused frozen batch norm with the convolutions before it in float32: such a run "
    "goes on with the same steps, equal to rounding, not to the bit"
)
ROW_STEP = "row step"  # some of timm's, Lamb and Adan, count steps in a param_group, not in each parameter's state


def save_checkpoint(
    logger: Logger,
    net: nn.Module,
    evaluated: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    step: int,
    steps_per_epoch: int,
) -> None:
    """Write checkpoints/step-N-epochs-M, after N steps and M evaluated epochs, and then remove older ones.

    Randomness needs no state: every draw is seeded by epoch, step and image. The schedule needs none: it is a function of the
    step and the metrics. Optimizer state is kept under parameter names, so it can't be given to another parameter. `evaluated`
    is kept where it is another network than `net`: its moving average.

    Raises:
        RecipeError: if a number in it is not finite; nothing is written then.
    """
    logger.flush()
    network, optimizers, saved = whole(net), optimizer_kinds(net, optimizer), optimizer.state_dict()
    names = list(optimizers)
    moments = {names[i]: gather_state(state) for i, state in saved["state"].items()}
    if accelerator.is_main_process:
        for path in (logger.metrics_file, logger.predictions_file, logger.folder):  # the checkpoint counts on them
            if path.exists():
                flush(path)
        for row in saved["param_groups"]:
            if "step" in row:
                moments |= {names[i]: moments.get(names[i], {}) | {ROW_STEP: row["step"]} for i in row["params"]}
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        if fault := not_finite(network, moments):
            what = f"after step {step} {fault} is not finite: lower the learning rates, or clip_norm. {logger.kept()}"
            raise RecipeError(what, one_process=True)

        def write(folder: Path) -> None:
            # Made in memory first: on a full disk the writers of torch and safetensors fail each in their own words.
            (folder / "model.safetensors").write_bytes(safetensors.torch.save(plain_state(network)))
            if evaluated is not net:
                (folder / "average.safetensors").write_bytes(safetensors.torch.save(plain_state(evaluated)))
            torch.save(moments, optimizer_file := io.BytesIO())
            (folder / "optimizer.pt").write_bytes(optimizer_file.getbuffer())
            counts = {"step": step, "steps_per_epoch": steps_per_epoch}
            of_numbers = {"units": units} if (units := units_of(network)) else {}
            state = {**counts, **of_numbers, "scaler": scaler, "optimizers": optimizers, **logger.state()}
            (folder / "state.json").write_text(json.dumps(state))

        # With the evaluated epochs in it no name comes twice, so none is ever replaced: after an epoch's last step there may be
        # one without its metrics and one with them.
        folder = logger.folder / "checkpoints" / f"step-{step:08d}-epochs-{len(logger.history):05d}"
        write_folder(folder, write)
        for other in folder.parent.iterdir():
            name = other.name.removeprefix(".").removesuffix(".tmp").removesuffix(".old")  # of one that was being written
            if other != folder and CHECKPOINT.fullmatch(name):
                shutil.rmtree(other, ignore_errors=True)
    accelerator.wait_for_everyone()


def not_finite(net: nn.Module, moments: dict[str, dict[str, Any]]) -> str:
    """The first parameter, or optimizer's state of one, that is not finite; "" if there is none."""
    states = {f"{kind} of {name}": value for name, state in moments.items() for kind, value in state.items()}
    tensors = {
        name: tensor for name, tensor in (dict(net.named_parameters()) | states).items() if isinstance(tensor, torch.Tensor)
    }
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), "")


def check_resumable(run: Path, recipe: Recipe, net: nn.Module) -> None:
    """Raise RecipeError for what `restore` would refuse of the newest checkpoint, and for fewer epochs than it has begun."""
    folder = newest_checkpoint(run)
    if folder is None:
        return
    state = read_state(folder)
    epoch, step = len(state["history"]), state["step"]
    midway = step > epoch * epoch_length(state, step)
    if recipe.epochs < epoch + midway:
        raise RecipeError(f"the run in {run} has begun epoch {epoch + midway}: it can't end after {recipe.epochs}")
    for name in ("model", "average")[: 2 if recipe.ema_decay else 1]:
        read_network(folder, name, net)
    optimizer = build_optimizer(build_param_groups(recipe, net))
    start_epoch(optimizer, epoch)
    if midway or not just_switched(optimizer, epoch):
        read_moments(folder, state, net, optimizer)


def restore(
    recipe: Recipe,
    logger: Logger,
    net: nn.Module,
    evaluated: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    num_images: int,
) -> int:
    """Put everything back as the run's newest checkpoint has it; returns the steps done, 0 without a checkpoint.

    Raises:
        RecipeError: if a file is damaged, or is of another network, other groups or other optimizers.
    """
    folder = newest_checkpoint(logger.folder)
    if folder is None:
        logger.start()
        return 0
    state, steps_per_epoch = read_state(folder), recipe.data.steps_per_epoch(num_images)
    for network, name in ((net, "model"), (evaluated, "average"))[: 1 if evaluated is net else 2]:
        weights, own = read_network(folder, name, network), network.state_dict()
        network.load_state_dict({name: laid_out_like(own[name], value) for name, value in weights.items()})
        if "units" in state:
            keep_units(network, Units(*map(tuple, state["units"])))
    if accelerator.scaler and state["scaler"]:  # none after a change of the precision: the new one starts afresh
        accelerator.scaler.load_state_dict(state["scaler"])
    logger.resume(state)
    if state.get("version") == "0.1":
        logger.say(OLD_VERSION)
    if "steps_per_epoch" not in state and (options := corrected(recipe, net, num_images % recipe.data.batch_size)):
        logger.say(
            f"the run was started by an earlier version, whose {options} this one corrects: it does not go on to the bit"
        )
    step, epoch, before = state["step"], len(logger.history), epoch_length(state, steps_per_epoch)
    if before != steps_per_epoch:
        done = min(step - epoch * before, before)
        step = epoch * steps_per_epoch + done * steps_per_epoch // before
        logger.say(
            f"an epoch now has {steps_per_epoch} steps, not {before}: going on at the same share of epoch {epoch + 1}, after "
            f"step {step} by the new count"
        )
    start_epoch(optimizer, epoch)
    if step > epoch * steps_per_epoch or not just_switched(optimizer, epoch):
        restore_optimizer(folder, state, net, optimizer)
    return step


def keep_units(net: nn.Module, before: Units) -> None:
    """Let the head, whose weights are of other units, return what it did: the mean of images that were changed is another."""
    head = head_with_units(net)
    if head is None or head[1].units == before:
        return
    layer, now = head[0], head[1].units
    (old_mean, old_deviation), (mean, deviation) = (torch.tensor(units[:2], dtype=torch.float64) for units in (before, now))
    with torch.no_grad():
        scale = (old_deviation / deviation).to(layer.weight)
        layer.weight.mul_(scale[:, None])
        layer.bias.mul_(scale).add_(((old_mean - mean) / deviation).to(layer.bias))


def read_network(folder: Path, name: str, net: nn.Module) -> dict[str, Any]:
    """The state that a checkpoint's file has for a network."""
    weights = decode_state(net, read(folder / f"{name}.safetensors", safetensors.torch.load_file))
    if shapes(weights) != shapes(net.state_dict()):
        raise RecipeError(f"checkpoint {folder} is of another network, or other classes, than this recipe's; {AFRESH}")
    return weights


def corrected(recipe: Recipe, net: nn.Module, last_batch: int) -> str:
    """What version 0.2 computes otherwise than before it, of all that the recipe has; "" if there is nothing.

    `last_batch` is the number of images that are left for an epoch's last batch.
    """
    frozen = any(getattr(part, "unfreeze_at", 0) or getattr(part, "lr", 1) == 0 for _, part in parts(recipe))
    spectral = any(name.endswith("_u") for name, _ in net.named_buffers())
    norms = [module for module in net.modules() if has_statistics(module)]
    buffers = {id(buffer) for buffer in net.buffers() if buffer.is_floating_point()}
    buffers -= {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
    names = (len(list(net.named_parameters(remove_duplicate=unique))) for unique in (True, False))
    smoothed = recipe.label_smoothing or recipe.augment.mixes
    found = {
        "class weights of smoothed or mixed targets": recipe.class_weights and smoothed,
        "gradient checkpointing of norms that move": recipe.gradient_checkpointing and recipe.batch_norm != "frozen" and norms,
        "norms, by others than torch,": not all(isinstance(norm, _NormBase) for norm in norms),
        "average of tied weights or of buffers": recipe.ema_decay and (buffers or len(set(names)) > 1),
        "spectral norm of frozen layers": spectral and frozen,
        "last batch of one image": last_batch == 1 and recipe.batch_norm != "frozen" and norms,
        "weight decay": any("*" in name for name in getattr(net, "no_weight_decay", set)()),
    }
    return " and ".join(what for what, is_used in found.items() if is_used)


def epoch_length(state: dict[str, Any], now: int) -> int:
    """The steps of an epoch when a checkpoint was written; an older one shows them once an epoch is done."""
    history = state["history"]
    return int(state.get("steps_per_epoch") or (history[-1]["step"] // len(history) if history else now))


def read_moments(
    folder: Path, state: dict[str, Any], net: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """The state that a checkpoint has for each parameter of an optimizer."""
    moments = read(folder / "optimizer.pt", lambda file: torch.load(file, map_location="cpu", weights_only=True))
    kinds = optimizer_kinds(net, optimizer)
    if fixed := moments.keys() & fixed_parameters(net) - kinds.keys():
        raise RecipeError(
            f"checkpoint {folder} is of a run that trained {min(fixed)}, which the network itself makes with "
            f"requires_grad=False and which now stays still; to train it, give it a row of its own, and --resume-anyway"
        )
    if not moments.keys() <= kinds.keys():
        raise RecipeError(f"checkpoint {folder} is of another network, or other groups, than this recipe's; {AFRESH}")
    before = state.get("optimizers", kinds)  # older checkpoints do not say
    for name in moments:
        if before[name] != kinds[name]:  # torch would take it, and leave it lie or miss its own in mid-run
            raise RecipeError(f"checkpoint {folder} has {before[name]}'s state of {name}, not {kinds[name]}'s; {AFRESH}")
    return moments


def restore_optimizer(folder: Path, state: dict[str, Any], net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that a checkpoint has for each parameter."""
    moments, names = read_moments(folder, state, net, optimizer), list(optimizer_kinds(net, optimizer))
    rows, params = optimizer.state_dict()["param_groups"], dict(net.named_parameters())
    for row in rows:
        for i in row["params"]:
            if ROW_STEP in moments.get(names[i], {}):
                row["step"] = moments[names[i]].pop(ROW_STEP)
    state_dict = {
        names.index(name): {key: laid_out_like(params[name], value) for key, value in moments[name].items()} for name in moments
    }
    optimizer.load_state_dict({"state": state_dict, "param_groups": rows})


def read(file: Path, reader: Callable[[Path], T]) -> T:
    """reader(file), or one message if the file is cut, foreign, or holding code."""
    try:
        return reader(file)
    except Exception as error:
        raise RecipeError(f"checkpoint {file.parent} can't be read: {file.name}: {first_line(error)}; {AFRESH}") from error


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json; one of version 0.1 under today's names, and marked as such."""
    state = read(folder / "state.json", lambda file: json.loads(file.read_text()))
    if "epochs" in state:
        old = {"history": state.pop("epochs"), "linear_probe": state.pop("head", None), "clock": [], "version": "0.1"}
        state = {**old, **state}
    return state


def shapes(state: dict[str, Any]) -> dict[str, torch.Size | None]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}  # extra state has none


def optimizer_kinds(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """What steps each parameter, such as "torch.AdamW", by the parameters' names, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {
        names[id(parameter)]: f"{type(one).__module__.partition('.')[0]}.{type(one).__name__}"
        for one in plain_optimizers(optimizer)
        for row in one.param_groups
        for parameter in row["params"]
    }
