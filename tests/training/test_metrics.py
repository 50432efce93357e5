import math

import pytest
import torch

from frugal.training.losses import next_token_nll
from frugal.training.metrics import TextLoss


def test_uniform_logits_cost_log_vocab_and_masked_labels_nothing() -> None:
    labels = torch.tensor([[3, -100, 0], [1, 2, -100]])
    nll = next_token_nll(torch.zeros(2, 3, 8), labels)
    assert nll[labels == -100].tolist() == [0, 0]
    torch.testing.assert_close(nll[labels != -100], torch.full((4,), math.log(8)))


def test_loss_and_bits_per_byte_by_hand_and_independent_of_batching() -> None:
    token_bytes = torch.tensor([0, 1, 2, 5])  # token 0 is special: its nats count, its bytes do not
    labels = torch.tensor([[1, 2, 3], [0, 3, -100]])
    nll = torch.tensor([[0.5, 1.0, 2.0], [0.5, 4.0, 0.0]])
    expected = {"loss": 8.0 / 5, "bits_per_byte": 8.0 / math.log(2) / 13}
    whole, parts = TextLoss(token_bytes), TextLoss(token_bytes)
    whole.update(nll, labels)
    for row in range(2):
        parts.update(nll[row : row + 1], labels[row : row + 1])
    for metric in (whole, parts):
        assert {k: v.item() for k, v in metric.compute().items()} == pytest.approx(expected, rel=1e-6)
    whole.reset()
    whole.update(nll[:1], labels[:1])
    assert whole.compute()["loss"] == pytest.approx(3.5 / 3)
