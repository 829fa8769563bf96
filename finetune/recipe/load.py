"""Recipes by name or path, and the --set overrides of the command line."""

import argparse
import dataclasses
import importlib.util
import re
import sys
from ast import literal_eval
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_type_hints

import finetune
from finetune.recipe.checks import alternatives
from finetune.recipe.groups import Group, Optimizer
from finetune.recipe.legacy import new_names
from finetune.recipe.recipe import Recipe
from finetune.utils.errors import RecipeError
from finetune.utils.text import nearest

HERE = Path(__file__).resolve().parent.parent
RECIPES = next(folder for folder in (HERE / "recipes", HERE.parent / "recipes") if folder.is_dir())  # installed; a clone


def load_recipe(name_or_path: str) -> tuple[Recipe, Path]:
    """The recipe of that name in recipes/, or in the file of that path, and its file.

    Raises:
        RecipeError: if there is none, or the file holds no valid one.
    """
    path = Path(name_or_path)
    if path.suffix != ".py":
        path = RECIPES / f"{name_or_path}.py"
        if not path.is_file():
            names = sorted(file.stem for file in RECIPES.glob("*.py"))
            raise RecipeError(f"no recipe '{name_or_path}'.{nearest(name_or_path, names)} Recipes here: {', '.join(names)}")
    if not path.is_file():
        raise RecipeError(f"no recipe file {path}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec and spec.loader  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # so that a function in the file can be pickled to a loader's worker
    try:
        spec.loader.exec_module(module)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    except Exception as error:  # whatever a person's file raises is theirs to mend
        raise RecipeError(f"{path}{line_of(error, path)}: {explain(error)}") from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{path} is no recipe: it needs a line 'recipe = Recipe(...)'")
    return recipe, path.resolve()


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that change a recipe, wherever one is named."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="assignments",
        help="change a field of the recipe; may be given again",
    )
    parser.add_argument("--data", metavar="DIR", help="your images: train/CLASS/* and val/CLASS/*, or CLASS/*; a CSV, ...")
    parser.add_argument("--weights", metavar="FILE|none", help="a file of weights, or none for random ones")
    parser.add_argument("--seed", type=int, metavar="N", help="the recipe's seed")


def chosen_recipe(args: argparse.Namespace) -> tuple[Recipe, Path]:
    """The recipe named on the command line, changed as asked there, and its file."""
    recipe, file = load_recipe(args.recipe)
    flags = {"data.source": args.data, "weights": args.weights, "seed": args.seed}
    given = [f"{field}={value!r}" for field, value in flags.items() if value is not None]
    return override(recipe, args.assignments + given), file


def line_of(error: Exception, path: Path) -> str:
    """':LINE' of the innermost line of `path` that the error passed through."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f":{lines[-1]}" if lines else ""


def explain(error: Exception) -> str:
    """The error in one sentence; for a misspelt field, with the fields there are."""
    misspelt = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if misspelt and (kind := getattr(finetune, misspelt[1], None)):
        names = [f.name for f in dataclasses.fields(kind)]
        return f"{misspelt[1]} has no field '{misspelt[2]}'.{nearest(misspelt[2], names)} Its fields: {', '.join(names)}"
    return f"{type(error).__name__}: {error}"


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """The recipe with `path=value` texts applied: "epochs=3", "data.image_size=128", "groups.head.lr=5e-3".

    All are applied before the result is checked, so that two that only fit together may come in any order.

    Raises:
        RecipeError: for a path that does not exist, a text without '=', or values that do not fit.
    """
    changed: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise RecipeError(f"--set {assignment}: write FIELD=VALUE, such as epochs=3 or groups.head.lr=5e-3")
        field, *keys = path.split(".")
        ((field, value),) = new_names({field: parse_value(text)}).items()
        try:
            require(field, [f.name for f in dataclasses.fields(recipe)])
            part = changed.get(field, getattr(recipe, field))
            if part is None and keys:
                part = new_part(field, keys[0], value)
            changed[field] = replaced(part, keys, value)
        except RecipeError as error:
            raise RecipeError(f"--set {assignment}: {error}") from None
    try:
        return dataclasses.replace(recipe, **changed)
    except RecipeError as error:
        raise RecipeError(f"with --set {' '.join(assignments)}, {error}") from None


def new_part(field: str, key: str, value: Any) -> Any:
    """A part that the recipe does not have yet, with one of its fields set: LinearProbe(views=2) for linear_probe.views=2."""
    kinds = alternatives(get_type_hints(Recipe)[field])
    kind: Any = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    names = [f.name for f in dataclasses.fields(kind)] if kind else []
    require(key, names)
    try:
        return kind(**{key: value})
    except TypeError:
        raise RecipeError(f"the recipe has no {field} yet, and one needs more than that: {', '.join(names)}") from None


def parse_value(text: str) -> Any:
    """A Python literal, or the text itself: mixed_precision=bf16 needs no quotes."""
    try:
        value = literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return tuple(value) if isinstance(value, list) else value


def replaced(part: Any, keys: list[str], value: Any) -> Any:
    """`part` with the field that `keys` leads to replaced, through dataclasses, groups by name and optimizer options."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(part, Optimizer):  # any option may be added: the optimizer's own signature is checked later
        if rest:
            require(rest[0], [])
        return Optimizer(**{"name": part.name, "weight_decay": part.weight_decay, **part.options, key: value})
    if isinstance(part, tuple) and all(isinstance(group, Group) for group in part):
        require(key, [group.name for group in part])
        return tuple(replaced(group, rest, value) if group.name == key else group for group in part)
    require(key, [f.name for f in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else [])
    return dataclasses.replace(part, **{key: replaced(getattr(part, key), rest, value)})


def require(name: str, names: list[str]) -> None:
    """Raise RecipeError, with the nearest of `names`, if `name` is not among them."""
    if name not in names:
        there = f" There are: {', '.join(names)}" if names else " Nothing lies below it."
        raise RecipeError(f"no '{name}'.{nearest(name, names)}{there}")
