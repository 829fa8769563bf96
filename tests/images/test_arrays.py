"""Arrays of image files, read back from what the libraries of each kind of file write."""

import numpy as np
import pytest
from PIL import Image

from finetune.images.arrays import as_picture, read_array, shape_of
from finetune.utils.errors import RecipeError

RANDOM = np.random.default_rng(0)


def numbers(kind, *shape):
    return RANDOM.integers(0, 200, shape).astype(kind)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32", "float64", ">u2", ">f4", "int32", "bool"])
@pytest.mark.parametrize("shape, channels", [((7, 9), 1), ((7, 9, 1), 1), ((7, 9, 5), 5), ((5, 7, 9), 5), ((1, 7, 9), 1)])
def test_npy_is_read_as_it_was_written(tmp_path, kind, shape, channels):
    """Channels first or last, or none; numbers that are not kept as they are become equal floats of 32 bits."""
    values = numbers(kind, *shape)
    np.save(tmp_path / "image.npy", values)
    found = read_array(tmp_path / "image.npy", channels)
    wanted = values.reshape(7, 9, 1) if channels == 1 else values if shape[2] == 5 else values.transpose(1, 2, 0)
    np.testing.assert_array_equal(found, wanted * 255.0 if kind == "bool" else wanted)
    assert found.flags.c_contiguous and found.dtype.isnative
    assert found.dtype == {"float64": "float32", "int32": "float32", "bool": "uint8"}.get(
        kind, np.dtype(kind).newbyteorder("=")
    )
    assert shape_of(tmp_path / "image.npy") == shape


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("layout", ["pages", "contiguous", "separate", "big", "tiles"])
def test_tiff_is_read_as_tifffile_wrote_it(tmp_path, kind, layout):
    """Bands as pages, as samples of a pixel, in planes, in tiles, or in a file for more than 4 GB; compressed ones, too."""
    tifffile = pytest.importorskip("tifffile")
    bands, file = numbers(kind, 4, 32, 48), tmp_path / "image.tif"
    if layout == "pages":
        tifffile.imwrite(file, bands, photometric="minisblack")
    elif layout == "big":
        tifffile.imwrite(file, bands, photometric="minisblack", bigtiff=True, compression="zlib")
    else:
        options = {"planarconfig": "separate" if layout == "separate" else "contig", "photometric": "minisblack"}
        options |= {"tile": (16, 16)} if layout == "tiles" else {}
        tifffile.imwrite(file, bands if layout == "separate" else bands.transpose(1, 2, 0), **options)
    np.testing.assert_array_equal(read_array(file, 4), bands.transpose(1, 2, 0))
    assert sorted(shape_of(file)) == [4, 32, 48]


def test_grey_tiff_is_upright_whatever_is_white(tmp_path):
    """A file in which 0 is white gives the same numbers as one in which it is black; all 16 bits are kept."""
    tifffile = pytest.importorskip("tifffile")
    values = numbers("uint16", 5, 6) * 300
    tifffile.imwrite(tmp_path / "black.tif", values, photometric="minisblack")
    tifffile.imwrite(tmp_path / "white.tif", 65535 - values, photometric="miniswhite")
    for name in ("black", "white"):
        np.testing.assert_array_equal(read_array(tmp_path / f"{name}.tif", 1)[:, :, 0], values)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("signed", [False, True])
def test_dicom_is_in_its_own_units(tmp_path, photometric, signed):
    """Slope and intercept are applied, and where the lowest number is white it is turned round."""
    pydicom = pytest.importorskip("pydicom")
    stored = numbers("int16" if signed else "uint16", 6, 8)
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 6, 8, 1, photometric
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, int(signed)
    data.RescaleSlope, data.RescaleIntercept = "2", "-1024"
    data.PixelData = stored.tobytes()
    data.save_as(tmp_path / "scan.dcm", enforce_file_format=True)
    upright = stored.astype(float) if photometric == "MONOCHROME2" else (-1.0 if signed else 4095.0) - stored
    for name in ("scan.dcm", "scan"):  # told by its content
        (tmp_path / "scan.dcm").rename(tmp_path / name)
        found = read_array(tmp_path / name, 1)
        np.testing.assert_array_equal(found[:, :, 0], upright * 2 - 1024)
        assert found.dtype == np.float32 and shape_of(tmp_path / name) == (6, 8)
        (tmp_path / name).rename(tmp_path / "scan.dcm")


@pytest.mark.parametrize("name", ["grey.png", "grey.jpg", "colour.png", "deep.png", "palette.gif", "clear.png", "float.tiff"])
def test_pictures_have_one_channel(tmp_path, name):
    """Grey ones keep their numbers, of 16 bits, too; colours become Pillow's grey, on the background where they are clear."""
    values = numbers("uint8", 20, 30)
    picture = {
        "grey.png": Image.fromarray(values),
        "grey.jpg": Image.fromarray(values),
        "colour.png": Image.fromarray(numbers("uint8", 20, 30, 3)),
        "deep.png": Image.fromarray(values.astype(np.uint16) * 301),
        "palette.gif": Image.fromarray(values).convert("P"),
        "clear.png": Image.fromarray(np.dstack([values, values, values, np.zeros_like(values)])),
        "float.tiff": Image.fromarray(values.astype(np.float32) / 255),
    }[name]
    if name == "float.tiff":
        pytest.importorskip("tifffile")
    picture.save(tmp_path / name)
    found = read_array(tmp_path / name, 1)
    assert found.shape == (20, 30, 1)
    with Image.open(tmp_path / name) as again:
        deep = {"deep.png": values * np.uint16(301), "float.tiff": values.astype(np.float32) / 255}
        wanted = {"clear.png": np.full_like(values, 255)} | deep
        np.testing.assert_array_equal(found[:, :, 0], wanted.get(name, np.asarray(again.convert("RGB").convert("L"))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_pictures_are_upright(tmp_path, orientation, kind):
    """As Pillow's own exif_transpose turns them."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(numbers(kind, 4, 6)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_array(tmp_path / "turned.png", 1)[:, :, 0], wanted)


@pytest.mark.parametrize(
    "values, channels, fault",
    [
        (np.zeros((4, 5, 3)), 7, "its numbers are 4 x 5 x 3, of which neither the first nor the last are channels=7"),
        (np.zeros((4, 5)), 3, "its numbers are 4 x 5, "),
        (np.array([[1.0, np.nan], [2.0, np.inf]]), 1, "2 of its numbers are NaN or infinite"),
        (np.array([[2**31]]), 1, "it holds int64 beyond 16,777,216"),
        (np.array([["a"]]), 1, "it holds <U1, not numbers"),
        (np.array([[1j]]), 1, "it holds complex128, not numbers"),
    ],
)
def test_what_are_no_such_numbers_is_said(tmp_path, values, channels, fault):
    """Another number of channels, holes, text; an array of objects, which could run code, is not opened."""
    np.save(tmp_path / "image.npy", values)
    with pytest.raises(ValueError, match=fault):
        read_array(tmp_path / "image.npy", channels)
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_array(tmp_path / "objects.npy", 1)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    """With what to install."""
    (tmp_path / "bands.tif").write_bytes(b"II*\0" + b"\0" * 200)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r'is read by tifffile, which is not installed: pip install "finetune-recipes\[channels'
    ):
        read_array(tmp_path / "bands.tif", 4)


def test_arrays_are_shown_as_pictures():
    """Grey ones of 8 bits as they are; others from their darkest to their brightest but for 2 % at each end."""
    grey = numbers("uint8", 6, 8, 1)
    np.testing.assert_array_equal(np.asarray(as_picture(grey))[:, :, 1], grey[:, :, 0])
    ramp = np.linspace(-1000, 3000, 48).reshape(6, 8, 1).astype(np.float32)
    shown = np.asarray(as_picture(ramp))
    assert shown.shape == (6, 8, 3) and shown.min() == 0 and shown.max() == 255
    assert (np.diff(shown[..., 0].ravel().astype(int)) >= 0).all()
    assert as_picture(numbers("uint16", 6, 8, 12)).size == (8, 6)
    assert as_picture(np.zeros((4, 5, 2), np.float32)).mode == "RGB"
