"""Complete-or-absent checkpoints, exact resume."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn

from finetune.param_groups import ParamGroup
from finetune.recipe import RecipeError
from finetune.run_record import RunRecord


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder aside, flush it to the disk and rename it: a killed process never leaves half of one.

    A folder that is there already is moved away first, and for that moment there is none.
    """
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)  # half a folder on a full disk only fills it
        error.filename = error.filename or str(folder)
        raise
    for path in [*aside.iterdir(), aside]:
        flush(path)
    if folder.exists():  # a rename can't replace a folder that holds files
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old)
    else:
        aside.rename(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain_state(net: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers as safetensors takes them: on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}


def save_checkpoint(record: RunRecord, net: nn.Module, optimizer, groups: list[ParamGroup], accelerator: Accelerator,
                    step: int) -> None:
    """Write checkpoints/step-N-epochs-M, after which N updates are done and M epochs scored, and then remove older ones.

    Randomness needs no state: every draw is seeded by epoch, update and image. The schedule needs none: it is a function of
    the step and the scores. Optimizer state is kept under parameter names, so it can't be given to another parameter.
    """
    record.flush()
    if accelerator.is_main_process:
        names = parameter_names(groups)
        moments = {names[i]: state for i, state in optimizer.state_dict()["state"].items()}
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None

        def write(folder: Path) -> None:
            # Made in memory first: on a full disk the writers of torch and safetensors fail each in their own words.
            (folder / "model.safetensors").write_bytes(safetensors.torch.save(plain_state(net)))
            torch.save(moments, optimizer_file := io.BytesIO())
            (folder / "optimizer.pt").write_bytes(optimizer_file.getbuffer())
            (folder / "state.json").write_text(json.dumps({"step": step, "scaler": scaler, **record.state()}))

        # With the scored epochs in it no name comes twice, so none is ever replaced: after an epoch's last update there may be
        # one without its scores and one with them.
        folder = record.folder / "checkpoints" / f"step-{step:08d}-epochs-{len(record.epochs):05d}"
        write_folder(folder, write)
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
    accelerator.wait_for_everyone()


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    return max((run / "checkpoints").glob("step-*"), default=None)


def restore(record: RunRecord, net: nn.Module, optimizer, groups: list[ParamGroup], accelerator: Accelerator) -> int:
    """Put everything back as the run's newest checkpoint has it; returns the updates done, 0 for a run without one.

    Raises:
        RecipeError: if a file is damaged or is of another network or another table of groups.
    """
    folder = newest_checkpoint(record.folder)
    if folder is None:
        record.begin()
        return 0
    try:
        state = json.loads((folder / "state.json").read_text())
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        moments = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # cut, foreign, or holding code
        raise RecipeError(f"checkpoint {folder} can't be read: {str(error).partition(chr(10))[0]}; to start again from the "
                          "pretrained weights, name another --output") from error
    ids = {name: i for i, name in enumerate(parameter_names(groups))}
    if weights.keys() != net.state_dict().keys() or not moments.keys() <= ids.keys():
        raise RecipeError(f"checkpoint {folder} is of another network than this recipe's")
    net.load_state_dict(weights)
    optimizer.load_state_dict({"state": {ids[name]: moment for name, moment in moments.items()},
                               "param_groups": optimizer.state_dict()["param_groups"]})
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    record.go_on(state)
    return state["step"]


def parameter_names(groups: list[ParamGroup]) -> list[str]:
    """Every parameter's name in the optimizer's order."""
    return [name for group in groups for part in (group.decayed, group.undecayed) for name in part]
