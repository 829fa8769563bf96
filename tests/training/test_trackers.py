"""TensorBoard and Weights & Biases read back what was logged."""

import json
import struct
import time
from pathlib import Path

import pytest

from finetune.run import main
from finetune.training import logger as run_record
from helpers import Cut, cut_before, on_folder


def test_tensorboard_reads_back_what_was_logged(here, monkeypatch, image_folder):
    """TensorBoard's own reader finds each step's loss and lrs and each epoch's metrics once, though the run was cut."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [*on_folder(image_folder, "out"), "--track", "tensorboard"]
    with monkeypatch.context() as patched:
        patched.setattr(run_record, "FLUSH_EVERY", 1)
        cut_before(patched, "set_lrs", 11)  # two steps after the checkpoint of epoch 1
        with pytest.raises(Cut):
            main(arguments)
    assert main([*arguments, "--resume"]) == 0
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(Path("out/finetune"))).Reload()
    steps, epochs = [row for row in rows if "grad_norm" in row], [row for row in rows if "val_images" in row]
    for tag, key, kind, last in (
        ("train/loss", "loss", steps, 0),
        ("train/grad_norm", "grad_norm", steps, 0),
        ("val/top1", "top1", epochs, 1),
    ):
        expected = [(max(0, row["step"] - last), pytest.approx(row[key], rel=1e-6)) for row in kind]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected
    assert [e.value for e in events.Scalars("lr/stem")] == pytest.approx([row["lr"]["stem"] for row in steps])


def test_wandb_is_told_offline(here, monkeypatch):
    """Weights & Biases, offline, writes a file whose records, by its own protocol, have the recipe and every step's loss."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["--recipe", "resnet18_cifar", "--smoke", "--track", "wandb", "--output", "out"]) == 0
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    expected = [row["loss"] for row in rows if "grad_norm" in row]
    (file,) = Path("out").rglob("*.wandb")
    for _ in range(60):  # wandb's own process may still write, on a busy machine
        losses, config = told(file)
        if len(losses) == len(expected):
            break
        time.sleep(1)
    assert losses == pytest.approx(expected)
    assert config["optimizer.name"] == '"AdamW"'


def told(file):
    """The steps' losses and the config that wandb wrote, by its own protocol."""
    from wandb.proto import wandb_internal_pb2

    losses, config = [], {}
    for data in log_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        losses += [
            float(item.value_json)
            for item in record.history.item
            if "/".join(item.nested_key) == "train/loss" or item.key == "train/loss"
        ]
        for told_config in (record.run.config, record.config):
            config |= {item.key: item.value_json for item in told_config.update}
    return losses, config


def log_records(file):
    """The records of a file in LevelDB's log format: blocks of 32 KiB, chunks headed by checksum, length and kind."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if at + 7 + length > len(data):  # not yet written to its end
            return
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_a_tracker_that_is_not_there_is_said(here, capsys):
    """An unknown tracker, or one whose package is missing, ends in one message before training."""
    for name, fault in (("tensorbord", "Unsupported logging capability: tensorbord"), ("comet_ml", "pip install comet_ml")):
        assert main(["--recipe", "resnet18_cifar", "--smoke", "--track", name, "--output", "out"]) == 2
        assert fault in capsys.readouterr().err and not list(here.rglob("metrics.jsonl"))
