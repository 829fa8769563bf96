"""finetune.train and finetune.load: in a program, a thread and a notebook, with nothing global left behind."""

import functools
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import finetune
from finetune import AdamW, Cosine, Data, LayerDecay, Recipe, RecipeError
from helpers import ROOT, Coloured, timm_alone


def small(images, **changes) -> Recipe:
    fields = {
        "backbone": "test_resnet",
        "weights": "none",
        "data": Data(str(images), image_size=32, batch_size=8),
        "groups": LayerDecay(head_lr=1e-2, stem_ratio=0.1),
        "optimizer": AdamW(),
        "schedule": Cosine(),
        "batch_norm": "frozen",
        "epochs": 2,
    }
    return Recipe(**fields | changes)


@pytest.fixture
def run(here, image_folder):
    """A finished run of a recipe made here."""
    return finetune.train(small(image_folder), output="out", quiet=True)


def test_a_recipe_made_here_is_trained_and_read_back(run):
    """The run's metrics and history are its files', and its recipe is the one that was given."""
    assert run.finished and run.folder == Path("out") and run.recipe.epochs == 2
    assert [row["epoch"] for row in run.history] == [0, 1]
    assert run.metrics["top1"] == run.history[-1]["top1"] and not (run.folder / "recipe.py").exists()
    assert len(run.plot().axes) == 4


def test_two_runs_in_one_program_may_differ_in_precision(here, image_folder):
    """The second run has its own precision: nothing of the first one's accelerator is left."""
    for precision in ("no", "bf16"):
        run = finetune.train(small(image_folder, mixed_precision=precision, epochs=1), output=precision, quiet=True)
        assert run.finished and run.recipe.mixed_precision == precision


def test_a_run_leaves_no_global_state_behind(here, image_folder):
    """Random generators, signal handlers and matplotlib's backend are as they were."""
    import matplotlib

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            handlers,
            matplotlib.get_backend(),
        )

    before = state()
    finetune.train(small(image_folder, epochs=1), output="out", quiet=True)
    assert state() == before


def test_a_programs_own_accelerator_goes_on(here, image_folder):
    """An Accelerator from before a run, of another precision, still has its state and computes."""
    own, weight = Accelerator(cpu=True, mixed_precision="bf16"), torch.nn.Parameter(torch.ones(2))
    finetune.train(small(image_folder, epochs=1), output="out", quiet=True)
    own.backward((2 * weight).sum())
    assert own.mixed_precision == "bf16" and own.num_processes == 1 and weight.grad.tolist() == [2.0, 2.0]


def test_a_run_in_a_thread(here, image_folder):
    """Outside the main thread, where Python allows no signal handlers, a run trains all the same."""
    done = []
    thread = threading.Thread(
        target=lambda: done.append(finetune.train(small(image_folder, epochs=1), output="out", quiet=True))
    )
    thread.start()
    thread.join()
    assert done[0].finished


def test_names_options_and_own_images(here, image_folder):
    """A recipe's name with the command line's options; without a recipe, one is suggested for the images."""
    options = {"backbone": "test_resnet", "weights": "none", "image_size": 32, "batch_size": 8, "epochs": 1, "quiet": True}
    run = finetune.train("resnet18_cifar", data=image_folder, set=["mixed_precision=no"], output="a", **options)
    assert (run.recipe.epochs, run.recipe.data.batch_size, run.recipe.data.source) == (1, 8, str(image_folder))
    run = finetune.train(data=image_folder, output="b", **options)
    assert run.finished and "finetune suggest" in (run.folder / "recipe.py").read_text()


@pytest.mark.parametrize("classes", [range(2), np.arange(2)])
def test_classes_may_be_numbers(here, classes):
    """Those of a function's data set, python's or numpy's: the run, its files and what is loaded name them as text."""
    labels = [i % 2 for i in range(16)]
    recipe = small(here, epochs=1, data=Data(lambda: (Coloured(labels, classes), Coloured(labels[:6], classes)), 32, 8))
    run = finetune.train(recipe, output="out", quiet=True)
    assert run.finished and list(finetune.load("out").classes) == ["0", "1"]


@pytest.mark.parametrize(
    "arguments,options,fault",
    [
        (("resnet18_cifar",), {"epoch": 3}, "train takes no 'epoch'. Did you mean epochs?"),
        (("resnet18_cifar",), {"mixup": 0.2}, r"train takes no 'mixup'. Here: set=\['augment.mixup=0.2'\]"),
        (("resnet81_cifar",), {}, "Did you mean resnet18_cifar?"),
        ((), {}, "name a recipe"),
        (("resnet18_cifar",), {"epochs": 0}, "epochs must be 1 or more, not 0"),
    ],
)
def test_what_is_wrong_is_a_recipe_error(here, arguments, options, fault):
    """As on the command line, and nothing is written."""
    with pytest.raises(RecipeError, match=fault):
        finetune.train(*arguments, **options)
    assert not list(here.iterdir())


def test_a_loaded_model_predicts_any_kind_of_image(run, image_folder):
    """Paths, PIL images, arrays and tensors give the same probabilities, those of timm alone with the run's model."""
    model, path = finetune.load("out"), next((image_folder / "val").rglob("*.png"))
    image = Image.open(path).convert("RGB")
    rows = model.predict([path, image, np.asarray(image), torch.from_numpy(np.array(image))])
    assert [row["file"] for row in rows] == [str(path), "", "", ""] and len({row["probability"] for row in rows}) == 1
    probs = (timm_alone(run.folder / "model", [path]) / finetune.load(run.folder).saved.temperature).softmax(1)[0]
    assert rows[0]["predicted"] == model.classes[int(probs.argmax())]
    assert rows[0]["probability"] == pytest.approx(probs.max().item(), abs=5e-3)
    assert model.evaluate(image_folder)["top1"] == run.metrics["top1"]


def test_importing_finetune_is_light_and_recipes_are_modules(tmp_path):
    """`import finetune` imports no torch, and recipes import by name from a clone as from the installed package."""
    code = "import sys; from finetune.recipes.resnet18_cifar import recipe; print(recipe.epochs, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "3 False\n", done.stderr


def test_the_readmes_program_runs(here, image_folder, monkeypatch, capsys):
    """The first program of the README, word for word, with a small network in place of the suggested one."""
    (block,) = [
        block for block in re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.S) if "train(" in block
    ]
    shutil.copytree(image_folder / "train", "photos")
    shutil.copy(next(image_folder.rglob("*.png")), "photo.jpg")
    train = functools.partial(finetune.train, backbone="test_resnet", weights="none", image_size=32, quiet=True)
    monkeypatch.setattr(finetune, "train", train, raising=False)
    exec(block, {})
    assert "'file': 'photo.jpg'" in capsys.readouterr().out


def test_the_notebook_runs(here, image_folder):
    """docs/quickstart.ipynb goes from photographs to predictions in a real kernel, without a warning, and shows a picture."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    shutil.copytree(image_folder / "train", "photos")
    shutil.copy(next(image_folder.rglob("*.png")), "photo.jpg")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(here)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if "data" in output]
    said = "".join(output.get("text", "") for output in outputs)
    assert "Warning" not in said, said  # such as tqdm's where ipywidgets is not installed
    assert any("image/png" in data for data in shown) and any("photo.jpg" in data.get("text/plain", "") for data in shown)
