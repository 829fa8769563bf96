"""The recipes that are here: listed, shown, copied, compared."""

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import finetune
from finetune.recipe import Optimizer
from finetune.recipe.load import RECIPES, load_recipe, override, parsed
from finetune.recipe.recipe import METRICS
from finetune.recipe.serialize import flat, to_dict
from finetune.results.baseline import IMPORT, Record, place, promise
from finetune.utils.errors import RecipeError


def listing() -> list[tuple[str, ...]]:
    """A row for each recipe: name, backbone, data, promised number, cost."""
    rows: list[tuple[str, ...]] = [("recipe", "backbone", "data", "promised", "cost")]
    for file in sorted(RECIPES.glob("*.py")):
        recipe, _ = load_recipe(str(file))
        record = file.parent / "baselines" / f"{file.stem}.json"
        promised = promise(file, recipe).removeprefix("nothing: ")
        paid = cost(json.loads(record.read_text())) if promised.startswith(tuple(METRICS.values())) else ""
        data = f"{to_dict(recipe.data.source)}, {recipe.data.image_size} px"
        rows.append((file.stem, to_dict(recipe.backbone), data, promised, paid))
    return rows


def cost(record: Record) -> str:
    """What a run of a recorded recipe took: minutes, and on what."""
    minutes = sum(run["seconds"] for run in record["runs"]) / len(record["runs"]) / 60
    return f"{minutes:.1f} min, {place(record['hardware'])}"


def copied(name: str, target: Path, assignments: list[str]) -> str:
    """The text of a recipe's file as it is to stand in `target`, with the assignments written into it.

    Raises:
        RecipeError: if they can't be: a field that is computed in the file, say.
    """
    recipe, file = load_recipe(name)
    wanted = override(recipe, assignments)
    text = file.read_text()
    for assignment in assignments:
        path, _, value = assignment.partition("=")
        written = json.dumps(value) if parsed(value) == value else value if not value.startswith("[") else repr(parsed(value))
        text = with_field(text, path.split("."), written)
    if assignments:  # its number is not the copy's
        text = text.partition("\nbaseline = Baseline(")[0].replace(IMPORT, "")
    docstring = ast.parse(text).body[0]
    match docstring:
        case ast.Expr(ast.Constant(str(words))):
            first = words.strip().splitlines()[0]
            changed = f" with {', '.join(assignments)}: not measured" if assignments else ""
            kept = words.partition("\n\n")[2].partition("\n\n")[2]
            origin = f"A copy of {name}{changed}.\n" if assignments else kept
            new = f'"""{first}\n\n    accelerate launch -m finetune.run --recipe {target}\n\n{origin}"""'
            text = replaced_at(text, docstring, new)
    scope = {"__name__": "copied"}
    exec(compile(text, str(target), "exec"), scope)
    if to_dict(scope["recipe"]) != to_dict(wanted):
        raise RecipeError(
            f"{' '.join(assignments)} can't be written into {file.name}, where that is computed: copy it "
            "without, and change the copy by hand"
        )
    return text


def with_field(text: str, keys: list[str], value: str) -> str:
    """A recipe's source with the field that `keys` lead to set to the source text `value`."""
    lines = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    call = next((line.value for line in lines if ast.unparse(line.targets[0]) == "recipe"), ast.Constant(None))
    for i, key in enumerate(keys):
        if isinstance(call, ast.Tuple):  # rows, by their names
            names = [argument(row, "name") for row in call.elts]
            found = next(
                (row for row, name in zip(call.elts, names, strict=True) if name and ast.unparse(name) == repr(key)), None
            )
        else:
            found = argument(call, key)
        if found is None and (i < len(keys) - 1 or not isinstance(call, ast.Call)):
            raise RecipeError(f"no {'.'.join(keys[: i + 1])} is written in the file: copy it, and change the copy by hand")
        if found is None:
            inside = source(text, call)[:-1].rstrip()
            if inside.endswith(","):  # a field a line
                return replaced_at(text, call, f"{inside}\n{' ' * 4}{key}={value},\n)")
            return replaced_at(text, call, f"{inside}{'' if inside.endswith('(') else ', '}{key}={value})")
        call = found
    return replaced_at(text, call, value)


def argument(call: ast.expr, name: str) -> ast.expr | None:
    """The source of a field in a dataclass's call, by keyword or by position."""
    if not isinstance(call, ast.Call):
        return None
    called = ast.unparse(call.func)
    kind = getattr(finetune, called, None)
    if kind is None:
        raise RecipeError(f"{name} is computed in the file, by {called}: copy it, and change the copy by hand")
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    if not dataclasses.is_dataclass(kind) or kind is Optimizer:
        return None
    names = [field.name for field in dataclasses.fields(kind)]
    return call.args[names.index(name)] if name in names[: len(call.args)] else None


def replaced_at(text: str, node: ast.expr | ast.stmt, new: str) -> str:
    """Source text with a node's own text replaced."""
    whole = text.encode()  # columns count bytes
    start = sum(len(line) for line in whole.splitlines(keepends=True)[: node.lineno - 1]) + node.col_offset
    end = start + len(source(text, node).encode())
    return (whole[:start] + new.encode() + whole[end:]).decode()


def source(text: str, node: ast.expr | ast.stmt) -> str:
    """A node's own text."""
    own = ast.get_source_segment(text, node)
    assert own is not None  # as for every node that was parsed
    return own


def differences(one: str, other: str) -> list[tuple[str, str, str]]:
    """(field, its value in one, in the other) for each field in which two recipes differ; a run's folder is a recipe, too."""
    a, b = (flat(resolved(name)) for name in (one, other))
    pairs = [(key, str(a.get(key, "-")), str(b.get(key, "-"))) for key in dict.fromkeys([*a, *b])]
    return [pair for pair in pairs if pair[1] != pair[2]]


def resolved(name: str) -> dict[str, Any]:
    """A recipe as plain data: by name, by file, or as a run's folder has it."""
    record = Path(name) / "recipe.json"
    return json.loads(record.read_text()) if record.is_file() else to_dict(load_recipe(name)[0])
