"""What a recipe says. Standard library only, so that listing recipes takes no time."""

from finetune.recipe.data import Augment, Data
from finetune.recipe.groups import SGD, AdamW, Group, LayerDecay, LinearProbe, Lora, Optimizer, Switch
from finetune.recipe.legacy import Frozen  # noqa: F401  (for recipes of version 0.1)
from finetune.recipe.recipe import EarlyStop, Recipe
from finetune.recipe.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    Lambda,
    Linear,
    MultiStep,
    OneCycle,
    Plateau,
    Schedule,
    Step,
)
from finetune.utils.errors import RecipeError

__all__ = [
    "SGD",
    "AdamW",
    "Augment",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Data",
    "EarlyStop",
    "Exponential",
    "Group",
    "Lambda",
    "LayerDecay",
    "Linear",
    "LinearProbe",
    "Lora",
    "MultiStep",
    "OneCycle",
    "Optimizer",
    "Plateau",
    "Recipe",
    "RecipeError",
    "Schedule",
    "Step",
    "Switch",
]
