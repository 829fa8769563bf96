"""Ranking backbones by how well a ridge regression on their features says numbers."""

import csv
import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score

from finetune.data.sources import load_data
from finetune.models.linear_probe import NUM_FOLDS, RIDGE_PENALTIES, make_folds
from finetune.ranking import rank
from finetune.ranking.candidates import Wanted
from finetune.ranking.features import digest_array, recall
from finetune.recipe.load import load_recipe
from finetune.tools.image_stats import compute_image_stats, recipe_for
from finetune.tools.label_errors import FOLDS, deal_folds, out_of_fold_logits
from finetune.tuning.suggest import suggest_recipe
from finetune.utils.errors import RecipeError

SIZE = 32


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """(folder, result, text) of two networks ranked on a table of two numbers, in groups and subgroups, and with a split."""
    folder, random = tmp_path_factory.mktemp("numbers"), np.random.RandomState(0)
    with open(folder / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label_Year", "label_size", "split", "subgroup", "group"])
        for i in range(70):
            level = random.uniform(30, 200)
            pixels = random.normal(level, 40, (SIZE, SIZE, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            row = [f"{i}.png", 2000 + level / 10 + random.normal(), 1e-6 * (level + random.normal(0, 40))]
            table.writerow([*row, "val" if i >= 50 else "train", "ab"[i % 2], i // 2])
    weights = []
    for number, name in enumerate(("test_resnet", "test_efficientnet")):
        torch.manual_seed(number)
        safetensors.torch.save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")
        weights.append(f"{name}={folder / name}.safetensors")
    wanted = Wanted("test_resnet", None, weights, SIZE)
    return folder, *rank.report(str(folder / "table.csv"), wanted, folder / "out", folder / "cache")


def ridge(features, labels, inside, outside):
    """What scikit-learn's RidgeCV, fitted to the standardised numbers of some images, says of others."""
    x, y = features[inside].double().numpy(), labels[inside]
    scale = np.sqrt(x.var(0).mean())
    folds = make_folds(torch.tensor(y), torch.arange(len(y))).numpy()
    cuts = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in range(NUM_FOLDS)]
    alphas = np.array(RIDGE_PENALTIES) * len(y)
    model = RidgeCV(alphas, cv=cuts, scoring="neg_mean_squared_error").fit((x - x.mean(0)) / scale, (y - y.mean(0)) / y.std(0))
    said = model.predict((features[outside].double().numpy() - x.mean(0)) / scale)
    return said * y.std(0) + y.mean(0)


def test_scores_are_scikit_learns(ranked):
    """R2 and Spearman's correlation are those of RidgeCV on the same features, of images out of its folds, groups whole."""
    folder, result, text = ranked
    source = str(folder / "table.csv")
    data = load_data(recipe_for(source))
    labels, groups = np.asarray(data.train.labels), data.train.groups
    folds = deal_folds(labels, groups).numpy()
    assert all(len({*folds[np.array(groups) == group]}) == 1 for group in groups)
    kept = {tensor.shape[1]: tensor for file in folder.glob("cache/*") if (tensor := recall(file)[0]).shape[0] == 50}
    for row in result["rows"]:
        features, said = kept[row["features"]], np.empty_like(labels)
        for fold in range(FOLDS):
            said[folds == fold] = ridge(features, labels, folds != fold, folds == fold)
        assert row["r2"] == pytest.approx(r2_score(labels, said), abs=1e-5)
        spearman = np.mean([spearmanr(*pair).statistic for pair in zip(labels.T, said.T, strict=True)])
        assert row["spearman"] == pytest.approx(spearman, abs=1e-3)
        assert row["interval"][0] < row["r2"] < row["interval"][1]
    order = [row["r2"] for row in result["rows"]]
    assert order == sorted(order, reverse=True) and result["validation"]["images"] == 20
    assert "R2" in text and "Spearman" in text and "50 training images of 2 numbers" in " ".join(text.split())
    assert "%," not in text.replace("95 %", "") and (folder / "out" / "rank.png").is_file()
    assert result["loss"] == "huber" and json.loads((folder / "out" / "rank.json").read_text())["metric"] == "r2"


def test_suggest_goes_on_with_the_first(ranked):
    """A recipe from rank.json is one of numbers; one that was made for other numbers of the same images is refused."""
    folder, result, _ = ranked
    source = str(folder / "table.csv")
    choice = rank.choose(folder / "out" / "rank.json", source)
    assert choice.backbone == result["rows"][0]["backbone"] and "R2 0." in choice.why
    (folder / "mine.py").write_text(suggest_recipe(compute_image_stats(source), target="mine.py", ranked=choice))
    recipe, _ = load_recipe(str(folder / "mine.py"))
    assert (recipe.loss, recipe.metric, recipe.data.image_size) == ("huber", "r2", SIZE)
    text = (folder / "table.csv").read_text()
    changed = folder / "changed.csv"
    changed.write_text(text.replace("label_size", "label_other"))
    with pytest.raises(RecipeError, match="is of other images"):
        rank.choose(folder / "out" / "rank.json", str(changed))


def test_numbers_have_digests_of_their_own():
    """Numbers that differ behind the point have other digests; those of classes are as they were."""
    assert digest_array([[0.25]]) != digest_array([[0.75]])
    assert digest_array([1.0, 2.0]) == digest_array([1, 2]) == digest_array(np.array([1, 2], np.int64))


def test_a_probe_of_numbers_is_asked_for_no_loss():
    """Out of their folds numbers of any unit are found where the features say them; the loss is not called."""
    random = np.random.RandomState(0)
    features = torch.tensor(random.normal(size=(60, 5)))
    targets = features[:, :2] * torch.tensor([1e6, 1e-6]) + torch.tensor([5e6, 0])
    folds = torch.arange(60) % FOLDS
    found = out_of_fold_logits(features.float(), targets, folds, 2, None, of_numbers=True)
    assert r2_score(targets, found) > 0.999
