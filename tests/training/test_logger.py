"""What a run says in the terminal."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from finetune.recipe import AdamW, Data, Group, LinearProbe
from finetune.training import logger as run_record
from finetune.training.logger import Logger
from finetune.training.loop import train
from finetune.training.setup import RunOptions
from helpers import ALL, Coloured, Cut, cut_before, prepare, run_here, small_recipe


@pytest.mark.parametrize("metric", ["top1", "macro_f1", "mean_average_precision"])
def test_an_epochs_line_has_the_best_and_the_time_left(tmp_path, monkeypatch, capsys, metric):
    """Epochs count from 1, the best includes the linear probe, the time left is that of the epochs done; 80 columns hold it."""
    clock = [100.0]
    monkeypatch.setattr(run_record, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    loss = "multi_label" if metric == "mean_average_precision" else "cross_entropy"
    log = Logger(tmp_path, Accelerator(cpu=True), small_recipe(metric=metric, loss=loss, epochs=1000))
    log.start()
    clock[0] += 50
    log.log_linear_probe({"loss": 12.3456, metric: 1.0})
    for epoch, score in ((0, 0.5), (1, 0.25)):
        clock[0] += 3000 if epoch else 1000
        log.log_epoch(0, epoch, {"loss": 2.0, metric: score}, torch.zeros(1), torch.zeros(1))
    head, probe, first, second = capsys.readouterr().out.splitlines()
    assert max(map(len, (head, probe, first, second))) <= 80 and head.endswith("best  time left")
    assert probe.split() == ["linear", "probe", "12.3456", "100.00%", "100.00%"]
    assert first.startswith("epoch 1 of 1000 ") and first.split()[-5:] == ["2.0000", "50.00%", "100.00%", "277.5", "h"]
    assert second.startswith("epoch 2 of 1000 ") and second.split()[-2:] == ["554.4", "h"]  # 998 x 2000 s


ROWS = (Group("head", "fc", lr=1e-2), Group("rest", ".", lr=1e-3, unfreeze_at=1))


def test_the_files_count_from_0_and_the_terminal_from_1(tmp_path, capsys):
    """Of a run with a probe: the lines of epochs, and of stages, are those of metrics.jsonl with one added."""
    _, rows = run_here(small_recipe(backbone="test_resnet", head=None, linear_probe=LinearProbe(), groups=ROWS), tmp_path)
    out = capsys.readouterr().out
    assert [row["epoch"] for row in rows if "val_images" in row] == [-1, 0, 1, 2, 3]
    assert re.findall(r"^epoch (\d) of 4 ", out, re.M) == ["1", "2", "3", "4"]
    assert re.findall(r"^from epoch (\d): trains", out, re.M) == ["1", "2"] and out.count("time left") == 1


def test_a_quiet_run_says_nothing(tmp_path, monkeypatch, capsys):
    """Nor does it draw a bar in a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    recipe = small_recipe()
    net, _, datasets = prepare(recipe)
    accelerator = Accelerator(cpu=True)
    train(recipe, net, datasets, Logger(tmp_path, accelerator, recipe, quiet=True), accelerator, RunOptions(quiet=True))
    assert capsys.readouterr() == ("", "")


def test_an_epochs_training_loss_is_the_mean_over_its_images(tmp_path, monkeypatch):
    """A short last batch counts as its images do, also where the epoch was broken off and resumed."""
    labels = [i % 2 for i in range(21)]
    source = lambda: (Coloured(labels), Coloured(labels[:6]))  # noqa: E731
    recipe = small_recipe(data=Data(source, image_size=24, batch_size=8), groups=ALL, optimizer=AdamW(), epochs=2)
    with monkeypatch.context() as patched:
        cut_before(patched, "set_lrs", 6)
        with pytest.raises(Cut):
            run_here(recipe, tmp_path, checkpoint_every=1)
    rows = run_here(recipe, tmp_path)[1]
    for epoch in range(2):
        losses = [row["loss"] for row in rows if "grad_norm" in row and row["epoch"] == epoch]
        (logged,) = [row["train_loss"] for row in rows if "train_loss" in row and row["epoch"] == epoch]
        assert logged == pytest.approx(np.average(losses, weights=[8, 8, 5]), rel=1e-6)
