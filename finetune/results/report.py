"""report.html of a finished run, made again: its images are looked for where the run had them."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finetune.data.dataset import ImageList, Images, fingerprint, recorded_rows
from finetune.data.sources import load_data
from finetune.images.read import read_image
from finetune.images.remote import find_file, image_digest, look_up
from finetune.models.saved import model_to_use
from finetune.page.write import write_page
from finetune.recipe import Recipe
from finetune.recipe.load import RECIPES, recipe_of_run
from finetune.recipe.serialize import to_dict
from finetune.results.compare import predictions_of
from finetune.results.runs import Run
from finetune.results.summary import describe_verdicts
from finetune.training.run_dir import run_name, started
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.urls import is_url


def write_report(run: Path, output: Path | None = None, data: str | None = None) -> dict[str, Any]:
    """Write a finished run's report.html, or `output`, from its folder; `data` is where its images lie now.

    Returns {"file", "without_images": why, or ""}.

    Raises:
        RecipeError: if the run is not finished, or its predictions can't be read.
    """
    if not Run(run).finished:
        raise RecipeError(f"{run} is no finished run: to finish it, finetune resume {run}")
    recipe, result = Run(run).recipe, Run(run).metrics
    if "use" not in result:  # a run from before this was written down
        result["use"], result["use_reason"] = model_to_use(result, recipe.metric)
    _, labels = predictions_of(run)
    images, lost = find_images(run, recipe, labels, data)
    page = write_page(run, images, describe_verdicts(recipe, RECIPES / f"{run_name(run)}.py", result), output, lost)
    return {"file": str(page), "without_images": lost}


def find_images(run: Path, recipe: Recipe, labels: torch.Tensor, data: str | None) -> tuple[Images | None, str]:
    """(a run's validation images in the order of its predictions, or None, and then why)."""
    if rows := recorded_rows(run / "images.csv", "val"):
        if len(rows) != len(labels):
            return None, f"images.csv names {len(rows):,} validation images, and the predictions are of {len(labels):,}"
        paths = [moved(row["file"], recipe, data) for row in rows]
        look_up(paths)
        digests = {path: row["digest"] for path, row in zip(paths, rows, strict=True)}
        images = ImageList(paths, [0] * len(paths), partial(read_unchanged, digests))
        return images.read_as(recipe.data), ""
    try:
        if data:
            recipe = replace(recipe, data=replace(recipe.data, source=data))
        elif callable(recipe.data.source):  # its code is in the run's own recipe.py
            recipe, _, _ = recipe_of_run(run)
        found = load_data(recipe)
    except RecipeError as error:
        return None, first_line(error)
    now = fingerprint(found.val, found.classes)
    if started(run).get("images", {}).get("validation", now) != now or len(found.val) != len(labels):
        return None, f"the validation images of {data or to_dict(recipe.data.source)} are not those of the run"
    return found.val, ""


def moved(name: str, recipe: Recipe, data: str | None) -> Path | str:
    """Where a file of a run's folder or table lies if these lie in `data` now."""
    if is_url(name):
        return find_file(name)
    file, source = Path(name), Path(str(recipe.data.source))
    old, new = (path.parent if path.suffix.lower() == ".csv" else path for path in (source, Path(data or source)))
    return new / file.relative_to(old) if file.is_relative_to(old) else file


def read_unchanged(digests: dict[Path | str, str], file: Path | str, **options: Any) -> Image.Image:
    """A file's image; RecipeError for one whose content is another than the run had."""
    if image_digest(file) != digests[file]:
        raise RecipeError(f"{file} is not the file that the run had")
    return read_image(file, **options)
