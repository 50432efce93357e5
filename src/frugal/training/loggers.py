"""Where metrics go: a JSON-lines file in the run's folder, and Weights & Biases, which may never stop a run."""

from __future__ import annotations

import json
import logging
import os
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from frugal.tracking.run_folder import RunConfig, RunFolder
from frugal.tracking.savings import Finding
from frugal.tracking.savings_report import TABLE, table_rows
from frugal.training.stopping import STOPPED

log = logging.getLogger(__name__)
INIT_TIMEOUT = FINISH_TIMEOUT = 20  # seconds that a run waits for the W&B server, at its start and at its end


class MetricsFile(Logger):
    """Append metrics to `metrics.jsonl`, one JSON object per call."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self.folder = folder
        self._last: Any = None  # step and names of the newest row, which may come twice

    @property
    def name(self) -> str:
        """Lightning's name for the logger's subfolder; there is none."""
        return ""

    @property
    def version(self) -> str:
        """The run's id."""
        return self.folder.id

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write one line."""
        if (step, metrics.keys()) == self._last:
            return
        self._last = (step, metrics.keys())
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {key: float(value) for key, value in metrics.items() if key != "epoch"}
        self.folder.path.mkdir(parents=True, exist_ok=True)
        with self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def wandb_mode(config: RunConfig) -> str:
    """`online`, `offline` or `disabled`; for `auto`, what WANDB_MODE says or whether an API key is known."""
    if config.wandb != "auto":
        return config.wandb
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return "online" if netrc.is_file() and "wandb" in netrc.read_text(errors="ignore") else "offline"


def log_study(config: RunConfig, findings: Sequence[Finding], paths: Mapping[str, Path]) -> None:
    """Log a study's findings as a run of its own: the table of ratios and the figure."""
    logger = SafeWandbLogger(config, RunFolder(Path(config.root) / f"{config.name}-report"))
    logger.log_rows("study/ratios", TABLE, table_rows(findings))
    logger.log_pictures({"study/figure": paths["figure"]} if "figure" in paths else {})
    logger.finish({})


class SafeWandbLogger(WandbLogger):
    """A WandbLogger that goes offline when the server cannot be reached and never raises while training.

    W&B's files lie in the run's folder; a resumed run continues under the same id.
    """

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        import wandb

        self._broken = False
        self._last: Any = None
        self._folder, self._upload_checkpoint = folder, config.upload_checkpoint
        super().__init__(
            name=f"{config.name}/{folder.id}",
            save_dir=str(folder.path.resolve()),  # a W&B service that runs already may stand in another folder
            id=folder.id,
            project=config.project,
            group=config.group,
            tags=list(config.tags),
            resume="allow",
            mode=wandb_mode(config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
                disable_git=False,
                x_disable_stats=True,
            ),
        )
        self._wandb_init.pop("anonymous", None)  # wandb no longer knows it and would warn

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run, made on first use; offline if the server does not answer."""
        import wandb

        make: Callable[[SafeWandbLogger], Any] = WandbLogger.experiment.fget  # type: ignore[attr-defined]
        # wandb looks for git from the run's folder upwards, so the folder must be there.
        self._folder.path.mkdir(parents=True, exist_ok=True)
        try:
            run = make(self)
            # Before each table and artifact W&B asks the server whether its type is known, and waits 20 s if that has
            # vanished. It is optional: without an answer it goes on as with one.
            with suppress(Exception):  # a name of wandb's own, which another version may lack
                run._assert_can_log_artifact = lambda artifact: None
            return run
        except Exception as error:
            if self._wandb_init.get("mode") != "online":
                self._broken = True
                log.warning("W&B does not start (%s); metrics.jsonl has everything", error)
                return DummyExperiment()
            log.warning("W&B cannot be reached (%s): logging offline; `wandb sync` sends the run later", error)
            self._wandb_init["mode"] = "offline"
            wandb.teardown()  # the failed attempt would go on holding the run's id
            return self.experiment

    def _never_raise(self, action: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            action()
        except Exception as error:
            self._broken = True
            log.warning("W&B logging stopped (%s); metrics.jsonl goes on", error)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log to W&B, or stop trying after the first failure; a row that comes twice is logged once."""
        if (step, metrics.keys()) == self._last:
            return
        self._last = (step, metrics.keys())
        self._never_raise(lambda: super(SafeWandbLogger, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Send the resolved config."""
        self._never_raise(lambda: super(SafeWandbLogger, self).log_hyperparams(params))

    @rank_zero_only
    def log_rows(self, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Log a table."""
        self._never_raise(lambda: self.log_table(key, columns=columns, data=rows))

    @rank_zero_only
    def log_pictures(self, pictures: dict[str, Path]) -> None:
        """Log image files."""
        import wandb

        self._never_raise(lambda: self.experiment.log({key: wandb.Image(str(path)) for key, path in pictures.items()}))

    @rank_zero_only
    def log_artifacts(self, data: dict[str, Any] | None) -> None:
        """Log what the run read and made: the data's fingerprint and, if wished, the best checkpoint.

        Args:
            data: the prepared corpus' `meta.json`; runs on the same corpus come to one version of it.
        """
        import wandb

        def send() -> None:
            if data:
                dataset = wandb.Artifact(f"data-{data['fingerprint'][:16]}", "dataset", metadata=data)
                with dataset.new_file("fingerprint.txt") as file:
                    file.write(data["fingerprint"] + "\n")
                self.experiment.log_artifact(dataset)  # `use_artifact` needs a server
            best = self._folder.checkpoints / "best.ckpt"
            if self._upload_checkpoint and best.is_file():
                model = wandb.Artifact(f"checkpoint-{self._folder.id}", "model")
                model.add_file(str(best))
                self.experiment.log_artifact(model, aliases=["best"])

        self._never_raise(send)

    @rank_zero_only
    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary and close the run; waits at most 20 s for the server."""

        def close() -> None:
            self.experiment.summary.update(summary)
            self.experiment.finish()

        self._never_raise(close)

    @rank_zero_only
    def pause(self) -> None:
        """Close the run as one that is to be continued."""

        def close() -> None:
            self.experiment.mark_preempting()
            self.experiment.finish(exit_code=STOPPED)

        self._never_raise(close)

    @property
    def url(self) -> str | None:
        """Address of the run, when it is online."""
        online = self._experiment is not None and self._wandb_init.get("mode") == "online" and not self._broken
        return getattr(self._experiment, "url", None) if online else None
