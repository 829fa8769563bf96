"""A recipe's own augmentation: called with an image and a generator, tried before a run, sent to loader processes."""

import pickle
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from finetune.images.decode import to_rgb
from finetune.recipe.serialize import function_name
from finetune.utils.errors import RecipeError, first_line
from finetune.utils.seed import seed_cpu


class OwnFunction:
    """A recipe's own augmentation: `function(image, rng)` of a photograph of PIL's, or of an array, and a numpy Generator."""

    def __init__(self, function: Callable[[Any, Any], Any]):
        self.function, self.name = function, f"augment.function: {function_name(function)}"

    def __call__(self, pixels: np.ndarray, seed: int, where: str) -> np.ndarray:
        """What it makes of pixels [H, W, channels], which may have other sides; all that it may draw from is seeded.

        Raises:
            RecipeError: if it fails or returns no such image; `where` names the one it was given.
        """
        seed_cpu(seed)
        photograph = pixels.dtype == np.uint8 and pixels.shape[2] == 3
        try:
            image = self.function(Image.fromarray(pixels) if photograph else pixels.copy(), np.random.default_rng(seed))
            found = np.require(to_rgb(image) if isinstance(image, Image.Image) else image, requirements="W")  # as torch asks
        except Exception as error:  # whatever a person's function raises is theirs to mend
            place = "".join(f"{frame.filename}:{frame.lineno}: " for frame in traceback.extract_tb(error.__traceback__)[1:2])
            text = f"{self.name} failed on {where}: {place}{type(error).__name__}: {first_line(error)}"
            raise RecipeError(text, one_process=True) from error
        if found.dtype != pixels.dtype or found.ndim != 3 or found.shape[2] != pixels.shape[2] or not found.size:
            kind = "None" if image is None else type(image).__name__
            shape = f" {list(found.shape)} of {found.dtype}" if found.ndim else ""
            wanted = f"{'a PIL image or ' * photograph}an array [height, width, {pixels.shape[2]}] of {pixels.dtype}"
            raise RecipeError(f"{self.name} must return {wanted}; of {where} it returned {kind}{shape}", one_process=True)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """For a loader process that is started afresh."""
        try:
            pickle.dumps(self.function)
        except Exception as error:  # pickle has several for it
            text = f"{self.name} can't be sent to loader processes: write it as a def of the recipe's file, or --workers 0"
            raise RecipeError(text) from error
        return OwnFunction, (self.function,)

    def try_on(self, read: Callable[[int], tuple[np.ndarray, Any]], number: int) -> None:
        """Raise RecipeError if, of some of the images that `read` gives, it fails or makes two things from the same draws."""
        for index in {0, number // 2, number - 1}:
            try:
                pixels, _ = read(index)
            except (OSError, RecipeError):
                continue  # it is named where it is trained on
            first, again = (self(pixels, 0, f"image {index}") for _ in range(2))
            if not np.array_equal(first, again):
                raise RecipeError(
                    f"{self.name} made two different images of image {index} with the same rng: draw from rng, or seed the "
                    "library's own generator with what you draw from it"
                )
