"""A trial's runs: how they are started, watched and stopped, and why they failed."""

import json

import pytest

from finetune.tuning import trials
from finetune.tuning.trials import Job, RunFailed, epoch_rows, follow, reason_of
from studies import stand_in


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(trials, "POLL", 0.02)


def test_a_run_is_followed_epoch_by_epoch(tmp_path):
    """After each epoch its metrics are there, half a line is not read, and in the end its result is returned."""
    seen = []
    result = follow(
        Job(tmp_path / "x.py", [], tmp_path / "run"), stand_in(pause=0.3), lambda rows: seen.append(len(rows)) or True
    )
    assert set(seen) >= {1, 2} and seen == sorted(seen) and result["epoch"] == 1


def test_a_run_that_is_not_to_go_on_is_stopped(tmp_path):
    """It gets SIGINT, as from Ctrl-C, and there is no result."""
    job = Job(tmp_path / "x.py", [], tmp_path / "run")
    assert follow(job, stand_in(pause=20), lambda rows: len(rows) < 1) is None
    assert (job.folder / "stopped").is_file() and job.result is None


def test_a_finished_run_is_not_started(tmp_path):
    """Its result is read."""
    job = Job(tmp_path / "x.py", [], tmp_path / "run")
    job.folder.mkdir()
    (job.folder / "result.json").write_text(json.dumps({"top1": 0.5}))
    assert follow(job, None, lambda rows: True) == {"top1": 0.5}


@pytest.mark.parametrize("changes,began", [(["lr_scale=7"], True), (["data.source=unreadable"], False)])
def test_a_run_that_fails_has_come_to_training_or_not(tmp_path, changes, began):
    """What it said is the reason."""
    with pytest.raises(RunFailed, match="loss of step 3 is nan" if began else "can't be read") as caught:
        follow(Job(tmp_path / "x.py", changes, tmp_path / "run"), stand_in(), lambda rows: True)
    assert caught.value.began == began


@pytest.mark.parametrize(
    "said,code,reason",
    [
        ("finetune: a note\nfinetune: the loss is nan\n  its images are 1, 2", 2, "the loss is nan"),
        ("finetune: this recipe is not valid:\n  epochs must be 1", 2, "this recipe is not valid: epochs must be 1"),
        ("Traceback (most recent):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\n", 1,
         "torch.OutOfMemoryError: CUDA out of memory"),
        ("", -9, "it was ended by SIGKILL: out of memory, perhaps"),
        ("", 3, "it ended with exit code 3"),
    ],
)  # fmt: skip
def test_why_a_run_failed(tmp_path, said, code, reason):
    """Its last message, a traceback's last line, a signal, or its exit code; not what an earlier attempt has said."""
    log = tmp_path / "run.log"
    log.write_text("finetune: before\n" + said)
    assert reason_of(log, len("finetune: before\n"), code) == reason


def test_metrics_of_no_run_are_none(tmp_path):
    """Nor are those of a linear probe an epoch's."""
    assert epoch_rows(tmp_path / "none") == []
    (tmp_path / "metrics.jsonl").write_text('{"epoch": -1, "val_images": 3}\n{"epoch": 0, "loss": 1}\n')
    assert epoch_rows(tmp_path) == []
