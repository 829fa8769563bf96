"""Recipes by name or path, and the --set overrides of the command line."""

import argparse
import dataclasses
import importlib.util
import re
import sys
from ast import literal_eval
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import finetune
from finetune.recipe.checks import alternatives
from finetune.recipe.data import NAMED_SETS
from finetune.recipe.groups import Group, Optimizer
from finetune.recipe.legacy import new_names
from finetune.recipe.recipe import Recipe
from finetune.recipe.schedules import Schedule
from finetune.recipe.serialize import diff, flatten, from_dict, to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.files import read_json
from finetune.utils.text import nearest
from finetune.utils.urls import check_url

HERE = Path(__file__).resolve().parent.parent
RECIPES = next(folder for folder in (HERE / "recipes", HERE.parent / "recipes") if folder.is_dir())  # installed; a clone

LOADED: dict[str, Path] = {}  # the recipe files' modules, by name

FLAGS = {  # a flag of its own for what is changed most: its field, its value, what it is
    "--data": ("data.source", "DIR", "your images: train/CLASS/* and val/CLASS/*, or CLASS/*; a CSV, ..."),
    "--epochs": ("epochs", "N", "epochs to train"),
    "--batch-size": ("data.batch_size", "N", "images of one step, over all processes"),
    "--image-size": ("data.image_size", "N|H,W", "pixels of each side of the network's input, or height,width"),
    "--lr-scale": ("lr_scale", "X", "a factor on every learning rate"),
    "--backbone": ("backbone", "NAME", "another network; the recipe's groups must fit it"),
    "--weights": ("weights", "FILE|none", "a file of weights, or none for random ones"),
    "--seed": ("seed", "N", "the recipe's seed"),
}


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
    try:
        module = load_module(path)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    except Exception as error:  # whatever a person's file raises is theirs to mend
        raise RecipeError(f"{path}{line_of(error, path)}: {explain(error)}") from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{path} is no recipe: it needs a line 'recipe = Recipe(...)'")
    return recipe, path.resolve()


def load_module(path: Path) -> ModuleType:
    """The module of a recipe's file, under a name at which pickle finds what the file defines."""
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec and spec.loader  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    LOADED[module.__name__] = path.resolve()
    return module


class RecipeModules:
    """Unpickled in another process, it loads the recipe files of this one: what they define can then be unpickled, too."""

    def __reduce__(self) -> tuple[Any, ...]:
        return load_modules, (dict(LOADED),)


def load_modules(files: dict[str, Path]) -> None:
    for name, path in files.items():
        if name not in sys.modules:
            load_module(path)


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
    for flag, (_, metavar, words) in FLAGS.items():
        parser.add_argument(flag, metavar=metavar, help=words)


def check_source(data: Any) -> None:
    """Raise RecipeError for images that are not there, and for a named set that a folder here is called like."""
    if not isinstance(data, str | Path) or check_url(data):
        return
    name, there = str(data), Path(data).exists()
    if name in NAMED_SETS and there:
        raise RecipeError(
            f"'{name}' is a named set, and a folder here: --data ./{name} is the folder; for the set, start from another "
            f"folder, or write --set data.source={name} where a recipe is named"
        )
    if Path(data).is_file() and not name.lower().endswith((".csv", ".zip")):
        raise RecipeError(describe_file(name))
    if not there and name not in (*NAMED_SETS, "generated") and not name.startswith(("torchvision/", "hf/")):
        raise RecipeError(
            f"no data set or folder '{name}'.{nearest(name, NAMED_SETS)} Wanted: a folder with CLASS/*.jpg, or with "
            f"train/CLASS/*.jpg and val/CLASS/*.jpg; a .csv; {', '.join(NAMED_SETS)}, torchvision/NAME, hf/NAME"
        )


def describe_file(name: str) -> str:
    """What is wanted in place of a file that holds no table."""
    more = ": unpack it" if name.lower().endswith((".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")) else ""
    return f"'{name}' is a file{more}. Wanted: a folder of images, or a table saved as .csv, its cells divided by commas"


def flag_name(flag: str) -> str:
    """What argparse calls a flag's value: batch_size for --batch-size."""
    return flag.lstrip("-").replace("-", "_")


def chosen_recipe(args: argparse.Namespace) -> tuple[Recipe, Path | None, str]:
    """(recipe, file, name) of the recipe named on the command line, changed as asked there; a Recipe itself has no file."""
    recipe, file = (args.recipe, None) if isinstance(args.recipe, Recipe) else load_recipe(str(args.recipe))
    check_source(args.data)
    return override(recipe, assignments_of(args)), file, file.stem if file else "recipe"


def assignments_of(args: argparse.Namespace) -> list[str]:
    """All that a command line changes in a recipe, in the words of --set."""
    given = {field: getattr(args, flag_name(flag)) for flag, (field, *_) in FLAGS.items()}
    text = {"data.source", "weights", "backbone"}  # of any look: a folder may be called 2024
    said = {field: repr(str(value)) if field in text else value for field, value in given.items() if value is not None}
    return [*args.assignments, *(f"{field}={value}" for field, value in said.items())]


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
        *above, last = path.split(".")
        ((last, value),) = new_names({last: parse_value(text)}).items()
        field, *keys = *above, last
        try:
            require(field, [f.name for f in dataclasses.fields(recipe)], similar_paths(field, recipe))
            part = changed.get(field, getattr(recipe, field))
            if part is None and keys:
                part = new_part(field, keys[0], value)
            changed[field] = replaced(part, keys, value, get_type_hints(Recipe)[field])
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


def replaced(part: Any, keys: list[str], value: Any, hint: Any = Any) -> Any:
    """`part`, of a field annotated with `hint`, with the field that `keys` leads to replaced.

    Through dataclasses, groups by name and optimizer options. Where a field takes None, "none" is None; where it takes an
    optimizer or a schedule, its name alone changes the kind and keeps weight decay and warmup: optimizer=SGD.
    """
    if not keys:
        return plain_value(part, value, alternatives(hint))
    key, rest = keys[0], keys[1:]
    if isinstance(part, Optimizer):  # any option may be added: the optimizer's own signature is checked later
        options = {"name": part.name, "weight_decay": part.weight_decay, **part.options}
        return Optimizer(**{**options, key: replaced(options.get(key), rest, value)})
    if isinstance(part, tuple) and all(isinstance(group, Group) for group in part):
        require(key, [group.name for group in part])
        return tuple(replaced(group, rest, value) if group.name == key else group for group in part)
    require(key, [f.name for f in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else [])
    return dataclasses.replace(part, **{key: replaced(getattr(part, key), rest, value, get_type_hints(type(part))[key])})


def plain_value(part: Any, value: Any, kinds: tuple[Any, ...]) -> Any:
    """A value as the command line gives it, as its field takes it."""
    if not isinstance(value, str):
        return value
    if type(None) in kinds and value.lower() in ("none", "null"):
        return None
    if Optimizer in kinds:
        return Optimizer(value, weight_decay=part.weight_decay if part else 0.0)
    if Schedule in kinds:
        schedules = {name: kind for name in finetune.__all__ if is_schedule(kind := getattr(finetune, name))}
        require(value, list(schedules))
        try:
            return schedules[value](warmup_epochs=part.warmup_epochs if part else 0.0)
        except TypeError:
            fields = ", ".join(f.name for f in dataclasses.fields(schedules[value]))
            raise RecipeError(
                f"{value} needs fields of its own: write it into the recipe's file. Its fields: {fields}"
            ) from None
    return value


def is_schedule(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Schedule) and kind is not Schedule


def similar_paths(name: str, recipe: Recipe) -> list[str]:
    """The paths of a recipe's fields that are called so, or with more words: lr_scale and groups.head.lr for lr."""
    paths = {path: path.rpartition(".")[2] for path in flatten(to_dict(recipe))}
    same = [path for path, end in paths.items() if end == name or end.startswith(f"{name}_") or end.endswith(f"_{name}")]
    return sorted(same, key=lambda path: path.count("."))


def require(name: str, names: list[str], paths: Sequence[str] = ()) -> None:
    """Raise RecipeError, with `paths` that may be meant, or the nearest of `names`, if `name` is not among these."""
    if name not in names:
        hint = f" Did you mean {' or '.join(paths[:3])}?" if paths else nearest(name, names)
        there = f" There are: {', '.join(names)}" if names else " Nothing lies below it."
        raise RecipeError(f"no '{name}'.{hint}{there}")


def recipe_of_run(run: Path) -> tuple[Recipe, Path, dict[str, Any]]:
    """(the recipe of a run, its recipe.py, the fields in which the run differs from that file, by path).

    Raises:
        RecipeError: if the two together are not what was run: recipe.py was changed since.
    """
    recipe = from_dict(read_json(run / "recipe.json"))
    if not (run / "recipe.py").is_file():  # it was made in a program
        return recipe, run / "recipe.json", {}
    own, file = load_recipe(str(run / "recipe.py"))
    changed = {path: now for path, _, now in diff(own, recipe) if now != "-"}
    # An optimizer's options by their own names; another kind of schedule by its name, before its fields.
    changed = {path.replace(".options.", ".").removesuffix(".type"): value for path, value in changed.items()}
    again = override(own, [f"{path}={value!r}" for path, value in changed.items()])
    if diff(again, recipe):
        raise RecipeError(f"{run / 'recipe.py'} was changed after the run")
    return again, file, changed
