"""Shards as other programs write them: names, classes, faults."""

import io
import tarfile

import pytest

from finetune.data.sources import load_data
from finetune.utils.errors import RecipeError
from image_files import png, put, source

SAMPLES = [(f"{i:03}", "png", png(i), i % 2) for i in range(6)]


def write_tar(file, samples, **more):
    """A tar of samples, (key, ending, image, label)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for key, ending, image, label in samples:
            for name, content in ((f"{key}.{ending}", image), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file


@pytest.fixture
def shards(tmp_path):
    write_tar(tmp_path / "train-000.tar", SAMPLES)
    write_tar(tmp_path / "validation-000.tar", SAMPLES[:4])
    return tmp_path


@pytest.mark.parametrize("train,val", [("train", "validation"), ("training", "valid"), ("train", "dev"), ("Train", "Test")])
def test_shards_of_every_split_name_are_used(shards, train, val):
    """Validation shards are used by any of their usual names: none is left for a fifth of the training images."""
    (shards / "train-000.tar").rename(shards / f"{train}-000.tar")
    (shards / "validation-000.tar").rename(shards / f"{val}-000.tar")
    data = load_data(source(shards))
    assert (len(data.train), len(data.val)) == (6, 4)


def test_shards_are_known_in_capitals(shards):
    """TRAIN-000.TAR is a training shard, as TRAIN/ is a folder of training images."""
    for file in shards.iterdir():
        file.rename(shards / file.name.upper())
    data = load_data(source(shards))
    assert (len(data.train), len(data.val)) == (6, 4)


def test_what_lies_beside_the_shards_is_said(shards, capsys):
    """Test shards that are not needed, other tars and other folders are left out in the words that folders have for it."""
    for name in ("test-000", "test-001", "more", ".hidden"):
        write_tar(shards / f"{name}.tar", SAMPLES)
    put(shards / "cat" / "0.png", png(0))
    data = load_data(source(shards))
    assert (len(data.train), len(data.val)) == (6, 4)
    said = f"data: of {shards} only train-*.tar and validation-*.tar are used, not more.tar, cat/, test-*.tar\n"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "others,fault",
    [
        (("val-000.tar",), r"has val-\*.tar and validation-\*.tar: leave one of them"),
        (("Train-001.tar",), r"has Train-\*.tar and train-\*.tar: leave one of them"),
        (("train/a/0.png",), r"has train-\*.tar and train/: leave one of them"),
        (("Valid/a/0.png", "train/a/0.png"), r"has train-\*.tar and train/: leave one of them"),
        (("Valid/a/0.png",), r"has validation-\*.tar and Valid/: leave one of them"),
        (("test/a/0.png", ""), r"has train-\*.tar and test/: wanted are shards or folders, not one of each"),
    ],
)
def test_names_that_leave_it_open_are_asked_about(shards, others, fault):
    """Two kinds of training or validation images are refused: neither is left out in silence, and none are merged."""
    for name in others:
        if not name:
            (shards / "validation-000.tar").unlink()
        elif name.endswith(".tar"):
            write_tar(shards / name, SAMPLES)
        else:
            put(shards / name, png(0))
    with pytest.raises(RecipeError, match=fault):
        load_data(source(shards))


def test_copies_in_validation_are_said(shards, capsys):
    """Validation images with the content of training images are counted and named as those of folders are; others are not."""
    write_tar(shards / "validation-000.tar", [("a", "png", png(6), 0), ("b", "png", png(7), 1)])
    load_data(source(shards))
    assert capsys.readouterr().err == ""
    write_tar(shards / "validation-000.tar", [("a", "png", png(6), 0), ("b", "png", png(5), 1)])
    write_tar(shards / "train-001.tar", [("x", "png", png(4), 1)])
    load_data(source(shards))
    err = capsys.readouterr().err
    assert f"1 of 2 validation images are training images as well (b.png in {shards}/validation-000.tar): the metrics" in err
    assert f"(x.png in {shards}/train-001.tar is 004.png in {shards}/train-000.tar)" in err
    (shards / "validation-000.tar").unlink()
    write_tar(shards / "train-000.tar", [(str(i), "png", png(i % 2), i % 2) for i in range(60)])
    (shards / "train-001.tar").unlink()
    load_data(source(shards))
    assert "validation images are training images as well" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["cat\r\ndog\r\n\r\n", "\ufeffcat\ndog\n", " cat \ndog"])
def test_class_names_are_what_is_written(shards, text):
    """Blank lines at the end, a byte-order mark and spaces are not part of classes.txt's names."""
    put(shards / "classes.txt", text)
    assert load_data(source(shards)).classes == ("cat", "dog")


@pytest.mark.parametrize(
    "spoil,fault",
    [
        (lambda root: write_tar(root / "train-000.tar", SAMPLES + SAMPLES[:1]), "000.png is there twice"),
        (lambda root: put(root / "classes.txt", "cat\ncat\n"), "names a class twice, or none in a line: 'cat'"),
        (lambda root: put(root / "classes.txt", "\ncat\ndog\n"), "names a class twice, or none in a line: ''"),
        (
            lambda root: put(root / "classes.txt", "a\nb\nc\n"),
            r"no image in train has the label 2 \('c'\); labels count from 0, and .*classes.txt names 3",
        ),
        (
            lambda root: put(root / "classes.txt", "cat"),
            "from 0 to 1, and 1 classes in .*classes.txt, from 0: the label 1 is that of 001.png in .*train-000.tar and of 4",
        ),
        (
            lambda root: write_tar(root / "train-000.tar", [*SAMPLES, ("odd", "png", png(6), 281)]),
            r"train has the label 2 \('2'\), .*, 11 \('11'\) and 269 more; .* the highest, 281, is that of odd.png in .*train",
        ),
        (
            lambda root: write_tar(root / "validation-000.tar", [*SAMPLES, ("odd", "png", png(6), 10**17)]),
            r"train has the label 2 .* more; .* the highest, 100000000000000000, is that of odd.png in .*validation-000.tar",
        ),
        (
            lambda root: write_tar(root / "train-000.tar", [*SAMPLES, ("odd", "png", png(6), -1)]),
            "from -1 to 1, and 2 classes, from 0: the label -1 is that of odd.png in .*train-000.tar",
        ),
        (lambda root: write_tar(root / "train-000.tar", [("a", "png", png(6), 10**19)]), "a.cls is '10*', not a number"),
        (lambda root: write_tar(root / "validation-000.tar", []), "has no images in val: .*validation-000.tar$"),
        (lambda root: write_tar(root / "train-000.tar", []), "has no images in train: .*train-000.tar$"),
        (
            lambda root: write_tar(root / "train-000.tar", [("x/img.v2.000", "JPEG", png(0), 0)]),
            "x/img has 0 images and no .cls .x/img.v2.000.JPEG is its .v2.000.jpeg.; WebDataset's keys end at .* first dot",
        ),
        (
            lambda root: [
                write_tar(root / f"{part}-000.tar", [(*sample[:3], sample[3] + 1) for sample in SAMPLES])
                for part in ("train", "validation")
            ],
            r"no image in train has the label 0 \('0'\); labels count from 0",
        ),
        (lambda root: write_tar(root / "validation-000.tar", SAMPLES[::2]), r"no image in val has the label 1"),
        (lambda root: write_tar(root / "train-000.tar", [(*SAMPLES[0][:3], "cat")]), "000.cls is 'cat', not a number"),
        (lambda root: (root / "train-000.tar").rename(root / "train_000.tar"), "called train-.*are read.*train_000.tar"),
    ],
)
def test_what_is_wrong_with_shards_is_named(shards, spoil, fault):
    """Keys that come twice or have dots, class names that are none, classes without images, odd labels, other names."""
    for file in shards.glob("validation-*.tar") if "train_000" in fault else ():
        file.unlink()
    spoil(shards)
    with pytest.raises(RecipeError, match=fault):
        load_data(source(shards))


def test_a_tar_that_breaks_off_between_samples_is_refused(shards):
    """A tar cut anywhere is refused, also where whole samples are left: its end is an empty block."""
    content = (shards / "train-000.tar").read_bytes()
    ends = [end for end in range(1024, len(content) - 1024, 512) if content[end : end + 512].strip(b"\0")]
    for end in ends[::3] + [700]:
        (shards / "train-000.tar").write_bytes(content[:end])
        with pytest.raises(RecipeError, match="can't use .*train-000.tar"):
            load_data(source(shards))


def test_a_saved_set_without_its_prefix_is_told(tmp_path):
    """A folder of parquet files is told how to be named."""
    put(tmp_path / "train.parquet", b"PAR1")
    with pytest.raises(RecipeError, match=f"A set of the package datasets is named hf/{tmp_path}"):
        load_data(source(tmp_path))
