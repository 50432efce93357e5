"""Whole matrices out of shards: each process gets some of them whole, works on those, and gives back everyone's parts.

By all-to-all: over n processes that sends 2/n of what gathering all of them everywhere would, and the work on a matrix
is done once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def shares(size: int, n: int) -> list[int]:
    """How much of a dimension each of n processes has: as torch.chunk and DTensor cut it."""
    most = -(-size // n)
    return [max(min(most, size - rank * most), 0) for rank in range(n)]


def reshard(x: Tensor, size: int, old: int, new: int, group: Any) -> Tensor:
    """From this process's part along dimension `old`, of `size`, to all of that and a part along dimension `new`.

    Args:
        group: the processes that `old` is split over; each calls it with its part.
    """
    n, rank = group.size(), group.rank()
    give, get = shares(x.shape[new], n), shares(size, n)
    sent = [piece.flatten() for piece in x.split(give, new)]
    shapes = []
    for length in get:
        shape = list(x.shape)
        shape[old], shape[new] = length, give[rank]
        shapes.append(shape)
    sizes = [math.prod(shape) for shape in shapes]
    received = x.new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(sent), sizes, [len(piece) for piece in sent], group)
    pieces = received.split(sizes)
    return torch.cat([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], old)


@dataclass(frozen=True)
class Layout:
    """How the matrices of a parameter lie on the processes.

    Args:
        part: rows and columns of what is here of each.
        cuts: (dimension, its size, processes) of each cut through the matrices, the first one first.
        device: where the processes exchange, that of the mesh, also if the shards are kept in the host's memory.
    """

    part: tuple[int, int]
    cuts: tuple[tuple[int, int, Any], ...]
    device: str | torch.device

    def stack(self, x: Tensor) -> Tensor:
        """What is here of a parameter as [N, *part]."""
        joined = 1 if self.cuts else x.shape[-2] // self.part[0]
        return x.reshape(math.prod(x.shape[:-2]) * joined, *self.part)

    def gather(self, x_NRC: Tensor) -> Tensor:
        """Parts of N matrices, the same N on every process, to the whole ones that are this process's."""
        x_NRC = x_NRC.to(self.device)
        for dim, size, group in reversed(self.cuts):
            x_NRC = reshard(x_NRC, size, dim, 0, group)
        return x_NRC

    def scatter(self, x_NRC: Tensor, n: int) -> Tensor:
        """Back to this process's parts of all n matrices."""
        counts = [n]
        for _, _, group in reversed(self.cuts[1:]):
            counts.append(shares(counts[-1], group.size())[group.rank()])
        for (dim, _, group), count in zip(self.cuts, reversed(counts), strict=False):
            x_NRC = reshard(x_NRC, count, 0, dim, group)
        return x_NRC


def layout(parameter: Tensor, rows: int) -> Layout:
    """How a parameter [..., k rows, C] of matrices [rows, C] lies on the processes.

    A stack that is cut between its matrices, as one of experts is, has them whole. Where they are cut, those that are
    joined are gathered together: parts are of [k rows, C].
    """
    if not isinstance(parameter, DTensor):
        return Layout((rows, parameter.shape[-1]), (), parameter.device)
    mesh, shape, cuts = parameter.device_mesh, list(parameter.shape), []
    for dim, placement in enumerate(parameter.placements):
        assert type(placement) in (Shard, Replicate), placement
        if isinstance(placement, Shard) and mesh.size(dim) > 1:
            if placement.dim >= parameter.ndim - 2:
                cuts.append((placement.dim - parameter.ndim, shape[placement.dim], mesh.get_group(dim)))
            shape[placement.dim] = shares(shape[placement.dim], mesh.size(dim))[mesh.get_local_rank(dim)]
    part = (shape[-2], shape[-1]) if cuts else (rows, shape[-1])
    return Layout(part, tuple(cuts), mesh.device_type)
