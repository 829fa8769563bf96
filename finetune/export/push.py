"""A run's network on the Hugging Face hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from finetune.export.timm_folder import timm_files
from finetune.models.saved import find_model
from finetune.recipe.metrics import METRICS, write_value
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.files import read_json
from finetune.utils.net import reach
from finetune.utils.text import progress

REMEDY = "log in with `hf auth login`, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)"


def push(model: Path, name: str, private: bool = False, revision: str | None = None, report: bool = False) -> dict[str, Any]:
    """Upload a finished run's network, its model card and its curves to the repository `name`, which is made if need be.

    `model` is a run folder, or model-best/ in it. What is uploaded is what `export --to timm` writes, in one commit; with
    `report` the run's page, too, which shows validation images. No image, path or file of the run is else among it. Returns
    {"repository", "address", "private", "new", "commit", "files", "load"}.

    Raises:
        RecipeError: for a name that the hub would refuse, a smoke run, no or a refused token, a repository that is public where
            `private` is asked for, and a hub that can't be reached.
    """
    check_name(name)
    files = files_of(model, name, report)
    api = HfApi()
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise RecipeError("HF_HUB_OFFLINE is set, which forbids uploads: unset it")
    reach(api.endpoint, f"the Hugging Face hub, {api.endpoint}", remedy="  nothing was uploaded")
    try:
        api.whoami()
        known = api.repo_exists(name)
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise RecipeError(f"{name} is there already, and public: make it private on the hub first, or leave out --private")
        if revision:
            api.create_branch(name, branch=revision, exist_ok=True)
        adds = [CommitOperationAdd(file, content) for file, content in files.items()]
        with progress(None, None, f"upload to {name}"):
            commit = api.create_commit(name, adds, commit_message=message_of(model), revision=revision)
        info = api.model_info(name, revision=revision)
    except LocalTokenNotFoundError as error:
        raise RecipeError(f"the hub takes uploads of those who are logged in: {REMEDY}") from error
    except HfHubHTTPError as error:
        raise RecipeError(f"can't upload to {name}: {explain(error)}") from error
    except RecipeError:
        raise
    except Exception as error:  # a connection that was cut, which the client puts in many words, a card that is not taken
        raise RecipeError(f"can't upload to {name}: {first_line(error)}; the same command begins again") from error
    at = f"@{revision}" if revision else ""
    return {
        "repository": name,
        "address": f"{api.endpoint}/{name}{f'/tree/{revision}' if revision else ''}",
        "private": bool(info.private),
        "new": not known,
        "commit": commit.oid,
        "files": list(files),
        "load": f'timm.create_model("hf-hub:{name}{at}", pretrained=True)',
    }


def check_name(name: str) -> None:
    """Raise RecipeError for what is no OWNER/NAME."""
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise ValueError("it has two parts")
    except ValueError as error:
        raise RecipeError(
            f"'{name}': write OWNER/NAME, your name on the hub and the repository's: {first_line(error)}"
        ) from None


def files_of(model: Path, name: str, report: bool) -> dict[str, bytes]:
    """What is uploaded, by name."""
    run = find_model(model)[1]
    with progress(None, 2, "files of the run") as bar:
        files = timm_files(model, bar)
    assert run is not None  # or there would be no files
    if read_json(run / "result.json").get("smoke"):
        raise RecipeError(f"{run} is a smoke run, which is no result: nothing to upload")
    files["README.md"] = files["README.md"].replace(b"OWNER/NAME", name.encode())
    if report:
        if not (run / "report.html").is_file():
            raise RecipeError(f"no {run / 'report.html'}: finetune report {run}")
        files["report.html"] = (run / "report.html").read_bytes()
    return files


def message_of(model: Path) -> str:
    """The commit's first line: the recipe, and what it reached."""
    run = find_model(model)[1]
    result = read_json(Path(str(run)) / "result.json")
    metric = next(metric for metric in METRICS if f"best_{metric}" in result)
    value = write_value(metric, result[metric], sign=" %")
    return f"{result['recipe']}: {METRICS[metric]} {value} of {result['val_images']} images"


def explain(error: HfHubHTTPError) -> str:
    """What the hub answered, and what to do about it."""
    status = getattr(error.response, "status_code", None)
    remedies = {
        401: f"it does not know this token: {REMEDY}",
        403: f"this token may not write there: {REMEDY}",
        429: "it has had too many requests; try again in some minutes",
    }
    return remedies.get(status or 0, first_line(getattr(error, "server_message", None) or error))
