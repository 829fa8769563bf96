"""Random seeds made of what is drawn for: an epoch, an image, a step; never of what was drawn before."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def keyed_seed(*key: int | str) -> int:
    """A 32-bit seed from a key: what is drawn for an image or a step never depends on what was drawn before."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")


def seed_all(*key: int | str) -> None:
    """Seed Python's, numpy's and torch's generators with the key; nothing here relies on what they held before."""
    number = keyed_seed(*key)
    seed_cpu(number)
    if torch.accelerator.is_available():
        torch.manual_seed(number)


def seed_cpu(number: int) -> None:
    """Seed what is drawn on the CPU; torch.manual_seed also notes a seed for devices, which takes far longer."""
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Give the generators of Python, numpy and torch their state back in the end."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
