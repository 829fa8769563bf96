"""Uploads to a hub, and downloads from it, by huggingface_hub's own client."""

import json
import shutil

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from packaging.version import Version

from finetune.__main__ import main as verb
from finetune.export.push import push
from finetune.models.pretrained import pretrained_state
from finetune.models.saved import load_model
from finetune.recipe.recipe import minimal_recipe
from finetune.utils.errors import RecipeError
from hub_server import READER, TOKEN, Repository, serving

# Before, the client's address could not be changed once it was imported.
pytestmark = pytest.mark.skipif(Version(huggingface_hub.__version__) < Version("1"), reason="needs huggingface_hub 1")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that this process takes for the real one, with a cache of its own and a token that may write."""
    constants = huggingface_hub.constants
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # another protocol than this server's
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_what_was_pushed_comes_back(hub, run_folder, capsys):
    """Files, card, branch and commit are there; loaded by its name, the network has the same weights and temperature."""
    assert verb(["push", str(run_folder), "me/flowers", "--private"]) == 0
    out = capsys.readouterr().out
    repository = hub.repositories["me/flowers"]
    files = repository.branches["main"]
    assert repository.private and f"{hub.address}/me/flowers (private)" in out and 'create_model("hf-hub:me/flowers"' in out
    assert files.keys() == {"config.json", "model.safetensors", "README.md", "curves.png"}
    assert files["model.safetensors"] == (run_folder / "model" / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert "hf-hub:me/flowers" in card and "OWNER/NAME" not in card and str(run_folder.parent) not in card
    assert repository.commits[0][1].startswith("resnet18_cifar: top-1 ")
    ours, again = load_model(run_folder / "model"), load_model("hf-hub:me/flowers")
    assert again.classes == ours.classes and again.temperature == ours.temperature
    for name, value in ours.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name]), name


def test_a_model_is_the_newest_that_can_be_had(hub, run_folder, monkeypatch, capsys):
    """After another push the other network; without the hub, or told to stay offline, the one in the cache, said in a line."""
    push(run_folder, "me/flowers")
    first = load_model("hf-hub:me/flowers")
    config = hub.repositories["me/flowers"].branches["main"]
    config["config.json"] = config["config.json"].replace(b'"temperature": ', b'"temperature": 1')
    assert load_model("hf-hub:me/flowers").temperature != first.temperature
    capsys.readouterr()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert load_model("hf-hub:me/flowers").temperature != first.temperature
    assert "can't be reached: me/flowers is as it was when it was fetched" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_model("hf-hub:me/flowers").temperature != first.temperature and not capsys.readouterr().err
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE is set"):
        load_model("hf-hub:me/others")


def test_again_and_elsewhere(hub, run_folder):
    """A repository that is there gets a commit; a branch is made; the page goes along when asked for."""
    assert push(run_folder, "me/flowers")["new"]
    again = push(run_folder, "me/flowers", report=True)
    assert not again["private"] and not again["new"]
    assert "report.html" in hub.repositories["me/flowers"].branches["main"]
    done = push(run_folder, "me/flowers", revision="second")
    assert done["load"] == 'timm.create_model("hf-hub:me/flowers@second", pretrained=True)'
    assert [branch for branch, _ in hub.repositories["me/flowers"].commits] == ["main", "main", "second"]
    with pytest.raises(RecipeError, match="is there already, and public"):
        push(run_folder, "me/flowers", private=True)
    assert len(hub.repositories["me/flowers"].commits) == 3


def test_what_can_not_be_uploaded_is_one_message(hub, run_folder, tmp_path, monkeypatch):
    """Names, tokens, smoke runs, offline mode, a hub that is busy or gone: each its own, and nothing is made."""
    for name in ("flowers", "me/my/flowers", "me/ flowers", "me/..", ""):
        with pytest.raises(RecipeError, match="write OWNER/NAME"):
            push(run_folder, name)
    smoke = shutil.copytree(run_folder, tmp_path / "smoke")
    result = json.loads((smoke / "result.json").read_text())
    (smoke / "result.json").write_text(json.dumps(result | {"smoke": True}))
    with pytest.raises(RecipeError, match="smoke run"):
        push(smoke, "me/flowers")
    for token, fault in ((READER, "may not write there"), ("hf_unknown", "does not know this token")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(RecipeError, match=f"{fault}: log in with `hf auth login`"):
            push(run_folder, "me/flowers")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RecipeError, match="who are logged in: log in with"):
        push(run_folder, "me/flowers")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.answers["/api/repos/create"] = (400, {})
    with pytest.raises(RecipeError, match="can't upload to me/flowers: .*400"):
        push(run_folder, "me/flowers")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE is set"):
        push(run_folder, "me/flowers")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert not hub.repositories
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RecipeError, match="can't reach the Hugging Face hub, http://127.0.0.1:9 .*\n  nothing was uploaded"):
        push(run_folder, "me/flowers")


@pytest.mark.parametrize(
    ("status", "code", "fault"),
    [
        (401, "RepoNotFound", "no such repository, or it is private"),
        (401, "", "does not know this token"),
        (403, "GatedRepo", "gives access on request"),
        (404, "RepoNotFound", "no such repository"),
        (404, "EntryNotFound", "no such file"),
        (404, "RevisionNotFound", "no such revision"),
    ],
)
def test_a_closed_door_is_one_message(hub, status, code, fault):
    """With the repository's name, the reason and the remedy."""
    hub.answers["/org/closed/resolve"] = (status, {"X-Error-Code": code} if code else {})
    with pytest.raises(RecipeError, match=f"can't fetch config.json and model.safetensors of hf-hub:org/closed: .*{fault}"):
        load_model("hf-hub:org/closed")


@pytest.mark.parametrize(("status", "fault"), [(429, "too many requests"), (500, "500")])
def test_a_busy_hub_is_one_message(hub, monkeypatch, status, fault):
    """Once the client's own retries are over, of which the waits are left out here."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.answers["/org/busy/resolve"] = (status, {"Retry-After": "1"})
    with pytest.raises(RecipeError, match=f"hf-hub:org/busy: .*{fault}"):
        load_model("hf-hub:org/busy")


def test_a_cut_download_never_counts_as_a_file(hub, run_folder, monkeypatch):
    """It goes on where it was cut, by the client's own retries, or ends in a message; what is loaded is whole."""
    files = {name: (run_folder / "model" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub.repositories["org/flowers"] = Repository(False, {"main": files})
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's tries
    hub.cut = len(files["model.safetensors"]) * 2 // 3
    again = load_model("hf-hub:org/flowers")
    gets = [seen for seen in hub.seen if seen[0] == "GET" and seen[1].endswith("model.safetensors")]
    assert len(gets) > 1 and any(part and part != "bytes=0-" for _, _, part in gets)
    for name, value in load_model(run_folder / "model").net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name]), name


def test_pretrained_weights_come_the_same_way(hub, monkeypatch):
    """A timm model's, by the name that timm has for it; a gated one says what to do, and how to go on without."""
    net = timm.create_model("test_resnet", num_classes=1000)
    name = timm.models.get_pretrained_cfg_value("test_resnet.r160_in1k", "hf_hub_id")
    weights = safetensors.torch.save({key: value.contiguous() for key, value in net.state_dict().items()})
    hub.repositories[name] = Repository(False, {"main": {"model.safetensors": weights}})
    recipe = minimal_recipe("test_resnet.r160_in1k", "digits", 64)
    state = pretrained_state(recipe)
    assert state is not None
    for key, value in net.state_dict().items():
        assert torch.equal(state[key], value), key
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", huggingface_hub.constants.HF_HUB_CACHE + " elsewhere")
    hub.answers[f"/{name}/resolve"] = (403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(RecipeError, match=f"can't fetch the weights {name}: its owner gives access on request.*\n.*--weights"):
        pretrained_state(recipe)


def test_an_upload_that_is_cut_is_repeated_or_leaves_nothing(hub, run_folder, monkeypatch):
    """One cut is mended by the client's own retry; a hub that always cuts is one message, and makes no commit."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.dropped = 1
    push(run_folder, "me/flowers")
    assert hub.dropped == 0
    weights = (run_folder / "model" / "model.safetensors").read_bytes()
    assert hub.repositories["me/flowers"].branches["main"]["model.safetensors"] == weights
    hub.blobs.clear()
    hub.dropped = 1000
    with pytest.raises(RecipeError, match="can't upload to me/others: ") as caught:
        push(run_folder, "me/others")
    assert "; the same command begins again" in str(caught.value) and not hub.repositories["me/others"].commits


def test_a_hub_that_does_not_answer_in_time_is_one_message(hub, monkeypatch):
    """Once the client has waited as long as its own HF_HUB_DOWNLOAD_TIMEOUT says."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.repositories["org/slow"] = Repository(False, {"main": {"config.json": b"{}", "model.safetensors": b""}})
    hub.wait = 0.5
    with pytest.raises(RecipeError, match="can't fetch config.json and model.safetensors of hf-hub:org/slow: .*timed out"):
        load_model("hf-hub:org/slow")
