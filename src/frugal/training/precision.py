"""Number formats: float16 with a gradient scaler on every device, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from frugal.errors import UserError
from frugal.model.linear import local

log = logging.getLogger(__name__)
SUPPORTED = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true")
# The smallest normal float16; below it numbers lose digits, below 2^-25 they become zero.
HALF_MIN_NORMAL = 2.0**-14


class _GradScaler(torch.amp.GradScaler):
    """Looks at this process's part of sharded gradients, and lets every process know what any has found."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not any(hasattr(grad, "to_local") for grad in grads):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        parts = [local(grad) for grad in grads]
        where = parts[0].device  # the host, where shards are kept there
        here = found_inf.to(where, copy=True)
        torch._amp_foreach_non_finite_check_and_unscale_(parts, here, inv_scale.to(where))
        found = here.to(found_inf.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return {found.device: found}


class ScaledHalf(MixedPrecision):
    """Float16 autocast over float32 weights with a gradient scaler (Micikevicius et al. 2018, arXiv 1710.03740).

    The order of a step: backward on the scaled loss, unscale, the module's own rescale and clipping, then the step,
    which is skipped if a gradient is not finite, before or after the rescale; then the scale halves. A skipped step
    counts as a step: its data are consumed and the schedules move on. With a fused optimizer nothing of this waits for
    the device. `skipped` counts the skipped steps of the run and `skipped_in_a_row` the latest ones; both are in the
    checkpoint with the scaler's state.

    Args:
        device: cpu or cuda.
        init_scale: the first loss scale.
        growth_interval: steps without an overflow until the scale doubles.
    """

    def __init__(self, device: str, init_scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        scaler = _GradScaler(device, init_scale=init_scale, growth_interval=growth_interval)
        super().__init__("16-mixed", device, scaler)
        self.skipped = torch.zeros((), dtype=torch.int64)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64)

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """Unscale first, whatever the optimizer could do itself: clipping needs the true gradients."""
        assert self.scaler is not None
        if closure() is None and model.automatic_optimization:
            return None
        self.scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        found = list(self.scaler._found_inf_per_device(optimizer).values())
        norm = getattr(model, "grad_norm", None)
        if norm is not None:
            for value in found:
                # Exactly 1: torch's fused optimizers compare with it, and take the step at any other number.
                value.copy_(torch.maximum(value, (~torch.isfinite(norm)).to(value)))
        bad = torch.stack([value.to(found[0].device) for value in found]).sum() > 0
        self.skipped = self.skipped.to(bad.device) + bad
        self.skipped_in_a_row = (self.skipped_in_a_row.to(bad.device) + 1) * bad
        # A skipped first step must not read as "the scheduler stepped before the optimizer".
        optimizer._opt_called = True
        output = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return output

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state and the counts of skipped steps."""
        counts = {"skipped": int(self.skipped), "skipped_in_a_row": int(self.skipped_in_a_row)}
        return {**super().state_dict(), **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the scale and the counts; how the scale moves stays as this run's config says."""
        assert self.scaler is not None
        self.skipped = torch.tensor(state_dict["skipped"])
        self.skipped_in_a_row = torch.tensor(state_dict["skipped_in_a_row"])
        ours = self.scaler.state_dict()
        kept = {key: state_dict[key] for key in ("scale", "_growth_tracker")}
        super().load_state_dict({**ours, **kept})


def precision_plugin(precision: Any, accelerator: str) -> ScaledHalf | None:
    """The plugin for `trainer.precision`, or None where Lightning's own does what the name says.

    Lightning computes `16-mixed` on a CPU in bfloat16; here it is float16 there too.

    Raises:
        UserError: a format that cannot train a model well, or not on this device.
    """
    name = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}.get(str(precision), precision)
    if name is None:
        return None
    if name == "16-true":
        raise UserError("trainer.precision: 16-true has no float32 weights to scale for; use 16-mixed or bf16-true")
    if name not in SUPPORTED:
        raise UserError(f"trainer.precision: {name} is not supported; use one of {', '.join(SUPPORTED)}")
    if name != "16-mixed":
        return None
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"trainer.precision: 16-mixed needs a CPU or a CUDA device, not {accelerator}; use bf16-mixed")
    device = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    if device == "cpu":
        log.info("trainer.precision: 16-mixed computes in real float16 on this CPU, with a gradient scaler")
    return ScaledHalf(device)


def set_tf32(wanted: bool, precision: str, device: torch.device) -> None:
    """How this process takes float32's products on a GPU: exactly, or in TensorFloat32 with ten bits of a fraction.

    Raises:
        UserError: this device has none, or the run's products are not in float32.
    """
    if wanted:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError("model.tf32: needs a CUDA device of compute capability 8.0 or more; set it to false")
        if precision != "32-true":
            raise UserError(f"model.tf32: trainer.precision {precision} leaves no products in float32; set it to false")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if wanted else "highest")


@torch.no_grad()
def underflow_shares(grads: Iterable[Tensor], scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Shares of gradient entries that are zero, and that were subnormal in float16 while scaled by `scale`.

    `grads` are unscaled. Rows (of the last dimension) without any gradient are left out: the embedding of a token that
    did not occur and an expert that had no tokens are no underflow.
    """
    totals: Tensor | None = None
    for grad in grads:
        if grad.numel() == 0:  # this process's part of a sharded one
            continue
        rows = grad.detach().abs().reshape(-1, grad.shape[-1] if grad.ndim else 1)
        here = (rows != 0).any(dim=1, keepdim=True)
        zero = ((rows == 0) & here).sum()
        subnormal = ((rows > 0) & (rows * scale < HALF_MIN_NORMAL)).sum()
        counts = torch.stack((zero, subnormal, here.sum() * rows.shape[1])).double()
        totals = counts if totals is None else totals + counts
    if totals is None:
        return torch.zeros(()), torch.zeros(())
    zero_share, subnormal_share = (totals[:2] / totals[2].clamp_min(1)).unbind()
    return zero_share, subnormal_share
