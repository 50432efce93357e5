"""A signal ends a run after its step, saved, with code 75; the run then goes on as if nothing had been."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run as start

import frugal.callbacks.routing as routing
from frugal.tracking.run_folder import read_lines
from frugal.training.language_model import LanguageModel

Train = Callable[..., Path]


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def weights_agree(one: Path, other: Path) -> bool:
    ours, theirs = last(one)["state_dict"], last(other)["state_dict"]
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def losses(folder: Path) -> list[tuple[int, str, float]]:
    rows = read_lines(folder / "metrics.jsonl")
    return [(row["step"], key, row[key]) for row in rows for key in ("train/loss", "val/loss") if key in row]


@pytest.mark.parametrize(
    ("number", "moment", "stands_at", "extra"),
    [
        (signal.SIGTERM, "step 5", 5, ()),
        (signal.SIGUSR1, "step 7", 7, ("--trainer.val_check_interval", "100")),
        (signal.SIGUSR2, "validation", 8, ()),  # which is finished first
        (signal.SIGTERM, "step 8", 8, ()),  # as is one that is due
        (signal.SIGTERM, "micro-batch 9", 5, ("--trainer.accumulate_grad_batches", "2")),
    ],
    ids=str,
)
def test_a_signalled_run_saves_stops_and_goes_on(
    train: Train, monkeypatch: pytest.MonkeyPatch, number: int, moment: str, stands_at: int, extra: tuple[str, ...]
) -> None:
    whole = train("fit", "--run.name", "whole", *extra)
    step_end, val_end = routing.RoutingMonitor.on_train_batch_end, LanguageModel.on_validation_epoch_end

    def on_step_end(self: Any, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        step_end(self, trainer, module, outputs, batch, index)
        if moment in (f"step {trainer.global_step}", f"micro-batch {index + 1}"):
            os.kill(os.getpid(), number)

    def on_val_end(self: Any) -> None:
        if moment == "validation" and self.trainer.global_step == 8:
            os.kill(os.getpid(), number)
        val_end(self)

    earlier = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(routing.RoutingMonitor, "on_train_batch_end", on_step_end)
        patch.setattr(LanguageModel, "on_validation_epoch_end", on_val_end)
        train("fit", "--run.name", "cut", *extra)
    assert stopped.value.code == 75
    assert signal.getsignal(number) == earlier
    (folder,) = Path("runs/cut").iterdir()
    assert last(folder)["global_step"] == stands_at
    cut = train("fit", "--run.name", "cut", "--ckpt_path", "last", *extra)
    assert cut == folder and weights_agree(whole, cut) and losses(whole) == losses(cut)
    costs = [json.loads((run / "summary.json").read_text()) for run in (whole, cut)]
    assert costs[0]["tokens_seen"] == costs[1]["tokens_seen"] and costs[0]["flops"] == costs[1]["flops"]


def test_a_dead_loader_worker_ends_the_run_in_one_line(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    step_end = routing.RoutingMonitor.on_train_batch_end

    def kill_a_worker(self: Any, trainer: Any, *args: Any) -> None:
        step_end(self, trainer, *args)
        if trainer.global_step == 5:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    options = ("--data.num_workers", "2", "--trainer.max_steps", "2000", "--trainer.val_check_interval", "1000")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(routing.RoutingMonitor, "on_train_batch_end", kill_a_worker)
        train("fit", *options)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    # torch's own words, or ours where the worker's death broke its queue first
    words = r"error: data: (DataLoader worker \(pid.*\)|a worker of the DataLoader has ended) .*--ckpt_path last$"
    assert ended.value.code == 1 and re.match(words, line), line
    (folder,) = Path("runs/base").iterdir()
    assert last(folder)["global_step"] >= 3
    assert last(train("fit", "--ckpt_path", "last"))["global_step"] == 12


@pytest.mark.slow
def test_the_signal_of_one_rank_stops_all(project: Path) -> None:
    """SIGTERM to the second of two processes: both save the same step and end, and the first says 75."""
    code = (
        "import os, signal, sys\n"
        "import frugal.callbacks.routing as routing\n"
        "step_end = routing.RoutingMonitor.on_train_batch_end\n"
        "def on_step_end(self, trainer, *args):\n"
        "    step_end(self, trainer, *args)\n"
        "    if trainer.global_rank == 1 and trainer.global_step == 5 and 'KILL' in os.environ:\n"
        "        os.kill(os.getpid(), int(os.environ['KILL']))\n"
        "    if trainer.global_step == 5 and 'POISON' in os.environ:\n"
        "        args[0].model.norm.weight.data[0] = float('nan')\n"
        "routing.RoutingMonitor.on_train_batch_end = on_step_end\n"
        "from frugal.cli.train import main\n"
        "main()\n"
    )
    (project / "patched.py").write_text(code)
    two = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = [sys.executable, "patched.py", "fit", "--config", "tiny.yaml", *two, "--ckpt_path", "last"]

    def run(name: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, "--run.name", name], capture_output=True, text=True, env=os.environ | more)

    stopped = run("cut", KILL=str(int(signal.SIGTERM)))
    assert stopped.returncode == 75, stopped.stderr
    assert "SIGTERM: stopped at step 5 of 12 and saved" in stopped.stderr and "Traceback" not in stopped.stderr
    (folder,) = Path("runs/cut").iterdir()
    assert last(folder)["global_step"] == 5
    options = ["fit", "--config", "tiny.yaml", "--trainer.strategy", "ddp"]
    going_on = [*options, "--run.name", "cut", "--ckpt_path", "last"]
    start(2, [{"folder": str(folder), "args": going_on}, {"folder": "runs/whole/it", "args": options}], project)
    assert weights_agree(Path("runs/whole/it"), folder) and losses(Path("runs/whole/it")) == losses(folder)
    # A rank that dies without a word: the others end too, and say so in one line.
    dead = run("dead", KILL=str(int(signal.SIGKILL)))
    assert dead.returncode == 1 and "Traceback" not in dead.stderr
    (line,) = [line for line in dead.stderr.splitlines() if line.startswith("error: ")]
    assert "another process of this run has ended" in line
    # Both find the same fault, and one says so.
    nan = run("nan", POISON="1")
    assert nan.returncode == 2 and "Traceback" not in nan.stderr
    (line,) = [line for line in nan.stderr.splitlines() if line.startswith("error: ")]
    assert "loss or gradient is not finite at step 5" in line
