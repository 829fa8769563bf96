"""The recipes in recipes/: list, copy and compare them."""

import ast
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.recipe import Recipe
from finetune.recipe.load import RECIPES, load_recipe, override
from finetune.recipe.serialize import diff, from_dict, to_dict
from finetune.results.baseline import Record, describe_baseline, describe_hardware, find_record
from finetune.utils.text import WIDTH, align_columns, duration


def list_recipes() -> list[dict[str, str]]:
    """A row for each recipe: name, result, cost, then what it is made of."""
    rows = []
    for file in sorted(RECIPES.glob("*.py")):
        recipe, _ = load_recipe(str(file))
        record, _ = find_record(file, recipe)
        rows.append(
            {
                "recipe": file.stem,
                "result": describe_baseline(file, recipe).removeprefix("none: "),
                "cost": mean_duration(record) if record else "",
                "on": describe_hardware(record["hardware"]) if record else "",
                "backbone": to_dict(recipe.backbone),
                "data": f"{to_dict(recipe.data.source)}, {recipe.data.sizes}",
            }
        )
    return rows


def recipes_as_table(rows: Sequence[dict[str, str]], wide: bool = False) -> str:
    """The recipes as lines of text: name, result and cost in 80 columns, or everything."""
    columns = list(rows[0]) if wide else ["recipe", "result", "cost"]
    cells = [columns, *([row[column] for column in columns] for row in rows)]
    return align_columns(cells, width=math.inf if wide else WIDTH)


def mean_duration(record: Record) -> str:
    """How long a run of a recorded recipe took."""
    return duration(statistics.mean(run["seconds"] for run in record["runs"]))


def copy_recipe(name: str, target: Path, assignments: list[str]) -> str:
    """The text of a copy of a recipe's file, to be written to `target`, whose last line applies the assignments.

    With assignments the copy has no number: its docstring says "not measured".

    Raises:
        RecipeError: for assignments that do not fit the recipe.
    """
    recipe, file = load_recipe(name)
    override(recipe, assignments)
    text = file.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    if docstring is None:
        rest, body = "", text
    else:
        lines = text.splitlines(keepends=True)
        body = "".join(lines[ast.parse(text).body[0].end_lineno :])
        rest = docstring.partition("\n\n")[2].partition("\n\n")[2]  # what follows the title and the command
    title = (docstring or f"A copy of {name}.").strip().splitlines()[0]
    if assignments:
        rest = f"A copy of {name} with {', '.join(assignments)}: not measured.\n"
        body += f"\nfrom finetune.recipe.load import override\n\nrecipe = override(recipe, {json.dumps(assignments)})\n"
    return f'"""{title}\n\n    finetune train {target}\n\n{rest}"""\n{body}'


def compare_recipes(one: str, other: str) -> list[tuple[str, Any, Any]]:
    """(field, its value in one, in the other) for each field in which two recipes differ; either may be a run's folder."""
    return diff(find_recipe(one), find_recipe(other))


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, of that file, or of that run's folder."""
    file = Path(name) / "recipe.json"
    return from_dict(json.loads(file.read_text())) if file.is_file() else load_recipe(name)[0]
