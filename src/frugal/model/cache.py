"""What generation remembers of earlier positions.

Shape letters: B batch, G stored heads, T tokens of this call, S tokens seen so far, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """The stored tensors of one attention layer, grown in place.

    What they are is the layer's own business: keys and values of every kv head in grouped-query attention, one latent
    with its rotary key in latent attention.

    Args:
        shapes: heads and width (G, C) of each stored tensor; its buffer is [B, G, max_len, C].
        batch_size, max_len: rows and the most positions.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        batch_size: int,
        max_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.buffers = [torch.zeros(batch_size, g, max_len, c, device=device, dtype=dtype) for g, c in shapes]
        self.length = 0

    def append(self, *new_BGTC: Tensor) -> tuple[Tensor, ...]:
        """Store the new positions of each tensor and return everything stored so far, each [B, G, S, C]."""
        start, self.length = self.length, self.length + new_BGTC[0].shape[2]
        if self.buffers[0].device != new_BGTC[0].device:  # weights that lie in the host's memory compute elsewhere
            self.buffers = [buffer.to(new_BGTC[0].device) for buffer in self.buffers]
        for buffer, new in zip(self.buffers, new_BGTC, strict=True):
            buffer[:, :, start : self.length] = new
        return tuple(buffer[:, :, : self.length] for buffer in self.buffers)

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        self.length = min(self.length, length)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)


def causal_mask(new: int, seen: int, device: torch.device) -> Tensor | None:
    """Which of `seen` positions each of the last `new` may attend to, [T, S]; None where a flag or nothing will do.

    With new == seen scaled_dot_product_attention's own is_causal serves; a single new position sees everything.
    """
    if new in (1, seen):
        return None
    return torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)
