"""Published rules of thumb for text of low quality; thresholds are the published ones unless set."""

from __future__ import annotations

import re

import numpy as np

from frugal.data.curation.base import DocumentFilter, Drop, Measured, ngram_hashes
from frugal.errors import require

_NO_LETTER = re.compile(r"(?<!\S)(?:[^\w\s]|[\d_])+(?!\S)")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
_TERMINAL = (".", "!", "?", '"', "'", "”", "’", ";", ":", "…", "。", "！", "？", "؟", "۔", "।")  # noqa: RUF001


class Length(DocumentFilter):
    """Leave out very short and very long documents.

    Args:
        min_bytes: fewest bytes of UTF-8.
        max_bytes: most bytes of UTF-8; null: no limit.
    """

    def __init__(self, min_bytes: int = 50, max_bytes: int | None = 10_000_000) -> None:
        require(min_bytes >= 0, f"data.curation: Length.min_bytes: must not be negative, got {min_bytes}")
        require(
            max_bytes is None or max_bytes >= min_bytes,
            f"data.curation: Length.max_bytes: {max_bytes} is less than min_bytes ({min_bytes})",
        )
        self.min_bytes, self.max_bytes = min_bytes, max_bytes

    def __call__(self, document: Measured) -> str | Drop:
        """Too short, too long, or as it is."""
        size = len(document.text) if document.text.isascii() else len(document.text.encode("utf-8", "surrogatepass"))
        if size < self.min_bytes:
            return Drop("too short")
        return Drop("too long") if self.max_bytes is not None and size > self.max_bytes else document.text


class GopherQuality(DocumentFilter):
    """The quality rules of MassiveText (Rae et al. 2021, arXiv 2112.11446, section A.1.1).

    Words are what white space separates; given those, the verdicts are datatrove's (tests/data/curation/test_peers.py),
    which splits with a word tokenizer and does not count pure punctuation. Asterisks and triangles are bullets, too.

    Args:
        min_words, max_words: words of a document.
        min_mean_length, max_mean_length: characters per word.
        max_symbol_ratio: hash signs, and ellipses, per word.
        max_bullet_lines: share of lines that begin with a bullet.
        max_ellipsis_lines: share of lines that end in an ellipsis.
        min_alphabetic_words: share of words with a letter.
        min_stop_words: how many of the, be, to, of, and, that, have, with occur; English only.
    """

    STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))

    def __init__(
        self,
        min_words: int = 50,
        max_words: int = 100_000,
        min_mean_length: float = 3.0,
        max_mean_length: float = 10.0,
        max_symbol_ratio: float = 0.1,
        max_bullet_lines: float = 0.9,
        max_ellipsis_lines: float = 0.3,
        min_alphabetic_words: float = 0.8,
        min_stop_words: int = 2,
    ) -> None:
        self.min_words, self.max_words = min_words, max_words
        self.min_mean_length, self.max_mean_length = min_mean_length, max_mean_length
        self.max_symbol_ratio = max_symbol_ratio
        self.max_bullet_lines, self.max_ellipsis_lines = max_bullet_lines, max_ellipsis_lines
        self.min_alphabetic_words, self.min_stop_words = min_alphabetic_words, min_stop_words

    def __call__(self, document: Measured) -> str | Drop:
        """The first rule that is broken, or the text."""
        text, words, lines = document.text, document.words, document.lines
        n = len(words)
        if not words or n < self.min_words:
            return Drop("too few words")
        if n > self.max_words:
            return Drop("too many words")
        mean = sum(map(len, words)) / n
        if not self.min_mean_length <= mean <= self.max_mean_length:
            return Drop("mean word length")
        if text.count("#") > self.max_symbol_ratio * n:
            return Drop("too many hash signs")
        if text.count("...") + text.count("…") > self.max_symbol_ratio * n:
            return Drop("too many ellipses")
        if sum(line.startswith(("•", "‣", "-", "*")) for line in lines) > self.max_bullet_lines * len(lines):
            return Drop("too many bullets")
        if sum(line.endswith(("...", "…")) for line in lines) > self.max_ellipsis_lines * len(lines):
            return Drop("too many lines end in an ellipsis")
        others = " ".join([word for word in words if not word.isalpha()])  # the pattern is slow on the many that are
        if n - sum(1 for _ in _NO_LETTER.finditer(others)) < self.min_alphabetic_words * n:
            return Drop("too few words with letters")
        if len(self.STOP_WORDS.intersection(words)) < self.min_stop_words:
            return Drop("too few stop words")
        return text


class GopherRepetition(DocumentFilter):
    """The repetition rules of MassiveText (Rae et al. 2021, table A1): repeated lines, paragraphs and n-grams.

    Shares of n-grams are counted in words' characters without the blanks between them. Lines and paragraphs are judged
    as datatrove does. N-grams deliberately not: an n-gram that occurs once is no repetition (in a short text datatrove
    drops it as the most frequent one), and of overlapping repeats every character counts once, as the paper has it
    (datatrove goes on behind each repeat and counts fewer).
    """

    TOP = {2: 0.20, 3: 0.18, 4: 0.16}  # noqa: RUF012
    DUPLICATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # noqa: RUF012

    def __call__(self, document: Measured) -> str | Drop:
        """The first rule that is broken, or the text."""
        text = document.text
        paragraphs = [part for part in (part.strip() for part in text.split("\n\n")) if part]
        for name, parts in (("lines", document.lines), ("paragraphs", paragraphs)):
            count, characters = repeated(parts)
            if count > 0.30 * len(parts):
                return Drop(f"repeated {name}")
            if characters > 0.20 * len(text):
                return Drop(f"characters in repeated {name}")
        lengths = np.fromiter(map(len, document.plain_words), dtype=np.int64, count=len(document.plain_words))
        ends = np.concatenate([[0], np.cumsum(lengths)])
        total = int(ends[-1])
        for n, most in self.TOP.items():
            hashes = ngram_hashes(document.word_hashes, n)
            if len(hashes) == 0:
                return text
            _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
            top = counts.argmax()
            size = int(ends[first[top] + n] - ends[first[top]])
            if counts[top] > 1 and size * int(counts[top]) > most * total:
                return Drop(f"one {n}-gram again and again")
        for n, most in self.DUPLICATED.items():
            hashes = ngram_hashes(document.word_hashes, n)
            if len(hashes) == 0:
                return text
            _, first = np.unique(hashes, return_index=True)
            again = np.ones(len(hashes), dtype=bool)
            again[first] = False
            # Every character of a repeated n-gram counts once, however many n-grams it lies in.
            marks = np.zeros(len(lengths) + 1, dtype=np.int64)
            at = np.flatnonzero(again)
            np.add.at(marks, at, 1)
            np.add.at(marks, at + n, -1)
            if int(lengths[np.cumsum(marks[:-1]) > 0].sum()) > most * total:
                return Drop(f"repeated {n}-grams")
        return text


def repeated(parts: list[str]) -> tuple[int, int]:
    """How many parts have come before, and their characters."""
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
    return count, characters


class C4Quality(DocumentFilter):
    """The page rules of C4 (Raffel et al. 2020, JMLR 21, section 2.2; thresholds of its code).

    datatrove has those of the first preprint (3 words, 5 sentences); with equal ones the verdicts agree, except that a
    curly bracket counts anywhere, as in the paper, not only in the lines that are kept. Citation marks stay, and lines
    about cookies and the like are left to BoilerplateLines.

    Args:
        terminal_punctuation: keep only lines that end in . ! ? or a quotation mark.
        min_words_per_line: keep only lines of that many words.
        min_sentences: sentences that a page must have after that.
        curly_brackets: leave out pages with a curly bracket, as C4 did against code.
    """

    def __init__(
        self,
        terminal_punctuation: bool = True,
        min_words_per_line: int = 5,
        min_sentences: int = 3,
        curly_brackets: bool = True,
    ) -> None:
        self.terminal_punctuation, self.min_words_per_line = terminal_punctuation, min_words_per_line
        self.min_sentences, self.curly_brackets = min_sentences, curly_brackets

    def __call__(self, document: Measured) -> str | Drop:
        """The lines that are kept, or why none are."""
        text = document.text
        if self.curly_brackets and "{" in text:
            return Drop("curly bracket")
        if "lorem ipsum" in text.lower():
            return Drop("lorem ipsum")
        kept = [line for line in document.lines if self._keep(line)]
        if sum(1 for line in kept for _ in _SENTENCE_END.finditer(line)) < self.min_sentences:
            return Drop("too few sentences")
        return text if len(kept) == len(document.lines) else "\n".join(kept)

    def _keep(self, line: str) -> bool:
        if self.terminal_punctuation and (not line.endswith((".", "!", "?", '"', "”")) or line.endswith("...")):
            return False
        return line.count(" ") + 1 >= self.min_words_per_line and "javascript" not in line.lower()


class FineWebQuality(DocumentFilter):
    """FineWeb's own rules (Penedo et al. 2024, arXiv 2406.17557, section 3.6), against lists and repeated lines.

    Thresholds are the paper's. datatrove differs: 0.01 of repeated characters where the paper says 0.1, and a fourth
    rule about the number of line ends per word. A colon, a semicolon or a quotation mark at a line's end counts as
    punctuation here, in datatrove only what ends a sentence (of any script).

    Args:
        min_punctuated_lines: share of lines that end in punctuation.
        max_repeated_characters: share of characters in lines that have come before.
        max_short_lines: share of lines with fewer than short_line characters.
        short_line: characters of a short line.
    """

    def __init__(
        self,
        min_punctuated_lines: float = 0.12,
        max_repeated_characters: float = 0.1,
        max_short_lines: float = 0.67,
        short_line: int = 30,
    ) -> None:
        self.min_punctuated_lines, self.max_repeated_characters = min_punctuated_lines, max_repeated_characters
        self.max_short_lines, self.short_line = max_short_lines, short_line

    def __call__(self, document: Measured) -> str | Drop:
        """The first rule that is broken, or the text."""
        lines = document.lines
        if not lines:
            return Drop("empty")
        if sum(line.endswith(_TERMINAL) for line in lines) <= self.min_punctuated_lines * len(lines):
            return Drop("few lines end in punctuation")
        if sum(len(line) < self.short_line for line in lines) >= self.max_short_lines * len(lines):
            return Drop("mostly short lines")
        _, characters = repeated(lines)
        if characters and characters >= self.max_repeated_characters * len(document.text):
            return Drop("characters in repeated lines")
        return document.text
