"""Take networks of every kind through everything at once: each works to the bit, or is refused before the first step.

    python -m benchmarks.zoo            # all of them, in many minutes: writes benchmarks/results/zoo.json
    python -m benchmarks.zoo lazy vit   # those whose names start so, and the kept verdicts on the others

Each is planned, its head fitted by a linear probe where that can be, trained in three stages with micro-batches and a moving
average, cut in a step and resumed, on one process and on two; then it is loaded, predicts, and is exported.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import safetensors.torch
import timm
import torch

import finetune
from benchmarks.networks import LIBRARIES, ODD
from finetune import AdamW, Cosine, Data, Group, LinearProbe, Recipe
from finetune.data.sources import load_data
from finetune.inference.predict import compute_logits
from finetune.models.backbone import head_parameters, meta_backbone
from finetune.models.linear_probe import check_probe
from finetune.tools.plan import describe_plan, make_plan
from finetune.training import loop
from finetune.training.run_dir import newest_checkpoint
from finetune.utils.errors import RecipeError

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "zoo.json"
WORKS, BROKEN, NAMES = "works", "BROKEN", (*ODD, *LIBRARIES)
# Of these an image's logits depend on the others or on chance, in evaluation, too, or buffers move with each micro-batch.
OF_ITS_BATCH = ("many norms", "always random", "spectral norm", "spectral norm by hook")
NO_PROBE = ("repvgg_a0", "extra state")  # features that are the same for every image, as its weights are random; scaled logits
CUT_AT = 6  # steps are taken by then
PICTURES = ("finetune.results.summary.try_to", "finetune.report.sheets.plot_augmented")  # they tell nothing of a network


class Cut(Exception):
    """A run dies in a step."""


def recipe_of(name: str, batch_norm: str = "train") -> Recipe:
    """Three stages of a network in 3 epochs, with an average, and a linear probe first where the head is one layer."""
    recipe = Recipe(
        backbone=ODD[name][0] if name in ODD else name,
        head=("head" if name == "timm, changed" else "fc") if name in ODD else None,
        weights="none",
        data=Data("generated", image_size=LIBRARIES.get(name, 32), batch_size=8),
        groups=(Group("all", ".", lr=1e-3),),
        optimizer=AdamW(weight_decay=0.05),
        schedule=Cosine(warmup_epochs=0.5),
        ema_decay=None if name.startswith("extra state") else 0.9,
        batch_norm=batch_norm,
        epochs=3,
    )
    try:
        net = meta_backbone(recipe)
    except RecipeError:  # which the run finds out as well
        return recipe
    head = head_parameters(recipe, net)
    first = next(parameter for parameter, _ in net.named_parameters())
    stem = re.escape(first.rpartition(".")[0] or first)
    groups = (
        Group("head", "|".join(map(re.escape, sorted(head))), lr=1e-2),
        Group("stem", stem, lr=1e-3, unfreeze_at=2),
        Group("body", ".", lr=3e-3, unfreeze_at=1),
    )
    staged = replace(recipe, groups=groups)
    if name in NO_PROBE:
        return staged
    try:
        check_probe(staged, net)
    except RecipeError:
        return staged
    return replace(staged, linear_probe=LinearProbe())


def write_recipe(name: str, folder: Path, batch_norm: str) -> Path:
    """The recipe as a file, as a run copies it."""
    folder.mkdir(parents=True)
    file = folder / "recipe.py"
    file.write_text(f"from benchmarks.zoo import recipe_of\n\nrecipe = recipe_of({name!r}, {batch_norm!r})\n")
    return file


def train(recipe: Path | None, output: Path, accumulate: int, cut: bool = False) -> int:
    """finetune.train, or without a recipe a resumed run; returns the steps that were taken. `cut`: it dies in step CUT_AT."""
    real, steps = loop.train_step, []

    def step(*args):
        if cut and len(steps) == CUT_AT:
            raise Cut
        steps.append(1)
        return real(*args)

    given = {"resume": output} if recipe is None else {"recipe": recipe, "output": output}
    with ExitStack() as stack:
        for name in PICTURES:
            stack.enter_context(patch(name))
        stack.enter_context(patch.object(loop, "train_step", step))
        try:
            finetune.train(**given, accumulate=accumulate, checkpoint_every=2, quiet=True)
        except RecipeError as error:
            error.steps = len(steps)
            raise
    return len(steps)


def train_twice(name: str, folder: Path, accumulate: int = 1) -> str:
    """WORKS if a run that is cut and resumed ends with the bits of an unbroken one; or the sentence of the refusal."""
    recipe = folder / "recipe.py"
    try:
        train(recipe, folder / "whole", accumulate)
    except RecipeError as error:
        assert not error.steps, f"{name}: refused after {error.steps} steps: {error}"
        return str(error)
    try:
        train(recipe, folder / "cut", accumulate, cut=True)
        raise AssertionError(f"{name}: not cut")
    except Cut:
        train(None, folder / "cut", accumulate)
    if os.environ.get("RANK", "0") == "0":
        one, other = contents(folder / "whole"), contents(folder / "cut")
        differing = [key for key in one.keys() | other.keys() if key not in one or key not in other or one[key] != other[key]]
        assert not differing, f"{name}: other bits of {differing[:3]}"
    return WORKS


def contents(run: Path) -> dict[str, bytes]:
    """All that a finished run computed: the bits of its checkpoint, its networks, its logits, and its metrics."""
    last, found = newest_checkpoint(run), {"metrics": (run / "metrics.jsonl").read_bytes()}
    for file in [*last.glob("*.safetensors"), *run.glob("model*/*.safetensors"), run / "predictions.safetensors"]:
        found[str(file.relative_to(run))] = file.read_bytes()
    for name, state in torch.load(last / "optimizer.pt", weights_only=True).items():
        found |= {f"{name} {key}": torch.as_tensor(value).cpu().numpy().tobytes() for key, value in state.items()}
    return found


def on_one_process(name: str, folder: Path) -> str:
    """Plan, train, cut, resume, load and predict on one process."""
    write_recipe(name, folder, "train")
    if (verdict := train_twice(name, folder, accumulate=2)) == WORKS:
        recipe, run = recipe_of(name), folder / "whole"
        assert describe_plan(name, recipe, make_plan(recipe))
        model = finetune.load(run, "last").saved
        logits, _ = compute_logits(model, load_data(recipe).val, "stop", 0)
        if name not in OF_ITS_BATCH:
            assert_close(name, logits, logged_logits(run))
    return verdict


def on_two_processes(names: list[str], folder: Path) -> dict[str, str]:
    """By name: trained, cut and resumed by two processes, all in one launch, with the logits of one process in the end."""
    for name in names:
        write_recipe(name, folder / slug(name), "frozen")
    verdicts: dict[str, str] = {}
    while left := [name for name in names if name not in verdicts]:
        (folder / "names.json").write_text(json.dumps(left))
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "benchmarks.zoo"]
        command = [sys.executable, "-m", *launch, "--worker", str(folder)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        verdicts |= json.loads((folder / "verdicts.json").read_text())
        if died := next((name for name in left if name not in verdicts), None):
            print(done.stderr[-5000:], file=sys.stderr)
            verdicts[died] = f"{BROKEN}, see above"
    for name in names:
        if verdicts[name] == WORKS:
            verdicts[name] = judged(as_alone, name, folder / slug(name))
    return verdicts


def as_alone(name: str, folder: Path) -> str:
    """WORKS if one process gives the logits that two gave."""
    train(folder / "recipe.py", folder / "alone", accumulate=2)
    if name not in OF_ITS_BATCH:
        assert_close(name, logged_logits(folder / "whole"), logged_logits(folder / "alone"))
    return WORKS


def worker(folder: Path) -> None:
    """One process of two: all the networks, one after another."""
    verdicts: dict[str, str] = {}
    for name in ["", *json.loads((folder / "names.json").read_text())]:
        try:
            if name:
                verdicts[name] = train_twice(name, folder / slug(name))
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the other one may wait for this one
        if os.environ["RANK"] == "0":
            (folder / "verdicts.json").write_text(json.dumps(verdicts))
    os._exit(0)  # taking the group of processes down can abort


def slug(name: str) -> str:
    """A name as a folder's."""
    return re.sub(r"\W+", "_", name)


def exported(run: Path, to: str) -> str:
    """WORKS, or why the run's network can't be exported; timm's folder is loaded by timm again."""
    try:
        folder = finetune.load(run, "last").export(to, run / f"exported-{to}")
    except RecipeError as error:
        return str(error).replace(f" of {run}", "")
    if to == "timm":
        net, model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), finetune.load(run, "last").saved
        image = torch.rand(1, *model.preprocessing["input_size"])
        with torch.no_grad():
            assert_close(str(run), net(image), model.net(image))
    return WORKS


def logged_logits(run: Path) -> torch.Tensor:
    """Those of the last epoch's validation."""
    return safetensors.torch.load_file(run / "predictions.safetensors")["logits"]


def assert_close(name: str, one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal to rounding, as a share of the largest."""
    difference = (one - other).abs().max() / other.abs().max().clamp(min=1)
    assert difference < 1e-3, f"{name}: logits differ by {difference:.1e} of the largest"


def judged(trial: Callable[..., str], *arguments) -> str:
    """A trial's verdict, or that it broke."""
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            return trial(*arguments)
    except Exception as error:
        traceback.print_exc()
        return f"{BROKEN}: {type(error).__name__}: {error}"


def judge_all(names: list[str]) -> list[dict[str, str]]:
    """A row of verdicts for each network of the zoo: new ones of these networks, kept ones of the others."""
    rows = {row["network"]: row for row in (json.loads(RESULT.read_text()) if RESULT.is_file() else ())}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in names:
            rows[name] = {"network": name, "one process": judged(on_one_process, name, root / slug(name))}
            if rows[name]["one process"] == WORKS:
                rows[name] |= {to: judged(exported, root / slug(name) / "whole", to) for to in ("onnx", "timm")}
            print(rows[name], file=sys.stderr, flush=True)
        trained = [name for name in names if rows[name]["one process"] == WORKS]
        for name, verdict in on_two_processes(trained, root / "two").items():
            rows[name]["two processes"] = verdict
    return [rows[name] for name in NAMES if name in rows]


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]))
    chosen = tuple(sys.argv[1:])
    rows = judge_all([name for name in NAMES if not chosen or name.startswith(chosen)])
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(BROKEN in verdict for row in rows for verdict in row.values()))


if __name__ == "__main__":
    sys.exit(main())
