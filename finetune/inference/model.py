"""finetune.load: a trained model in a program or a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.export.export import export
from finetune.inference.embed import Embedding, embed_images
from finetune.inference.evaluate import evaluate_model
from finetune.inference.explain import Explanation, explain_images
from finetune.inference.inputs import find_inputs
from finetune.inference.predict import predict_images
from finetune.models.saved import SavedModel, choose_model, find_model, load_model
from finetune.training.run_dir import find_run


@dataclass(frozen=True)
class Model:
    """A trained model. `saved` has the network in eval mode, its classes, its preprocessing and its recipe."""

    source: str | Path
    saved: SavedModel

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the logits."""
        return self.saved.classes

    def predict(
        self, images: Sequence[Any], top: int = 5, workers: int = 0, unsure_below: float | None = None
    ) -> list[dict[str, Any]]:
        """A row for each image: {"file", "predicted", "probability", "top": [[class, probability], ...]}.

        Images are paths, PIL images, arrays or tensors, uint8 [H, W, 3]. With `unsure_below` rows have "unsure".
        """
        return predict_images(self.saved, list(images), top, workers, unsure_below=unsure_below)

    def explain(self, images: Sequence[Any], workers: int = 0) -> list[Explanation | None]:
        """What in each image speaks for its likeliest class: (predicted, probability, heat [h, w], picture).

        Images are those of `predict`; None for one that can't be read.
        """
        return explain_images(self.saved, list(images), workers)

    def embed(self, images: str | Path | Sequence[Any], workers: int = 0) -> Embedding:
        """(features [n, d], files): what the network gives to its head for each image.

        Images are paths, folders and globs, or those of `predict`, which are kept in their order.
        """
        named: Sequence[Any] = [images] if isinstance(images, str | Path) else list(images)
        if all(isinstance(one, str | Path) for one in named):
            named = find_inputs(named)
        return embed_images(self.saved, named, workers)

    def evaluate(self, data: str | Path, workers: int = 0) -> dict[str, Any]:
        """The metrics on labelled images: class folders, alone or under val/ or test/, or a named set."""
        return evaluate_model(self.saved, data, workers=workers, run=find_model(self.source)[1])

    def export(
        self,
        to: str,
        output: str | Path | None = None,
        preprocess: bool = False,
        half: bool = False,
        batch_size: int | None = None,
    ) -> Path:
        """Write the model for "timm", "onnx", "torch" or "gradio", and return the folder: see finetune.export.export."""
        return export(Path(self.source), to, Path(output) if output else None, preprocess, half, batch_size)


def load(source: str | Path, checkpoint: str | None = None) -> Model:
    """The model of a run ("last", the start of its name, its folder), of a model folder, or "hf-hub:OWNER/NAME".

    Of a run's two networks it is the one that the run says is to be used, or that of `checkpoint`: "last" or "best".

    Raises:
        RecipeError: if there is no such model.
    """
    if not str(source).startswith(("hf-hub:", "https://")):
        source = find_run(str(source), "finished")
    source, _ = choose_model(source, checkpoint)
    return Model(source, load_model(source))
