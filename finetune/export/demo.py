"""A page to try a network on, by gradio: a folder that a Hugging Face Space takes as well."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.export.timm_folder import timm_files
from finetune.models.saved import find_model, load_model
from finetune.utils.errors import RecipeError
from finetune.utils.files import read_json

if TYPE_CHECKING:
    from tqdm.std import tqdm

APP = '''\
"""What is on a photograph: pip install -r requirements.txt && python app.py"""

import json
from pathlib import Path

import gradio
import timm
import torch
from PIL import ImageOps

FOLDER = Path(__file__).resolve().parent / "model"
config = json.loads((FOLDER / "config.json").read_text())
net = timm.create_model(f"local-dir:{{FOLDER}}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))


@torch.no_grad()
def predict(image):
    """{what} of a PIL image{returned}."""
    outputs = net(transform(ImageOps.exif_transpose(image).convert("RGB"))[None])[0]
    {result}


if __name__ == "__main__":
    answers = [{answers}]
    gradio.Interface(predict, gradio.Image(type="pil"), answers, title={name!r}, flagging_mode="never").launch()
'''
ONE = {  # label an image
    "what": "The probability of each class",
    "returned": "",
    "result": """\
probs = (outputs / config.get("temperature", 1.0)).FUNCTION
    return dict(zip(config["label_names"], probs.tolist()))""",
    "answers": "gradio.Label(num_top_classes=5)",
}
SEVERAL = {
    "what": "The probability of each class",
    "returned": ", and the classes above their thresholds",
    "result": """\
probs = (outputs / config.get("temperature", 1.0)).FUNCTION
    named, thresholds = dict(zip(config["label_names"], probs.tolist())), config.get("thresholds", [0.5] * len(probs))
    above = [name for (name, prob), least in zip(named.items(), thresholds) if prob > least]
    return named, ", ".join(above)""",
    "answers": 'gradio.Label(num_top_classes=5), gradio.Textbox(label="Predicted")',
}
NUMBERS = {
    "what": "The numbers",
    "returned": "",
    "result": 'return dict(zip(config["label_names"], outputs.tolist()))',
    "answers": 'gradio.JSON(label="predicted")',
}
REQUIREMENTS = "gradio>=5\ntimm>=1.0.26\ntorch>=2.6\n"  # timm's and torch's are those of this project
SPACE = """\
---
title: {name}
sdk: gradio
app_file: app.py
---
`pip install -r requirements.txt && python app.py`, or upload this folder as a Space. The network and its card are in `model/`.
"""


def demo_files(source: Path, bar: "tqdm[Any]") -> dict[str, bytes]:
    """app.py, what it needs, and the network as `timm_files` has it; timm and gradio are all that it takes."""
    files = {f"model/{name}": content for name, content in timm_files(source, bar).items()}
    run = find_model(source)[1]
    assert run is not None  # or there would be no files
    recipe, name = load_model(source).recipe, read_json(run / "result.json")["recipe"]
    if recipe.data.channels:
        raise RecipeError("--to gradio makes a page for photographs: this network takes arrays, data.channels")
    kind = NUMBERS if recipe.of_numbers else SEVERAL if recipe.loss == "multi_label" else ONE
    function = "softmax(0)" if recipe.loss == "cross_entropy" else "sigmoid()"
    app = APP.format(name=name, **{key: text.replace("FUNCTION", function) for key, text in kind.items()})
    return files | {
        "app.py": app.encode(),
        "requirements.txt": REQUIREMENTS.encode(),
        "README.md": SPACE.format(name=json.dumps(name)).encode(),
    }
