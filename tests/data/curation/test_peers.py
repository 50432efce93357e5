"""The published quality rules against datatrove's, on the same documents and the same splitting into words.

datatrove's own splitters need downloads; here both sides split alike, so that what is compared is rules and thresholds.
"""

import random
from collections import Counter
from typing import Any

import datatrove.pipeline.filters.c4_filters as c4
import datatrove.pipeline.filters.fineweb_quality_filter as fineweb
import datatrove.pipeline.filters.gopher_quality_filter as gopher
import datatrove.pipeline.filters.gopher_repetition_filter as repetition
import pytest
from datatrove.data import Document as Row

from frugal.data.curation.base import Drop, Measured
from frugal.data.curation.quality import (
    _SENTENCE_END,
    _TERMINAL,
    C4Quality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
)
from frugal.data.sources import ApiDocs, KingJames


def corpus() -> list[str]:
    """Scripture, HTML, and chapters spoilt in ways that the rules are about."""
    rng = random.Random(1)
    chapters = list(KingJames().documents())[:150]
    texts = chapters + list(ApiDocs(["s3"]).documents())[:200]
    for text in chapters[:60]:
        lines = text.split("\n")
        texts.append("- " + text.replace("\n", rng.choice(["\n- ", "\n• "])))
        texts.append(text.replace(".\n", rng.choice(["...\n", "\n", " #\n", " {\n"])))
        texts.append("\n".join([*lines, *lines[: rng.choice([1, 2, 3, 5, 8])]]))
        texts.append("\n\n".join([*lines[:4], *lines[: rng.choice([1, 2, 3])]]))
        texts.append(text + rng.choice([" and", " # and", " 17", "..."]) * rng.choice([5, 20, 60, 200]))
        texts.append("\n".join(" ".join(rng.sample(text.split(), 3)) for _ in range(40)))
        texts.append("".join(c if c.isspace() or rng.random() < 0.6 else rng.choice("#$%&*0123456789") for c in text))
    return [*texts, ("Wort folgt auf Wort. " * 20).strip()]


TEXTS = corpus()


def verdicts(ours: Any, theirs: Any) -> tuple[list[str], list[str]]:
    """Reasons of both sides for each document; empty where it is kept."""
    own, others = [], []
    for text in TEXTS:
        result, other = ours(Measured(text)), theirs.filter(Row(text, "x"))
        own.append(result.reason if isinstance(result, Drop) else "")
        others.append("" if other is True else other[1])
    return own, others


def words(text: str, language: str) -> list[str]:
    return text.split()


def test_gopher_quality_is_datatroves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gopher, "split_into_words", words)
    own, others = verdicts(GopherQuality(), gopher.GopherQualityFilter())
    assert [bool(reason) for reason in own] == [bool(reason) for reason in others]
    assert {"too few words", "too many bullets", "too many hash signs", "too few stop words", ""} <= set(own)


def test_fineweb_is_datatroves_but_for_what_ends_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fineweb, "split_into_words", words)
    theirs = fineweb.FineWebQualityFilter(char_duplicates_ratio=0.1, new_line_ratio=10**9, short_line_length=29)
    theirs.stop_chars = (*theirs.stop_chars, *_TERMINAL)
    own, others = verdicts(FineWebQuality(), theirs)
    assert [bool(reason) for reason in own] == [bool(reason) for reason in others]
    assert len(set(own)) == 4  # each rule, and what is kept


def test_c4_is_datatroves_but_for_brackets_in_lines_that_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c4, "split_into_sentences", lambda text, language: list(_SENTENCE_END.finditer(text)))
    theirs = c4.C4QualityFilter(min_num_sentences=3, min_words_per_line=5, remove_citations=False, filter_policy=False)
    own, others = verdicts(C4Quality(), theirs)
    differ = {pair for pair in zip(own, others, strict=True) if bool(pair[0]) != bool(pair[1])}
    assert differ <= {("curly bracket", "")}
    assert sum(a != "" and b != "" for a, b in zip(own, others, strict=True)) > 50 < own.count("")


def test_gopher_repetition_differs_in_n_grams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repetition, "split_into_words", lambda text, language: Measured(text).plain_words)
    lines, theirs = GopherRepetition(), repetition.GopherRepetitionFilter(top_n_grams=(), dup_n_grams=())
    lines.TOP, lines.DUPLICATED = {}, {}  # type: ignore[misc]
    own, others = verdicts(lines, theirs)
    assert [bool(reason) for reason in own] == [bool(reason) for reason in others] and len(set(own)) == 3
    own, others = verdicts(GopherRepetition(), repetition.GopherRepetitionFilter())
    for text, mine, other in zip(TEXTS, own, others, strict=True):
        if other.startswith("top_") and not mine:  # the most frequent n-gram occurs once
            n, plain = int(other.split("_")[1]), Measured(text).plain_words
            grams = Counter(tuple(plain[i : i + n]) for i in range(len(plain) - n + 1))
            assert max(grams.values()) == 1, (text[:80], other)
        else:
            assert mine or not other
