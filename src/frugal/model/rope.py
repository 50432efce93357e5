"""Rotary position embeddings, plain and stretched to longer contexts with YaRN.

Everything here uses the half-split layout: pair i is (x[i], x[i + C/2]). DeepSeek stores its rotary dimensions
interleaved, pair i being (x[2i], x[2i + 1]); that differs by a fixed permutation of weight rows, which reading and
writing such a checkpoint applies (`frugal.model.hf`).

Shape letters: B batch, H heads, T tokens, C rotated width of a head, F = C / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from frugal.model.config import YarnConfig


def rotary_frequencies(dim: int, theta: float, yarn: YarnConfig | None = None) -> Tensor:
    """Angle per position of each pair, float32, [dim / 2] (Su et al. 2021, section 3.4.3).

    YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2) keeps the frequencies that turn more than `beta_fast` times
    within the original context, divides those that turn less than `beta_slow` times by `factor`, and blends
    linearly in the pair's index between the two.
    """
    frequency_F = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None:
        return frequency_F

    def pair_with(turns: float) -> float:
        return dim * math.log(yarn.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    # Equal ends would divide by zero; a thousandth of a pair makes the ramp a step.
    ramp_F = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency_F * (1 - ramp_F) + frequency_F / yarn.factor * ramp_F


def rotary_table(dim: int, seq_len: int, theta: float, yarn: YarnConfig | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. seq_len - 1, float32, each [seq_len, dim / 2].

    With YaRN both carry `yarn.rotary_scale`, its correction of the softmax temperature (Peng et al. 2023, eq. 15).
    """
    angle_TF = torch.outer(torch.arange(seq_len, dtype=torch.float32), rotary_frequencies(dim, theta, yarn))
    scale = 1.0 if yarn is None else yarn.rotary_scale
    return angle_TF.cos() * scale, angle_TF.sin() * scale


def rotated(x_BHTC: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """By cosines and sines of its positions; as it is where positions enter otherwise."""
    return x_BHTC if rotary is None else apply_rotary(x_BHTC, *rotary)


def apply_rotary(x_BHTC: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate each pair (i, i + C/2) by its position's angle; computed in float32, returned in the input's dtype."""
    first, second = x_BHTC.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos_TF - second * sin_TF, second * cos_TF + first * sin_TF), dim=-1)
    return rotated.to(x_BHTC.dtype)
