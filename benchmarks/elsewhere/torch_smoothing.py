"""99 images of one class, one of another: which class does the balanced and smoothed loss ask for, of an image of the 99?

Theirs: torch's CrossEntropyLoss with weight and label_smoothing. Ours: the same two fields of a recipe.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch

from finetune.optim.loss import Criterion

WEIGHTS = torch.tensor([100 / (2 * 99), 100 / 2])  # scikit-learn's "balanced"


def asked_for(loss: Any) -> str:
    """The class that is right at the minimum of the loss of one image of the large class."""
    logits = torch.zeros(1, 2, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(logits, torch.tensor([0]))
        value.backward()
        return value

    optimizer.step(closure)
    probs = logits.softmax(1)[0].tolist()
    return f"the {'large' if probs[0] > probs[1] else 'rare'} class, with probability {max(probs):.2f}"


recipe = SimpleNamespace(loss="cross_entropy", label_smoothing=0.1)
ours = SimpleNamespace(recipe=recipe, class_weights=WEIGHTS)
theirs = torch.nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1)
found = {"theirs": asked_for(theirs), "ours": asked_for(lambda *args: Criterion.loss(ours, *args))}
print(json.dumps({**found, "versions": f"torch {torch.__version__}"}))
