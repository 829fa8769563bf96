"""What a wrong recipe gets: RecipeError, and whether each value is of the type written beside its field."""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Literal


class RecipeError(ValueError):
    """What the author of a recipe, or the person at the keyboard, can put right."""

    one_process = False  # True where only the process that raised it knows, so that one must speak


def type_faults(part, where: str = "") -> list[str]:
    """Fields whose value is not of the type written beside them, in a dataclass and the dataclasses it holds."""
    faults = []
    for name, hint in typing.get_type_hints(type(part)).items():
        value = getattr(part, name)
        if not is_a(value, hint):
            faults.append(f"{where}{name} must be {in_words(hint)}, not {value!r}")
            continue
        for item in value if isinstance(value, tuple) else [value]:
            if dataclasses.is_dataclass(item):
                faults += type_faults(item, f"{where}{name}." + (f"{item.name}." if isinstance(value, tuple) else ""))
    return faults


def in_words(hint) -> str:
    """A type as a person would say it."""
    words = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "True or False",
        type(None): "None",
        Callable: "a function",
    }
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(in_words, arguments))
    if origin is tuple:
        return "a tuple of " + " and ".join(in_words(kind) for kind in arguments if kind is not Ellipsis)
    return words.get(hint) or ("an " if hint.__name__[0] in "AEIOU" else "a ") + hint.__name__


def is_a(value, hint) -> bool:
    """Whether `value` is of the annotated type; an int is a float, a bool is no number, NaN is none either."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if Ellipsis in arguments and isinstance(value, tuple) else arguments
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(is_a, value, kinds))
    if hint is Callable:
        return callable(value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
