"""The features of images: what a trained network gives to its head."""

import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import nn

from finetune.data.dataset import ImageList
from finetune.data.loader import is_unreadable
from finetune.inference.inputs import find_inputs
from finetune.inference.predict import compute_logits, reader_for
from finetune.models.backbone import head_name, is_timm
from finetune.models.saved import SavedModel, load_model
from finetune.recipe.serialize import to_dict
from finetune.report.drawing import new_figure, save_figure, shorten, style
from finetune.utils.errors import RecipeError
from finetune.utils.files import check_new, write_file
from finetune.utils.seed import keep_random_state, seed_all

COLOURED = 20  # folders, each with a colour of its own
HEAD = "embed needs a network with a head, whose input it keeps"


class Embedding(NamedTuple):
    """Features [n, d] of images, float32 on the CPU, and the path of each; "" for an image that was no file."""

    features: torch.Tensor
    files: list[str]


def embed(source: str | Path, paths: Sequence[str | Path], workers: int = 0) -> Embedding:
    """What `embed_images` makes of these files, folders, globs and lists.

    Raises:
        RecipeError: for what load_model and find_inputs refuse, and if no image could be read.
    """
    files = find_inputs(paths)
    return embed_images(load_model(source), files, workers)


def embed_images(model: SavedModel, images: Sequence[Any], workers: int = 0) -> Embedding:
    """The input of the network's head for each image, preprocessed as for `predict`; in bf16 where the run was.

    Images are those of `predict_images`. One that can't be read is named on stderr, left out and counted there.

    Raises:
        RecipeError: if no image could be read, and for a network without a head, or whose head takes more than features.
    """
    head = find_head(model)
    read = reader_for(model)
    recipe = replace(model.recipe, flip_test=False)  # of logits, not of features
    one_class = model._replace(recipe=recipe, classes=("image",))  # a network without a head may know no classes
    with returns_input_of(head, model.net):
        features, labels = compute_logits(one_class, ImageList(images, [0] * len(images), read), "skip", workers)
    seen = (~is_unreadable(labels)).nonzero()[:, 0].tolist()
    files = [str(images[i]) if isinstance(images[i], str | Path) else "" for i in seen]
    return Embedding(features[seen], files)


def find_head(model: SavedModel) -> nn.Module:
    """The layer, or the layers in one module, that make logits of features."""
    net, recipe = model.net, model.recipe
    if is_timm(recipe):
        head: Any = net.get_classifier()  # type: ignore[operator]  # timm's
    else:
        head = dict(net.named_modules()).get(head_name(recipe, net))
    if not isinstance(head, nn.Module):
        several = "several heads" if isinstance(head, tuple) else "no head that is known by name"
        raise RecipeError(f"{HEAD}; {to_dict(recipe.backbone)} has {several}")
    return head


@contextmanager
def returns_input_of(head: nn.Module, net: nn.Module) -> Iterator[None]:
    """Within, the network returns what its head is given, [n, d], whatever it does with the logits."""
    given: list[torch.Tensor] = []

    def features(module: nn.Module, images: Any, logits: Any) -> torch.Tensor:
        found = given.pop()
        if found.shape[2:].numel() > 1:
            raise RecipeError(f"{HEAD}; what this one takes is {list(found.shape[1:])} an image, not a row of features")
        return found.flatten(1)

    hooks = [
        head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0])),
        net.register_forward_hook(features),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def write_features(embedding: Embedding, file: Path) -> None:
    """Write a safetensors file of `features` [n, d], float32; its metadata has the paths as a JSON list, "files"."""
    metadata = {"files": json.dumps(embedding.files)}
    write_file(file, safetensors.torch.save({"features": embedding.features.contiguous()}, metadata))


def write_embedding(
    source: str | Path, paths: Sequence[str | Path], file: Path, picture: Path | None, by_umap: bool = False
) -> tuple[dict[str, Any], str]:
    """What `finetune embed` shows, (in JSON's types, as text): it writes the features, and draws a picture if one is named."""
    if picture:
        check_new(picture, ".png")
    if by_umap and not picture:
        raise RecipeError("--umap is how --picture is drawn: name a file for it")
    if by_umap and importlib.util.find_spec("umap") is None:
        raise RecipeError("--umap needs a package that is not installed: pip install umap-learn")
    found = embed(source, paths)
    if picture and len(found.files) < 3:
        raise RecipeError(f"--picture needs 3 images or more, not {len(found.files)}")
    write_features(found, file)
    number, size = found.features.shape
    result = {
        "file": str(file),
        "images": number,
        "features": size,
        "picture": picture and str(plot_features(found, picture, by_umap)),
    }
    drawn = f"\npicture  {picture}" if picture else ""
    return result, f"{file}: features of {number:,} images, float32 [{number}, {size}]{drawn}"


def principal_components(features: torch.Tensor, number: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """(the features along the directions in which they vary most [n, number], the share of the variance in each)."""
    centred = features.double() - features.double().mean(0)
    with keep_random_state():
        seed_all("pca")
        _, lengths, directions = torch.pca_lowrank(centred, q=min(number + 6, *centred.shape), center=False, niter=8)
    return centred @ directions[:, :number], lengths[:number].square() / centred.square().sum().clamp(min=1e-12)


def umap_points(features: torch.Tensor) -> np.ndarray:
    """UMAP's points [n, 2], whose neighbours are those of the features [n, d] (McInnes et al. 2018, arXiv 1802.03426)."""
    import umap

    few = len(features) < 20  # of which its own start, by eigenvectors, can't be computed
    kind = umap.UMAP(n_neighbors=min(15, len(features) - 1), init="random" if few else "spectral", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed leaves it one core
        return kind.fit_transform(features.numpy())


def plot_features(embedding: Embedding, file: Path, by_umap: bool = False) -> Path:
    """Draw the images by the two principal components of their features, or by UMAP, coloured by their folders."""
    points: Any
    if by_umap:
        points, labels = umap_points(embedding.features), ("UMAP: near images have like features, distances mean little", "")
    else:
        points, shares = principal_components(embedding.features)
        labels = f"first component, {shares[0]:.0%} of the variance", f"second component, {shares[1]:.0%}"
    folders = [Path(path).parent.name for path in embedding.files]
    names = sorted(set(folders), key=lambda name: (-folders.count(name), name))
    shown = names if len(names) <= COLOURED else names[: COLOURED - 1]
    figure, axes = new_figure()
    parts = [(shorten(name, 24), colour_of(i, len(shown)), {name}) for i, name in enumerate(shown)]
    if others := set(names) - set(shown):
        parts.append((f"{len(others)} more", (0.75, 0.75, 0.75), others))
    for label, colour, members in parts:
        rows = [row for row, folder in enumerate(folders) if folder in members]
        axes.scatter(points[rows, 0], points[rows, 1], s=14, alpha=0.7, linewidths=0, label=label, color=colour)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    words = "".join(shorten(name, 24) for name in shown)
    axes.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False, prop={"family": style(words)["fontfamily"]}
    )
    figure.suptitle(f"features of {len(embedding.files):,} images", fontsize="medium")
    return save_figure(figure, [axes], file)


def colour_of(number: int, total: int) -> tuple[float, ...]:
    """One of matplotlib's ten colours, or where there are more, of its twenty."""
    from matplotlib import colormaps

    return colormaps["tab10" if total <= 10 else "tab20"](number)
