"""A recipe as plain data, and back; what differs between two."""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import finetune
from finetune.recipe.checks import alternatives
from finetune.recipe.groups import Group, LayerDecay, Lora
from finetune.recipe.legacy import new_names
from finetune.recipe.recipe import Recipe
from finetune.recipe.schedules import Schedule
from finetune.utils.errors import RecipeError


def to_dict(part: Any) -> Any:
    """A recipe or a part of one in JSON's types; functions by their name, what has several kinds with its "type"."""
    if dataclasses.is_dataclass(part):
        values = {field.name: to_dict(getattr(part, field.name)) for field in dataclasses.fields(part)}
        return {"type": type(part).__name__, **values} if isinstance(part, Schedule | LayerDecay | Lora) else values
    if isinstance(part, dict):
        return {key: to_dict(value) for key, value in part.items()}
    if isinstance(part, tuple | list):
        return [to_dict(item) for item in part]
    return f"function {function_name(part)}" if callable(part) else part


def function_name(function: Any) -> str:
    """A function's name; that of a partial with its arguments, of a callable object that of its class."""
    if isinstance(function, functools.partial):
        values = [("", value) for value in function.args] + [(f"{key}=", value) for key, value in function.keywords.items()]
        words = [key + (function_name(value) if callable(value) else repr(value)) for key, value in values]
        return f"{function_name(function.func)}({', '.join(words)})"
    return getattr(function, "__name__", type(function).__name__)


def from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` made these values of, in this version or an earlier one; fields it lacks get their defaults.

    A function, or a schedule that is not finetune's, is known by its name alone: it is there to be compared, not to be called.

    Raises:
        RecipeError: for a field that is not known here, and for values that are no valid recipe.
    """
    return build(values, Recipe)


def build(value: Any, hint: Any) -> Any:
    """What `to_dict` made `value` of, where the annotation of its field is `hint`."""
    kinds = alternatives(hint)
    if isinstance(value, list):
        items = next((typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is tuple), Any)
        return tuple(build(item, items) for item in value)
    if isinstance(value, str) and value.startswith("function "):
        return named_function(value.removeprefix("function "))
    part = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if isinstance(value, dict):
        return build_part(value, part) if part else {key: build(item, Any) for key, item in value.items()}
    return value


def build_part(values: dict[str, Any], part: Any) -> Any:
    """A recipe or a part of one, of the class `part` or of the one that "type" names."""
    fields = dict(values)
    kind = fields.pop("type", None)
    if kind == "Frozen":  # of version 0.1
        part, fields = Group, {**fields, "lr": 0}
    elif kind:
        names = [(name, object) for name in fields]
        unknown = dataclasses.make_dataclass(kind, names, bases=(Schedule,), frozen=True, kw_only=True)
        part = getattr(finetune, kind, unknown)  # a schedule of the recipe's own, or of another version
    else:
        fields = new_names(fields, warn=False)
    hints = typing.get_type_hints(part)
    if surplus := sorted(fields.keys() - hints.keys()):
        raise RecipeError(f"{part.__name__} has no field '{surplus[0]}' here: a newer version wrote it, or it was removed")
    made = {name: build(item, hints[name]) for name, item in fields.items()}
    return part(**made.pop("options", {}), **made)  # an optimizer takes its options one by one


def named_function(name: str) -> Callable[..., Any]:
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
    return {key: value for name, item in part.items() for key, value in flatten(item, f"{path}.{name}".lstrip(".")).items()}
