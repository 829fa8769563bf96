"""A recipe cut down to seconds, to see that it runs."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from finetune.models.backbone import meta_backbone
from finetune.recipe import Data, Group, LayerDecay, Recipe, Schedule
from finetune.utils.errors import RecipeError


def sizes_from(data: Data, smallest: int | None) -> dict[str, Any]:
    """The fields of sizes, of which those are small that a recipe has: the first, twice and three times the smallest."""
    fields = [name for name in ("start_size", "image_size", "test_size") if getattr(data, name) is not None]
    return {name: (i + 1) * smallest if smallest else getattr(data, name) for i, name in enumerate(fields)}


def smoke_recipe(recipe: Recipe, parts: int) -> Recipe:
    """The recipe cut down to seconds: a stage an epoch, a batch that divides by `parts`, small generated images."""
    rows = recipe.groups if isinstance(recipe.groups, tuple) else (recipe.groups,)
    stages = sorted({0} | {row.unfreeze_at for row in rows})

    def quick(schedule: Schedule) -> Schedule:
        return replace(schedule, warmup_epochs=min(0.5, schedule.warmup_epochs))

    def early(row: Group) -> Group:
        """The row with its stage's epoch, and no time to lose on warmup."""
        own = row.schedule and quick(row.schedule)
        return replace(row, unfreeze_at=stages.index(row.unfreeze_at), schedule=own, warmup_epochs=min(0.5, row.warmup_epochs))

    groups: tuple[Group, ...] | LayerDecay
    if isinstance(recipe.groups, LayerDecay):
        groups = replace(recipe.groups, unfreeze_at=stages.index(recipe.groups.unfreeze_at))
    else:
        groups = tuple(early(row) for row in recipe.groups)
    small = replace(
        recipe,
        weights="none",
        groups=groups,
        switch=recipe.switch and replace(recipe.switch, at=stages.index(recipe.switch.at)),
        schedule=quick(recipe.schedule),
        epochs=len(stages) + 1,
        class_weights=None if isinstance(recipe.class_weights, tuple) else recipe.class_weights,  # for other classes
        pos_weight=None if isinstance(recipe.pos_weight, tuple) else recipe.pos_weight,  # likewise
        early_stop=None,
        data=Data(
            "generated",
            32,
            parts * -(-8 // parts),
            recipe.data.crop_pct,
            recipe.data.sampling,
            resize=recipe.data.resize,
            channels=recipe.data.channels,
        ),  # fmt: skip
    )
    for size in (32, 28, None):  # 28: patches of 14 pixels; None: the recipe's own, of a network for one size only
        small = replace(small, data=replace(small.data, **sizes_from(recipe.data, size)))
        with suppress(RecipeError):
            meta_backbone(small)
            break
    return small
