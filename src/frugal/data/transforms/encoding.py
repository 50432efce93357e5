"""Between token ids and text, where a window of the stream may begin or end inside a character."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers


def byte_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level token stands for (the table of GPT-2, Radford et al. 2019)."""
    # Printable bytes stand for themselves; the others, in order, for the characters from 256 on.
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    return table


class ByteCodec:
    """Ids to bytes and text to ids, for a byte-level tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        alphabet = byte_alphabet()
        added = {i: token for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._bytes = [b""] * (max(tokenizer.get_vocab().values()) + 1)
        for token, i in tokenizer.get_vocab().items():
            self._bytes[i] = token.encode() if i in added else bytes(alphabet[character] for character in token)
        self.special = np.array(sorted(i for i, token in added.items() if token.special), dtype=np.int64)

    def bytes(self, ids: np.ndarray) -> bytes:
        """The bytes that ordinary tokens stand for."""
        return b"".join(self._bytes[i] for i in ids.tolist())

    def whole_characters(self, ids: np.ndarray) -> tuple[int, int]:
        """The widest range of tokens whose bytes are whole characters: (first, past the last).

        Only the ends of a window can lie inside a character; a UTF-8 character has at most four bytes.
        """
        first, last = 0, len(ids)
        while first < last and 0x80 <= self._bytes[ids[first]][0] < 0xC0:
            first += 1
        for cut in range(last, max(last - 4, first) - 1, -1):
            try:
                self.bytes(ids[max(first, cut - 8) : cut]).lstrip(bytes(range(0x80, 0xC0))).decode()
                return first, cut
            except UnicodeDecodeError:
                continue
        return first, first

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64, without special tokens."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
