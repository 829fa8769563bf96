"""What a recipe promises: the record of the runs behind its number, and whether it is about this very recipe."""

import argparse
import json
import sys
from pathlib import Path

from finetune.recipe import SCORES, Recipe, RecipeError
from finetune.recipe_file import RECIPES
from finetune.run_folder import changes


def promise(recipe_file: Path, recipe: Recipe) -> str:
    """The number measured with this recipe, its spread and its runs, in one sentence, or that there is none.

    A record lies in baselines/NAME.json beside the recipe; a recipe that was copied elsewhere has that of its original. It is
    about the recipe as recorded: any changed field, but for the seed, makes its number no promise.
    """
    def changed(record: dict) -> list[str]:
        return [change.partition(":")[0] for change in changes(record["recipe"] | {"seed": recipe.seed}, recipe)]

    file = recipe_file.parent / "baselines" / f"{recipe_file.stem}.json"
    records = [json.loads(path.read_text()) for path in ([file] if file.is_file() else
                                                         sorted((RECIPES / "baselines").glob("*.json")))]
    for record in records:
        if not changed(record):
            return f"{SCORES[recipe.score]} {summary(record)}"
    if file.is_file():
        return f"nothing: {', '.join(changed(records[0]))} differs from what was measured"
    return "nothing: not measured"


def summary(record: dict) -> str:
    """A record's number, like '98.9 % (98.6 to 99.2, 3 seeds)'."""
    score = record["recipe"].get("score", "top1")
    scores = [100 * run[score] for run in record["runs"]]
    spread = f"{min(scores):.1f} to {max(scores):.1f}, {len(scores)} seeds" if len(scores) > 1 else "1 seed"
    return f"{sum(scores) / len(scores):.1f} % ({spread})"


def record_runs(folders: list[Path]) -> dict:
    """The record of finished runs of one recipe that differ in their seeds alone.

    Raises:
        RecipeError: if they differ in more, repeat a seed, or are not finished.
    """
    missing = [folder for folder in folders if not (folder / "result.json").is_file()]
    if missing:
        raise RecipeError(f"no finished run in {missing[0]}")
    recipes = [json.loads((folder / "recipe.json").read_text()) for folder in folders]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    seeds = [recipe.pop("seed") for recipe in recipes]
    if any(recipe != recipes[0] for recipe in recipes) or len(set(seeds)) < len(seeds):
        raise RecipeError("the runs must be of one recipe with a seed each")
    if any(result.get("smoke") for result in results):
        raise RecipeError("a smoke run is no result")
    keys = ("seed", *SCORES, "loss", *(f"best_{score}" for score in SCORES), "seconds", "images_per_second", "peak_memory_gib")
    return {"recipe": recipes[0], "runs": [{key: result[key] for key in keys if key in result} for result in results],
            "versions": results[0]["versions"], "hardware": results[0]["hardware"]}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.baseline", description="Write the record behind a recipe's number from its finished runs.",
        epilog="example: python -m finetune.baseline recipes/baselines/resnet18_cifar.json runs/resnet18_cifar-*")
    parser.add_argument("record", type=Path, help="the file to write")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    args = parser.parse_args()
    try:
        record = record_runs(args.runs)
    except RecipeError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(summary(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
