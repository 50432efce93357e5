"""Freezing through train.py: an interrupted run goes on exactly; two processes do what one does; faults in one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from frugal.tracking.run_folder import read_lines

Train = Callable[..., Path]
WINDOWS = '[{"layers": [0], "embedding": true, "start": 2, "stop": 9}]'
IMPORTANCE = '{{"measure": "{}", "unit": "{}", "share": 0.5, "measure_steps": 4, "freeze_steps": 3, "start": {}}}'
KINDS = {
    "a window that is open": ("--freezing.windows", WINDOWS),
    "a growing prefix": ("--freezing.prefix", '{"layers": 1, "start": 7}'),
    "frozen experts": ("--freezing.importance", IMPORTANCE.format("gradient_norm", "expert", 0)),
    "a measurement under way": ("--freezing.importance", IMPORTANCE.format("update_ratio", "block", 4)),
    "chosen experts": ("--freezing.experts", '{"threshold": 0.4, "batches": 2, "train": ["norm"]}'),
}


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_exactly(resumes_exactly: Callable[..., tuple[Path, Path]], kind: str) -> None:
    whole, cut = resumes_exactly(*KINDS[kind], "--model.optimizer.weight_decay", "0.5")
    assert read_lines(whole / "freezing.jsonl") == read_lines(cut / "freezing.jsonl")


def test_a_frozen_run_is_billed_for_what_it_computes(train: Train) -> None:
    adamw = ("fit", "--config", "configs/optim/adamw.yaml")  # Muon's own FLOPs fall too, by another share
    full, frozen = train(*adamw, "--run.name", "full"), train(*adamw, "--run.name", "w", "--freezing.windows", WINDOWS)
    (flops, fewer) = (json.loads((run / "summary.json").read_text())["flops"] for run in (full, frozen))
    saved = {row["step"]: row["saved_flops"] for row in read_lines(frozen / "freezing.jsonl")}
    assert fewer == pytest.approx(flops * (1 - saved[2] * 7 / 12), rel=1e-4) and saved[9] == 0 and saved[2] > 0.1
    logged = [
        row["freezing/saved_flops"] for row in read_lines(frozen / "metrics.jsonl") if "freezing/saved_flops" in row
    ]
    assert logged == pytest.approx([0, *[saved[2]] * 3, 0, 0], abs=1e-5)


def test_a_run_without_freezing_leaves_no_trace_of_it(train: Train) -> None:
    folder = train("fit", "--trainer.max_steps", "2")
    assert not (folder / "freezing.jsonl").exists()
    assert not any("freezing" in key for row in read_lines(folder / "metrics.jsonl") for key in row)


def test_switching_the_choice_of_experts_off_gives_the_stacks_their_state_back(train: Train) -> None:
    train("fit", "--trainer.max_steps", "6", *KINDS["chosen experts"])
    folder = train("fit", "--trainer.max_steps", "9", "--ckpt_path", "last")
    state = last(folder)
    names = [name for name in state["state_dict"] if name.endswith("experts.w13")]
    kept = state["optimizer_states"][0]["state"].values()
    shapes = {moments["momentum_buffer"].shape for moments in kept if "momentum_buffer" in moments}
    assert state["global_step"] == 9 and all(state["state_dict"][name].shape in shapes for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--freezing.windows", '[{"layers": [5]}]'], "freezing.windows.layers: there is no layer 5; the model has 2"),
        (["--freezing.windows", '[{"start": 5}]'], "freezing.windows: a window freezes nothing"),
        (["--freezing.windows", '[{"parameters": ["attn"]}]'], "'attn' matches no parameter"),
        (["--freezing.windows", '[{"layer": [0]}]'], "freezing.windows"),
        (["--freezing.prefix.layers", "0"], "freezing.prefix.layers: must be positive"),
        (["--freezing.experts.threshold", "2"], "freezing.experts.threshold: must lie in (0, 1]"),
    ],
)
def test_faults_are_one_line(train: Train, capsys: pytest.CaptureFixture, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        train("fit", *options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("error: ")


@pytest.mark.slow
def test_two_processes_do_what_one_does(project: Path) -> None:
    train_py = str(Path(__file__).parents[2] / "train.py")
    two = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    folders = []
    for name, args in (("one", ["--data.batch_size", "8"]), ("two", two)):
        command = [sys.executable, train_py, "fit", "--config", "tiny.yaml", "--run.name", name, *args]
        done = subprocess.run(
            [*command, *KINDS["a window that is open"], *KINDS["frozen experts"]],
            capture_output=True,
            cwd=project,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        folders.append(next(Path("runs", name).iterdir()))
    one, other = (last(folder)["state_dict"] for folder in folders)
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=2e-6, rtol=1e-5, msg=key)
    decisions = [[row.get("trained_experts") for row in read_lines(folder / "freezing.jsonl")] for folder in folders]
    assert decisions[0] == decisions[1]
