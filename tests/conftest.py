"""Shared fixtures: a small text, and a run of `train.py` inside a scratch project."""

import fcntl
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Many tests compare to the bit: they run on the CPU, on a machine with a GPU too (benchmarks/gpu_check.py is for it).
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tests run side by side, one process per core: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


def make_text(lines: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    words = [
        "the",
        "lord",
        "said",
        "unto",
        "moses",
        "go",
        "speak",
        "to",
        "pharaoh",
        "and",
        "let",
        "my",
        "people",
        "serve",
        "in",
        "wilderness",
        "of",
        "sinai",
    ]
    return "".join(" ".join(rng.choice(words) for _ in range(12)) + "\n" for _ in range(lines))


TINY = """
run: {wandb: disabled}
data:
  source: {class_path: frugal.data.sources.LocalText, init_args: {path: text.txt}}
  tokenizer: {vocab_size: 300}
  seq_len: 16
  batch_size: 4
model:
  transformer:
    d_model: 16
    n_layers: 2
    d_ff: 32
    attention: {n_heads: 2, n_kv_heads: 1}
    moe: {n_experts: 4, top_k: 2, d_expert: 16, n_shared_experts: 1, first_k_dense: 1}
  schedule: {warmup_steps: 2}
trainer: {max_steps: 12, val_check_interval: 4, log_every_n_steps: 2}
checkpoint: {every_n_steps: 3}
samples: {max_new_tokens: 4}
cost: {peak_tflops: 0.1}
"""


def prepare_project(folder: Path) -> Path:
    """Put the shipped configs, `tiny.yaml` (an overlay of seconds) and `text.txt` into a folder."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "text.txt").write_text(make_text(400))
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, once for all processes that run tests side by side."""
    here = factory.getbasetemp()
    folder = (here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped configs, `tiny.yaml` (an overlay of seconds) and `text.txt`; the current directory."""
    prepare_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "LOCAL_RANK", "FRUGAL_RUN_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return tmp_path


@pytest.fixture
def train(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`train("fit", "--key", "value")`: run train.py's main on tiny.yaml; returns the newest run folder of its name."""
    from frugal.cli.train import main

    def run(subcommand: str, *args: str) -> Path:
        monkeypatch.setattr("sys.argv", ["train.py"])
        main([subcommand, "--config", "tiny.yaml", *args])
        name = args[args.index("--run.name") + 1] if "--run.name" in args else "base"
        return max(Path("runs", name).iterdir(), key=lambda path: path.stat().st_mtime_ns)

    return run


class Interrupted(BaseException):
    pass


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def history(folder: Path) -> list[dict]:
    """The logged rows without what depends on the clock."""
    from frugal.tracking.run_folder import read_lines

    timed = ("time", "data/wait_fraction", "speed/", "cost/seconds", "cost/joules", "cost/dollars")
    rows = read_lines(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


@pytest.fixture
def resumes_exactly(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Path]]:
    """`resumes_exactly("--key", "value")`: train 12 steps in one go, and cut after the 8th and resumed from the 6th.

    Asserts that both end with the same weights, optimizer state, history (to `history_rel`) and FLOPs; returns both run
    folders.
    """
    import frugal.callbacks.routing as routing

    def last(folder: Path) -> dict[str, Any]:
        return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)

    def check(*options: str, history_rel: float = 0.0) -> tuple[Path, Path]:
        whole = train("fit", "--run.name", "whole", *options)
        with monkeypatch.context() as patch:
            step_end = routing.RoutingMonitor.on_train_batch_end

            def stop(self: Any, trainer: Any, *args: Any) -> None:
                step_end(self, trainer, *args)
                if trainer.global_step == 8:  # the checkpoint before it is that of step 6
                    raise Interrupted

            patch.setattr(routing.RoutingMonitor, "on_train_batch_end", stop)
            with pytest.raises(Interrupted):
                train("fit", "--run.name", "cut", *options)
        (folder,) = Path("runs/cut").iterdir()
        assert last(folder)["global_step"] == 6
        cut = train("fit", "--run.name", "cut", "--ckpt_path", "last", *options)
        ours, theirs = last(whole), last(cut)
        assert same(ours["state_dict"], theirs["state_dict"])
        assert same(ours["optimizer_states"], theirs["optimizer_states"])
        for one, other in zip(history(whole), history(cut), strict=True):
            assert one == (pytest.approx(other, rel=history_rel) if history_rel else other)
        costs = [json.loads((run / "summary.json").read_text())["flops"] for run in (whole, cut)]
        assert costs[0] == costs[1]
        return whole, cut

    return check
