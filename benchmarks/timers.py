"""Seconds that parts of a program take, added up by name while it runs."""

import time
from collections.abc import Callable


def timed(spent: dict[str, float], name: str, function: Callable) -> Callable:
    """The function, which adds the seconds of each call to `spent[name]`."""

    def call(*args, **options):
        start = time.perf_counter()
        result = function(*args, **options)
        spent[name] += time.perf_counter() - start
        return result

    return call
