import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frugal.callbacks.expert_bias import ExpertBias, updated_bias
from frugal.callbacks.routing import load_metrics
from frugal.errors import UserError
from frugal.model.config import AttentionConfig, MoEConfig, TransformerConfig
from frugal.model.moe import MoE


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=16), st.floats(1e-4, 0.1))
def test_bias_moves_by_the_rate_towards_balance(loads: list[int], rate: float) -> None:
    load = torch.tensor(loads, dtype=torch.float64)
    moved = updated_bias(torch.zeros(len(loads), dtype=torch.float64), load, rate)
    for change, got in zip(moved.tolist(), loads, strict=True):
        expected = 0.0 if got == load.mean() else (rate if got < load.mean() else -rate)
        assert change == pytest.approx(expected)


def test_figures_of_known_loads() -> None:
    even = load_metrics(torch.tensor([[5.0, 5.0], [1.0, 1.0]]))
    assert even == pytest.approx({"max_violation": 0, "min_load": 1, "dead_experts": 0, "entropy": 1})
    one_sided = load_metrics(torch.tensor([[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert one_sided == pytest.approx({"max_violation": 3, "min_load": 0, "dead_experts": 3, "entropy": 0.5})


def test_balancing_evens_out_a_skewed_router() -> None:
    """Without the bias one expert gets far too much; with it the loads become even, and the weights stay the same."""
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=8, d_model=16, n_layers=1, d_ff=8, attention=AttentionConfig(1), moe=MoEConfig(8, 2, 4)
    )
    moe = MoE(config).train()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 512, 16) + 1.0  # a common direction, which some experts' rows like better than others'
    before = None
    for _ in range(300):
        moe.load.zero_()
        moe(x)
        before = before or load_metrics(moe.load[None])["max_violation"]
        moe.router.expert_bias.copy_(updated_bias(moe.router.expert_bias, moe.load, 0.003))
    after = load_metrics(moe.load[None])["max_violation"]
    assert before > 0.8 and after < 0.1


def test_impossible_settings_name_their_key() -> None:
    with pytest.raises(UserError, match=r"expert_bias\.rate"):
        ExpertBias(rate=-1)
    with pytest.raises(UserError, match=r"expert_bias\.final_fraction"):
        ExpertBias(final_fraction=2)
