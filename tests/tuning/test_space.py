"""The space of a search: what can be typed, and what of it a recipe takes."""

import math

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from finetune.__main__ import main
from finetune.recipe.load import load_recipe, override
from finetune.tuning.space import default_space, parse_space
from finetune.utils.errors import RecipeError
from helpers import RECIPES, small_recipe

TYPED = {
    "lr_scale=0.1..10:log": FloatDistribution(0.1, 10, log=True),
    "label_smoothing=0..0.2": FloatDistribution(0, 0.2),
    "epochs=3..30": IntDistribution(3, 30),
    "data.batch_size=4..64:log": IntDistribution(4, 64, log=True),
    "clip_norm=1..3": FloatDistribution(1, 3),
    "epochs=3|4|10": CategoricalDistribution(("3", "4", "10")),
    "optimizer.betas=(0.9,0.99)|(0.9, 0.999)": CategoricalDistribution(("(0.9,0.99)", "(0.9, 0.999)")),
    "augment.auto_augment=none|rand-m9": CategoricalDistribution(("none", "rand-m9")),
    "groups.body.lr=1e-4..1e-2:log": FloatDistribution(1e-4, 1e-2, log=True),
}


def test_what_is_typed_is_what_optuna_draws_from():
    """Ranges of floats and of whole numbers, with and without :log, and choices are optuna's own distributions."""
    for words, distribution in TYPED.items():
        (dimension,) = parse_space(words, small_recipe())
        trial = optuna.create_study().ask()
        override(small_recipe(), [dimension.assignment(dimension.suggest(trial))])
        assert trial.distributions == {dimension.path: distribution}, words


def test_several_are_divided_by_commas_and_have_the_recipes_own_values():
    """The recipe's own value is known where the range or the choices have it."""
    space = parse_space("lr_scale=0.1..10:log, epochs=3|4,label_smoothing=0.1..0.2,groups.head.lr=1e-3..0.1", small_recipe())
    assert {one.path: one.own for one in space} == {
        "lr_scale": 1.0, "epochs": "4", "label_smoothing": None, "groups.head.lr": 1e-2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "typed,fault",
    [
        ("lr_scal=0.1..1", "--space lr_scal=0.1..1: .*no 'lr_scal'. Did you mean lr_scale"),
        ("groups.heat.lr=0.1|1", "no 'heat'. Did you mean head"),
        ("epochs=0..5", "--space epochs=0..5: with --set epochs=0, .*epochs must be 1 or more, not 0"),
        ("label_smoothing=0..1", "label_smoothing must be at least 0 and below 1"),
        ("batch_norm=frozen|thawed", "batch_norm must be"),
        ("lr_scale=0..1:log", "one with :log starts above 0"),
        ("lr_scale=2..1", "rises from LOW to HIGH"),
        ("lr_scale=1..inf", "rises from LOW to HIGH"),
        ("lr_scale=1..two", "needs two numbers"),
        ("lr_scale=1", "for one value: --set lr_scale=VALUE"),
        ("lr_scale=1|1", "wanted is FIELD=LOW..HIGH"),
        ("lr_scale", "wanted is FIELD=LOW..HIGH"),
        ("", "wanted are different fields"),
        ("lr_scale=1..2,lr_scale=1|2", "wanted are different fields"),
        ("metric=top1|macro_f1", "decides how trials are scored"),
        ("data.holdout=0.1..0.2", "decides how trials are scored"),
    ],
)
def test_what_is_no_space_is_one_sentence(typed, fault):
    """A misspelt field, a value that the recipe refuses and another form are named before the first trial."""
    with pytest.raises(RecipeError, match=fault):
        parse_space(typed, small_recipe())


@pytest.mark.parametrize("name", RECIPES)
def test_the_default_space_is_around_the_recipe(name):
    """Of every recipe it has at most four fields, among them the learning rates, and the recipe's own values within."""
    recipe, _ = load_recipe(name)
    space = parse_space(default_space(recipe), recipe)
    assert "lr_scale" in {one.path for one in space} and len(space) <= 4
    assert all(one.own is not None for one in space)


def test_a_value_is_set_with_three_digits():
    """It is within half a per cent of what was drawn, and never outside of the range."""
    (dimension,) = parse_space("lr_scale=0.123456..9.87654:log", small_recipe())
    for value in (0.123456, 0.3141592, 1.0, 2.71828, 9.87654):
        text = dimension.assignment(value)
        said = override(small_recipe(), [text]).lr_scale
        assert math.isclose(said, value, rel_tol=5e-3) and 0.123456 <= said <= 9.87654
        assert len(text.removeprefix("lr_scale=").replace(".", "").lstrip("0")) <= 3 or value in (0.123456, 9.87654)


@pytest.mark.parametrize(
    "words,fault",
    [
        ([], "say --trials N, to search; or --folds K alone"),
        (["--trials", "0"], "--trials starts at 1, --folds at 2"),
        (["--folds", "1"], "--trials starts at 1, --folds at 2"),
        (["--folds", "5", "--space", "lr_scale=1..2"], "are of a search: add --trials N"),
        (["--trials", "2", "--folds", "5", "--holdout", "0.2"], "--folds and --holdout exclude each other"),
        (["--trials", "2", "--holdout", "1"], "--holdout is a share"),
        (["--trials", "2", "--minutes", "0"], "--minutes more than 0"),
        (["--trials", "2", "--set", "data.holdout=0.1"], "the recipe has data.holdout: leave it out"),
        (["--trials", "2", "--space", "optimizer.momentum=0.5..0.9"], "AdamW has no option 'momentum'"),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_trial(here, capsys, words, fault):
    """One sentence, exit code 2, and nothing is written."""
    assert main(["tune", "resnet18_cifar", *words]) == 2
    assert fault in capsys.readouterr().err and not list(here.iterdir())
