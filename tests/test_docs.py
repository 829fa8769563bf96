"""What the README tells a reader to write."""

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from statistics import fmean

import pytest

from finetune import run
from finetune.__main__ import arguments
from finetune.__main__ import main as verb
from finetune.models.backbone import meta_backbone
from finetune.recipe import LayerDecay, recipe
from finetune.recipe import schedules as lr_schedule
from finetune.results.baseline import summary
from finetune.train.setup import check
from helpers import ROOT, small_recipe

README = (ROOT / "README.md").read_text()
KEPT = ROOT / "benchmarks" / "results"
NAMES = {**vars(recipe), **vars(lr_schedule)}
TABLE = README[README.index("## Levers") : README.index("## In other loops")]
LEVERS = re.findall(r"^\| .+? \| `(.+?)` \| .+? \|$", TABLE, re.M)
OF_TIMM = {"groups": LayerDecay(head_lr=1e-3, stem_ratio=0.1), "backbone": "resnet18", "head": None}


@pytest.mark.parametrize("fields", LEVERS)
def test_every_lever_of_the_table_is_a_recipe(fields):
    """What the table of levers shows can be written into a recipe, and fits a network."""
    changes = eval(f"dict({fields})", NAMES)
    of_timm = "LayerDecay" in fields or changes.keys() & {"dropout", "gradient_checkpointing"}
    made = small_recipe(**{**(OF_TIMM if of_timm else {}), **changes})
    check(made, meta_backbone(made))


def test_the_table_has_every_field():
    """Each field of a recipe that changes training has its line."""
    told = {name for fields in LEVERS for name in re.findall(r"(\w+)=", fields)}
    fields = (
        set(recipe.Recipe.__dataclass_fields__)
        | set(recipe.Group.__dataclass_fields__)
        | set(recipe.Augment.__dataclass_fields__)
    )
    elsewhere = {
        "backbone",
        "weights",
        "head",
        "seed",
        "epochs",
        "name",
        "pattern",
        "crop_scale",
        "crop_ratio",
        "hflip",
        "color_jitter",
    }  # shown with the recipe itself
    assert fields - told == elsewhere
    assert all(f"`{kind.__name__}`" in TABLE for kind in lr_schedule.Schedule.__subclasses__())


def commands(start):
    """The README's command lines that begin with `start`, without their comments, as words."""
    lines = re.findall(rf"^    ({re.escape(start)}.*)$", README, re.M)
    return [shlex.split(line, comments=True) for line in lines]


def test_every_verb_of_the_readme_runs(tmp_path, monkeypatch, capsys, image_folder, run_folder):
    """Each `finetune` line of the README, in its order and word for word but for its places, ends well; no verb is untold."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question was asked"))
    shutil.copytree(run_folder, tmp_path / "RUN")
    shutil.copytree(image_folder / "val" / "red", tmp_path / "photographs")
    shutil.copytree(image_folder / "val" / "blue", tmp_path / "more")
    for file in (tmp_path / "more").iterdir():
        file.rename(file.with_suffix(".jpg"))
    told = []
    for words in commands("finetune "):
        words = [str(image_folder) if word == "DIR" else word for word in words[1:]]
        told.append(words[0])
        if words[0] in ("find-lr", "reproduce"):  # tests of their own, on random weights: these take minutes
            continue
        assert verb(words) == 0, (words, capsys.readouterr().err)
        assert capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"mine.py", "plans", "scores"}
    with pytest.raises(SystemExit):
        verb(["--help"])
    assert set(re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.M)) == set(told)


@pytest.mark.parametrize(
    "name", ["ls", "show", "cp", "validate", "diff", "plan", "find-lr", "reproduce", "suggest", "export", "predict", "evaluate"]
)
def test_help_has_an_example(capsys, name):
    """Every verb's --help ends in an example that its own parser takes."""
    with pytest.raises(SystemExit):
        verb([name, "--help"])
    example = re.search(r"example: finetune (.+)", " ".join(capsys.readouterr().out.split()))[1]
    assert arguments(shlex.split(example)).verb


@pytest.mark.parametrize("words", commands("accelerate launch finetune/run.py"), ids=" ".join)
def test_every_launch_of_the_readme_is_understood(tmp_path, monkeypatch, capsys, image_folder, words):
    """Each `accelerate launch` line, given to the script as a dry run, ends well, or says what it is missing here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    shutil.copy(ROOT / "recipes" / "resnet18_cifar.py", tmp_path / "path" / "to" / "my_recipe.py")
    words = [str(image_folder) if word == "DIR" and "--data" in words else word for word in words[3:]]
    code = run.main([*words, "--dry-run"])
    said = capsys.readouterr()
    if "--resume" in words:
        assert code == 2 and "no run to resume" in said.err
    else:
        assert code == 0 and "rate at the start of each epoch" in said.out


def test_other_numbers_have_their_runs():
    """Each score of the suggested recipes, and of the range test's suggestion, is that of a kept run record."""
    records = json.loads((KEPT / "suggest.json").read_text())
    for record in records:
        row = f"| {record['images']} | {record['val_images']} | {record['linear_head']:.1%} | {record[record['score']]:.1%} |"
        assert row.replace("%", " %") in README
    steepest = json.loads((KEPT / "find_lr.json").read_text())
    assert len(records) == 7 and f"point reached {100 * steepest['top1']:.1f} %" in " ".join(README.split())


def printed(monkeypatch, capsys, benchmark, *words):
    """What a benchmark's report says of kept runs."""
    monkeypatch.setattr(sys, "argv", [benchmark, *words])
    importlib.import_module(f"benchmarks.{benchmark}").main()
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]


def test_the_benchmarks_tables_are_their_runs(monkeypatch, capsys):
    """Each row of the README's tables of peers and ablations is what their reports make of the kept runs; none is left out."""
    lines = printed(monkeypatch, capsys, "peers_report", str(KEPT / "peers.jsonl"))
    kept = str(KEPT / "ablations.jsonl")
    for label in {json.loads(line)["images"] for line in Path(kept).read_text().splitlines()}:
        lines += printed(monkeypatch, capsys, "ablations", "--report", "--output", kept, "--label", label)
    assert len(lines) > 30 and all(line in README for line in lines), [line for line in lines if line not in README]


def test_the_performance_table_is_what_was_kept():
    """The figures of the performance table are those of the benchmarks' kept last lines, what does not hold among them."""
    kept = json.loads((KEPT / "benchmarks.json").read_text())["now"]
    table = README[README.index("## Performance") : README.index("## The files")]
    rows = [
        f"{row['ours_us']:.0f} us, timm {row['timm_us']:.0f}, torchvision {row['torchvision_us']:.0f}: "
        f"{row['times_faster']:.1f} times | {'yes' if row['holds'] else 'no'} |"
        for row in (kept["images"]["small"], kept["images"]["large"])
    ]
    rows += [
        f"{row['case']}, {row['processes']} process{'es' * (row['processes'] > 1)}: {row['ratio']:.2f}"
        for row in kept["loop"]["cases"]
    ]
    rows += [
        f"{kept['frozen']['memory_share']:.0%} |",
        f"{kept['frozen']['times_faster']:.0f} times |",
        f"{max(kept['start']['seconds'].values()):.2f} s |",
        f"{kept['start']['first_update']:.1f} s |",
        f"{sum(kept['start']['shares'].values()):.1%} |",
    ]
    assert len(rows) == 11 and all(row in table for row in rows), [row for row in rows if row not in table]


def test_more_images_are_as_recorded():
    """What the CIFAR-10 recipe reaches on ten times the images is the mean of the kept runs."""
    kept = json.loads((KEPT / "cifar_10000.json").read_text())
    number = "{:.1f} % ({:.1f} to {:.1f}, {} seeds)".format(
        *(100 * of([run["top1"] for run in kept["runs"]]) for of in (fmean, min, max)), len(kept["runs"])
    )
    head = 100 * fmean(run["head_top1"] for run in kept["runs"])
    assert f"reaches {number}; the head alone {head:.1f} %" in " ".join(README.split())
    assert kept["recipe"]["data"]["source"] == "--data" and {run["val_images"] for run in kept["runs"]} == {2000}


def test_the_larger_networks_are_as_recorded():
    """What the three networks reach with the three recipes is the mean of the kept runs."""
    own = [
        json.loads((ROOT / "recipes" / "baselines" / f"efficientnet_lite0_{name}.json").read_text())
        for name in ("cifar", "digits", "elpv")
    ]
    larger = json.loads((KEPT / "lite.json").read_text())
    assert len(larger) == 6
    for kept in own + larger:
        head = fmean(100 * run["head_top1"] for run in kept["runs"])
        cell = f"{summary(kept).partition(' on ')[0]}; head alone {head:.1f} %"
        row = next(line for line in README.splitlines() if line.startswith(f"| `{kept['recipe']['backbone']}` |"))
        assert row.split(" | ")[("--data", "digits", "elpv").index(kept["recipe"]["data"]["source"]) + 1].strip(" |") == cell


def test_the_solar_cells_by_kind_are_as_recorded():
    """Macro F1, each kind of cell and the head alone are the means over the kept runs."""
    runs = json.loads((ROOT / "recipes" / "baselines" / "efficientnet_lite0_elpv.json").read_text())["runs"]
    text = " ".join(README.split())
    for row, words in (
        (lambda run: run["macro_f1"], "Macro F1 is {:.1f} %"),
        (lambda run: run["by_kind"]["mono"]["top1"], "monocrystalline ones {:.1f} %"),
        (lambda run: run["by_kind"]["poly"]["top1"], "polycrystalline ones {:.1f} %"),
        (lambda run: run["head_top1"], "the head alone reaches {:.1f} %"),
    ):
        assert words.format(100 * sum(map(row, runs)) / len(runs)) in text
    assert len(runs) >= 3 and sum(run["top1"] for run in runs) / len(runs) > 0.8842
