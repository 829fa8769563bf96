"""The one exception for what a person can put right."""


class RecipeError(ValueError):
    """What the author of a recipe, or the person at the keyboard, can put right.

    `one_process`: only the process that raised it knows, so that one must speak.
    """

    def __init__(self, text: str, one_process: bool = False):
        super().__init__(text)
        self.one_process = one_process
