"""Stopping on a signal: the step is finished, all ranks save its state together, and the process ends with code 75."""

from __future__ import annotations

import signal
import threading
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment

STOPPED = 75  # EX_TEMPFAIL: saved and to be continued; launchers start the run again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # a kill, a timeout or preemption under Slurm


class Stopped(SystemExit):
    """The run was told to stop and has saved its state."""

    def __init__(self, trainer: pl.Trainer, name: str) -> None:
        environment = trainer.strategy.cluster_environment if trainer.world_size > 1 else None  # type: ignore[attr-defined]
        # Lightning kills the process that started the others as soon as one of them ends with another code than 0.
        child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        super().__init__(0 if child else STOPPED)
        self.signal = name


class StopFlag:
    """Whether this or any other rank has been told to stop.

    A handler only notes the signal. Ranks compare notes at the end of each optimizer step, so that all stop at the same
    one; over gloo, between CPUs, so that no device is waited for.
    """

    def __init__(self) -> None:
        self.received = 0
        self._earlier: dict[int, Any] = {}
        self._group: Any = None

    def watch(self, trainer: pl.Trainer) -> None:
        """Put our handlers in the place of Lightning's, which requeue, broadcast inside a handler, or save nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        connector = trainer._signal_connector
        if connector.received_sigterm:  # before we were listening
            self.received, connector.received_sigterm = signal.SIGTERM, False
        self._earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            # Lightning's own exchange before every micro-batch would wait for the device each time.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _note(self, number: int, _: Any) -> None:
        self.received = number

    def raised(self) -> str | None:
        """The signal's name if any rank has received one so far; every rank must ask at the same steps."""
        told = torch.tensor([self.received])
        if self._group is not None:
            dist.all_reduce(told, dist.ReduceOp.MAX, self._group)
        return signal.Signals(int(told)).name if int(told) else None

    def unwatch(self) -> None:
        """Give the signals back."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}
