"""A line that recipes of version 0.1 have, and that nothing reads; removed in 0.3."""

import warnings
from typing import Any


def Baseline(**fields: Any) -> None:
    """Take what stood in a recipe: its number now stands in its record and its docstring."""
    warnings.warn("baseline = Baseline(...) is no longer read: please delete it", FutureWarning, stacklevel=2)
