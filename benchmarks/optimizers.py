"""Optimizers, each at its own best learning rate: what do they need to reach AdamW's final loss?

    python benchmarks/optimizers.py OUT [--arms adamw muon sgd] [--rates adamw=4e-3,8e-3] [--steps 1400] [--seeds 3]
        [-- options of train.py]

1. A sweep of the learning rate of each arm at the first seed; a best value at the end of its grid is reported.
2. Each arm at its best rate over all seeds, and at shorter lengths (--lengths), each with a schedule of its own length
   (an intermediate loss of a longer run has not decayed). Between the lengths the loss is interpolated over the log
   of the steps: how many steps reach the loss of AdamW's full run with the same seed, and what share of its FLOPs
   (Muon's orthogonalizations included) and training seconds is that?

Runs lie in OUT/runs; finished ones are not repeated and an interrupted one goes on, so the script can be stopped and
started again. Writes OUT/optimizers.md. Seconds mean little on a machine that is busy with other work.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from freezing_study import own_and_forwarded, run, verdict

MUON = ["--model.optimizer", "frugal.training.muon.Muon"]
SGD = [
    "--model.optimizer",
    "torch.optim.SGD",
    "--model.optimizer.momentum",
    "0.95",
    "--model.optimizer.nesterov",
    "true",
]
# Options of train.py, and the grid of model.optimizer.lr.
ARMS: dict[str, tuple[list[str], list[float]]] = {
    "adamw": ([], [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]),
    "muon": ([*MUON, "--model.optimizer.adamw_lr", "4e-3"], [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]),
    "sgd": ([*SGD, "--model.optimizer.weight_decay", "1e-4"], [0.03, 0.1, 0.3, 1.0, 3.0]),
    "adafactor": (["--model.optimizer", "torch.optim.Adafactor"], [5e-3, 1e-2, 2e-2, 4e-2]),
    "soap": (["--config", "configs/optim/soap.yaml"], [1e-3, 2e-3, 4e-3, 8e-3]),
    "schedule_free": (["--config", "configs/optim/schedule_free.yaml"], [2e-3, 4e-3, 8e-3, 1.6e-2]),
}


def steps_to_reach(target: float, points: list[tuple[int, float]]) -> float | None:
    """Steps at which the loss over log(steps) crosses the target; None if even the longest run does not reach it.

    Below the shortest length the line through the two shortest goes on.
    """
    points = sorted(points)
    if points[-1][1] > target:
        return None
    first, second = next(
        (pair for pair in itertools.pairwise(points) if pair[1][1] <= target), (points[-2], points[-1])
    )
    slope = (second[1] - first[1]) / math.log(second[0] / first[0])
    return first[0] * math.exp((target - first[1]) / slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", default=["adamw", "muon", "sgd"], choices=list(ARMS))
    parser.add_argument("--rates", nargs="*", default=[], help="another grid for an arm: adamw=4e-3,8e-3")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lengths", nargs="+", type=float, default=[0.5, 0.75], help="shares of the steps, besides 1")
    argv, forwarded = own_and_forwarded(sys.argv[1:])
    args = parser.parse_args(argv)
    rates = {arm: grid for arm, (_, grid) in ARMS.items()}
    for arm, _, values in (text.partition("=") for text in args.rates):
        rates[arm] = [float(value) for value in values.split(",")]

    def result(arm: str, lr: float, seed: int, length: float = 1.0) -> dict[str, Any]:
        steps = round(args.steps * length)
        options = [*ARMS[arm][0], "--model.optimizer.lr", str(lr), *forwarded]
        options += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
        return run(args.out.resolve(), f"{arm}_{lr:g}_{steps}_{seed}", seed, options)

    lines = ["| arm | learning rate | bits per byte | |", "| --- | --- | --- | --- |"]
    best: dict[str, float] = {}
    for arm in args.arms:
        grid = rates[arm]
        losses = {lr: result(arm, lr, 1234)["val_bits_per_byte"] or math.inf for lr in grid}
        best[arm] = min(losses, key=lambda lr: losses[lr])
        for lr in grid:
            note = "" if lr != best[arm] else "best" if lr not in (grid[0], grid[-1]) else "best, at the grid's end"
            lines.append(f"| {arm} | {lr:g} | {losses[lr]:.4f} | {note} |")
        print("\n".join(lines[-len(grid) :]), flush=True)
    lines += ["", f"At its best rate, {args.seeds} seeds, {args.steps} steps:", ""]
    lines += ["| arm | bits per byte | less AdamW's | steps to AdamW's loss | of its FLOPs | of its seconds |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    seeds = [1234 + i for i in range(args.seeds)]
    for arm in args.arms:
        full = [result(arm, best[arm], seed) for seed in seeds]
        if arm == args.arms[0]:
            base = full
        difference = [a["val_bits_per_byte"] - b["val_bits_per_byte"] for a, b in zip(full, base, strict=True)]
        row = [arm, f"{statistics.fmean(r['val_bits_per_byte'] for r in full):.4f}"]
        if arm == args.arms[0]:
            lines.append(f"| {' | '.join([*row, '', '1', '1', '1'])} |")
            continue
        ratios: list[tuple[float, float, float] | None] = []
        for seed, mine, theirs in zip(seeds, full, base, strict=True):
            runs = [result(arm, best[arm], seed, length) for length in (*args.lengths, 1.0)]
            points = [(r["global_step"], r["val_bits_per_byte"]) for r in runs]
            steps = steps_to_reach(theirs["val_bits_per_byte"], points)
            share = steps and steps / mine["global_step"]
            seconds = mine["seconds_by_phase"]["train"] / theirs["seconds_by_phase"]["train"]
            ratios.append(share and (share, share * mine["flops"] / theirs["flops"], share * seconds))
        known = [r for r in ratios if r]
        figures = [f"{math.exp(statistics.fmean(map(math.log, column))):.2f}" for column in zip(*known, strict=True)]
        if len(known) < len(seeds):
            figures = [f"not reached by {len(seeds) - len(known)} of {len(seeds)}", "", ""]
        lines.append(f"| {' | '.join([*row, verdict(difference), *figures])} |")
        print(lines[-1], flush=True)
    (args.out / "optimizers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
