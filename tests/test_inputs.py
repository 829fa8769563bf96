"""The table of docs/data.md: each kind of input, trained, resumed, on two processes, predicted, and exported to ONNX."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from file_server import serving
from finetune import run
from finetune.__main__ import main as verb
from finetune.data.sources import load_data
from finetune.export.export import export
from finetune.inference.predict import compute_logits, predict_images
from finetune.models.saved import load_model
from helpers import ROOT, Cut, cut_before, on_folder

KINDS = {  # as the table calls them: the ending of a file, and the fields of the recipe
    "photographs": (".jpg", ()),
    "long images": (".jpg", ("data.resize=pad", "data.image_size=(16, 48)")),
    "grey": (".png", ("data.channels=1",)),
    "16 bits": (".png", ("data.channels=1",)),
    "`.npy`, any bands": (".npy", ("data.channels=5",)),
    "TIFF, any bands": (".tif", ("data.channels=4",)),
    "DICOM": (".dcm", ("data.channels=1",)),
    "several labels": (".jpg", ("loss=multi_label", "metric=mean_average_precision", "label_smoothing=0")),
    "images at a URL": (".jpg", ()),
    "numbers": (".jpg", ("loss=mse", "metric=mae", "label_smoothing=0")),
}
WAYS = ("trained", "resumed", "two processes", "predicted", "ONNX")
EVERY = pytest.mark.parametrize("kind", KINDS)


def write(file, level, kind):
    """An image of this kind whose brightness tells its class."""
    noise = np.random.default_rng(sum(map(ord, file.name))).random((30, 90 if kind == "long images" else 40, 5))
    values = noise + level
    if file.suffix == ".jpg":
        Image.fromarray((80 * values[..., :3]).astype(np.uint8)).save(file)
    elif file.suffix == ".png":
        scale, dtype = (80, np.uint8) if kind == "grey" else (9000, np.uint16)
        Image.fromarray((scale * values[..., 0]).astype(dtype)).save(file)
    elif file.suffix == ".npy":
        np.save(file, values.astype(np.float32))
    elif file.suffix == ".tif":
        bands = (9000 * values[..., :4]).astype(np.uint16).transpose(2, 0, 1)
        pytest.importorskip("tifffile").imwrite(file, bands, photometric="minisblack")
    else:
        write_dicom(file, (1000 * values[..., 0]).astype(np.uint16))


def write_dicom(file, stored):
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = *stored.shape, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept = "1", "-1000"
    data.PixelData = stored.tobytes()
    data.save_as(file, enforce_file_format=True)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Class folders, or a table, of each kind."""
    root, made = tmp_path_factory.mktemp("inputs"), {}
    with serving() as server:
        make(root, made, server)
        yield made


def make(root, made, server):
    for number, (kind, (ending, _)) in enumerate(KINDS.items()):
        folder, rows = root / str(number), ["path,label,split"]
        for split, count in (("train", 8), ("val", 4)):
            for label in range(2):
                (folder / split / str(label)).mkdir(parents=True)
                for i in range(count):
                    file = folder / split / str(label) / f"{split}{label}{i}{ending}"
                    write(file, label, kind)
                    cell = {"several labels": ("dark", "bright;day")[label], "numbers": 100 * label + 5}.get(kind, label)
                    rows.append(f"{file.relative_to(folder)},{cell},{split}")
        made[kind] = folder
        if kind in ("several labels", "numbers"):
            made[kind] = folder / "table.csv"
            made[kind].write_text("\n".join(rows) + "\n")
        elif kind == "images at a URL":
            server.files |= {f"/{file.relative_to(folder)}": file.read_bytes() for file in folder.rglob("*.jpg")}
            server.files["/table.csv"] = "\n".join(rows).encode()
            made[kind] = f"{server.address}/table.csv"


def words(sets, kind, output):
    return on_folder(sets[kind], output, "backbone=test_resnet", "epochs=2", "mixed_precision=no", *KINDS[kind][1])


@pytest.fixture(scope="module")
def runs(sets, tmp_path_factory):
    """A function that gives the finished run of a kind."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def of(kind):
        if kind not in made:
            made[kind] = root / str(len(made))
            assert run.main([*words(sets, kind, made[kind]), "--quiet"]) == 0
        return made[kind]

    return of


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@EVERY
def test_resumed(sets, runs, kind, tmp_path):
    """Cut after two steps, a run ends with the bits of one that was not."""
    with pytest.MonkeyPatch.context() as patched:
        cut_before(patched, "set_lrs", 3)
        with pytest.raises(Cut):
            run.main([*words(sets, kind, tmp_path / "run"), "--quiet"])
    assert verb(["resume", str(tmp_path / "run")]) == 0
    assert weights(tmp_path / "run") == weights(runs(kind))


@pytest.mark.launches
@EVERY
def test_on_two_processes(sets, runs, kind, tmp_path):
    """The same weights within a third of one AdamW step, which divides rounding by small moments."""
    assert verb(["train", *words(sets, kind, tmp_path / "run")[1:], "--processes", "2"]) == 0
    one, two = (
        safetensors.torch.load_file(folder / "model" / "model.safetensors") for folder in (runs(kind), tmp_path / "run")
    )
    for name, value in one.items():
        scale = max(1.0, float(value.abs().max())) if kind == "numbers" else 1.0  # the head is in units of the labels
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-3 * scale)


@EVERY
def test_predicted(sets, runs, kind):
    """What the run itself said of its validation images, read from their files again."""
    folder = runs(kind)
    model, kept = load_model(folder), safetensors.torch.load_file(folder / "predictions.safetensors")
    result = json.loads((folder / "result.json").read_text())
    images = load_data(model.recipe).val
    rows = predict_images(model, images.items)
    assert [row["file"] for row in rows] == list(map(str, images.items))
    if result["use"] == "model":
        logits, _ = compute_logits(model, images, "stop", 0)
        torch.testing.assert_close(logits, kept["logits"], rtol=1e-4, atol=1e-4)
    again = predict_images(model, [images[i][0] for i in range(8)])
    for row, image in zip(again, rows, strict=True):
        same = row["predicted"] == image["predicted"]
        assert same or kind == "numbers" and row["predicted"] == pytest.approx(image["predicted"])


@EVERY
def test_exported_to_onnx(runs, kind, tmp_path):
    """onnxruntime returns what the network does, for validation images, before the file is written."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    about = json.loads((export(runs(kind), "onnx", tmp_path / "onnx") / "model.json").read_text())
    assert about["checked"]["on"] == "8 validation images" and about["checked"]["largest_difference"] < 1e-4


def test_the_table_is_of_these():
    """Each kind has its row in docs/data.md, each way its column."""
    page = (ROOT / "docs" / "data.md").read_text()
    assert f"| kind of input | {' | '.join(WAYS)} |" in page
    for kind in KINDS:
        assert f"\n| {kind} | {' | '.join(['yes'] * len(WAYS))} |\n" in page, kind
