"""Which of a run's two networks is used, on a real run whose fine-tuning did harm."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

import finetune
from finetune.__main__ import main
from helpers import on_folder, timm_alone


@pytest.fixture(scope="module")
def harmed(tmp_path_factory, image_folder):
    """A run whose linear probe was better than what became of it at a thousand times the learning rates."""
    run = tmp_path_factory.mktemp("harmed") / "run"
    small = ("backbone=test_resnet", "epochs=2", "lr_scale=1000")
    assert main(["train", *on_folder(image_folder, run, *small)[1:], "--processes", "1"]) == 0
    return run


def test_what_fine_tuning_spoilt_is_not_used(harmed, image_folder, tmp_path, capsys):
    """predict, evaluate, export and finetune.load take the linear probe's network, say so, and can be told otherwise."""
    result = json.loads((harmed / "result.json").read_text())
    assert result["top1"] < result["linear_probe_top1"] == result["best_top1"] and result["use"] == "model-best"
    file = str(image_folder / "val" / "red" / "0.png")
    said = f"using model-best: the linear probe had top-1 {100 * result['best_top1']:.2f} %, the last epoch "
    probs = {
        name: (timm_alone(harmed / name, [file]) / json.loads((harmed / name / "config.json").read_text())["temperature"])
        .softmax(1)
        .max()
        .item()
        for name in ("model", "model-best")
    }
    assert abs(probs["model"] - probs["model-best"]) > 0.01
    for asked, name, line in (
        ([], "model-best", said),
        (["--checkpoint", "last"], "model", "using model: as asked for"),
        (["--checkpoint", "best"], "model-best", "using model-best: as asked for"),
    ):
        assert main(["predict", str(harmed), file, "--json", *asked]) == 0
        out, err = capsys.readouterr()
        assert line in err and json.loads(out)[0]["probability"] == pytest.approx(probs[name], abs=5e-3)
        assert main(["evaluate", str(harmed), "--data", str(image_folder), *asked]) == 0
        out, err = capsys.readouterr()
        top1 = result["best_top1" if name == "model-best" else "top1"]
        assert line in err and f"top-1 {top1:.2%}" in out
        output = tmp_path / f"timm-{len(asked)}-{name}"
        assert main(["export", str(harmed), "--to", "timm", "--output", str(output), *asked]) == 0
        assert line in capsys.readouterr().err and same_weights(output, harmed / name)
        model = finetune.load(harmed, *asked[1:])
        assert model.evaluate(image_folder)["top1"] == top1
        assert same_weights(model.export("timm", tmp_path / f"api-{len(asked)}-{name}"), harmed / name)
    card = (tmp_path / "timm-0-model-best" / "README.md").read_text()
    assert "after the linear probe, the best of them, chosen on these very images" in card


def same_weights(one, other):
    a, b = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_an_older_run_is_judged_by_its_numbers(harmed, image_folder, tmp_path, capsys):
    """Without "use" in result.json, the metrics there decide, under their names of version 0.1, too."""
    run = shutil.copytree(harmed, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    del result["use"], result["use_reason"]
    for old in (result, {key.replace("linear_probe_", "head_"): value for key, value in result.items()}):
        (run / "result.json").write_text(json.dumps(old))
        assert main(["evaluate", str(run), "--data", str(image_folder)]) == 0
        assert "using model-best: the linear probe had" in capsys.readouterr().err


def test_an_evaluations_picture_is_drawn(harmed, image_folder, tmp_path):
    """evaluate --output draws the confusion matrix of the network that is used."""
    assert main(["evaluate", str(harmed), "--data", str(image_folder), "--output", str(tmp_path)]) == 0
    with Image.open(tmp_path / "confusion.png") as picture:
        assert np.asarray(picture).std() > 0
