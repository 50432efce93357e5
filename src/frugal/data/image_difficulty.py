"""How hard each training image is: found once, cached beside the prepared images, and charged to every run.

Shape letters: M training images, C channels, S pixels of a side.
"""

from __future__ import annotations

import hashlib
import zlib
from abc import abstractmethod

import numpy as np

from frugal.data.curation.images import neighbour_probabilities
from frugal.data.difficulty import Difficulty, Scorer, cached_scores
from frugal.data.image_store import PreparedImages
from frugal.errors import require

VERSION = 1  # part of the cache's key: raise it when a score changes


class ImageScorer(Scorer):
    """Something that has an opinion on how hard labelled images are."""

    @abstractmethod
    def score(self, images_MCSS: np.ndarray, labels_M: np.ndarray, n_classes: int) -> np.ndarray:
        """Difficulty of each image, float64 [M]; higher is harder.

        Args:
            images_MCSS: uint8.
            labels_M: class numbers.
            n_classes: of all.

        Raises:
            UserError: it cannot judge such images.
        """


class NeighbourLoss(ImageScorer):
    """Loss of the label, in nats, by the image's nearest neighbours in the other folds: needs no model trained before.

    Args:
        folds: parts of the cross-validation.
        neighbours: how many neighbours vote.
    """

    def __init__(self, folds: int = 5, neighbours: int = 10) -> None:
        require(folds >= 2 and neighbours >= 1, "reference: folds must be at least 2 and neighbours at least 1")
        self.folds, self.neighbours = folds, neighbours

    def fingerprint(self) -> str:
        """Its settings."""
        return f"neighbours {self.folds} {self.neighbours}"

    def score(self, images_MCSS: np.ndarray, labels_M: np.ndarray, n_classes: int) -> np.ndarray:
        """Minus the logarithm of the label's probability."""
        p = neighbour_probabilities(images_MCSS, labels_M, n_classes, self.folds, self.neighbours)
        return -np.log(p[np.arange(len(labels_M)), labels_M])


def require_image_difficulty(kind: Difficulty, reference: Scorer | None) -> None:
    """Refuse a difficulty that only text has.

    Raises:
        UserError: naming the key.
    """
    require(
        kind in ("loss", "compressibility", "random"),
        f"data.curriculum.difficulty (data.adaptive.by): images have loss, compressibility and random, not {kind}",
    )
    require(
        reference is None or isinstance(reference, ImageScorer),
        f"data.curriculum.reference: {type(reference).__name__} scores text, not images",
    )


def image_difficulty(
    prepared: PreparedImages, rows_M: np.ndarray, kind: Difficulty, reference: Scorer | None, seed: int
) -> tuple[np.ndarray, float]:
    """Difficulty of the training images, float64 [M], and the seconds that finding it took (cached).

    Args:
        prepared: all images.
        rows_M: which of them train.
        kind: loss by `reference`, compressibility (size after zlib), or random, the control.
    """
    facts = [VERSION, kind, seed if kind == "random" else 0, reference.fingerprint() if reference else ""]
    facts.append(hashlib.sha256(rows_M.tobytes()).hexdigest())

    def compute() -> list[np.ndarray]:
        images = np.asarray(prepared.images[rows_M])
        if isinstance(reference, ImageScorer):
            return [reference.score(images, prepared.labels[rows_M], len(prepared.class_names))]
        if kind == "random":
            return [np.random.Generator(np.random.Philox(key=[seed, 1 << 62])).random(len(rows_M))]
        return [np.array([len(zlib.compress(image.tobytes(), 6)) / image.nbytes for image in images])]

    (scores,), seconds = cached_scores(prepared.folder, facts, compute)
    return scores, seconds
