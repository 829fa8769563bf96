"""A run that goes on after something changed: it is refused, or trains what is left of it."""

import shutil
from collections import Counter

import numpy as np
import pytest

from finetune.data.dataset import ImageList, fingerprint
from finetune.recipe import AdamW, Data
from finetune.run import main
from finetune.training import loop as train_loop
from helpers import ALL, Coloured, Cut, cut_before, on_folder, run_here, small_recipe


def coloured(num_images, batch_size=8):
    """Four epochs on so many images."""
    labels = [i % 2 for i in range(num_images)]
    source = lambda: (Coloured(labels), Coloured(labels[:6]))  # noqa: E731
    return small_recipe(data=Data(source, image_size=24, batch_size=batch_size), groups=ALL, optimizer=AdamW())


@pytest.mark.parametrize("call,done", [(7, 6), (9, 8)], ids=["in an epoch", "between two"])
@pytest.mark.parametrize("num_images,batch_size", [(16, 8), (64, 8), (32, 16), (32, 4), (32, 5)])
def test_with_other_images_or_another_batch_the_steps_that_are_left_are_taken(
    tmp_path, monkeypatch, capsys, num_images, batch_size, call, done
):
    """Every whole epoch that is left has all its steps, the running one the share that is left, and a sentence says so."""
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", call)
        with pytest.raises(Cut):
            run_here(coloured(32), tmp_path, checkpoint_every=1)
    recipe = coloured(num_images, batch_size)
    steps = recipe.data.steps_per_epoch(num_images)
    taken, real = Counter(), train_loop.train_step

    def counting(recipe, model, criterion, optimizer, batch, accelerator):
        taken[batch.plan.step // steps] += 1
        return real(recipe, model, criterion, optimizer, batch, accelerator)

    monkeypatch.setattr(train_loop, "train_step", counting)
    _, rows = run_here(recipe, tmp_path)
    left = -(-steps * (4 - done % 4) // 4)
    assert taken == Counter({1 + done // 8: left, 2 + done // 8: steps, 3: steps})
    assert [row["epoch"] for row in rows if "train_loss" in row] == [0, 1, 2, 3]
    assert f"an epoch now has {steps} steps, not 4" in capsys.readouterr().out


def test_a_fingerprint_tells_sets_of_images_apart(tmp_path):
    """Names, labels, classes, order and pixels in memory count; the folder that the files lie in does not."""
    paths, classes = [tmp_path / "a" / f"{i}.png" for i in range(4)], ("ant", "bee")
    moved = [str(tmp_path / "b" / path.name) for path in paths]
    pixels = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)

    def found(items, labels=(0, 1, 0, 1), classes=classes):
        return fingerprint(ImageList(items, labels, None), classes)

    assert found(moved) == found(paths) and found(paths).startswith("4 ")
    others = [found(paths[::-1]), found(paths, (0, 1, 1, 0)), found(paths, classes=("ant", "wasp")), found(paths[:2], (0, 1))]
    others += [found(pixels), found(255 - pixels), found([*paths[:3], paths[0]]), found(range(4)), found(range(1, 5))]
    assert len({found(paths), *others}) == len(others) + 1
    assert fingerprint(Coloured([0, 1]), classes) != fingerprint(Coloured([1, 1]), classes)


@pytest.mark.parametrize(
    "change,fault",
    [
        (lambda root: (root / "train" / "red" / "0.png").unlink(), "training images: 30 before, 29 now"),
        (lambda root: (root / "val" / "red" / "0.png").rename(root / "val" / "red" / "x.png"), "15 before, 15 now: others"),
    ],
)
def test_other_images_are_refused_unless_told_otherwise(tmp_path, monkeypatch, capsys, image_folder, change, fault):
    """A run goes on with the images that it was started on; with --resume-anyway with those that there are."""
    root, output = tmp_path / "images", tmp_path / "run"
    shutil.copytree(image_folder, root)
    words = on_folder(root, output, "epochs=2")
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", 6)
        with pytest.raises(Cut):
            main(words)
    change(root)
    assert main([*words, "--resume"]) == 2
    assert fault in capsys.readouterr().err and not (output / "result.json").exists()
    assert main([*words, "--resume", "--resume-anyway"]) == 0
