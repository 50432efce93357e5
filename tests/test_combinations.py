"""Every pair of techniques trains, cut and resumed exactly, or is refused with a reason.

A few runs that between them hold every pair of two techniques' settings stand for all combinations.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from frugal.errors import UserError
from frugal.training.compilation import require_compiler

IMPORTANCE = '{{"measure": "{}", "unit": "{}", "share": 0.5, "measure_steps": 3, "freeze_steps": 3}}'
TECHNIQUES: dict[str, dict[str, tuple[str, ...]]] = {
    "compile": {"eager": (), "compiled": ("--model.compile", "true")},
    "freezing": {
        "no freezing": (),
        "window": ("--freezing.windows", '[{"layers": [0], "embedding": true, "start": 2, "stop": 9}]'),
        "prefix": ("--freezing.prefix", '{"layers": 1, "start": 5}'),
        "important layers": ("--freezing.importance", IMPORTANCE.format("fisher", "block")),
        "important experts": ("--freezing.importance", IMPORTANCE.format("gradient_norm", "expert")),
        "chosen experts": ("--freezing.experts", '{"threshold": 0.4, "batches": 2, "train": ["norm"]}'),
    },
    "precision": {name: ("--trainer.precision", name) for name in ("32-true", "16-mixed", "bf16-mixed", "bf16-true")},
    "optimizer": {
        "AdamW": (),
        "Muon": ("--config", "configs/optim/muon.yaml"),
        "schedule-free": ("--config", "configs/optim/schedule_free.yaml"),
        "SGD": ("--config", "configs/optim/sgd.yaml", "--model.optimizer.lr", "0.03"),
        "moving average": ("--config", "configs/optim/ema.yaml"),
    },
    "accumulation": {"1 micro-batch": (), "2 micro-batches": ("--trainer.accumulate_grad_batches", "2")},
    "spikes": {"all steps": (), "spikes skipped": ("--model.skip_spikes.window", "8")},
}


def covering(factors: dict[str, dict[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Few choices, one setting per factor, that hold every pair of settings; greedy, and the first are preferred."""
    everything = list(itertools.product(*factors.values()))
    missing = {pair for choice in everything for pair in itertools.combinations(choice, 2)}
    chosen = []
    while missing:
        best = max(everything, key=lambda choice: len(missing.intersection(itertools.combinations(choice, 2))))
        missing.difference_update(itertools.combinations(best, 2))
        chosen.append(best)
    return chosen


CHOSEN = covering(TECHNIQUES)


def test_every_pair_is_among_them() -> None:
    names = [set(settings) for settings in TECHNIQUES.values()]
    for one, other in itertools.combinations(names, 2):
        for pair in itertools.product(one, other):
            assert any(set(pair) <= set(choice) for choice in CHOSEN), pair


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOSEN, ids=", ".join)
def test_a_combination_trains_and_resumes_exactly(
    resumes_exactly: Callable[..., tuple[Path, Path]], choice: tuple[str, ...]
) -> None:
    if "compiled" in choice:
        try:
            require_compiler("cpu")
        except UserError as missing:
            pytest.skip(str(missing))
    options = [settings[name] for settings, name in zip(TECHNIQUES.values(), choice, strict=True)]
    # What torch.compile makes of a validation batch depends on the shapes that it has seen before.
    # So does, in the last digit, float16 on a CPU with weights that have just been exchanged for their average.
    rel = 1e-5 if "compiled" in choice else 1e-6 if {"16-mixed", "moving average"} <= set(choice) else 0.0
    whole, _ = resumes_exactly("--trainer.val_check_interval", "4", *itertools.chain(*options), history_rel=rel)
    state = torch.load(whole / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
