"""Losses that return a sum and how many tokens it sums over: the mean is taken once, over the whole step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from frugal.data.batches import IGNORE


def next_token_nll(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats, float32, [B, T]; zero where the label is -100."""
    with torch.autocast(logits_BTV.device.type, enabled=False):
        nll = F.cross_entropy(
            logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE, reduction="none"
        )
    return nll.view_as(labels_BT)
