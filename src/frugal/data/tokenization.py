"""Byte-level BPE: trained on the training split, or loaded from a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from frugal.errors import UserError

EOT = "<|endoftext|>"
PIECE = 2**16  # characters of a text that are encoded at once: the library takes about 180 bytes for each
# Between a letter and a space before a letter, or after a line's end before a letter: the patterns of GPT-2, Llama 3,
# DeepSeek and Qwen all begin a new word there, so no token spans it.
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=[^\W\d_])")


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens.

    Args:
        vocab_size: size of a newly trained vocabulary (at least 257: all bytes and the end-of-text token).
        path: a tokenizer.json, or a folder that holds one, to load instead of training; its vocabulary must not be
            larger than vocab_size.
        special_tokens: further tokens of a newly trained vocabulary, beside the end-of-text token; text transforms add
            what they need themselves.
    """

    vocab_size: int = 4096
    path: str | None = None
    special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise UserError(f"data.tokenizer.vocab_size: must be at least 257 (bytes and end), got {self.vocab_size}")
        if self.vocab_size < 257 + len(self.special_tokens):
            raise UserError(
                f"data.tokenizer.vocab_size: {self.vocab_size} has no room for all bytes, the end and "
                f"{len(self.special_tokens)} special tokens"
            )

    @property
    def file(self) -> Path | None:
        """The tokenizer.json to load, or None to train one."""
        if self.path is None:
            return None
        path = Path(self.path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"data.tokenizer.path: no tokenizer.json at {self.path}")
        return path


def pieces(text: str) -> Iterator[str]:
    """A text in parts of about `PIECE` characters whose tokens, one part after the other, are the whole text's.

    A text without a place to cut stays whole. Of tokenizers whose tokens span words some tokens at the cuts may differ.
    """
    start = 0
    while len(text) - start > PIECE and (cut := _CUT.search(text, start + PIECE)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016; byte level: GPT-2); every text can be encoded and decoded exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(dict.fromkeys([EOT, *config.special_tokens])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for document in documents for piece in pieces(document)), trainer)
    return tokenizer


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer from a file's path or from its JSON text; it must know the end-of-text token."""
    try:
        tokenizer = Tokenizer.from_file(str(source)) if isinstance(source, Path) else Tokenizer.from_str(source)
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"data.tokenizer.path: no valid tokenizer ({str(error).splitlines()[0]})") from None
    if tokenizer.token_to_id(EOT) is None:
        raise UserError(f"data.tokenizer.path: the tokenizer has no {EOT} token, which separates documents")
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise UserError("data.tokenizer.path: only byte-level tokenizers are supported (their bytes can be counted)")
    return tokenizer


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token stands for, int64 [vocab]; 0 for special tokens.

    A byte-level token has one character per byte, so its length in characters is the number of bytes.
    """
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    added = {i: len(token.content.encode()) for i, token in tokenizer.get_added_tokens_decoder().items()}
    lengths = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    for token, i in tokenizer.get_vocab().items():
        lengths[i] = 0 if i in special else added.get(i, len(token))
    return lengths
