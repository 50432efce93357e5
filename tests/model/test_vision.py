"""The image classifier: counts against the built model and torch's counter, positions and attention against oracles."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from frugal.errors import UserError
from frugal.model.attention import Attention
from frugal.model.config import (
    AttentionConfig,
    Frozen,
    LatentConfig,
    MoEConfig,
    SharingConfig,
    count_parameters,
    flops_per_token,
)
from frugal.model.patches import resized_positions, rotary_grid, to_patches
from frugal.model.vision import VisionTransformer
from frugal.model.vision_config import VisionConfig

CONFIG = VisionConfig(
    16,
    3,
    32,
    AttentionConfig(n_heads=2, n_kv_heads=1, rope_theta=100.0, causal=False),
    MoEConfig(n_experts=4, top_k=2, d_expert=16, n_shared_experts=1, first_k_dense=1),
    image_size=12,
    channels=3,
    n_classes=5,
    patch_size=4,
)
LATENT = LatentConfig(kv_lora_rank=12, q_lora_rank=20, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
CHANGES: list[dict[str, Any]] = [
    {},
    {"position": "rotary"},
    {"pool": "class"},
    {"pool": "class", "position": "rotary", "channels": 1},
    {"moe": None},
    {"attention": AttentionConfig(n_heads=2, latent=LATENT, causal=False)},
    {"attention": AttentionConfig(n_heads=2)},
    {"sharing": SharingConfig(layers=(0, 1, 1), rank=3)},
]
SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def images(config: VisionConfig, n: int = 3, size: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, config.channels, size or config.image_size, size or config.image_size, generator=generator)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_parameters_equal_the_built_model(changes: dict[str, Any]) -> None:
    config = replace(CONFIG, **changes)
    model = VisionTransformer(config)
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("expert_bias"))
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters()) + biases
    assert sum(model.state_dict()[name].numel() for name in config.input_names) == config.input_parameters
    assert model.hidden(images(config)).shape == (3, config.max_seq_len, 16)
    assert VisionConfig.from_dict(asdict(config)) == config


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("frozen", ["", "embedding.", "embedding. blocks.0.", "head. norm.", "blocks.1."])
@pytest.mark.parametrize("size", [12, 8])
def test_flops_equal_the_counter(changes: dict[str, Any], frozen: str, size: int) -> None:
    config = replace(CONFIG, **changes)
    model = VisionTransformer(config)
    names = dict(model.named_parameters(remove_duplicate=False))
    chosen = {name for name in names if any(name.startswith(part) for part in frozen.split())}
    if config.sharing and "blocks.1." in frozen:
        chosen |= {name for name in names if name.startswith("blocks.2.")}
    for name in chosen:
        names[name].requires_grad_(False)

    def seen(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        batch, heads, length, width = query
        positions = (length + 1) / 2 if config.attention.causal else length
        return int(2 * batch * heads * length * positions * (width + value[-1]))

    mapping = {
        SDPA: seen,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, *args, **kwargs: (
            2 * seen(*args[:3])
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(images(config, size=size)).square().sum().backward()
    length = config.tokens_of(size)
    wanted = flops_per_token(config, length, Frozen(frozenset(chosen)) if chosen else None)
    # Interpolated positions are no product, and are not counted.
    assert counter.get_total_flops() / (3 * length) == pytest.approx(wanted.training, rel=1e-6)


def test_patches_are_a_strided_convolution() -> None:
    model = VisionTransformer(CONFIG)
    x = images(CONFIG)
    weight = model.embedding.weight.view(16, 3, 4, 4)
    expected = nn.functional.conv2d((x - 0.5) / 0.5, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.embedding(x), expected + model.embedding.position)
    assert torch.equal(to_patches(x, 4)[1, 5], x[1, :, 4:8, 8:12].flatten())  # row by row


@pytest.mark.parametrize("latent", [None, LATENT])
def test_bidirectional_attention_sees_all_and_causal_only_what_came_before(latent: LatentConfig | None) -> None:
    for causal in (True, False):
        config = replace(CONFIG, attention=AttentionConfig(n_heads=2, latent=latent, causal=causal))
        block = VisionTransformer(config).blocks[0]
        x = torch.randn(1, 5, 16, requires_grad=True)
        block(x, None)[0, 1].sum().backward()
        assert x.grad is not None
        assert x.grad[0].abs().sum(1).gt(0).tolist() == ([True, True] + [not causal] * 3)


def test_without_causality_and_positions_attention_is_softmax_over_everything() -> None:
    torch.manual_seed(0)
    layer = Attention(CONFIG)
    x = torch.randn(2, 9, 16)
    q, k, v = (w(x).unflatten(-1, (-1, 8)).transpose(1, 2) for w in (layer.wq, layer.wk, layer.wv))
    weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1)  # one key head, broadcast over two
    torch.testing.assert_close(layer(x, None), layer.wo((weights @ v).transpose(1, 2).flatten(2)))


def test_rotary_depends_on_the_distance_in_rows_and_columns_only() -> None:
    config = replace(CONFIG, position="rotary", image_size=20)
    layer = Attention(replace(config, attention=replace(config.attention, n_kv_heads=2)))
    cos, sin = rotary_grid(config, 5)
    q, k = torch.randn(8), torch.randn(8)
    from frugal.model.rope import apply_rotary

    def score(i: int, j: int) -> float:
        return float(apply_rotary(q, cos[i], sin[i]) @ apply_rotary(k, cos[j], sin[j]))

    assert layer.head_dim == 8
    at = lambda row, column: row * 5 + column  # noqa: E731
    assert score(at(0, 0), at(1, 2)) == pytest.approx(score(at(2, 1), at(3, 3)), abs=1e-5)
    assert score(at(0, 0), at(1, 2)) != pytest.approx(score(at(0, 0), at(2, 1)), abs=1e-3)
    # A grid of half as many patches a side has them in the middles of squares of four.
    small_cos, small_sin = rotary_grid(replace(config, image_size=16), 2)
    big_cos, big_sin = rotary_grid(replace(config, image_size=16), 4)
    angle = torch.atan2(big_sin, big_cos).view(4, 4, -1)
    torch.testing.assert_close(torch.atan2(small_sin, small_cos)[0], (angle[0, 0] + angle[1, 1]) / 2)


def test_positions_are_interpolated_for_smaller_images() -> None:
    plane = torch.stack([torch.tensor([float(row), float(column)]) for row in range(4) for column in range(4)])
    assert resized_positions(plane, 4) is plane
    expected = torch.tensor([[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]])
    torch.testing.assert_close(resized_positions(plane, 2), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, r"model\.transformer\.patch_size: 5 does not divide image_size \(12\)"),
        ({"n_classes": 0}, r"model\.transformer\.n_classes: must be positive, got 0"),
        ({"pool": "class", "attention": AttentionConfig(2)}, r"model\.transformer\.pool: a class token in front"),
        ({"position": "rotary", "attention": AttentionConfig(2, head_dim=6, causal=False)}, r"multiple of 4"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)
