"""Muon against torch's own, against the singular value decomposition, and one expert at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from frugal.errors import UserError
from frugal.model.config import (
    AttentionConfig,
    LatentConfig,
    MoEConfig,
    SharingConfig,
    TransformerConfig,
    count_matrices,
    muon_flops,
    orthogonalize_flops,
)
from frugal.model.transformer import Transformer
from frugal.training.muon import Muon, orthogonalize
from frugal.training.optim import ParameterGroup, build_optimizer, parameter_groups, settings


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (1, 12, 12)])
def test_singular_vectors_stay_and_values_go_to_one(shape: tuple[int, int, int]) -> None:
    x = random(*shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    done = orthogonalize(x, steps=8)
    inner = u.mT @ done @ vh.mT  # diagonal if the singular vectors are the same
    values = inner.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.65 and values.max() < 1.25
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-4
    assert not orthogonalize(torch.zeros(shape)).any()


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_flops_are_those_that_torch_counts(shape: tuple[int, int]) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(random(3, *shape))
    assert counter.get_total_flops() == 3 * orthogonalize_flops(*shape)


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_matrices_move_as_under_torchs_muon_and_the_rest_as_under_adamw(
    adjust_lr: Any,
) -> None:
    ours = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate([(8, 20), (20, 8), (8, 20), (7,)])]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    groups = [{"params": ours[:3]}, {"params": ours[3:], "weight_decay": 0.0}]
    one = Muon(groups, lr=0.03, weight_decay=0.2, momentum=0.9, adjust_lr=adjust_lr)
    two = torch.optim.Muon(theirs[:3], lr=0.03, weight_decay=0.2, momentum=0.9, adjust_lr_fn=adjust_lr)
    three = torch.optim.AdamW(theirs[3:], lr=0.03, weight_decay=0.0, betas=(0.9, 0.95))
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = random(*a.shape, seed=100 * step + i)
            b.grad = a.grad.clone()
        for optimizer in (one, two, three):
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)  # torch's iterates in bfloat16
    torch.testing.assert_close(ours[3], theirs[3])


def test_each_expert_and_each_joined_projection_is_a_matrix_of_its_own() -> None:
    stack = nn.Parameter(random(3, 2 * 6, 10))
    single = [nn.Parameter(piece.clone()) for expert in stack.detach() for piece in expert.chunk(2)]
    together = Muon([{"params": [stack], "matrix": True, "parts": 2}], lr=0.1)
    apart = Muon([{"params": single, "matrix": True}], lr=0.1)
    for step in range(3):
        stack.grad = random(*stack.shape, seed=step)
        pieces = [piece for expert in stack.grad for piece in expert.chunk(2)]
        for p, piece in zip(single, pieces, strict=True):
            p.grad = piece
        together.step()
        apart.step()
    pieces = [piece for expert in stack.detach() for piece in expert.chunk(2)]
    for p, piece in zip(single, pieces, strict=True):
        torch.testing.assert_close(p.detach(), piece)
    assert together.flops() == apart.flops() == 6 * orthogonalize_flops(6, 10)
    assert together.state[stack]["momentum_buffer"].shape == stack.shape


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    moved, still = nn.Parameter(random(4, 6)), nn.Parameter(random(4, 6, seed=1))
    vector = nn.Parameter(random(5))
    before = still.detach().clone(), vector.detach().clone()
    optimizer = Muon([{"params": [moved, still]}, {"params": [vector]}], lr=0.1)
    moved.grad = random(4, 6, seed=2)
    optimizer.step()
    assert torch.equal(still, before[0]) and torch.equal(vector, before[1])
    assert still not in optimizer.state and vector not in optimizer.state
    still.requires_grad_(False)
    assert optimizer.flops() == orthogonalize_flops(4, 6)


LATENT = LatentConfig(kv_lora_rank=6, q_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_mtp": 1, "tie_embeddings": True},
        {"moe": None, "sharing": SharingConfig(n_blocks=2, rank=2)},
        {
            "attention": AttentionConfig(
                n_heads=2,
                latent=LatentConfig(
                    kv_lora_rank=6, q_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4
                ),
            )
        },
    ],
)
def test_flops_from_the_config_are_those_of_the_built_model(changes: dict[str, Any]) -> None:
    moe = MoEConfig(n_experts=4, top_k=2, d_expert=6, n_shared_experts=1, first_k_dense=1)
    shape = {"vocab_size": 20, "d_model": 8, "n_layers": 4, "d_ff": 12, "attention": AttentionConfig(2, 1), "moe": moe}
    config = TransformerConfig(**{**shape, **changes})
    with torch.device("meta"):
        optimizer = Muon(parameter_groups(Transformer(config)))
    assert optimizer.flops() == muon_flops(config)
    matrices = [p for group in optimizer.param_groups if group["matrix"] for p in group["params"]]
    assert count_matrices(config) == sum(p.numel() for p in matrices)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.experts = nn.Module()
        self.experts.w13 = nn.Parameter(random(2, 6, 4))
        self.router = nn.Linear(4, 2, bias=False)
        self.norm = nn.LayerNorm(4)
        self.proj = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


def test_groups_by_default_and_by_pattern() -> None:
    model = Small()
    groups = {group["name"]: group for group in parameter_groups(model)}
    sizes = {name: len(group["params"]) for name, group in groups.items()}
    assert sizes == {"embeddings and routers": 2, "joined matrices": 1, "vectors": 2, "matrices": 1}
    assert {name for name, group in groups.items() if group["matrix"]} == {"matrices", "joined matrices"}
    assert groups["joined matrices"]["parts"] == 2 and groups["vectors"]["weight_decay"] == 0
    # The head is the embedding by another name; the first pattern that holds a parameter counts.
    wanted = [ParameterGroup("head", lr_scale=3.0), ParameterGroup("*", matrix=False), ParameterGroup("proj")]
    named = {group["name"]: group for group in parameter_groups(model, wanted)}
    assert named["embeddings and routers of head"]["params"] == [model.embedding.weight]
    assert not any(group["matrix"] for group in named.values())
    optimizer = build_optimizer(lambda groups: Muon(groups, lr=0.1, adamw_lr=0.2), parameter_groups(model, wanted[:1]))
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx(
        {"embeddings and routers of head": 0.6, "embeddings and routers": 0.2, "joined matrices": 0.1,
         "vectors": 0.2, "matrices": 0.1}
    )  # fmt: skip
    assert all(
        {"lr", "betas", "momentum", "name"} <= set(kept) and "params" not in kept for kept in settings(optimizer)
    )
    with pytest.raises(UserError, match=r"nothing matches no parameter; they are named like embedding.weight"):
        parameter_groups(model, [ParameterGroup("nothing")])
