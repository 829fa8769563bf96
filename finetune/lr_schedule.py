"""The schedules under the name they had in version 0.1; removed in 0.3. Import them from finetune."""

from finetune.recipe.schedules import *  # noqa: F403
