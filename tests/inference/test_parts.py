"""Predictions by several processes, each with its part of the images."""

import json
import shutil

import pytest

from finetune.__main__ import main
from finetune.inference.inputs import find_inputs
from finetune.inference.parts import Asked, divide, new_lines
from finetune.inference.predictions import write_predictions
from finetune.utils.errors import RecipeError
from finetune.utils.files import file_digest


@pytest.fixture
def images(image_folder, tmp_path):
    """Nine photographs, and a file that is none, the third."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, path in enumerate(sorted((image_folder / "val").rglob("*.png"))[:9]):
        shutil.copy(path, folder / f"{i}.png")
    (folder / "2 broken.png").write_bytes(b"no image")
    return folder


@pytest.mark.launches
def test_two_processes_write_what_one_does(run_folder, images, tmp_path, capfd):
    """The same rows in the same order, with pictures; what one of them had written when it was killed is not done again."""
    files, command = find_inputs([images]), ["predict", str(run_folder), str(images), "--output"]
    assert main([*command, str(tmp_path / "1.jsonl")]) == 0
    wanted = read_rows(tmp_path / "1.jsonl")
    begun = {"weights": file_digest(run_folder / "model" / "model.safetensors"), "top": 5}
    marked = wanted[0] | {"probability": 0.125}  # what was there is taken as it is
    there = "".join(json.dumps(row) + "\n" for row in (begun, marked, wanted[1]))
    (tmp_path / "2.jsonl.1-of-2.part").write_text(there + '{"torn')
    pictures = tmp_path / "pictures"
    assert main([*command, str(tmp_path / "2.jsonl"), "--processes", "2", "--explain", str(pictures)]) == 0
    assert "going on after 2 of 5 images" in capfd.readouterr().err
    rows = read_rows(tmp_path / "2.jsonl")
    assert [row["file"] for row in rows] == [str(file) for file in files] and "error" in rows[2]
    assert rows[:2] == [marked, wanted[1]]
    for row, other in zip(rows[3:], wanted[3:], strict=True):
        assert row["predicted"] == other["predicted"] and row["probability"] == pytest.approx(other["probability"], abs=1e-5)
    assert len(list(pictures.iterdir())) == 7  # of the nine that can be read, the first two were done
    assert not list(tmp_path.glob("*.part"))


def read_rows(file):
    return [json.loads(row) for row in file.read_text().splitlines()]


@pytest.mark.launches
def test_what_a_process_fails_of_is_one_message(run_folder, images, tmp_path, capsys):
    """A network that can't be loaded, in a process of its own, ends like one in this; there is no file."""
    broken = shutil.copytree(run_folder / "model", tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"temperature": -1}))
    assert main(["predict", str(broken), str(images), "--output", str(tmp_path / "said.csv"), "--processes", "2"]) == 2
    err = capsys.readouterr().err
    assert "temperature must be a number above 0, not -1" in err and "Traceback" not in err
    assert not (tmp_path / "said.csv").exists()


@pytest.mark.parametrize("images, processes", [(10, 3), (2, 5), (1, 1), (7, 7)])
def test_parts_are_all_images_once(tmp_path, images, processes):
    """In their order, nearly as many each, none empty."""
    files, pictures = ([tmp_path / f"{kind}{i}" for i in range(images)] for kind in ("image", "picture"))
    parts = divide(tmp_path / "said.csv", files, pictures, Asked(processes=processes))
    assert [file for part in parts for file in part.files] == files
    assert [file for part in parts for file in part.pictures] == pictures
    sizes = [len(part.files) for part in parts]
    assert len(parts) == min(images, processes) and max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert len({part.path for part in parts}) == len(parts)


def test_another_number_of_processes_is_refused(run_folder, images, tmp_path, capsys):
    """What they had done would be left behind; no process, and --processes without a file, are none of these."""
    part = tmp_path / "said.csv.1-of-3.part"
    part.write_text("")
    with pytest.raises(RecipeError, match="1-of-3.part was begun with another --processes: name that, or delete it"):
        write_predictions(run_folder, find_inputs([images]), tmp_path / "said.csv", Asked(processes=2))
    with pytest.raises(RecipeError, match="--processes starts at 1, not 0"):
        write_predictions(run_folder, find_inputs([images]), tmp_path / "other.csv", Asked(processes=0))
    assert main(["predict", str(run_folder), str(images), "--processes", "2"]) == 2
    assert "--processes is for --output" in capsys.readouterr().err


def test_lines_are_counted_once(tmp_path):
    """Those of a file that grows, a line that is not finished when it is."""
    file, places = tmp_path / "part", {tmp_path / "part": 0}
    assert new_lines(file, places) == 0
    for text, count in (("a\nb", 1), ("c\nd\n", 2), ("", 0)):
        with open(file, "a") as lines:
            lines.write(text)
        assert new_lines(file, places) == count
