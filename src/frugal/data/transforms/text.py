"""Text augmentation on token sequences: fill-in-the-middle, span corruption, masking, dropping, document order."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from frugal.data.tokenization import EOT
from frugal.data.transforms.base import Sample, TextTransform, join, pieces
from frugal.data.transforms.encoding import ByteCodec
from frugal.errors import require
from frugal.schedule import Ramp

PREFIX, SUFFIX, MIDDLE, MASK = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|mask|>"


def _check_rate(name: str, rate: float) -> None:
    require(0 < rate < 1, f"data.transforms: {name}.rate must lie between 0 and 1, got {rate}")


class FillInTheMiddle(TextTransform):
    """Move the middle of each document to its end, so that a model learns to fill gaps.

    Bavarian et al. 2022, arXiv 2207.14255. The two cuts are uniform over the document's characters; a document cut by
    the sequence's ends counts as whole ("context level" there). PSM: PREFIX p SUFFIX s MIDDLE m. SPM: PREFIX SUFFIX s
    MIDDLE p m. Tokens are made anew for each part; a document that has grown too long for the sequence is shortened at
    its end before it is cut.

    Args:
        probability: share of the sequences, by step.
        spm: share of the documents that take the SPM order.
    """

    special_tokens = (PREFIX, SUFFIX, MIDDLE)
    rewrites = True

    def __init__(self, probability: Ramp = Ramp(0.5), spm: float = 0.5) -> None:  # noqa: B008
        super().__init__(probability)
        require(0 <= spm <= 1, f"data.transforms: FillInTheMiddle.spm must lie in [0, 1], got {spm}")
        self.spm = spm

    def bind(self, tokenizer: Tokenizer) -> None:
        """Use this vocabulary; it must have the three sentinels."""
        super().bind(tokenizer)
        self.codec = ByteCodec(tokenizer)

    def apply(self, sample: Sample, length: int, rng: np.random.Generator) -> Sample:
        """Every document of the sample, as far as there is room."""
        end, room = self.ids[EOT], length
        out: list[np.ndarray] = []
        for piece in pieces(sample.tokens, end):
            tokens = sample.tokens[piece]
            head = int(tokens[0] == end)
            cuts, spm = np.sort(rng.random(2)), rng.random() < self.spm
            body = tokens[head : head + room]
            while True:
                new = np.concatenate((tokens[:head], self._rearrange(body, cuts, spm)))
                if len(new) <= room or len(body) < 3:
                    break
                body = body[: len(body) - (len(new) - room)]
            out.append((new if len(new) <= room else tokens)[:room])
            room -= len(out[-1])
            if room <= 0:
                break
        return Sample.of(np.concatenate(out))

    def _rearrange(self, body: np.ndarray, cuts: np.ndarray, spm: bool) -> np.ndarray:
        first, last = self.codec.whole_characters(body)
        if last - first < 3 or np.isin(body, self.codec.special).any():
            return body
        text = self.codec.bytes(body[first:last]).decode()
        a, b = (cuts * (len(text) + 1)).astype(int).tolist()
        prefix = np.concatenate((body[:first], self.codec.encode(text[:a])))
        middle = self.codec.encode(text[a:b])
        suffix = np.concatenate((self.codec.encode(text[b:]), body[last:]))
        pre, suf, mid = ([self.ids[token]] for token in (PREFIX, SUFFIX, MIDDLE))
        parts = (pre, suf, suffix, mid, prefix, middle) if spm else (pre, prefix, suf, suffix, mid, middle)
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


class SpanCorruption(TextTransform):
    """Replace spans by sentinels and write them at the end (T5, Raffel et al. 2020, arXiv 1910.10683), for a decoder.

    Visible text with `<|span_0|>`, `<|span_1|>`, ... in the gaps, then each sentinel followed by what it stands for, as
    UL2's denoisers do with a decoder alone (Tay et al. 2022, arXiv 2205.05131). The sequence is filled exactly.

    Args:
        probability: share of the sequences, by step.
        rate: share of the tokens that lie in spans.
        mean_span: mean length of a span in tokens.
        sentinels: how many sentinels the vocabulary holds; a sequence that would need more gets longer spans.
        labels: predict everything, or only the second part, the targets.
    """

    rewrites = True

    def __init__(
        self,
        probability: Ramp = Ramp(0.5),  # noqa: B008
        rate: float = 0.15,
        mean_span: float = 3.0,
        sentinels: int = 32,
        labels: Literal["all", "targets"] = "all",
    ) -> None:
        super().__init__(probability)
        _check_rate("SpanCorruption", rate)
        require(mean_span >= 1, f"data.transforms: SpanCorruption.mean_span must be at least 1, got {mean_span}")
        require(sentinels >= 1, f"data.transforms: SpanCorruption.sentinels must be at least 1, got {sentinels}")
        self.rate, self.mean_span, self.labels = rate, mean_span, labels
        self.special_tokens = tuple(f"<|span_{i}|>" for i in range(sentinels))

    def apply(self, sample: Sample, length: int, rng: np.random.Generator) -> Sample:
        """Spans of a length drawn uniformly among all ways to cut the masked tokens into that many spans."""
        length = min(length, len(sample))
        # Each span costs two sentinels, which take the place of tokens at the end.
        spans = max(1, min(len(self.special_tokens), round(length * self.rate / self.mean_span)))
        tokens = sample.tokens[: length - 2 * spans]
        masked = max(spans, round(len(tokens) * self.rate))
        if len(tokens) - masked < spans:
            return sample
        gone, kept = _partition(masked, spans, rng), _partition(len(tokens) - masked, spans, rng)
        visible: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        start = 0
        for name, keep, drop in zip(self.special_tokens, kept, gone, strict=False):
            sentinel = np.array([self.ids[name]])
            visible += [tokens[start : start + keep], sentinel]
            targets += [sentinel, tokens[start + keep : start + keep + drop]]
            start += keep + drop
        result = Sample.of(np.concatenate(visible + targets))
        if self.labels == "targets":
            result.predicted[: sum(map(len, visible))] = False
        return result


def _partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Positive lengths that add up to total, uniform among all such."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))


class TokenMask(TextTransform):
    """Hide tokens from the model's input, as word dropout does (Bowman et al. 2016, arXiv 1511.06349).

    Args:
        probability: share of the sequences, by step.
        rate: share of the tokens hidden in such a sequence; special tokens never are.
        replace: by the token `<|mask|>`, or by a random ordinary token.
        labels: keep: hidden tokens are predicted all the same (from what precedes them); ignore: they are no labels.
    """

    masks = True

    def __init__(
        self,
        probability: Ramp = Ramp(),  # noqa: B008
        rate: float = 0.1,
        replace: Literal["mask", "random"] = "mask",
        labels: Literal["keep", "ignore"] = "keep",
    ) -> None:
        super().__init__(probability)
        _check_rate("TokenMask", rate)
        self.rate, self.replace, self.labels = rate, replace, labels
        self.special_tokens = (MASK,) if replace == "mask" else ()

    def bind(self, tokenizer: Tokenizer) -> None:
        """Use this vocabulary; it must have `<|mask|>` if that is what replaces."""
        super().bind(tokenizer)
        codec = ByteCodec(tokenizer)
        self.special = codec.special
        self.ordinary = np.setdiff1d(np.arange(tokenizer.get_vocab_size()), codec.special)

    def apply(self, sample: Sample, length: int, rng: np.random.Generator) -> Sample:
        """Each token independently."""
        hidden = (rng.random(len(sample)) < self.rate) & ~np.isin(sample.tokens, self.special)
        by = self.ids[MASK] if self.replace == "mask" else rng.choice(self.ordinary, len(sample))
        predicted = sample.predicted & ~hidden if self.labels == "ignore" else sample.predicted
        return Sample(sample.tokens, np.where(hidden, by, sample.shown), predicted)


class TokenDrop(TextTransform):
    """Remove tokens from inputs and labels alike: the model reads, and is asked for, a text with words missing.

    Args:
        probability: share of the sequences, by step.
        rate: share of the tokens that are removed; special tokens never are. The stream is read on to fill the
            sequence.
    """

    def __init__(self, probability: Ramp = Ramp(), rate: float = 0.1) -> None:  # noqa: B008
        super().__init__(probability)
        _check_rate("TokenDrop", rate)
        self.rate = rate

    def bind(self, tokenizer: Tokenizer) -> None:
        """Use this vocabulary."""
        super().bind(tokenizer)
        self.special = ByteCodec(tokenizer).special

    def reads(self, length: int) -> int:
        """What remains of it is long enough but for one sequence in thousands (four standard deviations)."""
        expected = length / (1 - self.rate)
        return math.ceil(expected + 4 * math.sqrt(expected * self.rate))

    def apply(self, sample: Sample, length: int, rng: np.random.Generator) -> Sample:
        """Each token independently."""
        return sample[(rng.random(len(sample)) >= self.rate) | np.isin(sample.tokens, self.special)]


class DocumentShuffle(TextTransform):
    """Put the whole documents of a sequence into another order; what is cut by its ends stays where it is."""

    def apply(self, sample: Sample, length: int, rng: np.random.Generator) -> Sample:
        """Of the sequence that will be kept: further tokens are none of its documents."""
        end, sample = self.ids[EOT], sample[:length]
        found = [sample[piece] for piece in pieces(sample.tokens, end)]
        first = int(bool(found) and found[0].tokens[0] != end)
        if len(found) - 1 - first < 2:
            return sample
        middle = found[first:-1]
        order = rng.permutation(len(middle)).tolist()
        return join([*found[:first], *(middle[i] for i in order), found[-1]])
