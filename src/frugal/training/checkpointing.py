"""Writing and reading checkpoints: `last.ckpt` to go on from, `best.ckpt` to use."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from frugal.errors import UserError
from frugal.tracking.run_folder import RunFolder
from frugal.training.checksums import damage, is_sealed, write_sealed
from frugal.training.optim import use_averages
from frugal.training.sharded import consolidated, is_sharded
from frugal.training.stopping import StopFlag, Stopped


def checkpoint_file(checkpoint: str) -> Path:
    """The file itself; of a run's folder its best.ckpt, or last.ckpt without validation.

    Raises:
        UserError: a folder without either.
    """
    path = Path(checkpoint)
    if not path.is_dir() or is_sharded(path):
        return path
    for name in ("best", "last"):
        if (file := path / "checkpoints" / f"{name}.ckpt").is_file() or is_sharded(file):
            return file
    raise UserError(f"{path}: no checkpoints/best.ckpt or last.ckpt in this folder")


log = logging.getLogger(__name__)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", key: str = "ckpt_path") -> dict[str, Any]:
    """Load a checkpoint of tensors and plain types; anything else is refused, never executed.

    A folder of shards is put together in memory.

    Args:
        path: the file or folder.
        map_location: where its tensors go.
        key: what a refusal names.

    Raises:
        UserError: the file is missing, truncated, no checkpoint, or holds more than tensors and plain types.
    """
    if is_sharded(path):
        if (wrong := damage(Path(path))) is not None:
            raise UserError(f"{key}: {path} is damaged ({wrong}); use another one of the same run")
        return consolidated(path)
    if not Path(path).is_file():
        raise UserError(f"{key}: no file {path}")
    if is_sealed(Path(path)) and (wrong := damage(Path(path))):
        raise UserError(f"ckpt_path: {path} is damaged ({wrong}); use another one of the same run")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:  # torch's own advice here is to trust the file; ours is not to
        raise UserError(
            f"{key}: {path} is no checkpoint, or holds more than tensors and plain values; not loaded"
        ) from None
    except Exception:  # a damaged archive fails in many ways
        raise UserError(f"{key}: {path} is damaged or no checkpoint; use another one of the same run") from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"{key}: {path} is no checkpoint of train.py (it has no `state_dict`)")
    return content


def good_checkpoint(folder: RunFolder) -> Path:
    """The newest undamaged state of a run: `last.ckpt`, or what was kept of before, or `best.ckpt`.

    Raises:
        UserError: there is none.
    """
    kept = sorted(folder.checkpoints.glob("last.*.ckpt"), key=lambda path: int(path.suffixes[0][1:]))
    wrongs = []
    for path in [folder.checkpoints / "last.ckpt", *kept, folder.checkpoints / "best.ckpt"]:
        if path.exists() and (wrong := damage(path)):
            wrongs.append(f"{path} is damaged ({wrong})")
        elif path.exists():
            if wrongs:
                log.warning("%s; going on from %s", "; ".join(wrongs), path.name)
            return path
    raise UserError(f"ckpt_path: {'; '.join(wrongs)}; no other checkpoint of the run is left")


@contextmanager
def keep_copies(path: Path, keep: int) -> Iterator[None]:
    """While `last.ckpt` is written anew inside: what was there becomes `last.1.ckpt`, that one `last.2.ckpt`, ...

    If the new state cannot be written, or is refused, all stay what they are. Links, not copies: it costs no time, and
    `last.ckpt` is there at every moment.

    Args:
        path: the checkpoint, a file or a folder of shards.
        keep: how many states are to be there in the end.
    """
    places = [path.with_name(f".{path.name}.before"), *(path.with_suffix(f".{i}.ckpt") for i in range(1, keep))]
    _remove(places[0])  # of a process that was killed
    if keep > 1 and path.is_dir():
        shutil.copytree(path, places[0], copy_function=_link)
    elif keep > 1 and path.exists():
        _link(path, places[0])
    try:
        yield
    except BaseException:
        _remove(places[0])
        raise
    if places[0].exists():
        _remove(places[-1])
        for older, newer in reversed(list(itertools.pairwise(places))):
            if older.exists():
                older.replace(newer)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _link(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoints of tensors and plain types, written whole and with a checksum; faults are one line."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save on behalf of the Trainer."""
        write_sealed(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load on behalf of the Trainer."""
        return read_checkpoint(path, map_location)


class _UsableCheckpoint(ModelCheckpoint):
    """Saves the weights to use, where the optimizer trains others, and finds its files when the folder has moved."""

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        use_averages(trainer.optimizers, True)
        super()._save_checkpoint(trainer, filepath)
        use_averages(trainer.optimizers, trainer.validating)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state over although the run's folder may have been moved."""
        super().load_state_dict(_in_this_folder(state_dict, self.dirpath))


class LastCheckpoint(_UsableCheckpoint):
    """Keep `last.ckpt`, the state to go on from: every n steps, after each validation, on a signal and at the end.

    Args:
        every_n_steps: optimizer steps between two checkpoints; what a crash can cost at most.
        keep: how many states to keep, `last.ckpt`, `last.1.ckpt`, ...: should the newest be damaged, a run goes on from
            the one before.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 2) -> None:
        if keep < 1:
            raise UserError(f"checkpoint.keep: must be at least 1, got {keep}")
        if every_n_steps <= 0:
            raise UserError(f"checkpoint.every_n_steps: must be positive, got {every_n_steps}")
        super().__init__(
            filename="last",
            save_top_k=1,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._keep, self._fell_back = keep, False
        self._stop = StopFlag()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to signals."""
        super().on_train_start(trainer, pl_module)
        start = Path(trainer.ckpt_path or "")
        self._fell_back = start.parent == Path(self.dirpath or "") and start.name != "last.ckpt"
        self._stop.watch(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every n steps; where a validation is due, after it, so that a crash inside it does not skip it."""
        if not pl_module.step_complete or _validation_is_due(trainer):
            return
        told = self._stop.raised()
        if told or trainer.global_step % self._every_n_train_steps == 0:
            # Lightning logs a step after this hook: the row must be on the disk before the checkpoint that makes a
            # resumed run skip it. (Our loggers ignore the second call with the same row.)
            trainer._logger_connector.update_train_step_metrics()
            self._save(trainer)
        if told:
            raise Stopped(trainer, told)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what the validation logged, too."""
        self._save(trainer)
        if trainer.state.fn == "fit" and trainer.global_step < trainer.max_steps and (told := self._stop.raised()):
            raise Stopped(trainer, told)

    def _save(self, trainer: pl.Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            # A damaged last.ckpt is not kept: it would push out the good one before it.
            keeps = trainer.is_global_zero and self.dirpath is not None and not self._fell_back
            with keep_copies(Path(self.dirpath or "") / "last.ckpt", self._keep) if keeps else nullcontext():
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._fell_back = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._stop.unwatch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final state, unless it lies on the disk already."""
        self._save(trainer)


def _validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether the Trainer validates right after the batch that just ended (for intervals counted in batches)."""
    every = trainer.val_check_batch
    done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    at_interval = isinstance(every, int) and every > 0 and done % every == 0
    return trainer.enable_validation and (at_interval or trainer.should_stop)


def _in_this_folder(state: dict[str, Any], dirpath: Any) -> dict[str, Any]:
    """A ModelCheckpoint's state with its paths moved to `dirpath`, if they belong to the same run.

    Lightning forgets the best score when the folder's path is spelt differently (relative, absolute, moved), and would
    then overwrite best.ckpt with a worse one. A new run that branches off has another id and starts afresh.
    """
    if dirpath is None or Path(state["dirpath"]).parent.name != Path(dirpath).parent.name:
        return state

    def moved(path: str) -> str:
        return str(Path(dirpath) / Path(path).name) if path else path

    state = {**state, "dirpath": str(dirpath)}
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = moved(state.get(key, ""))
    state["best_k_models"] = {moved(path): score for path, score in state.get("best_k_models", {}).items()}
    return state


class BestCheckpoint(_UsableCheckpoint):
    """Keep `best.ckpt`, the state of the lowest validation loss."""

    def __init__(self) -> None:
        super().__init__(
            monitor="val/loss",
            mode="min",
            filename="best",
            save_top_k=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
