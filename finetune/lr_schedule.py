"""Where schedules were in version 0.1, for recipes copied from it; removed in 0.3. Import them from finetune."""

from finetune.recipe.legacy import Polynomial  # noqa: F401
from finetune.recipe.schedules import *  # noqa: F403
