"""The recipes in recipes/: listed, copied, compared."""

import ast
import json
from pathlib import Path

from finetune.recipe import Recipe
from finetune.recipe.load import RECIPES, load_recipe, override
from finetune.recipe.serialize import diff, from_dict, to_dict
from finetune.results.baseline import Record, describe_baseline, kept_record, place


def list_recipes() -> list[tuple[str, ...]]:
    """A row for each recipe: name, backbone, data, baseline, cost."""
    rows: list[tuple[str, ...]] = [("recipe", "backbone", "data", "baseline", "cost")]
    for file in sorted(RECIPES.glob("*.py")):
        recipe, _ = load_recipe(str(file))
        record, _ = kept_record(file, recipe)
        data = f"{to_dict(recipe.data.source)}, {recipe.data.image_size} px"
        baseline = describe_baseline(file, recipe).removeprefix("none: ")
        rows.append((file.stem, to_dict(recipe.backbone), data, baseline, cost(record) if record else ""))
    return rows


def cost(record: Record) -> str:
    """What a run of a recorded recipe took: minutes, and on what."""
    minutes = sum(run["seconds"] for run in record["runs"]) / len(record["runs"]) / 60
    return f"{minutes:.1f} min, {place(record['hardware'])}"


def copy_recipe(name: str, target: Path, assignments: list[str]) -> str:
    """The text of a recipe's file as a file of your own, `target`: with a last line that applies the assignments.

    The copy's number is not its original's: with assignments its docstring says "not measured".

    Raises:
        RecipeError: for assignments that do not fit the recipe.
    """
    recipe, file = load_recipe(name)
    override(recipe, assignments)
    text = file.read_text()
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
    return f'"""{title}\n\n    accelerate launch -m finetune.run --recipe {target}\n\n{rest}"""\n{body}'


def compare_recipes(one: str, other: str) -> list[tuple[str, str, str]]:
    """(field, its value in one, in the other) for each field in which two recipes differ; a run's folder is a recipe, too."""
    return [(path, str(a), str(b)) for path, a, b in diff(recipe_of(one), recipe_of(other))]


def recipe_of(name: str) -> Recipe:
    """A recipe by name, by file, or as a run's folder has it."""
    file = Path(name) / "recipe.json"
    return from_dict(json.loads(file.read_text())) if file.is_file() else load_recipe(name)[0]
