"""Run folders: a new one, or one to go on with; the lock on it and its first files."""

import argparse
import ast
import errno
import hashlib
import json
import math
import os
import re
import sys
import sysconfig
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, TextIO

from finetune.recipe import Recipe
from finetune.recipe.load import FLAGS, check_source, flag_name, override, recipe_of_run
from finetune.recipe.serialize import diff, flatten, from_dict, to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_folder, file_digest, read_json, write_file
from finetune.utils.text import print_error

if sys.platform != "win32":  # on Windows two runs in one folder are not told apart
    import fcntl

CHECKPOINT = re.compile(r"step-\d{8,}-epochs-\d{5,}")  # the name of one; whatever else lies beside it is not the run's

# Beside its lock, all that a run which died before it started can have left.
RESUME_FLAGS = ("--data", "--epochs")  # what a resumed run may be given: where its images lie now, and more epochs
FIRST_FILES = ("images.csv", "recipe.py", "run.json", "groups.txt", "recipe.json")
LEFTOVERS = {".lock", ".recipe.json", *FIRST_FILES[:-1], *(f".{name}.tmp" for name in FIRST_FILES)}


def new_run_dir(name: str, output: Path | None) -> Path:
    """The folder `output`, or runs/NAME-TIME; not made yet.

    Raises:
        RecipeError: if there is something in it.
    """
    folder = output or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_folder(folder)
    if folder.exists():
        there = {path.name for path in folder.iterdir()}
        if there - (LEFTOVERS if ".lock" in there else set()):
            what = "a run" if (folder / "recipe.json").exists() else "files"
            raise RecipeError(
                f"output folder {folder} already holds {what}; name another --output, or go on with the run in it: --resume"
            )
    return folder


def unfinished_run_dir(name: str, folder: Path | None, epochs: float = 0, recipe: Recipe | None = None) -> Path:
    """The folder of a run to go on with: `folder`, or the newest unfinished one of that name in runs/, of this very `recipe`
    if there is one.

    A run that finished is unfinished where `epochs` asks for more than it did.

    Raises:
        RecipeError: if there is none, or it is finished.
    """
    if folder is None:
        files = Path("runs").glob(f"{name}-*/recipe.json")
        runs = [file.parent for file in files if run_name(file.parent) == name and not epochs_done(file.parent)]
        folder = max(runs, default=None, key=lambda run: (is_of(run, recipe), (run / "recipe.json").stat().st_mtime))
    if folder is None or not (folder / "recipe.json").is_file():
        raise RecipeError(f"no run to resume in {folder or 'runs/'}; name its folder: --resume DIR")
    if done := epochs_done(folder):
        if epochs <= done:
            more = f"for more than its {done} epochs: finetune resume {folder} --epochs N"
            raise RecipeError(f"the run in {folder} is finished: nothing to resume; {more}")
        if newest_checkpoint(folder) is None:
            raise RecipeError(f"the run in {folder} is finished, and has no checkpoint any more to go on from")
    return folder


def resumed_recipe(args: argparse.Namespace) -> tuple[Recipe, Path | None, str]:
    """(recipe, file, name) of a run to go on with, which keeps all that it was started with but for RESUME_FLAGS."""
    given = [flag for flag in FLAGS if flag not in RESUME_FLAGS and getattr(args, flag_name(flag)) is not None]
    given += ["--set"] * bool(args.assignments)
    if given:
        raise RecipeError(f"a resumed run keeps its recipe: leave out {', '.join(given)}, or name the --recipe as well")
    folder = unfinished_run_dir("", Path(args.resume), math.inf if args.epochs else 0)
    recipe, file, _ = recipe_of_run(folder)
    if not args.resume_anyway:
        check_same_recipe(folder, recipe, file)
    check_source(args.data)
    changes = [f"epochs={args.epochs}"] * bool(args.epochs) + [f"data.source={args.data!r}"] * bool(args.data)
    return override(recipe, changes), file, run_name(folder)


def is_of(run: Path, recipe: Recipe | None) -> bool:
    """Whether a run was started with this recipe."""
    try:
        return recipe is not None and not diff(from_dict(read_json(run / "recipe.json")), recipe)
    except RecipeError:
        return False


def epochs_done(folder: Path) -> int:
    """The epochs of a finished run; 0 of one that is not."""
    file = folder / "result.json"
    return int(read_json(file).get("epochs", 1)) if file.is_file() else 0


def find_run(name: str, state: str = "") -> Path:
    """A run's folder: a path, or of those in runs/ the newest ("last") or the newest whose name starts with `name`.

    `state` "unfinished" or "finished" leaves out all others, but for a path.

    Raises:
        RecipeError: if there is none, with the runs there are.
    """
    if (Path(name) / "recipe.json").is_file() or Path(name).is_dir() and name != "last":
        return Path(name)
    there = sorted((path.parent for path in Path("runs").glob("*/recipe.json")), key=lambda path: path.stat().st_mtime)
    if state:
        there = [path for path in there if (path / "result.json").is_file() == (state == "finished")]
    fitting = [path for path in there if name == "last" or path.name.startswith(name)]
    if not fitting:
        names = ", ".join(path.name for path in there[-5:]) or "none"
        raise RecipeError(f"no{' ' * bool(state)}{state} run '{name}' here or in runs/. The latest there: {names}")
    return fitting[-1]


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    return max((path for path in (run / "checkpoints").glob("step-*") if CHECKPOINT.fullmatch(path.name)), default=None)


def lock(folder: Path) -> TextIO:
    """Keep other processes' runs out of a folder while the returned file is open, which ends with this process however it dies.

    Raises:
        RecipeError: if a run that is alive has it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115  (stays open as long as the lock is held)
    except OSError as error:
        raise RecipeError(f"can't write to {folder}: {error.strerror}; name another --output") from None
    try:
        if sys.platform != "win32":
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a loader's orphaned workers would go on holding it
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.seek(0)
            holder = file.read().strip()
            raise RecipeError(f"process {holder} is alive and writes its run to {folder}; name another --output") from None
        print_error(f"{folder} can't be locked ({error.strerror}): see to it that no other run writes there")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def start_run_dir(folder: Path, recipe_file: Path | None, name: str, recipe: Recipe, groups: str, data: dict[str, Any]) -> None:
    """Write a run's first files: how it was started and on which `data`, the recipe as given and resolved, and its groups.

    recipe.json, written last, makes it a run; it is not finished then. A recipe made in a program has no recipe.py.
    """
    if recipe_file and recipe_file.resolve() != (folder / "recipe.py").resolve():
        write_file(folder / "recipe.py", recipe_file.read_bytes())
    command, now = [Path(sys.argv[0]).name, *sys.argv[1:]], time.strftime("%Y-%m-%d %H:%M:%S")
    code = {"code": code_digest(recipe_file), "modules": module_digests(recipe_file), "weights": weights_digest(recipe)}
    started = {"name": name, "command": command, "started": now, **data, **code}
    write_file(folder / "run.json", json.dumps(started, indent=1) + "\n")
    write_file(folder / "groups.txt", groups + "\n")
    (folder / "result.json").unlink(missing_ok=True)
    write_file(folder / "recipe.json", json.dumps(to_dict(recipe), indent=1) + "\n")


def started(folder: Path) -> dict[str, Any]:
    """How a run was started, as `start_run_dir` writes it; an older run, or a cut file, lacks some."""
    try:
        return read_json(folder / "run.json")
    except (OSError, RecipeError):
        return {}


def run_name(folder: Path) -> str:
    """The name of the recipe that a run was started with; of a run of version 0.1, what its folder's name says."""
    return str(started(folder).get("name") or re.sub(r"-\d{8}-\d{6}$", "", folder.resolve().name))


def weights_digest(recipe: Recipe) -> str:
    """A digest of the file of weights that a recipe starts from; "" for other weights."""
    return file_digest(recipe.weights) if Path(recipe.weights).is_file() else ""


def code_digest(file: Path | None) -> str:
    """A digest of a recipe file's code: all that its functions may be made of, but neither comments nor the recipe's fields."""
    if file is None or file.suffix != ".py" or not file.is_file():
        return ""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    targets = {id(node): [ast.unparse(target) for target in node.targets] for node in tree.body if isinstance(node, ast.Assign)}
    code = [node for node in tree.body if targets.get(id(node)) != ["recipe"] and not is_text(node)]
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    return hashlib.blake2b("\n".join(map(ast.unparse, [*code, *lambdas])).encode(), digest_size=8).hexdigest()


def module_digests(file: Path | None) -> dict[str, str]:
    """A digest of the code of each module of one's own that a recipe file imports, and of what lies in its packages."""
    if file is None or file.suffix != ".py" or not file.is_file():
        return {}
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    tops = {name.partition(".")[0] for name in names} - {"finetune", *sys.stdlib_module_names}
    installed = tuple({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})
    files = {name: str(getattr(module, "__file__", None) or "") for name, module in sorted(sys.modules.items())}
    tops = {top for top in tops if not files.get(top, "").startswith(installed)}  # torch makes modules elsewhere
    found = {}
    for name, path in files.items():
        if name.partition(".")[0] in tops and path.endswith(".py"):
            code = ast.dump(ast.parse(Path(path).read_text(encoding="utf-8")))
            found[name] = hashlib.blake2b(code.encode(), digest_size=8).hexdigest()
    return found


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is a text alone, such as a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def check_same_recipe(folder: Path, recipe: Recipe, file: Path | None = None) -> None:
    """Raise RecipeError, with what differs, unless the run in `folder` was started with this recipe, from this `file`."""
    before = from_dict(read_json(folder / "recipe.json"))
    changed = [f"{path}: {was} before, {now} now" for path, was, now in diff(before, recipe)]
    functions = [str(value) for value in flatten(to_dict(recipe)).values() if str(value).startswith("function ")]
    code = started(folder).get("code") or code_digest(folder / "recipe.py")
    if file and functions and code and code != code_digest(file):
        changed.append(f"{file}: its code was changed, of which the recipe has {', '.join(functions)}")
    modules, now = started(folder).get("modules", {}), module_digests(file)
    others = [name for name in modules if functions and now.get(name, modules[name]) != modules[name]]
    changed += [f"module {name}, which {file} imports: its code was changed" for name in others]
    if recipe.l2_sp and (weights := started(folder).get("weights")) and weights != weights_digest(recipe):
        changed.append(f"{recipe.weights}: another content than before, towards which l2_sp pulls")
    if changed:
        remedy = f"to go on as it was started: finetune resume {folder}; with this recipe all the same: --resume-anyway"
        raise RecipeError("\n  ".join([f"the run in {folder} was started with another recipe:", *changed, remedy]))


def check_same_images(
    folder: Path, images: dict[str, str], classes: Sequence[str], changed_files: Sequence[str], anyway: bool
) -> None:
    """Raise RecipeError unless the run in `folder` was started on these: the fingerprint of each part, classes and contents.

    Going on `anyway` needs the same classes: those are what the network and its saved models tell apart.
    """
    before = started(folder)
    if list(classes) != before.get("classes", list(classes)):
        gone, new = ([name for name in one if name not in other] for one, other in permutations((before["classes"], classes)))
        what = f"before: {', '.join(gone[:5]) or 'none'}; only now: {', '.join(new[:5]) or 'none'}"
        remedy = "put them back as they were, or start a run of its own: another --output"
        raise RecipeError(f"the run in {folder} was started with other classes: only {what}\n  {remedy}")
    if anyway:
        return
    changed, known = list[str](), before.get("images", images)  # older runs do not say
    for part, now in images.items():
        counts = [text.partition(" ")[0] for text in (known[part], now)]
        others = "" if counts[0] != counts[1] else ": others, by their names or labels"
        if known[part] != now:
            changed.append(f"{part} images: {counts[0]} before, {counts[1]} now{others}")
    totals = {sum(int(text.partition(" ")[0]) for text in texts.values()) for texts in (known, images)}
    if changed and len(totals) == 1 and read_json(folder / "recipe.json").get("loss") == "multi_label":
        changed.append("if none was changed: an earlier version splits several labels an image otherwise; start another run")
    if changed_files and not changed:
        changed.append(f"{len(changed_files)} files have another content than before, such as {changed_files[0]}")
    if changed:
        remedy = "put them back as they were; or go on with these for the steps that are left: --resume-anyway"
        raise RecipeError("\n  ".join([f"the run in {folder} was started on other images:", *changed, remedy]))
