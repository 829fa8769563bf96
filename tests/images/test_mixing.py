"""Balanced sampling, mixup and cutmix."""

import math

import numpy as np
import pytest
import timm.data
import timm.layers
import timm.loss
import torch
from torch.nn.functional import one_hot

from finetune.data.batches import Cut, balanced_sample_weights, plan_epoch
from finetune.data.loader import ImageDataset
from finetune.images.mixing import mix_neighbours
from finetune.recipe import Augment, Data
from finetune.training import setup
from finetune.utils.seed import seed_all
from helpers import ALL, Coloured, assert_same_weights, plain, run_here, small_recipe


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}], ids=str)
def test_neighbours_are_mixed_as_timm_mixes(alphas):
    """Each pair of neighbours comes out as timm's Mixup of that pair alone under the same draw; a last odd one stays itself."""
    mixup = timm.data.Mixup(alphas.get("mixup", 0), alphas.get("cutmix", 0), label_smoothing=0.0, num_classes=10)
    images, labels = torch.randn(7, 3, 16, 16), torch.randint(0, 10, (7,))
    for key in range(4):
        mixed, targets = mix_neighbours(mixup, images.clone(), labels, (0, key))
        order = [0, 2, 4, 6, 5, 3, 1]
        for first in (0, 2, 4):
            seed_all("mix", 0, key)
            theirs, soft = mixup(images[first : first + 2].clone(), labels[first : first + 2])
            for i in (0, 1):
                at = order.index(first + i)
                assert torch.equal(mixed[at], theirs[i]) and torch.equal(targets[at], soft[i])
        torch.testing.assert_close(mixed[3], images[6])
        assert targets[3, labels[6]] == pytest.approx(1.0)


@pytest.mark.parametrize("count", [6, 7])
def test_several_labels_an_image_mix_as_one_does(count):
    """Labels given as rows of 0 and 1 come out mixed as the same labels given as numbers, which timm mixes itself."""
    of_one, of_several = (timm.data.Mixup(0.4, 1.0, label_smoothing=0.0, num_classes=10) for _ in range(2))
    images, labels = torch.randn(count, 3, 16, 16), torch.randint(0, 10, (count,))
    for key in range(4):
        one, targets = mix_neighbours(of_one, images.clone(), labels, (0, key))
        several, rows = mix_neighbours(of_several, images.clone(), one_hot(labels, 10), (0, key))
        assert torch.equal(one, several) and torch.equal(targets, rows)


@pytest.mark.parametrize("processes,accumulate", [(1, 2), (2, 1), (1, 3), (3, 2), (4, 1)])
def test_pairs_stay_together_however_a_batch_is_cut(processes, accumulate):
    """Over all micro-batches the same pairs come together, in the same steps, as in whole batches."""

    def pairs(processes, accumulate):
        found = []
        cuts = [Cut(process, processes, accumulate) for process in range(processes)]
        for step in zip(*(plan_epoch(23, 12, 0, 1, cut, pairs=True) for cut in cuts), strict=True):
            parts = [part for plan in step if plan.weight for part in plan.micro_batches]
            assert sorted(i for part in parts for i in part) == sorted(step[0].images)
            found.append({tuple(part[i : i + 2]) for part in parts for i in range(0, len(part), 2)})
        return found

    assert pairs(processes, accumulate) == pairs(1, 1)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_mixed_run_is_the_same_however_it_is_cut(tmp_path, accumulate):
    """Mixup and cutmix with accumulation give the weights of whole batches, and other weights than without mixing."""
    recipe = plain(augment=Augment(mixup=0.4, cutmix=1.0))
    whole, _ = run_here(recipe, tmp_path / "whole")
    assert_same_weights(run_here(recipe, tmp_path / "cut", accumulate=accumulate)[0], whole.state_dict())
    unmixed, _ = run_here(plain(), tmp_path / "unmixed")
    assert (whole.fc.weight - unmixed.fc.weight).abs().max() > 1e-3


def test_balanced_sampling_draws_each_class_equally():
    """Of an uneven set each class is drawn equally often, as many images as there are; each epoch has its own draw."""
    labels = np.array([0] * 700 + [1] * 200 + [2] * 100)
    weights = balanced_sample_weights(labels)
    draw = [i for plan in plan_epoch(1000, 64, 0, 3, sample_weights=weights) for i in plan.images]
    assert len(draw) == 1000 and len(set(draw)) < 1000
    drawn = np.bincount(labels[draw])
    assert abs(drawn - 1000 / 3).max() < 4 * math.sqrt(1000 * 1 / 3 * 2 / 3)  # four standard deviations of a binomial
    again, other = (
        [i for plan in plan_epoch(1000, 64, 0, epoch, sample_weights=weights) for i in plan.images] for epoch in (3, 4)
    )
    assert draw == again != other


def test_balanced_sampling_reaches_the_run(tmp_path):
    """The rare class of an uneven folder is seen as often as the common one."""
    seen = []

    class Watching(ImageDataset):
        def __getitem__(self, key):
            seen.extend([self.labels()[key[1]]] * (len(self) == 45))  # not the validation images
            return super().__getitem__(key)

    def uneven():
        train = Coloured([0] * 40 + [1] * 5)
        return train, Coloured([0, 1, 0, 1])

    recipe = small_recipe(groups=ALL, epochs=8, data=Data(uneven, 24, 8, sampling="balanced"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setup, "ImageDataset", Watching)
        run_here(recipe, tmp_path)
    assert len(seen) == 8 * 45 and abs(sum(seen) - 180) < 4 * math.sqrt(360 / 4)  # four standard deviations of a binomial
