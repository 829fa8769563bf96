"""Files that lie elsewhere: fetched, listed, told apart, and why one can't be had."""

import base64
import io
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from finetune.data.folders import class_folders
from finetune.images import remote
from finetune.images.archive import copy_of
from finetune.images.read import read_image
from finetune.images.remote import fetch, find_file, image_digest, list_folder, look_up
from finetune.utils import net
from finetune.utils.errors import RecipeError
from finetune.utils.urls import Unreachable, as_path, beside, check_url, is_url, relative_to, tidy

ODD = ("a b.jpg", "50%20.jpg", "#1.jpg", "what?.jpg", "ä☂.jpg", "it's::here.jpg", "UPPER.JPG")


def jpeg(level):
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), level, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def quick(monkeypatch):
    """Tries follow one another at once, and a silent server is given up after a tenth of a second."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(net, "PAUSES", (0, 0))
    monkeypatch.setattr(net, "SILENCE", 0.1)
    yield
    sys.modules["fsspec"].get_filesystem_class("http").clear_instance_cache()


def place(kind, files, web, tmp_path):
    """The URL of a folder of these files: in memory, in a .zip here, or in one on the web."""
    if kind == "memory":
        system = pytest.importorskip("fsspec").filesystem("memory")
        for name, content in files.items():
            system.pipe_file(f"/{tmp_path.name}/{name}", content)
        return f"memory://{tmp_path.name}"
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"photos/{name}", content)
    if kind == "zip":
        return f"zip://photos::{tmp_path}/photos.zip"
    web.files["/photos.zip"] = (tmp_path / "photos.zip").read_bytes()
    return f"zip://photos::{web.address}/photos.zip"


@pytest.mark.parametrize("kind", ["memory", "zip", "zip on the web"])
def test_a_folder_is_that_of_the_same_files_here(kind, web, tmp_path, monkeypatch):
    """Names of any characters, order, labels, classes, what is left out, and pixels are those of the folder here."""
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path / "downloads"))
    names = [f"cat/{name}" for name in ODD if kind != "memory" or "::" not in name]
    names += ["dog/2010/1.jpg", "dog/2.jpg", "dog/.hidden.jpg", "dog/notes.txt", "above.jpg"]
    files = {name: jpeg(10 * i) for i, name in enumerate(names)}
    for name, content in files.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(content)
    url = place(kind, files, web, tmp_path)
    images, classes = class_folders(list_folder(url))
    own, own_classes = class_folders(tmp_path / "here")
    assert (classes, images.labels) == (own_classes, own.labels)
    assert [relative_to(item, url) for item in images.items] == [os.path.relpath(item, tmp_path / "here") for item in own.items]
    for i in range(len(own)):
        assert np.array_equal(images[i][0], own[i][0])
        assert fetch(str(images.items[i])) == files[relative_to(images.items[i], url)]
    assert fetch(pickle.loads(pickle.dumps(images.items[0]))) == fetch(images.items[0])  # as loader processes get it


def test_a_table_on_the_web_names_files_beside_it(web):
    """Names of any characters, as they are here; what is a URL stays one; the server is asked for each as it is called."""
    for name in ODD:
        web.files[f"/set/{name}"] = jpeg(9)
        item = beside(f"{web.address}/set/table.csv?version=2", name)
        assert fetch(item) == jpeg(9) and as_path(item).name == name
    assert beside("s3://bucket/set/table.csv", " ../a b.jpg ") == "s3://bucket/a b.jpg"
    assert beside("tables/here.csv", "S3://Bucket/a.jpg") == "s3://Bucket/a.jpg"


def test_a_redirect_is_followed(web):
    """To where the file was moved."""
    web.files["/new.jpg"], web.faults["/old.jpg"] = jpeg(3), ("/new.jpg?X-Amz-Signature=secret", -1)
    web.files["/new.jpg?X-Amz-Signature=secret"] = jpeg(4)
    assert fetch(f"{web.address}/old.jpg") == jpeg(4)


@pytest.mark.parametrize(
    ("fault", "why", "tries"),
    [
        (404, "it is not there", 1),
        (403, r"no permission \(403\); .*netrc", 1),
        (500, "the server answers 500", 3),
        (429, "the server answers 429", 3),
        (418, "the server answers 418", 1),
        ("silent", "the server is silent|[Tt]imeout", 3),
        ("cut", "Response payload is not completed$", 3),
        ("/elsewhere?token=secret", "it is not there", 1),
    ],
)
def test_why_an_image_can_not_be_had(web, quick, fault, why, tries):
    """In one line with the image and the cause, nothing of where it was moved to; what may pass is tried three times."""
    web.files["/a.jpg"], web.faults["/a.jpg"] = jpeg(5), (fault, -1)
    with pytest.raises(RecipeError, match=f"can't reach the image {web.address}/a.jpg: ({why})") as error:
        read_image(f"{web.address}/a.jpg")
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    assert len([path for _, path, _ in web.asked if path == "/a.jpg"]) == tries
    if isinstance(look_up([item := find_file(f"{web.address}/a.jpg")]).get(item), Unreachable):
        assert image_digest(item) == ""


def test_a_name_and_a_password_come_from_netrc(web, tmp_path, monkeypatch):
    """As curl and requests take them."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    web.files["/a.jpg"] = jpeg(5)
    assert fetch(f"{web.address}/a.jpg") == jpeg(5)
    assert web.logins == [f"Basic {base64.b64encode(b'me:hunter2').decode()}"]


def test_what_passes_is_not_noticed(web, quick):
    """Two answers of 503, then the file."""
    web.files["/a.jpg"], web.faults["/a.jpg"] = jpeg(5), (503, 2)
    assert fetch(f"{web.address}/a.jpg") == jpeg(5)


def test_a_server_that_is_gone(quick):
    """One line; of many files no more are asked for than it takes to see that there is no hope."""
    files = [find_file(f"http://127.0.0.1:9/{i}.jpg") for i in range(1000)]
    assert remote.HOPELESS <= len(faults := look_up(files)) <= remote.SOME
    assert "Cannot connect" in str(faults[files[0]])


def test_what_is_no_image_is_told_as_of_a_file_here(web):
    """By the header, of the whole file where it is no part of the first bytes."""
    web.files |= {"/a.jpg": b"no image", "/b.npy": b"\x93NUMPY\x01\x00"}
    with pytest.raises(RecipeError, match="can't read the image .*/a.jpg: cannot identify image file"):
        read_image(f"{web.address}/a.jpg")
    with pytest.raises(RecipeError, match="can't read the image .*/b.npy"):
        read_image(f"{web.address}/b.npy", channels=1)
    np.save(buffer := io.BytesIO(), np.array([{"code": 1}], dtype=object), allow_pickle=True)
    web.files["/c.npy"] = buffer.getvalue()
    with pytest.raises(RecipeError, match="Object arrays cannot be loaded when allow_pickle=False"):
        read_image(f"{web.address}/c.npy", channels=1)


def test_another_content_is_another_digest(web, tmp_path, monkeypatch):
    """On the web by the server's word, in memory by the time, in a .zip by the checksum; a copied .zip is copied anew."""
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path / "downloads"))
    for kind in ("memory", "zip", "zip on the web"):
        found = []
        for level in (1, 2, 2):
            folder = list_folder(place(kind, {"cat/a.jpg": jpeg(level)}, web, tmp_path))
            found.append(image_digest((folder / "cat").entries["a.jpg"]))
            assert fetch((folder / "cat").entries["a.jpg"]) == jpeg(level)
        assert found[0] != found[1] and (found[1] == found[2] or kind == "memory")
    web.files["/a.jpg"] = jpeg(1)
    before = image_digest(f"{web.address}/a.jpg")
    web.files["/a.jpg"] = jpeg(2)
    assert "" != image_digest(f"{web.address}/a.jpg") != before
    copy_of.cache_clear()


@pytest.mark.parametrize(
    "url",
    [
        "https://user:secret@host/a.jpg",
        "HTTPS://secret@host/photos",
        "s3://key:secret@bucket/photos",
        "https://host/a.jpg?X-Amz-Credential=secret&X-Amz-Signature=secret",
        "https://account.blob.core.windows.net/a/b.jpg?sv=1&sig=secret",
        "https://host/a.jpg?access_token=secret",
        "zip://photos::https://user:secret@host/photos.zip",
        "zip://::https://host/photos.zip?token=secret",
    ],
)
def test_a_secret_is_refused(url):
    """Passwords, keys and signatures, which a run would write down; what is said holds none either."""
    with pytest.raises(RecipeError, match="has a password or a signature in it") as error:
        check_url(url)
    assert "secret" not in str(error.value)


def test_what_is_a_url():
    """Two letters and ://; a name with @, a query without secrets and a chain are no secrets."""
    assert not any(map(is_url, ("C:\\photos", "C://photos", "photos/a.jpg", "a://b", 3, None)))
    for url in ("s3://b/a@2x.jpg", "abfs://box@account/a", "https://h/a.jpg?id=5&design=2", "hf://datasets/o/n@main/a.jpg"):
        assert check_url(url)
    assert tidy("S3://Bucket/photos/") == "s3://Bucket/photos" and tidy("photos.ZIP") == "zip://::photos.ZIP"
    for url, said in (("gopher://a/b", "of URLs those of s3, .* are read"), ("zip://photos", "names no archive")):
        with pytest.raises(RecipeError, match=said):
            check_url(url)


def test_a_folder_that_can_not_be_listed(web, tmp_path, monkeypatch):
    """On the web, empty, no .zip, encrypted: each is said; a package that is missing with pip's line."""
    pytest.importorskip("fsspec").filesystem("memory").mkdirs(f"/{tmp_path.name}/empty", exist_ok=True)
    (tmp_path / "bad.zip").write_bytes(b"PK no zip")
    for url, said in (
        (f"{web.address}/photos", "web servers list none: name a .csv of URLs, or a .zip"),
        (f"memory://{tmp_path.name}/empty", "is empty, or not there"),
        (f"{tmp_path}/bad.zip", "can't read .*bad.zip: File is not a zip file"),
        (f"{tmp_path}/none.zip", "can't read .*none.zip: No such file"),
        (f"{web.address}/none.zip", "can't list .*none.zip: it is not there"),
    ):
        with pytest.raises(RecipeError, match=said):
            list_folder(url)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RecipeError, match="gs:// needs a package that is not installed: pip install gcsfs"):
        list_folder("gs://bucket/photos")


def test_of_files_here_nobody_is_asked(image_folder, monkeypatch):
    """A folder here is read without fsspec."""
    monkeypatch.setitem(sys.modules, "fsspec", None)
    images, _ = class_folders(image_folder / "train")
    assert images[0][0].size == (48, 40) and not look_up(images.items) and image_digest(images.items[0])
