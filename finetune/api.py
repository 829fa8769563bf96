"""finetune.train: what the command line does, as a function."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.parser import recipe_fields
from finetune.recipe import Recipe
from finetune.run import arguments, run, suggested_recipe
from finetune.utils.errors import RecipeError
from finetune.utils.text import lasting_output, nearest

if TYPE_CHECKING:
    from finetune.results.runs import Run


def train(recipe: str | Path | Recipe | None = None, *, resume: str | Path | None = None, **options: Any) -> "Run":
    """finetune.train: run a recipe in this process, or go on with a run; returns the run, finished or stopped by Ctrl-C.

    `recipe` is a name, a file, or a Recipe made here; without one, a recipe is suggested for `data`. `options` are those of
    the command line, with _ for -: data, epochs, batch_size, image_size, lr_scale, backbone, weights, seed;
    set=["groups.head.lr=5e-3", ...]; output, workers, cache, accumulate, checkpoint_every, track, smoke, quiet. Random
    generators are left as they were.

    Raises:
        RecipeError: for whatever the command line would refuse.
    """
    args = arguments(["--resume", str(resume)] if resume else ["--recipe", "given"])
    args.recipe, args.assignments = None if resume else recipe, options.pop("set", [])
    for name, value in options.items():
        if name not in vars(args) or name in ("recipe", "resume", "dry_run", "json"):
            path = recipe_fields().get(name.replace("_", "-"))
            hint = f" Here: set=['{path}={value}']." if path else nearest(name, vars(args))
            raise RecipeError(f"train takes no '{name}'.{hint}")
        setattr(args, name, Path(value) if value is not None and name in ("output", "cache") else value)
    if args.recipe is None and args.data is None and not resume:
        raise RecipeError("name a recipe, finetune.train('NAME'), your images, finetune.train(data=...), or train(resume=...)")

    from finetune.results.runs import Run
    from finetune.utils.seed import keep_random_state

    with lasting_output(), keep_random_state(), suggested_recipe(args):
        run(args)
    return Run(args.folder)
