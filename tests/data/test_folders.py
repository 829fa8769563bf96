"""Folders of images as people have them: what is a class, a split, an image, and what is left out."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from finetune.data.dataset import fingerprint
from finetune.data.folders import Finder, class_folders, find_images
from finetune.data.sources import load_data
from finetune.recipe.load import chosen_recipe
from finetune.run import arguments
from finetune.tools.image_stats import compute_image_stats
from finetune.utils.errors import RecipeError
from helpers import Data, small_recipe
from image_files import png, put, put_image, source


@pytest.fixture
def tree(tmp_path):
    """Makes a folder of images, a number of them for each path."""

    def make(**numbers):
        count = 0
        for name, number in numbers.items():
            for i in range(number):
                count += 1
                pixels = np.random.RandomState(count).randint(0, 256, (8, 8, 3)).astype(np.uint8)
                path = tmp_path / "images" / name.replace("__", "/") / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        return tmp_path / "images"

    return make


def test_the_order_is_torchvisions(tree):
    """Files in class folders however deep come in the order of torchvision's ImageFolder, with its classes and labels."""
    root = tree(b=3, a=12, a__z=2, a__B=1, **{"a__z__y": 1, "a__z-1": 1, "c d": 2})
    theirs = ImageFolder(root)
    ours, classes = class_folders(root)
    assert ours.items == [path for path, _ in theirs.samples] and ours.labels == theirs.targets
    assert list(classes) == theirs.classes


@pytest.mark.parametrize(
    "train,val", [("Train", "Test"), ("training", "validation"), ("TRAIN", "Valid"), ("train", "dev"), ("Training", "Testing")]
)
def test_splits_are_known_in_any_case(tree, train, val):
    """The usual names of splits, in any case, are the splits, and no class."""
    data = load_data(source(tree(**{f"{train}__cat": 4, f"{train}__dog": 4, f"{val}__cat": 2, f"{val}__dog": 2})))
    assert (len(data.train), len(data.val), data.classes) == (8, 4, ("cat", "dog"))
    assert {Path(path).parts[-3] for path in data.val.items} == {val}


@pytest.mark.parametrize(
    "names,fault",
    [
        (("val__a", "val__b", "test__a", "test__b"), "has test/, val/ and no class folders"),
        (("train_set__a", "train_set__b", "test_set__a", "test_set__b"), "call them train/ and val/ if"),
        (("train2017__a", "val2017__a"), "call them train/ and val/ if"),
        (("train__a", "train__b", "val__a", "val__b", "Valid__a"), "has Valid/ and val/: leave one"),
        (("data__train__a", "data__train__b"), "has one class, 'data'.*Did you mean .*data?"),
    ],
)
def test_names_that_leave_it_open_are_asked_about(tree, names, fault):
    """Folders that may be splits under another name are refused, not trained as classes."""
    with pytest.raises(RecipeError, match=fault):
        load_data(source(tree(**dict.fromkeys(names, 3))))


def test_programs_own_files_are_left_aside(tree, capsys):
    """Hidden files and folders, also those of macOS, are no images and no classes; other classes may be named after splits."""
    root = tree(cat=5, dog=5, test_tube=5, cat__sub=1, **{".ipynb_checkpoints": 2, "cat__.ipynb_checkpoints": 2, "__MACOSX": 1})
    put(root / "cat" / "._0.png", b"no image")
    put(root / "cat" / ".DS_Store", b"")
    data = load_data(source(root))
    assert data.classes == ("cat", "dog", "test_tube") and len(data.train) + len(data.val) == 16
    assert "hidden files: 1 (._0.png)" in capsys.readouterr().err


def test_what_is_left_out_is_counted_by_reason(tree, capsys):
    """Endings that are not read, images beside the classes, pipes: one line has a count and an example of each."""
    root = tree(train__cat=4, train__dog=4, val__cat=2, val__dog=2)
    for i in range(3):
        put(root / "train" / "dog" / f"{i}.HEIC", b"")
        put_image(root / "train" / f"{i}.png", i)
    put(root / "train" / "cat" / "notes", b"")
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    (root / "extra").mkdir()
    load_data(source(root))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and f"of {root} only train/ and val/ are used, not extra/" in lines[0]
    for part in ("files that end in .heic: 3 (0.HEIC)", "images beside the class folders: 3 (0.png)", "pipes or devices: 1"):
        assert part in lines[1]
    assert "files without an ending: 1 (notes)" in lines[1]


def test_every_format_that_pillow_reads_is_read(tree):
    """GIF, JFIF and TGA files count as images, in training and for predict."""
    root = tree(train__a=2, train__b=2, val__a=1, val__b=1)
    for i, ending in enumerate(("gif", "jfif", "tga", "jp2")):
        put_image(root / "train" / "a" / f"x.{ending}", i) if ending != "jfif" else put(root / "train/a/x.jfif", png(i))
    assert len(load_data(source(root)).train) == 8 and len(find_images([root / "train" / "a"])) == 6


def test_links_are_followed_once(tree, tmp_path):
    """Linked class folders count; a loop of links ends; a file linked twice into its class is one image, into two a fault."""
    real = tree(a=4, b=4)
    (tmp_path / "linked").mkdir()
    for name in "ab":
        (tmp_path / "linked" / name).symlink_to(real / name)
    (real / "a" / "loop").symlink_to(real / "a")
    (real / "a" / "again.png").symlink_to(real / "a" / "0.png")
    assert len(class_folders(tmp_path / "linked")[0]) == 8
    assert len(find_images([tmp_path / "linked"])) == 9  # every path is answered for
    (real / "b" / "other.png").symlink_to(real / "a" / "0.png")
    with pytest.raises(RecipeError, match="1 files are in two classes, by links: .*a/0.png is .*b/other.png"):
        class_folders(real)


def test_a_folder_that_can_not_be_listed_is_named(tree, monkeypatch):
    """No permission for a class or a folder in it is an error, not an absence of images."""
    root = tree(a__sub=3, a=3, b=3)
    real = os.scandir

    def locked(path="."):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(RecipeError, match="can't list the folder .*a/sub: Permission denied"):
        class_folders(root)


def test_all_bad_files_are_named_at_once(tree):
    """The first ten files that are no images, by name, and a count; with on_bad_image="skip" a class without others stops."""
    root = tree(train__a=14, train__b=4, val__a=3, val__b=3)
    for i in range(12):
        put(root / "train" / "a" / f"{i}.png", b"no image")
    with pytest.raises(RecipeError) as caught:
        load_data(source(root))
    lines = str(caught.value).splitlines()
    assert lines[0] == "can't read 12 of 24 images:" and len(lines) == 13 and "and 2 more" in lines[11]
    assert lines[1].startswith(f"  {root}/train/a/0.png: cannot identify") and "on_bad_image=skip" in lines[12]
    skipping = small_recipe(data=Data(str(root), 24, 8, on_bad_image="skip"))
    assert len(load_data(skipping).train) == 18
    for path in (root / "val" / "b").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(RecipeError, match="no image of class 'b' in the validation images of .* can be read"):
        load_data(skipping)


def test_a_class_whose_bad_images_were_drawn_to_validate_is_said(tree, capsys):
    """With on_bad_image="skip" a split that is drawn here stops no run whose class has good images to train on."""
    root = tree(a=10, b=10)
    skipping = small_recipe(data=Data(str(root), 24, 8, on_bad_image="skip"))
    for path, label in zip((data := load_data(skipping)).val.items, data.val.labels, strict=True):
        if label == 1:
            Path(path).write_bytes(b"no image")
    assert len(load_data(skipping).train) == len(data.train)
    err = capsys.readouterr().err
    assert "no image of class 'b' that was drawn to validate can be read: no metric tells how it is recognised" in err
    assert set(load_data(skipping).val.labels) == {0}
    for path in data.val.items:
        Path(path).write_bytes(b"no image")
    with pytest.raises(RecipeError, match="no image of .* that was drawn to validate can be read"):
        load_data(skipping)


def test_names_that_look_alike_are_spelt_out(tree):
    """Where classes differ in what can't be seen, the message shows it."""
    root = tree(**{"train__café": 2, "train__b": 2, "val__cafe\u0301": 2, "val__b ": 2})
    with pytest.raises(RecipeError) as caught:
        load_data(source(root))
    assert "only in train: 'b', 'caf\\xe9'; only in val: 'b ', 'cafe\\u0301'" in str(caught.value)


def test_classes_that_look_alike_are_said(tree, capsys):
    """Class folders whose names differ only in what can't be seen are told apart, and named with what differs."""
    root = tree(**{"cat": 4, "cat ": 4, "caf\xe9": 4, "cafe\u0301": 4, "dog": 4})
    assert len(load_data(source(root)).classes) == 5
    err = capsys.readouterr().err
    assert f"classes of {root} look alike: 'cafe\\u0301' and 'caf\\xe9', 'cat' and 'cat '; they are told apart" in err
    load_data(source(tree(a=4, b=4).rename(root.parent / "others")))


def test_copies_in_validation_are_said(tree, capsys):
    """Validation images with the content of training images are counted, copied or linked; others are not."""
    root = tree(train__a=4, train__b=4, val__a=2, val__b=2)
    shutil.copy(root / "train" / "a" / "1.png", root / "val" / "a" / "copy.png")
    (root / "val" / "b" / "link.png").symlink_to(root / "train" / "b" / "2.png")
    load_data(source(root))
    err = capsys.readouterr().err
    assert "2 of 6 validation images are training images as well" in err
    assert "another label" not in err
    shutil.copy(root / "train" / "a" / "3.png", root / "val" / "b" / "copy.png")
    load_data(source(root))
    assert "3 of 7" in (err := capsys.readouterr().err)
    same = "files have the same content as another with another label"
    assert f"2 {same} ({root}/val/b/copy.png is {root}/train/a/3.png)" in err
    for i in range(3):
        shutil.copy(root / "train" / "a" / "3.png", root / "train" / ("a", "b", "b")[i] / f"more{i}.png")
        (root / "val" / "ab"[i % 2] / f"junk{i}.png").write_bytes(b"x")  # the same, but no image
    load_data(small_recipe(data=Data(str(root), 24, 8, on_bad_image="skip")))
    assert f"5 {same}" in (err := capsys.readouterr().err) and "junk" not in err


def test_names_of_any_bytes_are_read(tree, tmp_path):
    """A file's name that is no UTF-8, and a class's, are part of what a run resumes by."""
    root = tree(a=3, b=3)
    (root / "a" / "0.png").rename(root / "a" / os.fsdecode(b"caf\xe9.png"))
    (root / "b").rename(root / os.fsdecode(b"b\xe9"))
    data = load_data(source(root))
    assert len({fingerprint(part, data.classes) for part in (data.train, data.val)}) == 2


def test_the_levels_of_folders_are_looked_at(tree, capsys):
    """Splits within class folders are refused; where all classes have the same folders, it is said; else it is not."""
    with pytest.raises(RecipeError, match="each class folder of .* has train/, val/ within. Wanted: train/a/.*, not a/train/"):
        load_data(source(tree(a__train=2, a__val=2, b__train=2, b__val=2)))
    shutil.rmtree(tree())
    root = tree(fold0__cat=3, fold0__dog=3, fold1__cat=3, fold1__dog=3)
    load_data(source(root))
    assert f"each class folder of {root} has cat/, dog/ within; if these are the classes" in capsys.readouterr().err
    (root / "fold0" / "cat").rename(root / "fold0" / "cow")
    load_data(source(root))
    assert "each class folder" not in capsys.readouterr().err


def test_one_class_folder_has_other_readings(tree):
    """A table beside the images, another level, and hidden folders are named."""
    root = tree(images=4)
    (root / ".22LR").mkdir()
    with pytest.raises(RecipeError, match="one class, 'images'; .* Hidden folders are no classes: .22LR"):
        load_data(source(root))
    (root / "train.csv").write_text("path,label\n")
    with pytest.raises(RecipeError, match="one class, 'images'; .* Is there a table of them\\? --data .*train.csv"):
        load_data(source(root))
    (root / "train.csv").unlink()
    put_image(root / "images" / "a" / "1.png", 1)
    with pytest.raises(RecipeError, match="Did you mean .*images\\?"):
        load_data(source(root))


def test_a_loop_of_links_is_gone_round_once(tree):
    """A recursive glob finds each image once, and an empty path is refused."""
    root = tree(a=3)
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    assert len(find_images([f"{root}/**"])) == 3 == len(find_images([f"{root}/**/*.png"]))
    with pytest.raises(RecipeError, match="a path is empty"):
        find_images([""])


def test_a_folder_called_like_a_named_set_is_asked_about(tree, monkeypatch):
    """--data digits, where a folder has that name, is refused with both ways out; each of them works."""
    root = tree(even=4, odd=4)
    monkeypatch.chdir(root.parent)
    root.rename("digits")
    asked = arguments(["--recipe", "efficientnet_lite0_digits", "--data", "digits"])
    for call in (lambda: chosen_recipe(asked), lambda: compute_image_stats("digits")):
        with pytest.raises(RecipeError, match="--data ./digits is the folder; for the set, start from another folder"):
            call()
    folder = arguments(["--recipe", "efficientnet_lite0_digits", "--data", "./digits"])
    named = arguments(["--recipe", "efficientnet_lite0_digits", "--set", "data.source=digits"])
    assert [load_data(chosen_recipe(one)[0]).classes[0] for one in (folder, named)] == ["even", "0"]


def test_listing_asks_nothing_more_of_plain_files(tree, monkeypatch):
    """Each folder is asked about once, a plain file never: with 20,000 folders that is most of the time to start."""
    root = tree(a=3, b__c=4, b__d=5)
    real, asked = os.stat, []
    monkeypatch.setattr(os, "stat", lambda path, **more: asked.append(str(path)) or real(path, **more))
    found = [finder.find(root) for finder in (Finder(), Finder(once=False))]
    assert len(found[0]) == 12 and found[0] == found[1]
    assert len(asked) == 2 * 5 and not any(path.endswith(".png") for path in asked)
