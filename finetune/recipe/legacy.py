"""Names of version 0.1, read for one more release, each with a warning that gives today's; removed in 0.3."""

import functools
import warnings
from typing import Any, TypeVar

from finetune.recipe.groups import Group
from finetune.utils.errors import RecipeError

RENAMED = {"norm_stats": "batch_norm", "score": "metric", "randaugment": "auto_augment"}
T = TypeVar("T")


def new_names(fields: dict[str, Any], warn: bool = True) -> dict[str, Any]:
    """The fields of a recipe or a part of one under today's names. An old name outweighs its new one: replace(score=...) gives
    both."""
    fields = dict(fields)
    for old, new in RENAMED.items():
        if old in fields:
            value = fields.pop(old)
            fields[new] = "frozen" if value == "eval" else value
            if warn:
                text = f"{old}={value!r} is now {new}={fields[new]!r}; please rename it"
                warnings.warn(text, FutureWarning, stacklevel=3)
    return fields


def reads_old_names(recipe_class: type[T]) -> type[T]:
    """Let a recipe, or a part of one, be made with its fields' old names, too."""
    init = recipe_class.__init__

    @functools.wraps(init)
    def init_with_new_names(self: T, **fields: Any) -> None:
        init(self, **new_names(fields))

    recipe_class.__init__ = init_with_new_names  # type: ignore[assignment]
    return recipe_class


def Frozen(name: str, pattern: str) -> Group:
    """A row of parameters that stay as they are: now a group with lr=0."""
    warnings.warn(f"Frozen({name!r}, {pattern!r}) is now Group({name!r}, {pattern!r}, lr=0)", FutureWarning, stacklevel=2)
    return Group(name, pattern, lr=0)


def Polynomial(**fields: Any) -> None:
    """A schedule that was removed."""
    raise RecipeError("Polynomial was removed: write Linear() for power=1, else Lambda(function=...) of the epoch")
