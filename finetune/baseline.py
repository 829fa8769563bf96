"""A line that recipes of version 0.1 have, and that nothing reads; removed in 0.3."""

from typing import Any


def Baseline(**fields: Any) -> None:
    """Take what stood in a recipe: its number now stands in its record and its docstring."""
