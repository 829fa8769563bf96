"""The house: seventeen packages, arrows one way, each thing decided in one place."""

import ast
import json
import sys

import pytest
from packaging.version import Version

from finetune.recipe.load import load_recipe
from finetune.results.baseline import describe_baseline, describe_record
from helpers import ROOT

PACKAGES = [
    "utils",
    "recipe",
    "images",
    "data",
    "models",
    "optim",
    "metrics",
    "training",
    "report",
    "page",
    "results",
    "export",
    "inference",
    "tools",
    "ranking",
    "tuning",
    "cli",
]
MODULES, TESTS, RECIPES = (sorted((ROOT / part).rglob("*.py")) for part in ("finetune", "tests", "recipes"))
README = (ROOT / "README.md").read_text()


def imports(file):
    """Full names of what a file imports, at its top or inside a function."""
    found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.name for node in found for alias in node.names if isinstance(node, ast.Import)} | {
        node.module if node.level == 0 else "." for node in found if isinstance(node, ast.ImportFrom)
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_to_their_left(package):
    """A package of four to nine modules imports those to its left alone; beside inference no other imports it but cli."""
    files = sorted((ROOT / "finetune" / package).glob("*.py"))
    own = {name.split(".")[1] for file in files for name in imports(file) if name.startswith("finetune.")}
    left = {*PACKAGES[: PACKAGES.index(package) + 1], *(["run"] if package == "cli" else [])}
    assert own <= left - ({"inference"} if package in ("tools", "ranking", "tuning") else set())
    assert 4 <= len(files) - 1 <= 9 and (package == "recipe" or not files[0].read_text())  # __init__ is empty


@pytest.mark.parametrize("file", RECIPES + sorted((ROOT / "finetune" / "recipe").glob("*.py")), ids=lambda file: file.stem)
def test_recipes_stand_on_the_standard_library_alone(file):
    """Recipes, and what they import, import nothing that is slow to load."""
    foreign = {name.split(".")[0] for name in imports(file)} - sys.stdlib_module_names - {"finetune"}
    assert not foreign


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_a_contract(file):
    """A recipe's docstring has the command and the recorded number, or says that it was not measured."""
    doc = ast.get_docstring(ast.parse(file.read_text()))
    assert f"accelerate launch finetune/run.py --recipe {file.stem}" in doc
    record = ROOT / "recipes" / "baselines" / f"{file.stem}.json"
    said = describe_baseline(file, load_recipe(str(file))[0])
    if record.is_file():
        number = describe_record(json.loads(record.read_text()))
        assert number in doc
    if said.startswith("none"):
        assert "not measured" in doc.lower()


def test_ci_runs_the_readmes_commands():
    """What CI runs is what the README tells a newcomer to type."""
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -e ".[quickstart]" && accelerate launch finetune/run.py --recipe efficientnet_lite0_digits' in README
    assert 'pip install -e ".[test]" && pytest' in README
    assert "accelerate launch finetune/run.py --recipe efficientnet_lite0_digits --smoke" in ci and '".[test]" && pytest' in ci


def test_the_lowest_versions_are_those_that_are_tried():
    """Each dependency's bound in pyproject.toml is the version in constraints-lowest.txt."""
    dependencies = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(line.split(">=") for line in dependencies)
    tried = dict(line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if "#" not in line)
    assert bounds.keys() == tried.keys() and all(Version(tried[name]) == Version(bound) for name, bound in bounds.items())


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
        "weight_decay": {"groups"},  # a recipe's optimizer; param_groups are made with it, and never changed
        "requires_grad_()": {"freezing"},
        "requires_grad": {"memory_estimate"},
        "training": {"batch_norm", "memory_estimate"},
        "train()": {"batch_norm"},
    }
    for name, modules in places.items():
        assert {file.stem for file in MODULES if name in written(file)} == modules, name
    assert [file.stem for file in MODULES if '"weight_decay": decay' in file.read_text()] == ["optimizers"]
    assert [file.stem for file in MODULES if "module.training = False" in file.read_text()] == ["batch_norm"]


@pytest.mark.parametrize("file", MODULES + TESTS, ids=lambda file: file.stem)
def test_files_and_functions_stay_small(file):
    """A file is read in one sitting: no function over 90 lines, no file over 300."""
    text = file.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 90, node.name
