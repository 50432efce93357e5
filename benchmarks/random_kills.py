"""SIGKILL at random moments: does a run that is killed again and again end as one that never was?

    python benchmarks/random_kills.py OUT [--kills 20] [--seed 0]

A run of seconds is killed in turn at any moment from its start, in the middle of training, and while a checkpoint is
being written, and resumed each time. It must go on from no more than one checkpoint before, and in the end have the
weights, moments, logged rows, tokens and FLOPs of the run that was left alone. Prints one line a kill, and how many
rows W&B lacks or has twice after `wandb sync`; ends with code 1 at the first thing that is wrong.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import history, prepare_project, same
from wandb_server import wandb_server

EVERY = 5  # steps between checkpoints


def start(name: str, steps: int) -> int:
    """A run in a process of its own, forked so that imports are paid once; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with Path(f"{name}.log").open("a") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        from frugal.cli.train import main

        options = {"trainer.max_steps": steps, "trainer.val_check_interval": 50, "trainer.log_every_n_steps": 1}
        options |= {
            "ckpt_path": "last",
            "checkpoint.every_n_steps": EVERY,
            "run.wandb": "offline",
            "run.name": name,
            "run.id": "it",
        }
        sys.argv = ["train.py", "fit", "--config", "tiny.yaml"]
        sys.argv += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        main()
        code = 0
    finally:
        os._exit(code)


def ended(pid: int) -> bool:
    """Whether a process has ended by itself; it must have ended well."""
    done, status = os.waitpid(pid, os.WNOHANG)
    assert status == 0, f"a run ended with {status}; see its log"
    return done != 0


def seen(folder: Path) -> int:
    """Steps that the run has logged."""
    rows = read_lines(folder / "metrics.jsonl")
    return rows[-1]["step"] + 1 if rows else 0


def kill(folder: Path, steps: int, how: str, rng: random.Random) -> bool:
    """Start the run, or go on, and kill it at such a moment; whether it was still running."""
    pid, before = start("cut", steps), seen(folder)
    stop = time.monotonic() + rng.uniform(0, 4)
    while not ended(pid):
        if how == "any moment":
            now = time.monotonic() > stop
        else:
            writing = (folder / "checkpoints/.last.ckpt.tmp").exists()
            now = seen(folder) > before if how == "training" else writing and rng.random() < 0.2
        if now:
            time.sleep(rng.uniform(0, 0.3) if how == "training" else 0)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    prepare_project(options.out)
    os.chdir(options.out)
    steps, rng = 40 * options.kills, random.Random(options.seed)
    whole, cut = Path("runs/whole/it"), Path("runs/cut/it")
    pid = start("whole", steps)
    assert os.waitpid(pid, 0)[1] == 0, "see whole.log"
    for number in range(options.kills):
        how = ("any moment", "training", "a checkpoint is being written")[number % 3]
        if not kill(cut, steps, how, rng):
            print(f"the run was done after {number} kills")
            break
        last = cut / "checkpoints/last.ckpt"
        step = read_checkpoint(last)["global_step"] if last.is_file() else 0
        print(f"kill {number + 1}, {how}: {seen(cut)} steps logged, goes on from {step}", flush=True)
        assert seen(cut) - step <= EVERY, "more is lost than the steps since the last checkpoint"
    pid = start("cut", steps)
    assert os.waitpid(pid, 0)[1] == 0, "see cut.log"
    ours, theirs = (read_checkpoint(folder / "checkpoints/last.ckpt") for folder in (whole, cut))
    for key in ("state_dict", "optimizer_states", "global_step"):
        assert same(ours[key], theirs[key]), key
    assert history(whole) == history(cut)
    cards = [json.loads((folder / "summary.json").read_text()) for folder in (whole, cut)]
    for key in ("tokens_seen", "flops", "global_step", "val_loss"):
        assert cards[0][key] == cards[1][key], key
    with wandb_server() as received:
        environment = {**os.environ, "WANDB_BASE_URL": received.url, "WANDB_API_KEY": "x" * 40}
        pieces = sorted(cut.glob("wandb/offline-run-*"))
        for piece in pieces:  # of a run that is killed as it starts there may be nothing to send
            command = [str(Path(sys.executable).parent / "wandb"), "sync", str(piece)]
            subprocess.run(command, env=environment, check=True, capture_output=True)
        sent = sorted(row["trainer/global_step"] for row in received.history() if "train/loss" in row)
    twice, missing = len(sent) - len(set(sent)), len(set(range(steps)) - set(sent))
    print(f"W&B: {len(pieces)} pieces of one run, {twice} rows twice, {missing} of {steps} missing")
    print(f"as if never killed: {steps} steps, {cards[1]['lost']['steps']} done again")


if __name__ == "__main__":
    import torch

    import frugal.callbacks.report
    import frugal.cli.train  # noqa: F401
    from frugal.tracking.run_folder import read_lines
    from frugal.training.checkpointing import read_checkpoint

    torch.set_num_threads(1)
    main()
