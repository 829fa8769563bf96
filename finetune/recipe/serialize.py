"""A recipe as plain data, and back; what differs between two."""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

import finetune
from finetune.recipe.groups import Group, LayerDecay, Optimizer
from finetune.recipe.legacy import Polynomial, new_names
from finetune.recipe.recipe import Recipe
from finetune.recipe.schedules import Schedule
from finetune.utils.errors import RecipeError


def to_dict(part: Any) -> Any:
    """A recipe or a part of one in JSON's types; functions by their name, schedules and LayerDecay with their "type"."""
    if dataclasses.is_dataclass(part):
        values = {field.name: to_dict(getattr(part, field.name)) for field in dataclasses.fields(part)}
        return {"type": type(part).__name__, **values} if isinstance(part, Schedule | LayerDecay) else values
    if isinstance(part, dict):
        return {key: to_dict(value) for key, value in part.items()}
    if isinstance(part, tuple | list):
        return [to_dict(item) for item in part]
    return f"function {part.__name__}" if callable(part) else part


def from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` made these values of, in this version or an earlier one; fields it lacks get their defaults.

    A function is known by its name alone: it is there to be compared, and raises RecipeError when it is called.

    Raises:
        RecipeError: for a field that is not known here, and for values that are no valid recipe.
    """
    return build(new_names(values), Recipe)


def build(value: Any, hint: Any) -> Any:
    """What `to_dict` made `value` of, where the annotation of its field is `hint`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, str) and value.startswith("function "):
        return named_function(value.removeprefix("function "))
    if isinstance(value, list):
        rows = next((typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple), Any)
        return tuple(build(item, rows) for item in value)
    if not isinstance(value, dict):
        return value
    fields = dict(value)
    kind = fields.pop("type", None)
    if kind == "Polynomial":
        Polynomial()
    if kind == "Frozen":  # of version 0.1
        return Group(**fields, lr=0)
    cls: Any = (
        getattr(finetune, kind) if kind else next((option for option in options if dataclasses.is_dataclass(option)), dict)
    )
    if cls is dict:
        return {key: build(item, Any) for key, item in fields.items()}
    if cls is Optimizer:
        return Optimizer(fields["name"], weight_decay=fields["weight_decay"], **build(fields["options"], dict))
    hints = typing.get_type_hints(cls)
    if unknown := sorted(fields.keys() - hints.keys()):
        raise RecipeError(f"{cls.__name__} has no field '{unknown[0]}' here: a newer version wrote it, or it was removed")
    return cls(**{name: build(item, hints[name]) for name, item in fields.items()})


def named_function(name: str) -> Callable[[], Any]:
    """A stand-in for a function of which only the name was written down."""

    def missing(*arguments: Any) -> Any:
        raise RecipeError(f"function {name} is known by its name alone: it stands in the run's recipe.py")

    missing.__name__ = name
    return missing


def diff(one: Recipe, other: Recipe) -> list[tuple[str, Any, Any]]:
    """(field, its value in one, in the other) for each field that differs; "-" where one recipe has no such field."""
    a, b = flatten(to_dict(one)), flatten(to_dict(other))
    pairs = [(path, a.get(path, "-"), b.get(path, "-")) for path in {**a, **b}]
    return [pair for pair in pairs if pair[1] != pair[2]]


def flatten(part: Any, path: str = "") -> dict[str, Any]:
    """{path: value} of nested dicts and of lists whose items have names, such as a recipe's groups."""
    if isinstance(part, list) and part and all(isinstance(item, dict) and "name" in item for item in part):
        part = {item["name"]: item for item in part}
    if not isinstance(part, dict) or not part:
        return {path: part}
    below = f"{path}." if path else ""
    return {key: value for name, item in part.items() for key, value in flatten(item, below + name).items()}
