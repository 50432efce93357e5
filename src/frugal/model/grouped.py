"""Products of many groups of rows with a matrix each, and the sort that makes the groups.

bfloat16 on CUDA goes to `F.grouped_mm`, which torch.compile traces and which never waits for the host. Everything
else goes through operators of our own, which torch.compile takes as they are (it refuses `F.grouped_mm` in float32):
a loop over the groups, which on CUDA copies the groups' ends to the host.

Shape letters: T tokens, K experts per token, N = T * K rows sorted by group, E groups (experts); A and B widths.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from frugal.model import linear


def dispatch(experts_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """How rows sorted by expert relate to tokens, found without waiting for the device.

    Returns:
        order [N]: which entry of the flattened `experts_TK` each sorted row is; its token is order // K.
        inverse [N]: where each entry went.
        ends [E], int32: where each expert's rows end.
    """
    if experts_TK.device.type == "cpu":
        return torch.ops.frugal.dispatch(experts_TK, n_experts)
    return _dispatch(experts_TK, n_experts)


def _dispatch(experts_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    sorted_N, order_N = experts_TK.flatten().sort(stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    experts_E = torch.arange(n_experts, device=order_N.device)
    return order_N, inverse_N, torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)


def add_load(total_E: Tensor, load_E: Tensor) -> None:
    """Add an expert count to a running total in place, but not when a backward pass recomputes the forward.

    Activation checkpointing runs a block's forward twice; the second run happens inside the backward pass.
    """
    torch.ops.frugal.add_load(total_E, load_E)


def _add_load(total_E: Tensor, load_E: Tensor) -> None:
    if torch._C._current_graph_task_id() == -1:  # how torch's own checkpointing tells, too
        total_E += load_E


def _native(a: Tensor, b: Tensor) -> bool:
    """Whether `F.grouped_mm` takes these: bfloat16 on CUDA, rows a multiple of 16 bytes."""
    aligned = a.shape[-1] % 8 == 0 and b.shape[-1] % 8 == 0 and b.shape[-2] % 8 == 0
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm")


def grouped_nt(a_NA: Tensor, w_EBA: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the transposed matrix of its group: [N, A], [E, B, A] -> [N, B]; `w` may have any strides."""
    if _native(a_NA, w_EBA):
        return F.grouped_mm(a_NA, w_EBA.transpose(1, 2), offs=ends_E)
    return torch.ops.frugal.grouped_nt(a_NA, w_EBA, ends_E)


def grouped_tn(a_NA: Tensor, b_NB: Tensor, ends_E: Tensor) -> Tensor:
    """a^T b within each group: [N, A], [N, B] -> [E, A, B]; zero for a group without rows."""
    if _native(a_NA, b_NB):
        return F.grouped_mm(a_NA.t(), b_NB, offs=ends_E)
    return torch.ops.frugal.grouped_tn(a_NA, b_NB, ends_E)


def grouped_tn_some(a_NA: Tensor, b_NB: Tensor, ends_E: Tensor, index_S: Tensor) -> Tensor:
    """The same for the groups `index_S` (ascending) only, [S, A, B]; the other groups' rows cost nothing.

    A loop on every device: on CUDA it waits for the groups' ends.
    """
    return torch.ops.frugal.grouped_tn_some(a_NA, b_NB, ends_E, index_S)


def _spans(ends_E: Tensor, index_S: Tensor | None = None) -> list[tuple[int, slice]]:
    """The groups that have rows, as (position among the wanted groups, rows)."""
    ends = ends_E.tolist()
    spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    wanted = range(len(spans)) if index_S is None else index_S.tolist()
    return [(i, spans[group]) for i, group in enumerate(wanted) if spans[group].stop > spans[group].start]


# oneDNN generates code for each new shape, so rows go to it in multiples of this.
_ROWS = 32


def _grouped_nt(a_NA: Tensor, w_EBA: Tensor, ends_E: Tensor) -> Tensor:
    n = a_NA.shape[0]
    if not linear.suits_onednn(a_NA, w_EBA):
        out_NB = a_NA.new_empty(n, w_EBA.shape[1])
        for i, rows in _spans(ends_E):
            torch.mm(a_NA[rows], w_EBA[i].t(), out=out_NB[rows])
        return out_NB
    a_NA, parts = a_NA.contiguous(), []
    for i, rows in _spans(ends_E):
        # Round the rows up by a few of a neighbouring group's, whose results are dropped.
        size = min(-(-(rows.stop - rows.start) // _ROWS) * _ROWS, n)
        begin = min(rows.start, n - size)
        part = linear.onednn_nt(a_NA[begin : begin + size], w_EBA[i])
        parts.append(part[rows.start - begin : rows.stop - begin])
    return torch.cat(parts) if parts else a_NA.new_empty(0, w_EBA.shape[1])


def _grouped_tn(a_NA: Tensor, b_NB: Tensor, ends_E: Tensor, index_S: Tensor | None = None) -> Tensor:
    groups = ends_E if index_S is None else index_S
    out_EAB = a_NA.new_zeros(groups.shape[0], a_NA.shape[1], b_NB.shape[1])
    onednn = linear.suits_onednn(a_NA, b_NB)
    for i, rows in _spans(ends_E, index_S):
        split = rows.stop - (rows.stop - rows.start) % _ROWS if onednn else rows.start
        if split > rows.start:
            out_EAB[i] = linear.onednn_tn(a_NA[rows.start : split], b_NB[rows.start : split])
        if split < rows.stop:
            out_EAB[i].addmm_(a_NA[split : rows.stop].t(), b_NB[split : rows.stop])
    return out_EAB


_library = torch.library.Library("frugal", "FRAGMENT")
_library.define("dispatch(Tensor experts, int n_experts) -> (Tensor, Tensor, Tensor)")
_library.define("add_load(Tensor(a!) total, Tensor load) -> ()")
_library.define("grouped_nt(Tensor a, Tensor w, Tensor ends) -> Tensor")
_library.define("grouped_tn(Tensor a, Tensor b, Tensor ends) -> Tensor")
_library.define("grouped_tn_some(Tensor a, Tensor b, Tensor ends, Tensor index) -> Tensor")
for _device in ("CPU", "CUDA"):
    _library.impl("dispatch", _dispatch, _device)
    _library.impl("add_load", _add_load, _device)
    _library.impl("grouped_nt", _grouped_nt, _device)
    _library.impl("grouped_tn", _grouped_tn, _device)
    _library.impl("grouped_tn_some", _grouped_tn, _device)


@torch.library.register_fake("frugal::dispatch", lib=_library)
def _(experts_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    n = experts_TK.numel()
    return experts_TK.new_empty(n), experts_TK.new_empty(n), experts_TK.new_empty(n_experts, dtype=torch.int32)


@torch.library.register_fake("frugal::add_load", lib=_library)
def _(total_E: Tensor, load_E: Tensor) -> None:
    return None


@torch.library.register_fake("frugal::grouped_nt", lib=_library)
def _(a_NA: Tensor, w_EBA: Tensor, ends_E: Tensor) -> Tensor:
    return a_NA.new_empty(a_NA.shape[0], w_EBA.shape[1])


@torch.library.register_fake("frugal::grouped_tn", lib=_library)
def _(a_NA: Tensor, b_NB: Tensor, ends_E: Tensor) -> Tensor:
    return a_NA.new_empty(ends_E.shape[0], a_NA.shape[1], b_NB.shape[1])


@torch.library.register_fake("frugal::grouped_tn_some", lib=_library)
def _(a_NA: Tensor, b_NB: Tensor, ends_E: Tensor, index_S: Tensor) -> Tensor:
    return a_NA.new_empty(index_S.shape[0], a_NA.shape[1], b_NB.shape[1])


@register_flop_formula(torch.ops.frugal.grouped_tn_some, get_raw=True)
def _some_flops(a_NA: Tensor, b_NB: Tensor, ends_E: Tensor, index_S: Tensor, *args: Any, **kwargs: Any) -> int:
    rows = sum(rows.stop - rows.start for _, rows in _spans(ends_E, index_S))
    return 2 * rows * a_NA.shape[1] * b_NB.shape[1]


@register_flop_formula([torch.ops.frugal.grouped_nt, torch.ops.frugal.grouped_tn])
def _grouped_flops(a_shape: Any, b_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]
