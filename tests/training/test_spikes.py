"""Which gradient norms are spikes, and what a skipped step leaves as it was."""

from typing import Any

import pytest
import torch

import frugal.training.language_model as language_model
from frugal.errors import UserError
from frugal.training.spikes import SkipSpikes


def test_a_spike_lies_far_above_the_latest_norms() -> None:
    rule = SkipSpikes(sigmas=3, window=8)
    calm = [1.0, 1.2, 0.8, 1.1, 0.9]  # mean 1, standard deviation 0.158
    assert rule.is_spike(1.48, calm) and not rule.is_spike(1.46, calm)
    assert not rule.is_spike(100.0, calm[:3])  # too few to say
    assert not rule.is_spike(float("inf"), calm) and not rule.is_spike(0.0, calm)
    for wrong in ({"sigmas": 0}, {"window": 3}):
        with pytest.raises(UserError, match=r"model\.skip_spikes"):
            SkipSpikes(**wrong)


def test_a_skipped_step_changes_nothing_and_a_resumed_run_skips_the_same(
    resumes_exactly: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient a thousand times too large is planted in step 7, between the checkpoint and the interruption."""
    rescale = language_model.LanguageModel.on_before_optimizer_step
    weights: dict[int, torch.Tensor] = {}

    def planted(self: Any, optimizer: torch.optim.Optimizer) -> None:
        rescale(self, optimizer)
        weights[self.trainer.global_step] = self.model.norm.weight.detach().clone()
        if self.trainer.global_step == 7:
            for p in self.model.parameters():
                p.grad.mul_(1000)

    monkeypatch.setattr(language_model.LanguageModel, "on_before_optimizer_step", planted)
    whole, _ = resumes_exactly("--model.skip_spikes.window", "8", "--model.skip_spikes.sigmas", "9")
    assert torch.equal(weights[8], weights[7]) and not torch.equal(weights[7], weights[6])
    checkpoint = torch.load(whole / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["spikes"]["skipped"] == 1 and len(checkpoint["spikes"]["norms"]) == 8
