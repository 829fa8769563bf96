"""The shortest valid recipe, for where only a network and its images matter."""

from finetune.recipe.data import Data
from finetune.recipe.groups import AdamW, LayerDecay
from finetune.recipe.recipe import Recipe
from finetune.recipe.schedules import Cosine


def minimal_recipe(backbone: str, source: str, image_size: int, batch_size: int = 1) -> Recipe:
    """A recipe with this network and these images; what else a recipe must say is arbitrary."""
    return Recipe(
        backbone=backbone,
        data=Data(source, image_size, batch_size),
        groups=LayerDecay(head_lr=1e-3, stem_ratio=0.01),
        optimizer=AdamW(),
        schedule=Cosine(),
        batch_norm="frozen",
        epochs=1,
    )
