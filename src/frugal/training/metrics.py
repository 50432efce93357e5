"""Validation metrics that are exact under any batch size and number of ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from frugal.data.batches import IGNORE


class TextLoss(Metric):
    """Mean loss in nats per token, and bits per byte of text, over everything seen since the last reset.

    Bits per byte does not depend on the tokenizer: all nats (those spent on end-of-text tokens too) over the bytes
    of text that the labels stand for, divided by ln 2.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, token_bytes: Tensor) -> None:
        super().__init__()
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll_BT: Tensor, labels_BT: Tensor) -> None:
        """Add a batch: nats per label and the labels, both [B, T]; labels of -100 do not count."""
        valid_BT = labels_BT != IGNORE
        self.nats += nll_BT.double().sum()
        self.tokens += valid_BT.sum()
        self.bytes += (self.token_bytes[labels_BT.clamp_min(0)] * valid_BT).sum()  # type: ignore[index]

    def compute(self) -> dict[str, Tensor]:
        """`loss` (nats per token) and `bits_per_byte`."""
        return {
            "loss": (self.nats / self.tokens).float(),
            "bits_per_byte": (self.nats / self.bytes / math.log(2)).float(),
        }
