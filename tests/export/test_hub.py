"""Another hub by the variable HF_ENDPOINT, in a process of its own: models there and back, and images of a data set."""

import io
import os
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
from packaging.version import Version
from PIL import Image

from helpers import ROOT
from hub_server import TOKEN, Repository, serving

pytestmark = pytest.mark.skipif(Version(huggingface_hub.__version__) < Version("1"), reason="needs huggingface_hub 1")

MODELS = """
import sys
from finetune.__main__ import main
run, photo = sys.argv[1:]
assert main(["push", run, "me/flowers"]) == 0
assert main(["predict", "hf-hub:me/flowers", photo]) == 0
"""
IMAGES = """
import time
from finetune.data.sources import load_data
from finetune.recipe.recipe import minimal_recipe
from finetune.utils.errors import RecipeError
time.sleep = lambda seconds: None  # between the client's tries
for name in ("me/photos", "me/cut", "me/none", "me/closed"):
    try:
        data = load_data(minimal_recipe("resnet18", f"hf/{name}", 32))
        print(len(data.train), len(data.val), data.classes, [data.val[i][0].getpixel((0, 0))[0] for i in range(len(data.val))])
    except RecipeError as error:
        print(error)
"""


def noisy_images(side):
    """Two classes of a split for training and one for tests, two images of each: by file name."""
    files = {}
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)
        noise[0, 0] = 10 * i
        Image.fromarray(noise).save(file := io.BytesIO(), "PNG")
        files[f"{('train', 'test')[i // 4]}/{('cat', 'dog')[i // 2 % 2]}/{i}.png"] = file.getvalue()
    return files


def in_process(code, hub, home, *arguments):
    """What a program prints for which this hub is the hub."""
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | own
    line = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_is_pushed_to_another_hub_and_used_from_there(run_folder, image_folder, tmp_path):
    """By HF_ENDPOINT alone; the address in the last line is that hub's."""
    photo = next((image_folder / "val").rglob("*.png"))
    with serving() as hub:
        out = in_process(MODELS, hub, tmp_path, run_folder, photo)
        assert f"{hub.address}/me/flowers" in out and str(photo) in out
        assert "model.safetensors" in hub.repositories["me/flowers"].branches["main"]


def test_images_of_the_hub_are_whole_or_refused(tmp_path):
    """By the package datasets, which does not go on with a download that was cut: that is one message, as is a closed door."""
    pytest.importorskip("datasets")
    with serving() as hub:
        for name, side in (("photos", 20), ("cut", 60)):
            hub.repositories[f"datasets/me/{name}"] = Repository(False, {"main": noisy_images(side)})
        hub.answers["/datasets/me/closed"] = hub.answers["/api/datasets/me/closed"] = (401, {"X-Error-Code": "RepoNotFound"})
        hub.cut = 8000
        whole, *faults = in_process(IMAGES, hub, tmp_path).replace("\n  a config", "  a config").splitlines()
    assert whole == "4 4 ('cat', 'dog') [40, 50, 60, 70]"
    for name, why, fault in zip(("cut", "none", "closed"), ("received 8000 bytes", "doesn't exist", ""), faults, strict=True):
        assert (
            fault.startswith(f"can't load hf/me/{name}: ")
            and why in fault
            and "  a configuration: hf/OWNER/NAME:CONFIG" in fault
        )
