"""Grouped products against one product per group, on every path this machine has."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from frugal.model import linear
from frugal.model.config import TransformerConfig
from frugal.model.grouped import dispatch, grouped_nt, grouped_tn
from frugal.model.moe import MoE


def groups(sizes: list[int]) -> tuple[Tensor, list[slice]]:
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return ends, [slice(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("sizes", [[5, 0, 7], [0, 0, 3], [64, 32, 1, 95], [33], [200, 1, 1]], ids=str)
def test_products_equal_one_per_group(sizes: list[int], onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ONEDNN", onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    monkeypatch.setattr(linear, "SMALL_NT", 0)
    monkeypatch.setattr(linear, "SMALL_TN", 0)
    torch.manual_seed(0)
    ends, spans = groups(sizes)
    a, b, w = torch.randn(sum(sizes), 130), torch.randn(sum(sizes), 140), torch.randn(len(sizes), 140, 130)
    expected = torch.cat([a[rows] @ w[i].T for i, rows in enumerate(spans)])
    torch.testing.assert_close(grouped_nt(a, w, ends), expected, atol=1e-4, rtol=1e-5)
    transposed = w.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(grouped_nt(a, transposed, ends), expected, atol=1e-4, rtol=1e-5)
    expected = torch.stack([a[rows].T @ b[rows] for rows in spans])
    torch.testing.assert_close(grouped_tn(a, b, ends), expected, atol=1e-4, rtol=1e-5)


def test_operators_keep_their_promises_to_torch_compile() -> None:
    ends, _ = groups([5, 0, 7])
    a, b, w = torch.randn(12, 16), torch.randn(12, 24), torch.randn(3, 24, 16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.frugal.grouped_nt.default, (a, w, ends), test_utils=tests)
    torch.library.opcheck(torch.ops.frugal.grouped_tn.default, (a, b, ends), test_utils=tests)
    torch.library.opcheck(torch.ops.frugal.dispatch.default, (torch.randint(0, 3, (6, 2)), 3), test_utils=tests)
    torch.library.opcheck(torch.ops.frugal.add_load.default, (torch.zeros(3), torch.ones(3)), test_utils=tests)


def test_dispatch_sorts_stably_and_inverts() -> None:
    experts = torch.tensor([[2, 0], [1, 2], [0, 2]])
    order, inverse, ends = dispatch(experts, 4)
    assert order.tolist() == [1, 4, 2, 0, 3, 5]
    assert order[inverse].tolist() == list(range(6)) and ends.tolist() == [2, 3, 6, 6]


def test_flops_are_those_of_the_rows() -> None:
    ends, _ = groups([5, 0, 7])
    a, w = torch.randn(12, 16), torch.randn(3, 24, 16)
    with FlopCounterMode(display=False) as counter:
        grouped_nt(a, w, ends)
    assert counter.get_total_flops() == 2 * 12 * 16 * 24


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_does_not_count_a_token_twice(tiny: TransformerConfig, reentrant: bool) -> None:
    torch.manual_seed(0)
    moe = MoE(tiny)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 10, 32, requires_grad=True)
    moe(x).sum().backward()
    plain = {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}
    load = moe.load.clone()
    moe.zero_grad()
    moe.load.zero_()
    checkpoint(moe, x, use_reentrant=reentrant).sum().backward()
    assert moe.load.tolist() == load.tolist() and load.sum() == 2 * 10 * 2
    for name, p in moe.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])
