"""torch.compile for the transformer's blocks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frugal.errors import UserError
from frugal.model.transformer import BlockStack


def require_compiler(device_type: str) -> None:
    """Refuse, in one line, to compile for a CPU without a C++ compiler (GPUs bring their own)."""
    from torch._inductor import config

    names = config.cpp.cxx if isinstance(config.cpp.cxx, tuple | list) else (config.cpp.cxx,)
    if device_type == "cpu" and not any(name and shutil.which(name) for name in (*names, "c++")):
        raise UserError(
            "model.compile: torch.compile needs a C++ compiler on a CPU and found none; install g++ (Debian, Ubuntu: "
            "apt-get install g++) or set model.init_args.compile to false"
        )


def compile_blocks(model: BlockStack, fullgraph: bool = False) -> None:
    """Compile each block by itself, in place: the graphs stay few and freezing a block recompiles that block only.

    Generation with a key/value cache, where every call has another shape, keeps to the plain block.

    Args:
        fullgraph: refuse what cannot be compiled instead of running it plainly.

    Raises:
        UserError: the model is on a CPU and no C++ compiler is there.
    """
    require_compiler(model.head.weight.device.type)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in model.all_blocks():
        block.forward = _compiled_unless_cached(block.forward, fullgraph)  # type: ignore[method-assign]


def _compiled_unless_cached(forward: Callable[..., Tensor], fullgraph: bool) -> Callable[..., Tensor]:
    compiled = torch.compile(forward, fullgraph=fullgraph)

    def either(x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: Any = None) -> Tensor:
        return compiled(x_BTD, rotary) if cache is None else forward(x_BTD, rotary, cache)

    return either
