"""Rotary tables against closed forms and against transformers' YaRN."""

import math

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from frugal.model.config import YarnConfig
from frugal.model.rope import apply_rotary, rotary_frequencies, rotary_table


def test_a_pair_turns_by_position_times_frequency() -> None:
    cos, sin = rotary_table(4, 3, theta=100.0)
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 3, 4)
    turned = apply_rotary(x, cos, sin)[0, 0]
    pairs = torch.complex(x[0, 0, :, :2], x[0, 0, :, 2:]) * torch.polar(torch.ones(3, 2), angles)
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), dim=1))


@pytest.mark.parametrize(
    "yarn",
    [
        YarnConfig(factor=40.0, original_max_seq_len=4096, mscale=1.0, mscale_all_dim=1.0),
        YarnConfig(factor=40.0, original_max_seq_len=4096, mscale=1.0, mscale_all_dim=0.5),
        YarnConfig(factor=4.0, original_max_seq_len=64, beta_fast=8.0, beta_slow=2.0),
        YarnConfig(factor=4.0, original_max_seq_len=32768, attention_factor=1.3),
        YarnConfig(factor=1.0, original_max_seq_len=512),
    ],
    ids=str,
)
@pytest.mark.parametrize("dim", [16, 64])
def test_yarn_equals_transformers(yarn: YarnConfig, dim: int) -> None:
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_seq_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale or None,
        "mscale_all_dim": yarn.mscale_all_dim or None,
        "attention_factor": yarn.attention_factor,
    }
    config = DeepseekV3Config(
        qk_rope_head_dim=dim,
        max_position_embeddings=int(yarn.factor * yarn.original_max_seq_len),
        rope_parameters={k: v for k, v in parameters.items() if v is not None},
    )
    frequency, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(rotary_frequencies(dim, 10_000.0, yarn), frequency, atol=0, rtol=1e-6)
    assert yarn.rotary_scale == pytest.approx(factor, rel=1e-12)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    plain = rotary_frequencies(64, 10_000.0)
    scaled = rotary_frequencies(64, 10_000.0, YarnConfig(factor=8.0, original_max_seq_len=4096))
    turns = plain * 4096 / (2 * math.pi)
    # The ramp's ends are rounded outwards to whole pairs: a factor of 1.4 clears them.
    assert torch.equal(scaled[turns > 32 * 1.4], plain[turns > 32 * 1.4])
    torch.testing.assert_close(scaled[turns < 1 / 1.4], plain[turns < 1 / 1.4] / 8)
    assert (scaled.diff() < 0).all()


def test_deepseek_v3_softmax_scale() -> None:
    """0.1 ln 40 + 1 = 1.3689, squared, as in DeepSeek-V3's published inference code."""
    yarn = YarnConfig(factor=40.0, original_max_seq_len=4096, mscale=1.0, mscale_all_dim=1.0)
    assert yarn.softmax_scale == pytest.approx(1.8738, abs=1e-4)
    assert yarn.rotary_scale == 1.0
    assert YarnConfig(factor=40.0, original_max_seq_len=4096).softmax_scale == 1.0
