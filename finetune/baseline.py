"""What a recipe promises: the run record beside it, and whether it is about this very recipe."""

import json
from pathlib import Path


def promise(recipe_file: Path, resolved: dict) -> str:
    """One sentence: the number measured with this recipe, its spread and its runs, or that there is none.

    A record lies in baselines/NAME.json beside the recipe. Its number is about the recipe as recorded, so any changed
    field, but for the seed, makes it none of ours.
    """
    file = recipe_file.parent / "baselines" / f"{recipe_file.stem}.json"
    if not file.is_file():
        return "nothing: not measured"
    record = json.loads(file.read_text())
    changed = [key for key in resolved if key != "seed" and resolved[key] != record["recipe"].get(key)]
    if changed:
        return f"nothing: {', '.join(changed)} changed since its number was measured"
    return f"top-1 {summary(record)}"


def summary(record: dict) -> str:
    """'98.9 % (98.6 to 99.2, 3 seeds)'."""
    scores = [100 * run["top1"] for run in record["runs"]]
    mean = sum(scores) / len(scores)
    return (f"{mean:.1f} % ({min(scores):.1f} to {max(scores):.1f}, {len(scores)} seeds)" if len(scores) > 1
            else f"{mean:.1f} % (1 seed)")
