"""Transforms that write the same text with other tokens, or the same numbers with other characters."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from itertools import pairwise

import numpy as np
from tokenizers import Tokenizer

from frugal.data.tokenization import EOT
from frugal.data.transforms.base import Sample, TextTransform, pieces
from frugal.data.transforms.encoding import ByteCodec
from frugal.errors import UserError, require
from frugal.schedule import Ramp


class DropoutEncoder:
    """Byte-level BPE whose merges are dropped at random (BPE-dropout, Provilkov et al. 2020, arXiv 1910.13267).

    The tokenizers library draws its dropout from a generator that cannot be seeded; here every draw comes from the
    caller's generator. At each step each possible merge is dropped with probability `dropout`; the best of the others
    is done; where none is left, the word is finished.
    """

    def __init__(self, tokenizer: Tokenizer, dropout: float) -> None:
        model = json.loads(tokenizer.to_str())["model"]
        if model["type"] != "BPE":
            raise UserError(f"data.transforms: BpeDropout needs a BPE tokenizer, not {model['type']}")
        self.pre_tokenizer, self.vocabulary, self.dropout = tokenizer.pre_tokenizer, model["vocab"], dropout
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        self.ranks: dict[tuple[str, str], int] = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
        self._path = lru_cache(maxsize=2**16)(self._merge_path)

    def _candidates(self, parts: tuple[str, ...]) -> list[tuple[int, int]]:
        """Possible merges as (rank, position), best first."""
        ranks = (self.ranks.get(pair) for pair in pairwise(parts))
        return sorted((rank, i) for i, rank in enumerate(ranks) if rank is not None)

    def _merge_path(self, word: str) -> list[tuple[str, ...]]:
        """The states of a word from its bytes to its usual tokens, when nothing is dropped."""
        states = [tuple(word)]
        while candidates := self._candidates(states[-1]):
            states.append(_merge(states[-1], candidates[0][1]))
        return states

    def split(self, word: str, rng: np.random.Generator) -> tuple[str, ...]:
        """One random segmentation of a pre-token.

        As long as no best merge is dropped, the states are those of the usual encoding, which are kept: so only words
        that a drop concerns are worked out anew.
        """
        states = self._path(word)
        hit = np.flatnonzero(rng.random(len(states) - 1) < self.dropout)
        if not len(hit):
            return states[-1]
        parts, skip = states[int(hit[0])], 1  # the best merge of this state is the one that was dropped
        while True:
            candidates = self._candidates(parts)[skip:]
            kept = np.flatnonzero(rng.random(len(candidates)) >= self.dropout)
            if not len(kept):
                return parts
            parts, skip = _merge(parts, candidates[int(kept[0])][1]), 0

    def encode(self, text: str, rng: np.random.Generator, at_most: int) -> np.ndarray:
        """Ids of the text, int64; ends after `at_most` tokens."""
        ids: list[int] = []
        for word, _ in self.pre_tokenizer.pre_tokenize_str(text):
            ids += [self.vocabulary[part] for part in self.split(word, rng)]
            if len(ids) >= at_most:
                break
        return np.array(ids, dtype=np.int64)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_path"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._path = lru_cache(maxsize=2**16)(self._merge_path)


def _merge(parts: tuple[str, ...], i: int) -> tuple[str, ...]:
    return (*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :])


class BpeDropout(TextTransform):
    """Encode the text anew with merges dropped at random: same bytes, other tokens, more of them.

    A sequence then holds less text (about a fifth less at 0.1).

    Args:
        probability: share of the sequences, by step.
        dropout: probability that a merge is dropped; 0.1 in the paper.
    """

    rewrites = True

    def __init__(self, probability: Ramp = Ramp(), dropout: float = 0.1) -> None:  # noqa: B008
        super().__init__(probability)
        require(0 < dropout <= 1, f"data.transforms: BpeDropout.dropout must lie in (0, 1], got {dropout}")
        self.dropout = dropout

    def bind(self, tokenizer: Tokenizer) -> None:
        """Use this vocabulary."""
        super().bind(tokenizer)
        self.codec, self.encoder = ByteCodec(tokenizer), DropoutEncoder(tokenizer, self.dropout)

    def apply(self, sample: Sample, length: int, rng: np.random.Generator) -> Sample:
        """The ordinary tokens between special ones, stretch by stretch."""
        out: list[np.ndarray] = []
        room, tokens = length, sample.tokens
        bounds = [-1, *np.flatnonzero(np.isin(tokens, self.codec.special)).tolist(), len(tokens)]
        for a, b in pairwise(bounds):
            if room <= 0:
                break
            run = tokens[a + 1 : b]
            first, last = self.codec.whole_characters(run)
            text = self.codec.bytes(run[first:last]).decode()
            new = (tokens[max(a, 0) : a + 1], run[:first], self.encoder.encode(text, rng, room), run[last:])
            out += new
            room -= sum(map(len, new))
        return Sample.of(np.concatenate(out))


UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("spaced", "words", "grouped", "reversed")
PATTERNS = {
    "spaced": r"[0-9](?:_[0-9])*",
    "words": rf"(?:{'|'.join(UNITS)})(?:-(?:{'|'.join(UNITS)}))*",
    "grouped": r"[0-9]{1,3}(?:,[0-9]{3})*",
    "reversed": r"~[0-9]+",
}


def render_number(digits: str, style: str) -> str:
    """Write a number's digits another way: 1234 as 1_2_3_4, one-two-three-four, 1,234 or ~4321 (lowest digit first)."""
    if style == "spaced":
        return "_".join(digits)
    if style == "words":
        return "-".join(UNITS[int(digit)] for digit in digits)
    if style == "grouped":
        head = len(digits) % 3 or 3
        return ",".join([digits[:head], *(digits[i : i + 3] for i in range(head, len(digits), 3))])
    return "~" + digits[::-1]


def parse_numbers(text: str, style: str) -> str:
    """The text with its numbers in plain digits again."""

    def plain(match: re.Match[str]) -> str:
        found = match[0]
        if style == "words":
            return "".join(str(UNITS.index(word)) for word in found.split("-"))
        return found[:0:-1] if style == "reversed" else found.replace("_", "").replace(",", "")

    return re.sub(PATTERNS[style], plain, text)


def render_numbers(text: str, style: str) -> str:
    """Every run of the digits 0 to 9 in another style; the text as it is where that could not be read back."""
    new = re.sub(r"[0-9]+", lambda match: render_number(match[0], style), text)
    return new if parse_numbers(new, style) == text else text


class NumberRendering(TextTransform):
    """Write the numbers of each document in another style; question and answer alike, so that the answer stays right.

    For synthetic tasks: each document takes one of the styles at random. A text that could not be read back (it holds
    number words, say) stays as it is: whatever is rendered, `parse_numbers` gives back.

    Args:
        probability: share of the sequences, by step.
        styles: of spaced (1_2_3), words (one-two-three), grouped (1,234) and reversed (~321).
    """

    rewrites = True

    def __init__(self, probability: Ramp = Ramp(0.5), styles: tuple[str, ...] = STYLES) -> None:  # noqa: B008
        super().__init__(probability)
        unknown = [style for style in styles if style not in STYLES]
        require(
            bool(styles) and not unknown,
            f"data.transforms: NumberRendering.styles must be some of {', '.join(STYLES)}, got {list(styles)}",
        )
        self.styles = styles

    def bind(self, tokenizer: Tokenizer) -> None:
        """Use this vocabulary."""
        super().bind(tokenizer)
        self.codec = ByteCodec(tokenizer)

    def apply(self, sample: Sample, length: int, rng: np.random.Generator) -> Sample:
        """Document by document; one with special tokens inside stays as it is."""
        out: list[np.ndarray] = []
        for piece in pieces(sample.tokens, self.ids[EOT]):
            tokens, style = sample.tokens[piece], self.styles[rng.integers(len(self.styles))]
            head = int(tokens[0] == self.ids[EOT])
            body = tokens[head:]
            first, last = self.codec.whole_characters(body)
            if not np.isin(body, self.codec.special).any():
                text = self.codec.bytes(body[first:last]).decode()
                new = render_numbers(text, style)
                if new != text:
                    body = np.concatenate((body[:first], self.codec.encode(new), body[last:]))
            out += [tokens[:head], body]
        return Sample.of(np.concatenate(out))
