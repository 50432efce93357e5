"""What a text transform is, and how a list of them becomes one deterministic function of (sample, seed, index).

Shape letters: L tokens read for a sample, T tokens of a training sequence.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from frugal.data.tokenization import EOT
from frugal.errors import UserError
from frugal.schedule import Ramp

IGNORE = -100  # label of a position that is not predicted, as in data.batches


@dataclass(frozen=True)
class Sample:
    """A stretch of the token stream on its way to a training sequence; three arrays of one length.

    Args:
        tokens: what is true, int64 [L].
        shown: what the model reads, int64 [L]; differs from tokens only where a token is masked.
        predicted: whether the token is a label, bool [L].
    """

    tokens: np.ndarray
    shown: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray) -> Sample:
        """Nothing masked, everything predicted."""
        tokens = tokens.astype(np.int64)
        return cls(tokens, tokens, np.ones(len(tokens), dtype=bool))

    def __getitem__(self, index: slice | np.ndarray) -> Sample:
        return Sample(self.tokens[index], self.shown[index], self.predicted[index])

    def __len__(self) -> int:
        return len(self.tokens)


def join(samples: Sequence[Sample]) -> Sample:
    """Samples one after the other."""
    return Sample(*(np.concatenate([getattr(s, f.name) for s in samples]) for f in dataclasses.fields(Sample)))


class TextTransform(ABC):
    """One augmentation of a token sequence.

    A transform belongs to a vocabulary from `bind` on. It may return fewer or more tokens than it was given: what is
    too long is cut at the end, what is too short is filled with end-of-text tokens that are not predicted.

    Args:
        probability: share of the samples that are transformed, by step.
    """

    special_tokens: tuple[str, ...] = ()  # what the vocabulary must hold beside the end-of-text token
    rewrites = False  # makes its tokens anew from the true ones, so that it must come before one that masks
    masks = False  # shows the model something else than what is true

    def __init__(self, probability: Ramp = Ramp()) -> None:  # noqa: B008 (a frozen dataclass)
        if not 0 <= probability.value <= 1:
            raise UserError(f"data.transforms: probability.value must lie in [0, 1], got {probability.value}")
        self.probability = probability
        self.tokenizer: Tokenizer | None = None
        self.ids: dict[str, int] = {}

    def bind(self, tokenizer: Tokenizer) -> None:
        """Use this vocabulary.

        Raises:
            UserError: it lacks a special token that the transform needs.
        """
        for token in (EOT, *self.special_tokens):
            found = tokenizer.token_to_id(token)
            if found is None:
                raise UserError(
                    f"data.transforms: {type(self).__name__} needs the token {token}, which the tokenizer of "
                    "data.tokenizer.path lacks; train one by leaving the path out, or add the token to it"
                )
            self.ids[token] = found
        self.tokenizer = tokenizer

    def reads(self, length: int) -> int:
        """How many tokens it wants to see to give `length` of them."""
        return length

    @abstractmethod
    def apply(self, sample: Sample, length: int, rng: np.random.Generator) -> Sample:
        """Transform a sample; what lies beyond `length` tokens of the result is of no use to anyone."""


@dataclass(frozen=True)
class SampleClock:
    """Which optimizer step sees a sample: what makes a schedule by step a function of the sample's index.

    Args:
        step: the step at which this process began.
        first_sample: samples that all ranks had seen until then.
        samples_per_step: samples of one step, over all ranks and micro-batches, at `step`.
        changes: later steps from which on a step has another number of samples, ascending, and that number.
    """

    step: int = 0
    first_sample: int = 0
    samples_per_step: int = 1
    changes: tuple[tuple[int, int], ...] = ()

    def at(self, index: int) -> int:
        """The step of sample number `index`."""
        step, first, per_step = self._piece(lambda start, sample: sample <= index)
        return step + (index - first) // per_step

    def sample(self, step: int) -> int:
        """The first sample of a step: how many all ranks have seen before it."""
        before, first, per_step = self._piece(lambda start, sample: start <= step)
        return first + (step - before) * per_step

    def _piece(self, begun: Callable[[int, int], bool]) -> tuple[int, int, int]:
        """Of the last change that has begun: its step, its first sample, and the samples of a step from there on."""
        step, first, per_step = self.step, self.first_sample, self.samples_per_step
        for start, size in self.changes:
            sample = first + (start - step) * per_step
            if not begun(start, sample):
                break
            step, first, per_step = start, sample, size
        return step, first, per_step


class TextTransforms:
    """A list of transforms as one function: the same (window, seed, index, step) always gives the same sequence.

    Each transform draws from a Philox stream of its own (Salmon et al. 2011), keyed by seed and index: neither the
    number of workers nor the other transforms of the list change what it draws.

    Args:
        transforms: applied in this order.
        tokenizer: the vocabulary; a copy is made.
        seed: with a sample's index, decides what is drawn.
    """

    def __init__(self, transforms: Sequence[TextTransform], tokenizer: Tokenizer, seed: int) -> None:
        check_order(transforms)
        self.transforms, self.seed = list(transforms), seed
        own = Tokenizer.from_str(tokenizer.to_str())
        own.encode_special_tokens = True  # a marker inside a text is text like any other
        self.tokenizer, self.end = own, own.token_to_id(EOT)
        for transform in self.transforms:
            transform.bind(own)

    def __reduce__(self) -> tuple[Any, ...]:
        # A tokenizer loses the treatment of markers on its way to another process.
        return TextTransforms, (self.transforms, self.tokenizer, self.seed)

    def _lengths(self, length: int) -> list[int]:
        """Tokens wanted before each transform, and at the end."""
        lengths = [length]
        for transform in reversed(self.transforms):
            lengths.append(transform.reads(lengths[-1]))
        return lengths[::-1]

    def reads(self, length: int) -> int:
        """Tokens of the stream that a sample of `length` tokens may need."""
        return self._lengths(length)[0]

    def __call__(self, window: np.ndarray, seq_len: int, index: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, int64 [T] each, of sample number `index`, seen at `step`.

        Args:
            window: the stream from the sample's start, [L]; `reads(seq_len + 1)` tokens where it is long enough.
            seq_len: T.
            index: the sample's number in the run.
            step: the optimizer step that will see it; decides the probabilities.
        """
        sample, length = Sample.of(window), seq_len + 1
        lengths = self._lengths(length)[1:]
        for k, (transform, wanted) in enumerate(zip(self.transforms, lengths, strict=True)):
            # The upper words of the counter tell the transforms apart; the batches' own order uses counter 0.
            rng = np.random.Generator(np.random.Philox(key=[self.seed, index], counter=[0, 0, 0, k + 1]))
            if rng.random() < transform.probability.at(step):
                sample = transform.apply(sample, wanted, rng)
        sample = sample[:length]
        inputs = np.full(length, self.end, dtype=np.int64)
        labels = np.full(length, IGNORE, dtype=np.int64)
        inputs[: len(sample)] = sample.shown
        labels[: len(sample)] = np.where(sample.predicted, sample.tokens, IGNORE)
        return inputs[:-1], labels[1:]


def check_order(transforms: Sequence[TextTransform]) -> None:
    """Refuse a list in which a transform would rewrite what an earlier one has masked."""
    masking: TextTransform | None = None
    for transform in transforms:
        if masking is not None and transform.rewrites:
            raise UserError(
                f"data.transforms: {type(masking).__name__} must come after {type(transform).__name__}, "
                "which reads the unmasked tokens"
            )
        if transform.masks:
            masking = transform


def special_tokens(transforms: Sequence[TextTransform]) -> tuple[str, ...]:
    """What the transforms need in the vocabulary, each once, in a fixed order."""
    return tuple(dict.fromkeys(token for transform in transforms for token in transform.special_tokens))


def pieces(tokens: np.ndarray, end: int) -> Iterator[slice]:
    """The stretches of a stream between documents' beginnings; all but perhaps the first begin with end-of-text."""
    starts = [0, *(i for i in np.flatnonzero(tokens == end).tolist() if i > 0), len(tokens)]
    yield from (slice(a, b) for a, b in pairwise(starts) if b > a)
