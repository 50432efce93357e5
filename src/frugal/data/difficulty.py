"""How hard each training sequence is: found once, cached beside the prepared corpus, and charged to every run.

Shape letters: M sequences of a source, T tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from frugal.data.cache import new_folder
from frugal.data.packing import Prepared
from frugal.errors import require

Difficulty = Literal["rarity", "compressibility", "length", "level", "loss", "random"]
VERSION = 2  # part of the cache's key: raise it when a score changes


class Scorer(ABC):
    """Something that has an opinion on how hard samples are, for instance a model trained before."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the scores may."""


class TextScorer(Scorer):
    """An opinion on sequences of tokens."""

    @abstractmethod
    def score(self, windows_MT: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        """Difficulty of each sequence, float64 [M]; higher is harder.

        Raises:
            UserError: it cannot read this vocabulary or sequences as long as these.
        """


def check_reference(key: str, kind: str, reference: Scorer | None) -> None:
    """Refuse a loss without a model, and a model that nothing asks.

    Raises:
        UserError: naming the key.
    """
    require(
        (kind == "loss") == (reference is not None),
        f"{key}.reference: difficulty loss needs a reference model, and no other difficulty does",
    )


def difficulties(
    kind: Difficulty,
    tokens: np.ndarray,
    seq_len: int,
    starts: np.ndarray,
    levels: np.ndarray,
    counts: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Difficulty of each whole sequence of a source by its tokens alone, float64 [M]; higher is harder.

    Args:
        kind: any but loss.
        tokens: the source's training tokens; sequence k begins at token k T.
        starts: where its documents begin, and the end, [documents + 1].
        levels: of each document, -1 where unknown.
        counts: how often each token occurs in the whole training text, [vocabulary].
        seed: of the random control.

    Raises:
        UserError: `level` for a source that knows none.
    """
    n = _whole_sequences(tokens, seq_len)
    if kind == "random":
        return np.random.Generator(np.random.Philox(key=[seed, 1 << 62])).random(n)
    windows = _windows(tokens, seq_len)
    if kind == "rarity":
        surprise = -np.log(np.maximum(counts, 1) / max(counts.sum(), 1))
        return surprise[windows].mean(axis=1)
    if kind == "compressibility":
        return np.array([len(zlib.compress(window.tobytes(), 6)) / window.nbytes for window in windows])
    first = np.searchsorted(starts, np.arange(n) * seq_len, side="right") - 1
    last = np.searchsorted(starts, (np.arange(n) + 1) * seq_len - 1, side="right") - 1
    if kind == "length":
        return np.array([np.diff(starts)[a : b + 1].mean() for a, b in zip(first, last, strict=True)])
    require(
        bool((levels >= 0).any()),
        "data.curriculum.difficulty (data.adaptive.by): level needs a source that knows levels (a synthetic one); use "
        "rarity, compressibility or length",
    )
    return np.array([levels[a : b + 1].max() for a, b in zip(first, last, strict=True)], dtype=np.float64)


def _whole_sequences(tokens: np.ndarray, seq_len: int) -> int:
    return (len(tokens) - 1) // seq_len - 1


def _windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    n = _whole_sequences(tokens, seq_len)
    return np.asarray(tokens[: n * seq_len]).reshape(n, seq_len)


def difficulty_scores(
    prepared: Prepared, kind: Difficulty, seq_len: int, seed: int, reference: Scorer | None = None
) -> tuple[list[np.ndarray], float]:
    """Difficulty of each source's whole sequences, float64 [M] each, and the seconds that finding them took.

    The scores lie in the prepared corpus' folder; a later run reads them and is charged the same seconds.

    Raises:
        UserError: the source knows no levels, the reference cannot read the text, or the cache cannot be written.
    """
    require(
        reference is None or isinstance(reference, TextScorer),
        f"data.curriculum.reference: {type(reference).__name__} scores images, not text",
    )
    facts = [VERSION, kind, seq_len, seed if kind == "random" else 0, reference.fingerprint() if reference else ""]

    def compute() -> list[np.ndarray]:
        counts = np.bincount(prepared.train, minlength=prepared.tokenizer.get_vocab_size())
        return [
            reference.score(_windows(part.train, seq_len), prepared.tokenizer)
            if isinstance(reference, TextScorer)
            else difficulties(kind, part.train, seq_len, part.starts, part.levels, counts, seed + i)
            for i, part in enumerate(prepared.parts)
        ]

    return cached_scores(prepared.folder, facts, compute)


def cached_scores(
    folder: Path, facts: list[Any], compute: Callable[[], list[np.ndarray]]
) -> tuple[list[np.ndarray], float]:
    """Scores by the facts that they depend on, found once, and the seconds that it took.

    Raises:
        UserError: the cache cannot be written.
    """
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder = folder / f"difficulty-{key}"
    if not (folder / "meta.json").is_file():
        start = time.perf_counter()
        scores = compute()
        with new_folder(folder, "meta.json") as temporary:
            for i, score in enumerate(scores):
                np.save(temporary / f"{i}.npy", score)
            meta = {"facts": facts, "parts": len(scores), "seconds": round(time.perf_counter() - start, 3)}
            (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return [np.load(folder / f"{i}.npy") for i in range(meta["parts"])], float(meta["seconds"])
