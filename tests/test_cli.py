"""The command line as a newcomer types it: what is not known leads on, and a run is trained, listed, resumed and used."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import run
from finetune.__main__ import main
from finetune.cli.parser import OTHER_FLAGS
from finetune.recipe.load import load_recipe, override
from helpers import ROOT

MISTAKES = [
    ("fit", "Did you mean train?"),
    ("run", "Did you mean train?"),
    ("list", "Did you mean ls?"),
    ("copy", "Did you mean cp?"),
    ("eval", "Did you mean evaluate?"),
    ("trian", "Did you mean train?"),
    ("xyz", "There are: train, predict, embed"),
    ("help", "finetune --help"),
    ("resnet18_cifar", "is a recipe: finetune train resnet18_cifar"),
    ("mine.py", "is a recipe: finetune train mine.py"),
    ("train", "finetune train NAME, finetune train --data DIR"),
    ("train resnet18_cifar --lr 3", "--lr-scale X, a factor on all"),
    ("train resnet18_cifar --learning_rate=3", "--lr-scale X, a factor on all"),
    ("train resnet18_cifar --model resnet34", "--backbone NAME"),
    ("train resnet18_cifar --device cuda", "CUDA_VISIBLE_DEVICES"),
    ("train resnet18_cifar --epoch 5", "Did you mean --epochs?"),
    ("train --recipe resnet18_cifar", "Here: a recipe's name or file, without a flag."),
    ("train resnet18_cifar --MixUp 0.2", "Did you mean --set augment.mixup=VALUE?"),
    ("tune resnet18_cifar --weight-decay 0.1", "Did you mean --set optimizer.weight_decay=VALUE?"),
    ("train resnet18_cifar --image 224", "Did you mean --image-size?"),
    ("train resnet18_cifar --per_device_train_batch_size 8", "Here: --batch-size N, over all processes."),
    ("predict last a.jpg --gpus 2", "Here: --processes N."),
    ("ls --lr 3", "no option --lr. All options: finetune ls --help"),
    ("train resnet18_cifar recipes", "one word too many: 'recipes'. All options"),
    ("train resnet18_cifar --batch_size 5", "Did you mean --batch-size?"),
    ("predict last a.jpg --jsn", "Did you mean --json?"),
    ("train resnet18_cifar --set lr=3", "Did you mean lr_scale or groups.head.lr"),
    ("train resnet18_cifar --set batch_size=3", "Did you mean data.batch_size?"),
    ("train resnet18_cifar --set image_size=3", "Did you mean data.image_size?"),
    ("train resnet18_cifar --set epoch=3", "Did you mean epochs?"),
    ("train resnet18_cifar --set schedule=Cosin", "Did you mean Cosine?"),
    ("train resnet18_cifar --set schedule=Step", "Step needs fields of its own"),
    ("train resnet18_cifar --epochs 0", "epochs must be 1 or more, not 0"),
    ("train resnet18_cifar --epochs five", "epochs must be a whole number, not 'five'"),
    ("train resnet18_cifar --processes 0", "--processes starts at 1"),
    ("train resnet81_cifar", "Did you mean resnet18_cifar?"),
    ("resume", "no unfinished run 'last'"),
    ("resume nowhere", "no unfinished run 'nowhere'"),
    ("predict last a.jpg --json --csv", "--json or --csv, not both"),
    ("predict nowhere .", "no images in ."),
    ("evaluate nowhere --data .", "no finished run 'nowhere'"),
    ("evaluate last --data nowhere", "no data set or folder 'nowhere'"),
    ("export nowhere --to onnx", "no finished run 'nowhere'"),
    ("train --data nowhere", "no data set or folder 'nowhere'"),
    ("train resnet18_cifar --data digit", "Did you mean digits?"),
    ("suggest --data nowhere", "no data set or folder 'nowhere'"),
    ("find-lr resnet18_cifar --data nowhere", "no data set or folder 'nowhere'"),
    ("runs --sort best", "invalid choice: 'best' (choose from 'started', 'result', 'run')"),
    ("cp resnet18_cifar nowhere/mine.py", "no folder nowhere"),
    ("cp resnet18_cifar mine.py --set optimizer.name=3", "optimizer.name must be a text"),
]


@pytest.mark.parametrize("typed,said", MISTAKES)
def test_what_is_not_known_leads_on(here, capsys, typed, said):
    """One line on stderr, exit code 2, nothing written."""
    try:
        code = main(typed.split())
    except SystemExit as stopped:  # argparse's way
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("finetune: ") and said in error and "Traceback" not in error
    assert not list(here.iterdir())


def options(capsys, command, *words):
    """Those that a command's help names."""
    with pytest.raises(SystemExit):
        command([*words, "--help"])
    return set(re.findall(r"--[\w-]+", capsys.readouterr().out))


@pytest.mark.parametrize("names,ways", OTHER_FLAGS.items())
def test_flags_of_other_programs(capsys, names, ways):
    """Each leads to an option, or to a field, that there is."""
    of_train, of_script = options(capsys, main, "train"), options(capsys, run.main)
    assert {way.split()[0] for way in ways if way.startswith("--")} <= of_train | of_script
    here = [way for way in ways if not way.startswith("--") or way.split()[0] in of_train]
    for name in names.split():
        with pytest.raises(SystemExit):
            main(["train", "resnet18_cifar", name, "3"])
        assert f"no option {name}. Here: {here[0]}. All options" in capsys.readouterr().err
    values = {"optimizer": "SGD", "schedule": "Cosine", "val_share": "0.2"}
    for field, value in re.findall(r"--set ([\w.]+)=([\w.-]+)", " ".join(ways)):
        value = values.get(field.removeprefix("data."), "1" if value.isupper() else value)
        override(load_recipe("resnet18_cifar")[0], [f"{field.replace('NAME', 'head')}={value}"])


SCRIPT = {
    "resnet18_cifar": "one word too many: 'resnet18_cifar'. Here: --recipe resnet18_cifar.",
    "--config resnet18_cifar": "no option --config. Here: --recipe NAME|FILE.py.",
    "--recipe resnet18_cifar --num_processes 2": "no option --num_processes. Here: accelerate launch --num_processes N.",
    "--recipe resnet18_cifar --mixup 0.2": "no option --mixup. Did you mean --set augment.mixup=VALUE?",
    "": "--recipe NAME|FILE.py, or --resume RUN, is required.",
}


@pytest.mark.parametrize("typed,said", SCRIPT.items())
def test_the_script_leads_on(monkeypatch, capsys, typed, said):
    """finetune/run.py, too, in one line, and of several processes one says it."""
    for process, line in [("0", f"finetune: {said} All options: finetune/run.py --help\n"), ("1", "")]:
        monkeypatch.setenv("LOCAL_RANK", process)
        with pytest.raises(SystemExit) as stopped:
            run.main(typed.split())
        assert stopped.value.code == 2 and capsys.readouterr().err == line


def test_mistakes_cost_no_import_of_torch(tmp_path):
    """None of them imports torch, which takes seconds."""
    code = (
        "import sys, contextlib\nfrom finetune.__main__ import main\n"
        f"for typed in {[typed for typed, _ in MISTAKES]!r}:\n"
        "    with contextlib.suppress(SystemExit):\n        main(typed.split())\n"
        "    assert 'torch' not in sys.modules, typed\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=path_to_here())
    assert done.returncode == 0, done.stderr


def path_to_here():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    "typed,field,value",
    [
        (["--epochs", "3"], "epochs", 3),
        (["--batch-size", "12"], "data.batch_size", 12),
        (["--image-size", "64"], "data.image_size", 64),
        (["--lr-scale", "0.3"], "lr_scale", 0.3),
        (["--backbone", "resnet34"], "backbone", "resnet34"),
        (["--data", "2024"], "data.source", "2024"),
        (["--seed", "4"], "seed", 4),
        (["--set", "optimizer=SGD"], "optimizer.name", "SGD"),
        (["--set", "optimizer=SGD"], "optimizer.weight_decay", 0.05),
        (["--set", "schedule=Constant"], "schedule.type", "Constant"),
        (["--set", "schedule=Constant"], "schedule.warmup_epochs", 0.3),
        (["--set", "clip_norm=none"], "clip_norm", None),
        (["--set", "clip_norm=null"], "clip_norm", None),
        (["--set", "linear_probe=none"], "linear_probe", None),
        (["--set", "weights=none"], "weights", "none"),
        (["--set", "groups.head.optimizer=SGD"], "groups.head.optimizer.name", "SGD"),
    ],
)
def test_flags_and_plain_words_reach_their_fields(here, typed, field, value):
    """A flag of its own sets its field, and a plain word stands for None, an optimizer or a schedule."""
    from finetune.__main__ import VERBS
    from finetune.cli.parser import arguments
    from finetune.recipe.load import chosen_recipe
    from finetune.recipe.serialize import flatten, to_dict

    Path("2024").mkdir()
    recipe, _, _ = chosen_recipe(arguments(["train", "resnet18_cifar", *typed], VERBS))
    assert flatten(to_dict(recipe))[field] == value


SMALL = [
    *("--backbone", "test_resnet", "--image-size", "32", "--batch-size", "8", "--epochs", "2", "--weights", "none"),
    *("--set", "mixed_precision=no", "--processes", "1"),
]


def test_from_training_to_a_prediction(here, image_folder, capsys):
    """train, runs, predict and evaluate on the run by its name; names are last, a prefix or a path."""
    assert main(["train", "resnet18_cifar", "--data", str(image_folder), *SMALL]) == 0
    (run,) = Path("runs").iterdir()
    assert json.loads((run / "run.json").read_text())["name"] == "resnet18_cifar" and run.name.startswith("resnet18_cifar-")
    pictures = {"augmented.png", "confusion.png", "curves.png", "predictions.png"}
    assert pictures <= {file.name for file in run.iterdir()}
    capsys.readouterr()
    assert main(["runs", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    result = json.loads((run / "result.json").read_text())
    assert row["state"] == "finished" and row["value"] == result["top1"] and row["epochs"] == 2
    assert row["interval"][0] < row["value"] < row["interval"][1] or row["value"] in (0, 1)
    image = next(image_folder.rglob("*.png"))
    for name in ("last", "resnet18", str(run)):
        assert main(["predict", name, str(image), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["file"] == str(image)
    assert main(["evaluate", "last", "--data", str(image_folder)]) == 0
    assert f"top-1 {result['top1']:.2%}" in capsys.readouterr().out
    assert main(["evaluate", "last", "--data", str(image_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == result["top1"]
    assert main(["export", "last", "--to", "timm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": f"{run}/{result['use']}-timm", "format": "timm"}


def test_own_images_get_a_suggested_recipe(here, image_folder, capsys):
    """`train --data DIR` alone writes the suggested recipe into the run and trains it."""
    assert main(["train", "--data", str(image_folder), "--smoke", "--processes", "1"]) == 2  # smoke brings its own images
    assert main(["train", "--data", str(image_folder), *SMALL[:10], "--processes", "1"]) == 0
    (run,) = Path("runs").iterdir()
    assert run.name.startswith(f"{image_folder.name}-") and "finetune suggest" in (run / "recipe.py").read_text()
    assert main(["show", str(run / "recipe.py")]) == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_stops_with_a_checkpoint_and_resume_finishes(here, image_folder, capsys, processes):
    """Exit code 75 and the words that go on, without a traceback; `finetune resume` then needs nothing else."""
    line = [sys.executable, "-m", "finetune", "train", "resnet18_cifar", "--data", str(image_folder), *SMALL[:-2]]
    line[line.index("--epochs") + 1] = "300"
    process = subprocess.Popen(
        [*line, "--processes", str(processes)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=path_to_here()
    )
    while not list(Path("runs").glob("*/checkpoints/step-*")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in out and "finetune resume runs/resnet18_cifar-" in out, out
    (run,) = Path("runs").iterdir()
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps(recipe | {"epochs": 1 + len(epochs(run))}))  # not all 300
    assert main(["resume", "--processes", "1"]) == 0 and "resuming after step" in capsys.readouterr().out
    assert json.loads((run / "result.json").read_text())["recipe"] == "resnet18_cifar"


def epochs(run):
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "train_loss" in row]


def test_a_resumed_run_keeps_its_recipe(here, capsys):
    """A recipe's flag beside a run to go on with is refused by name, but for the number of epochs."""
    from finetune.run import main as run

    assert run(["--resume", "last", "--seed", "3"]) == 2
    assert "no unfinished run" in capsys.readouterr().err
    (here / "runs" / "x").mkdir(parents=True)
    (here / "runs" / "x" / "recipe.json").touch()
    assert run(["--resume", "last", "--seed", "3", "--epochs", "3", "--set", "lr_scale=2"]) == 2
    assert "a resumed run keeps its recipe: leave out --seed, --set, or name the --recipe as well" in capsys.readouterr().err
