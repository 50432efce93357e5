import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frugal.data.batches import IGNORE, EvaluationSequences, ShardSampler, StepSampler, TrainingSequences
from frugal.data.curriculum import BatchStage, batch_size_at
from frugal.data.transforms.base import SampleClock
from frugal.errors import UserError

TOKENS = np.arange(1000, dtype=np.uint16)


@given(st.integers(3, 60), st.integers(1, 16), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_is_a_permutation_of_disjoint_sequences(n: int, seq_len: int, seed: int, epoch: int) -> None:
    tokens = np.arange(n * seq_len + 1)
    data = TrainingSequences(tokens, seq_len, seed)
    indices = range(epoch * data.per_epoch[0], (epoch + 1) * data.per_epoch[0])
    starts = sorted(data.start(i) for i in indices)
    assert np.diff(starts).tolist() == [seq_len] * (len(starts) - 1)
    assert starts[0] >= 0 and starts[-1] + seq_len < len(tokens)
    assert starts == sorted(TrainingSequences(tokens, seq_len, seed).start(i) for i in indices)


def test_labels_are_the_next_token() -> None:
    batch = TrainingSequences(TOKENS, 16, seed=1).__getitems__([0, 5, 70])
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 16)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)  # the stream counts up


def test_epochs_and_seeds_differ() -> None:
    data, other = TrainingSequences(TOKENS, 16, seed=1), TrainingSequences(TOKENS, 16, seed=2)
    n = data.per_epoch[0]
    first, second = [data.start(i) for i in range(n)], [data.start(n + i) for i in range(n)]
    assert first != second
    assert first != [other.start(i) for i in range(n)]
    assert first[0] % 16 != second[0] % 16  # the cuts moved (holds for this seed)


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.seq_len: 600 is too long for 1000 training tokens"):
        TrainingSequences(TOKENS, 600, seed=1)


@given(st.integers(2, 200), st.integers(1, 20), st.integers(1, 7), st.sampled_from([1, 2, 3, 4]))
def test_evaluation_predicts_every_token_once(n: int, seq_len: int, batch_size: int, world_size: int) -> None:
    tokens = np.arange(n)
    data = EvaluationSequences(tokens, seq_len)
    labels: list[int] = []
    batches = set()
    for rank in range(world_size):
        sampler = ShardSampler(len(data), batch_size, rank, world_size)
        batches.add(len(list(sampler)))
        assert len(sampler) == len(list(sampler))
        for indices in sampler:
            batch = data.__getitems__(indices)
            kept = batch["labels"] != IGNORE
            assert torch.equal(batch["labels"][kept], batch["input_ids"][kept] + 1)
            assert not batch["input_ids"][~kept].any()
            labels += batch["labels"][kept].tolist()
    assert sorted(labels) == list(range(1, n))
    assert len(batches) == 1


@given(st.integers(0, 20), st.integers(1, 8), st.integers(1, 4))
def test_ranks_together_take_the_same_samples(start: int, steps: int, per_rank: int) -> None:
    def global_batches(world_size: int) -> list[list[int]]:
        samplers = [
            StepSampler(start, start + steps, 4 * per_rank // world_size, rank, world_size)
            for rank in range(world_size)
        ]
        return [[index for part in parts for index in part] for parts in zip(*samplers, strict=True)]

    assert global_batches(1) == global_batches(2) == global_batches(4)


def test_a_resumed_sampler_goes_on_where_the_other_stood() -> None:
    whole = list(StepSampler(0, 10, 3, rank=1, world_size=2))
    assert list(StepSampler(6, 10, 3, rank=1, world_size=2)) == whole[6:]
    assert len(StepSampler(6, 10, 3)) == 10  # Lightning counts the batches already done itself


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), max_size=4), st.integers(1, 3), st.integers(0, 12))
def test_a_ramp_leaves_no_sample_out_and_resumes_anywhere(
    stages: list[tuple[int, int]], accumulate: int, stop: int
) -> None:
    starts = [0, *itertools.accumulate(length for length, _ in stages)]
    ramp = [BatchStage(start, size) for start, size in zip(starts, [2, *(size for _, size in stages)], strict=True)]
    per_step = [2 * accumulate * batch_size_at(ramp, 0, step) for step in range(16)]  # two ranks
    clock = SampleClock(0, 0, per_step[0], tuple((s.start, 2 * accumulate * s.batch_size) for s in ramp[1:]))
    assert [clock.sample(step) for step in range(16)] == [sum(per_step[:step]) for step in range(16)]
    assert [clock.at(i) for i in range(sum(per_step))] == [s for s, n in enumerate(per_step) for _ in range(n)]
    begun = [change for change in clock.changes if change[0] <= stop]
    later = SampleClock(
        stop, clock.sample(stop), begun[-1][1] if begun else per_step[0], clock.changes[len(begun) :]
    )  # a process that goes on there
    assert all(later.at(i) == clock.at(i) for i in range(clock.sample(stop), sum(per_step)))

    def batches(rank: int, start: int) -> list[list[int]]:
        first = clock.sample(start)
        return list(StepSampler(start * accumulate, 16 * accumulate, 9, rank, 2, first, ramp, accumulate))

    whole = [batches(rank, 0) for rank in (0, 1)]
    seen = [index for pair in zip(*whole, strict=True) for part in pair for index in part]
    assert seen == list(range(sum(per_step)))
    assert all(batches(rank, stop) == whole[rank][stop * accumulate :] for rank in (0, 1))
