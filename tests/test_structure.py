"""The house rules that a reader relies on, read off the sources."""

import ast
import json
import re
import sys

import pytest

from conftest import ROOT
from finetune.baseline import promise, summary
from finetune.recipe_file import load_recipe

LIGHT = (
    "recipe",
    "recipe_checks",
    "recipe_table",
    "recipe_data",
    "lr_schedule",
    "recipe_file",
    "run_folder",
    "baseline",
    "reproduce",
)
MODULES = sorted((ROOT / "finetune").glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
README = (ROOT / "README.md").read_text()
LAYERS = [
    {"lr_schedule", "recipe_checks"},
    {"recipe_table", "recipe_data"},
    {"recipe"},
    {"recipe_file"},
    {"run_folder"},
    {"baseline"},
    {"shelf", "reproduce"},
    {"weights", "backbone", "image_data", "image_lists", "image_memory", "data_sources", "batches", "processes", "trackers"},
    {
        "param_groups",
        "optimizers",
        "unfreeze",
        "augment",
        "objective",
        "scores",
        "run_record",
        "checkpoint",
        "saved_model",
        "model_card",
    },
    {"memory", "memory_plan", "folding", "linear_probe", "assemble", "train_loop"},
    {"plan"},
    {"plots"},
    {"report", "lr_finder", "other_loops", "predict", "export", "image_facts", "suggest"},
    {"run", "__main__"},
]


def imports(file):
    """Full names of what a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "finetune"}
    return names


def own(file):
    return {name.split(".")[1] for name in imports(file) if name.startswith("finetune.")}


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_imports_go_one_way(file):
    """No module imports one of a layer above its own; nothing imports run or recipes."""
    if file.stem == "__init__":
        assert not imports(file)
        return
    layer = next(i for i, names in enumerate(LAYERS) if file.stem in names)
    assert own(file) <= set().union(*LAYERS[: layer + 1]) - {file.stem}
    assert not any(name.split(".")[0] == "recipes" for name in imports(file))
    assert file.stem == "run" or "run" not in own(file)


def test_imports_have_no_cycle():
    """The modules can be put in an order in which each imports only earlier ones."""
    left = {file.stem: own(file) for file in MODULES}
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize("file", RECIPES + [ROOT / "finetune" / f"{name}.py" for name in LIGHT], ids=lambda file: file.stem)
def test_recipes_stand_on_the_standard_library_alone(file):
    """Recipes, and what they import, import nothing that is slow to load."""
    foreign = {name.split(".")[0] for name in imports(file)} - sys.stdlib_module_names - {"finetune"}
    assert not foreign


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_a_contract(file):
    """A recipe's docstring and its row have its number, as recorded, and say so if it is not that of the recipe itself."""
    doc = ast.get_docstring(ast.parse(file.read_text()))
    assert f"accelerate launch finetune/run.py --recipe {file.stem}" in doc
    record = ROOT / "recipes" / "baselines" / f"{file.stem}.json"
    said = promise(file, load_recipe(str(file))[0])
    row = next(line for line in README.splitlines() if line.startswith(f"| `{file.stem}`"))
    if record.is_file():
        number = summary(json.loads(record.read_text()))
        assert number in doc and number in row
    if said.startswith("nothing"):
        assert "not measured" in doc.lower() and "not measured" in row


def test_the_readme_lists_every_file_with_its_own_first_line():
    """The README's file tree is the modules' docstrings."""
    for file in MODULES:
        if file.stem != "__init__":
            first = ast.get_docstring(ast.parse(file.read_text())).splitlines()[0]
            assert re.search(rf"^\s+{file.name}\s+{re.escape(first)}$", README, re.M), f"{file.name}: {first}"


def test_ci_runs_the_readmes_commands():
    """What CI runs is what the README tells a newcomer to type."""
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -e ".[quickstart]" && accelerate launch finetune/run.py --recipe efficientnet_lite0_digits' in README
    assert 'pip install -e ".[test]" && pytest' in README
    assert "accelerate launch finetune/run.py --recipe efficientnet_lite0_digits --smoke" in ci and '".[test]" && pytest' in ci


def written(file):
    """Keys and attributes that a module assigns to, and methods it calls, however spelt: `lr`, `requires_grad_()`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(getattr(node.slice, "value", None) if isinstance(node, ast.Subscript) else node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found |= {f"{node.func.attr}()", *(word.arg for word in node.keywords if node.func.attr == "update")}
    return found


def test_each_thing_is_decided_in_one_place():
    """Rates, decays, requires_grad and norms' modes are each written in one module; the memory plan gives back what was."""
    places = {
        "lr": {"param_groups"},
        "weight_decay": set(),  # made with an optimizer's rows, and never changed
        "requires_grad_()": {"unfreeze"},
        "requires_grad": {"memory_plan"},
        "training": {"memory_plan"},
        "train()": {"unfreeze"},
    }
    for name, modules in places.items():
        assert {file.stem for file in MODULES if name in written(file)} == modules, name
    assert [file.stem for file in MODULES if '"weight_decay": decay' in file.read_text()] == ["optimizers"]
    assert [file.stem for file in MODULES if "module.eval()" in file.read_text()] == ["unfreeze"]


@pytest.mark.parametrize("file", MODULES + TESTS, ids=lambda file: file.stem)
def test_files_and_functions_stay_small(file):
    """A file is read in one sitting: no function over 90 lines, no file over 300."""
    text = file.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 90, node.name
