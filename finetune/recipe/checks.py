"""What a wrong recipe gets: RecipeError, and whether each value is of the type written beside its field."""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

Rules = list[tuple[bool, str]]  # what must hold, and what to say where it does not


def broken(rules: Rules, where: str = "") -> list[str]:
    """What to say of the rules that do not hold."""
    return [where + text for kept, text in rules if not kept]


def type_faults(part: Any, where: str = "") -> list[str]:
    """Fields whose value is not of the type written beside them, in a dataclass and the dataclasses it holds."""
    faults = []
    for name, hint in typing.get_type_hints(type(part)).items():
        value = getattr(part, name)
        if not matches_type(value, hint):
            faults.append(f"{where}{name} must be {describe_type(hint)}, not {value!r}")
            continue
        for item in value if isinstance(value, tuple) else [value]:
            if dataclasses.is_dataclass(type(item)):
                faults += type_faults(item, f"{where}{name}." + (f"{item.name}." if isinstance(value, tuple) else ""))
    return faults


def describe_type(hint: Any) -> str:
    """A type as a person would say it."""
    words = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "True or False",
        type(None): "None",
        Callable: "a function",
    }
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe_type, arguments))
    if origin is tuple:
        return "a tuple of " + " and ".join(describe_type(kind) for kind in arguments if kind is not Ellipsis)
    return words.get(origin) or ("an " if hint.__name__[0] in "AEIOU" else "a ") + hint.__name__


def matches_type(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type; an int is a float, a bool is no number, NaN is none either."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches_type(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if Ellipsis in arguments and isinstance(value, tuple) else arguments
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(matches_type, value, kinds))
    if origin is Callable:
        return callable(value)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin)
