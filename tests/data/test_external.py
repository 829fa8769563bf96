"""Sets of the package datasets and of tar shards, and what holds for every source."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data.loader import load
from finetune.data.sources import data_and_size, is_downloaded, load_data
from finetune.recipe import Data
from finetune.utils.errors import RecipeError
from helpers import prepare, small_recipe
from image_files import NAMES, PIXELS, assert_same_set, png, put, source, write_csv


def hub_set(numbers, **more):
    """A set of the package datasets with 12 images, or as many as are asked for."""
    datasets = pytest.importorskip("datasets")
    columns = {
        "note": ["x"] * len(numbers),
        "picture": [{"bytes": png(i), "path": None} for i in numbers],
        "kind": [i % 2 for i in numbers],
    }
    features = {"note": datasets.Value("string"), "picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(NAMES))}
    for name, feature in more.items():
        columns[name], features[name] = columns["picture" if isinstance(feature, datasets.Image) else "kind"], feature
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache of the package datasets of the test's own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pairs(rows, label="kind", image="picture"):
    return [(row[image], row[label]) for row in rows]


@pytest.mark.parametrize("val", ["validation", "test"])
def test_saved_sets_are_what_datasets_reads(tmp_path, val):
    """A folder that save_to_disk wrote has the images, labels and class names that load_from_disk gives."""
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": hub_set(range(8)), val: hub_set(range(8, 12))}).save_to_disk(tmp_path / "set")
    data, theirs = load_data(source(f"hf/{tmp_path / 'set'}")), datasets.load_from_disk(tmp_path / "set")
    assert_same_set(data.train, pairs(theirs["train"]))
    assert_same_set(data.val, pairs(theirs[val]))
    assert data.classes == NAMES and not is_downloaded(f"hf/{tmp_path / 'set'}") and is_downloaded("hf/owner/name")


def test_a_saved_set_without_a_split_is_split_once_for_all(tmp_path):
    """Of one set alone some of each class validate, whatever the recipe's seed."""
    hub_set([i % 12 for i in range(40)]).save_to_disk(tmp_path / "set")
    first, other = (load_data(source(f"hf/{tmp_path / 'set'}", seed=seed)) for seed in (0, 1))
    assert set(first.val.labels) == {0, 1} and sorted([*first.train.items, *first.val.items]) == list(range(40))
    assert list(first.val.items) == list(other.val.items)
    assert all(np.array_equal(first.val[i][0], PIXELS[row % 12]) for i, row in enumerate(first.val.items))


def test_a_class_that_validation_misses_is_said(tmp_path, capsys):
    """A hub set whose validation images lack a class is said to, as no metric tells of it; one that has all is not."""
    datasets = pytest.importorskip("datasets")
    for name, numbers in (("some", [0, 2, 4]), ("all", [0, 1, 2])):
        datasets.DatasetDict({"train": hub_set(range(8)), "validation": hub_set(numbers)}).save_to_disk(tmp_path / name)
        load_data(source(f"hf/{tmp_path / name}"))
        assert ("has no validation image of class 'bee': no metric tells" in capsys.readouterr().err) == (name == "some")


def test_parquet_and_image_folders_are_what_datasets_reads(tmp_path, image_folder, hub_cache):
    """A folder of parquet files and one of class folders have the images and labels that load_dataset gives."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for part, numbers in (("train", range(8)), ("test", range(8, 12))):
        hub_set(numbers).to_parquet(tmp_path / "set" / f"{part}-00000-of-00001.parquet")
    data, theirs = load_data(source(f"hf/{tmp_path / 'set'}")), datasets.load_dataset(str(tmp_path / "set"))
    assert_same_set(data.train, pairs(theirs["train"]))
    assert_same_set(data.val, pairs(theirs["test"]))
    data, theirs = load_data(source(f"hf/{image_folder}")), datasets.load_dataset(str(image_folder))
    assert_same_set(data.train, pairs(theirs["train"], "label", "image"))
    assert_same_set(data.val, pairs(theirs["validation"], "label", "image"))
    assert data.classes == ("blue", "green", "red")


@pytest.mark.parametrize(
    "change,fault",
    [
        (lambda rows: {"train": rows.remove_columns("kind")}, "Image: picture; ClassLabel: none; all columns: note, picture"),
        (lambda rows: {"train": hub_set(range(4), second=rows.features["kind"])}, "ClassLabel: kind, second"),
        (lambda rows: {"train": hub_set(range(4), mask=rows.features["picture"])}, "Image: picture, mask"),
        (
            lambda rows: {"valid": rows},
            "has no split 'train', but valid\n  with the package datasets: sets['train'] = sets.pop('valid'); save_to_disk",
        ),
        (
            lambda rows: {"train": rows, "test": rows.map(lambda row: {"kind": -1}, load_from_cache_file=False)},
            "4 images of 'test' have no label, first row 0, from 0\n  with the package datasets: remove that split, or filter",
        ),
        (
            lambda rows: {"train": rows.map(lambda row, i: {"kind": None if i == 2 else 0}, True, load_from_cache_file=False)},
            "1 images of 'train' have no label, first row 2, from 0\n  with the package datasets: filter() these rows out",
        ),
        (
            lambda rows: {"train": hub_set([0, 2, 4]), "test": rows},
            "no image of 'train' has the class 'bee'\n  with the package datasets: add some, or filter() its rows out and",
        ),
    ],
)
def test_a_saved_set_that_is_not_in_order(tmp_path, change, fault):
    """Columns that are missing or not unique, labels that are missing, classes without training images are named."""
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(change(hub_set(range(4)))).save_to_disk(tmp_path / "set")
    with pytest.raises(RecipeError) as caught:
        load_data(source(f"hf/{tmp_path / 'set'}"))
    assert fault in str(caught.value) and str(tmp_path / "set") in str(caught.value)


def test_a_hub_that_can_not_be_reached_is_said(monkeypatch, asked):
    """Without a network, tried once, or with HF_HUB_OFFLINE for what is not in the cache, there is one message."""
    pytest.importorskip("datasets")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(RecipeError) as caught:
            load_data(source("hf/owner/no-such-set:small"))
        for text in ("can't load hf/owner/no-such-set:small", "HF_HUB_OFFLINE=1", "save_to_disk"):
            assert text in str(caught.value)
        assert "--weights" not in str(caught.value) and ("refused" in str(caught.value)) != offline
    assert asked == [("127.0.0.1", 9)]


def test_a_missing_package_names_the_extra(monkeypatch):
    """Without the package datasets the pip line of the extra is given."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r'pip install "finetune-recipes\[hf\]"'):
        load_data(source("hf/owner/name"))
    with pytest.raises(RecipeError, match="pip install scipy"):
        load_data(source("torchvision/SVHN"))


def write_shards(folder, part, numbers, **more):
    """Three images a shard, by webdataset's own writer."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(folder / f"{part}-%04d.tar"), maxcount=3, verbose=0) as writer:
        for i in numbers:
            writer.write(
                {
                    "__key__": f"some.where/of a long name {'x' * 60}/{i:03d}",
                    "png": Image.fromarray(PIXELS[i]),
                    "cls": i % 2,
                    "json": {"number": i},
                    **more,
                }
            )


def test_shards_are_what_webdataset_reads(tmp_path):
    """Tar files of webdataset's writer have the images and labels of webdataset's reader, in its order, and can be indexed."""
    webdataset = pytest.importorskip("webdataset")
    write_shards(tmp_path / "s", "train", range(8))
    write_shards(tmp_path / "s", "val", range(8, 12))
    put(tmp_path / "s" / "classes.txt", "ant\nbee\n")
    data = load_data(source(tmp_path / "s"))
    for part, name in ((data.train, "train"), (data.val, "val")):
        urls = sorted(map(str, (tmp_path / "s").glob(f"{name}-*.tar")))
        assert len(urls) > 1
        assert_same_set(part, list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls")))
    assert data.classes == NAMES and np.array_equal(data.train[5][0], PIXELS[5])
    (tmp_path / "s" / "classes.txt").unlink()
    assert load_data(source(tmp_path / "s")).classes == ("0", "1")
    for file in (tmp_path / "s").glob("val-*.tar"):
        file.unlink()
    assert (len(load_data(source(tmp_path / "s")).train), len(load_data(source(tmp_path / "s")).val)) == (6, 2)


def spoil_shard(file, **changes):
    """One sample with other members."""
    with tarfile.open(file, "w") as tar:
        for ending, content in ({"png": png(0), "cls": b"0"} | changes).items():
            member = tarfile.TarInfo(f"0.{ending}")
            member.size = len(content)
            if content:
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    "spoil,fault",
    [
        (lambda file: file.write_bytes(gzip.compress(file.read_bytes())), "Wanted: a tar, not compressed"),
        (lambda file: file.write_bytes(file.read_bytes()[:4000]), "unexpected end of data"),
        (lambda file: spoil_shard(file, cls=b""), "0 has 1 images and no .cls"),
        (lambda file: spoil_shard(file, jpg=b"x"), "0 has 2 images and a .cls"),
        (lambda file: spoil_shard(file, cls=b"ant"), "0.cls is 'ant', not a number"),
        (lambda file: spoil_shard(file, cls=b"2"), "has labels from 0 to 2, and 2 classes"),
        (lambda file: spoil_shard(file, cls=b"-1"), "has labels from -1 to 1, and 2 classes"),
    ],
)
def test_shards_that_are_not_in_order(tmp_path, spoil, fault):
    """A tar that is compressed, cut, or without one image and one label a sample is named."""
    write_shards(tmp_path / "s", "train", range(4))
    write_shards(tmp_path / "s", "val", range(4))
    put(tmp_path / "s" / "classes.txt", "ant\nbee\n")
    spoil(tmp_path / "s" / "train-0000.tar")
    with pytest.raises(RecipeError) as caught:
        load_data(source(tmp_path / "s"))
    assert fault in str(caught.value) and str(tmp_path / "s") in str(caught.value)


KINDS = ["csv", "folder", "hf", "shards", "torchvision"]


def sets_of(kind: str, root: Path, cut: bool) -> tuple[str, str]:
    """(source, what names its image 3) of 8 training images; `cut`: that image breaks off in the middle."""
    contents = [png(i)[:600] if cut and i == 3 else png(i) for i in range(8)]
    if kind == "shards":
        pytest.importorskip("webdataset")
        for part in ("train", "val"):
            with tarfile.open(root / f"{part}-0.tar", "w") as tar:
                for i, content in enumerate(contents):
                    for ending, data in (("png", content), ("cls", str(i // 4).encode())):
                        member = tarfile.TarInfo(f"{i}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        return str(root), f"3.png in {root / 'train-0.tar'}"
    if kind == "hf":
        datasets = pytest.importorskip("datasets")
        rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [i // 4 for i in range(8)]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
        rows = datasets.Dataset.from_dict(rows, features)
        datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(root / "set")
        return f"hf/{root / 'set'}", f"hf/{root / 'set'}, train 3"
    if kind == "folder":
        for part in ("val", "train"):
            files = [put(root / part / NAMES[i // 4] / f"{i}.png", content) for i, content in enumerate(contents)]
        return str(root), str(files[3])
    files = [put(root / f"dtd/dtd/images/{NAMES[i // 4]}/{i}.png", content) for i, content in enumerate(contents)]
    if kind == "csv":
        rows = [f"{file.relative_to(root)},{file.parent.name},{part}" for part in ("train", "val") for file in files]
        return str(write_csv(root, rows)), str(files[3])
    for part in ("train", "val"):
        put(root / f"dtd/dtd/labels/{part}1.txt", "".join(f"{file.parent.name}/{file.name}\n" for file in files))
    return "torchvision/DTD", str(files[3])


@pytest.mark.parametrize("kind", KINDS)
def test_loader_workers_see_the_same_images(tmp_path, monkeypatch, kind):
    """Every source can be sent to another process, and two loader workers give the bits that none gives."""
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    recipe = source(sets_of(kind, tmp_path, cut=False)[0])
    images = prepare(recipe)[2][0]
    batches = [[5, 1], [4], [2, 0, 7]]
    here, there = (list(load(images, 3, batches, workers)) for workers in (0, 2))
    assert all(torch.equal(a, b) for x, y in zip(here, there, strict=True) for a, b in zip(x, y, strict=True))
    sent = pickle.loads(pickle.dumps(load_data(recipe).train))
    assert np.array_equal(sent[3][0], PIXELS[3]) and list(images.labels()) == [0] * 4 + [1] * 4
    assert data_and_size(recipe)[1] == ((1880, 47) if kind == "torchvision" else (8, 2))


@pytest.mark.parametrize("kind,workers", [*((kind, 0) for kind in KINDS), ("folder", 2)])
def test_an_image_that_breaks_off_is_named_wherever_it_lies(tmp_path, monkeypatch, kind, workers):
    """One message says which image can't be read: its file, its member of a tar, its row; from a worker process, too."""
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    value, name = sets_of(kind, tmp_path, cut=True)
    with pytest.raises(RecipeError) as caught:
        list(load(prepare(source(value))[2][0], 0, [[i] for i in range(8)], workers))
    assert str(caught.value).startswith(f"can't read the image {name}: ") and "object at" not in str(caught.value)
    assert caught.value.one_process and "Traceback" not in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        load_data(source(value)).train[3]
    assert caught.value.one_process


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_breaks_off_can_be_left_out(tmp_path, monkeypatch, kind):
    """With on_bad_image="skip" such an image is left out, and no other."""
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    recipe = small_recipe(data=Data(sets_of(kind, tmp_path, cut=True)[0], 24, 8, on_bad_image="skip"))
    labels = [int(labels) for _, labels in load(prepare(recipe)[2][0], 0, [[i] for i in range(8)], 0)]
    assert labels == [0, 0, 0, -100, 1, 1, 1, 1]
