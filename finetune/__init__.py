"""Fine-tuning recipes for pretrained vision backbones: what a recipe file imports."""

from finetune.recipe import *  # noqa: F403
from finetune.recipe import __all__ as __all__
