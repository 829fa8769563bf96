"""What a study is asked to do: the fields of a recipe that it varies, each with a range or some values, and its plan."""

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.recipe import Recipe
from finetune.recipe.load import chosen_recipe, override
from finetune.recipe.serialize import diff, flatten, to_dict
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_folder

WANTED = "FIELD=LOW..HIGH, FIELD=LOW..HIGH:log or FIELD=A|B|C, divided by commas"
HOLDOUT = 0.2  # of the training images, where nothing else is asked for
FREE = ("lr_scale", "epochs", "label_smoothing", "optimizer.weight_decay", "linear_probe.l2")  # which no network refuses
# What decides how trials are scored.
SCORING = re.compile(r"metric$|seed$|data\.(source|holdout|holdout_fold|val_share|folds?|group_pattern)$")


@dataclass(frozen=True)
class Dimension:
    """A field of a recipe, by its path, that a trial chooses: of a range, or of some values as they are typed."""

    path: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False  # the field takes no fractions
    values: tuple[str, ...] = ()
    own: float | str | None = None  # what the recipe has, if it is among these

    def suggest(self, trial: Any) -> float | str:
        """A value for an optuna trial."""
        if self.values:
            return str(trial.suggest_categorical(self.path, self.values))
        if self.whole:
            return int(trial.suggest_int(self.path, int(self.low), int(self.high), log=self.log))
        return float(trial.suggest_float(self.path, self.low, self.high, log=self.log))

    @property
    def ends(self) -> tuple[str, ...]:
        """The values, or both ends of the range, as --set takes them."""
        return self.values or (typed(self.low, self.whole), typed(self.high, self.whole))

    def assignment(self, value: float | str) -> str:
        """What --set takes for a value; of a fraction three digits are enough, and are read."""
        if isinstance(value, float):
            value = f"{min(max(float(f'{value:.3g}'), self.low), self.high):g}"
        return f"{self.path}={value}"


@dataclass(frozen=True)
class Plan:
    """What a study does: trials of `recipe`, which lies in `folder`, in a `space`, each as many runs as there are `splits`.

    A split is what holds out the images that score a run, in the words of --set.
    """

    recipe: Recipe
    folder: Path
    space: tuple[Dimension, ...]
    splits: tuple[tuple[str, ...], ...]
    trials: int

    @property
    def file(self) -> Path:
        return self.folder / "recipe.py"


def parse_space(text: str, recipe: Recipe) -> tuple[Dimension, ...]:
    """The dimensions that a text names: "lr_scale=0.1..10:log, epochs=3|5".

    Raises:
        RecipeError: for another form, and where the recipe takes not both ends of a range, or not every value.
    """
    parts = [part.strip() for part in re.split(r",(?![^(\[]*[)\]])", text) if part.strip()]
    space = tuple(parse_dimension(part, recipe) for part in parts)
    paths = [dimension.path for dimension in space]
    if not paths or len({*paths}) < len(paths):
        raise RecipeError(f"--space '{text}': wanted are different fields, as {WANTED}")
    return space


def parse_dimension(part: str, recipe: Recipe) -> Dimension:
    """One of them."""
    path, _, said = (word.strip() for word in part.partition("="))
    numbers = re.fullmatch(r"(.+?)\.\.(.+?)(:log)?", said)
    values = tuple(value.strip() for value in said.split("|"))
    if SCORING.match(path):
        raise RecipeError(f"--space {part}: {path} decides how trials are scored, which is the same for all")
    if not path or not numbers and (len({*values}) < len(values) or len(values) < 2 or not all(values)):
        raise RecipeError(f"--space '{part}': wanted is {WANTED}; for one value: --set {path or 'FIELD'}=VALUE")
    if not numbers:
        same = [value for value in values if not diff(changed(recipe, path, value, part), recipe)]
        return Dimension(path, values=values, own=same[0] if same else None)
    try:
        low, high, log = float(numbers[1]), float(numbers[2]), bool(numbers[3])
    except ValueError:
        raise RecipeError(f"--space {part}: a range needs two numbers; wanted is {WANTED}") from None
    if not low < high < float("inf") or log and low <= 0:
        raise RecipeError(f"--space {part}: a range rises from LOW to HIGH, and one with :log starts above 0")
    whole = takes_no_fractions(recipe, path, low, high)
    dimension = Dimension(path, low, high, log, whole)
    for end in dimension.ends:
        changed(recipe, path, end, part)
    own = {name.replace(".options.", "."): value for name, value in flatten(to_dict(recipe)).items()}.get(path)
    inside = isinstance(own, int | float) and low <= own <= high
    return replace(dimension, own=own if inside else None)


def typed(number: float, whole: bool) -> str:
    return str(int(number)) if whole else f"{number:g}"


def takes_no_fractions(recipe: Recipe, path: str, low: float, high: float) -> bool:
    """Whether a field takes both whole ends of a range, but nothing between two whole numbers, such as epochs."""
    if not low.is_integer() or not high.is_integer():
        return False
    try:
        override(recipe, [f"{path}={low + 0.5}"])
    except RecipeError:
        return True
    return False


def changed(recipe: Recipe, path: str, value: str, part: str) -> Recipe:
    """The recipe with one field changed; RecipeError, which names the `part` of the space, if it takes no such value."""
    try:
        return override(recipe, [f"{path}={value}"])
    except RecipeError as error:
        raise RecipeError(f"--space {part}: {' '.join(str(error).split())}") from None


def default_space(recipe: Recipe) -> str:
    """The space where none is given: at most four fields, of which the learning rates matter most.

    With few trials each further dimension costs more than it finds; epochs cost time, so they are varied only if asked for.
    """
    decay = recipe.optimizer.weight_decay
    parts = [f"lr_scale={recipe.lr_scale / 10:g}..{recipe.lr_scale * 10:g}:log"]
    if decay > 0:
        parts.append(f"optimizer.weight_decay={decay / 10:g}..{decay * 10:g}:log")
    if recipe.loss == "cross_entropy":
        parts.append(f"label_smoothing=0..{max(0.2, min(0.9, 2 * recipe.label_smoothing)):g}")
    if recipe.linear_probe and recipe.linear_probe.l2:
        parts.append(f"linear_probe.l2={recipe.linear_probe.l2 / 10:g}..{recipe.linear_probe.l2 * 10:g}:log")
    return ",".join(parts)


def make_plan(args: argparse.Namespace) -> Plan:
    """What the arguments ask for.

    Raises:
        RecipeError: for numbers, a folder, a recipe or a space that are not in order; for what can be found without torch.
    """
    if args.trials is None and args.folds is None:
        raise RecipeError("say --trials N, to search; or --folds K alone, for the recipe's cross-validated score")
    if args.trials is None and (args.space or args.minutes):
        raise RecipeError("--space and --minutes are of a search: add --trials N")
    if args.trials is not None and args.trials < 1 or args.folds is not None and args.folds < 2:
        raise RecipeError("--trials starts at 1, --folds at 2")
    if args.folds and args.holdout:
        raise RecipeError("--folds and --holdout exclude each other: of 5 folds each is held out once, a fifth")
    if args.holdout is not None and not 0 < args.holdout < 1 or args.minutes is not None and not args.minutes > 0:
        raise RecipeError("--holdout is a share of the training images between 0 and 1, --minutes more than 0")
    recipe, _, name = chosen_recipe(args)
    if recipe.data.holdout:
        raise RecipeError("the recipe has data.holdout: leave it out, --holdout X holds out images of each trial")
    folder = args.output or Path("runs") / f"{name}-{'tune' if args.trials else 'folds'}"
    check_folder(folder)
    splits: list[tuple[str, ...]] = [(f"data.holdout={args.holdout or HOLDOUT}",)]
    if args.folds:
        splits = [(f"data.holdout={1 / args.folds}", f"data.holdout_fold={fold}") for fold in range(args.folds)]
    space = parse_space(args.space or default_space(recipe), recipe) if args.trials else ()
    return Plan(recipe, folder, space, tuple(splits), args.trials or 1)


def check_plan(plan: Plan) -> None:
    """Raise RecipeError where a network takes not both ends of each range, or not every value: it needs torch, and seconds."""
    from finetune.models.backbone import meta_backbone
    from finetune.recipe.load import override
    from finetune.training.setup import check_recipe

    check_recipe(plan.recipe, meta_backbone(plan.recipe))
    for dimension in plan.space:
        for value in () if dimension.path in FREE else dimension.ends:
            changed = override(plan.recipe, [f"{dimension.path}={value}"])
            try:
                check_recipe(changed, meta_backbone(changed))
            except RecipeError as error:
                raise RecipeError(f"--space {dimension.path}={value}: {error}") from None
