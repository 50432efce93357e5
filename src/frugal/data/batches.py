"""Which tokens are in which batch: pure functions of the seed and the batch's number."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from frugal.data.adaptive import Bands
from frugal.data.curriculum import BatchStage, LengthStage, PacedOrder, batch_size_at, length_at
from frugal.data.mixture import Mixer
from frugal.data.transforms.base import SampleClock, TextTransforms
from frugal.errors import UserError

IGNORE = -100


def data_ranks(trainer: Any) -> tuple[int, int]:
    """This process's rank among those that see different data, and how many there are.

    Processes that split the matrices (tensor parallelism) see the same batches and have the same rank.
    """
    kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)


class TrainingSequences(Dataset[dict[str, Tensor]]):
    """Sequences of a token stream, indexed over the whole run.

    A mixer says which part of the stream, a source, sample i comes from, and that it is the n-th from there; with one
    part n is i. The n-th sequence of a part is position n % m of epoch n // m. Each epoch has its own order and its own
    offset of the cuts, both functions of (seed, part, epoch), so that later epochs do not repeat the very same
    sequences.

    Args:
        tokens: the stream, [tokens].
        seq_len: T, tokens per sequence.
        seed: decides orders and offsets.
        parts: where each part of the stream begins and ends; null: it is one.
        mixer: which part each sample comes from; null for one part.
        transforms: augmentation of each sequence; none by default.
        clock: which step sees a sample, for everything that changes with the step.
        paced: a curriculum's order of each part's sequences; none by default.
        lengths: stages of shorter sequences; none by default.
        bands: what the mixer chooses among, where that is not the parts but bands of the only one.
        grouped: whether batches say which of the mixer's groups each sequence is from.
    """

    size_name = "tokens per sequence"

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        seed: int,
        parts: Sequence[tuple[int, int]] | None = None,
        mixer: Mixer | None = None,
        transforms: TextTransforms | None = None,
        clock: SampleClock = SampleClock(),  # noqa: B008 (frozen)
        paced: Sequence[PacedOrder] = (),
        lengths: Sequence[LengthStage] = (),
        bands: Bands | None = None,
        grouped: bool = False,
    ) -> None:
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.bands, self.grouped = bands, grouped
        self.transforms, self.clock, self.paced, self.lengths = transforms, clock, list(paced), list(lengths)
        self.parts, self.mixer = list(parts or [(0, len(tokens))]), mixer
        assert mixer is not None or len(self.parts) == 1
        # For every offset below seq_len there must be room, and each sequence needs its last label.
        self.per_epoch = [(end - start - 1) // seq_len - 1 for start, end in self.parts]
        for (start, end), per_epoch in zip(self.parts, self.per_epoch, strict=True):
            if per_epoch < 1:
                raise UserError(
                    f"data.seq_len: {seq_len} is too long for {end - start} training tokens"
                    f"{' of a source' if len(self.parts) > 1 else ''}; two sequences must fit"
                )
        self._plan = lru_cache(maxsize=2 * len(self.parts))(self._epoch)

    def _epoch(self, part: int, epoch: int) -> tuple[np.ndarray, int]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, (part << 40) + epoch]))
        return rng.permutation(self.per_epoch[part]), int(rng.integers(self.seq_len))

    def locate(self, index: int) -> tuple[int, int]:
        """Which part sequence `index` is from, and where it begins in the stream."""
        part, number = self.mixer.locate(index) if self.mixer else (0, index)
        if self.bands is not None:
            return 0, self.parts[0][0] + self.bands.sequence(part, number) * self.seq_len
        if self.paced and (drawn := self.paced[part].draw(index, self.clock.at(index))) is not None:
            return part, self.parts[part][0] + drawn * self.seq_len
        epoch, position = divmod(number, self.per_epoch[part])
        order, offset = self._plan(part, epoch)
        return part, self.parts[part][0] + int(order[position]) * self.seq_len + offset

    def start(self, index: int) -> int:
        """Where sequence `index` begins in the stream."""
        return self.locate(index)[1]

    def scored(self, index: int) -> tuple[int, int]:
        """Part of sequence `index`, and which of the part's scored sequences it overlaps most (cuts move by epoch)."""
        part, start = self.locate(index)
        return part, min(round((start - self.parts[part][0]) / self.seq_len), self.per_epoch[part] - 1)

    def size_at(self, step: int) -> int:
        """Tokens per sequence."""
        return length_at(self.lengths, self.seq_len, step)

    def epochs(self, drawn: int) -> np.ndarray:
        """How often the first `drawn` samples go through each part, [parts]."""
        counts = self.mixer.drawn_before(drawn) if self.mixer and self.bands is None else np.array([drawn])
        return counts / np.array(self.per_epoch)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch: `input_ids` and `labels` [B, T]; labels[t] follows input_ids[t] unless transforms hide it.

        In a stage of shorter sequences it is [B n, T / n]: as many tokens. With `grouped`, also `groups` [B].
        """
        batch = self._full_length(indices)
        length = self.size_at(self.clock.at(indices[0]))
        if length != self.seq_len:
            batch = {name: x.reshape(-1, length) for name, x in batch.items()}
        if self.grouped and self.mixer:
            groups = torch.tensor([self.mixer.locate(index)[0] for index in indices])
            batch["groups"] = groups.repeat_interleave(self.seq_len // length)
        return batch

    def _full_length(self, indices: list[int]) -> dict[str, Tensor]:
        if self.transforms is not None:
            return self._transformed(indices, self.transforms)
        starts = np.array([self.start(index) for index in indices])[:, None]
        window = torch.from_numpy(self.tokens[starts + np.arange(self.seq_len + 1)].astype(np.int64))
        return {"input_ids": window[:, :-1].contiguous(), "labels": window[:, 1:].contiguous()}

    def _transformed(self, indices: list[int], transforms: TextTransforms) -> dict[str, Tensor]:
        wanted = transforms.reads(self.seq_len + 1)
        rows = []
        for index in indices:
            part, start = self.locate(index)
            window = np.asarray(self.tokens[start : min(start + wanted, self.parts[part][1])])
            rows.append(transforms(window, self.seq_len, index, self.clock.at(index)))
        inputs, labels = (torch.from_numpy(np.stack(parts)) for parts in zip(*rows, strict=True))
        return {"input_ids": inputs, "labels": labels}

    def __getstate__(self) -> dict[str, object]:
        # Worker processes make their own cache.
        return {key: value for key, value in self.__dict__.items() if key != "_plan"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._plan = lru_cache(maxsize=2 * len(self.parts))(self._epoch)


class EvaluationSequences(Dataset[dict[str, Tensor]]):
    """A token stream cut into windows so that every token but the first is a label exactly once.

    The last window is padded; padding has label -100. Windows at or beyond the end are all padding: ranks that run
    out of windows get those, so that all ranks have the same number of batches.

    Args:
        tokens: the stream, [tokens].
        seq_len: T, tokens per window.
        part_ends: where each part of the stream ends; with several, batches say which part each label is from.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, part_ends: Sequence[int] = ()) -> None:
        self.tokens, self.seq_len, self.part_ends = tokens, seq_len, np.asarray(part_ends, dtype=np.int64)
        if len(tokens) < 2:
            raise UserError("data.val_fraction: the validation split has no text")

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.seq_len)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch: `input_ids` and `labels` [B, T], and `parts` [B, T] where there are several."""
        ids = torch.zeros(len(indices), self.seq_len, dtype=torch.int64)
        labels = torch.full((len(indices), self.seq_len), IGNORE, dtype=torch.int64)
        for row, index in enumerate(indices):
            start = index * self.seq_len
            window = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))
            if len(window) > 1:
                ids[row, : len(window) - 1] = window[:-1]
                labels[row, : len(window) - 1] = window[1:]
        if len(self.part_ends) < 2:
            return {"input_ids": ids, "labels": labels}
        positions_BT = np.asarray(indices)[:, None] * self.seq_len + np.arange(1, self.seq_len + 1)
        parts = torch.from_numpy(np.searchsorted(self.part_ends, positions_BT, side="right"))
        return {"input_ids": ids, "labels": labels, "parts": parts}


class TimedLoader(DataLoader[dict[str, Tensor]]):
    """A DataLoader that adds up how long the training loop waited for it, in seconds."""

    waited = 0.0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        iterator = super().__iter__()
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch


class StepSampler(Sampler[list[int]]):
    """Indices of micro-batch m on rank r of w: batch_size consecutive ones, ranks side by side, batch after batch.

    Micro-batch `start` begins at index `first_sample`, the number of samples that all ranks have seen before it; so a
    run resumed with another batch size or number of ranks neither repeats nor skips a sample. With a ramp, the size of
    micro-batch m is that of step m // accumulate.

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
        ramp: Sequence[BatchStage] = (),
        accumulate: int = 1,
    ) -> None:
        self.start, self.stop, self.batch_size = start, stop, batch_size
        self.ramp, self.accumulate = ramp, accumulate
        self.rank, self.world_size = rank, world_size
        self.first_sample = start * world_size * batch_size if first_sample is None else first_sample

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first_sample
        for batch in range(self.start, self.stop):
            size = batch_size_at(self.ramp, self.batch_size, batch // self.accumulate)
            yield list(range(first + self.rank * size, first + (self.rank + 1) * size))
            first += self.world_size * size

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
