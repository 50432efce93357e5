"""Documents to fixed-length sequences: split, encode, store on a memory map; each step cached by fingerprint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from frugal.data.cache import new_folder
from frugal.data.curation.pipeline import CurationConfig
from frugal.data.curation.stage import REPORT_FILES, curated_parts, curation_seconds
from frugal.data.documents import Document
from frugal.data.progress import progress_bar
from frugal.data.sources import Source, WeightedSource
from frugal.data.splits import Split, split_documents
from frugal.data.tokenization import (
    EOT,
    TokenizerConfig,
    load_tokenizer,
    pieces,
    token_byte_lengths,
    train_tokenizer,
)
from frugal.errors import UserError

log = logging.getLogger(__name__)
FORMAT_VERSION = 3  # part of the fingerprint: raise it when what is written changes


@dataclass(frozen=True)
class Part:
    """One source of a prepared corpus.

    Args:
        name: what it is called in metrics.
        weight: its share of the training sequences, relative to the others'.
        train: its training tokens [tokens], a stretch of the corpus' whole stream.
        start: where that stretch begins in the whole stream.
        starts: where each training document begins in `train`, and its end, int64 [documents + 1].
        levels: difficulty of each training document, int16 [documents]; -1 where its source knows none.
        val: its validation tokens [tokens].
    """

    name: str
    weight: float
    train: np.ndarray
    start: int
    starts: np.ndarray
    levels: np.ndarray
    val: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """A corpus ready for training: token ids on memory maps, and the tokenizer they came from.

    `train` and `val` hold the parts' tokens one part after the other.
    """

    train: np.ndarray
    val: np.ndarray
    parts: tuple[Part, ...]
    tokenizer: Tokenizer
    meta: dict[str, Any]
    folder: Path

    @property
    def fingerprint(self) -> str:
        """Hash of everything the tokens depend on."""
        return self.meta["fingerprint"]

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training text."""
        return self.meta["train"]["bytes"]

    @property
    def val_bytes(self) -> int:
        """UTF-8 bytes of the validation text."""
        return self.meta["val"]["bytes"]


def fingerprint(
    source: Source,
    tokenizer: TokenizerConfig,
    val_fraction: float,
    split: Split = "position",
    curation: CurationConfig | None = None,
) -> str:
    """Hash of the source's content, the tokenizer's, the split, the filters, and the code's versions."""
    file = tokenizer.file
    parts = {
        "source": source.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": hashlib.sha256(file.read_bytes()).hexdigest() if file else None,
        "val_fraction": val_fraction,
        "split": split,
        "tokenizers": tokenizers.__version__,
        "format": FORMAT_VERSION,
        **({"special_tokens": tokenizer.special_tokens} if tokenizer.special_tokens else {}),
        **({"curation": curation.fingerprint()} if curation else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prepare(
    source: Source,
    config: TokenizerConfig,
    val_fraction: float,
    cache_dir: str,
    split: Split = "position",
    curation: CurationConfig | None = None,
) -> Prepared:
    """Split, curate, train or load the tokenizer, encode; or open the cache of an earlier call.

    Raises:
        UserError: there is too little text, the tokenizer does not fit, or the cache cannot be written.
    """
    key = fingerprint(source, config, val_fraction, split, curation)
    folder = Path(cache_dir).expanduser() / key[:16]
    if not (folder / "meta.json").is_file():
        start = time.perf_counter()
        sides = [_split_part(part, val_fraction, split) for part in source.parts()]
        stages = source.seconds_by_stage()
        report = None
        if curation:
            sides, report = _curate(source, sides, val_fraction, cache_dir, split, curation)
            stages = stages | {"curation": curation_seconds(report)}
        texts = [document.text for train, _ in sides for document in train]
        with progress_bar() as progress, new_folder(folder, "meta.json") as temporary:
            if config.file:
                tokenizer = load_tokenizer(config.file)
            else:
                tokenizer = train_tokenizer(_counted(texts, "reading for the tokenizer", progress), config)
            if tokenizer.get_vocab_size() > config.vocab_size:
                raise UserError(
                    f"data.tokenizer.vocab_size: {config.vocab_size} is less than the {tokenizer.get_vocab_size()} "
                    f"tokens of {config.path}"
                )
            meta: dict[str, Any] = {"fingerprint": key, "source": source.name, "val_fraction": val_fraction}
            for name, per_part in zip(("train", "val"), zip(*sides, strict=True), strict=True):
                meta[name] = _write_tokens(temporary / name, per_part, tokenizer, progress)
            meta["parts"] = [part.called for part in source.parts()]
            meta["seconds_by_stage"] = stages
            meta["seconds"] = round(time.perf_counter() - start, 3)
            for file in REPORT_FILES if report else ():
                shutil.copyfile(report / file, temporary / file)  # type: ignore[operator]
            _write(temporary / "tokenizer.json", tokenizer.to_str().encode())
            _write(temporary / "meta.json", json.dumps(meta, indent=2).encode())
        log.info(
            "prepared %s: %s training and %s validation tokens, %.2f bytes per token, %.1f s",
            source.name,
            f"{meta['train']['tokens']:,}",
            f"{meta['val']['tokens']:,}",
            meta["train"]["bytes"] / meta["train"]["tokens"],
            meta["seconds"],
        )
    else:
        log.debug("prepared corpus %s found in %s", source.name, folder)
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    for name in ("train", "val"):
        size, expected = (folder / f"{name}.bin").stat().st_size, meta[name]["tokens"]
        if size != expected * np.dtype(meta[name]["dtype"]).itemsize:
            raise UserError(f"data.cache_dir: {folder}/{name}.bin does not hold its {expected} tokens; delete {folder}")
    train_map, val_map = (
        np.memmap(folder / f"{name}.bin", dtype=meta[name]["dtype"], mode="r") for name in ("train", "val")
    )
    starts, levels = (np.load(folder / f"train.{name}.npy", mmap_mode="r") for name in ("starts", "levels"))
    parts = []
    for i, part in enumerate(source.parts()):
        (first, last), (val_first, val_last) = (meta[name]["parts"][i] for name in ("train", "val"))
        documents = slice(*np.searchsorted(starts, [first, last]))
        own = np.append(starts[documents], last) - first
        parts.append(
            Part(
                part.called,
                part.weight,
                train_map[first:last],
                first,
                own,
                levels[documents],
                val_map[val_first:val_last],
            )
        )
    return Prepared(train_map, val_map, tuple(parts), tokenizer, meta, folder)


def _counted(texts: Sequence[str], name: str, progress: Callable[[str, float], None]) -> Iterator[str]:
    """The texts, saying how far one has got."""
    size, done = sum(map(len, texts)), 0
    for text in texts:
        yield text
        done += len(text)
        progress(name, done / size)


def curation_key(source: Source, val_fraction: float, split: Split) -> str:
    """What the documents to be curated, and those held out, depend on."""
    return json.dumps([source.fingerprint(), val_fraction, split])


def _curate(
    source: Source,
    sides: list[tuple[list[Document], list[Document]]],
    val_fraction: float,
    cache_dir: str,
    split: Split,
    curation: CurationConfig,
) -> tuple[list[tuple[list[Document], list[Document]]], Path]:
    """The same sides with curated training documents; validation is only looked at."""
    key = curation_key(source, val_fraction, split)
    names = [part.called for part in source.parts()]
    held_out = [document for _, val in sides for document in val]
    train, report = curated_parts(names, [train for train, _ in sides], held_out, curation, key, cache_dir)
    return [(own, val) for own, (_, val) in zip(train, sides, strict=True)], report


def _split_part(part: WeightedSource, val_fraction: float, split: Split) -> tuple[list[Document], list[Document]]:
    try:
        return split_documents(part.source.documents(), val_fraction, split)
    except UserError as error:
        if str(error).startswith("data.val_fraction"):
            raise UserError(f"{error} (source {part.called})") from None
        raise


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _batches(documents: Sequence[Document], characters: int = 2**20) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of the documents, each with whether it begins one, as many as make up so many characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        for i, piece in enumerate(pieces(document.text)):
            batch.append((piece, i == 0))
            size += len(piece)
            if size >= characters:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _write_tokens(
    stem: Path, parts: Sequence[list[Document]], tokenizer: Tokenizer, progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Encode documents, each preceded by the end-of-text token, so that every byte of text is predicted.

    Writes `stem`.bin, the tokens of one part after the other, and what is known of each document beside it.
    """
    end = tokenizer.token_to_id(EOT)
    # A text may contain the marker itself (TinyStories does): there it is text like any other, and its bytes count.
    tokenizer.encode_special_tokens = True
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)
    lengths = token_byte_lengths(tokenizer)
    tokens = text_bytes = 0
    starts: list[int] = []
    ranges: list[tuple[int, int]] = []
    every = [document for documents in parts for document in documents]
    size, done = sum(len(document.text) for document in every), 0
    with stem.with_suffix(".bin").open("wb") as file:
        for documents in parts:
            first = tokens
            for batch in _batches(documents):
                encodings = tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
                for encoding, (piece, begins) in zip(encodings, batch, strict=True):
                    ids = np.array([end] * begins + encoding.ids, dtype=dtype)
                    file.write(ids.tobytes())
                    if begins:
                        starts.append(tokens)
                    tokens += len(ids)
                    text_bytes += int(lengths[ids].sum())
                    done += len(piece)
                progress("tokenizing", done / size)
            ranges.append((first, tokens))
        file.flush()
        os.fsync(file.fileno())
    np.save(stem.with_suffix(".starts.npy"), np.array(starts, dtype=np.int64))
    levels = [-1 if document.level is None else document.level for document in every]
    np.save(stem.with_suffix(".levels.npy"), np.array(levels, dtype=np.int16))
    expected = sum(len(document.text.encode()) for document in every)
    if text_bytes != expected:
        raise UserError(
            f"data.tokenizer.path: the tokenizer changes the text ({expected} bytes became {text_bytes}), so bits per "
            "byte would be wrong; use one without normalisation"
        )
    return {"documents": len(every), "tokens": tokens, "bytes": text_bytes, "dtype": dtype.name, "parts": ranges}
