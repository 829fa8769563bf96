"""What is wrong with a recipe: types and ranges read from its fields' annotations, then conflicts between fields."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal


def find_faults(recipe: Any) -> list[str]:
    """One sentence for each fault of a dataclass and of the dataclasses it holds, each with the field's path.

    Ranges and conflicts are looked at once all types are right: values of a wrong type can't be compared.
    """
    types_wrong = [
        f"{path} must be {describe_type(hint)}, not {value!r}"
        for path, value, hint in walk(recipe)
        if not matches_type(value, hint)
    ]
    if types_wrong:
        return types_wrong
    ranges_wrong = [
        f"{path} must be {text}, not {value!r}" for path, value, hint in walk(recipe) if (text := out_of_range(value, hint))
    ]
    conflicts = [f"{path}: {text}" if path else text for path, part in parts(recipe) for text in part.conflicts()]
    return ranges_wrong + conflicts


class Checked:
    """A part of a recipe that says which of its fields do not go together."""

    def conflicts(self) -> Iterator[str]:
        """A sentence for each conflict that no single field's range shows."""
        return iter(())


def parts(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, dataclass) of a dataclass and of those it holds; the rows of a table by their names: groups.head."""
    yield path, part
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        below = f"{path}.{field.name}" if path else field.name
        for item in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                yield from parts(item, f"{below}.{getattr(item, 'name', '')}" if isinstance(value, tuple) else below)


def walk(recipe: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, value, annotation) of every field."""
    for path, part in parts(recipe):
        for name, hint in typing.get_type_hints(type(part), include_extras=True).items():
            yield f"{path}.{name}" if path else name, getattr(part, name), hint


def out_of_range(value: Any, hint: Any) -> str:
    """In words, the range that a value, or one of a tuple's, misses: its annotation gives it as "[0, 1)". Else nothing."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is tuple and isinstance(value, tuple):
            return next((text for item in value if (text := out_of_range(item, arguments[0]))), "")
        if origin is Annotated and matches_type(value, arguments[0]) and not in_range(value, arguments[1]):
            return describe_range(arguments[1], value) + (", or None" if type(None) in options else "")
    return ""


def in_range(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)": a square bracket's end is part of it."""
    low, high = map(float, interval[1:-1].split(","))
    return (low < value or interval[0] == "[" and value == low) and (value < high or interval[-1] == "]" and value == high)


def describe_range(interval: str, value: float = 0.0) -> str:
    """An interval in words."""
    low, high = (text.strip() for text in interval[1:-1].split(","))
    if high == "inf":
        return ("finite and " if math.isinf(value) else "") + (f"{low} or more" if interval[0] == "[" else f"above {low}")
    if interval[0] + interval[-1] == "[]":
        return f"from {low} to {high}"
    return f"{'at least' if interval[0] == '[' else 'above'} {low} and {'at most' if interval[-1] == ']' else 'below'} {high}"


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
    if origin is Annotated:
        return describe_type(arguments[0])
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
    if origin is Annotated:
        return matches_type(value, arguments[0])
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
