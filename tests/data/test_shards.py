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
        (lambda root: put(root / "classes.txt", "a\nb\nc\n"), r"no image in train has the label 2 \('c'\)"),
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
    """Keys that come twice, class names that are none, classes without images, labels that are no numbers, other names."""
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
