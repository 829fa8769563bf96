"""Ranking backbones: the scores are scikit-learn's, the choice is made on training images alone, and a second call is free."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from finetune.__main__ import main
from finetune.data.loader import ImageDataset
from finetune.data.sources import load_data
from finetune.data.split import names_of
from finetune.images.transforms import eval_transform
from finetune.models.backbone import build_backbone
from finetune.models.pretrained import preprocessing
from finetune.ranking import candidates, probes, rank
from finetune.ranking.candidates import Wanted
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import minimal_recipe
from finetune.tools import label_errors
from finetune.tools.label_errors import FOLDS, deal_folds, features_of
from finetune.training.setup import RunOptions
from finetune.utils.errors import RecipeError
from finetune.utils.seed import seed_all

NETWORKS = ("test_resnet", "test_vit", "test_efficientnet")
SIZE = 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of random weights of three networks, as --weights takes them."""
    folder = tmp_path_factory.mktemp("weights")
    for number, name in enumerate(NETWORKS):
        torch.manual_seed(number)
        safetensors.torch.save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")
    return [f"{name}={folder / name}.safetensors" for name in NETWORKS]


def noisy(root, train=20, val=6, names="abc"):
    """Class folders of images in which a faint tint tells the class, not always rightly."""
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                random = np.random.RandomState(1000 * label + 10 * i + len(part))
                pixels = random.randint(0, 200, (SIZE, SIZE, 3)) + random.randint(0, 30, 3)
                pixels[..., label % 3] += 25
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def images(tmp_path):
    return noisy(tmp_path / "noisy")


@pytest.fixture
def ranked(tmp_path, images, weights):
    """A function that ranks the networks on the images, and gives rank.json's content and the text."""

    def run(source=images, **wanted):
        options = {"weights": weights, "image_size": SIZE, "backbones": "test_resnet"} | wanted
        return rank.report(str(source), Wanted(**options), tmp_path / "out", tmp_path / "cache")

    return run


def timms_features(name, weights, files):
    """What timm's network gives to its head."""
    net = timm.create_model(name, **({"img_size": SIZE} if "vit" in name else {})).eval()
    state = safetensors.torch.load_file(dict(text.split("=") for text in weights)[name])
    net.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, net) if "vit" in name else state)
    config = timm.data.resolve_data_config({"input_size": (3, SIZE, SIZE), "crop_pct": 1.0}, model=net)
    transform = timm.data.create_transform(**config)
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(file)) for file in files])
        return net.forward_head(net.forward_features(batch), pre_logits=True).double()


def test_scores_and_order_are_scikit_learns(ranked, images, weights, monkeypatch):
    """Logistic regressions of scikit-learn on timm's features, with the same folds and penalties, get the same top-1."""
    chosen, fit = [], label_errors.fit
    monkeypatch.setattr(label_errors, "fit", lambda *given: chosen.append(fit(*given)) or chosen[-1])
    result, _ = ranked()
    data = load_data(minimal_recipe("resnet18", str(images), SIZE)).train
    labels, files = np.array(data.labels), list(data.items)
    folds = deal_folds(labels, names_of(data, images)).numpy()
    speeds, theirs = {row["name"]: row["images_per_second"] for row in result["rows"]}, {}
    for name in sorted(NETWORKS, key=lambda name: -speeds[name]):  # the order in which they are looked at
        features, right = timms_features(name, weights, files), 0
        for fold in range(FOLDS):
            inside, l2 = folds == fold, chosen.pop(0)
            mean, scale = features[~inside].mean(0), features[~inside].var(0, correction=0).mean().sqrt()
            scaled = ((features - mean) / scale).numpy()
            head = LogisticRegression(C=1 / (l2 * (~inside).sum()), tol=1e-9, max_iter=10_000)
            right += int((head.fit(scaled[~inside], labels[~inside]).predict(scaled[inside]) == labels[inside]).sum())
        theirs[name] = right / len(labels)
    ours = {row["name"]: row["top1"] for row in result["rows"]}
    assert len(set(theirs.values())) > 1 and all(0.3 < value < 1 for value in theirs.values())
    assert ours == pytest.approx(theirs, abs=1.01 / len(labels))  # one image on an edge, where a pixel is rounded otherwise
    assert [row["top1"] for row in result["rows"]] == sorted(ours.values(), reverse=True)


def test_networks_share_decoded_images_alone(images):
    """Loader processes of one network's images do not serve the next one's: each network has its own preprocessing."""
    data, found = load_data(minimal_recipe("resnet18", str(images), SIZE)), list[torch.Tensor]()
    dataset = None
    for size in (32, 48, 48):
        recipe = minimal_recipe("test_resnet", str(images), size, batch_size=8)
        seed_all("net")
        net = build_backbone(recipe, 3)
        fresh = ImageDataset(data.train, eval_transform(preprocessing(recipe, net)), 0, data.classes)
        dataset = dataset or fresh
        found.append(features_of(recipe, net, dataset if len(found) < 2 else fresh, RunOptions(workers=2)))
    assert torch.equal(found[1], found[2]) and not torch.allclose(found[0], found[1])


def test_each_fold_has_its_share_and_groups_stay_whole():
    """Folds are even in each class; images of one group are in one fold; images that are added move no class's others apart."""
    labels = np.array([0] * 50 + [1] * 25)
    folds = deal_folds(labels, list(map(str, range(75))))
    assert [folds[labels == label].bincount().tolist() for label in (0, 1)] == [[10] * FOLDS, [5] * FOLDS]
    groups = [f"patient {i // 3}" for i in range(75)]
    folds = deal_folds(labels, groups).tolist()
    assert len(set(zip(groups, folds, strict=True))) == 25 and len(set(folds)) == FOLDS


def test_validation_images_have_no_say(ranked, images):
    """With other validation images the scores are the same; they measure the first network alone, afterwards."""
    before, _ = ranked()
    for path in (images / "val").rglob("*.png"):
        Image.new("RGB", (SIZE, SIZE), (int(path.stem) * 9, 40, 90)).save(path)
    after, _ = ranked()
    assert [row["top1"] for row in after["rows"]] == [row["top1"] for row in before["rows"]]
    assert after["validation"]["name"] == after["rows"][0]["name"] and after["validation"]["images"] == 18
    assert after["validation"]["top1"] != before["validation"]["top1"]


def test_a_second_call_computes_no_features(ranked, images, monkeypatch):
    """Features are kept by content: other paths find them; another image, other weights or another size do not."""
    first, _ = ranked()

    def never(*given):
        raise AssertionError("computed")

    for name in ("features_of", "out_of_fold_logits", "build_backbone"):
        monkeypatch.setattr(probes, name, never)
    assert ranked()[0] == first
    moved = images.rename(images.parent / "moved")
    assert ranked(moved)[0]["rows"] == first["rows"]
    for change in ({"image_size": 64}, {"weights": [], "backbones": "test_resnet,test_vit"}):
        with pytest.raises((AssertionError, RecipeError), match="computed|none of these networks can be had"):
            ranked(moved, **change)
    Image.new("RGB", (SIZE, SIZE)).save(moved / "train" / "a" / "0.png")
    with pytest.raises(AssertionError, match="computed"):
        ranked(moved)


def test_what_can_not_be_fetched_is_listed(ranked, monkeypatch):
    """Without a network, those on the hub are left out with the reason, asked for once; if none is left it is an error."""
    tried = []

    def unreachable(url, what):
        tried.append(what)
        raise RecipeError(f"can't reach {what} (no route)\n  more")

    monkeypatch.setattr("finetune.models.pretrained.reach", unreachable)
    monkeypatch.setattr(candidates, "is_cached", lambda name: False)
    result, text = ranked(backbones="resnet18.a1_in1k,resnet50.a1_in1k")
    assert list(result["left_out"]) == ["resnet18.a1_in1k", "resnet50.a1_in1k"] and len(result["rows"]) == 3
    assert all("can't reach the Hugging Face hub" in why for why in result["left_out"].values()) and len(tried) == 1
    assert "left out: resnet50.a1_in1k: can't reach" in text
    with pytest.raises(RecipeError, match="none of these networks can be had:\n  resnet18.a1_in1k: can't reach"):
        ranked(backbones="resnet18.a1_in1k", weights=[])


def test_minutes_leave_out_what_would_take_longer(ranked, weights, monkeypatch):
    """The fastest comes first, and what would not end in time is named with what it takes; if all would, that is an error."""
    speeds = {"test_resnet": 1e5, "test_vit": 1e4, "test_efficientnet": 0.01}
    monkeypatch.setattr(rank, "speed_of", lambda task, one: speeds[one.label])
    monkeypatch.setattr(rank, "duration", lambda seconds: f"{seconds > 1000}")
    result, _ = ranked(minutes=20)
    assert {row["name"] for row in result["rows"]} == {"test_resnet", "test_vit"}
    assert result["left_out"] == {"test_efficientnet": "it takes about True, and True were left"}
    with pytest.raises(RecipeError, match="nothing could be ranked: test_efficientnet: it takes about"):
        ranked(minutes=20, backbones="test_efficientnet", weights=weights[2:])


def test_suggest_takes_the_first(ranked, images, tmp_path, capsys):
    """Its network, weights and size are the recipe's, with the score as the reason; another row by name; other images not."""
    result, _ = ranked()
    first, last = result["rows"][0], result["rows"][-1]
    words = ["suggest", "--data", str(images), "--from", str(tmp_path / "out" / "rank.json")]
    assert main([*words, "--output", str(tmp_path / "mine.py")]) == 0
    recipe, text = load_recipe(str(tmp_path / "mine.py"))[0], (tmp_path / "mine.py").read_text()
    assert (recipe.backbone, recipe.weights, recipe.data.image_size) == (first["backbone"], first["weights"], SIZE)
    assert f"# first of 3 in finetune rank: top-1 {first['top1']:.1%} (" in text and max(map(len, text.splitlines())) <= 128
    assert main([*words, "--backbone", last["name"], "--output", str(tmp_path / "last.py")]) == 0
    assert load_recipe(str(tmp_path / "last.py"))[0].backbone == last["backbone"]
    capsys.readouterr()
    (images / "train" / "a" / "0.png").rename(images / "train" / "b" / "new.png")
    for more, said in (
        ([], "is of other images"),
        (["--backbone", "resnet18"], "is of other images"),
        (["--weights", "none"], "leave out --weights"),
    ):
        assert main([*words, *more]) == 2 and said in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "mine.py")]) == 2 and "mine.py" in capsys.readouterr().err


def test_several_labels_an_image_and_grey_ones(ranked, images):
    """Several labels an image are ranked by mean average precision; grey images and uneven classes are as others are."""
    files = sorted((images / "train").rglob("*.png"))
    for file in files:
        Image.open(file).convert("L").save(file)
    with open(images / "several.csv", "w", newline="") as table:
        rows = [(f"train/{file.parent.name}/{file.name}", "a;b" if i % 3 else "ab"[i % 2]) for i, file in enumerate(files)]
        csv.writer(table).writerows([("path", "label"), *rows])
    result, text = ranked(images / "several.csv")
    best = result["rows"][0]
    assert best["interval"][0] < best["mean_average_precision"] < best["interval"][1] and "mean average precision" in text
    for file in files[:15]:
        file.unlink()
    result, text = ranked()
    assert all(0 < row["macro_f1"] <= 1 for row in result["rows"]) and "macro F1" in text


def test_the_command_prints_a_table_and_writes_its_files(here, images, weights, monkeypatch, capsys):
    """80 columns or JSON, rank.json and a picture; the kept features lie where XDG_CACHE_HOME says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "xdg"))
    line = ["rank", "--data", str(images), "--image-size", str(SIZE), "--backbones", "test_resnet", "--weights", weights[0]]
    assert main([*line, "--output", "out"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, (row for row in out.splitlines() if " --data " not in row and "noisy" not in row))) <= 80
    assert list(Path("xdg/finetune/features").glob("*.safetensors")) and Image.open("out/rank.png").width > 400
    assert main([*line, "--output", "out", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(Path("out/rank.json").read_text()) | {"picture": "out/rank.png"}
    row = shown["rows"][0]
    assert row["parameters"] == sum(p.numel() for p in timm.create_model("test_resnet", num_classes=3).parameters())
    assert row["images_per_second"] > 0 and row["licence"] == "not stated"


@pytest.mark.parametrize(
    "words,said",
    [
        (["--backbones", "resnet81"], "Did you mean"),
        (["--weights", "resnet18"], "write NAME=FILE"),
        (["--weights", "resnet18=nowhere.pth"], "no weights file nowhere.pth"),
        (["--minutes", "0"], "must be above 0"),
        (["--image-size", "-3"], "must be above 0"),
        (["--backbones", "resnet18", "--shelf", "small"], "not allowed with"),
    ],
)
def test_mistakes_are_found_before_the_images_are_read(here, images, monkeypatch, capsys, words, said):
    """One sentence, exit code 2, and no image is looked at."""
    monkeypatch.setattr(rank, "load_data", lambda recipe: pytest.fail("read"))
    try:
        code = main(["rank", "--data", str(images), *words])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and said in capsys.readouterr().err


def test_near_the_best_is_within_its_interval():
    """Rows whose score lies within the interval of the best are named, and no others."""
    rows = [{"name": name, "top1": value, "interval": (0.8, 0.97)} for name, value in (("a", 0.9), ("b", 0.81), ("c", 0.79))]
    assert rank.near_best({"metric": "top1", "rows": rows}) == ["b"]
