"""Where a run is written: a folder of its own, or the one it goes on in; the first files in it."""

import json
import shutil
import time
from pathlib import Path

from finetune.recipe import RecipeError


def new_folder(name: str, output: Path | None) -> Path:
    """The folder `output`, or runs/NAME-TIME; not made yet.

    Raises:
        RecipeError: if there is something in it.
    """
    folder = output or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "a run" if (folder / "recipe.json").exists() else "files"
        raise RecipeError(f"output folder {folder} already holds {what}; name another --output, or go on with the run in it: "
                          "--resume")
    return folder


def unfinished_folder(name: str, folder: Path | None) -> Path:
    """The folder of a run to go on with: `folder`, or the recipe's newest in runs/.

    Raises:
        RecipeError: if there is none, or it is finished.
    """
    folder = folder or max((path.parent for path in Path("runs").glob(f"{name}-*/recipe.json")), default=None,
                           key=lambda path: path.stat().st_mtime)
    if folder is None or not (folder / "recipe.json").is_file():
        raise RecipeError(f"no run to resume in {folder or 'runs/'}; name its folder: --resume DIR")
    if (folder / "result.json").is_file():
        raise RecipeError(f"the run in {folder} is finished: nothing to resume")
    return folder


def begin(folder: Path, recipe_file: Path, resolved: dict, groups: str) -> None:
    """Make a run's folder, with the recipe as given and as resolved and its group table."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipe_file, folder / "recipe.py")
    (folder / "groups.txt").write_text(groups + "\n")
    (folder / "recipe.json").write_text(json.dumps(resolved, indent=1) + "\n")


def check_same_recipe(folder: Path, resolved: dict) -> None:
    """Raise RecipeError, with the fields that differ, unless the run in `folder` was started with this recipe."""
    before, now = json.loads((folder / "recipe.json").read_text()), json.loads(json.dumps(resolved))
    changed = [f"{key}: {before.get(key)} before, {now.get(key)} now" for key in now if before.get(key) != now.get(key)]
    if changed:
        raise RecipeError("\n  ".join([f"the run in {folder} was started with another recipe:", *changed]))
