"""Recipes listed, shown, copied, checked and compared; and all of it from the wheel, in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

from finetune.__main__ import main
from finetune.recipe import LayerDecay
from finetune.recipe.load import load_recipe, override
from finetune.recipe.serialize import to_dict
from finetune.results.baseline import describe_baseline, describe_record
from finetune.run import main as run_recipe
from finetune.tools.library import compare_recipes, mean_duration
from helpers import RECIPES, ROOT

CHANGES = [
    "epochs=7",
    "data.image_size=96",
    "data.sampling=balanced",
    "augment.erasing=0.25",
    "optimizer.weight_decay=0.1",
    "optimizer.betas=[0.9, 0.95]",
    "schedule.warmup_epochs=1.5",
    "clip_value=0.5",
    "seed=3",
    "mixed_precision=no",
]
UNFIT = {"resnet18_steel": "data.sampling", "resnet18_xray": "augment.erasing"}  # numbers have no classes, arrays no such noise


def test_ls_has_every_recipe_at_once():
    """Every recipe with its number and cost, without waiting for torch."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "finetune", "ls"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert " torch" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == RECIPES
    digits = next(line for line in lines if line.startswith("efficientnet_lite0_digits"))
    record = json.loads((ROOT / "recipes" / "baselines" / "efficientnet_lite0_digits.json").read_text())
    for cell in (describe_record(record), mean_duration(record)):
        assert cell in digits
    assert next(line for line in lines if line.startswith("resnet50_cifar100")).split()[-2:] == ["not", "measured"]


def test_ls_fits_80_columns_and_wide_has_it_all(capsys):
    """No line is longer than 80 columns; --wide has every cell whole, and so has --json."""
    assert main(["ls"]) == 0
    short = capsys.readouterr().out.splitlines()
    assert main(["ls", "--wide"]) == 0
    wide = capsys.readouterr().out.splitlines()
    assert main(["ls", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert max(map(len, short)) <= 80 and len(short) == len(wide) == len(rows) + 1
    for row, short_line, line in zip(rows, short[1:], wide[1:], strict=True):
        assert all(cell in line for cell in row.values()) and row["recipe"] in short_line and row["cost"] in short_line
    assert {"recipe", "result", "cost", "on", "backbone", "data"} == set(rows[0])


def test_show_prints_the_file(capsys):
    """show prints a recipe's file, byte for byte."""
    assert main(["show", "resnet18_cifar"]) == 0
    assert capsys.readouterr().out == (ROOT / "recipes" / "resnet18_cifar.py").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_a_copy_is_the_recipe(here, name):
    """A copied file resolves to the same recipe, passes validate, keeps its baseline, and names its own command."""
    assert main(["cp", name, "mine.py"]) == 0
    copy, file = load_recipe("mine.py")
    original, first = load_recipe(name)
    assert to_dict(copy) == to_dict(original) and compare_recipes(name, "mine.py") == []
    assert "finetune train mine.py" in file.read_text()
    if not describe_baseline(first, original).startswith("none"):
        assert describe_baseline(file, copy) == describe_baseline(first, original)
    else:
        assert describe_baseline(file, copy).startswith("none")
    assert main(["validate", "mine.py"]) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_changes_are_written_into_the_copy(here, name):
    """With --set the copy resolves to what override makes of the original, and says that it is not measured."""
    by_layer = isinstance(load_recipe(name)[0].groups, LayerDecay)
    groups = ["groups.head_lr=3e-3"] if by_layer else ["groups.head.lr=3e-3", "groups.head.weight_decay=0.0"]
    changes = [change for change in CHANGES + groups if change.partition("=")[0] != UNFIT.get(name)]
    arguments = [word for change in changes for word in ("--set", change)]
    assert main(["cp", name, "mine.py", *arguments]) == 0
    copy, file = load_recipe("mine.py")
    assert to_dict(copy) == to_dict(override(load_recipe(name)[0], changes))
    text = file.read_text()
    about = text.partition("from finetune")[0]
    assert "3e-3" in text and "not measured" in text and "%" not in about and "seeds)" not in about
    assert describe_baseline(file, copy) == "none: not measured"
    assert dict((field, now) for field, _, now in compare_recipes(name, "mine.py"))["epochs"] == 7


def test_what_a_recipe_computes_is_changed_too(here):
    """A field that the file computes, or takes from a function, is changed in the copy as any other."""
    text = (
        (ROOT / "recipes" / "resnet18_cifar.py")
        .read_text()
        .replace('data=Data("cifar10", image_size=128, batch_size=128, crop_pct=1.0)', "data=made(64)")
    )
    made = "def made(width):\n    return Data('cifar10', width, 256)\n\n\nrecipe = Recipe("
    (here / "odd.py").write_text(text.replace("recipe = Recipe(", made))
    assert load_recipe("odd.py")[0].data.image_size == 64
    assert main(["cp", "odd.py", "mine.py", "--set", "data.batch_size=32"]) == 0
    data = load_recipe("mine.py")[0].data
    assert (data.image_size, data.batch_size) == (64, 32)


def test_a_copy_runs_from_any_folder(here):
    """A changed copy, by its path, trains in a folder where nothing else is."""
    changes = ["data.image_size=32", "weights=none", "epochs=1", "linear_probe=None"]
    arguments = [word for change in changes for word in ("--set", change)]
    assert main(["cp", "efficientnet_lite0_digits", "mine.py", *arguments]) == 0
    assert run_recipe(["--recipe", str(here / "mine.py"), "--output", "run"]) == 0
    assert sorted(path.name for path in here.iterdir()) == ["mine.py", "run"]
    assert main(["diff", "run", "mine.py"]) == 0


@pytest.mark.parametrize(
    "arguments,fault",
    [
        (["cp", "resnet81_cifar", "mine.py"], "Did you mean resnet18_cifar?"),
        (["cp", "resnet18_cifar", "there.py"], "there.py is there already"),
        (["cp", "resnet18_cifar", "mine"], "mine is no .py file"),
        (["cp", "resnet18_cifar", "mine.py", "--set", "epoch=3"], "Did you mean epochs?"),
        (["validate", "there.py"], "there.py is no recipe"),
        (["diff", "resnet18_cifar", "nowhere.py"], "no recipe file nowhere.py"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(here, capsys, arguments, fault):
    """Exit code 2, one message, no file."""
    (here / "there.py").write_text("x = 1\n")
    assert main(arguments) == 2
    assert fault in capsys.readouterr().err and [path.name for path in here.iterdir()] == ["there.py"]


def test_diff_names_the_fields(here, capsys):
    """Two recipes are compared field by field, groups by their names, and a run's folder stands for its recipe."""
    main(["cp", "resnet18_cifar", "mine.py", "--set", "groups.layer4.lr=1e-4"])
    (here / "run").mkdir()
    (here / "run" / "recipe.json").write_text(json.dumps(to_dict(load_recipe("mine.py")[0])))
    capsys.readouterr()
    for other in ("mine.py", "run"):
        assert main(["diff", "resnet18_cifar", other]) == 0
        assert capsys.readouterr().out.splitlines()[1].split() == ["groups.layer4.lr", "0.003", "0.0001"]
    assert main(["diff", "run", "mine.py"]) == 0
    assert capsys.readouterr().out == "no difference\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, made from a copy of the repository without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("finetune", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    words = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder)]
    subprocess.run([sys.executable, "-m", *words], check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_works_in_an_empty_folder(wheel, tmp_path):
    """Installed from the wheel alone, outside the repository: list, copy, change, validate, smoke-run as a newcomer would."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {f"finetune/recipes/{name}.py" for name in RECIPES} <= set(names)
    assert "finetune/recipes/baselines/efficientnet_lite0_digits.json" in names
    venv.create(tmp_path / "env", system_site_packages=False, with_pip=False)
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # The other packages are this environment's: a second copy of torch would only take minutes and gigabytes.
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    python, work = tmp_path / "env" / "bin" / "python", tmp_path / "work"
    work.mkdir()

    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words):
        done = subprocess.run([str(python), *words], cwd=work, capture_output=True, text=True, env=alone)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import finetune.recipe.load as f; print(f.RECIPES)").strip()
    assert where == str(site / "finetune" / "recipes")
    assert "resnet18_cifar" in run("-m", "finetune", "ls")
    run("-m", "finetune", "cp", "efficientnet_lite0_digits", "mine.py", "--set", "epochs=9")
    assert "mine.py is a valid recipe" in run("-m", "finetune", "validate", "mine.py")
    launch = "accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    assert "SMOKE RUN" in run("-m", *launch.split(), "-m", "finetune.run", "--recipe", "mine.py", "--smoke")
    run("-m", "finetune", "show", "resnet18_cifar")
