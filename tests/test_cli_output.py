"""What the commands print: JSON for programs, 80 columns and colours for people, completion for shells."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.__main__ import VERBS, main
from finetune.cli.parser import arguments
from finetune.recipe.load import load_recipe
from finetune.recipe.serialize import to_dict
from finetune.results.runs import runs_as_table
from helpers import ROOT

SMALL = ["--backbone", "test_resnet", "--image-size", "32", "--batch-size", "8", "--epochs", "2", "--weights", "none"]


def printed(capsys, *line):
    """What a command prints, read as JSON."""
    assert main([*line, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_verb_takes_json(capsys):
    """The help of each verb names it."""
    for verb in VERBS:
        with pytest.raises(SystemExit):
            arguments([verb, "--help"], VERBS)
        assert "--json" in capsys.readouterr().out, verb


def test_recipes_as_json(here, image_folder, capsys):
    """show, cp, validate, diff, suggest and plan print what they print as text, and nothing else."""
    recipe = to_dict(load_recipe("resnet18_cifar")[0])
    assert printed(capsys, "show", "resnet18_cifar") == json.loads(json.dumps(recipe))
    assert printed(capsys, "cp", "resnet18_cifar", "mine.py", "--set", "epochs=5") == {"file": "mine.py"}
    changed = {"field": "epochs", "one": 3, "other": 5}
    assert printed(capsys, "diff", "resnet18_cifar", "mine.py") == [changed]
    valid = printed(capsys, "validate", "mine.py")
    assert valid["backbone"] == recipe["backbone"] and valid["epochs"] == 5 and valid["parameters"] > 11e6
    suggested = printed(capsys, "suggest", "--data", str(image_folder))
    assert suggested["data"]["source"] == str(image_folder)
    suggested = printed(capsys, "suggest", "--data", str(image_folder), "--output", "suggested.py")
    assert suggested == json.loads(json.dumps(to_dict(load_recipe("suggested.py")[0])))
    plan = printed(capsys, "plan", "mine.py", "--data", str(image_folder), "--output", "plans")
    assert plan == printed(capsys, "train", "mine.py", "--data", str(image_folder), "--dry-run")
    assert all(len(lrs) == 5 for lrs in plan.values()) and Path("plans/mine-plan.png").is_file()


def test_a_run_as_json(here, image_folder, capsys):
    """train prints its result.json and its folder, find-lr its test, and neither says anything more on stdout."""
    line = ["resnet18_cifar", "--data", str(image_folder), *SMALL, "--set", "mixed_precision=no"]
    result = printed(capsys, "train", *line, "--processes", "1", "--output", "out")
    assert result == {"run": "out"} | json.loads(Path("out/result.json").read_text())
    found = printed(capsys, "find-lr", *line)
    assert len(found["factors"]) == len(found["losses"]) and Path(found["picture"]).is_file()
    assert found["better"].items() <= found["suggested"].items() and "learning rates" in found["verdict"]


ROWS = [
    {"run": "b-20261126-120000", "state": "finished", "metric": "top1", "value": 0.9, "best": 0.95, "interval": (0.85, 0.93),
     "data": "photos", "epochs": 5, "started": "2026-11-26 12:00:00"},
    {"run": "a-20261126-130000", "state": "stopped after 16 steps", "metric": "top1", "data": "photos", "epochs": 5,
     "started": "2026-11-26 13:00:00"},
    {"run": "c", "state": "finished", "metric": "macro_f1", "value": 0.8, "best": 0.8, "data": "x" * 60, "epochs": 5,
     "started": "2026-11-26 14:00:00"},
]  # fmt: skip


def test_runs_fit_80_columns():
    """Columns are left out from the right until lines fit; name and result always stand, and --wide has them all."""
    lines = runs_as_table(ROWS).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["run", "result", "best", "epochs"]
    assert "top-1 90.0% (85.0 to 93.0)  95.0%" in lines[1] and "stopped after 16 steps" in lines[2]
    wide = runs_as_table(ROWS, wide=True).splitlines()
    assert wide[0].split() == ["run", "result", "best", "epochs", "data", "started"] and "x" * 60 in wide[3]
    long = runs_as_table([ROWS[0] | {"run": "r" * 90}]).splitlines()
    assert max(map(len, long)) <= 80 and "90.0%" in long[1]


def write_run(folder, value, metric="top1"):
    """A finished run's folder, as far as the list needs it."""
    folder.mkdir(parents=True)
    recipe = to_dict(load_recipe("resnet18_cifar")[0]) | {"metric": metric}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "result.json").write_text(json.dumps({metric: value, "val_images": 100}))


def test_runs_are_sorted(here, capsys):
    """By start, by name or by result; runs of unlike metrics stand apart."""
    for age, (name, value, metric) in enumerate(
        [("b", 0.5, "top1"), ("c", 0.9, "top1"), ("a", 0.7, "macro_f1"), ("d", 0.6, "top1")]
    ):
        write_run(here / "runs" / name, value, metric)
        os.utime(here / "runs" / name / "recipe.json", (age, age))
    for order, names in (("started", "bcad"), ("run", "abcd"), ("result", "abdc")):
        assert "".join(row["run"] for row in printed(capsys, "runs", "--sort", order)) == names
    assert [row["run"] for row in printed(capsys, "runs")] == list("bcad")


def in_terminal(folder, line, **environment):
    """What a command prints in a terminal of 80 columns."""
    import pty

    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM")}
        os.execve(sys.executable, [sys.executable, "-m", "finetune", *line], env | {"PYTHONPATH": str(ROOT)} | environment)
    said = b""
    while True:
        try:
            said += os.read(terminal, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
    os.waitpid(process, 0)
    return said.decode()


def test_colours_are_for_terminals_without_no_color(tmp_path):
    """An error is red in a terminal; NO_COLOR, a dumb terminal and a pipe get the words alone."""
    line = ["show", "resnet81_cifar"]
    assert "\033[31mfinetune:\033[0m no recipe" in in_terminal(tmp_path, line, TERM="xterm", NO_COLOR="")
    for environment in ({"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}):
        assert in_terminal(tmp_path, line, **environment).startswith("finetune: no recipe")
    piped = subprocess.run([sys.executable, "-m", "finetune", *line], capture_output=True, text=True, cwd=tmp_path,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert piped.stderr.startswith("finetune: no recipe") and "\033" not in piped.stderr


def test_the_summary_has_colours_of_its_verdicts(monkeypatch):
    """Its lines are those without colours; labels are bold, and a verdict is green or yellow."""
    from finetune.results import summary
    from finetune.utils import text

    plain = [summary.highlight("baseline", f"{words}: 98.5 to 100.0 % is what chance allows " + "word " * 20)
             for words in ("as expected", "lower than expected")]  # fmt: skip
    monkeypatch.setattr(text.sys.stdout, "isatty", lambda: True, raising=False)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    coloured = [summary.highlight("baseline", f"{words}: 98.5 to 100.0 % is what chance allows " + "word " * 20)
                for words in ("as expected", "lower than expected")]  # fmt: skip
    assert [re.sub("\033\\[\\d+m", "", one) for one in coloured] == plain
    assert coloured[0].startswith("\033[32m") and coloured[1].startswith("\033[33m")
    assert summary.highlight("cost", "45 s") == "\033[1mcost\033[0m      45 s"


@pytest.mark.parametrize(
    "typed,offered",
    [
        ("finetune ", {"train", "predict", "runs", "--version"}),
        ("finetune tr", {"train"}),
        ("finetune train resnet18_p", {"resnet18_photos"}),
        ("finetune train resnet18_cifar --ep", {"--epochs"}),
        ("finetune predict ", {"last", "mine-1"}),
        ("finetune runs --sort r", {"result", "run"}),
    ],
)
def test_a_shell_completes(here, typed, offered):
    """Verbs, options, their choices, and the names of recipes and runs, as argcomplete asks for them; torch is not imported."""
    write_run(here / "runs" / "mine-1", 0.5)
    answer = here / "answer"
    code = "import sys; from finetune.__main__ import main; sys.modules['torch'] = None; main()"
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": typed,
        "COMP_POINT": str(len(typed)),
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([sys.executable, "-c", code], env=os.environ | environment, check=True, timeout=60)
    found = set(answer.read_text().split("\n"))
    assert offered <= found and (typed.endswith(" ") or found == offered)
