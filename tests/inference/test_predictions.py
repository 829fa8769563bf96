"""Predictions in a file, and the lists of images that a command may name."""

import csv
import io
import json
import shutil

import pytest

from finetune.__main__ import main
from finetune.inference import parts, predictions
from finetune.inference.inputs import find_inputs
from finetune.inference.parts import Asked
from finetune.inference.predict import predict_images
from finetune.inference.predictions import write_predictions
from finetune.models.saved import load_model
from finetune.utils.errors import RecipeError
from helpers import predict


@pytest.fixture
def images(image_folder, tmp_path):
    """Ten photographs, and a file that is none, the third."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, path in enumerate(sorted((image_folder / "val").rglob("*.png"))[:10]):
        shutil.copy(path, folder / f"{i}.png")
    (folder / "2 broken.png").write_bytes(b"no image")
    return folder


def read_back(file):
    """(file, predicted, [class, probability, class, probability], error) of each row, by csv, json or pandas' own reader."""
    if file.suffix == ".jsonl":
        rows = map(json.loads, file.read_text().splitlines())
        return [
            (row["file"], row["predicted"] or "", [cell for pair in row["top"] for cell in pair], row.get("error") or "")
            for row in rows
        ]
    if file.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(file.read_text())))
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(file).to_pylist()
    assert list(rows[0]) == ["file", "predicted", "class_1", "probability_1", "class_2", "probability_2", "error"]
    names = ("class_1", "probability_1", "class_2", "probability_2")
    return [
        (row["file"], row["predicted"] or "", [as_cell(row[name]) for name in names if row[name]], row["error"] or "")
        for row in rows
    ]


def as_cell(text):
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize("ending", predictions.FORMATS)
def test_a_file_holds_what_is_predicted(run_folder, images, tmp_path, capsys, ending):
    """In each format every image has its row, in order, with the bits of its probabilities, or the reason why it has none."""
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    target = tmp_path / f"said{ending}"
    done = write_predictions(run_folder, find_inputs([images]), target, Asked(top=2))
    wanted = predict(run_folder, [images], top=2)
    assert done == {"file": str(target), "images": 11, "unreadable": 1} and "1 of 11 images" in capsys.readouterr().err
    assert read_back(target) == [
        (row["file"], row["predicted"] or "", [cell for pair in row["top"] for cell in pair], row.get("error", ""))
        for row in wanted
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", target.name]


@pytest.mark.parametrize("torn", [b'{"file": "cut in the mid', b"\0" * 40 + b"\n"])
@pytest.mark.parametrize("cut", [0, 7])
def test_what_was_cut_off_goes_on(run_folder, images, tmp_path, monkeypatch, capsys, cut, torn):
    """Killed before an image or within a row, or without power, the same command does the rest and ends with the same file."""
    files, target, seen = find_inputs([images]), tmp_path / "said.csv", []
    write_predictions(run_folder, files, tmp_path / "whole.csv")

    def killed(model, images, top, workers, *more):
        for i, row in enumerate(predict_rows(model, images, top, workers)):
            if i == cut:
                raise KeyboardInterrupt
            yield row

    def counted(model, images, top, workers, *more):
        seen.extend(images)
        return predict_rows(model, images, top, workers)

    predict_rows = parts.predict_rows
    monkeypatch.setattr(parts, "predict_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        write_predictions(run_folder, files, target)
    part = tmp_path / "said.csv.part"
    part.write_bytes(part.read_bytes() + torn)
    monkeypatch.setattr(parts, "predict_rows", counted)
    write_predictions(run_folder, files, target)
    assert seen == files[cut:] and target.read_bytes() == (tmp_path / "whole.csv").read_bytes() and not part.exists()
    assert (f"going on after {cut} of 11 images" in capsys.readouterr().err) == (cut > 0)


def test_what_was_begun_otherwise_is_not_mixed(run_folder, images, tmp_path):
    """A .part of another model or --top, or for other images, is refused and stays; so is a file that is there."""
    files, target, part = find_inputs([images]), tmp_path / "said.csv", tmp_path / "said.csv.part"
    write_predictions(run_folder, files, tmp_path / "there.csv")
    part.write_text('{"weights": "other", "top": 5}\n')
    for files_now, top, fault in ((files, 5, "with another model"), (files, 2, "with another model, --top or --unsure-below")):
        with pytest.raises(RecipeError, match=f"{part} was begun {fault}"):
            write_predictions(run_folder, files_now, target, Asked(top))
    weights = parts.file_digest(run_folder / "model" / "model.safetensors")
    part.write_text(json.dumps({"weights": weights, "top": 5}) + "\n" + json.dumps({"file": str(files[0])}) + "\n")
    for others in (files[1:], []):
        with pytest.raises(RecipeError, match="was begun for other images: delete it"):
            write_predictions(run_folder, others, target)
    assert part.exists()
    for name, fault in (("there.csv", "there already"), ("said.txt", "to a file that ends in .csv, .jsonl or .parquet")):
        with pytest.raises(RecipeError, match=fault):
            write_predictions(run_folder, files, tmp_path / name)


def test_rows_come_one_batch_at_a_time(run_folder, images):
    """The first row is there before the second batch is read, so that memory does not grow with the number of images."""
    model, read = load_model(run_folder), []

    class Recorded(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    rows = parts.predict_rows(model, Recorded(find_inputs([images / "0.png"]) * 200), 1)
    next(rows)
    assert len(set(read)) == model.recipe.data.batch_size < 200


def test_lists_name_images(image_folder, run_folder, tmp_path, monkeypatch, capsys):
    """A .txt, a .csv and stdin name images, relative to the file; a missing one is a row with a reason."""
    folder = image_folder / "val" / "red"
    names = sorted(path.name for path in folder.iterdir())
    files = [folder / name for name in names]
    (folder.parent / "list.txt").write_text("\ufeff" + "\n\n".join(f"red/{name}" for name in names))
    (folder.parent / "list.csv").write_text("id,path\n" + "".join(f"{i},red/{name}\n" for i, name in enumerate(names)))
    try:
        for name in ("list.txt", "list.csv"):
            assert find_inputs([folder.parent / name, folder]) == files
    finally:
        for name in ("list.txt", "list.csv"):
            (folder.parent / name).unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{files[0]}\n{tmp_path / 'gone.png'}\n"))
    assert main(["predict", str(run_folder), "-", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    (wanted,) = predict_images(load_model(run_folder), files[:1])
    assert rows[0]["file"] == wanted["file"] and rows[0]["predicted"] == wanted["predicted"]
    assert rows[0]["probability"] == pytest.approx(wanted["probability"], abs=1e-6) and "gone.png" in rows[1]["error"]


@pytest.mark.parametrize(
    "words,fault",
    [
        (["ftp://example.org/a.jpg"], "'ftp://example.org/a.jpg': of URLs those of s3, .* are read"),
        (["urls.txt"], "'ftp://x/y.jpg': of URLs"),
        (["empty.txt"], "no paths in empty.txt"),
        (["bytes.txt"], "can't read bytes.txt: .* wanted: a path a line, in UTF-8"),
        (["other.csv"], "no column path"),
    ],
)
def test_a_list_that_can_not_be_used_is_said(tmp_path, monkeypatch, words, fault):
    """URLs that nothing reads, empty lists, other encodings, and tables without a column of paths."""
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("urls.txt", b"a.jpg\nftp://x/y.jpg\n"),
        ("empty.txt", b"\n \n"),
        ("bytes.txt", b"\xff\xfe\x80"),
        ("other.csv", b"a,b\n1,2\n"),
    ):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=fault):
        find_inputs(words)


def test_flags_that_exclude_each_other(run_folder, image_folder, capsys):
    """--csv beside --output, which has a format of its own."""
    assert main(["predict", str(run_folder), str(image_folder), "--csv", "--output", "x.csv"]) == 2
    assert "leave out --csv" in capsys.readouterr().err
