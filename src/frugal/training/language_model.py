"""The LightningModule around the transformer: losses, optimizer, and what is written into a checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from frugal.data.batches import IGNORE
from frugal.errors import UserError
from frugal.model.config import Counts, Flops, Frozen, TransformerConfig, count_parameters, flops_per_token
from frugal.model.transformer import Transformer
from frugal.schedule import LossWeight, WarmupStableDecay
from frugal.training.compilation import compile_blocks, require_compiler
from frugal.training.initial import initial_shape, initial_weights
from frugal.training.lora import LoRA, add_adapters, require_peft
from frugal.training.losses import next_token_nll, sum_and_nll, summed_nll
from frugal.training.metrics import TextLoss
from frugal.training.muon import Muon
from frugal.training.optim import (
    ParameterGroup,
    build_optimizer,
    check_resumed_optimizer,
    parameter_groups,
    settings,
    use_averages,
)
from frugal.training.precision import ScaledHalf
from frugal.training.spikes import SkipSpikes

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]


class LanguageModel(pl.LightningModule):
    """Next-token prediction with a Mixture-of-Experts transformer.

    The gradient of an optimizer step is that of the mean loss over all valid tokens of the step: all micro-batches
    and all ranks. Each micro-batch's loss is its sum over a constant (its number of positions), and once per step
    the gradients are rescaled if some positions were masked; so `accumulate_grad_batches` 1x8 and 4x2 agree.
    The routers' losses (model.transformer.moe.*_loss_coef) are counted per position; `train/loss` leaves them and
    those of multi-token prediction out.

    Args:
        transformer: the model's shape.
        optimizer: any torch optimizer's class_path and init_args; `frugal.training.muon.Muon` is ours.
        schedule: the learning rate over the steps of the run (trainer.max_steps).
        parameter_groups: parameters with a learning rate or decay of their own.
        compile: compile each block with torch.compile (needs a C++ compiler on CPU).
        mtp_loss_weight: weight of multi-token prediction's mean loss, where model.transformer.n_mtp switches it on.
        loss_chunk: positions whose logits exist at once in training; 0 keeps all logits; null chooses by device.
        init_from: where a new run's weights come from: a checkpoint or a run's folder of this very shape, or a local
            Hugging Face folder (`frugal import` writes the config for it).
        skip_spikes: leave out steps whose gradient is far above those before; null takes every step.
        lora: train low-rank adapters on frozen weights; null trains the weights.
    """

    def __init__(
        self,
        transformer: TransformerConfig,
        optimizer: OptimizerCallable,
        schedule: WarmupStableDecay,
        parameter_groups: list[ParameterGroup] | None = None,
        compile: bool = False,
        mtp_loss_weight: LossWeight | None = None,
        loss_chunk: int | None = None,
        init_from: str | None = None,
        skip_spikes: SkipSpikes | None = None,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        if loss_chunk is not None and loss_chunk < 0:
            raise UserError(f"model.loss_chunk: must not be negative, got {loss_chunk}")
        if compile and not torch.cuda.is_available():
            require_compiler("cpu")
        self.loss_chunk = loss_chunk
        self.config, self.optimizer, self.schedule, self.init_from = transformer, optimizer, schedule, init_from
        self.parameter_groups = parameter_groups or []
        self.skip_spikes, self.lora = skip_spikes, lora
        if lora is not None:
            require_peft()
            if transformer is not None and transformer.sharing:
                raise UserError("model.lora: cannot adapt layers that share their weights (model.transformer.sharing)")
        self.seed = torch.initial_seed()
        self._norms: deque[float] = deque(maxlen=skip_spikes.window if skip_spikes else 0)
        self.spikes = 0  # steps skipped so far
        # A setting that the optimizer refuses is refused before any data is read.
        build_optimizer(optimizer, [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}])
        if init_from is not None:
            self._check_shape(init_from)
        self.mtp_loss_weight = mtp_loss_weight or LossWeight()
        self.compile_blocks = compile
        self.frozen = Frozen()  # what the current step leaves alone (callbacks.freezing)
        self.model: Transformer | None = None
        self.validation_loss: TextLoss | None = None
        self._step_nats: Tensor | None = None
        self._step_valid: Tensor | None = None
        self._step_mtp: Tensor | None = None  # nats and valid labels of each module, [n_mtp, 2]
        self._step_groups: Tensor | None = None  # nats and valid labels of an adaptive curriculum's groups, [2, G]
        self._step_positions = 0
        self._micro_positions = 0
        self.step_nats: Tensor | None = None  # of the last step, over all ranks; on the device, for callbacks
        self.step_groups: Tensor | None = None  # the same of the last step, over all ranks; None without groups
        self.grad_norm: Tensor | None = None  # before clipping
        self._settings: list[dict[str, Any]] = []  # the optimizer's, of each group, as the config says
        self._main_group = ""  # the one with the most parameters

    def configure_model(self) -> None:
        """Build the transformer (Lightning calls this on the right device and precision)."""
        if self.model is None:
            self.model = Transformer(self.config)
            if self.init_from is not None:
                self._take_weights(self.init_from)
            self._adapt(self.model)
            if self.compile_blocks:
                compile_blocks(self.model)

    def _adapt(self, model: torch.nn.Module) -> None:
        if self.lora is None:
            return
        strategy = self.trainer.strategy
        if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
            raise UserError(f"model.lora: works on one device and under DDP, not with {type(strategy).__name__}")
        self.frozen = add_adapters(model, self.lora)

    def setup(self, stage: str) -> None:
        """Make the validation metric, which needs the tokenizer's bytes per token."""
        token_bytes = torch.zeros(self.vocab_size, dtype=torch.int64)
        known = self.trainer.datamodule.token_bytes  # type: ignore[attr-defined]
        token_bytes[: len(known)] = known
        self.validation_loss = TextLoss(token_bytes)
        # One by source of the data, where there are several.
        names = getattr(self.trainer.datamodule, "part_names", [])  # type: ignore[attr-defined]
        self.part_losses = torch.nn.ModuleList(TextLoss(token_bytes) for _ in names if len(names) > 1)
        self.part_names = [name.replace("/", "_") for name in names]

    def _check_shape(self, source: str) -> None:
        """Refuse weights of another shape before any data is read."""
        theirs = initial_shape(source)
        ignored = {"max_seq_len": 0, "init_std": 0.0, "n_mtp": 0}
        differences = shape_differences(asdict(theirs) | ignored, asdict(self.config) | ignored, "model.transformer")
        if differences:
            raise UserError(
                f"model.init_from: {source} has another shape (its config.yaml gives it back, or "
                "`frugal import` for a Hugging Face folder): "
                + "; ".join(d.replace("in the checkpoint", "there") for d in differences)
            )

    def _take_weights(self, source: str) -> None:
        assert self.model is not None
        missing = self.model.load_state_dict(initial_weights(source), strict=False).missing_keys
        fresh = sorted({key.split(".")[0] for key in missing})  # multi-token prediction has no counterpart there
        log.info("weights taken from %s%s", source, f"; drawn anew: {', '.join(fresh)}" if fresh else "")

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.vocab_size

    def counts(self) -> Counts:
        """Parameters, from the config."""
        return count_parameters(self.config)

    def flops_per_token(self, seq_len: int) -> Flops:
        """What a token of a training step costs, with what is frozen now."""
        return flops_per_token(self.config, seq_len, self.frozen)

    @property
    def step_complete(self) -> bool:
        """Whether the micro-batch that just ended completed an optimizer step."""
        return self._step_nats is None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V]."""
        assert self.model is not None
        return self.model(input_ids)

    # --- training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch of `input_ids` and `labels`, both [B, T]; labels of -100 do not count."""
        labels = batch["labels"]
        assert self.model is not None
        if self.lora is not None and self.lora.dropout:
            self._seed_dropout()
        nats, extra, nll_BT = self._nats(batch)
        if "groups" in batch:
            self._add_groups(nll_BT, batch)
        if self._step_nats is None or self._step_valid is None:
            self._micro_positions = labels.numel()
            self._step_nats, self._step_valid = torch.zeros_like(nats.detach()), torch.zeros_like(nats.detach())
        self._step_nats += nats.detach()
        self._step_valid += (labels != IGNORE).sum()
        self._step_positions += self._micro_positions
        loss = (nats if extra is None else nats + extra) / self._micro_positions
        router_loss = self.model.take_router_loss()
        if router_loss is not None:  # a mean over this micro-batch: weigh it by its share of the step's positions
            loss = loss + router_loss * (labels.numel() / self._micro_positions)
            self.log("train/router_loss", router_loss.detach())
        return loss

    def _nats(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of one micro-batch: the summed loss in nats, what multi-token prediction adds, each label's loss [B, T]."""
        assert self.model is not None
        hidden, head = self.model.hidden(batch["input_ids"]), self.model.head.weight
        nats, nll_BT = sum_and_nll(hidden, head, batch["labels"], self.loss_chunk, fuse=self.compile_blocks)
        return nats, self._mtp_nats(hidden, batch) if self.config.n_mtp else None, nll_BT

    def _seed_dropout(self) -> None:
        """What dropout drops is a function of seed, step, micro-batch and rank: a resumed run drops the same."""
        micro_batch = self._step_positions // max(self._micro_positions, 1)
        place = (self.trainer.global_step, micro_batch, self.global_rank)
        torch.manual_seed(np.random.SeedSequence((self.seed, *place)).generate_state(1, np.uint64).item())

    def _add_groups(self, nll_BT: Tensor, batch: Batch) -> None:
        """Add up the loss by the group that each sequence is from."""
        count = len(self.trainer.datamodule.group_names)  # type: ignore[attr-defined]
        if self._step_groups is None:
            self._step_groups = nll_BT.new_zeros(2, count)
        row_sums = torch.stack((nll_BT.sum(dim=1), (batch["labels"] != IGNORE).sum(dim=1).to(nll_BT.dtype)))
        self._step_groups.index_add_(1, batch["groups"], row_sums)

    def _mtp_nats(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The weighted sum of the modules' losses (DeepSeek-V3, eq. 24 and 25)."""
        assert self.model is not None
        weight = self.mtp_loss_weight.at(self.trainer.global_step, self.trainer.max_steps) / self.config.n_mtp
        sums, weighted = [], hidden.new_zeros(())
        for k, ahead in enumerate(self.model.mtp_hidden(hidden, batch["input_ids"]), start=1):
            labels = batch["labels"][:, k:]
            nats = summed_nll(ahead, self.model.head.weight, labels, self.loss_chunk, fuse=self.compile_blocks)
            sums.append(torch.stack((nats.detach(), (labels != IGNORE).sum().to(nats.dtype))))
            weighted = weighted + nats * weight
        total = torch.stack(sums)
        self._step_mtp = total if self._step_mtp is None else self._step_mtp + total
        return weighted

    def on_train_start(self) -> None:
        """Take the optimizer's settings from the config: a checkpoint brings its moments, not its learning rate."""
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        factor = self.schedule.factor(self.trainer.global_step, self.trainer.max_steps)
        for group, ours in zip(self.trainer.optimizers[0].param_groups, self._settings, strict=True):
            group |= {**ours, "initial_lr": ours["lr"], "lr": ours["lr"] * factor}
        scheduler.base_lrs = [ours["lr"] for ours in self._settings]
        use_averages(self.trainer.optimizers, False)

    def on_validation_start(self) -> None:
        """Evaluate the averaged weights of an optimizer that keeps some."""
        use_averages(self.trainer.optimizers, True)

    def on_validation_end(self) -> None:
        """Go on training from where it stood."""
        use_averages(self.trainer.optimizers, False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Number the logged rows by the step, also after a resume.

        Lightning counts them apart, and a checkpoint saved at the end of a validation lacks the last one.
        """
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Rescale the gradients from positions to valid tokens, over all micro-batches and ranks."""
        assert self._step_nats is not None and self._step_valid is not None and self.model is not None
        loads = [moe.load for moe in self.model.moe_layers().values()]
        mtp = torch.zeros_like(self._step_nats.expand(0)) if self._step_mtp is None else self._step_mtp.flatten()
        groups = mtp.new_zeros(0) if self._step_groups is None else self._step_groups.flatten()
        totals = torch.cat([torch.stack((self._step_nats, self._step_valid)), mtp, groups, *loads])
        if self.trainer.world_size > 1:
            totals = self.all_reduce_sum(totals)
        nats, valid = totals[0], totals[1]
        mtp, groups, *loads = totals[2:].split([mtp.numel(), groups.numel(), *(len(x) for x in loads)])
        self.step_groups = groups.view(2, -1) if len(groups) else None
        for moe, load in zip(self.model.moe_layers().values(), loads, strict=True):
            moe.load.copy_(load)
        for k, (mtp_nats, mtp_valid) in enumerate(mtp.view(-1, 2), start=1):
            self.log(f"train/mtp_loss_{k}", mtp_nats / mtp_valid.clamp_min(1))
        scale = self._step_positions * self.trainer.world_size / valid.clamp_min(1)
        grads = [p.grad for p in _parameters(optimizer) if p.grad is not None]
        torch._foreach_mul_(grads, scale)
        self.log("train/loss", nats / valid, prog_bar=True)
        self.step_nats = nats
        self._step_nats, self._step_valid, self._step_mtp, self._step_positions = None, None, None, 0
        self._step_groups = None

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks."""
        return self.trainer.strategy.reduce(tensor, reduce_op="sum")  # type: ignore[return-value]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm (or by value, as trainer.gradient_clip_algorithm says); log the norm before it."""
        by_value = gradient_clip_algorithm == "value"
        parameters = _parameters(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, float("inf") if by_value else gradient_clip_val or float("inf")
        )
        if by_value and gradient_clip_val:
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        self.grad_norm = norm.detach()
        self.log("optim/grad_norm", norm)
        if self.skip_spikes is not None:
            self._skip_a_spike(self.skip_spikes, float(norm), parameters)
        rates = {group.get("name", ""): group["lr"] for group in optimizer.param_groups}
        main = rates.pop(self._main_group)
        self.log("optim/lr", main)
        self.log_dict({f"optim/lr/{name}": rate for name, rate in rates.items() if rate != main})

    def _skip_a_spike(self, rule: SkipSpikes, norm: float, parameters: list[Tensor]) -> None:
        """Without gradients an optimizer leaves weights and moments as they are."""
        if rule.is_spike(norm, self._norms):
            self.spikes += 1
            log.info("step %d: skipped, gradient norm %.3g", self.trainer.global_step, norm)
            for parameter in parameters:
                parameter.grad = None
        if math.isfinite(norm):
            self._norms.append(norm)
        self.log("optim/skipped_spikes", float(self.spikes))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Clear the experts' loads once an optimizer step has used them (callbacks see them before this)."""
        if self.step_complete and self.model is not None:
            for moe in self.model.moe_layers().values():
                moe.load.zero_()

    def configure_optimizers(self) -> Any:
        """The optimizer over its groups, with the schedule as a function of the step."""
        assert self.model is not None
        total_steps = self.trainer.max_steps
        if total_steps <= 0:
            raise UserError("trainer.max_steps: must be positive; schedules are functions of the step")
        groups = parameter_groups(self.model, self.parameter_groups)
        self._main_group = max(groups, key=lambda group: sum(p.numel() for p in group["params"]))["name"]
        optimizer = build_optimizer(self.optimizer, groups)
        if self.trainer.precision == "16-mixed" and not isinstance(self.trainer.precision_plugin, ScaledHalf):
            # Lightning's own scaler leaves the unscaling to a fused step, too late for clipping; ours does not.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
            for group in optimizer.param_groups:
                group["fused"] = False
        self._settings = settings(optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_end(self) -> None:
        """Leave the weights to use in the model."""
        use_averages(self.trainer.optimizers, True)

    def optimizer_flops(self) -> float:
        """FLOPs of the optimizer's own matrix products in a step, with what trains now."""
        return sum(float(optimizer.flops()) for optimizer in self.trainer.optimizers if isinstance(optimizer, Muon))

    # --- evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the validation loss."""
        assert self.validation_loss is not None
        labels = batch["labels"]
        nll = next_token_nll(self(batch["input_ids"]), labels)
        self.validation_loss.update(nll, labels)
        for part, loss in enumerate(self.part_losses):
            mine = batch["parts"] == part
            loss.update(torch.where(mine, nll, 0.0), torch.where(mine, labels, IGNORE))  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log the exact mean over the validation split."""
        self._log_evaluation("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the test loss."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the exact mean over the test split."""
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> None:
        assert self.validation_loss is not None
        self.log_dict({f"{split}/{name}": value for name, value in self.validation_loss.compute().items()})
        self.validation_loss.reset()
        for name, loss in zip(self.part_names, self.part_losses, strict=False):
            self.log_dict({f"{split}/{name}/{key}": value for key, value in loss.compute().items()})  # type: ignore[operator]
            loss.reset()  # type: ignore[operator]

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Loss in nats per token of each sequence [B], and how many tokens it counts [B]."""
        nll = next_token_nll(self(batch["input_ids"]), batch["labels"])
        tokens = (batch["labels"] != IGNORE).sum(dim=1)
        return {"loss": nll.sum(dim=1) / tokens.clamp_min(1), "tokens": tokens}

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the shape as plain types, so that `weights_only=True` loads it and the model can be rebuilt."""
        checkpoint["transformer"] = asdict(self.config)
        self._save_optimizer(checkpoint)

    def _save_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """What a resumed run must know beside the optimizer's own state."""
        if self._settings:
            checkpoint["optimizer"] = type(self.trainer.optimizers[0]).__name__
        checkpoint["lora"] = self.lora and asdict(self.lora)
        checkpoint["spikes"] = {"norms": list(self._norms), "skipped": self.spikes}

    def _load_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another optimizer's moments or other adapters; take over what is known of spikes."""
        theirs, ours = checkpoint.get("lora"), self.lora and asdict(self.lora)
        if bool(theirs) != bool(ours):
            with_or_without = ("without", "with") if theirs else ("with", "without")
            raise UserError(
                "ckpt_path: this config trains {} adapters (model.lora), the checkpoint {}; start from its weights "
                "with model.init_from".format(*with_or_without)
            )
        if differences := shape_differences(theirs, ours, "model.lora"):
            raise UserError("ckpt_path: the checkpoint has other adapters: " + "; ".join(differences))
        if spikes := checkpoint.get("spikes"):
            self._norms.extend(spikes["norms"])
            self.spikes = spikes["skipped"]
        if self.model is not None and "optimizer" in checkpoint and self.trainer.state.fn == "fit":
            check_resumed_optimizer(checkpoint, self.optimizer, parameter_groups(self.model, self.parameter_groups))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another shape, naming the keys that differ."""
        theirs, ours = checkpoint.get("transformer"), asdict(self.config)
        if theirs is None:
            raise UserError(
                "ckpt_path: the file is no frugal language-model checkpoint (it has no `transformer` entry)"
                + ("; it holds a transformers model: set model.class_path" if "hugging_face" in checkpoint else "")
            )
        # Keys that are younger than the checkpoint have their neutral defaults; an unknown one is named below.
        with contextlib.suppress(TypeError, UserError):
            theirs = asdict(TransformerConfig.from_dict(theirs))
        differences = shape_differences(theirs, ours, "model.transformer")
        if differences:
            raise UserError(
                "ckpt_path: the checkpoint has another shape (its run's config.yaml gives it back): "
                + "; ".join(differences)
            )
        self._load_optimizer(checkpoint)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What the optimizer steps; while experts train alone, their slices and not the stacks."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def shape_differences(theirs: Any, ours: Any, key: str) -> list[str]:
    """Every leaf in which two nested dicts differ, as `key: theirs in the checkpoint, ours in the config`."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = sorted({*theirs, *ours})
        return [d for name in names for d in shape_differences(theirs.get(name), ours.get(name), f"{key}.{name}")]
    return [] if theirs == ours else [f"{key} is {theirs} in the checkpoint, {ours} in the config"]
