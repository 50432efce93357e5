"""Which layers use the same block: one function from layer to block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from frugal.errors import require

KEY = "model.transformer.sharing"


@dataclass(frozen=True)
class SharingConfig:
    """Several layers apply one block's weights: fewer parameters at the same compute.

    Either `n_blocks` with `pattern`, `prelude` and `coda`, or the whole map in `layers`. Each layer keeps its own
    cache and, since it routes other activations, its own balancing bias and load per expert.

    Args:
        n_blocks: blocks in the shared core, which is all layers but prelude and coda.
        pattern: cycle goes through the core's blocks again and again (Universal Transformer, Dehghani et al. 2018;
            a looped core as in Geiping et al. 2025, arXiv 2502.05171); sequence repeats each block before the next
            (MobileLLM, Liu et al. 2024, arXiv 2402.14905).
        prelude: first layers with a block of their own.
        coda: last layers with a block of their own.
        layers: the block of each layer, numbered from 0 in order of first use, for example [0, 1, 2, 1, 2, 3].
        own_norms: every layer has its own norms.
        rank: every layer adds its own low-rank correction of this rank to each shared projection and feed-forward
            matrix, zero at the start (Relaxed Recursive Transformers, Bae et al. 2024, arXiv 2410.20672); routed
            experts and routers have none. 0 is off.
    """

    n_blocks: int | None = None
    pattern: Literal["cycle", "sequence"] = "cycle"
    prelude: int = 0
    coda: int = 0
    layers: tuple[int, ...] | None = None
    own_norms: bool = False
    rank: int = 0

    def __post_init__(self) -> None:
        require((self.n_blocks is None) != (self.layers is None), f"{KEY}: set either n_blocks or layers")
        require(self.n_blocks is None or self.n_blocks > 0, f"{KEY}.n_blocks: must be positive, got {self.n_blocks}")
        for name in ("prelude", "coda", "rank"):
            require(getattr(self, name) >= 0, f"{KEY}.{name}: must not be negative, got {getattr(self, name)}")
        if self.layers is None:
            return
        require(self.prelude == self.coda == 0, f"{KEY}.layers: is the whole map; leave out prelude and coda")
        firsts = list(dict.fromkeys(self.layers))
        require(
            firsts == list(range(len(firsts))) and bool(firsts),
            f"{KEY}.layers: number the blocks 0, 1, 2, ... in order of their first use, got {list(self.layers)}",
        )

    def layer_map(self, n_layers: int) -> tuple[int, ...]:
        """The block of each of `n_layers` layers, numbered in order of first use."""
        if self.layers is not None:
            require(
                len(self.layers) == n_layers,
                f"{KEY}.layers: names the blocks of {len(self.layers)} layers, but n_layers is {n_layers}",
            )
            return self.layers
        assert self.n_blocks is not None
        core = n_layers - self.prelude - self.coda
        require(
            core >= self.n_blocks and core % self.n_blocks == 0,
            f"{KEY}.n_blocks: {self.n_blocks} blocks cannot fill the {core} layers between prelude and coda evenly",
        )
        loops = core // self.n_blocks
        inner = [i % self.n_blocks if self.pattern == "cycle" else i // loops for i in range(core)]
        last = self.prelude + self.n_blocks
        return (*range(self.prelude), *(self.prelude + i for i in inner), *range(last, last + self.coda))
