"""What a run leaves behind: summary, pictures, closing card."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from frugal.callbacks.cost import CostMeter
from frugal.callbacks.routing import RoutingMonitor
from frugal.callbacks.samples import TextSamples
from frugal.data.curation.report import TABLE, table
from frugal.data.curation.stage import REPORT_FILES
from frugal.provenance import commit, source, versions
from frugal.tracking.card import print_card
from frugal.tracking.plots import draw_run
from frugal.tracking.run_folder import RunFolder, write_json
from frugal.training.loggers import SafeWandbLogger
from frugal.training.optim import use_averages
from frugal.training.stopping import Stopped

log = logging.getLogger(__name__)


class RunReport(pl.Callback):
    """At the end of a fit: validate, write `summary.json`, draw the plots, close W&B and print the card."""

    def __init__(self) -> None:
        self._trained = False
        self._test: dict[str, float] = {}
        self._code: dict[str, str] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Note which code runs: its files may have changed by the end."""
        self._code = {"code": commit(), "source": source()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Say where a resumed run stands."""
        self._trained = trainer.global_step < trainer.max_steps
        if trainer.global_step and trainer.is_global_zero:
            log.info("continuing %s at step %d of %d", *self._standing(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop after the last step: a stopping Trainer validates first, so the final weights are always scored."""
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Score the final weights once on images or text that neither trained nor validated, where there are some."""
        if getattr(trainer.datamodule, "has_test_split", False) and not trainer.fast_dev_run:
            use_averages(trainer.optimizers, True)
            (meter,) = (c for c in trainer.callbacks if isinstance(c, CostMeter))  # type: ignore[attr-defined]
            with meter.during("other"):  # it may close the training phase after this hook
                self._test = _test_scores(trainer, pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(
                    {f"test/{name}": value for name, value in self._test.items()}, trainer.global_step - 1
                )

    @staticmethod
    def _standing(trainer: pl.Trainer) -> tuple[str, int, int]:
        return _shown(Path(trainer.default_root_dir)), trainer.global_step, trainer.max_steps

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Gather what the other callbacks measured."""
        if trainer.fast_dev_run:
            return
        folder = RunFolder(Path(trainer.default_root_dir))
        if not self._trained:
            log.info("nothing left to do: %s stands at step %d of %d", *self._standing(trainer))
        callbacks = {type(callback): callback for callback in trainer.callbacks}  # type: ignore[attr-defined]
        summary = callbacks[CostMeter].summary(trainer, pl_module)
        summary |= {f"test_{name}": value for name, value in self._test.items() if "/" not in name}
        summary["router"] = callbacks[RoutingMonitor].last or None
        summary["sample"] = callbacks[TextSamples].last
        summary["data_seconds_by_stage"] = getattr(trainer.datamodule, "seconds_by_stage", None)
        summary |= {**self._code, "versions": versions()}
        write_json(folder.summary, summary, indent=2)
        pictures = draw_run(folder, pl_module.unit)
        curation = _copy_curation(trainer, folder)
        if curation:
            pictures = pictures | {"data/curation": folder.path / "curation.png"}
        paths = {"run folder": _shown(folder.path)}
        if pictures:
            paths["plots"] = ", ".join(_shown(path) for path in pictures.values())
        for logger in trainer.loggers:
            if isinstance(logger, SafeWandbLogger):
                logger.log_pictures(pictures)
                if curation:
                    logger.log_rows("data/curation_filters", TABLE, table(curation))
                prepared = getattr(trainer.datamodule, "prepared", None)
                logger.log_artifacts(getattr(prepared, "meta", None))
                url = logger.url
                logger.finish(summary)
                if url:
                    paths["W&B"] = url
                elif list(folder.path.glob("wandb/offline-run-*")):
                    pattern = _shown(folder.path / "wandb") + "/offline-run-*"  # a resumed run has several
                    paths["W&B"] = f"offline; send it with: {_program('wandb')} sync {pattern}"
        if pl_module.go_on:
            program, _, rest = pl_module.go_on.format(run=_shown(folder.path)).partition(" ")
            paths["go on with"] = f"{_program(program)} {rest}"
        print_card(f"{folder.path.parent.name} {folder.id}", summary, paths)

    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """After Ctrl-C or a signal, say how to go on."""
        if isinstance(exception, Stopped):
            log.warning(
                "%s: stopped at step %d of %d and saved; --ckpt_path last goes on",
                *(exception.signal, trainer.global_step, trainer.max_steps),
            )
            for logger in trainer.loggers:
                if isinstance(logger, SafeWandbLogger):
                    logger.pause()
        elif isinstance(exception, KeyboardInterrupt):
            saved = max((c._last_global_step_saved for c in trainer.checkpoint_callbacks), default=0)
            log.warning(
                "interrupted at step %d; %s",
                trainer.global_step,
                f"--ckpt_path last goes on from step {saved}" if saved else "nothing was saved yet",
            )


@torch.inference_mode()
def _test_scores(trainer: pl.Trainer, pl_module: Any) -> dict[str, float]:
    pl_module.eval()
    with trainer.precision_plugin.forward_context():
        for number, batch in enumerate(trainer.datamodule.test_dataloader()):
            pl_module.test_step(trainer.strategy.batch_to_device(batch), number)
    found = {name: float(value) for name, value in pl_module.scores.compute().items()}
    pl_module.scores.reset()
    pl_module.train()
    return found


def _copy_curation(trainer: pl.Trainer, folder: RunFolder) -> dict[str, Any] | None:
    """Put the report of the corpus' curation, if it had one, into the run's folder."""
    prepared = getattr(trainer.datamodule, "prepared", None)
    if prepared is None or not (prepared.folder / "curation.json").is_file():
        return None
    for name in REPORT_FILES:
        shutil.copyfile(prepared.folder / name, folder.path / name)
    return json.loads((folder.path / "curation.json").read_text(encoding="utf-8"))


def _program(name: str) -> str:
    """The program as it can be called from here: by name, or by path when its environment is not active."""
    return name if shutil.which(name) else _shown(Path(sys.executable).parent / name)


def _shown(path: Path) -> str:
    """The path as a user would type it from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
