"""Number formats: float32 where it matters, a scaler that skips and backs off, exact resume, refused formats."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

import frugal.callbacks.routing as routing
from frugal.data.batches import IGNORE
from frugal.errors import UserError
from frugal.model.router import Router
from frugal.schedule import WarmupStableDecay
from frugal.tracking.run_folder import read_lines
from frugal.training import losses
from frugal.training.inference import load_for_inference
from frugal.training.language_model import LanguageModel
from frugal.training.precision import ScaledHalf, precision_plugin, set_tf32, underflow_shares

Train = Callable[..., Path]
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true")


def rows_of(folder: Path, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in read_lines(folder / "metrics.jsonl") if key in row}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains_with_router_and_loss_in_float32(
    train: Train, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    seen: dict[str, set[torch.dtype]] = {"router": set(), "products": set(), "loss": set(), "bias": set()}
    logits, product, chunked = Router.logits, losses.product_nt, losses._nll_and_gradient_in_place

    def spy_logits(self: Router, x_TD: Tensor) -> Tensor:
        out = logits(self, x_TD)
        seen["router"].add(out.dtype)
        assert self.expert_bias is not None
        seen["bias"].add(self.expert_bias.dtype)
        return out

    def spy_product(a: Tensor, b: Tensor) -> Tensor:
        seen["products"].add(product(a, b).dtype)
        return product(a, b)

    def spy_loss(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        out = chunked(logits_NV, labels_N)
        seen["loss"].add(out[0].dtype)
        return out

    monkeypatch.setattr(Router, "logits", spy_logits)
    monkeypatch.setattr(losses, "product_nt", spy_product)
    monkeypatch.setattr(losses, "_nll_and_gradient_in_place", spy_loss)
    options = ("--trainer.precision", precision, "--model.optimizer.lr", "0.02", "--trainer.max_steps", "24")
    folder = train("fit", *options)
    assert seen["router"] == seen["loss"] == seen["bias"] == {torch.float32}
    low = {"3": torch.float32, "1": torch.float16, "b": torch.bfloat16}[precision[0]]
    assert seen["products"] == {low}
    val = list(rows_of(folder, "val/loss").values())
    assert val[-1] < val[0] - 0.3
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    kept = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert state["model.blocks.1.ffn.experts.w13"].dtype == kept
    model, _ = load_for_inference(str(folder / "checkpoints/last.ckpt"))
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()  # type: ignore[operator]


class Overflow(pl.Callback):
    """Multiply the scaled loss's gradient to infinity at one step, and keep what it leaves behind."""

    def __init__(self, at: int) -> None:
        self.at, self.scales, self.changed = at, [], []

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.before = [p.detach().clone() for p in module.parameters()]
        self.moments = [s["exp_avg"].clone() for s in trainer.optimizers[0].state.values()]

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if trainer.global_step == self.at:
            module.model.norm.weight.grad[0] = float("inf")

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        changed = any(not torch.equal(a, b) for a, b in zip(self.before, module.parameters(), strict=True))
        moments = [s["exp_avg"] for s in trainer.optimizers[0].state.values()]
        if self.moments:
            moved = any(not torch.equal(a, b) for a, b in zip(self.moments, moments, strict=True))
            assert moved == changed
        self.changed.append(changed)
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


def small_trainer(plugin: ScaledHalf, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", plugins=[plugin], enable_model_summary=False, **quiet, **kwargs)


@pytest.mark.parametrize("at", [0, 2])
def test_an_overflow_halves_the_scale_and_skips_the_step(small: Any, at: int) -> None:
    module, data = small()
    plugin, overflow = ScaledHalf("cpu", init_scale=1024.0), Overflow(at)
    trainer = small_trainer(plugin, max_steps=4, callbacks=[overflow], gradient_clip_val=1.0)
    trainer.fit(module, datamodule=data)
    assert overflow.changed == [step != at for step in range(4)]
    assert overflow.scales == [1024.0 if step < at else 512.0 for step in range(4)]
    assert trainer.global_step == 4 and int(plugin.skipped) == 1  # a skipped step counts as a step
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_an_overflow_of_our_own_rescale_is_found(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are finite when unscaled, and infinite once they are divided by the share of valid tokens."""
    module, data = small()
    plugin = ScaledHalf("cpu", init_scale=1.0)
    before = [p.detach().clone() for p in module.parameters()]
    hook = LanguageModel.on_before_optimizer_step

    def huge(self: Any, optimizer: Any) -> None:
        self.model.norm.weight.grad.fill_(3e38)  # the rescale is 96 / 61 here
        hook(self, optimizer)

    monkeypatch.setattr(LanguageModel, "on_before_optimizer_step", huge)
    small_trainer(plugin, max_steps=1).fit(module, datamodule=data)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert plugin.scaler is not None and plugin.scaler.get_scale() == 0.5 and int(plugin.skipped) == 1


@pytest.mark.parametrize(("micro_batch", "accumulate"), [(8, 1), (2, 4)])
def test_float16_gradients_are_float32s_when_they_are_clipped(small: Any, micro_batch: int, accumulate: int) -> None:
    """Unscaled and rescaled to valid tokens before clipping: norms and gradients agree up to float16's rounding."""
    found = []
    for plugins in ([], [ScaledHalf("cpu")]):
        module, data = small(micro_batch)
        grads: dict[str, Tensor] = {}
        clip = module.configure_gradient_clipping

        def keep(*args: Any, clip: Any = clip, grads: Any = grads, module: Any = module, **kwargs: Any) -> None:
            grads.update({name: p.grad.clone() for name, p in module.named_parameters()})
            clip(*args, **kwargs)

        module.configure_gradient_clipping = keep
        trainer = pl.Trainer(
            accelerator="cpu", plugins=plugins, max_steps=1, accumulate_grad_batches=accumulate, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1e-4,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        clipped = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
        found.append((grads, float(module.grad_norm), float(clipped)))
    (exact, norm, clipped), (half, half_norm, half_clipped) = found
    assert half_norm == pytest.approx(norm, rel=0.01)
    assert clipped == pytest.approx(1e-4, rel=0.02) and half_clipped == pytest.approx(1e-4, rel=0.02)
    for name, grad in exact.items():
        assert (half[name] - grad).norm() < 0.02 * grad.norm() + 1e-6, name


@pytest.fixture
def small() -> Callable[..., tuple[LanguageModel, Any]]:
    def make(micro_batch: int = 8) -> tuple[LanguageModel, Any]:
        from frugal.model.config import AttentionConfig, MoEConfig, TransformerConfig

        moe = MoEConfig(n_experts=4, top_k=2, d_expert=8, n_shared_experts=1, first_k_dense=1)
        config = TransformerConfig(
            vocab_size=32, d_model=16, n_layers=2, d_ff=24, attention=AttentionConfig(n_heads=2), moe=moe,
            max_seq_len=12, init_std=0.3,
        )  # fmt: skip
        torch.manual_seed(0)
        module = LanguageModel(config, partial(torch.optim.AdamW, lr=0.01), WarmupStableDecay(warmup_steps=0))
        module.configure_model()
        module.train()
        return module, Rows(micro_batch)

    return make


class Rows(pl.LightningDataModule):
    def __init__(self, micro_batch: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 32, (8, 12), generator=generator)
        self.labels = self.ids.roll(-1, dims=1)
        self.labels[1, 3:], self.labels[2] = IGNORE, IGNORE
        self.micro_batch, self.token_bytes = micro_batch, torch.ones(32, dtype=torch.int64)

    def train_dataloader(self) -> Any:
        pairs = zip(self.ids.split(self.micro_batch), self.labels.split(self.micro_batch), strict=True)
        batches = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
        return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Interrupted(BaseException):
    pass


def test_float16_resumes_exactly_with_its_scale(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    init = ScaledHalf.__init__
    # Grows every three steps from a scale at which float16 overflows at once: it moves throughout.
    monkeypatch.setattr(ScaledHalf, "__init__", lambda self, device: init(self, device, 2.0**30, 3))
    options = ("--trainer.precision", "16-mixed", "--trainer.max_steps", "24")
    whole = train("fit", "--run.name", "whole", *options)
    with monkeypatch.context() as patch:
        step_end = routing.RoutingMonitor.on_train_batch_end

        def stop(self: Any, trainer: Any, *args: Any) -> None:
            step_end(self, trainer, *args)
            if trainer.global_step == 17:
                raise Interrupted

        patch.setattr(routing.RoutingMonitor, "on_train_batch_end", stop)
        with pytest.raises(Interrupted):
            train("fit", "--run.name", "cut", *options)
    cut = train("fit", "--run.name", "cut", "--ckpt_path", "last", *options)
    states = [torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (whole, cut)]
    assert states[0]["ScaledHalf"] == states[1]["ScaledHalf"] and states[0]["ScaledHalf"]["skipped"] >= 5
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][key]), key
    for key in ("precision/loss_scale", "precision/skipped_steps", "precision/subnormal_gradients", "train/loss"):
        assert rows_of(whole, key) == rows_of(cut, key) != {}
    assert states[0]["TextDataModule"]["samples_seen"] == 24 * 4
    assert len(set(rows_of(whole, "precision/loss_scale").values())) > 2


def test_underflow_is_counted_where_there_is_a_gradient() -> None:
    scale = 1024.0
    grad = torch.tensor([[0.0, 1.0, 2.0**-25, 2.0**-24], [0.0, 0.0, 0.0, 0.0]])
    zero, subnormal = underflow_shares([grad], scale)  # 2^-24 * 2^10 is float16's smallest normal number
    assert (zero.item(), subnormal.item()) == (0.25, 0.25)
    assert [x.item() for x in underflow_shares([torch.zeros(3)], scale)] == [0.0, 0.0]
    assert [x.item() for x in underflow_shares([grad], 2.0**11)] == [0.25, 0.0]


def test_what_cannot_train_is_refused() -> None:
    assert precision_plugin("bf16-mixed", "auto") is None and precision_plugin(None, "cpu") is None
    plugin = precision_plugin(16, "cpu")
    assert plugin is not None and plugin.precision == "16-mixed" and plugin.device == "cpu"
    for name, accelerator in (("16-true", "cpu"), ("transformer-engine", "auto"), ("16-mixed", "mps")):
        with pytest.raises(UserError, match=r"^trainer\.precision: "):
            precision_plugin(name, accelerator)


def test_tensorfloat32_is_set_where_it_exists_and_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if device.index == 0 else (7, 5))
    ampere, turing, cpu = (torch.device(name) for name in ("cuda:0", "cuda:1", "cpu"))
    set_tf32(True, "32-true", ampere)
    set_tf32(False, "bf16-mixed", ampere)
    set_tf32(False, "32-true", cpu)
    assert said == ["high", "highest"]  # also back: a process may hold several runs
    for precision, device in (("32-true", turing), ("32-true", cpu), ("bf16-mixed", ampere), ("64-true", ampere)):
        with pytest.raises(UserError, match=r"^model\.tf32: "):
            set_tf32(True, precision, device)
    assert said == ["high", "highest"]


def test_export_and_evaluation_of_each_precision(train: Train, tmp_path: Path) -> None:
    from frugal.training.export import export_checkpoint

    for precision in PRECISIONS[1:]:
        folder = train("fit", "--trainer.precision", precision, "--run.name", precision, "--trainer.max_steps", "4")
        train("validate", "--run.name", precision, "--trainer.precision", precision, "--ckpt_path", "last")
        figures = json.loads((folder / "validate.json").read_text())
        assert figures["val/loss"] == pytest.approx(list(rows_of(folder, "val/loss").values())[-1], rel=1e-3)
        export_checkpoint(str(folder), str(tmp_path / f"out-{precision}"))
        assert (tmp_path / f"out-{precision}" / "config.json").is_file()
