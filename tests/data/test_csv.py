"""Tables of images and labels."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import MultiLabelBinarizer

from finetune.__main__ import main as command
from finetune.data.loader import load
from finetune.data.sources import load_data
from finetune.run import main
from finetune.utils.errors import RecipeError
from helpers import on_folder, prepare
from image_files import assert_same_set, put_image, source, write_csv

MULTI = {"loss": "multi_label", "metric": "mean_average_precision"}


@pytest.mark.parametrize(
    "header,val", [("path,label,split", "val"), ("Split, class ,FILE", "Validation"), ("\ufefffilename,target,split", "test")]
)
def test_a_csv_has_the_images_and_labels_of_the_folders(image_folder, tmp_path, header, val):
    """A table with a split column is read as the same files in torchvision's class folders are; val comes before test."""
    order = (0, 1, 2) if header[0] != "S" else (2, 1, 0)
    rows = [
        (str(path), path.parent.name, {"train": "train", "val": val}[part])
        for part in ("train", "val")
        for path in sorted((image_folder / part).rglob("*.png"))
    ]
    rows += [(rows[0][0], "blue", "test")] * (val != "test")
    data = load_data(source(write_csv(tmp_path, [",".join(row[i] for i in order) for row in rows], header)))
    assert data.classes == ("blue", "green", "red")
    assert_same_set(data.train, torchvision.datasets.ImageFolder(image_folder / "train"))
    assert_same_set(data.val, torchvision.datasets.ImageFolder(image_folder / "val"))


def test_a_csv_without_a_split_is_split_as_the_folders_are(image_folder, tmp_path):
    """Without a split column the images validate that validate in a folder: those are drawn by their paths beside the table."""
    folder = torchvision.datasets.ImageFolder(image_folder / "train")
    for name in folder.classes:
        (tmp_path / name).symlink_to(image_folder / "train" / name)
    rows = [f"{Path(path).relative_to(image_folder / 'train')},{folder.classes[label]}" for path, label in folder.samples]
    ours, theirs = load_data(source(write_csv(tmp_path, rows, "image,label"))), load_data(source(image_folder / "train"))
    for part in ("train", "val"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        assert [path.resolve() for path in mine.items] == [Path(path).resolve() for path in other.items]
        assert list(mine.labels) == list(other.labels)


@pytest.mark.parametrize("split", [True, False])
def test_several_labels_in_a_cell_are_vectors(tmp_path, split):
    """Cells with several labels become scikit-learn's indicator vectors, empty ones zeros, in both parts of a split."""
    cells = ["a;b", "c", "b|c", "", "a; b ;c", "a"] * 5 + ["a;d", "b;d", "c;d"]
    rows = [
        f"{put_image(tmp_path / f'{i}.png', i).name},{cell}" + f",{('train', 'val')[i % 5 == 0]}" * split
        for i, cell in enumerate(cells)
    ]
    file = write_csv(tmp_path, rows, "path,label" + ",split" * split)
    data = load_data(source(file, **MULTI))
    binarizer = MultiLabelBinarizer()
    wanted = binarizer.fit_transform([[name.strip() for name in cell.replace("|", ";").split(";") if name] for cell in cells])
    assert data.classes == tuple(binarizer.classes_) and len(data.train) + len(data.val) == 33
    assert not split or (len(data.train), len(data.val)) == (26, 7)
    assert all(np.stack(part.labels).any(0).all() for part in (data.train, data.val))
    for part in (data.train, data.val):
        assert np.array_equal(np.stack(part.labels), [wanted[int(path.stem)] for path in part.items])
        assert np.array_equal(np.stack([part[i][1] for i in range(len(part))]), np.stack(part.labels))
    images = prepare(source(file, **MULTI))[2][0]
    labels = next(load(images, 0, [[0, 1, 2]], 0))[1]
    assert labels.dtype == torch.float32 and np.array_equal(labels, np.stack(data.train.labels[:3]))


def with_subgroups(image_folder, tmp_path, split):
    """A table of the image folder's 45 images with a camera as subgroup, and the camera of each file."""
    files = [(path, part) for part in ("train", "val") for path in sorted((image_folder / part).rglob("*.png"))]
    cameras = {str(path): ("old", " new ", "")[int(path.stem) % 3] for path, _ in files}
    rows = [f"{path},{path.parent.name},{cameras[str(path)]}" + f",{part}" * split for path, part in files]
    file = write_csv(tmp_path, rows, "path,label,Subgroup" + ",split" * split)
    return file, {path: camera.strip() or "none" for path, camera in cameras.items()}


@pytest.mark.parametrize("split,holdout", [(True, 0.0), (False, 0.0), (True, 0.2)])
def test_subgroups_stay_with_their_images(image_folder, tmp_path, split, holdout):
    """Each image of a table has its row's subgroup, in a split column's parts, in a split by chance, and in a holdout."""
    file, camera_of = with_subgroups(image_folder, tmp_path, split)
    path_of = {tuple(np.asarray(torchvision.datasets.folder.default_loader(path)).ravel()): path for path in camera_of}
    data = load_data(source(file, holdout=holdout))
    for part in (data.train, data.val):
        paths = [path_of[tuple(np.asarray(part[i][0]).ravel())] for i in range(len(part))]
        assert part.subgroups == [camera_of[path] for path in paths]
    reversed_part = data.val.part([2, 0])
    assert reversed_part.subgroups == [data.val.subgroups[2], data.val.subgroups[0]]
    assert load_data(source(image_folder)).val.subgroups is None


def test_a_run_on_a_csv_has_the_metrics_of_each_subgroup(image_folder, tmp_path, capsys):
    """result.json has the metrics of each subgroup: scikit-learn's accuracy of the predictions on its images."""
    file, camera_of = with_subgroups(image_folder, tmp_path, True)
    assert main([*on_folder(file, tmp_path / "run"), "--set", "epochs=4"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())["by_subgroup"]
    kept = safetensors.torch.load_file(tmp_path / "run" / "predictions.safetensors")
    cameras = [camera_of[str(path)] for path in sorted((image_folder / "val").rglob("*.png"))]
    out = capsys.readouterr().out
    assert list(result) == ["new", "none", "old"]
    for name, metrics in result.items():
        rows = [i for i, camera in enumerate(cameras) if camera == name]
        accuracy = accuracy_score(kept["labels"][rows], kept["logits"][rows].argmax(1))
        assert metrics["top1"] == pytest.approx(accuracy) and metrics["val_images"] == len(rows)
        assert f"{name}: top-1 {100 * accuracy:.2f} % of {len(rows)} images" in out
    assert command(["evaluate", str(tmp_path / "run"), "--data", str(file), "--checkpoint", "last"]) == 0
    out = capsys.readouterr().out
    for name, metrics in result.items():
        assert re.search(rf"^{name} +{metrics['val_images']} +{metrics['top1']:.1%}", out, re.M)


def test_a_csv_that_is_not_in_order(tmp_path):
    """Missing columns, missing files, labels, splits and classes that differ are all named at once."""
    for i in range(6):
        put_image(tmp_path / f"{i}.png", i)
    rows = ["0.png,a,train", "1.png,b,val", "2.png,a;b,train", "3.png,,trian", *(f"no{i}.png,c,train" for i in range(7))]
    with pytest.raises(RecipeError) as caught:
        load_data(source(write_csv(tmp_path, rows)))
    message = str(caught.value)
    for fault in (
        "7 of 11 files are missing: ",
        "no4.png, ...",
        "1 rows have several labels, first row 4",
        "1 rows have no label, first row 5",
        "split 'trian' is none of",
        "only in train: a, c; only in val: none",
        str(tmp_path / "labels.csv"),
    ):
        assert fault in message, fault
    assert "no5.png" not in message
    with pytest.raises(RecipeError) as caught:
        load_data(source(write_csv(tmp_path, rows, "picture,name,split")))
    assert "no column path or file or filename or image; its columns: picture, name, split" in str(caught.value)
    assert "no column label or class or target" in str(caught.value)
    with pytest.raises(RecipeError, match="can't read .*none.csv"):
        load_data(source(tmp_path / "none.csv"))
    with pytest.raises(RecipeError, match="by its images: class 'b' has 1, and each of 2 parts needs one"):
        load_data(source(write_csv(tmp_path, [f"{i}.png,a" for i in range(5)] + ["5.png,b"], "path,label")))


def rows_of(tmp_path, number=10):
    return [f"{put_image(tmp_path / f'{i}.png', i).name},{'ab'[i % 2]}" for i in range(number)]


def test_rows_that_repeat_a_file_count_once(tmp_path, capsys):
    """A file is one image, however often and by whatever link a table names it: no copy of it validates."""
    rows = rows_of(tmp_path)
    (tmp_path / "link.png").symlink_to(tmp_path / "0.png")
    data = load_data(source(write_csv(tmp_path, [*rows, *rows, "link.png,a"], "path,label")))
    names = [path.name for path in (*data.train.items, *data.val.items)]
    assert sorted(names) == sorted(f"{i}.png" for i in range(10))
    assert "11 rows that repeat a file and its label" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["", ",train", ",val"])
def test_a_file_with_two_labels_is_refused(tmp_path, split):
    """One file under two labels, in one part of a split or across them, is named with its rows."""
    rows = [f"{row}{split and ',train'}" for row in rows_of(tmp_path)] + ["0.png,b" + split, "", ",,"]
    with pytest.raises(RecipeError, match="1 rows give a file another label, such as 0.png: 'a' in row 2 and 'b' in row 12"):
        load_data(source(write_csv(tmp_path, rows, "path,label" + ",split" * bool(split))))


def test_files_in_both_parts_are_said(tmp_path, capsys):
    """A file in training and validation is counted; a class that only unused rows have is none of the model's."""
    rows = rows_of(tmp_path, 12)
    table = [f"{row},train" for row in rows[:8]] + [f"{row},dev" for row in rows[6:10]] + ["10.png,c,test", "11.png,c,test"]
    data = load_data(source(write_csv(tmp_path, table)))
    err = capsys.readouterr().err
    assert data.classes == ("a", "b") and "2 of 4 validation images are training images as well" in err
    assert "2 rows of the split test" in err


@pytest.mark.parametrize(
    "header,row,fault",
    [
        ("path;label", "0.png;a", "its cells are divided by ;, not by commas"),
        ("path\tlabel", "0.png\ta", "its cells are divided by tabs, not by commas"),
        ("path,label", "ftp://example.com/0.png,a", "1 rows have URLs that can't be used, first row 2: 'ftp://"),
        ("path,label", "0.png,", "1 rows have no label, first row 2"),
        ("path,label", "0.png\0,a", "NUL"),
        ("path,label", "0.png,AC|DC", r"1 rows have several labels, first row 2 ('AC|DC'), as ; and | divide labels"),
        ("path,label", "0.png,AC|DC", "set loss='multi_label', or write another character in the name"),
        ("path,label", "0.png,cats, small", "1 rows have more cells than the header, first row 2 (0.png, cats, small): "),
        ("path,label", "", "there are no rows below its header"),
        ("path,label", ",a", "1 of 1 files are missing: {root}; {root} is a folder"),
    ],
)
def test_what_other_programs_write_is_told(tmp_path, header, row, fault):
    """Another separator, URLs, no label, two by accident, surplus cells, no rows, bytes that are no text are each named."""
    put_image(tmp_path / "0.png", 0)
    with pytest.raises(RecipeError, match=re.escape(fault.format(root=tmp_path))):
        load_data(source(write_csv(tmp_path, [row], header)))


@pytest.mark.parametrize(
    "cell,why",
    [
        (r"cats\0.png", "; write / for \\"),
        ("~/cats/0.png", "; write the home folder in place of ~"),
        ("cats/0.PNG", "/cats has '0.png', not '0.PNG': they differ in upper and lower case"),
        ("Cats/0.png", " has 'cats', not 'Cats': they differ in upper and lower case"),
        ("cafe\u0301/0.png", " has 'caf\\xe9', not 'cafe\\u0301': they differ in what can't be seen"),
        ("cats/0\u200b.png", "/cats has '0.png', not '0\\u200b.png': they differ in what can't be seen"),
        ("cats/5.png", "/cats/5.png"),
        ("dogs/0.png", "/dogs/0.png"),
    ],
)
def test_missing_files_come_with_the_likely_reason(tmp_path, cell, why):
    """Backslashes, ~, and names that differ in case or in what can't be seen from those that are there; else no reason."""
    for name in ("cats/0.png", "caf\xe9/0.png"):
        put_image(tmp_path / name, 0)
    with pytest.raises(RecipeError) as caught:
        load_data(source(write_csv(tmp_path, [f"{cell},a"], "path,label")))
    assert "1 of 1 files are missing: " in str(caught.value) and str(caught.value).endswith(why)


@pytest.mark.parametrize("first", ["sep=,", "sep=;", '"sep=;"', "SEP=\t", "\ufeffsep=,"])
def test_the_first_line_may_tell_the_separator(tmp_path, first):
    """As Excel writes it; the rows are those of a table without that line."""
    rows = [row.replace(",", first.strip('"')[-1]) for row in ["path,label", *rows_of(tmp_path)]]
    data = load_data(source(write_csv(tmp_path, rows, first)))
    assert len(data.train) + len(data.val) == 10 and data.classes == ("a", "b")


def test_spaces_after_commas_are_no_part_of_a_cell(tmp_path):
    """A cell in quotes after a space is that cell; quotes and commas inside cells stay."""
    names = ["a, b", 'c "d" e']
    quoted = [name.replace('"', '""') for name in names]
    rows = [f' "{put_image(tmp_path / f"{i}.png", i).name}",  "{quoted[i % 2]}" , ,' for i in range(10)]
    assert load_data(source(write_csv(tmp_path, rows, '"path", "label"'))).classes == tuple(names)


def test_names_of_several_lines_are_shown_in_one(tmp_path):
    """Line breaks in the cells of classes and subgroups are escaped, as they are in the names of folders."""
    rows = [f'{put_image(tmp_path / f"{i}.png", i).name},"{"ab"[i % 2]}\nc","x\ny"' for i in range(10)]
    data = load_data(source(write_csv(tmp_path, rows, "path,label,subgroup")))
    assert data.classes == (r"a\nc", r"b\nc") and {*data.val.subgroups} == {r"x\ny"}


def test_rows_of_an_unused_split_need_no_label(tmp_path, capsys):
    """Where others validate, rows of the split test without a label are counted among the unused; else they are refused."""
    rows = rows_of(tmp_path, 12)
    labelled = [f"{row},{part}" for row, part in zip(rows, ["train"] * 6 + ["val"] * 4, strict=False)]
    table = [*labelled, "10.png,,test", "11.png,b,test", "0.png,,test"]
    data = load_data(source(write_csv(tmp_path, table)))
    assert (len(data.train), len(data.val), data.classes) == (6, 4, ("a", "b"))
    assert "3 rows of the split test, as there is one for validation" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="2 rows have no label, first row 12"):
        load_data(source(write_csv(tmp_path, [row.replace("val", "test") for row in table])))


def test_empty_rows_are_no_images(tmp_path):
    """Rows without a cell, as a spreadsheet leaves them at the end, are left out."""
    data = load_data(source(write_csv(tmp_path, [*rows_of(tmp_path), ",", " , ", ""], "path,label")))
    assert len(data.train) + len(data.val) == 10
