"""What every data module shares: the samples seen are an index, and the index follows from the step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from frugal.data.batches import StepSampler, TimedLoader, data_ranks
from frugal.data.curriculum import BatchStage, batch_size_at, check_batches
from frugal.data.transforms.base import SampleClock
from frugal.errors import UserError

PREFETCH = 2  # batches that each worker reads ahead


def _as_is(batch: Any) -> Any:
    """The datasets return whole batches."""
    return batch


class SteppedData(pl.LightningDataModule):
    """Loaders that start at the trainer's step, and what of it lies in a checkpoint.

    Args:
        batch_size: samples per micro-batch and device.
        eval_batch_size: samples per evaluation batch and device; null means batch_size.
        num_workers: processes that read ahead; the batches do not depend on it.
        seed: decides the order.
        batch_ramp: stages of batch sizes in the place of batch_size; null: that size throughout.
    """

    gives = ""  # what the samples are

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int,
        batch_ramp: list[BatchStage] | None = None,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", 1 if eval_batch_size is None else eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise UserError(f"data.{key}: must be at least {least}, got {value}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed
        self.batch_ramp = batch_ramp or []
        check_batches(self.batch_ramp)
        self._clock = SampleClock()  # from where this process began
        self._loaded: dict[str, Any] = {}
        self.train_loader: TimedLoader  # after train_dataloader

    def _begin(self) -> StepSampler:
        """From the step that the trainer stands at to its last one."""
        assert self.trainer is not None
        if self.trainer.max_steps <= 0:
            raise UserError("trainer.max_steps: must be positive; the run's length is counted in steps")
        accumulate = self.trainer.accumulate_grad_batches
        if self._loaded and self._loaded["accumulate_grad_batches"] != accumulate:
            raise UserError(
                f"trainer.accumulate_grad_batches: the checkpoint's steps have "
                f"{self._loaded['accumulate_grad_batches']} micro-batches; resume with that number"
            )
        rank, ranks = data_ranks(self.trainer)
        step, micro_batches = self.trainer.global_step, accumulate * ranks
        sizes = [(stage.start, micro_batches * stage.batch_size) for stage in self.batch_ramp]
        whole = SampleClock(0, 0, sizes[0][1] if sizes else micro_batches * self.batch_size, tuple(sizes[1:]))
        self._clock = SampleClock(
            step,
            self._loaded.get("samples_seen", whole.sample(step)),
            micro_batches * batch_size_at(self.batch_ramp, self.batch_size, step),
            tuple(change for change in sizes if change[0] > step),
        )
        return StepSampler(
            start=step * accumulate,
            stop=self.trainer.max_steps * accumulate,
            batch_size=self.batch_size,
            rank=rank,
            world_size=ranks,
            first_sample=self._clock.first_sample,
            ramp=self.batch_ramp,
            accumulate=accumulate,
        )

    def _loader(self, dataset: Any, sampler: Any) -> TimedLoader:
        return TimedLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            prefetch_factor=PREFETCH if self.num_workers > 0 else None,
            pin_memory=torch.cuda.is_available(),
        )

    @property
    def waited_seconds(self) -> float:
        """How long training has waited for batches in this process."""
        return self.train_loader.waited

    def _position(self) -> dict[str, Any]:
        """Where in the data the run stands."""
        assert self.trainer is not None
        return {
            "samples_seen": self._clock.sample(self.trainer.global_step),
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "seed": self.seed,
        }

    def _go_on(self, state: dict[str, Any]) -> None:
        """Start there next time."""
        if state["seed"] != self.seed:
            raise UserError(f"seed_everything: the run's order of data belongs to seed {state['seed']}; keep it")
        self._loaded = {key: state[key] for key in ("samples_seen", "accumulate_grad_batches")}
