"""Images and labels of torchvision's sets are what torchvision reads."""

import hashlib
import json
import pickle
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision
from torchvision.datasets import CIFAR10, CIFAR100

from finetune.data.external import TORCHVISION
from finetune.data.sources import data_and_size, is_downloaded, known_size, load_data
from finetune.utils.errors import RecipeError
from image_files import NAMES, PIXELS, assert_same_set, put, put_image, source


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


def make_cifar(kind):
    def make(root):
        for i, (file, _) in enumerate([*kind.train_list, *kind.test_list]):
            rows = {"data": PIXELS[2 * i : 2 * i + 2].transpose(0, 3, 1, 2).reshape(2, -1), CIFAR_LABELS[kind]: [i, 0]}
            put(root / kind.base_folder / file, pickle.dumps(rows))
        names = [f"class {i}" for i in range(10)]
        put(root / kind.base_folder / kind.meta["filename"], pickle.dumps({kind.meta["key"]: names}))

    return make


CIFAR_LABELS = {CIFAR10: "labels", CIFAR100: "fine_labels"}
MADE = {
    "CIFAR10": make_cifar(CIFAR10),
    "CIFAR100": make_cifar(CIFAR100),
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
    """An empty $FINETUNE_DATA, whose files are not compared with the md5 of the real ones."""
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path / "sets"))
    (tmp_path / "sets").mkdir()
    for name in ("cifar", "flowers102", "stl10", "svhn"):
        module = getattr(torchvision.datasets, name)
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())
    return tmp_path / "sets"


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
        assert_same_set(data.train, theirs[0])
        assert_same_set(data.val, theirs[1])
    else:
        assert sorted(
            zip(map(str, data.train.items + data.val.items), [*data.train.labels, *data.val.labels], strict=True)
        ) == sorted(theirs[0].samples)
        assert set(data.val.labels) == set(data.train.labels) == {0, 1}
    known = getattr(theirs[0], "classes", None)
    assert data.classes == (
        tuple(each if isinstance(each, str) else each[0] for each in known)
        if known
        else tuple(str(i) for i in range(TORCHVISION[name][3]))
    )


def refuse(*args, **options):
    raise urllib.error.URLError("no network")


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_set_that_can_not_be_downloaded_is_named(torchvision_folder, monkeypatch, name):
    """Without a network one message has the set, where it belongs and the reason; its size is known all the same."""
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    recipe = source(f"torchvision/{name}")
    with pytest.raises(RecipeError) as caught:
        load_data(recipe)
    message = str(caught.value)
    assert f"torchvision/{name}" in message and str(torchvision_folder / TORCHVISION[name][-1]) in message
    assert "no network" in message or name == "MNIST"  # torchvision prints its mirrors' faults
    assert data_and_size(recipe)[1] == known_size(recipe) == TORCHVISION[name][2:4] and is_downloaded(f"torchvision/{name}")


@pytest.fixture(params=[CIFAR10, CIFAR100])
def cifar(request, tmp_path, monkeypatch):
    """(torchvision's class, its folder): a small set whose md5 torchvision expects, and no network."""
    kind, folder = request.param, tmp_path / request.param.base_folder
    make_cifar(kind)(tmp_path)

    def md5(name):
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        monkeypatch.setattr(kind, files, [[name, md5(name)] for name, _ in getattr(kind, files)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(kind.meta["filename"])})
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return kind, folder


def test_cifar_by_its_short_name(cifar):
    """cifar10 and cifar100 are torchvision's sets: the images that were written, their labels and class names."""
    kind, folder = cifar
    data = load_data(source(kind.__name__.lower()))
    assert_same_set(data.train, kind(folder.parent))
    assert_same_set(data.val, kind(folder.parent, train=False))
    files = len(kind.train_list)
    assert all(np.array_equal(data.train[i][0], PIXELS[i]) for i in range(2 * files))
    assert all(np.array_equal(data.val[i][0], PIXELS[2 * files + i]) for i in range(2))
    assert list(data.train.labels) == [label for i in range(files) for label in (i, 0)] and list(data.val.labels) == [files, 0]
    assert data.classes == tuple(kind(folder.parent).classes)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_of_cifar_with_another_md5_is_read(cifar, tmp_path):
    """A file whose md5 is wrong (images, class names, the archive) is never unpickled; one message says what is wanted."""
    kind, folder = cifar
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    put(tmp_path / kind.filename, bomb)
    for name in [*(name for name, _ in kind.train_list + kind.test_list), kind.meta["filename"]]:
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(bomb)
        with pytest.raises(RecipeError) as caught:
            load_data(source(kind.__name__.lower()))
        for text in (f"torchvision/{kind.__name__}", kind.url, str(folder), "FINETUNE_DATA"):
            assert text in str(caught.value)
        assert not (tmp_path / "ran").exists()
        (folder / name).write_bytes(good)
    assert load_data(source(kind.__name__.lower()))
    pickle.loads(bomb).close()
    assert (tmp_path / "ran").exists()  # it would have gone off


def test_an_unknown_set_of_torchvision_is_answered_with_the_nearest():
    """A misspelt name gets the nearest, and all there are."""
    with pytest.raises(RecipeError, match="no 'torchvision/Flower102'. Did you mean Flowers102"):
        load_data(source("torchvision/Flower102"))
