"""A list of filters over a corpus, on all cores, with an account of what each did."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from frugal.data.curation.base import CorpusFilter, DocumentFilter, Drop, Measured
from frugal.data.curation.duplicates import Contamination, ExactDuplicates, NearDuplicates
from frugal.data.curation.normalise import BoilerplateLines, NormaliseUnicode, StripHtml
from frugal.data.curation.pii import MaskPII
from frugal.data.curation.quality import FineWebQuality, GopherQuality, Length
from frugal.data.documents import Document
from frugal.errors import UserError, require

VERSION = 3  # part of the fingerprint: raise it when a verdict changes
CHUNK_BYTES = 2**20  # text that a worker process is given at a time
PARALLEL_BYTES = 8 * 2**20  # less text than this is not worth a second process
BANDS = {f"under {limit:,} bytes": limit for limit in (100, 1_000, 10_000, 100_000)} | {"more": sys.maxsize}
TERMS = {
    "she": ("she", "her", "hers", "woman", "women", "girl", "mother", "daughter", "sister", "wife", "queen"),
    "he": ("he", "him", "his", "man", "men", "boy", "father", "son", "brother", "husband", "king"),
}


def quick_profile() -> list[DocumentFilter | CorpusFilter]:
    """Clean, length, published quality rules, personal data, copies, validation text; English prose is assumed."""
    return [
        NormaliseUnicode(),
        StripHtml(),
        BoilerplateLines(),
        Length(),
        GopherQuality(),
        FineWebQuality(),
        MaskPII(),
        ExactDuplicates(),
        NearDuplicates(),
        Contamination(),
    ]


@dataclass(frozen=True)
class CurationConfig:
    """Which filters a corpus goes through before training; validation text never does.

    Args:
        filters: in this order; null is the quick profile.
        processes: how many work on documents at once; null: one per core. The result does not depend on it.
        terms: lists of words; the report says what share of the documents with one of them was left out.
        examples: documents left out that the report shows per filter.
    """

    filters: list[DocumentFilter | CorpusFilter] | None = None
    processes: int | None = None
    terms: dict[str, list[str]] = field(default_factory=lambda: {name: list(words) for name, words in TERMS.items()})
    examples: int = 3

    def __post_init__(self) -> None:
        require(
            self.processes is None or self.processes > 0,
            f"data.curation.processes: must be positive, got {self.processes}",
        )
        require(self.examples >= 0, f"data.curation.examples: must not be negative, got {self.examples}")
        require(self.filters is None or bool(self.filters), "data.curation.filters: an empty list; null means quick")

    def chosen(self) -> list[DocumentFilter | CorpusFilter]:
        """The filters."""
        return quick_profile() if self.filters is None else list(self.filters)

    def fingerprint(self) -> str:
        """Hash of everything the verdicts and the report depend on."""
        libraries = {}
        for library in ("selectolax", "rensa", "py3langid"):
            try:
                libraries[library] = importlib.metadata.version(library)
            except importlib.metadata.PackageNotFoundError:
                continue
        parts = {
            "filters": [(f.name, f.settings()) for f in self.chosen()],
            "terms": self.terms,
            "examples": self.examples,
            "libraries": libraries,
            "version": VERSION,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class Account:
    """What one filter did; bytes are of UTF-8, seconds those of the processors, summed."""

    name: str
    documents: int = 0
    dropped: int = 0
    changed: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    dropped_by_source: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)

    def note(self, before: Document, size: int, after: str | Drop, examples: int) -> int:
        """Enter one verdict; gives the bytes of the text that goes on."""
        self.documents += 1
        self.bytes_in += size
        if isinstance(after, Drop):
            self.dropped += 1
            self.reasons[after.reason] += 1
            self.dropped_by_source[before.source] += 1
            if len(self.examples) < examples:
                text = " ".join(before.text[:600].split())[:160]
                self.examples.append({"source": before.source, "reason": after.reason, "text": text})
            return 0
        if after is not before.text:
            self.changed += 1
            size = text_bytes(after)
        self.bytes_out += size
        return size

    def add(self, other: Account, examples: int) -> None:
        """Enter what another process noted of the same filter."""
        for name in ("documents", "dropped", "changed", "bytes_in", "bytes_out", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons.update(other.reasons)
        self.dropped_by_source.update(other.dropped_by_source)
        self.examples = (self.examples + other.examples)[:examples]


@dataclass(frozen=True)
class Curated:
    """What a list of filters made of a corpus.

    Args:
        documents: what is kept, in the order given.
        kept: which of the given documents those are, by position.
        accounts: what each filter did.
        seconds: from beginning to end, by the clock.
    """

    documents: list[Document]
    kept: list[int]
    accounts: list[Account]
    seconds: float


def judge(filters: Sequence[DocumentFilter], text: str) -> str | Drop:
    """One text through filters that need no other document: the same verdict here and on a cluster."""
    for one in filters:
        after = one(Measured(text))
        if isinstance(after, Drop):
            return after
        text = after
    return text


def curate(
    documents: Sequence[Document],
    held_out: Sequence[Document],
    config: CurationConfig,
    progress: Callable[[str, float], None] = lambda name, share: None,
) -> Curated:
    """Run documents through the filters; `held_out`, the validation text, is only looked at.

    Args:
        progress: called with the name of what is at work and the share of it that is done.

    Raises:
        UserError: nothing is left, or a worker process died.
    """
    begin = time.perf_counter()
    accounts: list[Account] = []
    current, kept = list(documents), list(range(len(documents)))
    against: list[Measured] | None = None
    for alone, group in groupby(config.chosen(), key=lambda f: isinstance(f, DocumentFilter)):
        filters: list[Any] = list(group)
        if alone:
            new = [Account(f.name) for f in filters]
            title = ", ".join(account.name for account in new)
            results: list[Document | None] = []
            for chunk, chunk_accounts in _each_alone(current, filters, config):
                results += chunk
                for account, part in zip(new, chunk_accounts, strict=True):
                    account.add(part, config.examples)
                progress(title, len(results) / max(len(current), 1))
            accounts += new
            pairs = [(document, i) for document, i in zip(results, kept, strict=True) if document is not None]
            current, kept = [document for document, _ in pairs], [i for _, i in pairs]
            continue
        measured = [Measured(document.text) for document in current]
        for one in filters:
            if against is None:
                against = [Measured(document.text) for document in held_out]
            progress(one.name, 0.0)
            account = Account(one.name)
            start = time.process_time()
            verdicts = one.verdicts(measured, against)
            account.seconds = time.process_time() - start
            for document, verdict in zip(current, verdicts, strict=True):
                account.note(document, text_bytes(document.text), verdict or document.text, config.examples)
            left = [i for i, verdict in enumerate(verdicts) if verdict is None]
            current, kept, measured = ([x[i] for i in left] for x in (current, kept, measured))  # type: ignore[assignment]
            accounts.append(account)
            progress(one.name, 1.0)
    if not current:
        most = max(accounts, key=lambda account: account.dropped)
        reason = f", most by {most.name}: {most.reasons.most_common(1)[0][0]}" if most.dropped else ""
        raise UserError(f"data.curation: nothing is left of {len(documents)} documents{reason}")
    return Curated(current, kept, accounts, time.perf_counter() - begin)


def _each_alone(
    documents: Sequence[Document], filters: list[DocumentFilter], config: CurationConfig
) -> Iterator[tuple[list[Document | None], list[Account]]]:
    chunks = list(_chunks(documents))
    processes = min(config.processes or cores(), len(chunks))
    if processes < 2 or sum(len(document.text) for document in documents) < PARALLEL_BYTES:
        yield from ((run_chunk(filters, chunk, config.examples)) for chunk in chunks)
        return
    # Forked children inherit the modules; elsewhere they import this one, which is light.
    method = "fork" if sys.platform == "linux" else "spawn"
    with ProcessPoolExecutor(processes, multiprocessing.get_context(method)) as pool:
        try:
            count = len(chunks)
            yield from pool.map(run_chunk, [filters] * count, chunks, [config.examples] * count)
        except BrokenProcessPool:
            raise UserError(
                "data.curation: a worker process was killed, most likely for want of memory; set "
                "data.curation.processes to 1"
            ) from None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(documents: Sequence[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def run_chunk(
    filters: Sequence[DocumentFilter], documents: Sequence[Document], examples: int
) -> tuple[list[Document | None], list[Account]]:
    """Documents through filters one by one; statistics are shared between filters until a text changes.

    What a statistic costs is charged to the filter that asks for it first.
    """
    accounts = [Account(f.name) for f in filters]
    results: list[Document | None] = []
    clock = time.thread_time  # not the wall's: other programs must not count
    for document in documents:
        measured = Measured(document.text)
        size = text_bytes(document.text)
        for one, account in zip(filters, accounts, strict=True):
            start = clock()
            after = one(measured)
            account.seconds += clock() - start
            size = account.note(document, size, after, examples)
            if isinstance(after, Drop):
                results.append(None)
                break
            if after is not document.text:
                document = replace(document, text=after)
                measured = Measured(after)
        else:
            results.append(document)
    return results, accounts


def text_bytes(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def measured_groups(documents: Iterable[Document], terms: dict[str, list[str]]) -> Iterator[list[tuple[str, str]]]:
    """The groups that each document belongs to, as (kind, name), for the report on coverage."""
    lists = {name: frozenset(word.lower() for word in words) for name, words in terms.items()}
    for document in documents:
        size = text_bytes(document.text)
        band = next(name for name, limit in BANDS.items() if size < limit)
        groups = [("source", document.source), ("length", band)]
        if lists:
            words = set(Measured(document.text).plain_words)
            groups += [("terms", name) for name, own in lists.items() if not own.isdisjoint(words)]
        yield groups
