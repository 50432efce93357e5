"""What every model's LightningModule shares: the optimizer's step over all micro-batches and ranks, and its state."""

from __future__ import annotations

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

from frugal.errors import UserError
from frugal.model.config import Counts, Flops, Frozen
from frugal.schedule import WarmupStableDecay
from frugal.training.clipping import clip_gradients, gradients
from frugal.training.fp8 import Float8, convert_to_float8, require_float8
from frugal.training.lora import LoRA, add_adapters, require_peft
from frugal.training.muon import Muon
from frugal.training.optim import (
    ParameterGroup,
    build_optimizer,
    check_resumed_optimizer,
    parameter_groups,
    settings,
    use_averages,
)
from frugal.training.optimizer_flops import product_flops
from frugal.training.precision import ScaledHalf, set_tf32
from frugal.training.spikes import SkipSpikes

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]


class TrainingModule(pl.LightningModule):
    """A model with its optimizer; what is trained on is the subclass's affair.

    The gradient of an optimizer step is that of the mean loss over all valid labels of the step: all micro-batches
    and all ranks. Each micro-batch's loss is its sum over a constant (its number of labels), and once per step
    the gradients are rescaled if some labels were masked; so `accumulate_grad_batches` 1x8 and 4x2 agree.
    The routers' losses (model.transformer.moe.*_loss_coef) are counted per label; `train/loss` leaves them and further
    losses out.

    Args:
        optimizer: any torch optimizer's class_path and init_args; `frugal.training.muon.Muon` is ours.
        schedule: the learning rate over the steps of the run (trainer.max_steps).
        parameter_groups: parameters with a learning rate or decay of their own.
        skip_spikes: leave out steps whose gradient is far above those before; null takes every step.
        lora: train low-rank adapters on frozen weights; null trains the weights.
        fp8: take linear maps in float8, on a device that can; null keeps trainer.precision throughout.
        tf32: take float32's products in TensorFloat32, ten bits of a fraction, on a GPU that can (Ampere and newer).
    """

    reads = ""  # what the data must give
    unit = "token"  # what the loss is a mean over
    go_on = ""  # a command that uses what was trained; {run} is the run's folder
    sums: tuple[str, ...] = ()  # names of further sums over a step, logged as train/<name>

    def __init__(
        self,
        optimizer: OptimizerCallable,
        schedule: WarmupStableDecay,
        parameter_groups: list[ParameterGroup] | None = None,
        skip_spikes: SkipSpikes | None = None,
        lora: LoRA | None = None,
        fp8: Float8 | None = None,
        tf32: bool = False,
    ) -> None:
        super().__init__()
        self.optimizer, self.schedule = optimizer, schedule
        self.parameter_groups = parameter_groups or []
        self.skip_spikes, self.lora, self.fp8, self.tf32 = skip_spikes, lora, fp8, tf32
        if lora is not None and fp8 is not None:
            raise UserError("model.fp8: not with model.lora, whose frozen matrices keep their number format")
        if lora is not None:
            require_peft()
        self.seed = torch.initial_seed()
        self._norms: deque[float] = deque(maxlen=skip_spikes.window if skip_spikes else 0)
        self.spikes = 0  # steps skipped so far
        # A setting that the optimizer refuses is refused before any data is read.
        build_optimizer(optimizer, [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}])
        self.model: Any = None  # built in configure_model
        self.frozen = Frozen()  # what the current step leaves alone (callbacks.freezing)
        self._step_nats: Tensor | None = None
        self._step_valid: Tensor | None = None
        self._step_sums: Tensor | None = None  # sum and count of each of `sums`, [n, 2]
        self._step_groups: Tensor | None = None  # nats and valid labels of an adaptive curriculum's groups, [2, G]
        self._step_positions = 0
        self._micro_positions = 0
        self.step_nats: Tensor | None = None  # of the last step, over all ranks; on the device, for callbacks
        self.step_groups: Tensor | None = None  # the same of the last step, over all ranks; None without groups
        self.grad_norm: Tensor | None = None  # before clipping
        self._settings: list[dict[str, Any]] = []  # the optimizer's, of each group, as the config says
        self._products: dict[tuple[int, torch.Size], float] = {}  # FLOPs of the optimizer's own, if it is not Muon
        self._main_group = ""  # the one with the most parameters

    # --- what a subclass says of its model

    def counts(self) -> Counts:
        """Parameters."""
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> Flops:
        """What a token of a training step costs in sequences of this length, with what is frozen now."""
        raise NotImplementedError

    def token_shape(self, batch: Batch) -> tuple[int, int]:
        """Sequences of a batch, and the tokens of each that pass through the blocks."""
        raise NotImplementedError

    def visit(self, batch: Batch) -> None:
        """Run a batch through all blocks, for what their hooks see."""
        raise NotImplementedError

    def _require_whole_weights(self, key: str) -> None:
        """Refuse strategies that shard them."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
            raise UserError(f"{key}: works on one device and under DDP, not with {type(strategy).__name__}")

    def _adapt(self, model: torch.nn.Module) -> None:
        """Put adapters or float8 maps into a model that has just been built and has its weights."""
        if self._trainer is not None:  # a model that is only looked at changes nothing
            set_tf32(self.tf32, str(self.trainer.precision), self.trainer.strategy.root_device)
        if self.lora is None and self.fp8 is None:
            return
        self._require_whole_weights("model.fp8" if self.fp8 else "model.lora")
        if self.lora is not None:
            self.frozen = add_adapters(model, self.lora)
        if self.fp8 is not None:
            require_float8(self.fp8, str(self.trainer.precision), self.trainer.strategy.root_device)
            convert_to_float8(model, self.fp8)

    # --- one optimizer step

    def _seed_dropout(self) -> None:
        """What dropout drops is a function of seed, step, micro-batch and rank: a resumed run drops the same."""
        micro_batch = self._step_positions // max(self._micro_positions, 1)
        place = (self.trainer.global_step, micro_batch, self.global_rank)
        torch.manual_seed(np.random.SeedSequence((self.seed, *place)).generate_state(1, np.uint64).item())

    def _micro_batch_loss(self, nats: Tensor, valid: Tensor, positions: int, extra: Tensor | None = None) -> Tensor:
        """Add a micro-batch to its step; returns the loss to differentiate.

        Args:
            nats: the loss summed over the micro-batch's valid labels.
            valid: how many those are.
            positions: how many labels there are in all.
            extra: what is added to the sum, but does not count in `train/loss`.
        """
        if self._step_nats is None or self._step_valid is None:
            self._micro_positions = positions
            self._step_nats, self._step_valid = torch.zeros_like(nats.detach()), torch.zeros_like(nats.detach())
        self._step_nats += nats.detach()
        self._step_valid += valid
        self._step_positions += self._micro_positions
        loss = (nats if extra is None else nats + extra) / self._micro_positions
        router_loss = self.model.take_router_loss()
        if router_loss is not None:  # a mean over this micro-batch: weigh it by its share of the step's positions
            # Of processes that share a batch each has the same one.
            loss = loss + router_loss * (positions / self._micro_positions / self._sharing)
            self.log("train/router_loss", router_loss.detach())
        return loss

    def _add_sums(self, sums_N2: Tensor) -> None:
        """Add to the sums that are named in `sums`: of each its sum and its count."""
        self._step_sums = sums_N2 if self._step_sums is None else self._step_sums + sums_N2

    def _add_groups(self, nats_B: Tensor, valid_B: Tensor, groups_B: Tensor) -> None:
        """Add up the loss by the group that each sample is from."""
        count = len(self.trainer.datamodule.group_names)  # type: ignore[attr-defined]
        if self._step_groups is None:
            self._step_groups = nats_B.new_zeros(2, count)
        self._step_groups.index_add_(1, groups_B, torch.stack((nats_B, valid_B.to(nats_B.dtype))))

    @property
    def step_complete(self) -> bool:
        """Whether the micro-batch that just ended completed an optimizer step."""
        return self._step_nats is None

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
        """Rescale the gradients from positions to valid labels, over all micro-batches and ranks."""
        assert self._step_nats is not None and self._step_valid is not None and self.model is not None
        loads = [moe.load for moe in self.model.moe_layers().values()]
        none = self._step_nats.new_zeros(0)
        sums = none if self._step_sums is None else self._step_sums.flatten()
        groups = none if self._step_groups is None else self._step_groups.flatten()
        totals = torch.cat([torch.stack((self._step_nats, self._step_valid)), sums, groups, *loads])
        if self.trainer.world_size > 1:
            totals = self.all_reduce_sum(totals)
        nats, valid = totals[0], totals[1]
        sums, groups, *loads = totals[2:].split([sums.numel(), groups.numel(), *(len(x) for x in loads)])
        self.step_groups = groups.view(2, -1) if len(groups) else None
        for moe, load in zip(self.model.moe_layers().values(), loads, strict=True):
            moe.load.copy_(load / self._sharing)
        for name, (total, count) in zip(self.sums, sums.view(-1, 2), strict=False):
            self.log(f"train/{name}", total / count.clamp_min(1))
        averaged_over = 1 if _are_sharded(optimizer) else self.trainer.world_size  # sharded gradients are sums
        scale = self._step_positions * averaged_over / valid.clamp_min(1)
        grads = gradients(_parameters(optimizer))
        torch._foreach_mul_(
            grads, scale.to(grads[0].device) if grads else scale
        )  # shards may be kept in the host's memory
        self.log("train/loss", nats / valid, prog_bar=True)
        self.step_nats = nats
        self._step_nats, self._step_valid, self._step_sums, self._step_positions = None, None, None, 0
        self._step_groups = None

    @property
    def _sharing(self) -> int:
        """How many processes share every batch (tensor parallelism)."""
        return int(getattr(self.model, "shared_by", (0, 1))[1])

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, where these exchange."""
        return self.trainer.strategy.reduce(tensor.to(self.device), reduce_op="sum")  # type: ignore[return-value]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm (or by value, as trainer.gradient_clip_algorithm says); log the norm before it."""
        parameters = _parameters(optimizer)
        reduce_sum = self.all_reduce_sum if _are_sharded(optimizer) else None
        norm = clip_gradients(parameters, gradient_clip_val, gradient_clip_algorithm == "value", reduce_sum)
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
        self._products = {} if isinstance(optimizer, Muon) else product_flops(self.optimizer, optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_end(self) -> None:
        """Leave the weights to use in the model."""
        use_averages(self.trainer.optimizers, True)

    def optimizer_flops(self) -> float:
        """FLOPs of the optimizer's own matrix products in a step on all devices, with what trains now.

        Devices with copies of the weights all take the same ones; those that share the weights share them, too.
        """
        total = 0.0
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, Muon):
                own = float(optimizer.flops())
            else:
                groups = optimizer.param_groups if self._products else []
                trained = [(i, p.shape) for i, group in enumerate(groups) for p in group["params"] if p.requires_grad]
                own = sum(self._products.get(key, 0.0) for key in trained)
            total += own * (1 if _are_sharded(optimizer) else self.trainer.world_size)
        return total

    # --- checkpoints

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


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What the optimizer steps; while experts train alone, their slices and not the stacks."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _are_sharded(optimizer: torch.optim.Optimizer) -> bool:
    return any(hasattr(p, "to_local") for p in _parameters(optimizer))


def shape_differences(theirs: Any, ours: Any, key: str) -> list[str]:
    """Every leaf in which two nested dicts differ, as `key: theirs in the checkpoint, ours in the config`."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = sorted({*theirs, *ours})
        return [d for name in names for d in shape_differences(theirs.get(name), ours.get(name), f"{key}.{name}")]
    return [] if theirs == ours else [f"{key} is {theirs} in the checkpoint, {ours} in the config"]
