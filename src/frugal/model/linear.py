"""Matrix products for the CPU: oneDNN's kernels where the default library is held back.

On x86, torch hands float32 products to MKL, which keeps to its AVX2 kernels on processors that are not Intel's;
oneDNN, which ships with torch too, uses AVX-512 wherever there is AVX-512: about twice the speed. `Linear` and the
experts use it there; everywhere else they are plain torch. The choice depends on the machine alone, never on a
timing, so runs stay reproducible.

Shape letters: N rows, J outputs, K inputs, G groups of consecutive rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


def _onednn_is_faster() -> bool:
    """Whether this machine has AVX-512, a processor that is not Intel's, and a torch with oneDNN's linear."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


ONEDNN = _onednn_is_faster()
# Below so many multiply-adds oneDNN's overhead (and for a^T b its copies) cost more than its kernels save.
SMALL_NT, SMALL_TN = 4_000_000, 12_000_000


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these two should go to oneDNN: plain float32 tensors on such a CPU, no autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)  # a sharded weight (DTensor) keeps torch's own products
        and not torch.is_autocast_enabled("cpu")
        and ONEDNN
    )


def onednn_nt(a_NK: Tensor, b_JK: Tensor) -> Tensor:
    """a b^T, contiguous; b may have any strides, a is copied if it is not contiguous."""
    if a_NK.numel() * b_JK.shape[0] < SMALL_NT:
        return torch.mm(a_NK, b_JK.t())
    return torch.ops.mkldnn._linear_pointwise(a_NK, b_JK, None, "none", [], "")


def onednn_tn(a_NJ: Tensor, b_NK: Tensor) -> Tensor:
    """a^T b, contiguous, copying as little as possible."""
    (n, j), k = a_NJ.shape, b_NK.shape[1]
    if n * j * k < SMALL_TN or min(j, k) < 128:
        return torch.mm(a_NJ.t(), b_NK)
    if n * j <= n * k + j * k:
        return onednn_nt(a_NJ.t().contiguous(), b_NK.t())
    return onednn_nt(b_NK.t().contiguous(), a_NJ.t()).t().contiguous()


_library = torch.library.Library("frugal", "FRAGMENT")
_library.define("mm_nt(Tensor a, Tensor b) -> Tensor")
_library.define("mm_tn(Tensor a, Tensor b) -> Tensor")
_library.impl("mm_nt", onednn_nt, "CPU")
_library.impl("mm_tn", onednn_tn, "CPU")


@torch.library.register_fake("frugal::mm_nt", lib=_library)
def _(a_NK: Tensor, b_JK: Tensor) -> Tensor:
    return a_NK.new_empty(a_NK.shape[0], b_JK.shape[0])


@torch.library.register_fake("frugal::mm_tn", lib=_library)
def _(a_NJ: Tensor, b_NK: Tensor) -> Tensor:
    return a_NJ.new_empty(a_NJ.shape[1], b_NK.shape[1])


@register_flop_formula(torch.ops.frugal.mm_nt)
def _nt_flops(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[0]


@register_flop_formula(torch.ops.frugal.mm_tn)
def _tn_flops(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def product_nt(a_NK: Tensor, b_JK: Tensor) -> Tensor:
    """a b^T, [N, J], without a gradient of its own."""
    return torch.ops.frugal.mm_nt(a_NK, b_JK) if suits_onednn(a_NK, b_JK) else a_NK @ b_JK.t()


def product_tn(a_NJ: Tensor, b_NK: Tensor) -> Tensor:
    """a^T b, [J, K], without a gradient of its own."""
    return torch.ops.frugal.mm_tn(a_NJ, b_NK) if suits_onednn(a_NJ, b_NK) else a_NJ.t() @ b_NK


class _OneDNNLinear(torch.autograd.Function):
    """x W^T through oneDNN, forward and backward; a frozen weight or input costs no product."""

    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_JK: Tensor) -> Tensor:
        ctx.save_for_backward(x_NK, weight_JK)
        return torch.ops.frugal.mm_nt(x_NK, weight_JK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NK, weight_JK = ctx.saved_tensors
        grad_NJ = grads[0]
        grad_x = torch.ops.frugal.mm_nt(grad_NJ, weight_JK.t()) if ctx.needs_input_grad[0] else None
        grad_weight = torch.ops.frugal.mm_tn(grad_NJ, x_NK) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is spread over processes (a DTensor); any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def linear(x: Tensor, weight_JK: Tensor) -> Tensor:
    """[..., K] -> [..., J] without a bias, by whichever library is faster on this machine."""
    if suits_onednn(x, weight_JK):
        return _OneDNNLinear.apply(x.reshape(-1, x.shape[-1]), weight_JK).view(*x.shape[:-1], -1)
    return F.linear(x, weight_JK)


class Linear(nn.Linear):
    """`nn.Linear` without a bias, its product taken by `linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; of a part of the weight, its part of the product."""
        return linear(x, local(self.weight))

    def full_weight(self) -> Tensor:
        """The matrix that `forward` multiplies with, [out_features, in_features]."""
        return local(self.weight)
