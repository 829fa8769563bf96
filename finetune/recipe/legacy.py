"""Names of version 0.1, read for one more release: each says once what it is called now."""

import functools
import warnings
from typing import Any, TypeVar

from finetune.recipe.groups import Group
from finetune.utils.errors import RecipeError

RENAMED = {"norm_stats": "batch_norm", "score": "metric"}
T = TypeVar("T")


def new_names(fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fields under today's names."""
    fields = {RENAMED.get(name, name): value for name, value in fields.items()}
    return fields | ({"batch_norm": "frozen"} if fields.get("batch_norm") == "eval" else {})


def reads_old_names(cls: type[T]) -> type[T]:
    """Let a dataclass take its fields under their old names too, with a warning."""
    init = cls.__init__

    @functools.wraps(init)
    def renaming_init(self: T, **fields: Any) -> None:
        for name in RENAMED.keys() & fields.keys():
            value = fields[name]
            new = new_names({name: value})
            now = ", ".join(f"{field}={text!r}" for field, text in new.items())
            warnings.warn(f"{name}={value!r} is now {now}; please rename it", FutureWarning, stacklevel=2)
        init(self, **new_names(fields))

    cls.__init__ = renaming_init  # type: ignore[assignment]
    return cls


def Frozen(name: str, pattern: str) -> Group:
    """A row of parameters that stay as they are: now a group with lr=0."""
    warnings.warn(f"Frozen({name!r}, {pattern!r}) is now Group({name!r}, {pattern!r}, lr=0)", FutureWarning, stacklevel=2)
    return Group(name, pattern, lr=0)


def Polynomial(**fields: Any) -> None:
    """A schedule that was removed."""
    raise RecipeError("Polynomial was removed: write Linear() for power=1, else Lambda(function=...) of the epoch")
