"""Arrays of any number of channels, from files to a network's logits and back from other programs."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from finetune import run
from finetune.__main__ import main as verb
from finetune.data.channels import fit_preprocessing
from finetune.data.sources import load_data
from finetune.export.export import export
from finetune.images.cache import DiskCache, PixelKind
from finetune.images.read import read_image
from finetune.images.transforms import eval_transform
from finetune.inference.evaluate import evaluate
from finetune.inference.explain import explain_images
from finetune.inference.predict import compute_logits, predict_images
from finetune.models.backbone import build_backbone
from finetune.models.saved import load_model
from finetune.page.gallery import Pictures, heat_pictures
from finetune.recipe import Augment, Data
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import minimal_recipe
from finetune.utils.errors import RecipeError
from helpers import cut_before, on_folder, prepare, small_recipe

KINDS = {  # name: (channels, type of the numbers, ending)
    "grey": (1, "uint8", ".png"),
    "deep": (1, "uint16", ".png"),
    "bands": (5, "float32", ".npy"),
    "tiff": (4, "uint16", ".tif"),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def write(file, values):
    if file.suffix == ".png":
        Image.fromarray(values[:, :, 0]).save(file)
    elif file.suffix == ".npy":
        np.save(file, values)
    else:
        pytest.importorskip("tifffile").imwrite(file, values.transpose(2, 0, 1), photometric="minisblack")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder of two classes for each kind, which differ in the level of their last channel."""
    root = tmp_path_factory.mktemp("channels")
    for name, (channels, dtype, ending) in KINDS.items():
        for split, count in (("train", 10), ("val", 4)):
            for label in range(2):
                (root / name / split / str(label)).mkdir(parents=True)
                for i in range(count):
                    values = np.random.default_rng(100 * label + i).random((36, 40 - i, channels))
                    values[..., -1] += 2 * label
                    scale = {"uint8": 100, "uint16": 20_000, "float32": 0.3}[dtype]
                    write(root / name / split / str(label) / f"{i}{ending}", (scale * values).astype(dtype))
    return root


def fields(kind, *more):
    return ("backbone=test_resnet", "epochs=4", f"data.channels={KINDS[kind][0]}", "mixed_precision=no", *more)


@pytest.fixture(scope="module")
def runs(sets, tmp_path_factory):
    """A finished run of each kind."""
    root = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        assert run.main([*on_folder(sets / kind, root / kind, *fields(kind)), "--quiet"]) == 0
    return root


@EVERY
def test_it_goes_through_everything(runs, sets, kind, tmp_path):
    """Evaluated and predicted as trained; ONNX and torch.export give the logits, also of raw numbers; timm alone loads it."""
    model, (channels, dtype, ending) = load_model(runs / kind), KINDS[kind]
    assert model.preprocessing["input_size"][0] == channels and model.preprocessing["pixels"] == dtype
    result = json.loads((runs / kind / "result.json").read_text())
    assert result["top1"] == 1 and evaluate(runs / kind, sets / kind)["loss"] == pytest.approx(result["loss"], rel=1e-5)
    rows = predict_images(model, sorted((sets / kind / "val").rglob(f"*{ending}")))
    assert [row["predicted"] for row in rows] == ["0"] * 4 + ["1"] * 4
    images = load_data(model.recipe).val
    logits, _ = compute_logits(model, images, "stop", 0)
    again = predict_images(model, [images[i][0] for i in range(8)])
    assert [row["probability"] for row in again] == pytest.approx([row["probability"] for row in rows], abs=1e-6)
    assert all(one.image.size == (32, 32) for one in explain_images(model, [images[i][0] for i in range(2)]))
    transform = eval_transform(model.preprocessing)
    batch = torch.cat([transform.batch(transform.image(images[i][0])[None]) for i in range(8)])
    net = timm.create_model(f"local-dir:{export(runs / kind, 'timm', tmp_path / 'timm')}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(batch), logits, rtol=0, atol=1e-4)
    for to in ("onnx", "torch"):
        for preprocess in (False, True):
            folder = export(runs / kind, to, tmp_path / f"{to}{preprocess}", preprocess)
            about = json.loads((folder / "model.json").read_text())
            assert about["checked"]["on"] == "8 validation images" and f" {channels}" in about["preprocessing"]["steps"][-1]
    card = (tmp_path / "timm" / "README.md").read_text()
    assert f"[n, {channels}, 32, 32]" in card and "convert" not in card
    assert (runs / kind / "report.html").is_file() and (runs / kind / "predictions.png").is_file()


@EVERY
def test_resumed_to_the_bit(runs, sets, kind, tmp_path, monkeypatch):
    """Cut after some steps, and with a cache on a disk, a run ends with the weights of one that was not."""
    words = [*on_folder(sets / kind, tmp_path / "run", *fields(kind)), "--quiet"]
    with pytest.MonkeyPatch.context() as patched:
        cut_before(patched, "set_lrs", 3)
        with pytest.raises(BaseException):  # noqa: B017  # of tests.helpers
            run.main(words)
    assert verb(["resume", str(tmp_path / "run")]) == 0
    words[words.index(str(tmp_path / "run"))] = str(tmp_path / "cached")
    assert run.main([*words, "--cache", str(tmp_path / "cache")]) == 0
    weights = (runs / kind / "model" / "model.safetensors").read_bytes()
    for name in ("run", "cached"):
        assert (tmp_path / name / "model" / "model.safetensors").read_bytes() == weights


@EVERY
def test_mean_and_deviation_are_numpys(sets, kind):
    """Of the training images, each as one; the transformed images have nearly mean 0 and deviation 1."""
    channels, dtype, _ = KINDS[kind]
    data = Data(str(sets / kind), image_size=32, batch_size=4, channels=channels)
    recipe = small_recipe(data=data, backbone="test_resnet", head=None)
    images = load_data(recipe).train
    found = fit_preprocessing({"input_size": (channels, 32, 32)}, images, data)
    arrays = [images[i][0].astype(float) for i in range(len(images))]
    mean = np.mean([one.mean((0, 1)) for one in arrays], 0)
    deviation = np.sqrt(np.mean([((one - mean) ** 2).mean((0, 1)) for one in arrays], 0))
    np.testing.assert_allclose(255 * np.array(found["mean"]), mean, rtol=1e-9)
    np.testing.assert_allclose(255 * np.array(found["std"]), deviation, rtol=1e-6)
    assert found["pixels"] == dtype


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_grey_images_are_resized_as_timm_does(sets, resize):
    """Of 8 bits with one channel timm's own transform of a PIL image gives the same, within 2 grey levels."""
    data = Data(str(sets / "grey"), image_size=(24, 32), batch_size=4, channels=1, resize=resize)
    _, _, (_, images) = prepare(small_recipe(data=data, backbone="test_resnet", head=None, groups=minimal_groups()))
    inputs = images.transform.preprocessing
    transform = create_transform(**{name: value for name, value in inputs.items() if name != "pixels"})
    for i in range(4):
        ours = images.transform.batch(images[0, i][0][None])[0]
        theirs = transform(Image.fromarray(images.images[i][0][:, :, 0]))
        assert ours.shape == theirs.shape == (1, 24, 32)
        assert (ours - theirs).abs().max() * 255 * inputs["std"][0] < (4 if resize == "squash" else 2)


def minimal_groups():
    return minimal_recipe("test_resnet", "digits", 32).groups


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_efficientnet", "convnext_atto"])
def test_pretrained_stems_are_adapted_as_timm_does(name, channels):
    """Weights of three channels give the network that timm makes of them; all other layers are those of the weights."""
    torch.manual_seed(0)
    state = timm.create_model(name, num_classes=7).state_dict()
    recipe = minimal_recipe(name, "digits", timm.get_pretrained_cfg(name).input_size[-1])
    data = Data("digits", recipe.data.image_size, 1, channels=channels)
    ours = build_backbone(small_recipe(backbone=name, head=None, data=data, groups=recipe.groups, epochs=1), 3, dict(state))
    overlay = {"state_dict": dict(state), "num_classes": 7}
    theirs = timm.create_model(name, True, num_classes=7, in_chans=channels, pretrained_cfg_overlay=overlay).state_dict()
    changed = {key for key, value in ours.state_dict().items() if value.shape != state[key].shape}
    assert len(changed) == 3  # the stem, and weight and bias of the head
    for key, value in ours.state_dict().items():
        if value.shape == theirs[key].shape:
            assert torch.equal(value, theirs[key]), key


def test_geometry_alone_augments_arrays(sets):
    """Crops, flips and turns give each channel the same place; what knows photographs alone is refused, by name."""
    data = Data(str(sets / "bands"), image_size=32, batch_size=4, channels=5)
    turned = Augment(vflip=0.5, rot90=0.5, crop_scale=(0.5, 1.0))
    _, _, (images, _) = prepare(
        small_recipe(data=data, augment=turned, backbone="test_resnet", head=None, groups=minimal_groups())
    )
    images.images.read = lambda item, **_: np.repeat(np.load(item)[:, :, :1], 5, 2)
    images.cache = None
    batch = images.transform.batch(torch.stack([images[1, i][0] for i in range(8)]))
    mean, std = (torch.tensor(images.transform.preprocessing[name])[:, None, None] for name in ("mean", "std"))
    values = batch * std + mean
    torch.testing.assert_close(values, values[:, :1].expand_as(values))
    with pytest.raises(RecipeError, match="augment: color_jitter, erasing: for photographs alone, not for channels=5"):
        small_recipe(data=data, augment=Augment(color_jitter=0.1, erasing=0.1))
    with pytest.raises(RecipeError, match="torchvision's networks take 3"):
        small_recipe(data=data, backbone="torchvision/resnet18", head=None)
    with pytest.raises(RecipeError, match="reduced_decode is for photographs"):
        small_recipe(data=Data("x", 32, 4, channels=1, reduced_decode=2.0))


def test_own_functions_get_arrays(sets):
    """A recipe's function is given an array, with numbers of the set's type; another type is refused."""
    data = Data(str(sets / "tiff"), image_size=32, batch_size=4, channels=4)
    seen = []

    def noise(image, rng):
        seen.append((image.dtype.name, image.shape[2]))
        return (image + rng.integers(0, 9, image.shape)).astype(np.uint16)

    for function, fault in ((noise, None), (lambda image, rng: image.astype(float), "of uint16; of image 0 .* of float64")):
        recipe = small_recipe(
            data=data, augment=Augment(function=function), backbone="test_resnet", head=None, groups=minimal_groups()
        )
        _, _, (images, _) = prepare(recipe)
        if fault:
            with pytest.raises(RecipeError, match=fault):
                images[0, 0]
        else:
            assert images[0, 0][0].dtype == torch.float32 and seen[-1] == ("uint16", 4)


@EVERY
def test_the_page_has_heat_maps_of_arrays(runs, kind, capsys):
    """Of the array itself, over the picture that is shown of it; a network with too few places has none, and no fault."""
    images = load_data(load_model(runs / kind).recipe).val
    heat_pictures(runs / kind, range(3), torch.tensor([0, 1, 0]), Pictures(images, (255, 255, 255)))
    assert not capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("finetune.page.gallery.PLACES", 0)
        found = heat_pictures(runs / kind, range(3), torch.tensor([0, 1, 0]), Pictures(images, (255, 255, 255)))
    assert len(found) == 3 and not capsys.readouterr().err


def test_two_types_of_numbers_are_not_mixed(sets, runs, tmp_path):
    """An image of 8 bits among those of 16 is named, in training and where it is predicted; skipped where such are."""
    mixed = shutil.copytree(sets / "deep", tmp_path / "mixed")
    shallow = sorted((sets / "grey" / "train" / "0").iterdir())[0]
    shutil.copy(shallow, mixed / "train" / "0" / "3.png")
    words = on_folder(mixed, tmp_path / "run", *fields("deep"))
    with pytest.raises(RecipeError, match=r"3.png holds uint8, others hold uint16: save them in one type"):
        load_and_fit(words, mixed)
    deep = sorted((sets / "deep" / "val" / "0").iterdir())[0]
    rows = predict_images(load_model(runs / "deep"), [shallow, deep])
    assert "holds uint8, where the training images hold uint16" in rows[0]["error"] and rows[1]["predicted"] == "0"


def load_and_fit(words, folder):
    data = Data(str(folder), image_size=32, batch_size=4, channels=1)
    recipe = small_recipe(data=data, backbone="test_resnet", head=None)
    return fit_preprocessing({"input_size": (1, 32, 32)}, load_data(recipe).train, data)


def test_another_number_of_channels_is_named(sets, tmp_path, capsys):
    """Before anything is trained, for all files at once; a picture is not five bands."""
    assert run.main(on_folder(sets / "bands", tmp_path / "run", *fields("bands", "data.channels=4"))) == 2
    err = capsys.readouterr().err
    assert "can't read 28 of 28 images" in err and "neither the first nor the last are channels=4" in err
    assert not (tmp_path / "run").exists()


def test_arrays_without_channels_say_what_to_set(sets, tmp_path, capsys):
    """Where a recipe reads photographs, and its folder or the images to predict are arrays."""
    assert verb(["suggest", "--data", str(sets / "bands"), "--output", str(tmp_path / "mine.py")]) == 2
    assert "it is an array, no picture: --set data.channels=N" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="it is an array, no picture"):
        read_image(sorted((sets / "bands" / "val").rglob("*.npy"))[0])


@EVERY
def test_suggest_writes_the_channels(sets, tmp_path, kind, capsys):
    """`suggest --channels N`, and `train` without a recipe, make a recipe that reads such arrays."""
    words, channels = ["--data", str(sets / kind), "--backbone", "resnet18", "--weights", "none"], KINDS[kind][0]
    assert verb(["suggest", *words, "--channels", str(channels), "--output", str(tmp_path / "mine.py")]) == 0
    recipe, _ = load_recipe(str(tmp_path / "mine.py"))
    assert recipe.data.channels == channels and "35 px (median; the smallest 31)" in (tmp_path / "mine.py").read_text()
    small = ["--epochs", "1", "--image-size", "32", "--output", str(tmp_path / "run"), "--quiet"]
    assert verb(["train", *words, "--set", f"data.channels={channels}", *small]) == 0
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["data"]["channels"] == channels


def test_a_cache_keeps_arrays(tmp_path):
    """Numbers of each type come back as they were, from memory and from a disk."""
    for dtype in ("uint8", "uint16", "int16", "float32"):
        arrays = [(100 * np.random.default_rng(i).random((5 + i, 7, 6))).astype(dtype) for i in range(4)]
        for _ in range(2):
            cache = DiskCache(tmp_path / dtype, 4, 10**6, PixelKind(6, dtype))
            for i, array in enumerate(arrays):
                cache.keep(i, array)
                np.testing.assert_array_equal(cache.get(i), array)
                assert cache.get(i).dtype == dtype
            cache.flush()


@pytest.mark.parametrize("channels", [1, 12])
def test_a_smoke_run_needs_no_such_images(tmp_path, channels):
    """It makes arrays of as many channels."""
    words = ["--recipe", "resnet18_cifar", "--smoke", "--set", f"data.channels={channels}", "--output", str(tmp_path / "run")]
    assert run.main(words) == 0
    assert load_model(tmp_path / "run").preprocessing["input_size"][0] == channels
