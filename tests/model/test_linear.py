"""oneDNN's products equal torch's, and are left out where nobody needs them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from frugal.model import linear
from frugal.model.linear import Linear

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch was built without oneDNN"
)


@pytest.mark.parametrize(("n", "inputs", "outputs"), [(1, 16, 24), (50, 130, 200), (50, 200, 130), (400, 128, 140)])
def test_onednn_equals_torch(n: int, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMALL_NT", 0)
    monkeypatch.setattr(linear, "SMALL_TN", 0)
    torch.manual_seed(0)
    layer = Linear(inputs, outputs)
    upstream = torch.randn(2, n, outputs)
    results = []
    for onednn in (True, False):
        monkeypatch.setattr(linear, "ONEDNN", onednn)
        x = torch.randn(2, n, inputs, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer.zero_grad()
        out = layer(x)
        assert (type(out.grad_fn).__name__ == "ViewBackward0") == onednn  # the path that was meant
        out.backward(upstream)
        assert layer.weight.grad is not None
        results.append((out.detach(), x.grad, layer.weight.grad.clone()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("weight", "inputs", "products"), [(True, True, 3), (False, True, 2), (True, False, 2)])
def test_what_is_frozen_costs_no_product(
    weight: bool, inputs: bool, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "ONEDNN", True)
    layer = Linear(16, 24).requires_grad_(weight)
    x = torch.randn(10, 16, requires_grad=inputs)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == products * 2 * 10 * 16 * 24


def test_other_types_and_autocast_take_torchs_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ONEDNN", True)
    layer, x = Linear(16, 24), torch.randn(10, 16)
    assert not linear.suits_onednn(x.double(), layer.weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer.double()(x.double()), F.linear(x.double(), layer.weight))
