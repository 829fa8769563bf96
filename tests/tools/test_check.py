"""finetune check: what is there twice, labelled wrongly, or odd."""

import csv
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image, ImageFilter
from sklearn.neighbors import NearestNeighbors

from finetune.__main__ import main
from finetune.data.sources import load_data
from finetune.images.transforms import eval_transform
from finetune.models.pretrained import preprocessing
from finetune.recipe.recipe import minimal_recipe
from finetune.tools.check import Finding, check, find_odd_ones, left_out, write_table
from finetune.tools.image_stats import Collection, look_at
from finetune.tools.label_errors import NEIGHBOURS, compute_features, find_label_errors, find_outliers, out_of_fold_probs
from finetune.utils.errors import RecipeError
from image_files import CHANGES, PHOTOS, TILES, source


@pytest.fixture
def photos(tmp_path):
    """Two classes in train/ and val/, every file another cut out of two photographs."""
    root, number = tmp_path / "photos", 0
    for part, count in (("train", 12), ("val", 8)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                TILES[number].save(root / part / name / f"{i}.png")
                number += 1
    return root


def kinds(root, **options):
    """{(kind, names)} of what is found without a network."""
    images, findings, _ = check(str(root), weights="none", **options)
    return {(finding.kind, *(images.names[i] for i in finding.images)) for finding in findings}


def test_each_kind_of_pair_is_told(photos):
    """Pairs are told by their labels, then by the split, then by whether all pixels are the same; each pair comes once."""
    assert kinds(photos) == set()
    train, val = photos / "train", photos / "val"
    Image.open(train / "a" / "0.png").save(train / "b" / "other.bmp")  # other bytes, the same pixels
    Image.open(train / "a" / "1.png").save(val / "a" / "leak.bmp")
    Image.open(train / "a" / "2.png").save(train / "a" / "twice.bmp")
    for name, change in (("b", "mirrored"), ("a", "cropped")):
        CHANGES[change](Image.open(train / "a" / "3.png")).save(val / name / f"{change}.png")
    CHANGES["smaller"](Image.open(val / "b" / "4.png")).save(val / "b" / "small.png")
    assert kinds(photos) == {
        ("same, other label", "train/a/0.png", "train/b/other.bmp"),
        ("same, across", "train/a/1.png", "val/a/leak.bmp"),
        ("same, twice", "train/a/2.png", "train/a/twice.bmp"),
        ("near, other label", "train/a/3.png", "val/b/mirrored.png"),
        ("near, across", "train/a/3.png", "val/a/cropped.png"),
        ("near, other label", "val/a/cropped.png", "val/b/mirrored.png"),
        ("near, twice", "val/b/4.png", "val/b/small.png"),
    }


def test_odd_images_are_told(photos):
    """Blank, small and long images, and one that breaks off, are found, and no others."""
    folder = photos / "train" / "a"
    Image.new("RGB", (80, 80), (9, 90, 9)).save(folder / "blank.png")
    PHOTOS[1].crop((300, 50, 316, 66)).save(folder / "small.png")
    PHOTOS[0].crop((0, 150, 640, 290)).save(folder / "long.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:3000])
    odd = [("blank", "blank.png"), ("unreadable", "cut.png"), ("odd size", "long.png"), ("odd size", "small.png")]
    assert kinds(photos) == {(kind, f"train/a/{name}") for kind, name in odd}


def test_blurred_images_are_told():
    """Among sharp images of one kind the blurred one is found, and no other."""
    looks = {i: look_at(tile) for i, tile in enumerate(TILES[:21])}
    looks[21] = look_at(TILES[10].filter(ImageFilter.GaussianBlur(4)))
    assert [(finding.kind, finding.images) for finding in find_odd_ones(looks)] == [("blurred", (21,))]


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_label_errors_are_cleanlabs(classes):
    """Which labels are likely wrong, and in which order, is what cleanlab's confident learning says."""
    cleanlab = pytest.importorskip("cleanlab.filter")
    random = np.random.RandomState(classes)
    labels = random.randint(0, classes, 800)
    probs = torch.from_numpy(random.randn(800, classes) + 3 * np.eye(classes)[labels]).softmax(1).numpy()
    labels[:60] = random.randint(0, classes, 60)
    theirs = cleanlab.find_label_issues(
        labels, probs, filter_by="confident_learning", return_indices_ranked_by="self_confidence", n_jobs=1
    )
    found = find_label_errors(probs, labels)
    assert [i for i, _, _ in found] == list(theirs) and len(found) > 10
    assert all(guess == probs[i].argmax() for i, guess, _ in found)


def test_planted_labels_are_found_out_of_fold():
    """On features that tell classes apart, most wrong labels are found, and few others."""
    random = np.random.RandomState(0)
    truth = random.randint(0, 4, 400)
    features = torch.from_numpy(random.randn(400, 16) + 4 * np.eye(16)[truth]).float()
    labels, wrong = truth.copy(), set(range(0, 400, 20))
    for i in wrong:
        labels[i] = (truth[i] + 1) % 4
    probs = out_of_fold_probs(features, labels, list(map(str, range(400))))
    assert (probs.argmax(1) == truth).mean() > 0.97
    found = {i for i, guess, _ in find_label_errors(probs, labels) if guess == truth[i]}
    assert len(found & wrong) >= 16 and len(found - wrong) <= 2


def test_no_image_is_judged_by_a_probe_that_has_seen_it():
    """On features that tell nothing, of more dimensions than images, labels are guessed no better than by chance."""
    random = np.random.RandomState(0)
    features, labels = torch.from_numpy(random.randn(120, 300)).float(), random.randint(0, 2, 120)
    probs = out_of_fold_probs(features, labels, list(map(str, range(120))))
    assert (probs.argmax(1) == labels).mean() < 0.5 + 4 * np.sqrt(0.25 / 120)  # four standard deviations


def test_outliers_are_far_from_scikit_learns_neighbours():
    """The farthest images are those with the largest mean distance to the nearest neighbours that scikit-learn finds."""
    random = np.random.RandomState(0)
    features = random.randn(300, 8) * 0.1 + np.eye(8)[random.randint(0, 3, 300)]
    features[:3] = -np.eye(8)[5:8]
    found = find_outliers(torch.from_numpy(features))
    centred = features - features.mean(0)
    theirs = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, metric="cosine").fit(centred).kneighbors(centred)[0][:, 1:].mean(1)
    assert [i for i, _ in found] == np.argsort(-theirs)[: len(found)].tolist() and {0, 1, 2} <= {i for i, _ in found}
    assert len(found) < 15


def test_the_network_finds_copies_that_pixels_do_not_show(photos):
    """An image turned by 15 degrees in the other part of the split is a finding of its own kind; pairs are reported once."""
    Image.open(photos / "val" / "a" / "1.png").rotate(15, Image.Resampling.BICUBIC).save(photos / "train" / "a" / "turned.png")
    Image.open(photos / "val" / "a" / "2.png").save(photos / "train" / "a" / "leak.bmp")
    (pair, both), kinds = ({"train/a/turned.png", "val/a/1.png"}, {"train/a/leak.bmp", "val/a/2.png"}), {}
    for weights in ("none", None):  # then with the installed network
        images, findings, _ = check(str(photos), weights=weights)
        found = [(one.kind, {images.names[i] for i in one.images}) for one in findings if len(one.images) == 2]
        kinds[weights] = [[kind for kind, names in found if names == wanted] for wanted in (pair, both)]
    assert kinds == {"none": [[], ["same, across"]], None: [["alike, across"], ["same, across"]]}


def test_a_fixed_table_is_what_training_reads(photos, monkeypatch, capsys):
    """--fix writes a table without duplicates and bad files, with the same split; no file is touched or replaced."""
    monkeypatch.chdir(photos.parent)
    Image.open("photos/train/a/1.png").save("photos/val/a/leak.bmp")
    Image.open("photos/val/b/1.png").save("photos/val/b/twice.bmp")
    Image.open("photos/train/a/0.png").save("photos/train/b/other.bmp")
    Path("photos/train/b/cut.png").write_bytes(Path("photos/train/b/0.png").read_bytes()[:3000])
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    command = ["check", "--data", "photos", "--weights", "none", "--fix", "good.csv"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "good.csv: 39 images, without 5" in out and max(map(len, out.splitlines())) <= 80
    assert "not looked for: wrong labels and outliers: there are no weights" in out
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before
    data = load_data(source("good.csv"))
    names = {part: {path.name for path in images.items} for part, images in (("train", data.train), ("val", data.val))}
    assert "leak.bmp" in names["val"] and not {"twice.bmp", "other.bmp", "cut.png"} & (names["train"] | names["val"])
    assert (len(data.train), len(data.val)) == (12 + 12 - 2, 8 + 8 + 1)
    assert main(command) == 2 and "good.csv is there already" in capsys.readouterr().err
    assert main(["check", "--data", "good.csv", "--weights", "none"]) == 0 and "nothing found" in capsys.readouterr().out


def test_validation_images_with_doubtful_labels_stay(photos):
    """A table of the good images keeps what a network doubts in validation, where leaving it out would flatter the metric."""
    images = Collection(load_data(source(photos)), str(photos))
    findings = [Finding("label", (0,)), Finding("label", (30,)), Finding("outlier", (1,)), Finding("blurred", (2,))]
    assert left_out(images, findings) == {0}
    assert left_out(images, [Finding("near, other label", (3, 31)), Finding("same, other label", (4, 32))]) == {3, 4, 32}
    pairs = [Finding("near, across", (5, 33)), Finding("same, twice", (6, 7)), Finding("same, twice", (6, 8))]
    assert left_out(images, pairs) == {5, 7, 8}
    alike = [Finding("alike, across", (9, 34)), Finding("alike, twice", (10, 11)), Finding("alike, other label", (12, 13))]
    assert left_out(images, alike) == {9}  # the rest is there to be looked at


def test_no_copy_of_a_validation_image_stays(photos):
    """Of several copies of a validation image in training, with one in validation, none is left in the table."""
    for name in ("train/a/x", "train/a/y", "val/a/z"):
        Image.open(photos / "val" / "a" / "1.png").save(photos / f"{name}.bmp")
    images, findings, _ = check(str(photos), weights="none")
    assert {images.names[i] for i in left_out(images, findings)} == {"train/a/x.bmp", "train/a/y.bmp", "val/a/z.bmp"}


def test_the_json_has_it_all(photos, tmp_path, monkeypatch, capsys):
    """--json gives the classes, what the loader said and every finding with its images; the picture shows them."""
    monkeypatch.chdir(tmp_path)
    for i in range(5):
        Image.open(photos / "train" / "a" / f"{i}.png").save(photos / "val" / "a" / f"leak{i}.bmp")
    (photos / "train" / "a" / "notes.txt").write_text("-")
    assert main(["check", "--data", str(photos), "--weights", "none", "--json", "--output", "out"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["classes"][0] == {"class": "a", "images": 25, "train": 12, "val": 13, "side": [80, 80]}
    assert any("files that end in .txt: 1" in line for line in shown["said"]) and shown["agreed"] is None
    assert Counter(row["kind"] for row in shown["findings"]) == {"same pixels, training and validation": 5}
    assert shown["findings"][0]["images"][1] == {"name": "val/a/leak0.bmp", "split": "val", "label": "a"}
    assert Image.open(shown["picture"]).width > 400 and shown["picture"] == "out/photos-check.png"


def test_several_labels_an_image_and_sets_in_memory(tmp_path, monkeypatch, capsys):
    """Images of several labels are compared by all of them; a named set has no files to write into a table."""
    for i, tile in enumerate(TILES[:12]):
        tile.save(tmp_path / f"{i}.png")
    TILES[0].save(tmp_path / "12.bmp")
    labels = ["a;b", "a", "b"] * 4 + ["a"]
    with open(tmp_path / "l.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("path", "label"), *((f"{i}.{'bmp' if i == 12 else 'png'}", label) for i, label in enumerate(labels))]
        )
    images, findings, facts = check(str(tmp_path / "l.csv"), weights="none")
    assert [(one.kind, {images.label(i) for i in one.images}) for one in findings] == [("same, other label", {"a;b", "a"})]
    assert [row["images"] for row in facts["classes"]] == [9, 8]
    monkeypatch.chdir(tmp_path)
    assert main(["check", "--data", "digits", "--weights", "none", "--fix", "d.csv"]) == 2
    assert "--fix needs images that are files of their own" in capsys.readouterr().err


def test_a_table_holds_names_of_several_lines(photos):
    """A file's name with a line break is shown in one line, and written so that a run reads it."""
    (photos / "train" / "a" / "0.png").rename(photos / "train" / "a" / "0\n.png")
    images, findings, _ = check(str(photos), weights="none")
    assert "train/a/0\\n.png" in images.names
    write_table(images, findings, photos / "good.csv")
    assert len(load_data(source(photos / "good.csv")).train) == len(images.parts[0])


@pytest.mark.parametrize("name", ["a|b", "a ", b"caf\xe9".decode(errors="surrogateescape")])
def test_names_that_a_table_can_not_hold_are_refused(photos, name):
    """A class that a table would take for two, or a name that is no text, is named before a table is written."""
    for part in ("train", "val"):
        (photos / part / "a").rename(photos / part / name)
    images, findings, _ = check(str(photos), weights="none")
    with pytest.raises(RecipeError, match="a table can't hold this name"):
        write_table(images, findings, photos / "good.csv")
    assert not (photos / "good.csv").exists()


def test_suggest_and_a_run_say_what_is_there_twice(photos, tmp_path, capsys):
    """The start of a run, and suggest, say in one line how many files are there twice where they must not be."""
    shutil.copy(photos / "train" / "a" / "1.png", photos / "val" / "a" / "leak.png")
    shutil.copy(photos / "train" / "a" / "2.png", photos / "train" / "b" / "other.png")
    assert main(["suggest", "--data", str(photos), "--weights", "none", "--backbone", "resnet18"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune: data:")]
    assert "1 of 17 validation images are training images as well" in line
    assert "2 files have the same content as another with another label" in line and line.endswith(
        f"finetune check --data {photos}"
    )


def test_images_are_judged_by_the_named_networks_features(photos, tmp_path):
    """With --backbone and --weights the features are those of timm's own network before its head, and labels are judged."""
    net, file = timm.create_model("test_resnet", num_classes=5).eval(), tmp_path / "weights.safetensors"
    safetensors.torch.save_file(net.state_dict(), file)
    images, _, facts = check(str(photos), "test_resnet", str(file))
    recipe = replace(minimal_recipe("test_resnet", str(photos), 64, batch_size=8), weights=str(file))
    features = compute_features(recipe, images, images.data.classes)
    transform = eval_transform(preprocessing(recipe, net))
    batch = transform.batch(torch.stack([transform.image(np.array(images[i][0])) for i in range(len(images))]))
    with torch.no_grad():
        theirs = net.forward_head(net.forward_features(batch), pre_logits=True)
    torch.testing.assert_close(features, theirs, rtol=1e-4, atol=1e-5)
    assert 0 < facts["agreed"] <= 1 and facts["not_done"] == []
    with pytest.raises(RecipeError, match="none.safetensors"):
        check(str(photos), "test_resnet", str(tmp_path / "none.safetensors"))
