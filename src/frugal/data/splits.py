"""Which text is held out for validation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from frugal.data.documents import Document, as_document, content_hash
from frugal.errors import UserError

Split = Literal["position", "hash"]


def split_documents(
    documents: Iterable[str | Document], val_fraction: float, split: Split = "position"
) -> tuple[list[Document], list[Document]]:
    """Hold out `val_fraction` of the text for validation; both sides keep the documents' order.

    `position`: the last bytes. The cut lies after the first line end at or beyond the position, inside a document if
    need be. `hash`: the documents whose content's hash falls there, so that copies of one text lie on one side, and
    documents added later move none of the others.

    Raises:
        UserError: there is no text, or one of the two parts would be empty.
    """
    every = [as_document(document) for document in documents]
    sizes = [len(document.text.encode()) for document in every]
    total = sum(sizes)
    if total == 0:
        raise UserError("data.source: there is no text in it")
    if split == "hash":
        held_out = [is_held_out(document.text, val_fraction) for document in every]
        train = [document for document, out in zip(every, held_out, strict=True) if not out]
        val = [document for document, out in zip(every, held_out, strict=True) if out]
    else:
        train, val = _split_by_position(every, sizes, int(total * (1 - val_fraction)))
    if not train or not val:
        raise UserError(
            f"data.val_fraction: {val_fraction} of {total} bytes leaves no text for "
            f"{'validation' if train else 'training'}; give more text or another fraction"
            + (f", or data.split position ({len(every)} documents are few for hash)" if split == "hash" else "")
        )
    return train, val


def is_held_out(text: str, val_fraction: float) -> bool:
    """Whether a document falls into validation by the hash of its content."""
    return int.from_bytes(content_hash(text)[:8]) < int(val_fraction * 2**64)


def _split_by_position(
    documents: list[Document], sizes: list[int], position: int
) -> tuple[list[Document], list[Document]]:
    seen = 0
    for i, (document, size) in enumerate(zip(documents, sizes, strict=True)):
        if seen + size > position:
            raw = document.text.encode()
            # A line's end: never inside a character, since no UTF-8 continuation byte is a newline. If all that is left
            # is one line, a word's end.
            cut = raw.find(b"\n", position - seen) + 1
            if cut in (0, size) and not any(sizes[i + 1 :]):
                cut = raw.find(b" ", position - seen) + 1
            cut = cut or size
            head, tail = (replace(document, text=text.decode()) for text in (raw[:cut], raw[cut:]))
            return documents[:i] + [head] * bool(head.text), [tail] * bool(tail.text) + documents[i + 1 :]
        seen += size
    return documents, []
