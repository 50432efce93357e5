"""Which tokens are in which batch: pure functions of the seed and the batch's number."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from frugal.data.transforms.base import SampleClock, TextTransforms
from frugal.errors import UserError

IGNORE = -100


class TrainingSequences(Dataset[dict[str, Tensor]]):
    """Sequences of a token stream, indexed over the whole run: index i is position i % n of epoch i // n.

    Each epoch has its own order and its own offset of the cuts, both functions of (seed, epoch), so that later
    epochs do not repeat the very same sequences.

    Args:
        tokens: the stream, [tokens].
        seq_len: T, tokens per sequence.
        seed: decides orders and offsets.
        transforms: augmentation of each sequence; none by default.
        clock: which step sees a sample, for the transforms' schedules.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        seed: int,
        transforms: TextTransforms | None = None,
        clock: SampleClock = SampleClock(),  # noqa: B008 (frozen)
    ) -> None:
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.transforms, self.clock = transforms, clock
        # For every offset below seq_len there must be room, and each sequence needs its last label.
        self.per_epoch = (len(tokens) - 1) // seq_len - 1
        if self.per_epoch < 1:
            raise UserError(
                f"data.seq_len: {seq_len} is too long for {len(tokens)} training tokens; two sequences must fit"
            )
        self._plan = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        return rng.permutation(self.per_epoch), int(rng.integers(self.seq_len))

    def start(self, index: int) -> int:
        """Where sequence `index` begins in the stream."""
        epoch, position = divmod(index, self.per_epoch)
        order, offset = self._plan(epoch)
        return int(order[position]) * self.seq_len + offset

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch: `input_ids` and `labels` [B, T]; labels[t] follows input_ids[t] unless transforms hide it."""
        if self.transforms is not None:
            return self._transformed(indices, self.transforms)
        starts = np.array([self.start(index) for index in indices])[:, None]
        window = torch.from_numpy(self.tokens[starts + np.arange(self.seq_len + 1)].astype(np.int64))
        return {"input_ids": window[:, :-1].contiguous(), "labels": window[:, 1:].contiguous()}

    def _transformed(self, indices: list[int], transforms: TextTransforms) -> dict[str, Tensor]:
        wanted = transforms.reads(self.seq_len + 1)
        rows = []
        for index in indices:
            start = self.start(index)
            window = np.asarray(self.tokens[start : start + wanted])
            rows.append(transforms(window, self.seq_len, index, self.clock.at(index)))
        inputs, labels = (torch.from_numpy(np.stack(parts)) for parts in zip(*rows, strict=True))
        return {"input_ids": inputs, "labels": labels}

    def __getstate__(self) -> dict[str, object]:
        # Worker processes make their own cache.
        return {key: value for key, value in self.__dict__.items() if key != "_plan"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._plan = lru_cache(maxsize=2)(self._epoch)


class EvaluationSequences(Dataset[dict[str, Tensor]]):
    """A token stream cut into windows so that every token but the first is a label exactly once.

    The last window is padded; padding has label -100. Windows at or beyond the end are all padding: ranks that run
    out of windows get those, so that all ranks have the same number of batches.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        if len(tokens) < 2:
            raise UserError("data.val_fraction: the validation split has no text")

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.seq_len)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch: `input_ids` and `labels` [B, T]."""
        ids = torch.zeros(len(indices), self.seq_len, dtype=torch.int64)
        labels = torch.full((len(indices), self.seq_len), IGNORE, dtype=torch.int64)
        for row, index in enumerate(indices):
            start = index * self.seq_len
            window = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))
            if len(window) > 1:
                ids[row, : len(window) - 1] = window[:-1]
                labels[row, : len(window) - 1] = window[1:]
        return {"input_ids": ids, "labels": labels}


class StepSampler(Sampler[list[int]]):
    """Indices of micro-batch m on rank r of w: batch_size consecutive ones, ranks side by side, batch after batch.

    Micro-batch `start` begins at index `first_sample`, the number of samples that all ranks have seen before it; so a
    run resumed with another batch size or number of ranks neither repeats nor skips a sample.

    A run that starts at micro-batch `start` gets just what an uninterrupted run would get there, whatever the number
    of workers; the union over ranks is the same for every number of ranks at an equal global batch.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        first_sample: int | None = None,
    ) -> None:
        self.start, self.stop, self.batch_size = start, stop, batch_size
        self.rank, self.world_size = rank, world_size
        self.first_sample = start * world_size * batch_size if first_sample is None else first_sample

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.stop):
            before = ((batch - self.start) * self.world_size + self.rank) * self.batch_size
            first = self.first_sample + before
            yield list(range(first, first + self.batch_size))

    def __len__(self) -> int:
        """Micro-batches of the whole run: Lightning subtracts those already done itself."""
        return self.stop


class ShardSampler(Sampler[list[int]]):
    """Every evaluation window once over all ranks, in equally many batches on each."""

    def __init__(self, windows: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.batch_size, self.rank = batch_size, rank
        self.per_rank = -(-windows // world_size)

    def __iter__(self) -> Iterator[list[int]]:
        indices = range(self.rank * self.per_rank, (self.rank + 1) * self.per_rank)
        for first in range(0, self.per_rank, self.batch_size):
            yield list(indices[first : first + self.batch_size])

    def __len__(self) -> int:
        return -(-self.per_rank // self.batch_size)
