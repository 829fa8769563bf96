"""Images and labels from torchvision's sets, the package datasets, CSV files and tar shards are what those libraries read."""

import gzip
import io
import json
import pickle
import tarfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from sklearn.preprocessing import MultiLabelBinarizer

from conftest import prepare, small_recipe
from finetune.batches import load
from finetune.data_sources import TORCHVISION
from finetune.image_data import data_size, is_downloaded, known_size, load_data
from finetune.recipe import Data, RecipeError

NAMES = ("ant", "bee")
PIXELS = np.random.RandomState(0).randint(0, 256, (12, 32, 32, 3)).astype(np.uint8)
MULTI = {"loss": "multi_label", "score": "mean_average_precision"}


def source(value, **changes):
    return small_recipe(data=Data(str(value), image_size=24, batch_size=8), **changes)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def put_image(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS[number % 12]).save(path)
    return path


def idx(array: np.ndarray) -> bytes:
    """MNIST's format: type, dimensions, sizes, bytes."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def make_dtd(root):
    for part, numbers in (("train", (0, 1)), ("val", (2, 3))):
        put(root / f"dtd/dtd/labels/{part}1.txt", "".join(f"{NAMES[i % 2]}/{i}.jpg\n" for i in numbers))
        [put_image(root / f"dtd/dtd/images/{NAMES[i % 2]}/{i}.jpg", i) for i in numbers]


def make_eurosat(root):
    for i in range(12):
        put_image(root / f"eurosat/2750/{NAMES[i % 2]}/{i}.jpg", i)


def make_aircraft(root):
    folder = root / "fgvc-aircraft-2013b/data"
    put(folder / "variants.txt", "bee 2\nant 1\n")
    for part, numbers in (("train", (0, 1)), ("val", (2, 3))):
        put(folder / f"images_variant_{part}.txt", "".join(f"00{i} {NAMES[i % 2]} {i % 2 + 1}\n" for i in numbers))
        [put_image(folder / f"images/00{i}.jpg", i) for i in numbers]


def make_flowers(root):
    for i in range(6):
        put_image(root / f"flowers-102/jpg/image_0000{i + 1}.jpg", i)
    scipy.io.savemat(root / "flowers-102/imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 1, 2]])})
    scipy.io.savemat(root / "flowers-102/setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})


def make_food(root):
    for part, numbers in (("train", (0, 1)), ("test", (2, 3))):
        put(root / f"food-101/meta/{part}.json", json.dumps({NAMES[i % 2]: [f"{NAMES[i % 2]}/{i}"] for i in numbers}))
        [put_image(root / f"food-101/images/{NAMES[i % 2]}/{i}.jpg", i) for i in numbers]


def make_signs(root):
    [put_image(root / f"gtsrb/GTSRB/Training/0000{i % 2}/{i}.ppm", i) for i in range(4)]
    [put_image(root / f"gtsrb/GTSRB/Final_Test/Images/{i}.ppm", i) for i in (4, 5)]
    put(root / "gtsrb/GT-final_test.csv", "Filename;Width;ClassId\n4.ppm;32;1\n5.ppm;32;0\n")


def make_imagenette(root):
    for part, numbers in (("train", (0, 1)), ("val", (2, 3))):
        [put_image(root / f"imagenette2/{part}/{('n01440764', 'n02102040')[i % 2]}/{i}.jpeg", i) for i in numbers]


def make_pets(root):
    folder = root / "oxford-iiit-pet"
    for part, numbers in (("trainval", (0, 1)), ("test", (2, 3))):
        put(folder / f"annotations/{part}.txt", "".join(f"{NAMES[i % 2]}_dog_{i} {i % 2 + 1} 1 1\n" for i in numbers))
        [put_image(folder / f"images/{NAMES[i % 2]}_dog_{i}.jpg", i) for i in numbers]


def make_stl(root):
    pixels = np.random.RandomState(1).randint(0, 256, (2, 3, 96, 96)).astype(np.uint8)
    for part in ("train", "test"):
        put(root / f"stl10_binary/{part}_X.bin", pixels.tobytes())
        put(root / f"stl10_binary/{part}_y.bin", bytes([2, 1]))
    put(root / "stl10_binary/unlabeled_X.bin", b"")
    put(root / "stl10_binary/class_names.txt", "ant\nbee\n")


def make_svhn(root):
    for part in ("train", "test"):
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": PIXELS[:3].transpose(1, 2, 3, 0), "y": [[10], [1], [9]]})


def make_mnist(name):
    def make(root):
        for part in ("train", "t10k"):
            put(root / f"{name}/raw/{part}-images-idx3-ubyte", idx(PIXELS[:3, :28, :28, 0]))
            put(root / f"{name}/raw/{part}-labels-idx1-ubyte", idx(np.array([7, 0, 2], np.uint8)))

    return make


MADE = {
    "DTD": make_dtd,
    "EuroSAT": make_eurosat,
    "FGVCAircraft": make_aircraft,
    "Flowers102": make_flowers,
    "Food101": make_food,
    "GTSRB": make_signs,
    "Imagenette": make_imagenette,
    "OxfordIIITPet": make_pets,
    "STL10": make_stl,
    "SVHN": make_svhn,
    "MNIST": make_mnist("MNIST"),
    "FashionMNIST": make_mnist("FashionMNIST"),
}


@pytest.fixture
def torchvision_folder(tmp_path, monkeypatch):
    """An empty $FINETUNE_DATA, whose files are not held against the md5 of the real ones."""
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path / "sets"))
    (tmp_path / "sets").mkdir()
    for name in ("flowers102", "stl10", "svhn"):
        module = getattr(torchvision.datasets, name)
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())
    return tmp_path / "sets"


def same(ours, theirs):
    """Whether a set of ours has the images and labels of another library's, in its order."""
    theirs = [(np.asarray(image.convert("RGB")), int(label)) for image, label in theirs]
    assert list(ours.labels) == [label for _, label in theirs]
    assert all(
        np.array_equal(image, other) and label == number and image.mode == "RGB" and type(label) is int
        for (image, label), (other, number) in zip((ours[i] for i in range(len(ours))), theirs, strict=True)
    )


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_sets_are_what_torchvision_reads(torchvision_folder, name):
    """Each set, in its own layout on disk, has the images, labels and class names of torchvision's own object."""
    MADE[name](torchvision_folder)
    data = load_data(source(f"torchvision/{name}"))
    argument, values, *_ = TORCHVISION[name]
    theirs = [
        getattr(torchvision.datasets, name)(torchvision_folder, **({argument: value} if argument else {})) for value in values
    ]
    if len(values) == 2:
        same(data.train, theirs[0]), same(data.val, theirs[1])
    else:
        assert sorted(
            zip(map(str, data.train.items + data.val.items), [*data.train.labels, *data.val.labels], strict=True)
        ) == sorted(theirs[0].samples)
        assert sorted(data.val.labels) == [0, 1] and len(data.train) == 10
    known = getattr(theirs[0], "classes", None)
    assert data.classes == (
        tuple(each if isinstance(each, str) else each[0] for each in known)
        if known
        else tuple(str(i) for i in range(TORCHVISION[name][3]))
    )


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_set_that_can_not_be_downloaded_is_named(torchvision_folder, monkeypatch, name):
    """Without a network one message has the set, where it belongs and the reason; its size is known all the same."""

    def refuse(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    recipe = source(f"torchvision/{name}")
    with pytest.raises(RecipeError) as caught:
        load_data(recipe)
    message = str(caught.value)
    assert f"torchvision/{name}" in message and str(torchvision_folder / TORCHVISION[name][-1]) in message
    assert "no network" in message or name == "MNIST"  # torchvision tells its mirrors' faults on the screen
    assert data_size(recipe) == known_size(recipe) == TORCHVISION[name][2:4] and is_downloaded(f"torchvision/{name}")


def test_an_unknown_set_of_torchvision_is_answered_with_the_nearest():
    """A misspelt name gets the nearest, and all there are."""
    with pytest.raises(RecipeError, match="no 'torchvision/Flower102'. Did you mean Flowers102"):
        load_data(source("torchvision/Flower102"))


def write_csv(root, rows, header="path,label,split"):
    return put(root / "labels.csv", "\n".join([header, *rows]) + "\n")


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
    same(data.train, torchvision.datasets.ImageFolder(image_folder / "train"))
    same(data.val, torchvision.datasets.ImageFolder(image_folder / "val"))


def test_a_csv_without_a_split_is_split_as_the_folders_are(image_folder, tmp_path):
    """Without a split column a fifth of each class validates, by the recipe's seed: the images that a folder would take."""
    folder = torchvision.datasets.ImageFolder(image_folder / "train")
    (tmp_path / "here").symlink_to(image_folder)
    rows = [f"here/{Path(path).relative_to(image_folder)},{folder.classes[label]}" for path, label in folder.samples]
    file = write_csv(tmp_path, rows, "image,label")
    for seed in (0, 1):
        ours, theirs = load_data(source(file, seed=seed)), load_data(source(image_folder / "train", seed=seed))
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
    assert data.classes == tuple(binarizer.classes_) and (len(data.train), len(data.val)) == (26, 7)
    for part in (data.train, data.val):
        assert np.array_equal(np.stack(part.labels), [wanted[int(path.stem)] for path in part.items])
        assert np.array_equal(np.stack([part[i][1] for i in range(len(part))]), np.stack(part.labels))
    images = prepare(source(file, **MULTI))[2][0]
    labels = next(load(images, 0, [[0, 1, 2]], 0))[1]
    assert labels.dtype == torch.float32 and np.array_equal(labels, np.stack(data.train.labels[:3]))


def test_a_csv_that_is_not_in_order(tmp_path):
    """Missing columns, missing files, labels, splits and classes that differ are all named at once."""
    for i in range(3):
        put_image(tmp_path / f"{i}.png", i)
    rows = ["0.png,a,train", "1.png,b,val", "2.png,a;b,train", "2.png,,trian", *(f"no{i}.png,c,train" for i in range(7))]
    with pytest.raises(RecipeError) as caught:
        load_data(source(write_csv(tmp_path, rows)))
    message = str(caught.value)
    for fault in (
        "7 of 11 files are missing: ",
        "no4.png, ...",
        "2 rows have no label or several, first row 4",
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
    with pytest.raises(RecipeError, match="class 'b' in .* has too few images"):
        load_data(source(write_csv(tmp_path, ["0.png,a"] * 5 + ["1.png,b"], "path,label")))


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
    same(data.train, pairs(theirs["train"])), same(data.val, pairs(theirs[val]))
    assert data.classes == NAMES and not is_downloaded(f"hf/{tmp_path / 'set'}") and is_downloaded("hf/owner/name")


def test_a_saved_set_without_a_split_is_split_once_for_all(tmp_path):
    """Of one set alone a fifth of each class validates, whatever the recipe's seed."""
    hub_set([i % 12 for i in range(40)]).save_to_disk(tmp_path / "set")
    first, other = (load_data(source(f"hf/{tmp_path / 'set'}", seed=seed)) for seed in (0, 1))
    assert sorted(first.val.labels) == [0] * 4 + [1] * 4 and sorted([*first.train.items, *first.val.items]) == list(range(40))
    assert list(first.val.items) == list(other.val.items)
    assert all(np.array_equal(first.val[i][0], PIXELS[row % 12]) for i, row in enumerate(first.val.items))


def test_parquet_and_image_folders_are_what_datasets_reads(tmp_path, image_folder, hub_cache):
    """A folder of parquet files and one of class folders have the images and labels that load_dataset gives."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for part, numbers in (("train", range(8)), ("test", range(8, 12))):
        hub_set(numbers).to_parquet(tmp_path / "set" / f"{part}-00000-of-00001.parquet")
    data, theirs = load_data(source(f"hf/{tmp_path / 'set'}")), datasets.load_dataset(str(tmp_path / "set"))
    same(data.train, pairs(theirs["train"])), same(data.val, pairs(theirs["test"]))
    data, theirs = load_data(source(f"hf/{image_folder}")), datasets.load_dataset(str(image_folder))
    same(data.train, pairs(theirs["train"], "label", "image")), same(data.val, pairs(theirs["validation"], "label", "image"))
    assert data.classes == ("blue", "green", "red")


@pytest.mark.parametrize(
    "change,fault",
    [
        (lambda rows: {"train": rows.remove_columns("kind")}, "Image: picture; ClassLabel: none; all columns: note, picture"),
        (lambda rows: {"train": hub_set(range(4), second=rows.features["kind"])}, "ClassLabel: kind, second"),
        (lambda rows: {"train": hub_set(range(4), mask=rows.features["picture"])}, "Image: picture, mask"),
        (lambda rows: {"valid": rows}, "has no split 'train', but valid"),
        (
            lambda rows: {"train": rows, "test": rows.map(lambda row: {"kind": -1}, load_from_cache_file=False)},
            "4 images of 'test' have no label",
        ),
    ],
)
def test_a_saved_set_that_is_not_in_order(tmp_path, change, fault):
    """Columns that are missing or not unique, and labels that are missing, are named."""
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(change(hub_set(range(4)))).save_to_disk(tmp_path / "set")
    with pytest.raises(RecipeError) as caught:
        load_data(source(f"hf/{tmp_path / 'set'}"))
    assert fault in str(caught.value) and str(tmp_path / "set") in str(caught.value)


def test_a_hub_that_can_not_be_reached_is_said_within_seconds(monkeypatch):
    """Without a network, or with HF_HUB_OFFLINE for what is not in the cache, one message comes in seconds."""
    pytest.importorskip("datasets")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        start = time.monotonic()
        with pytest.raises(RecipeError) as caught:
            load_data(source("hf/owner/no-such-set:small"))
        assert time.monotonic() - start < 5
        for text in ("can't load hf/owner/no-such-set:small", "HF_HUB_OFFLINE=1", "save_to_disk"):
            assert text in str(caught.value)
        assert "--weights" not in str(caught.value) and ("refused" in str(caught.value)) != offline


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
    write_shards(tmp_path / "s", "train", range(8)), write_shards(tmp_path / "s", "val", range(8, 12))
    put(tmp_path / "s" / "classes.txt", "ant\nbee\n")
    data = load_data(source(tmp_path / "s"))
    for part, name in ((data.train, "train"), (data.val, "val")):
        urls = sorted(map(str, (tmp_path / "s").glob(f"{name}-*.tar")))
        assert len(urls) > 1
        same(part, list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls")))
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
        (lambda file: spoil_shard(file, cls=b"ant"), "invalid literal for int()"),
        (lambda file: spoil_shard(file, cls=b"2"), "has labels from 0 to 2, and 2 classes"),
        (lambda file: spoil_shard(file, cls=b"-1"), "has labels from -1 to 1, and 2 classes"),
    ],
)
def test_shards_that_are_not_in_order(tmp_path, spoil, fault):
    """A tar that is compressed, cut, or without one image and one label a sample is named."""
    write_shards(tmp_path / "s", "train", range(4)), write_shards(tmp_path / "s", "val", range(4))
    put(tmp_path / "s" / "classes.txt", "ant\nbee\n")
    spoil(tmp_path / "s" / "train-0000.tar")
    with pytest.raises(RecipeError) as caught:
        load_data(source(tmp_path / "s"))
    assert fault in str(caught.value) and str(tmp_path / "s") in str(caught.value)


def sets_of(kind: str, root: Path, cut: bool) -> tuple[str, str]:
    """(source, what names its image 3) of 8 training images; `cut`: that image breaks off in the middle."""
    contents = [png(i)[:600] if cut and i == 3 else png(i) for i in range(8)]
    if kind == "shards":
        pytest.importorskip("webdataset")
        for part in ("train", "val"):
            with tarfile.open(root / f"{part}-0.tar", "w") as tar:
                for i, content in enumerate(contents):
                    for ending, data in (("png", content), ("cls", str(i % 2).encode())):
                        member = tarfile.TarInfo(f"{i}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        return str(root), f"3.png in {root / 'train-0.tar'}"
    if kind == "hf":
        datasets = pytest.importorskip("datasets")
        rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [i % 2 for i in range(8)]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
        rows = datasets.Dataset.from_dict(rows, features)
        datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(root / "set")
        return f"hf/{root / 'set'}", f"hf/{root / 'set'}, train 3"
    files = [put(root / f"dtd/dtd/images/{NAMES[i % 2]}/{i}.png", content) for i, content in enumerate(contents)]
    if kind == "csv":
        rows = [f"{file.relative_to(root)},{file.parent.name},{part}" for part in ("train", "val") for file in files]
        return str(write_csv(root, rows)), str(files[3])
    for part in ("train", "val"):
        put(root / f"dtd/dtd/labels/{part}1.txt", "".join(f"{file.parent.name}/{file.name}\n" for file in files))
    return "torchvision/DTD", str(files[3])


@pytest.mark.parametrize("kind", ["csv", "hf", "shards", "torchvision"])
def test_loader_workers_see_the_same_images(tmp_path, monkeypatch, kind):
    """Every source can be sent to another process, and two loader workers give the bits that none gives."""
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    recipe = source(sets_of(kind, tmp_path, cut=False)[0])
    images = prepare(recipe)[2][0]
    batches = [[5, 1], [4], [2, 0, 7]]
    here, there = (list(load(images, 3, batches, workers)) for workers in (0, 2))
    assert all(torch.equal(a, b) for x, y in zip(here, there, strict=True) for a, b in zip(x, y, strict=True))
    sent = pickle.loads(pickle.dumps(load_data(recipe).train))
    assert np.array_equal(sent[3][0], PIXELS[3]) and list(images.labels()) == [0, 1] * 4
    assert data_size(recipe) == ((1880, 47) if kind == "torchvision" else (8, 2))


@pytest.mark.parametrize("kind", ["csv", "hf", "shards", "torchvision"])
def test_an_image_that_breaks_off_is_named_wherever_it_lies(tmp_path, monkeypatch, kind):
    """One message says which image can't be read: its file, its member of a tar, its row."""
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    value, name = sets_of(kind, tmp_path, cut=True)
    with pytest.raises(RecipeError) as caught:
        list(load(prepare(source(value))[2][0], 0, [[i] for i in range(8)], 0))
    assert str(caught.value).startswith(f"can't read the image {name}: ") and "object at" not in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        load_data(source(value)).train[3]
    assert caught.value.one_process


@pytest.mark.parametrize("kind", ["csv", "hf", "shards", "torchvision"])
def test_an_image_that_breaks_off_can_be_left_out(tmp_path, monkeypatch, kind):
    """With on_bad_image="skip" such an image is left out, and no other."""
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    recipe = small_recipe(data=Data(sets_of(kind, tmp_path, cut=True)[0], 24, 8, on_bad_image="skip"))
    labels = [int(labels) for _, labels in load(prepare(recipe)[2][0], 0, [[i] for i in range(8)], 0)]
    assert labels == [0, 1, 0, -100, 0, 1, 0, 1]
