"""Validation metrics that are exact under any batch size and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

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


class Classification(torch.nn.Module):
    """Loss, accuracy and calibration over everything seen since the last reset; exact over ranks.

    Args:
        names: of the classes; up to 20 of them have an accuracy of their own.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        n = len(names)
        self.names = [name.replace("/", "_") for name in names] if n <= 20 else []
        self.loss = MeanMetric()
        self.accuracy = MulticlassAccuracy(n, average="micro")
        self.by_class = MulticlassAccuracy(n, average=None) if self.names else None
        self.calibration = MulticlassCalibrationError(n, n_bins=15, norm="l1")

    def update(self, logits_BK: Tensor, labels_B: Tensor) -> None:
        """Add a batch: logits [B, K] and class numbers [B]; an empty one adds nothing."""
        if not len(labels_B):
            return
        log_p_BK = torch.log_softmax(logits_BK.double(), dim=-1)
        self.loss.update(-log_p_BK.gather(1, labels_B[:, None]).squeeze(1))
        probability_BK = log_p_BK.exp()
        for metric in (self.accuracy, self.by_class, self.calibration):
            if metric is not None:
                metric.update(probability_BK, labels_B)

    def compute(self) -> dict[str, Tensor]:
        """`loss` (nats per image), `accuracy`, `calibration_error` (Guo et al. 2017, 15 bins), `accuracy/<class>`."""
        found = {
            "loss": self.loss.compute(),
            "accuracy": self.accuracy.compute(),
            "calibration_error": self.calibration.compute(),
        }
        if self.by_class is not None:
            found |= {f"accuracy/{name}": x for name, x in zip(self.names, self.by_class.compute(), strict=True)}
        return {name: value.float() for name, value in found.items()}

    def reset(self) -> None:
        """Start anew."""
        for metric in self.children():
            metric.reset()  # type: ignore[operator]
