"""FLOPs of optimizers that are not ours, against closed forms and torch's own count of real steps."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from frugal.model.config import orthogonalize_flops
from frugal.training.optimizer_flops import product_flops, qr_flops

SHAPES = [(6, 10), (6, 10), (4, 8, 12), (40, 6), (7,)]


def of(make: Callable[[Any], torch.optim.Optimizer], shapes: list[tuple[int, ...]] = SHAPES) -> dict[Any, float]:
    groups = [{"params": [nn.Parameter(torch.zeros(s)) for s in shapes], "name": "ours", "matrix": True, "parts": 1}]
    found = product_flops(make, make(groups))
    return {tuple(shape): flops for (_, shape), flops in found.items()}


def test_torchs_muon_makes_the_products_that_ours_makes() -> None:
    found = of(lambda groups: torch.optim.Muon(groups, lr=0.01, ns_steps=4), [(6, 10), (20, 8)])
    assert found == {shape: orthogonalize_flops(*shape, steps=4) for shape in found} and len(found) == 2


def test_soap_projects_three_times_and_decomposes_now_and_then() -> None:
    soap = pytest.importorskip("pytorch_optimizer").SOAP
    found = of(lambda groups: soap(groups, lr=0.01, precondition_frequency=12, max_precondition_dim=20))
    for shape in SHAPES[:-1]:
        sides = [side for side in shape if side <= 20]  # the longer ones have no preconditioner
        numel = torch.Size(shape).numel()
        # Gradient, momentum and update go into or out of the basis of each side; its outer product is taken.
        steps = sum(4 * 2 * numel * side for side in sides)
        now_and_then = sum(2 * side**3 + qr_flops((side, side)) for side in sides)
        assert found[shape] == pytest.approx(steps + now_and_then / 12)
    assert found[7,] == 0
    assert qr_flops((3, 9, 6)) == 3 * (4 * 9 * 36 - 4 * 216 // 3)


def test_a_real_step_is_counted_alike() -> None:
    soap = pytest.importorskip("pytorch_optimizer").SOAP
    parameter = nn.Parameter(torch.randn(6, 10))
    optimizer = soap([parameter], lr=0.01, precondition_frequency=5)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.linalg_qr: qr_flops}) as counter:
        for _ in range(11):  # the first step sets up what the others use
            parameter.grad = torch.randn(6, 10)
            optimizer.step()
    ours = of(lambda groups: soap(groups, lr=0.01, precondition_frequency=5), [(6, 10)])[6, 10]
    set_up = 2 * 60 * (6 + 10)  # outer products only
    assert counter.get_total_flops() == pytest.approx(10 * ours + set_up)


def test_optimizers_without_products_cost_none(caplog: pytest.LogCaptureFixture) -> None:
    assert of(lambda groups: torch.optim.AdamW(groups, fused=True)) == {}
    assert set(of(torch.optim.RMSprop).values()) == {0}

    class Odd(torch.optim.RMSprop):
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["params"][0].sum().item()

    with caplog.at_level(logging.INFO):
        assert of(Odd) == {}
    assert "products of Odd are not counted" in caplog.text
