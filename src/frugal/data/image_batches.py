"""Which images are in which batch: pure functions of the seed and the sample's number.

Shape letters: M images of a split, B images of a batch, C channels, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from frugal.data.adaptive import Bands
from frugal.data.batches import IGNORE
from frugal.data.curriculum import PacedOrder, ResolutionStage, resolution_at
from frugal.data.mixture import Mixer
from frugal.data.transforms.base import SampleClock


def resized(images_BCSS: Tensor, size: int) -> Tensor:
    """Float images at another size, antialiased."""
    if images_BCSS.shape[-1] == size:
        return images_BCSS
    return torch.nn.functional.interpolate(images_BCSS, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


def _floats(images: np.ndarray, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images[rows])).float() / 255


class TrainingImages(Dataset[dict[str, Tensor]]):
    """The training images, indexed over the whole run; sample n is number n % M of epoch n // M.

    Args:
        images: uint8 [N, C, S, S], of all splits.
        labels: int64 [N].
        rows: which of them train, [M].
        seed: decides each epoch's order.
        clock: which step sees a sample.
        paced: a curriculum's order; null: the usual one.
        resolutions: stages of smaller images.
        bands: with `mixer`, bands of difficulty that an adaptive curriculum chooses among.
        mixer: which band each sample comes from.
    """

    size_name = "pixels of a side"

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        rows: np.ndarray,
        seed: int,
        clock: SampleClock = SampleClock(),  # noqa: B008 (frozen)
        paced: PacedOrder | None = None,
        resolutions: Sequence[ResolutionStage] = (),
        bands: Bands | None = None,
        mixer: Mixer | None = None,
    ) -> None:
        self.images, self.labels, self.rows, self.seed = images, labels, rows, seed
        self.clock, self.paced, self.resolutions = clock, paced, list(resolutions)
        self.bands, self.mixer = bands, mixer
        self._order = lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.rows))

    def locate(self, index: int) -> int:
        """Which training image sample `index` is, in [0, M)."""
        if self.mixer is not None and self.bands is not None:
            return self.bands.sequence(*self.mixer.locate(index))
        if self.paced and (drawn := self.paced.draw(index, self.clock.at(index))) is not None:
            return drawn
        epoch, position = divmod(index, len(self.rows))
        return int(self._order(epoch)[position])

    def scored(self, index: int) -> tuple[int, int]:
        """There is one source; and which of its scored images sample `index` is."""
        return 0, self.locate(index)

    def size_at(self, step: int) -> int:
        """Pixels of a side."""
        return resolution_at(self.resolutions, self.images.shape[-1], step)

    def epochs(self, drawn: int) -> np.ndarray:
        """How often `drawn` samples go through the training images, [1]."""
        return np.array([drawn / len(self.rows)])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch: `images` float [B, C, s, s] in [0, 1], `labels` [B], and `index` [B], the samples' numbers."""
        rows = self.rows[[self.locate(index) for index in indices]]
        size = self.size_at(self.clock.at(indices[0]))
        batch = {
            "images": resized(_floats(self.images, rows), size),
            "labels": torch.from_numpy(self.labels[rows]),
            "index": torch.tensor(indices),
        }
        if self.mixer is not None:
            batch["groups"] = torch.tensor([self.mixer.locate(index)[0] for index in indices])
        return batch

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._draw)


class EvaluationImages(Dataset[dict[str, Tensor]]):
    """Each image of a split once; numbers beyond the end are blank images with label -100.

    Ranks that run out of images get those, so that all ranks have the same number of batches.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
        self.images, self.labels, self.rows = images, labels, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch: `images` float [B, C, S, S] in [0, 1] and `labels` [B]."""
        there = torch.tensor([index < len(self.rows) for index in indices])
        rows = self.rows[[min(index, len(self.rows) - 1) for index in indices]]
        images, labels = _floats(self.images, rows), torch.from_numpy(self.labels[rows])
        return {"images": images * there[:, None, None, None], "labels": torch.where(there, labels, IGNORE)}
