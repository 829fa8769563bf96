"""A recipe as plain data, and back."""

import dataclasses
import json
from typing import Any

from finetune.recipe.groups import Frozen, LayerDecay
from finetune.recipe.recipe import Recipe
from finetune.recipe.schedules import Schedule


def flat(part: Any, key: str = "") -> dict[str, Any]:
    """{path: value} of nested dicts and of lists whose items have names, such as a recipe's groups."""
    if isinstance(part, list) and part and all(isinstance(item, dict) and "name" in item for item in part):
        part = {item["name"]: item for item in part}
    if not isinstance(part, dict) or not part:
        return {key: part}
    return {path: value for name, item in part.items() for path, value in flat(item, f"{key}.{name}" if key else name).items()}


def to_dict(part: Any) -> Any:
    """The resolved recipe in JSON's types; functions by their name, schedules and groups with their class as "type"."""
    if dataclasses.is_dataclass(part):
        values = {f.name: to_dict(getattr(part, f.name)) for f in dataclasses.fields(part)}
        return {"type": type(part).__name__, **values} if isinstance(part, (Schedule, LayerDecay, Frozen)) else values
    if isinstance(part, dict):
        return {key: to_dict(value) for key, value in part.items()}
    if isinstance(part, (tuple, list)):
        return [to_dict(item) for item in part]
    return f"function {part.__name__}" if callable(part) else part


def changes(before: dict[str, Any], recipe: Recipe) -> list[str]:
    """'FIELD: VALUE before, VALUE now' for each field of a recipe that differs from one resolved earlier.

    A field that did not exist then counts as having had its default.
    """
    before, now = with_defaults(before, recipe), json.loads(json.dumps(to_dict(recipe)))
    return [f"{key}: {before.get(key)} before, {now[key]} now" for key in now if before.get(key) != now[key]]


def with_defaults(resolved: Any, part: Any) -> Any:
    """A part of a recipe as resolved earlier, with the fields added that `part` has and that have defaults."""
    if isinstance(resolved, list) and isinstance(part, tuple) and len(resolved) == len(part):
        return list(map(with_defaults, resolved, part))
    if not isinstance(resolved, dict) or not dataclasses.is_dataclass(part):
        return resolved
    filled = dict(resolved)
    for field in dataclasses.fields(part):
        if field.name in filled:
            filled[field.name] = with_defaults(filled[field.name], getattr(part, field.name))
        elif field.default is not dataclasses.MISSING:
            filled[field.name] = to_dict(field.default)
    return filled
