"""What a filter sees of a document, and what it may answer."""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

WORD = re.compile(r"\w+")
_ASCII_GAPS = {code: " " for code in range(128) if not WORD.match(chr(code))}  # twice as fast as the pattern


@dataclass(frozen=True, slots=True)
class Drop:
    """A document is left out.

    Args:
        reason: why, in a few words that are the same for all documents left out for that reason.
    """

    reason: str


class _WordHashes(dict[str, int]):
    """Hash of each word met so far, the same in every process; forgets when it grows large."""

    def __missing__(self, word: str) -> int:
        if len(self) > 1_000_000:
            self.clear()
        raw = word.encode("utf-8", "surrogatepass")
        value = zlib.crc32(raw) << 32 | zlib.crc32(raw, 0x9E3779B9)
        self[word] = value
        return value


_HASHES = _WordHashes()


class Measured:
    """A text with what several filters want to know of it, each computed once and only when asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """What white space separates."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without the white space around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def plain_words(self) -> list[str]:
        """Runs of letters and digits in lower case: words without punctuation."""
        text = self.text.lower()
        return text.translate(_ASCII_GAPS).split() if text.isascii() else WORD.findall(text)

    @cached_property
    def word_hashes(self) -> np.ndarray:
        """A hash of each plain word, uint64 [words]."""
        return np.fromiter(map(_HASHES.__getitem__, self.plain_words), dtype=np.uint64, count=len(self.plain_words))

    def ngram_hashes(self, n: int) -> np.ndarray:
        """A hash of each run of n plain words, uint64 [max(words - n + 1, 0)]."""
        return ngram_hashes(self.word_hashes, n)


def ngram_hashes(word_hashes: np.ndarray, n: int) -> np.ndarray:
    """Polynomial hash, modulo 2^64, of each window of n word hashes."""
    count = len(word_hashes) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    base = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no position is lost
    with np.errstate(over="ignore"):
        for i in range(n):
            total = total * base + word_hashes[i : i + count]
        return total ^ (total >> np.uint64(29))


class _Named:
    """A filter's name and settings; its constructor's arguments are its public attributes."""

    @property
    def name(self) -> str:
        """How the report calls it."""
        return type(self).__name__

    def settings(self) -> dict[str, Any]:
        """Everything its verdicts depend on."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __getstate__(self) -> dict[str, Any]:
        return self.settings() | {key: None for key in vars(self) if key.startswith("_")}


class DocumentFilter(_Named, ABC):
    """Judges or rewrites one document without knowledge of any other: a pure function of its text."""

    @abstractmethod
    def __call__(self, document: Measured) -> str | Drop:
        """The text to go on with (the very same object where nothing changes), or why there is none."""


class CorpusFilter(_Named, ABC):
    """Judges documents by comparing them: with each other, or with the validation text."""

    @abstractmethod
    def verdicts(self, documents: Sequence[Measured], held_out: Sequence[Measured]) -> list[Drop | None]:
        """For each document why it is left out, or None.

        Args:
            documents: all that the filters before this one have kept, in order.
            held_out: the validation documents as they are.
        """


Filter = DocumentFilter | CorpusFilter
