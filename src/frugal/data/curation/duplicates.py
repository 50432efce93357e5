"""Filters that compare documents: copies, near-copies, and text of the validation split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frugal.data.curation.base import CorpusFilter, Drop, Measured
from frugal.data.documents import content_hash
from frugal.errors import UserError, require


class ExactDuplicates(CorpusFilter):
    """Keep the first of documents that say the same: equal but for case, spacing and Unicode form."""

    def verdicts(self, documents: Sequence[Measured], held_out: Sequence[Measured]) -> list[Drop | None]:
        """A copy of an earlier document, or of a validation document."""
        seen = {content_hash(document.text): "copy of validation text" for document in held_out}
        result: list[Drop | None] = []
        for document in documents:
            key = content_hash(document.text)
            result.append(Drop(seen[key]) if key in seen else None)
            seen.setdefault(key, "copy of an earlier document")
        return result


class NearDuplicates(CorpusFilter):
    """Keep the first of documents that are nearly the same (MinHash: Broder 1997; banding as in FineWeb).

    Candidates share a band of the signature; the signatures' agreement, an estimate of the Jaccard similarity of the
    documents' n-grams of words, then decides.

    Args:
        threshold: Jaccard similarity from which a document counts as a copy.
        ngram: words per n-gram.
        bands: bands of the signature.
        rows: values per band; two documents of similarity s share a band with probability 1 - (1 - s^rows)^bands.
        seed: of the hash functions.
    """

    def __init__(self, threshold: float = 0.7, ngram: int = 5, bands: int = 20, rows: int = 6, seed: int = 1) -> None:
        require(0 < threshold <= 1, f"data.curation: NearDuplicates.threshold: must lie in (0, 1], got {threshold}")
        require(
            min(ngram, bands, rows) > 0, "data.curation: NearDuplicates: ngram, bands and rows must all be positive"
        )
        self.threshold, self.ngram, self.bands, self.rows, self.seed = threshold, ngram, bands, rows, seed

    def signatures(self, documents: Sequence[Measured]) -> np.ndarray:
        """MinHash signatures, uint32 [documents, bands x rows]."""
        try:
            from rensa import RMinHash
        except ImportError:
            raise UserError("data.curation: NearDuplicates needs rensa; pip install -e '.[curation]'") from None
        size = self.bands * self.rows
        parts = [np.empty((0, size), dtype=np.uint32)]
        for first in range(0, len(documents), 1024):
            rows = [self._ngrams(document) for document in documents[first : first + 1024]]
            ends = np.cumsum([0, *map(len, rows)], dtype=np.uint64)
            matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(rows), ends, size, self.seed)
            parts.append(np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(rows), size))
        return np.concatenate(parts)

    def _ngrams(self, document: Measured) -> np.ndarray:
        """Repeated ones included: a minimum is the same. A document shorter than an n-gram is one of its own."""
        return document.ngram_hashes(min(self.ngram, max(len(document.plain_words), 1)))

    def verdicts(self, documents: Sequence[Measured], held_out: Sequence[Measured]) -> list[Drop | None]:
        """A near-copy of an earlier document that is kept."""
        signatures = self.signatures(documents)
        size = self.bands * self.rows
        banded = np.ascontiguousarray(signatures).view(f"V{4 * self.rows}").reshape(len(documents), self.bands)
        buckets: list[dict[bytes, list[int]]] = [{} for _ in range(self.bands)]
        result: list[Drop | None] = []
        for i in range(len(documents)):
            keys = [value.tobytes() for value in banded[i]]
            candidates = sorted({j for band, key in zip(buckets, keys, strict=True) for j in band.get(key, ())})
            if candidates and len(documents[i].plain_words):
                agreement = (signatures[candidates] == signatures[i]).sum(axis=1) / size
                if agreement.max() >= self.threshold:
                    result.append(Drop("near-copy of an earlier document"))
                    continue
            for band, key in zip(buckets, keys, strict=True):
                band.setdefault(key, []).append(i)
            result.append(None)
        return result


class Contamination(CorpusFilter):
    """Leave out documents that repeat the validation text: runs of words in common (GPT-3, Brown et al. 2020, app. C).

    Args:
        ngram: words of a run; 13 as in GPT-3.
        most: share of a document's runs that may also stand in the validation text; 0 allows none.
    """

    def __init__(self, ngram: int = 13, most: float = 0.0) -> None:
        require(ngram > 0, f"data.curation: Contamination.ngram: must be positive, got {ngram}")
        require(0 <= most < 1, f"data.curation: Contamination.most: must lie in [0, 1), got {most}")
        self.ngram, self.most = ngram, most

    def verdicts(self, documents: Sequence[Measured], held_out: Sequence[Measured]) -> list[Drop | None]:
        """Text in common with validation."""
        known = np.unique(np.concatenate([np.empty(0, np.uint64), *(d.ngram_hashes(self.ngram) for d in held_out)]))
        if len(known) == 0:
            return [None] * len(documents)
        result: list[Drop | None] = []
        for document in documents:
            hashes = document.ngram_hashes(self.ngram)
            if len(hashes) == 0:
                result.append(None)
                continue
            at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            shared = np.count_nonzero(known[at] == hashes)
            result.append(Drop("shares text with validation") if shared > self.most * len(hashes) else None)
        return result
