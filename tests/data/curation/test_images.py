"""Curation of images against planted faults and closed forms."""

from typing import Any

import numpy as np
import pytest

from frugal.data.curation.images import (
    ImageCuration,
    LabelNoise,
    curate_images,
    difference_hash,
    image_report,
    likely_wrong,
    near_pairs,
    neighbour_probabilities,
)
from frugal.data.image_difficulty import NeighbourLoss
from frugal.errors import UserError


def smooth(n: int, seed: int = 0) -> np.ndarray:
    """Images that differ in the large: [n, 1, 24, 24]."""
    coarse = np.random.default_rng(seed).integers(20, 235, (n, 1, 4, 4)).astype(np.uint8)
    return coarse.repeat(6, axis=2).repeat(6, axis=3)


def curated(images: np.ndarray, labels: Any, held_out: np.ndarray | None = None, **settings: Any) -> dict[int, str]:
    """Why each image was left out."""
    labels = np.asarray(labels)
    held_out = np.empty((0, *images.shape[1:]), np.uint8) if held_out is None else held_out
    names = [str(i) for i in range(len(labels))]
    classes = [str(i) for i in range(int(labels.max()) + 1)]
    config = ImageCuration(**{"examples": 99, **settings})
    kept, accounts = curate_images(images, labels, held_out, names, classes, config)
    out = {int(e["text"]): e["reason"] for account in accounts for e in account.examples}
    assert sorted(out) == [i for i in range(len(labels)) if i not in kept]
    return out


def test_blank_images_and_copies() -> None:
    images, held_out = smooth(12), smooth(3, seed=1)
    images[2] = 77
    images[5] = images[4]
    images[7] = images[6]
    images[9] = held_out[1]
    labels = [0, 1] * 6
    labels[5] = labels[4]  # 6 and 7 are copies with different labels
    assert curated(images, labels, held_out) == {
        2: "blank",
        5: "copy",
        6: "copies with different labels",
        7: "copies with different labels",
        9: "copy of a held-out image",
    }
    assert curated(images, labels, held_out, blank=0, duplicates=False) == {}


def test_near_copies_are_found_and_others_are_not() -> None:
    images, held_out = smooth(40), smooth(5, seed=1)
    images[7] = np.clip(images[6].astype(int) + 3, 0, 255)  # brighter
    images[9] = held_out[2] - 2
    images[9, 0, 0, 0] += 1
    assert curated(images, [0, 1] * 20, held_out, near_duplicates=3) == {
        7: "near-copy",
        9: "near-copy of a held-out image",
    }
    # A chain: what is left out does not throw out others.
    chain = smooth(2)[[0, 0, 0]]
    assert len(curated(np.stack([chain[0], chain[1] + 1, chain[2] + 2]), [0, 0, 0], near_duplicates=0)) == 2


def test_near_pairs_equal_comparing_all() -> None:
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2**63, 10, dtype=np.uint64)
    flips = np.uint64(1) << rng.integers(0, 64, (10, 8, 3)).astype(np.uint64)
    hashes = (centres[:, None] ^ flips[..., 0] ^ flips[..., 1] ^ flips[..., 2]).ravel()
    for distance in (0, 2, 5):
        expected = [
            (i, j) for i in range(80) for j in range(i + 1, 80) if int(hashes[i] ^ hashes[j]).bit_count() <= distance
        ]
        assert near_pairs(hashes, distance) == expected and (expected or distance == 0)


def test_the_difference_hash_knows_slopes_not_brightness() -> None:
    rising = np.tile(np.arange(0, 180, 10, dtype=np.uint8), (18, 1))[None, None]
    assert difference_hash(rising)[0] == np.uint64(2**64 - 1)
    assert difference_hash(rising[..., ::-1])[0] == 0
    assert difference_hash(smooth(3) + 5).tolist() == difference_hash(smooth(3)).tolist()


def test_confident_learning_by_hand() -> None:
    # Class 0's threshold is (0.9 + 0.7 + 0.2) / 3 = 0.6, class 1's (0.9 + 0.5) / 2 = 0.7.
    p = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9], [0.5, 0.5]])
    assert likely_wrong(p, np.array([0, 0, 0, 1, 1])).tolist() == [False, False, True, False, False]
    # An image that reaches no threshold is not judged; a class without images is never believed.
    p3 = np.concatenate((p * 0.5, np.full((5, 1), 0.5)), axis=1)
    assert not likely_wrong(p3, np.array([0, 0, 1, 1, 1]))[[4]].any()


def noisy(share: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two hundred images of four separable classes, some labels wrong."""
    rng = np.random.default_rng(0)
    truth = np.arange(200) % 4
    centres = smooth(4, seed=3).astype(int)
    images = np.clip(centres[truth] + rng.normal(0, 12, (200, 1, 24, 24)), 0, 255).astype(np.uint8)
    wrong = rng.random(200) < share
    return images, np.where(wrong, (truth + 1) % 4, truth), wrong


def test_planted_wrong_labels_are_found() -> None:
    images, labels, wrong = noisy()
    found = curated(images, labels, label_noise=LabelNoise(folds=5, neighbours=7))
    assert set(found.values()) == {"label likely wrong"}
    assert sorted(found) == np.nonzero(wrong)[0].tolist()
    loss = NeighbourLoss(neighbours=7).score(images, labels, 4)
    assert loss[wrong].min() > loss[~wrong].max()


def test_neighbours_do_not_know_the_image_itself() -> None:
    """A label that agrees with nothing nearby gets next to no probability, however often it is asked."""
    images, labels, wrong = noisy()
    p = neighbour_probabilities(images, labels, 4, folds=5, neighbours=7)
    assert p.sum(axis=1) == pytest.approx(1) and p.shape == (200, 4)
    assert np.array_equal(p, neighbour_probabilities(images, labels, 4, folds=5, neighbours=7))
    assert p[np.arange(200), labels][wrong].max() < 0.5


def test_the_report_counts_by_class() -> None:
    images, labels = smooth(10), np.array([0] * 5 + [1] * 5)
    images[1] = images[0]
    kept, accounts = curate_images(images, labels, images[:0], [str(i) for i in range(10)], ["a", "b"], ImageCuration())
    report = image_report(labels, kept, ["a", "b"], accounts, 1.0)
    assert report["coverage"]["class"]["a"] == {"documents": 5, "dropped": 1, "share": 0.2}
    assert report["coverage"]["class"]["b"]["dropped"] == 0
    assert [row["dropped"] for row in report["filters"]] == [0, 1] and report["documents_out"] == 9


def test_a_class_that_vanishes_is_refused() -> None:
    images = smooth(6)
    images[3:] = 9
    with pytest.raises(UserError, match=r"data\.curation: nothing is left of class 1"):
        curated(images, [0, 0, 0, 1, 1, 1])
    with pytest.raises(UserError, match=r"5 folds need at least 10 images, got 6"):
        curated(smooth(6), [0, 0, 0, 1, 1, 1], label_noise=LabelNoise())
    with pytest.raises(UserError, match=r"data\.curation\.near_duplicates: must lie in \[0, 16\]"):
        ImageCuration(near_duplicates=30)
