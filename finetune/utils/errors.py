"""The one exception for what a person can put right, and what other errors say in a line."""

import sys
import traceback


class RecipeError(ValueError):
    """What the author of a recipe, or the person at the keyboard, can put right.

    `one_process`: only the process that raised it knows, so that one must speak.
    """

    def __init__(self, text: str, one_process: bool = False):
        super().__init__(text)
        self.one_process = one_process


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def free_frames(error: Exception) -> None:
    """Free what the frames of an error hold, such as torch's iterator, half made: its `__del__` ends the loader processes, and
    then fails on what it has not got, which Python would print."""
    shown, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = shown
