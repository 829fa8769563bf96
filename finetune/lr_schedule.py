"""Where schedules were in version 0.1, for recipes copied from it; removed in 0.3."""

import warnings

from finetune.recipe.legacy import Polynomial  # noqa: F401
from finetune.recipe.schedules import *  # noqa: F403

warnings.warn("finetune.lr_schedule is now finetune: from finetune import Cosine, ...", FutureWarning, stacklevel=2)
