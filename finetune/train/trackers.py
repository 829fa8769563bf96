"""What trackers (TensorBoard, Weights & Biases, ...) are told, through Accelerate."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from finetune.recipe import Recipe
from finetune.recipe_file import as_dict, flat
from finetune.run_folder import newest_checkpoint


def as_scalars(row: dict[str, Any]) -> tuple[dict[str, float], int]:
    """A line of the metrics under the names that a tracker sorts into panels, and its update: an epoch's is its last one."""
    panel, step = ("train", row["step"]) if "grad_norm" in row else ("val", max(row["step"] - 1, 0))
    values = {f"{panel}/{key}": value for key, value in row.items() if isinstance(value, float | int) and key != "step"}
    return values | {f"lr/{name}": rate for name, rate in row.get("lr", {}).items()}, step


def start_trackers(accelerator: Accelerator, folder: Path, recipe: Recipe) -> None:
    """Begin what --track asked for, with the recipe as its configuration.

    A resumed run goes on in the same one, and TensorBoard forgets what was logged after the checkpoint.
    """
    checkpoint = newest_checkpoint(folder)
    step = checkpoint and int(checkpoint.name.split("-")[1])
    config = {
        key: value if isinstance(value, int | float | str | bool) else str(value)
        for key, value in flat(as_dict(recipe)).items()
    }
    accelerator.init_trackers(
        "finetune",
        config,
        init_kwargs={"tensorboard": {"purge_step": step}, "wandb": {"id": folder.name, "resume": "allow", "dir": str(folder)}},
    )
