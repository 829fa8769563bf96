"""Runs' folders, as far as a page needs them, and what stands on a page."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from finetune.data.dataset import ImageList
from finetune.metrics.compute import compute_metrics
from finetune.recipe import Data
from finetune.recipe.serialize import to_dict
from helpers import small_recipe

HOSTILE = [
    "<script>document.title='hacked'</script>",
    "\"><img src=x onerror=document.title='hacked'>",
    "'&amp;</script><!--",
    "two\nlines",
    "🐦 猫",
    "שלום \u202e abc",
    "a\udce9\ud800",
    "{{ 7 * 7 }} $x",
]
VOID = {"meta", "img", "br", "input"}  # and what SVG closes itself


def write_finished_run(folder: Path, logits, labels, classes, changes=None, result=None) -> Path:
    """A finished run of these predictions; `changes` are of its recipe, `result` goes into result.json."""
    folder.mkdir(exist_ok=True)
    recipe = small_recipe(data=Data("photos", 24, 8), **(changes or {}))
    rows = [{"epoch": -1, "step": 0, "loss": 0.9, recipe.metric: 0.25, "val_images": len(labels)}]
    for epoch in range(4):
        for step in (2 * epoch, 2 * epoch + 1):
            lr = {"head": 1e-2 / (step + 1), "body": 1e-3 * epoch}
            rows.append({"step": step, "epoch": epoch, "loss": 1 / (step + 1), "grad_norm": 1.0 + step, "lr": lr})
        metrics = {"train_loss": 0.5, "loss": 0.6, recipe.metric: 0.3 + 0.1 * epoch, "val_images": len(labels)}
        rows.append({"epoch": epoch, "step": 2 * epoch + 2, **metrics})
    found = {"epochs": 4, "seconds": 61.0, "peak_memory_gib": 1.5, "seed": 3, "use": "model", "use_reason": "the last epoch"}
    found |= compute_metrics(recipe, logits, labels) | (result or {})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    (folder / "result.json").write_text(json.dumps(found))
    (folder / "run.json").write_text(
        json.dumps({"name": "mine", "classes": list(classes), "command": ["run.py", "--data", "a b"]})
    )
    safetensors.torch.save_file({"logits": logits, "labels": labels}, folder / "predictions.safetensors")
    return folder


def predictions_of(classes, number, seed=0):
    """Logits and labels of so many images, about half of them right."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % classes
    logits = torch.randn(number, classes, generator=random)
    logits[range(number), labels] += 1.5
    return logits, labels


def images_named(names, size=24):
    """Noise of as many images, which are called so."""
    pixels = np.random.RandomState(0).randint(0, 255, (size, size, 3)).astype(np.uint8)
    return ImageList(list(names), [0] * len(names), lambda item, **options: Image.fromarray(pixels))


class Page(HTMLParser):
    """A page as a browser reads it: its elements with their attributes and text, and whether all are closed in order."""

    def __init__(self, file: Path):
        super().__init__()
        self.text, self.elements, self.open = file.read_bytes().decode("utf-8"), [], []
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", "in": [one["tag"] for one in self.open], **dict(attributes)})
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", "in": [one["tag"] for one in self.open], **dict(attributes)})

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()["tag"] == tag, tag

    def handle_data(self, data):
        for one in self.open:
            one["text"] += data

    def all(self, tag, **attributes):
        """The elements of a tag with these attributes."""
        return [one for one in self.elements if one["tag"] == tag and attributes.items() <= one.items()]

    def table(self, **attributes):
        """The cells of a table's rows as text, its heading first."""
        (start,) = [i for i, one in enumerate(self.elements) if one["tag"] == "table" and attributes.items() <= one.items()]
        rows = []
        for one in self.elements[start + 1 :]:
            if "table" not in one["in"]:
                break
            if one["tag"] == "tr":
                rows.append([])
            elif one["tag"] in ("th", "td"):
                rows[-1].append(one["text"].strip())
        return rows

    @property
    def data(self):
        """What the script is given."""
        return json.loads(self.all("script", id="data")[0]["text"])
