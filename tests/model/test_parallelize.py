"""Sharded over 2 and 4 processes, a model has the gradients of the whole one, and sends what the formula says."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import made_once
from parallel_cases import CASES, cases_of, shape
from ranks import run

from frugal.errors import UserError
from frugal.model.config import AttentionConfig, SharingConfig, TransformerConfig
from frugal.model.parallelize import SEVERAL_MESHES, ParallelSizes
from frugal.model.recompute import recompute_blocks
from frugal.model.transformer import Transformer
from frugal.planning.communication import Traffic, bytes_per_step

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Found]:
    if not SEVERAL_MESHES:
        pytest.skip("this torch cannot keep experts and matrices apart")
    n = request.param
    folder = made_once(tmp_path_factory, f"cases-{n}", lambda here: run(n, [{"call": "parallel_cases:check"}], here))
    return request.param, json.loads((folder / "cases.json").read_text())


def test_gradients_and_logits_are_those_of_one_process(found: tuple[int, Found]) -> None:
    n, results = found
    cases = cases_of(n)
    assert results.keys() == {*cases, "ddp", "muon"} and len(cases) == (29 if n == 4 else 18)
    for name in cases:
        assert results[name]["gradients"] < 1e-5, name
        assert results[name]["logits"] < 1e-5, name
        assert results[name]["muon"]["weights"] < 1e-5, name
    assert results["muon"]["weights"] < 1e-6


def test_what_is_sent_is_what_the_formula_says(found: tuple[int, Found]) -> None:
    n, results = found
    for name, (config, sizes, options) in cases_of(n).items():
        mesh = (2 * config.max_seq_len, sizes.data, sizes.tensor, sizes.expert)
        traffic = bytes_per_step(config, "fsdp2", *mesh, accumulate=2, **options)
        with_muon = bytes_per_step(config, "fsdp2", *mesh, accumulate=2, muon=True, **options)
        assert results[name]["muon"]["sent"] == pytest.approx(with_muon.all_to_all - traffic.all_to_all), name
        sent = results[name]["sent"]
        if config.n_mtp:  # the module ahead sees a token less; its sums and rows are that much smaller
            shorter = 1 - config.n_mtp / config.max_seq_len
            traffic = Traffic(
                traffic.all_gather,
                traffic.reduce_scatter,
                traffic.all_reduce * (config.n_layers + shorter) / (config.n_layers + 1),
                traffic.all_to_all * (config.n_moe_layers + shorter) / (config.n_moe_layers + 1),
            )
        expected = {kind: getattr(traffic, kind) for kind in sent}
        assert sent == pytest.approx(expected), name
    dense = bytes_per_step(CASES["dense"][0], "ddp", 32, data=n, accumulate=2)
    assert results["ddp"]["sent"]["all_reduce"] == dense.total


def test_the_formula_by_hand() -> None:
    config = TransformerConfig(vocab_size=10, d_model=4, n_layers=1, d_ff=8, attention=AttentionConfig(n_heads=2))
    weights = 2 * 10 * 4 + 4 * 4 * 4 + 3 * 4 * 8 + 3 * 4
    assert bytes_per_step(config, "single", 100) == Traffic()
    assert bytes_per_step(config, "ddp", 100, data=4).total == 2 * 0.75 * weights * 4
    sharded = bytes_per_step(config, "fsdp2", 100, data=4, accumulate=3, weight_bytes=2)
    assert sharded == Traffic(all_gather=6 * 0.75 * weights * 2, reduce_scatter=0.75 * weights * 4)
    split = bytes_per_step(config, "fsdp2", 100, data=1, tensor=2)
    assert split.reduce_scatter == 0.5 * (weights - 4 * 4 * 4 - 3 * 4 * 8) * 4
    assert split.all_reduce == 4 * 100 * 4 * 4


@pytest.mark.parametrize(
    ("sizes", "changes", "told"),
    [
        (ParallelSizes(1, 2, 2), {}, "tensor_parallel_size: cannot be combined with expert_parallel_size"),
        (ParallelSizes(1, 3), {}, "tensor_parallel_size: 3 does not divide model.transformer.moe.n_experts"),
        (ParallelSizes(1, 2), {"attention": AttentionConfig(4, 1)}, "n_kv_heads"),
        (ParallelSizes(1, 2), {"attention": AttentionConfig(4, qk_norm="full")}, "qk_norm full"),
        (ParallelSizes(1, 2), {"moe": None, "sharing": SharingConfig(n_blocks=1)}, "sharing"),
        (ParallelSizes(1, 1, 2), {"moe": None}, "the model has no experts"),
        (ParallelSizes(3, 1, 2), {}, "data_parallel_size: 3 does not divide model.transformer.d_model"),
    ],
)
def test_what_cannot_be_split_is_refused(sizes: ParallelSizes, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"^trainer.strategy.*{told}"):
        sizes.check(shape(**changes))


def gradients(model: Transformer, ids: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        loss = model(ids).logsumexp(-1).mean()
        router_loss = model.take_router_loss()
        loss = loss if router_loss is None else loss + router_loss
    loss.backward()
    return [p.grad for p in model.parameters()], sum(kept)


@pytest.mark.parametrize("make", [lambda: shape(), lambda: shape(moe=None)])
def test_recomputed_blocks_have_the_same_gradients_and_keep_less(make: Callable[[], TransformerConfig]) -> None:
    ids = torch.arange(32).view(2, 16)
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Transformer(make())
        if recompute:
            recompute_blocks(model)
        results.append((*gradients(model, ids), [moe.load.clone() for moe in model.moe_layers().values()]))
        assert all(moe.router_loss is None for moe in model.moe_layers().values())
    (plain, kept, loads), (again, kept_again, loads_again) = results
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(loads, loads_again, rtol=0, atol=0)
    inputs = 3 * ids.numel() * 16 * 4  # what each block keeps: its input, [B, T, D] in float32
    assert kept_again + inputs < kept / 3
