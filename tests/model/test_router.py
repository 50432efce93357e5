"""The router's choice against transformers', its losses against loops, closed forms and transformers'."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from frugal.model.config import AttentionConfig, MoEConfig, TransformerConfig
from frugal.model.moe import MoE
from frugal.model.router import (
    Router,
    global_balance_loss,
    keep_best_groups,
    sequence_balance_loss,
    shares,
    z_loss,
)

GROUPED = MoEConfig(16, 4, 8, n_group=4, topk_group=2, routed_scaling=2.5)


def router_of(tiny: TransformerConfig, moe: MoEConfig) -> Router:
    torch.manual_seed(0)
    router = Router(replace(tiny, moe=moe))
    torch.nn.init.normal_(router.weight, std=0.3)
    if router.expert_bias is not None:
        router.expert_bias.normal_(std=0.2)
    return router


def by_expert(weights: torch.Tensor, experts: torch.Tensor, n_experts: int = 16) -> torch.Tensor:
    """[T, K] in any order -> [T, E], so that two routings can be compared."""
    return torch.zeros(len(weights), n_experts).scatter(1, experts, weights)


@pytest.mark.parametrize("changes", [{}, {"normalize_weights": False}, {"n_group": 1, "topk_group": 1}], ids=str)
def test_sigmoid_routing_equals_deepseek_v3(tiny: TransformerConfig, changes: dict) -> None:
    moe = replace(GROUPED, **changes)
    router = router_of(tiny, moe)
    peer = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=32,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=moe.n_group,
            topk_group=moe.topk_group,
            norm_topk_prob=moe.normalize_weights,
            routed_scaling_factor=2.5,
        )
    )
    peer.load_state_dict({"weight": router.weight, "e_score_correction_bias": router.expert_bias})
    x = torch.randn(200, 32)
    torch.testing.assert_close(by_expert(*router(x)), by_expert(*peer(x)[1:]))


@pytest.mark.parametrize("n_group", [1, 4])
def test_softmax_routing_equals_deepseek_v2(tiny: TransformerConfig, n_group: int) -> None:
    groups = {"n_group": n_group, "topk_group": max(n_group // 2, 1), "group_score": "max"}
    router = router_of(tiny, replace(GROUPED, score="softmax", normalize_weights=False, expert_bias=False, **groups))
    peer = DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=32,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=n_group,
            topk_group=groups["topk_group"],
            topk_method="group_limited_greedy" if n_group > 1 else "greedy",
            routed_scaling_factor=2.5,
        )
    )
    peer.load_state_dict({"weight": router.weight})
    x = torch.randn(200, 32)
    torch.testing.assert_close(by_expert(*router(x)), by_expert(*peer(x)[1:]))


def test_groups_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.5, 0.3, 0.3]])  # groups of two: sums 0.9, 1.0, 0.6; best 0.9, 0.5, 0.3
    kept = {how: keep_best_groups(scores, 3, 1, how).isfinite().nonzero()[:, 1].tolist() for how in ("top2", "max")}
    assert kept == {"top2": [2, 3], "max": [0, 1]}


def test_each_token_stays_within_its_groups(tiny: TransformerConfig) -> None:
    _, experts = router_of(tiny, GROUPED)(torch.randn(300, 32))
    groups = [len(set(row)) for row in (experts // 4).tolist()]
    assert max(groups) == 2


@given(
    n_group=st.integers(1, 5),
    per_group=st.integers(2, 4),
    data=st.data(),
    score=st.sampled_from(["sigmoid", "softmax"]),
    group_score=st.sampled_from(["top2", "max"]),
)
def test_any_routing_is_k_distinct_experts_of_few_groups(
    n_group: int, per_group: int, data: st.DataObject, score: str, group_score: str
) -> None:
    topk_group = data.draw(st.integers(1, n_group))
    top_k = data.draw(st.integers(1, topk_group * per_group))
    shape = MoEConfig(
        n_group * per_group,
        top_k,
        4,
        score=score,  # type: ignore[arg-type]
        routed_scaling=1.5,
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,  # type: ignore[arg-type]
    )
    config = TransformerConfig(vocab_size=8, d_model=4, n_layers=1, d_ff=4, attention=AttentionConfig(2), moe=shape)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    router = Router(config)
    weights, experts = router.choose(torch.randn(20, shape.n_experts))
    assert all(len(set(row)) == top_k for row in experts.tolist())
    assert all(len(set(row)) <= topk_group for row in (experts // per_group).tolist())
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.full((20,), 1.5))


def test_balanced_routing_costs_one_and_collapsed_routing_e_over_k() -> None:
    even = torch.full((2, 8, 4), 0.25)
    experts = torch.arange(4).view(1, 4, 1).repeat(2, 2, 1)
    assert sequence_balance_loss(even, experts).item() == pytest.approx(1.0)
    assert global_balance_loss(even.flatten(0, 1), torch.full((4,), 16.0)).item() == pytest.approx(1.0)
    collapsed = torch.zeros(2, 8, 4)
    collapsed[..., :2] = 0.5
    both = torch.tensor([0, 1]).expand(2, 8, 2)
    assert sequence_balance_loss(collapsed, both).item() == pytest.approx(4 / 2)


def test_each_sequence_is_balanced_on_its_own() -> None:
    """Two sequences that each use one expert are balanced together, yet not within themselves."""
    experts = torch.tensor([[[0]] * 6, [[1]] * 6])
    share = torch.nn.functional.one_hot(experts.squeeze(-1), 2).float()
    assert sequence_balance_loss(share, experts).item() == pytest.approx(2.0)
    assert global_balance_loss(share.flatten(0, 1), torch.tensor([6.0, 6.0])).item() == pytest.approx(1.0)


def test_sequence_loss_equals_a_loop(tiny: TransformerConfig) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 10, 16)
    share = shares(logits, "sigmoid")
    experts = router_of(tiny, GROUPED).choose(logits.flatten(0, 1)).experts_TK.unflatten(0, (3, 10))
    total = 0.0
    for b in range(3):
        for e in range(16):
            frequency = 16 / (4 * 10) * (experts[b] == e).sum().item()
            scores = logits[b].sigmoid()
            mean_share = (scores[:, e] / scores.sum(dim=1)).mean().item()
            total += frequency * mean_share / 3
    assert sequence_balance_loss(share, experts).item() == pytest.approx(total, rel=1e-5)


def test_global_loss_equals_transformers_up_to_top_k() -> None:
    """Transformers does not divide by K, so that its loss is K, not 1, under perfect balance."""
    torch.manual_seed(0)
    logits = torch.randn(50, 16)
    chosen = logits.topk(4, dim=-1).indices
    theirs = load_balancing_loss_func((logits,), 16, 4)
    ours = global_balance_loss(shares(logits, "softmax"), chosen.flatten().bincount(minlength=16))
    assert ours.item() == pytest.approx(theirs.item() / 4, rel=1e-5)


def test_z_loss_of_equal_logits() -> None:
    logits = torch.full((7, 16), 3.0, requires_grad=True)
    loss = z_loss(logits)
    assert loss.item() == pytest.approx((3 + torch.tensor(16.0).log().item()) ** 2, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad > 0).all()  # smaller logits, smaller loss


def test_losses_are_off_by_default_and_weighted_sums_when_on(tiny: TransformerConfig) -> None:
    assert tiny.moe
    torch.manual_seed(0)
    coefficients = {"sequence_loss_coef": 0.1, "global_loss_coef": 0.02, "z_loss_coef": 0.003}
    losses = {}
    x = torch.randn(2, 9, 32)
    for on in ([], *[[name] for name in coefficients], list(coefficients)):
        moe = MoE(replace(tiny, moe=replace(tiny.moe, **{name: coefficients[name] for name in on})))
        torch.manual_seed(1)
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        moe.train()(x)
        losses[tuple(on)] = moe.router_loss
    assert losses.pop(()) is None
    *single, all_of_them = (loss.item() for loss in losses.values() if loss is not None)
    assert all_of_them == pytest.approx(sum(single), rel=1e-6) and all(loss > 0 for loss in single)


def test_descending_the_balance_loss_balances(tiny: TransformerConfig) -> None:
    assert tiny.moe
    torch.manual_seed(0)
    moe = MoE(replace(tiny, moe=replace(tiny.moe, sequence_loss_coef=1.0)))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(4, 64, 32) + 0.5
    optimizer = torch.optim.AdamW(moe.router.parameters(), lr=0.02)
    spread = []
    for _ in range(60):
        moe.load.zero_()
        moe.train()(x)
        spread.append((moe.load.max() / moe.load.mean()).item())
        assert moe.router_loss is not None
        optimizer.zero_grad()
        moe.router_loss.backward()
        optimizer.step()
    assert spread[0] > 1.5 and spread[-1] < 1.25
