"""Sharded checkpoints: a folder with one file per process, readable by any number of processes.

    last.ckpt/meta.pt          everything but the tensors, and which folder of shards it belongs to
    last.ckpt/step-300-0/      torch.distributed.checkpoint's files

`meta.pt` has the shards' checksums, and is replaced in one move after them, so a crash leaves the checkpoint before.
Nothing in such a folder can execute code: shards and `meta.pt` load as plain tensors and values, and torch's own index,
a pickle, is read by an unpickler that knows its few classes only.
"""

from __future__ import annotations

import enum
import logging
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from frugal.errors import UserError
from frugal.training.checksums import META, file_digest, write_sealed

log = logging.getLogger(__name__)
SHARDS, DIGESTS = "shards", "digests"
_SAFE = {
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def is_sharded(path: str | Path) -> bool:
    """Whether this is the folder of a sharded checkpoint."""
    return (Path(path) / META).is_file()


class _NotATensor(Exception):
    """What an index has no need of."""


def _member(kind: Any, name: str) -> enum.Enum:
    """A member of an enumeration: which some Pythons pickle by `getattr` (3.11.2, that of Debian 12)."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise _NotATensor("builtins.getattr")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name in _SAFE.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise _NotATensor(f"{module}.{name}")


class _Reader(dcp.FileSystemReader):
    """torch's reader, but its index may hold the shapes and places of tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()):
            raise _NotATensor("a pickled object")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def save_sharded(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], name: str) -> None:
    """Write a checkpoint; every process calls it with its shards, and the first one's `meta` is kept.

    Args:
        tensors: DTensors, of which each process writes its part, and tensors that are the same everywhere.
        meta: tensors and plain values.
        name: a name that tells these shards from those that lie there (the step); the same on every process.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        if path.is_file():
            path.unlink()
        path.mkdir(parents=True, exist_ok=True)
        taken = {folder.name for folder in path.iterdir()}
        name = next(full for i in range(len(taken) + 1) if (full := f"{name}-{i}") not in taken)
    if dist.is_initialized():
        names = [name]
        dist.broadcast_object_list(names, src=0)
        (name,) = names
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(path / name), no_dist=not dist.is_initialized())
    rank = dist.get_rank() if dist.is_initialized() else 0
    digests = {file.name: file_digest(file) for file in (path / name).glob(f"__{rank}_*")}
    if dist.is_initialized():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, digests)
        digests = {file: digest for found in everyone for file, digest in found.items()}
    if first:
        digests[".metadata"] = file_digest(path / name / ".metadata")
        write_sealed({**meta, SHARDS: name, DIGESTS: digests}, path / META)
        for old in path.iterdir():
            if old.is_dir() and old.name != name:
                shutil.rmtree(old)
    if dist.is_initialized():
        dist.barrier()


def read_meta(path: str | Path) -> dict[str, Any]:
    """Everything in a sharded checkpoint but its tensors.

    Raises:
        UserError: it is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        meta = torch.load(Path(path) / META, map_location="cpu", weights_only=True)
        assert isinstance(meta, dict) and isinstance(meta[DIGESTS], dict) and Path(meta[SHARDS]).name == meta[SHARDS]
    except pickle.UnpicklingError:
        raise UserError(f"ckpt_path: {path}/{META} holds more than tensors and plain values; not loaded") from None
    except Exception:  # a damaged archive fails in many ways
        raise UserError(f"ckpt_path: {path} is damaged or no sharded checkpoint; use another one") from None
    return meta


def shard_damage(path: str | Path) -> str | None:
    """Which shard is missing or differs from its checksum, or None."""
    try:
        meta = read_meta(path)
    except UserError as error:
        return str(error).removeprefix("ckpt_path: ")
    for name, digest in sorted(meta[DIGESTS].items()):
        file = Path(path) / meta[SHARDS] / Path(name).name
        if not file.is_file():
            return f"{meta[SHARDS]}/{name} is not there"
        if file_digest(file) != digest:
            return f"the checksum of {meta[SHARDS]}/{name} differs"
    return None


def stored_tensors(path: str | Path) -> dict[str, Tensor]:
    """Name, shape and type of every tensor, as empty ones on the meta device.

    Raises:
        UserError: the index is damaged, or holds more than that.
    """
    entries = _opened(path).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)  # the reader has refused any other
    }


def _opened(path: str | Path) -> _Reader:
    folder = Path(path) / read_meta(path)[SHARDS]
    reader = _Reader(folder)
    try:
        reader.read_metadata()
    except _NotATensor as error:
        raise UserError(f"ckpt_path: {folder} holds more than tensors ({error}); not loaded") from None
    except Exception:
        raise UserError(f"ckpt_path: {folder} is damaged; use another checkpoint of the same run") from None
    return reader


def load_sharded(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill these tensors in place from a checkpoint of any number of processes; DTensors get their part.

    Raises:
        UserError: a shard is missing or damaged.
    """
    _fill(path, tensors, alone=not dist.is_initialized())


def _fill(path: str | Path, tensors: Mapping[str, Tensor], alone: bool) -> None:
    reader = _opened(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
            dcp.load(dict(tensors), storage_reader=reader, no_dist=alone)
    except (Exception, CheckpointException) as error:  # torch derives its own from BaseException
        log.debug("%s", error)
        raise UserError(f"ckpt_path: {path}: a shard is missing or damaged; use another checkpoint") from None


def consolidated(path: str | Path) -> dict[str, Any]:
    """A sharded checkpoint as the content of a single file, with the whole tensors in memory; needs one process.

    Raises:
        UserError: it is damaged, or holds more than tensors and plain values.
    """
    content = read_meta(path)
    tensors = {name: torch.empty_like(meta, device="cpu") for name, meta in stored_tensors(path).items()}
    _fill(path, tensors, alone=True)
    del content[SHARDS], content[DIGESTS]
    content["state_dict"] = {
        k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")
    }
    for number, optimizer in enumerate(content.get("optimizer_states", [])):
        names = [name for group in optimizer["param_groups"] for name in group["params"]]
        prefix = f"optimizer.{number}."
        state: dict[int, dict[str, Tensor]] = {}
        for i, name in enumerate(names):
            start = f"{prefix}{name}/"
            if mine := {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}:
                state[i] = mine
        optimizer["state"] = state
        first = 0
        for group in optimizer["param_groups"]:
            group["params"] = list(range(first, first + len(group["params"])))
            first += len(group["params"])
    return content


# --- what a strategy puts in and takes out


def named_optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """An optimizer's state by parameters' names: `state`, of parameters that have one, and `param_groups`."""
    state = {names[p]: dict(values) for p, values in optimizer.state.items()}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return {"state": state, "param_groups": groups}


def optimizer_tensors(number: int, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a named optimizer state, by one flat name each."""
    return {f"optimizer.{number}.{name}/{key}": v for name, values in state.items() for key, v in values.items()}


def empty_optimizer_state(
    number: int, parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """For each parameter that has a state in the checkpoint, tensors to load it into: sharded like the parameter."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        start = f"optimizer.{number}.{name}/"
        for full, meta in stored.items():
            if full.startswith(start):
                like = meta.shape == parameter.shape
                empty = torch.zeros_like(parameter, dtype=meta.dtype) if like else torch.zeros(meta.shape)
                state.setdefault(name, {})[full.removeprefix(start)] = empty.detach()
    return state


@torch.no_grad()
def distribute_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, known to every process, sharded like another one."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    part = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return part
