"""report.html, read by Python's HTML parser: its numbers are those of scikit-learn, and names of any kind stay names."""

import base64
import hashlib
import io
import json
import re
import shutil
from statistics import fmean

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, classification_report, confusion_matrix
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from finetune.__main__ import main as verb
from finetune.images.transforms import eval_transform
from finetune.models.saving import save_model
from finetune.page import gallery
from finetune.page.charts import binned, run_charts
from finetune.page.write import write_page
from finetune.report.heat_maps import heat_maps, overlay
from helpers import ALL, PREPROCESSING
from pages import HOSTILE, Page, images_named, predictions_of, write_finished_run


def page_of(folder, classes=3, number=60, images="named", said=(("use", "model: the last epoch"),), **options):
    """(the page of a run with these many classes and images, its logits, its labels)."""
    logits, labels = predictions_of(classes, number)
    names = options.pop("names", [f"class {i}" for i in range(classes)])
    run = write_finished_run(folder / "run", logits, labels, names, **options)
    files = images_named([f"folder/{i}.jpg" for i in range(number)]) if images == "named" else images
    return Page(write_page(run, files, said)), logits, labels


@pytest.mark.parametrize("classes", [2, 10, 30])
def test_numbers_are_scikit_learns(tmp_path, classes):
    """The result, each class, and each pair of classes are as scikit-learn counts them; of many classes, pairs are a list."""
    page, logits, labels = page_of(tmp_path, classes, 200)
    guesses, names = logits.argmax(1), [f"class {i}" for i in range(classes)]
    report = classification_report(
        labels, guesses, labels=range(classes), target_names=names, output_dict=True, zero_division=0
    )
    (number,) = page.all("p", **{"class": "number"})
    assert number["text"] == f"{100 * report['accuracy']:.2f}\N{NO-BREAK SPACE}% top-1"
    head, *rows = page.table(id="class-table")
    assert head == ["class", "images", "precision", "recall", "F1"]
    assert {row[0] for row in rows} == set(names)
    assert [row[4] for row in rows] == sorted(
        (row[4] for row in rows), key=lambda cell: float(cell.split("\N{NO-BREAK SPACE}")[0])
    )
    for name, images, *shares in rows:
        found = report[name]
        assert int(images) == found["support"]
        for share, key in zip(shares, ("precision", "recall", "f1-score"), strict=True):
            value, _, interval = share.partition("\N{NO-BREAK SPACE}%")
            assert value == f"{100 * found[key]:.2f}"
            if interval:
                low, high = map(float, interval.split(" to "))
                assert low - 0.05 <= float(value) <= high + 0.05 and low < high
    counts = confusion_matrix(labels, guesses, labels=range(classes))
    if classes <= 20:
        cells = [[int(cell or 0) for cell in row[1:]] for row in page.table(**{"class": "matrix"})[1:]]
        np.testing.assert_array_equal(cells, np.c_[counts, counts.sum(1)])
    else:
        wrong = {(names[i], names[j]): counts[i, j] for i, j in zip(*counts.nonzero(), strict=True) if i != j}
        listed = page.table(id="confusion-table")[1:]
        assert {(row[0], row[1]): int(row[2]) for row in listed} == wrong
        assert [int(row[2]) for row in listed] == sorted(wrong.values(), reverse=True)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
def test_a_number_leads_to_its_images(tmp_path, loss):
    """The group behind each cell has that cell's images, the highest loss first, with the probability of what was predicted."""
    page, logits, labels = page_of(tmp_path, 3, 60, changes={"loss": loss})
    guesses, probs = logits.argmax(1), logits.softmax(1) if loss == "cross_entropy" else logits.sigmoid()
    losses = cross_entropy(logits, labels, reduction="none")
    if loss == "binary":
        losses = binary_cross_entropy_with_logits(logits, one_hot(labels).float(), reduction="none").mean(1)
    data, seen = page.data, 0
    for label, guess, number, images in data["groups"]:
        at = [int(data["images"][slot][0].removeprefix("folder/").removesuffix(".jpg")) for slot, _ in images]
        inside = ((labels == label) & (guesses == guess)).nonzero().flatten().tolist()
        assert set(at) <= set(inside) and len(at) == min(24, number) and number == len(inside)
        np.testing.assert_allclose([prob for _, prob in images], probs[at, guess], atol=1e-4)
        assert at == sorted(inside, key=lambda i: -losses[i])[: len(at)]
        seen += number
    assert seen == 60 and all(picture.startswith("data:image/jpeg;base64,") for _, picture in data["images"])
    buttons = {(button["data-group"], int(button["text"])) for button in page.all("button") if "data-group" in button}
    assert buttons == {(str(i), group[2]) for i, group in enumerate(data["groups"])}
    shown = [figure["text"].split() for figure in page.all("figure") if "labelled" in figure["text"]]
    worst = sorted((guesses != labels).nonzero().flatten().tolist(), key=lambda i: -losses[i])[:24]
    assert [row[0] for row in shown[: len(worst)]] == [f"folder/{i}.jpg" for i in worst]


def test_several_labels_have_average_precisions(tmp_path):
    """No confusion matrix, but each class's average precision as scikit-learn has it, and its missed and surplus images."""
    logits, truth = torch.randn(80, 4, generator=torch.Generator().manual_seed(0)), torch.arange(320).reshape(80, 4) % 3 == 0
    changes = {"loss": "multi_label", "metric": "mean_average_precision"}
    run = write_finished_run(tmp_path / "run", logits, truth.float(), "abcd", changes)
    page = Page(write_page(run, images_named([f"{i}.jpg" for i in range(80)]), []))
    assert not [one for one in page.elements if one.get("id") == "confusions"]
    head, *rows = page.table(id="class-table")
    assert head[2] == "average precision" and len(rows) == 4
    for name, images, precision, *_ in rows:
        column = "abcd".index(name)
        assert int(images) == truth[:, column].sum()
        expected = average_precision_score(truth[:, column], logits[:, column])
        assert float(precision[:-2]) == pytest.approx(100 * expected, abs=0.006)
    for label, guess, number, _ in page.data["groups"]:
        column = label if guess is None else guess
        assert number == ((truth[:, column] == (guess is None)) & ((logits[:, column] > 0) == (label is None))).sum()


def test_names_of_any_kind_are_text(tmp_path):
    """Markup, quotes, line breaks, scripts from right to left and bytes that are no UTF-8 stay text, in classes and files."""
    names, files = HOSTILE, [f"{HOSTILE[i % 8]}/{HOSTILE[(i + 1) % 8]}.jpg" for i in range(80)]
    page, _, _ = page_of(tmp_path, 8, 80, names=names, images=images_named(files), said=[("use", HOSTILE[0])])
    assert len(page.all("script")) == 2 and "hacked" not in page.all("script")[1]["text"]
    assert not [key for one in page.elements for key in one if key.startswith("on")]
    shown = {row[0] for row in page.table(id="class-table")[1:]}
    assert (
        HOSTILE[0] in shown
        and HOSTILE[1] in shown
        and "two\\nlines" in shown
        and "a\ufffd\ufffd" in shown
        and HOSTILE[7] in shown
    )
    assert page.data["classes"][:3] == HOSTILE[:3] and HOSTILE[0] in page.all("dl", **{"class": "said"})[0]["text"]


def test_the_page_stands_alone(tmp_path):
    """Nothing on it comes from elsewhere: no address but of files beside it, and only its own script and style may run."""
    page, _, _ = page_of(tmp_path)
    (policy,) = (one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        digest = base64.b64encode(hashlib.sha256(page.all(tag)[-1]["text"].encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert not [one for one in page.elements if "style" in one]
    links = [one[key] for one in page.elements for key in ("src", "href") if key in one]
    assert all(re.match(r"data:image/jpeg;base64,|#\w+$|[\w.]+$", link) for link in links)
    assert not re.search(r"url\(|@import|https?:", page.all("style")[0]["text"] + page.all("script")[1]["text"])
    files = [one["href"] for one in page.all("a") if not one["href"].startswith("#")]
    assert files and all((tmp_path / "run" / name).is_file() for name in files)


def test_what_a_run_does_not_know_is_left_out(tmp_path):
    """Intervals, calibration, subgroups and SMOKE RUN stand on the page of a run that has them, and on no other."""
    words = ("SMOKE RUN", "61.2 to 66.6", "Calibration", "Subgroups", "stopped early")
    part = {"val_images": 7, "top1": 0.51, "macro_f1": 0.5}
    result = {"smoke": True, "intervals": {"top1": [0.612, 0.666]}, "by_subgroup": {"<left>": part}, "epochs": 3}
    result |= {"calibration": {"temperature": 1.31, "log_loss": [1, 0.9], "ece": [0.081, 0.024]}}
    old, _, _ = page_of(tmp_path)
    new, _, _ = page_of(tmp_path, result=result)
    assert not [word for word in words if word in old.text] and not [word for word in words if word not in new.text]
    assert new.table(id="subgroup-table")[1] == ["<left>", "7", "51.00\N{NO-BREAK SPACE}%", "50.00\N{NO-BREAK SPACE}%"]
    assert (
        "off by 8.1\N{NO-BREAK SPACE}%" in new.text
        and "2.4\N{NO-BREAK SPACE}% with logits divided by 1.31, as they are here" in new.text
    )
    assert "accelerate launch finetune/run.py --data &#39;a b&#39;" in old.text


@pytest.mark.parametrize("images", [None, "gone", "some"])
def test_images_that_can_not_be_read_are_said(tmp_path, images):
    """Without any, and where some break off, the page has its numbers and its files' names, and says what it lacks."""
    files = images_named([f"{i}.jpg" for i in range(60)])

    def read(item, **options):
        if images == "gone" or int(item[:-4]) % 2:
            raise OSError("cut")
        return files.read(item)

    given = None if images is None else type(files)(files.items, files.labels, read)
    page, logits, labels = page_of(tmp_path, images=given)
    assert len(page.table(id="class-table")) == 4 and len(page.table(**{"class": "matrix"})) == 4
    (said,) = page.all("p", **{"class": "note lost"})
    assert said["text"].startswith("Images that can't be read" if images == "some" else "Without images: ")
    pictures = [picture for _, picture in page.data["images"]]
    assert any(pictures) == (images == "some") and not all(pictures)


def test_a_run_that_diverged_has_a_page(tmp_path):
    """Logits and metrics that are NaN leave a page whose script can read what it is given."""
    labels = torch.arange(30) % 3
    run = write_finished_run(tmp_path / "run", torch.full((30, 3), torch.nan), labels, "abc")
    page = Page(write_page(run, images_named([f"{i}.jpg" for i in range(30)]), []))
    assert sum(group[2] for group in page.data["groups"]) == 30 and "NaN" not in page.all("script", id="data")[0]["text"]


def test_a_large_run_has_a_small_page(tmp_path):
    """Of 10,000 images of 1,000 classes, all noise, it stays under 5 MB, and says how many of the mistakes it shows."""
    page, logits, labels = page_of(
        tmp_path, 1000, 10_000, images=images_named([f"folder/{i:020}.jpg" for i in range(10_000)], 160)
    )
    assert len(page.text) < 5e6
    wrong = int((logits.argmax(1) != labels).sum())
    assert f"24 of {wrong:,} mistakes shown" in page.text and f"of {len(page.data['groups']):,} pairs" in page.text
    assert sum(bool(picture) for _, picture in page.data["images"]) > 200


def test_mistakes_have_heat_maps(tmp_path):
    """Beside each of the worst mistakes is what heat_maps and overlay make of its image for the class that was predicted."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=3)
    inputs = PREPROCESSING | {"input_size": (3, 128, 128)}
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run" / "model", net, inputs, ("class 0", "class 1", "class 2"))
    page, logits, labels = page_of(tmp_path, changes={"backbone": "test_resnet", "head": None, "groups": ALL})
    pixels = np.array(images_named(["x"])[0][0])
    transform = eval_transform(inputs)
    batch = transform.batch(transform.image(pixels)[None])
    heats = [picture for picture in page.all("img") if picture["alt"]]
    worst = cross_entropy(logits, labels, reduction="none").argsort(descending=True)
    worst = [i for i in worst.tolist() if logits[i].argmax() != labels[i]][:24]
    assert len(heats) == len(worst)
    for picture, i in zip(heats, worst, strict=True):
        expected = np.asarray(overlay(pixels, heat_maps(net.eval(), batch, logits[i : i + 1].argmax(1))[0], inputs))
        with Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))) as shown:
            assert (
                np.abs(np.asarray(shown, float) - expected).mean() < 8
            )  # JPEG's part is 3.6; with another class it is 15 or more


def test_pictures_go_round_the_groups():
    """Wrong images come before right ones, and each group has its first before any has its second."""
    groups = [
        gallery.Group(0, 0, 2, [(0, 0.9), (1, 0.8)]),
        gallery.Group(0, 1, 3, [(2, 0.9), (3, 0.8), (4, 0.7)]),
        gallery.Group(1, 0, 1, [(5, 0.9)]),
    ]
    assert gallery.thumbnail_order(groups) == [2, 5, 3, 4, 0, 1]


def test_charts_draw_the_log(tmp_path):
    """A line's points, read off by its ticks, are the metrics of metrics.jsonl; of many points each is numpy's mean of some."""
    run = page_of(tmp_path) and tmp_path / "run"
    charts = {chart.title: chart for chart in run_charts(run, "top1")}
    assert list(charts) == ["Loss", "Validation top-1, %", "Learning rates", "Gradient norm"]

    def read(ticks, places):
        at, values = zip(*sorted((at, float(text)) for at, text in ticks), strict=True)
        slope, start = np.polyfit(at, values, 1)
        return slope * np.array(places) + start

    chart = charts["Validation top-1, %"]
    points = np.array([point.split(",") for point in chart.lines[0]["path"].split()], float)
    np.testing.assert_allclose(read(chart.y_ticks, points[:, 1]), [25, 30, 40, 50, 60], atol=0.05)
    np.testing.assert_allclose(read(chart.x_ticks, points[:, 0]), [0, 1, 2, 3, 4], atol=0.01)
    assert [line["name"] for line in charts["Learning rates"].lines] == ["head", "body"]
    values = np.random.rand(900)
    drawn = binned(list(enumerate(values)), fmean)
    np.testing.assert_allclose([y for _, y in drawn], values.reshape(300, 3).mean(1))


def test_a_page_is_made_again(run_folder, tmp_path, monkeypatch, capsys):
    """finetune report finds a run's images by its table of files, where they lie now as well, and leaves out changed ones."""
    source = json.loads((run_folder / "recipe.json").read_text())["data"]["source"]
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.copytree(source, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    first, second, *_ = (tmp_path / "moved" / "val" / "red").iterdir()
    shutil.copy(first, second)
    pages = []
    for more in ([], ["--data", "moved", "--output", "other.html"]):
        assert verb(["report", "run", *more]) == 0
        pages.append(Page(tmp_path / capsys.readouterr().out.strip()))
    own, again = pages
    assert (tmp_path / "run" / "report.html").is_file() and own.table(id="class-table") == again.table(id="class-table")
    missing = [sum(not picture for _, picture in page.data["images"]) for page in pages]
    assert missing == [0, 1] and "and have no picture: 1." in again.text
    assert "run/result.json" in {link["href"] for link in again.all("a")}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (tmp_path / "run" / "result.json").write_text(json.dumps({key: result[key] for key in result if not key.startswith("use")}))
    (tmp_path / "run" / "run.json").unlink()  # as of a run of an early version
    assert verb(["report", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": "run/report.html", "without_images": ""}
    assert Page(tmp_path / "run" / "report.html").table(id="class-table") == own.table(id="class-table")
    (tmp_path / "run" / "result.json").unlink()
    assert verb(["report", "run"]) == 2 and "is no finished run" in capsys.readouterr().err
