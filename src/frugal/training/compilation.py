"""torch.compile for the transformer's blocks."""

from __future__ import annotations

import shutil

import torch

from frugal.errors import UserError
from frugal.model.transformer import Transformer


def require_compiler(device_type: str) -> None:
    """Refuse, in one line, to compile for a CPU without a C++ compiler (GPUs bring their own)."""
    from torch._inductor import config

    names = config.cpp.cxx if isinstance(config.cpp.cxx, tuple | list) else (config.cpp.cxx,)
    if device_type == "cpu" and not any(name and shutil.which(name) for name in (*names, "c++")):
        raise UserError(
            "model.compile: torch.compile needs a C++ compiler on a CPU and found none; install g++ (Debian, Ubuntu: "
            "apt-get install g++) or set model.init_args.compile to false"
        )


def compile_blocks(model: Transformer) -> None:
    """Compile each block by itself, in place: the graphs stay few and freezing a block recompiles that block only.

    Raises:
        UserError: the model is on a CPU and no C++ compiler is there.
    """
    require_compiler(model.embedding.weight.device.type)
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False)
