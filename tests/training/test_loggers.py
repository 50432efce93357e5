"""W&B may be absent, unreachable or broken: the run goes on, and what was logged can be read back."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from frugal.tracking.run_folder import RunConfig, RunFolder, read_lines
from frugal.training.loggers import MetricsFile, SafeWandbLogger, wandb_mode


def test_mode_follows_config_then_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(RunConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode(RunConfig()) == "online"
    assert wandb_mode(RunConfig(wandb="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(RunConfig()) == "offline"
    assert wandb_mode(RunConfig(wandb="online")) == "online"


def test_metrics_file_has_one_object_per_call(tmp_path: Path) -> None:
    logger = MetricsFile(RunFolder(tmp_path / "run"))
    logger.log_metrics({"a": 1, "epoch": 0}, step=3)
    logger.log_metrics({"b": 2.5}, step=4)
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows] == [
        {"step": 3, "a": 1.0},
        {"step": 4, "b": 2.5},
    ]


def test_a_failure_inside_wandb_is_said_once_and_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = SafeWandbLogger(RunConfig(wandb="offline"), RunFolder(tmp_path / "run"))

    class Broken:
        def __getattr__(self, name: str) -> None:
            raise RuntimeError("the service is gone")

    monkeypatch.setattr(type(logger), "experiment", property(lambda self: Broken()))
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step)
    logger.finish({})
    assert caplog.text.count("W&B logging stopped (the service is gone)") == 1


@pytest.mark.slow
def test_an_offline_run_can_be_read_back(train: Callable[..., Path], tmp_path: Path) -> None:
    folder = train("fit", "--run.wandb", "auto", "--trainer.max_steps", "6")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("train/loss", "val/bits_per_byte", "router/max_violation", "samples", "d_model", "dollars"):
        assert name in text, name
    summary = json.loads((folder / "summary.json").read_text())
    assert str(summary["tokens_seen"]) in text
