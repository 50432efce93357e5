from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frugal.errors import UserError
from frugal.model import linear
from frugal.model.config import MoEConfig, TransformerConfig
from frugal.model.grouped import grouped_nt
from frugal.model.moe import MoE
from frugal.model.router import Router


def build(config: TransformerConfig, **changes: object) -> MoE:
    assert config.moe
    moe = MoE(replace(config, moe=replace(config.moe, **changes)))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def loop_over_experts(moe: MoE, x: Tensor) -> Tensor:
    """The oracle: one expert after the other, each on the tokens that chose it, in plain autograd."""
    x_TD = x.flatten(0, -2)
    weights, chosen = moe.router(x_TD)
    out = torch.zeros_like(x_TD)
    for expert in range(moe.experts.w13.shape[0]):
        for slot in range(chosen.shape[1]):
            rows = (chosen[:, slot] == expert).nonzero().flatten()
            gate, up = (x_TD[rows] @ moe.experts.w13[expert].T).chunk(2, dim=1)
            y = (F.silu(gate) * up) @ moe.experts.w2[expert].T
            out = out.index_add(0, rows, y * weights[rows, slot].unsqueeze(1))
    if moe.shared_experts is not None:
        out = out + moe.shared_experts(x_TD)
    return out.view_as(x)


CHANGES: list[dict] = [
    {},
    {"top_k": 1},
    {"top_k": 8},
    {"n_shared_experts": 0},
    {"score": "softmax", "normalize_weights": False},
    {"routed_scaling": 2.5},
]


def assert_equals_the_loop(moe: MoE, function: Callable[[Tensor], Tensor]) -> None:
    """Outputs, and gradients of input and of every weight, against the oracle."""
    x = torch.randn(3, 20, 32)
    upstream = torch.randn(3, 20, 32)
    results = []
    for run in (function, lambda x: loop_over_experts(moe, x)):
        moe.zero_grad()
        x = x.detach().clone().requires_grad_()
        out = run(x)
        out.backward(upstream)
        grads = {name: p.grad.clone() for name, p in moe.named_parameters()}
        results.append((out.detach(), x.grad, grads))
    (out, dx, grads), (out_loop, dx_loop, grads_loop) = results
    torch.testing.assert_close(out, out_loop, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dx, dx_loop, atol=1e-5, rtol=1e-5)
    assert grads.keys() == grads_loop.keys() and "router.weight" in grads
    for name in grads:
        torch.testing.assert_close(grads[name], grads_loop[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_equals_a_loop_over_experts(
    tiny: TransformerConfig, changes: dict, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "ONEDNN", onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    monkeypatch.setattr(linear, "SMALL_NT", 0)
    torch.manual_seed(0)
    moe = build(tiny, **changes)
    assert_equals_the_loop(moe, moe)


@pytest.mark.slow
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_compiled_equals_a_loop_over_experts(tiny: TransformerConfig, changes: dict) -> None:
    torch.manual_seed(0)
    moe = build(tiny, **changes)
    assert_equals_the_loop(moe, torch.compile(moe, fullgraph=True))


def test_an_expert_without_tokens_gets_no_gradient_and_harms_nobody(tiny: TransformerConfig) -> None:
    torch.manual_seed(0)
    moe = build(tiny)
    moe.router.expert_bias[:6] = -10.0  # only experts 6 and 7 are ever chosen
    x = torch.randn(2, 9, 32)
    moe.train()
    out = moe(x)
    out.sum().backward()
    torch.testing.assert_close(out, loop_over_experts(moe, x), atol=1e-5, rtol=1e-5)
    assert moe.load.tolist() == [0] * 6 + [18, 18]
    assert moe.experts.w13.grad is not None and moe.experts.w13.grad[:6].abs().max() == 0


def test_autocast_s_rules_end_where_the_experts_begin(tiny: TransformerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """They differ by device: CUDA's takes sums in float32, and the backward pass then had two types in a product."""
    seen = []

    def product(*args: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return grouped_nt(*args)

    monkeypatch.setattr("frugal.model.experts.grouped_nt", product)
    moe = MoE(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe(torch.randn(2, 8, tiny.d_model))
    out.float().sum().backward()
    assert seen == [False] * 3  # two forward, one backward: the input needs no gradient


def test_shared_experts_may_have_their_own_width(tiny: TransformerConfig) -> None:
    torch.manual_seed(0)
    moe = build(tiny, n_shared_experts=2, d_shared_expert=5)
    assert moe.shared_experts is not None and moe.shared_experts.w2.weight.shape == (32, 10)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(moe(x), loop_over_experts(moe, x), atol=1e-5, rtol=1e-5)


def test_bias_changes_the_choice_but_not_the_weights(tiny: TransformerConfig) -> None:
    torch.manual_seed(0)
    assert tiny.moe
    router = Router(replace(tiny, moe=replace(tiny.moe, normalize_weights=False)))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(50, 32)
    router.expert_bias[3] = 5.0
    weights, chosen = router(x)
    assert (chosen == 3).any(dim=1).all()
    torch.testing.assert_close(weights, (x @ router.weight.T).sigmoid().gather(1, chosen))


def test_loads_add_up_over_calls_in_training_only(tiny: TransformerConfig) -> None:
    moe = build(tiny)
    x = torch.randn(2, 10, 32)
    moe.eval()(x)
    assert moe.load.sum() == 0
    moe.train()(x)
    moe(x)
    assert moe.load.sum() == 2 * 20 * 2  # calls x tokens x top_k


def test_frozen_experts_cost_no_weight_gradient(tiny: TransformerConfig) -> None:
    moe = build(tiny)
    moe.experts.requires_grad_(False)
    x = torch.randn(2, 10, 32, requires_grad=True)
    moe(x).sum().backward()
    assert moe.experts.w13.grad is None and x.grad is not None and moe.router.weight.grad is not None


def test_top_k_larger_than_experts_is_refused() -> None:
    with pytest.raises(UserError, match=r"moe\.top_k.*n_experts \(4\), got 5"):
        MoEConfig(n_experts=4, top_k=5, d_expert=8)
