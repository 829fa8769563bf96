"""What speaks for a predicted class: in Python, and as pictures of finetune predict."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

import finetune
from figures import figure_of
from finetune.__main__ import main
from finetune.inference import explain, predictions
from finetune.inference.explain import explain_images
from finetune.inference.inputs import find_inputs, name_pictures
from finetune.inference.predict import predict_images
from finetune.models.saved import load_model
from finetune.report.heat_maps import heat_maps
from finetune.utils.errors import RecipeError
from helpers import PIXEL_ROUNDING, cut_at


@pytest.fixture
def photos(image_folder, tmp_path):
    """Photographs of two folders with the same names, and a file that is none."""
    for folder in ("blue", "red"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for i in range(2):
            shutil.copy(image_folder / "val" / folder / f"{i}.png", tmp_path / "photos" / folder)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_an_explanation_is_of_the_image_as_timm_prepares_it(run_folder, photos):
    """Heat and probability are those of the likeliest class by timm's preprocessing; an unreadable image has none."""
    model, files = load_model(run_folder), find_inputs([photos])
    found = finetune.load(run_folder).explain(files)
    assert [one is None for one in found] == [file.name == "broken.png" for file in files]
    transform = create_transform(**model.preprocessing)
    for file, one in zip(files, found, strict=True):
        if one is None:
            continue
        pixels = transform(Image.open(file).convert("RGB"))[None]
        with torch.no_grad():
            probs = (model.net(pixels) / model.temperature).softmax(1)[0]
        assert one.predicted == model.classes[probs.argmax()]
        assert one.probability == pytest.approx(probs.max().item(), abs=PIXEL_ROUNDING)
        torch.testing.assert_close(one.heat, heat_maps(model.net, pixels, probs.argmax()[None])[0], rtol=0, atol=0.1)
        mean, std = (torch.tensor(model.preprocessing[name])[:, None, None] for name in ("mean", "std"))
        wanted = (255 * (pixels[0] * std + mean)).permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(one.image) - wanted).max() < 2 and one.picture.size == one.image.size


def test_predict_draws_a_picture_of_each_image_that_can_be_read(run_folder, photos, here, capsys):
    """Beside the same rows as without, a file for each image, apart where names are the same; nothing is overwritten."""
    assert main(["predict", str(run_folder), str(photos), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main(["predict", str(run_folder), str(photos), "--json", "--explain", "why"]) == 0
    assert json.loads(capsys.readouterr().out) == plain
    assert sorted(file.name for file in Path("why").iterdir()) == ["blue-0.png", "blue-1.png", "red-0.png", "red-1.png"]
    before = {file: file.read_bytes() for file in Path("why").iterdir()}
    assert main(["predict", str(run_folder), str(photos), "--explain", "why"]) == 2
    assert "why has 4 of these pictures already, such as blue-0.png: name another folder" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in Path("why").iterdir()} == before


def test_a_table_that_was_cut_off_goes_on_with_its_pictures(run_folder, photos, here, monkeypatch):
    """Cut off after two rows and begun again, the file and the pictures are those of a call that was not."""
    files = find_inputs([photos])
    words = ["predict", str(run_folder), str(photos)]
    assert main([*words, "--output", "whole.jsonl", "--explain", "whole"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(predictions, "write_line", cut_at(predictions.write_line, 3))
        with pytest.raises(Exception, match="^$"):
            main([*words, "--output", "cut.jsonl", "--explain", "cut"])
    assert main([*words, "--output", "cut.jsonl", "--explain", "cut"]) == 0
    assert Path("cut.jsonl").read_text() == Path("whole.jsonl").read_text() and len(files) == 5
    assert {file.name for file in Path("cut").iterdir()} == {file.name for file in Path("whole").iterdir()}


def test_a_network_without_places_is_refused_before_the_work(run_folder, photos, here):
    """One message; no image is read, and no folder made."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    model = load_model(run_folder)._replace(net=flat)
    with pytest.raises(RecipeError, match="no heat maps can be made of resnet18.*: no tensor in it has places of the image"):
        explain_images(model, [photos / "not there.png"])
    assert len(predict_images(model, [photos / "red" / "0.png"])) == 1


def test_pictures_have_names_of_their_own(tmp_path):
    """Images that share a name, also but for case, are told apart by their folders, then by numbers; long names are cut."""
    files = [
        Path(name) for name in ("a/1.jpg", "b/1.jpg", "c/b/1.png", "a/1.png", "b-1.jpg", "Dog.jpg", "x/dog.png", "猫" * 80)
    ]
    names = [file.name for file in name_pictures(files, tmp_path / "new")]
    assert names[:5] == ["a-1.png", "b-1.png", "b-1-2.png", "a-1-2.png", "b-1-3.png"] and "x-dog.png" in names
    assert len({name.casefold() for name in names}) == len(files)
    for name in names:
        (tmp_path / f".{name}.tmp").touch()  # as it is written aside
    (tmp_path / "1.png").touch()
    with pytest.raises(RecipeError, match="1 of these pictures already"):
        name_pictures([Path("1.jpg"), Path("2.jpg")], tmp_path)
    assert name_pictures([Path("1.jpg")], tmp_path, going_on=True) == [tmp_path / "1.png"]


def test_a_picture_can_be_read(monkeypatch):
    """Names of 80 characters and of other scripts stand below the images, within the picture."""
    image = Image.new("RGB", (64, 64))
    for name in ("a_class_of_many_words_" * 4, "猫" * 80):
        one = explain.Explanation(name, 0.987, torch.zeros(2, 2), image, image)
        file = Path(f"{name}.jpg")
        figure = figure_of(monkeypatch, explain, lambda one=one, file=file: explain.draw(one, file, Path("out.png")))
        figure.draw_without_rendering()
        box = figure._supxlabel.get_window_extent()
        assert figure.bbox.fully_containsx(box.x0) and figure.bbox.fully_containsx(box.x1) and box.y0 > 0
        assert "(99 %)" in figure._supxlabel.get_text() and figure._supxlabel.get_fontsize() >= 7
