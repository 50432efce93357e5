"""Each detector: a run that triggers it and one that does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import frugal.callbacks.cost as cost
from frugal.callbacks.diagnostics import Diagnostics, broken_parameters, starved_stages
from frugal.errors import UserError
from frugal.schedule import WarmupStableDecay
from frugal.training.language_model import LanguageModel

Train = Callable[..., Path]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("diagnostics: ")]


def poison(monkeypatch: pytest.MonkeyPatch, at: int, what: str) -> None:
    """Make the loss, a gradient or a weight not finite at one step."""
    step = LanguageModel.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = step(self, batch, batch_idx)
        if self.trainer.global_step == at and what == "loss":
            assert self._step_nats is not None
            self._step_nats += float("nan")
            return loss * float("nan")
        return loss

    def on_after_backward(self: Any) -> None:
        if self.trainer.global_step == at and what == "gradient":
            self.model.norm.weight.grad[0] = float("inf")

    rescale = LanguageModel.on_before_optimizer_step

    def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
        rescale(self, optimizer)
        if self.trainer.global_step == at and what == "weight":
            with torch.no_grad():  # seen by the next step, not by this one
                self.model.norm.weight[0] = float("inf")

    monkeypatch.setattr(LanguageModel, "on_before_optimizer_step", on_before_optimizer_step)
    monkeypatch.setattr(LanguageModel, "training_step", training_step)
    monkeypatch.setattr(LanguageModel, "on_after_backward", on_after_backward)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("at", [4, 7])  # 4 is seen when the checkpoint of the 6th step is due, 7 before validation
def test_a_broken_run_stops_and_keeps_the_last_good_checkpoint(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, what: str, at: int
) -> None:
    poison(monkeypatch, at, what)
    with pytest.raises(SystemExit) as stopped:
        train("fit", "--trainer.log_every_n_steps", "100")
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2
    assert f"not finite at step {at}" in error and "the last good checkpoint is" in error
    (folder,) = Path("runs/base").iterdir()
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.ckpt", "last.1.ckpt", "best.ckpt"}
    for name, step in (("last", 4 if at == 4 else 6), ("last.1", 3 if at == 4 else 4), ("best", 4)):
        content = torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)
        assert content["global_step"] == step
        assert all(torch.isfinite(value).all() for value in content["state_dict"].values())
    assert str(folder / "checkpoints/last.ckpt") in error


def test_weights_that_an_update_broke_are_never_written(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    poison(monkeypatch, 5, "weight")  # after the forward pass of the 6th step, whose checkpoint is due
    with pytest.raises(SystemExit):
        train("fit", "--trainer.log_every_n_steps", "100")
    err = capsys.readouterr().err
    assert "weights are not finite after step 5 (first in model.norm.weight; 1 of " in err
    (folder,) = Path("runs/base").iterdir()
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_float16_skips_and_goes_on_until_it_is_hopeless(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    poison(monkeypatch, 4, "gradient")
    folder = train("fit", "--trainer.precision", "16-mixed")
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["ScaledHalf"]["skipped"] == 1
    monkeypatch.setattr("frugal.callbacks.diagnostics.HOPELESS", 3)
    monkeypatch.setattr(LanguageModel, "on_after_backward", lambda self: self.model.norm.weight.grad.fill_(torch.nan))
    with pytest.raises(SystemExit):
        train("fit", "--trainer.precision", "16-mixed", "--run.name", "hopeless")
    assert "gradients overflow float16 at 3 steps in a row up to step 2; no checkpoint" in capsys.readouterr().err


def test_nothing_is_said_about_a_sound_run(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    train("fit", "--trainer.max_steps", "6")
    assert warnings_of(caplog) == []


def test_an_expert_without_tokens_is_named_once(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = LanguageModel.configure_model

    def configure(self: Any) -> None:
        load(self)
        self.model.moe_layers()[1].router.expert_bias[2] = -1e4

    monkeypatch.setattr(LanguageModel, "configure_model", configure)
    train("fit", "--diagnostics.dead_expert_steps", "4", "--expert_bias.rate", "0")
    (said,) = warnings_of(caplog)
    assert "1 experts of layer 1 have had no token for 4 steps" in said
    caplog.clear()
    train("fit", "--diagnostics.dead_expert_steps", "0", "--expert_bias.rate", "0")
    assert warnings_of(caplog) == []


def test_underflow_is_said_under_float16_only(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train("fit", "--trainer.precision", "16-mixed", "--trainer.max_steps", "4")
    assert warnings_of(caplog) == []
    from frugal.training.precision import ScaledHalf

    init = ScaledHalf.__init__
    monkeypatch.setattr(ScaledHalf, "__init__", lambda self, device: init(self, device, 2.0**-10))
    train("fit", "--trainer.precision", "16-mixed", "--trainer.max_steps", "4")
    (said,) = warnings_of(caplog)
    assert "of the float16 gradients are zero and" in said and "use trainer.precision bf16-mixed" in said


def test_waiting_for_batches_is_said_once_and_only_if_it_lasts(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer: Any = type("Trainer", (), {"is_global_zero": True, "callback_metrics": {}})()
    watch = Diagnostics()
    for waited in (0.9, 0.9, 0.1, 0.9, 0.9):
        trainer.callback_metrics = {cost_key(): torch.tensor(waited)}
        watch._check_waiting(trainer)
    assert warnings_of(caplog) == []
    for _ in range(5):
        watch._check_waiting(trainer)
    assert len(warnings_of(caplog)) == 1 and "90% of the time; raise data.num_workers" in warnings_of(caplog)[0]


def cost_key() -> str:
    """The name that the cost meter logs, read from its source so that a renamed metric fails here."""
    key = "data/wait_fraction"
    assert key in Path(cost.__file__).read_text()
    return key


def test_stages_where_the_learning_rate_is_near_zero() -> None:
    schedule = WarmupStableDecay(warmup_steps=0, decay_fraction=0.5)
    factor = lambda step: schedule.factor(step, 100)  # noqa: E731
    assert starved_stages([0, 50, 90], 100, factor, 0.2) == [
        (90, pytest.approx(sum(schedule.factor(s, 100) for s in range(90, 100)) / 10))
    ]
    assert starved_stages([0, 50], 100, factor) == []
    assert starved_stages([0, 100], 100, factor) == []  # begins after the run
    assert starved_stages([0], 10, lambda step: 0.0) == [(0, 0.0)]


def test_a_starved_stage_of_lengths_is_said(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    early = "[{start: 0, seq_len: 8}, {start: 4, seq_len: 16}]"
    train("fit", "--data.lengths", early)
    assert warnings_of(caplog) == []
    late = "[{start: 0, seq_len: 8}, {start: 11, seq_len: 16}]"
    train("fit", "--data.lengths", late, "--diagnostics.starved_factor", "0.3")
    (said,) = warnings_of(caplog)
    assert "the stage of data.lengths from step 11 trains at" in said


def test_options_are_checked_and_state_comes_back() -> None:
    for options in ({"dead_expert_steps": -1}, {"underflow": 1.5}, {"wait_fraction": -0.1}, {"starved_factor": 2.0}):
        with pytest.raises(UserError, match=rf"^diagnostics\.{next(iter(options))}: "):
            Diagnostics(**options)  # type: ignore[arg-type]
    one, other = Diagnostics(), Diagnostics()
    one.said, one._idle_LE, one._slow_rows = {"waiting"}, torch.ones(2, 3), 2
    other.load_state_dict(one.state_dict())
    assert other.said == {"waiting"} and other._slow_rows == 2 and other._idle_LE is one._idle_LE


def test_broken_parameters_are_named() -> None:
    module = torch.nn.Linear(2, 2)
    assert broken_parameters(module) == ([], 2)
    with torch.no_grad():
        module.bias[1] = float("nan")
    assert broken_parameters(module) == (["bias"], 2)
