"""Freezing against its fair controls: shorter unfrozen runs of equal FLOPs and of equal seconds, paired by seed.

    python benchmarks/freezing_study.py 040_freezing_prefix OUT [--seeds 5] [--control "OPTIONS"] [-- options]

Options are those of train.py; those of --control are for the unfrozen runs alone (a learning rate of their own).

Per seed four runs of train.py: frozen, full (unfrozen, as many steps), and unfrozen for as many steps as cost the
frozen run's FLOPs, and its seconds. Seconds are processor seconds less those of a run of one step, medians over the
seeds: on a busy machine they move less than those of a clock. A shorter run's learning rate decays over its own length.
Runs lie in OUT/runs, the full ones under a name that all experiments share; finished ones are not repeated and an
interrupted one goes on, so the script can be stopped and started again. Writes OUT/<experiment>.md: the paired
differences of the best validation loss (bits per byte) with a 95% interval.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from frugal.cli.train import main as train

ROOT = Path(__file__).resolve().parent.parent
# Student's t, 97.5%, by degrees of freedom (n - 1 pairs).
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def run(out: Path, name: str, seed: int, options: list[str]) -> dict[str, Any]:
    """The summary of a run, which is started or continued only if it has not finished.

    `cpu_seconds` are the processor seconds that it took; None for a run that was interrupted.
    """
    found = sorted((out / "runs" / name).glob("*/summary.json"))
    if not found:
        command = ["fit", *options, "--run.name", name, "--ckpt_path", "last", "--run.root", str(out / "runs")]
        command += ["--run.wandb", "disabled", "--seed_everything", str(seed)]
        fresh = not (out / "runs" / name).exists()
        os.chdir(ROOT)
        before = time.process_time()
        train(command)
        found = sorted((out / "runs" / name).glob("*/summary.json"))
        if fresh:
            (found[-1].parent / "cpu_seconds").write_text(str(time.process_time() - before))
    spent = found[-1].parent / "cpu_seconds"
    return {**json.loads(found[-1].read_text()), "cpu_seconds": float(spent.read_text()) if spent.exists() else None}


def own_and_forwarded(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after `--`: the script's own arguments, and options of train.py."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def steps_of(options: list[str], experiment: str) -> int:
    """The frozen run's length, from the options, the experiment or the base config."""
    if "--trainer.max_steps" in options:
        return int(options[options.index("--trainer.max_steps") + 1])
    for path in (f"experiments/{experiment}.yaml", "base.yaml"):
        trainer = yaml.safe_load((ROOT / "configs" / path).read_text()).get("trainer", {})
        if "max_steps" in trainer:
            return int(trainer["max_steps"])
    raise SystemExit("trainer.max_steps is set nowhere")


def verdict(differences: list[float]) -> str:
    """Mean, interval and what it says; a lower loss of the frozen run is a saving."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.4f}, one pair: no verdict"
    half = T975[len(differences) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    word = "saves" if mean + half < 0 else "costs" if mean - half > 0 else "ties"
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]: {word}"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11))
    parser.add_argument("--control", default="", type=shlex.split)
    ours, options = own_and_forwarded(sys.argv[1:])
    args = parser.parse_args(ours)
    out = args.out.resolve()
    overlay = ["--config", str(ROOT / "configs" / "experiments" / f"{args.experiment}.yaml")]
    off = ["--freezing.windows", "null", "--freezing.prefix", "null", "--freezing.importance", "null"]
    off += ["--freezing.experts", "null", "--model.lora", "null", *args.control]
    steps = steps_of(options, args.experiment)
    seeds = range(1, args.seeds + 1)

    def arm(name: str, seed: int, share: float = 1.0) -> dict[str, Any]:
        own = [*overlay, *options, *([] if name == "frozen" else off)]
        if share < 1:
            own += ["--trainer.max_steps", str(max(1, round(steps * share)))]
        run_name = f"full-{steps}" if name == "full" else f"{args.experiment}-{name.replace(' ', '-')}"
        return run(out, f"{run_name}-{seed}", seed, own)

    start_up = arm("one step", 1, 1 / steps)["cpu_seconds"]
    rows = [{name: arm(name, seed) for name in ("frozen", "full")} for seed in seeds]
    ratios = [
        (row["frozen"]["cpu_seconds"] - start_up) / (row["full"]["cpu_seconds"] - start_up)
        for row in rows
        if start_up and all(r["cpu_seconds"] for r in row.values())
    ]
    if not ratios:
        raise SystemExit("no pair of runs went through without an interruption; remove one and start again")
    for seed, row in zip(seeds, rows, strict=True):
        row["equal FLOPs"] = arm("equal FLOPs", seed, row["frozen"]["flops"] / row["full"]["flops"])
        row["equal seconds"] = arm("equal seconds", seed, statistics.median(ratios))
    lines = [f"{args.experiment}: {steps} steps, {len(rows)} seeds; bits per byte, best of each run.", ""]
    shares = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    lines += [f"Processor seconds of the frozen run over those of the full one, by seed: {shares}.", ""]
    lines += ["| seed | frozen | full | equal FLOPs (steps) | equal seconds (steps) |", "|---|---|---|---|---|"]
    for seed, row in enumerate(rows, start=1):
        cells = [f"{r['val_bits_per_byte']:.4f} ({r['global_step']})" for r in row.values()]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    lines.append("")
    for arm in ("full", "equal FLOPs", "equal seconds"):
        gaps = [row["frozen"]["val_bits_per_byte"] - row[arm]["val_bits_per_byte"] for row in rows]
        lines.append(f"- frozen less {arm}: {verdict(gaps)}")
    (out / f"{args.experiment}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
