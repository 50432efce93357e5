"""Documents to fixed-length sequences: split, encode, store on a memory map; each step cached by fingerprint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from frugal.data.documents import Document
from frugal.data.sources import Source
from frugal.data.tokenization import EOT, TokenizerConfig, load_tokenizer, token_byte_lengths, train_tokenizer
from frugal.errors import UserError

log = logging.getLogger(__name__)
FORMAT_VERSION = 1  # part of the fingerprint: raise it when what is written changes


def split_documents(documents: Iterable[str | Document], val_fraction: float) -> tuple[list[str], list[str]]:
    """Split by position: the last `val_fraction` of all bytes is validation.

    The cut lies after the first line end at or beyond that position, inside a document if need be.

    Raises:
        UserError: there is no text, or one of the two parts would be empty.
    """
    texts = [document.text if isinstance(document, Document) else document for document in documents]
    return _split_texts(texts, val_fraction)


def _split_texts(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    sizes = [len(document.encode()) for document in documents]
    total = sum(sizes)
    if total == 0:
        raise UserError("data.source: there is no text in it")
    position, seen = int(total * (1 - val_fraction)), 0
    for i, (document, size) in enumerate(zip(documents, sizes, strict=True)):
        if seen + size > position:
            raw = document.encode()
            # A line's end: never inside a character, since no UTF-8 continuation byte is a newline.
            cut = raw.find(b"\n", position - seen) + 1 or size
            head, tail = raw[:cut].decode(), raw[cut:].decode()
            train = documents[:i] + ([head] if head else [])
            val = ([tail] if tail else []) + documents[i + 1 :]
            break
        seen += size
    else:
        train, val = documents, []
    if not train or not val:
        raise UserError(
            f"data.val_fraction: {val_fraction} of {total} bytes leaves no text for "
            f"{'validation' if train else 'training'}; give more text or another fraction"
        )
    return train, val


@dataclass(frozen=True)
class Prepared:
    """A corpus ready for training: token ids on memory maps, and the tokenizer they came from."""

    train: np.ndarray
    val: np.ndarray
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


def fingerprint(source: Source, tokenizer: TokenizerConfig, val_fraction: float) -> str:
    """Hash of the source's content, the tokenizer's settings and content, the split, and the code's versions."""
    file = tokenizer.file
    parts = {
        "source": source.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": hashlib.sha256(file.read_bytes()).hexdigest() if file else None,
        "val_fraction": val_fraction,
        "tokenizers": tokenizers.__version__,
        "format": FORMAT_VERSION,
        **({"special_tokens": tokenizer.special_tokens} if tokenizer.special_tokens else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prepare(source: Source, config: TokenizerConfig, val_fraction: float, cache_dir: str) -> Prepared:
    """Split, train or load the tokenizer, encode; or open the cache of an earlier call.

    The cache is written beside its final place and moved there in one step, so that an interrupted preparation
    leaves nothing that a later run would trust, and two processes do not harm each other.
    """
    key = fingerprint(source, config, val_fraction)
    folder = Path(cache_dir).expanduser() / key[:16]
    if not (folder / "meta.json").is_file():
        start = time.perf_counter()
        train, val = split_documents(source.documents(), val_fraction)
        tokenizer = load_tokenizer(config.file) if config.file else train_tokenizer(train, config)
        if tokenizer.get_vocab_size() > config.vocab_size:
            raise UserError(
                f"data.tokenizer.vocab_size: {config.vocab_size} is less than the {tokenizer.get_vocab_size()} tokens "
                f"of {config.path}"
            )
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.mkdir(parents=True)
            meta: dict[str, Any] = {"fingerprint": key, "source": source.name, "val_fraction": val_fraction}
            for name, documents in (("train", train), ("val", val)):
                meta[name] = _write_tokens(temporary / f"{name}.bin", documents, tokenizer)
            meta["seconds_by_stage"] = source.seconds_by_stage()
            meta["seconds"] = round(time.perf_counter() - start, 3)
            _write(temporary / "tokenizer.json", tokenizer.to_str().encode())
            _write(temporary / "meta.json", json.dumps(meta, indent=2).encode())
            try:
                temporary.rename(folder)
            except OSError:
                if not (folder / "meta.json").is_file():
                    raise  # otherwise another process was faster: its result is the same
        except OSError as error:
            raise UserError(f"data.cache_dir: cannot write {folder}: {error.strerror}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
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
    return Prepared(train_map, val_map, tokenizer, meta, folder)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_tokens(path: Path, documents: list[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Encode documents, each preceded by the end-of-text token, so that every byte of text is predicted."""
    end = tokenizer.token_to_id(EOT)
    # A text may contain the marker itself (TinyStories does): there it is text like any other, and its bytes count.
    tokenizer.encode_special_tokens = True
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)
    lengths = token_byte_lengths(tokenizer)
    tokens = text_bytes = 0
    with path.open("wb") as file:
        for start in range(0, len(documents), 256):
            for encoding in tokenizer.encode_batch_fast(documents[start : start + 256], add_special_tokens=False):
                ids = np.array([end, *encoding.ids], dtype=dtype)
                file.write(ids.tobytes())
                tokens += len(ids)
                text_bytes += int(lengths[ids].sum())
        file.flush()
        os.fsync(file.fileno())
    expected = sum(len(document.encode()) for document in documents)
    if text_bytes != expected:
        raise UserError(
            f"data.tokenizer.path: the tokenizer changes the text ({expected} bytes became {text_bytes}), so bits per "
            "byte would be wrong; use one without normalisation"
        )
    return {"documents": len(documents), "tokens": tokens, "bytes": text_bytes, "dtype": dtype.name}
