"""finetune.train's result: a run in a program or a notebook."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from finetune.recipe import Recipe
from finetune.recipe.serialize import from_dict
from finetune.results.plots import draw_curves


@dataclass(frozen=True)
class Run:
    """A run's folder, read when asked."""

    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it ran to its end; else finetune.train(resume=...) goes on with it."""
        return (self.folder / "result.json").is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """result.json: the last epoch's metrics, the best epoch, seconds, versions. Empty for a run that is not finished."""
        return json.loads((self.folder / "result.json").read_text()) if self.finished else {}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of each epoch, the linear probe's, as of epoch -1, first."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "val_images" in row]

    @property
    def recipe(self) -> Recipe:
        """The recipe as it was run."""
        return from_dict(json.loads((self.folder / "recipe.json").read_text()))

    def plot(self) -> Figure:
        """Loss, metric, gradient norm and learning rates by epoch; a notebook shows the figure."""
        return draw_curves(self.folder, self.recipe.metric)
