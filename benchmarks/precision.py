"""Number formats: is the final loss of each within the seed noise of float32, and what does a step cost?

    python benchmarks/precision.py OUT [--seeds 5] [--steps 1400] [--formats bf16-mixed] [-- options of train.py]

Per seed one run of train.py for 32-true and each format, all else equal. Runs lie in OUT/runs; finished ones are not
repeated and an interrupted one goes on. Writes OUT/precision.md: the paired differences of the best validation loss
(bits per byte) with a 95% interval, beside the standard deviation of float32 over the seeds; seconds as ratios.
On a CPU without 16-bit instructions the formats are slower than float32: there the losses count, not the seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from freezing_study import own_and_forwarded, run, verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--formats", nargs="+", default=["bf16-mixed", "16-mixed", "bf16-true"])
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seeds", type=int, default=5)
    argv, forwarded = own_and_forwarded(sys.argv[1:])
    args = parser.parse_args(argv)
    steps = ["--trainer.max_steps", str(args.steps), "--trainer.val_check_interval", str(args.steps)]

    out = args.out.resolve()

    def results(precision: str) -> list[dict[str, Any]]:
        options = [*steps, "--trainer.precision", precision, *forwarded]
        return [run(out, f"{precision}_{args.steps}_{seed}", seed, options) for seed in range(1, args.seeds + 1)]

    base = results("32-true")
    losses = [r["val_bits_per_byte"] for r in base]
    noise = statistics.stdev(losses) if len(losses) > 1 else float("nan")
    lines = [
        f"32-true: {statistics.fmean(losses):.4f} bits per byte, standard deviation over seeds {noise:.4f}",
        "",
        "| format | bits per byte | less float32, paired | within the seed noise | of its training seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for precision in args.formats:
        found = results(precision)
        differences = [a["val_bits_per_byte"] - b["val_bits_per_byte"] for a, b in zip(found, base, strict=True)]
        pairs = zip(found, base, strict=True)
        seconds = [a["seconds_by_phase"]["train"] / b["seconds_by_phase"]["train"] for a, b in pairs]
        mean = statistics.fmean(r["val_bits_per_byte"] for r in found)
        inside = "yes" if abs(statistics.fmean(differences)) < noise else "no"
        row = [precision, f"{mean:.4f}", verdict(differences), inside, f"{statistics.median(seconds):.2f}"]
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    (args.out / "precision.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
