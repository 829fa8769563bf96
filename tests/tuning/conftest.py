"""For the tests of what is suggested."""

import pytest


@pytest.fixture(autouse=True)
def no_bf16(monkeypatch):
    """Suggestions without bf16, whatever this machine has, and without the steps that find out."""
    monkeypatch.setattr("finetune.tuning.suggest.choose_precision", lambda recipe: ("no", "not tried"))
