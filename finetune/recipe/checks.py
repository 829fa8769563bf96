"""What is wrong with a recipe: types and ranges read from its fields' annotations, then conflicts between fields.

A number's range is written as an interval, with what the number is where that helps: Annotated[float, "[0, 1)", "a share"].
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal


class Checked:
    """A recipe or a part of one: a dataclass that says which of its fields do not go together."""

    def conflicts(self) -> Iterator[str]:
        """A sentence for each conflict that no single field's range shows."""
        return iter(())


def find_faults(recipe: Checked) -> list[str]:
    """One sentence for each fault of a recipe, with the path of the field.

    Ranges and conflicts are looked at once all types are right: values of a wrong type can't be compared.
    """
    fields = [
        (f"{path}.{name}".lstrip("."), getattr(part, name), hint)
        for path, part in parts(recipe)
        for name, hint in typing.get_type_hints(type(part), include_extras=True).items()
    ]
    faults = [f"{path} must be {describe_type(hint)}, not {value!r}" for path, value, hint in fields if not is_a(value, hint)]
    if faults:
        return faults
    faults = [f"{path} must be {text}, not {value!r}" for path, value, hint in fields if (text := missed_range(value, hint))]
    return faults + [f"{path}: {text}".removeprefix(": ") for path, part in parts(recipe) for text in part.conflicts()]


def parts(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, part) of a recipe, whose path is empty, and of all that it holds; groups by their names: groups.head."""
    yield path, part
    for field in dataclasses.fields(part):
        value, below = getattr(part, field.name), f"{path}.{field.name}".lstrip(".")
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Checked):
                yield from parts(item, below if item is value else f"{below}.{getattr(item, 'name', '')}")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of any other type, itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def missed_range(value: Any, hint: Any) -> str:
    """In words, the annotated range that a value lies outside of, or one of a tuple's values; "" if there is none."""
    for kind in alternatives(hint):
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is tuple and isinstance(value, tuple):
            return next((text for item in value if (text := missed_range(item, arguments[0]))), "")
        if origin is Annotated and is_a(value, kind) and not in_interval(value, arguments[1]):
            words = ", ".join([*arguments[2:], describe_interval(arguments[1], value)])
            return words + (", or None" if type(None) in alternatives(hint) else "")
    return ""


def in_interval(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)": an end with a square bracket is part of it."""
    low, high = map(float, interval[1:-1].split(","))
    return (low < value or interval[0] == "[" and value == low) and (value < high or interval[-1] == "]" and value == high)


def describe_interval(interval: str, value: float) -> str:
    """An interval in words; "finite" is said of infinite values alone."""
    low, high = interval[1:-1].split(", ")
    with_low, with_high = interval[0] == "[", interval[-1] == "]"
    if high == "inf":
        return ("finite and " if math.isinf(value) else "") + (f"{low} or more" if with_low else f"above {low}")
    if with_low and with_high:
        return f"from {low} to {high}"
    return f"{'at least' if with_low else 'above'} {low} and {'at most' if with_high else 'below'} {high}"


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
    if len(alternatives(hint)) > 1:
        return " or ".join(map(describe_type, arguments))
    if origin is Annotated:
        return describe_type(arguments[0])
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return "a tuple of " + " and ".join(describe_type(kind) for kind in arguments if kind is not Ellipsis)
    return words.get(origin) or ("an " if hint.__name__[0] in "AEIOU" else "a ") + hint.__name__


def is_a(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type; an int is a float, a bool is no number, NaN is none either."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if len(alternatives(hint)) > 1:
        return any(is_a(value, kind) for kind in arguments)
    if origin is Annotated:
        return is_a(value, arguments[0])
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if Ellipsis in arguments and isinstance(value, tuple) else arguments
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(is_a, value, kinds))
    if origin is Callable:
        return callable(value)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin)
