"""Sources that lie elsewhere: the split of the same files here, what is asked of a server, faults, and every verb on them."""

import json
import os
import shutil

import fsspec
import numpy as np
import pytest

from finetune import run
from finetune.__main__ import main as verb
from finetune.data.dataset import changed_files, file_rows, fingerprint, record_files
from finetune.data.loader import load
from finetune.data.sources import load_data
from finetune.data.split import names_of
from finetune.inference.inputs import find_inputs
from finetune.recipe import Data
from finetune.utils import net
from finetune.utils.errors import RecipeError
from helpers import on_folder, prepare, small_recipe


@pytest.fixture
def remote(image_folder, tmp_path):
    """The URL of the image folder's copy in memory."""
    fsspec.filesystem("memory").put(str(image_folder), f"/{tmp_path.name}/photos", recursive=True)
    return f"memory://{tmp_path.name}/photos"


@pytest.fixture
def table(image_folder, web):
    """The URL of a table, beside the image folder's copy on the web."""
    files = sorted(image_folder.rglob("*.png"))
    names = [file.relative_to(image_folder).as_posix() for file in files]
    web.files |= {f"/{name}": file.read_bytes() for name, file in zip(names, files, strict=True)}
    rows = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in names]
    web.files["/table.csv"] = "\n".join(["path,label,split", *rows]).encode()
    return f"{web.address}/table.csv"


def recipe_on(source, **fields):
    return small_recipe(data=Data(str(source), image_size=24, batch_size=8, **fields))


@pytest.mark.parametrize(
    "fields", [{}, {"holdout": 0.3}, {"val_share": 0.3, "below": "train"}, {"group_pattern": r"(\d)\.png", "below": "train"}]
)
def test_the_split_is_that_of_the_same_files_here(remote, image_folder, fields):
    """Given or drawn, by images or by groups: the same images in the same order, with the same fingerprint."""
    below = fields.pop("below", "")
    sources = [f"{place}/{below}".rstrip("/") for place in (remote, image_folder)]
    far, near = (load_data(recipe_on(place, **fields)) for place in sources)
    for part in ("train", "val"):
        one, other = getattr(far, part), getattr(near, part)
        assert names_of(one, sources[0]) == names_of(other, sources[1])
        assert fingerprint(one, far.classes) == fingerprint(other, near.classes)
        assert one.groups == other.groups


def test_a_batch_is_fetched_at_once(table, web):
    """More than one file is under way at a time; of those that are kept none."""
    far = prepare(recipe_on(table))[2][0]
    web.busy, web.delay = 0, 0.05
    next(load(far, 0, [list(range(16))], 0))
    assert web.busy > 1
    web.asked.clear()
    next(load(far, 0, [list(range(16))], 0))
    assert not web.asked


def test_loader_processes_read_what_lies_elsewhere(table, image_folder, web):
    """Forked after this process has asked the server; each image is fetched whole once, however many epochs there are."""
    (_, _, (far, _)), (_, _, (near, _)) = prepare(recipe_on(table)), prepare(recipe_on(image_folder))
    web.asked.clear()
    batches = [list(range(start, min(start + 8, len(far)))) for start in range(0, len(far), 8)]
    for epoch in range(2):
        for one, other in zip(load(far, epoch, batches, 2), load(near, epoch, batches, 0), strict=True):
            assert all(map(lambda a, b: np.array_equal(a.numpy(), b.numpy()), one, other))
    assert sorted(path for _, path, whole in web.asked if whole) == sorted({path for _, path, _ in web.asked})


def test_what_a_run_starts_with(table, web, monkeypatch):
    """Each image is asked for its version and its header; one that is not there is named then, and skipped where asked to."""
    monkeypatch.setattr(net, "PAUSES", (0, 0))
    load_data(recipe_on(table))
    asked = [(method, path) for method, path, _ in web.asked if path != "/table.csv"]
    assert sorted(asked) == sorted((method, path) for path in web.files if path != "/table.csv" for method in ("HEAD", "GET"))
    web.faults["/train/red/3.png"], web.files["/val/blue/0.png"] = (403, -1), b"no image"
    with pytest.raises(
        RecipeError, match="can't read 2 of 45 images:\n.*/train/red/3.png: no permission .*\n.*/val/blue/0.png: "
    ):
        load_data(recipe_on(table))
    data = load_data(recipe_on(table, on_bad_image="skip"))
    rows = {row[3].removeprefix(web.address): row[2] for row in file_rows(data.train, data.val, data.classes)}
    assert rows.pop("/train/red/3.png") == "" and all(rows.values())


def test_a_changed_image_is_noticed(table, web, tmp_path):
    """By the server's word, before a resumed run goes on; the same images are the same."""
    data = load_data(recipe_on(table))
    record_files(tmp_path / "images.csv", rows := file_rows(data.train, data.val, data.classes))
    assert not changed_files(tmp_path / "images.csv", rows)
    web.files["/val/red/2.png"] = web.files["/val/red/3.png"]
    data = load_data(recipe_on(table))
    changed = changed_files(tmp_path / "images.csv", file_rows(data.train, data.val, data.classes))
    assert changed == [f"{web.address}/val/red/2.png"]


def test_a_server_that_dies_in_the_middle(table, web, tmp_path, monkeypatch, capsys):
    """Ends a run with the image and the cause in a line, and one that skips goes on without what it had not read."""
    monkeypatch.setattr(net, "PAUSES", (0, 0))
    check = net.ask

    def dying(url, method, *values, **options):
        if method == "cat_file" and not options.get("end") and "/train/" in url:
            raise net.Unreachable("the server is silent", lasting=False)
        return check(url, method, *values, **options)

    monkeypatch.setattr("finetune.images.remote.ask", dying)
    words = on_folder(table, tmp_path / "run", "epochs=1", "data.on_bad_image=stop")
    assert run.main([*words, "--workers", "0", "--quiet"]) == 2
    assert f"can't reach the image {web.address}/train/" in (said := capsys.readouterr().err) and said.count("can't reach") == 1
    assert "the server is silent" in said


@pytest.mark.parametrize("secret", ["https://me:hunter2@host/a.png", "https://host/a.png?X-Amz-Signature=hunter2"])
def test_no_secret_is_written_down(secret, tmp_path, capsys):
    """In a table, a source, a recipe or a prediction: it is refused before anything is written, without saying it."""
    (tmp_path / "table.csv").write_text(f"path,label\n{secret},a\n")
    (tmp_path / "list.txt").write_text(f"{secret}\n")
    for source in (tmp_path / "table.csv", secret.replace(".png", ".csv"), secret.replace(".png", ".zip")):
        with pytest.raises(RecipeError, match="a password or a signature") as error:
            load_data(recipe_on(source))
        assert "hunter2" not in str(error.value)
    for paths in ([secret], [tmp_path / "list.txt"], [tmp_path / "table.csv"]):
        with pytest.raises(RecipeError, match="a password or a signature"):
            find_inputs(paths)
    assert run.main(on_folder(secret.replace(".png", ".csv"), tmp_path / "run")) == 2
    assert not (tmp_path / "run").exists() and "hunter2" not in capsys.readouterr().err


def test_every_verb_takes_what_lies_elsewhere(remote, table, image_folder, run_folder, web, tmp_path, capsys):
    """predict and evaluate say what they say of the same files here; check reads it, and writes a table of URLs."""
    web.files["/list.txt"] = b"val/red/0.png\nval/red/none.png\n"

    def said(*words):
        assert verb([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    far, near = (said("predict", run_folder, f"{place}/val/red") for place in (remote, image_folder))
    assert [row | {"file": os.path.basename(row["file"])} for row in far] == [
        row | {"file": os.path.basename(row["file"])} for row in near
    ]
    one, none = said("predict", run_folder, f"{web.address}/list.txt", "--explain", tmp_path / "why")
    assert one["file"] == f"{web.address}/val/red/0.png" and none["error"].endswith("none.png: it is not there")
    assert (tmp_path / "why" / "0.png").is_file()
    here = said("evaluate", run_folder, "--data", image_folder)
    for source in (remote, table):
        there = said("evaluate", run_folder, "--data", source)
        assert there["val_images"] == 15 and there | {"data": ""} == here | {"data": ""}
    found = said("check", "--data", table, "--output", tmp_path / "plans", "--fix", tmp_path / "good.csv", "--weights", "none")
    assert (found["train"], found["val"]) == (30, 15)
    rows = (tmp_path / "good.csv").read_text().splitlines()[1:]
    assert rows and all(row.startswith(f"{web.address}/") for row in rows)


def test_s3(image_folder, tmp_path, monkeypatch):
    """A bucket of moto's server: a folder, a table in it and the images' versions; a bucket that is not there is said."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
    try:
        system = fsspec.filesystem("s3")
        system.mkdir("bucket")
        system.put(str(image_folder), "bucket/my photos", recursive=True)
        far, near = load_data(recipe_on("S3://bucket/my photos/")), load_data(recipe_on(image_folder))
        assert names_of(far.train, "s3://bucket/my photos") == names_of(near.train, image_folder)
        assert np.array_equal(far.val[3][0], near.val[3][0])
        system.pipe_file("bucket/my photos/t.csv", b"path,label\ntrain/red/1.png,red\nval/blue/2.png,blue\n")
        rows = file_rows(far.train, far.val, far.classes)
        system.pipe_file("bucket/my photos/train/red/0.png", (image_folder / "train/red/1.png").read_bytes())
        new = load_data(recipe_on("s3://bucket/my photos"))
        differ = [one[3] for one, two in zip(rows, file_rows(new.train, new.val, new.classes), strict=True) if one != two]
        assert differ == ["s3://bucket/my photos/train/red/0.png"]
        with pytest.raises(RecipeError, match="s3://other/photos: it is not there"):
            load_data(recipe_on("s3://other/photos"))
    finally:
        server.stop()
        system.clear_instance_cache()


def test_loader_processes_read_a_zip(image_folder, tmp_path):
    """Each with a place in it of its own, though this process has opened it before."""
    shutil.make_archive(str(tmp_path / "photos"), "zip", image_folder)
    far, near = (prepare(recipe_on(place))[2][0] for place in (tmp_path / "photos.zip", image_folder))
    batches = [[i] for i in range(len(far))]
    for one, other in zip(load(far, 0, batches, 2), load(near, 0, batches, 0), strict=True):
        assert np.array_equal(one[0].numpy(), other[0].numpy())
