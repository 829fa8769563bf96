"""A soup: torch's average of the same networks, choices on images that are not measured on, and a run folder like any other."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch.optim.swa_utils import AveragedModel

import finetune
from finetune.__main__ import main as verb
from finetune.data.dataset import ImageList
from finetune.images.read import read_image
from finetune.inference.evaluate import evaluate
from finetune.inference.predict import compute_logits
from finetune.models.saved import find_model, load_model
from finetune.results.baseline import record_runs
from finetune.results.runs import describe_run
from finetune.run import main
from finetune.tuning.ingredients import read_runs
from finetune.tuning.soup import make_soup, soup_as_text
from finetune.utils.errors import RecipeError
from helpers import on_folder, same_tensors, timm_alone

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """Images that are hard to tell apart, pretrained weights, and a function that trains a run on them, once."""
    root = tmp_path_factory.mktemp("kitchen")
    random = np.random.RandomState(0)
    for split, count in (("train", 14), ("val", 20)):
        for label, name in enumerate(CLASSES):
            (root / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 220, (32, 32, 3))
                pixels[..., label] += random.randint(0, 25)
                Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / split / name / f"{i}.png")
    torch.manual_seed(1)
    safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), root / "weights.safetensors")

    def run(name, *fields):
        fields = ("linear_probe.l2=1", "epochs=1", *fields)
        words = ["--backbone", "test_resnet", "--weights", str(root / "weights.safetensors"), "--quiet"]
        assert main([*on_folder(root / "images", root / name, *fields), *words]) == 0
        return changed(root / name, root / f"{name}-0", "result.json", lambda found: found.update(use="model"))

    run.root = root
    return run


def changed(folder, target, file, change, noise=0.0):
    """A copy of a run with a changed JSON file, and with noise on its network."""
    shutil.copytree(folder, target)
    for path in target.rglob(file):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    state = safetensors.torch.load_file(target / "model" / "model.safetensors")
    random = torch.Generator().manual_seed(round(1000 * noise))
    for name, value in state.items():
        if noise and value.is_floating_point() and ("running" not in name or file == "recipe.json"):
            value.mul_(1 + noise * torch.rand(value.shape, generator=random))
    safetensors.torch.save_file(state, target / "model" / "model.safetensors")
    return target


def seeds(first, number, file="", change=lambda found: None):
    """As many runs like the first, which differ as those of several seeds do: training them would take longer."""
    return [changed(first, first.with_name(f"{first.name}{file}-{i}"), file or "-", change, 0.3 * i) for i in range(number)]


@pytest.fixture(scope="module")
def three(kitchen):
    """Three runs."""
    return seeds(kitchen("seed"), 3)


@pytest.fixture(scope="module")
def held(kitchen):
    """Four runs that held out training images."""
    return seeds(kitchen("held", "data.holdout=0.4"), 4)


def averaged(folders):
    """torch's average of the networks of runs."""
    nets = [load_model(folder).net for folder in folders]
    average = AveragedModel(nets[0])
    for net in nets:
        average.update_parameters(net)
    return average.module.eval()


def rows_of(run, split):
    """The files of a part of a run's images."""
    with open(run / "images.csv", newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["split"] == split]


def top1(net, like, rows):
    """The share of these files that a network has right, by the code of `finetune predict`."""
    model, labels = load_model(like), [CLASSES.index(row["label"]) for row in rows]
    logits, _ = compute_logits(model._replace(net=net), ImageList([row["file"] for row in rows], labels, read_image), "stop", 0)
    return (logits.argmax(1) == torch.tensor(labels)).double().mean().item()


def test_a_uniform_soup_is_torchs_average(three, tmp_path):
    """Its weights are those of AveragedModel on the same networks, and its metric is that network's on the same images."""
    result = make_soup(three, tmp_path / "soup")
    reference = averaged(three)
    for name, value in load_model(tmp_path / "soup").net.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-7, atol=1e-7)
    rows = rows_of(three[0], "val")
    assert rows == rows_of(tmp_path / "soup", "val") and len(rows) == 60
    assert result["top1"] == top1(reference, three[0], rows) and result["soup"]["tried"] == []
    for row, folder in zip(result["soup"]["runs"], three, strict=True):
        assert row["top1"] == top1(load_model(folder).net, folder, rows) and row["network"] == find_model(folder)[0].name
        assert row["soup_minus_run"]["difference"] == pytest.approx(result["top1"] - row["top1"])


@pytest.mark.parametrize("kind", ["three", "held"])
def test_a_greedy_soup_is_the_one_made_by_hand(kind, request, tmp_path):
    """Runs are added in the order of their metric, each if torch's average of them gets no worse, on images that the soup is
    not measured on: held-out training images, or without any the half of the validation images that is not reported."""
    folders = request.getfixturevalue(kind)
    result = make_soup(folders, tmp_path / "soup", greedy=True)
    own, measured = rows_of(tmp_path / "soup", "train"), rows_of(tmp_path / "soup", "val")
    trained = {row["file"] for row in rows_of(folders[0], "train")}
    chosen = [row for row in own if row["file"] not in trained]
    assert trained < {row["file"] for row in own} and not {row["file"] for row in own} & {row["file"] for row in measured}
    assert (kind == "held") == (
        sorted(row["file"] for row in chosen) == sorted(row["file"] for row in rows_of(folders[0], "val"))
    )
    assert all(f"/{'train' if kind == 'held' else 'val'}/" in row["file"] for row in chosen) and len(measured) >= 20
    assert all("/val/" in row["file"] for row in measured) and result["val_images"] == len(measured)

    scores = [top1(load_model(folder).net, folder, chosen) for folder in folders]
    members, best = [], 0.0
    for i in sorted(range(len(folders)), key=lambda i: -scores[i]):
        score = top1(averaged([folders[j] for j in [*members, i]]), folders[0], chosen)
        if score >= best:
            members, best = [*members, i], score
    assert [i for i, row in enumerate(result["soup"]["runs"]) if row["share"]] == sorted(members)
    assert [row["alone"] for row in result["soup"]["tried"]] == sorted(scores, reverse=True)
    assert result["top1"] == top1(averaged([folders[i] for i in members]), folders[0], measured)


def logits_of(folder):
    return safetensors.torch.load_file(folder / "predictions.safetensors")["logits"]


def test_at_the_ends_a_run_and_its_start_are_exact(kitchen, three, tmp_path):
    """A share of 0 is the run, and one of 1 what the training loop started from: a run whose learning rates are 0 in
    float32."""
    still = kitchen("still", "lr_scale=1e-60")
    for share, folder in ((0.0, three[0]), (1.0, still)):
        make_soup(three[:1], tmp_path / f"{share}", toward=True, share=share)
        wanted = load_model(folder)
        assert same_tensors(load_model(tmp_path / f"{share}").net.state_dict(), wanted.net.state_dict())
        rows = rows_of(three[0], "val")
        images = ImageList([row["file"] for row in rows], [0] * len(rows), read_image)
        assert torch.equal(logits_of(tmp_path / f"{share}"), compute_logits(wanted, images, "stop", 0)[0])
    half = make_soup(three[:2], tmp_path / "half", toward=True, share=0.5)
    states = [load_model(folder).net.state_dict() for folder in (*three[:2], still)]
    for name, value in load_model(tmp_path / "half").net.state_dict().items():
        wanted = states[0][name] * 0.25 + states[1][name] * 0.25 + states[2][name] * 0.5
        torch.testing.assert_close(value, wanted.to(value.dtype), rtol=1e-6, atol=1e-6)
    assert half["soup"]["runs"][2]["run"] == "start" and half["val_images"] == 60


def test_a_share_is_chosen_on_other_images(held, tmp_path):
    """It is the first of the best ones on the held-out training images; the metric is of the validation images."""
    result = make_soup(held[:1], tmp_path / "soup", toward=True)
    tried = {row["share_of_start"]: row["average"] for row in result["soup"]["tried"]}
    share = result["soup"]["share_of_start"]
    assert tried[share] == max(tried.values()) and all(tried[one] < tried[share] for one in tried if one < share)
    assert tried[0] == pytest.approx(top1(load_model(held[0]).net, held[0], rows_of(held[0], "val")))
    assert result["val_images"] == 60 and result["top1"] == top1(
        load_model(tmp_path / "soup").net, held[0], rows_of(tmp_path / "soup", "val")
    )


def test_statistics_that_moved_are_computed_anew(three, tmp_path, capsys):
    """Of runs whose batch norm trained, weights are averaged, and statistics are none of the runs' nor their mean."""
    folders = seeds(three[0], 2, "recipe.json", lambda found: found.update(batch_norm="train"))
    make_soup(folders, tmp_path / "soup")
    assert "batch norms differ between the runs: computed anew" in capsys.readouterr().err
    found, (one, other) = (load_model(tmp_path / "soup").net.state_dict(), [load_model(f).net.state_dict() for f in folders])
    moved = [name for name in found if name.endswith("running_var")]
    assert moved and all(not torch.allclose(found[name], (one[name] + other[name]) / 2, rtol=1e-4) for name in moved)
    reference = averaged(folders).state_dict()
    weights = [name for name in found if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(found[name], reference[name], rtol=1e-6, atol=1e-7) for name in weights)


def test_the_folder_is_a_runs(three, kitchen, tmp_path, monkeypatch, capsys):
    """timm, finetune.load, evaluate, export, report and the list of runs take it; evaluation finds the images it is measured
    on; a record of its recipe does not."""
    folder = tmp_path / "runs" / "soup"
    monkeypatch.chdir(tmp_path)
    assert verb(["soup", *map(str, three), "--greedy", "--output", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {key: value for key, value in result.items() if key != "run"} == json.loads((folder / "result.json").read_text())
    page = (folder / "report.html").read_text()
    assert verb(["report", "soup"]) == 0 and (folder / "report.html").read_text() == page
    assert f"points against {result['soup']['best_run']}, the best run" in page
    files = sorted((kitchen.root / "images" / "val").rglob("*.png"))[:8]
    model = finetune.load("soup")
    assert model.classes == CLASSES and read_runs([folder]).recipe.data.holdout == 0
    predicted = [row["predicted"] for row in model.predict(files)]
    assert predicted == [CLASSES[i] for i in timm_alone(folder / "model", files).argmax(1).tolist()]
    assert (folder / "model" / "config.json").read_text() == (find_model(three[0])[0] / "config.json").read_text()
    found = evaluate(folder, kitchen.root / "images")
    assert (found["val_images"], found["top1"]) == (result["val_images"], result["top1"]) and found["val_images"] < 60
    assert describe_run(folder)["value"] == result["top1"] and describe_run(folder)["state"] == "finished"
    card = finetune.load(folder).export("timm", tmp_path / "exported") / "README.md"
    assert "a soup, the average of the weights of" in card.read_text()
    with pytest.raises(RecipeError, match="a soup is no run of its recipe"):
        record_runs([folder])
    assert max(map(len, soup_as_text(result | {"run": "soup"}).splitlines())) <= 80


CHANGES = {
    "classes differ: the same in another order": ("config.json", lambda found: found["label_names"].reverse()),
    "classes differ: only in seed-0-0: red; only in other: pink": (
        "config.json",
        lambda found: found.update(label_names=["blue", "green", "pink"]),
    ),
    "preprocessing differ": ("config.json", lambda found: found["pretrained_cfg"].update(crop_pct=0.5)),
    "networks differ: test_resnet and test_vit": ("recipe.json", lambda found: found.update(backbone="test_vit")),
    "files of pretrained weights differ": ("run.json", lambda found: found.update(weights="0")),
    "validation images differ": ("run.json", lambda found: found["images"].update(validation="12 0")),
    "is no finished run": ("result.json", None),
    "is a smoke run": ("result.json", lambda found: found.update(smoke=True)),
}


@pytest.mark.parametrize("said", CHANGES)
def test_runs_of_another_kind_are_refused(three, tmp_path, said):
    """The sentence names the run and the difference, and nothing is written."""
    file, change = CHANGES[said]
    other = changed(three[1], tmp_path / "other", file, change or (lambda found: None))
    if change is None:
        (other / file).unlink()
    with pytest.raises(RecipeError, match=said):
        make_soup([three[0], other], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_what_can_not_be_made_is_refused(kitchen, three, tmp_path):
    """One run, a run named twice, a share without its option or out of range, a start with a random head, other weights."""
    bare = changed(three[0], tmp_path / "bare", "recipe.json", lambda found: found.update(linear_probe=None))
    for folders, options, said in (
        (three[:1], {}, "a soup needs two runs or more"),
        ([three[0], three[0]], {}, "is named twice"),
        (three, {"share": 0.5}, "with --toward pretrained"),
        (three, {"toward": True, "share": 1.5}, "0 to 1"),
        (three[:1], {"toward": True, "greedy": True}, "--greedy chooses among runs"),
        ([bare], {"toward": True}, "random head"),
        (three, {"data": str(kitchen.root / "images" / "val")}, "images of .* are not those of the runs"),
    ):
        with pytest.raises(RecipeError, match=said):
            make_soup(folders, tmp_path / "soup", **options)
    moved = shutil.copytree(kitchen.root / "images", tmp_path / "moved")
    shutil.copy(moved / "val" / "red" / "0.png", moved / "val" / "red" / "1.png")
    with pytest.raises(RecipeError, match="1 images have another content than the runs had"):
        make_soup(three, tmp_path / "soup", data=str(moved))
    weights, kept = kitchen.root / "weights.safetensors", (kitchen.root / "weights.safetensors").read_bytes()
    try:
        weights.write_bytes(kept[:-4] + b"abcd")
        with pytest.raises(RecipeError, match="another file than the one that the runs started from"):
            make_soup(three, tmp_path / "soup", toward=True, share=0.5)
    finally:
        weights.write_bytes(kept)
    assert not Path(tmp_path / "soup").exists()
