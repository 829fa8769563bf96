"""Whether a server answers."""

import urllib.error
import urllib.request

from finetune.utils.errors import RecipeError

OFFLINE = (
    "  weights you have as a file: --weights FILE.safetensors; none at all: --weights none\n"
    "  a recipe that needs no network: efficientnet_lite0_digits"
)


def reach(url: str, what: str, remedy: str = OFFLINE) -> None:
    """Raise RecipeError, within seconds, unless a server answers at `url`; honours proxy settings."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=8).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        raise RecipeError(f"can't reach {what} ({getattr(error, 'reason', error)})\n{remedy}") from None
