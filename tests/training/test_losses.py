"""The head's loss in chunks equals the plain one, value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frugal.training.losses import summed_nll


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 20, 16, generator=generator).requires_grad_()
    head = torch.randn(50, 16, generator=generator).requires_grad_()
    labels = torch.randint(0, 50, (3, 20), generator=generator)
    labels[0, 4:] = -100
    labels[2, :] = -100
    return hidden, head, labels


def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ head.T).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk", [None, 0, 1, 7, 20, 60, 100])
def test_equals_the_plain_loss(chunk: int | None) -> None:
    hidden, head, labels = inputs()
    loss = summed_nll(hidden, head, labels, chunk)
    grads = torch.autograd.grad(loss / 37, (hidden, head))
    expected = plain(hidden, head, labels)
    expected_grads = torch.autograd.grad(expected / 37, (hidden, head))
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-6)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_fused_equals_the_plain_loss() -> None:
    hidden, head, labels = inputs()
    grads = torch.autograd.grad(summed_nll(hidden, head, labels, 7, fuse=True), (hidden, head))
    for ours, theirs in zip(grads, torch.autograd.grad(plain(hidden, head, labels), (hidden, head)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, labels = inputs()
    head.requires_grad_(False)
    summed_nll(hidden, head, labels, 7).backward()
    assert head.grad is None
    (expected,) = torch.autograd.grad(plain(hidden, head, labels), hidden)
    torch.testing.assert_close(hidden.grad, expected, atol=1e-5, rtol=1e-5)


def test_autocast_gives_float32_loss_and_gradients_of_the_parameters_type() -> None:
    hidden, head, labels = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = summed_nll(hidden, head, labels, 7)
    loss.backward()
    assert loss.dtype == torch.float32 and head.grad is not None and head.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(plain(hidden, head, labels).item(), rel=0.02)
    (expected,) = torch.autograd.grad(plain(hidden, head, labels), head)
    assert F.cosine_similarity(head.grad.flatten(), expected.flatten(), dim=0) > 0.999


def test_every_position_masked_is_zero_with_zero_gradients() -> None:
    hidden, head, labels = inputs()
    loss = summed_nll(hidden, head, torch.full_like(labels, -100), 7)
    loss.backward()
    assert loss.item() == 0 and head.grad is not None and head.grad.abs().max() == 0
