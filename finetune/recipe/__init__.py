"""What a recipe says. Standard library only, so that listing recipes takes no time."""

from finetune.recipe.data import Augment, Data
from finetune.recipe.groups import SGD, AdamW, Frozen, Group, LayerDecay, LinearProbe, Optimizer, Switch
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
    Polynomial,
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
    "Frozen",
    "Group",
    "Lambda",
    "LayerDecay",
    "Linear",
    "LinearProbe",
    "MultiStep",
    "OneCycle",
    "Optimizer",
    "Plateau",
    "Polynomial",
    "Recipe",
    "RecipeError",
    "Schedule",
    "Step",
    "Switch",
]
