"""Pairs of images that are nearly the same, by pixels or by features."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from finetune.tools.similar import CLOSER, COSINE, alike_pairs, near_pairs, thumbnail
from image_files import CHANGES, TILES


@pytest.mark.parametrize("change", CHANGES)
def test_near_duplicates_are_found_however_they_were_made(change):
    """Of 42 cuts of two photographs each changed copy is found beside its original, and no other pair is."""
    thumbs = [thumbnail(tile) for tile in TILES] + [thumbnail(CHANGES[change](tile).convert("RGB")) for tile in TILES]
    assert {pair[:2] for pair in near_pairs(thumbs)} == {(i, i + len(TILES)) for i in range(len(TILES))}


def test_flat_images_are_not_near_one_another():
    """Images that show nothing are blank, not duplicates; a single image has no pair."""
    noise = np.random.RandomState(0).randint(0, 3, (5, 32, 32, 3)).astype(np.uint8)
    assert near_pairs(list(noise)) == [] == near_pairs([thumbnail(TILES[0])])


def test_alike_pairs_are_far_closer_than_scikit_learns_tenth_neighbours():
    """Planted pairs and triples are found; not what lies in a dense crowd, however near. All by scikit-learn's neighbours."""
    random = np.random.RandomState(0)
    features = np.concatenate([random.randn(200, 32), 8 * np.eye(32)[:1] + 0.5 * random.randn(30, 32)])
    copies = features[:12] + 0.2 * random.randn(12, 32)
    features = np.concatenate([features, copies, features[:1] + 0.2 * random.randn(1, 32)])
    found = alike_pairs(torch.from_numpy(features))
    planted = {(i, 230 + i) for i in range(12)} | {(0, 242), (230, 242)}
    assert {pair[:2] for pair in found} == planted
    centred = features - features.mean(0)
    distances, others = NearestNeighbors(n_neighbors=11, metric="cosine").fit(centred).kneighbors(centred)
    assert all(distances[i, list(others[i]).index(j)] == pytest.approx(distance, abs=1e-4) for i, j, distance in found)
    assert all(distance <= CLOSER * min(distances[i, 10], distances[j, 10]) for i, j, distance in found)
    assert (distances[200:230, 1:] <= 1 - COSINE).all()  # the crowd is near enough, but each of it to all of it
    assert alike_pairs(torch.from_numpy(features[:10])) == []
