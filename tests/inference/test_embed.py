"""Features of images: timm's own, in a file that numpy reads, and as a picture."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

import finetune
from finetune.__main__ import main
from finetune.inference.embed import embed, embed_images, plot_features, principal_components, umap_points
from finetune.models.saved import SavedModel
from finetune.models.saving import save_model
from finetune.utils.errors import RecipeError
from helpers import PIXEL_ROUNDING, PREPROCESSING, SmallNet, small_recipe


@pytest.fixture
def saved(tmp_path):
    """A function from a timm model's name to a folder with one, of random weights and so many classes."""

    def save(name, classes, **options):
        net = timm.create_model(name, num_classes=classes, **options)
        save_model(tmp_path / name, net, PREPROCESSING, tuple(map(str, range(classes))))
        return tmp_path / name

    return save


def pre_logits(folder, files):
    """What timm gives to the head of the network that it finds in a folder, of images in its preprocessing."""
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    with torch.no_grad():
        images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        return net.forward_head(net.forward_features(images), pre_logits=True).flatten(1)


@pytest.mark.parametrize(
    "name,classes,options",
    [
        ("test_resnet", 3, {}),
        ("test_vit", 3, {"img_size": 32}),
        ("test_vit", 0, {"img_size": 32}),  # as DINOv2's are published
    ],
)
def test_features_are_timms_own(saved, image_folder, name, classes, options):
    """Each image's row is what timm's forward_head(forward_features(image), pre_logits=True) makes of it."""
    files = sorted((image_folder / "val").rglob("*.png"))
    folder = saved(name, classes, **options)
    found, theirs = embed(folder, [image_folder / "val"]), pre_logits(folder, files)
    assert found.files == list(map(str, files)) and found.features.dtype == torch.float32
    torch.testing.assert_close(found.features, theirs, rtol=0, atol=PIXEL_ROUNDING * float(theirs.abs().max()))
    assert theirs.std(0).max() > 10 * (found.features - theirs).abs().max()  # images differ by far more


def test_the_file_is_read_by_numpy(run_folder, image_folder, here, capsys):
    """The command's file has a float32 row an image and the paths in its metadata; finetune.load(...).embed gives the same."""
    assert main(["embed", str(run_folder), str(image_folder / "val"), "--picture", "f.png", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    with safe_open("features.safetensors", "np") as file:
        features, files = file.get_tensor("features"), json.loads(file.metadata()["files"])
    assert said == {"file": "features.safetensors", "images": 15, "features": 512, "picture": "f.png"}
    assert features.shape == (15, 512) and features.dtype == np.float32 and Image.open("f.png").width > 400
    assert files == [str(path) for path in sorted((image_folder / "val").rglob("*.png"))]
    model = finetune.load(run_folder)
    for images in (image_folder / "val", files):
        again = model.embed(images)
        assert again.files == files and np.array_equal(again.features.numpy(), features)
    given = model.embed([Image.open(files[3]), files[3]])
    assert given.files == ["", files[3]] and torch.equal(given.features[0], given.features[1])
    assert main(["embed", str(run_folder), str(image_folder / "val")]) == 2 and "is there already" in capsys.readouterr().err


def test_an_unreadable_image_is_left_out_and_named(run_folder, image_folder, tmp_path, capsys):
    """As of predict: the others have their rows, and their own names."""
    shutil.copytree(image_folder / "val" / "red", tmp_path / "red")
    (tmp_path / "red" / "2.png").write_text("-")
    found = embed(run_folder, [tmp_path])
    assert found.files == [str(tmp_path / "red" / f"{i}.png") for i in (0, 1, 3, 4)] and len(found.features) == 4
    assert "2.png" in capsys.readouterr().err
    torch.testing.assert_close(found.features[2:3], embed(run_folder, [tmp_path / "red" / "3.png"]).features)


def test_the_picture_shows_scikit_learns_components(image_folder, run_folder, tmp_path):
    """The two directions and their shares of the variance are PCA's, but for signs; folders too many for colours are drawn."""
    found = embed(run_folder, [image_folder])
    points, shares = principal_components(found.features)
    theirs = PCA(2, svd_solver="full").fit(found.features.double().numpy())
    assert shares.numpy() == pytest.approx(theirs.explained_variance_ratio_, rel=1e-3)
    expected = theirs.transform(found.features.double().numpy())
    signs = np.sign((points.numpy() * expected).sum(0))
    np.testing.assert_allclose(points.numpy() * signs, expected, atol=1e-2 * np.abs(expected).max())
    many = found._replace(files=[f"{i % 25}/{i}.png" for i in range(len(found.files))])
    assert Image.open(plot_features(many, tmp_path / "many.png")).width > 400


def test_umap_keeps_neighbours(image_folder, run_folder, tmp_path, monkeypatch, capsys):
    """Neighbours stay near by scikit-learn's trustworthiness, twice alike; few images are drawn, too; without it a sentence."""
    line = ["embed", str(run_folder), str(image_folder), "--output", str(tmp_path / "f.safetensors"), "--umap"]
    assert main(line) == 2 and "--umap is how --picture is drawn" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        assert main([*line, "--picture", str(tmp_path / "none.png")]) == 2
    assert "pip install umap-learn" in capsys.readouterr().err
    pytest.importorskip("umap")
    found = embed(run_folder, [image_folder])
    points, again = (umap_points(found.features) for _ in range(2))
    np.testing.assert_array_equal(points, again)
    assert trustworthiness(found.features.numpy(), points, n_neighbors=5) > 0.8
    for number in (3, 12, len(found.files)):
        few = found._replace(features=found.features[:number], files=found.files[:number])
        assert Image.open(plot_features(few, tmp_path / f"{number}.png", by_umap=True)).width > 400


def test_a_network_without_a_head_is_named():
    """One of a function whose recipe names no head, and one whose head takes a map, are refused in a sentence."""
    model = SavedModel(SmallNet().eval(), tuple("abcdefg"), PREPROCESSING, small_recipe(head=None))
    images = [np.zeros((40, 40, 3), np.uint8)] * 2
    with pytest.raises(RecipeError, match="embed needs a network with a head.*SmallNet has no head that is known by name"):
        embed_images(model, images)
    assert embed_images(model._replace(recipe=small_recipe()), images).features.shape == (2, 16)
    with pytest.raises(RecipeError, match="not a row of features"):
        embed_images(model._replace(recipe=small_recipe(head="body")), images)
