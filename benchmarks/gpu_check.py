"""What a CUDA machine has to show: every number format and path, eager and compiled, the plans, the speed.

    python benchmarks/gpu_check.py OUT [--parts paths modes wide throughput] [--steps 300] [--jobs 1]

Parts, in this order, each with a table of its own in OUT:

- paths: the experts on every path against a plain loop in float64 (`check_paths.py`).
- modes: the default run in every number format, eager and compiled, and under DDP and FSDP2 over NCCL on one device.
  Validation losses after the same steps should agree within the noise of a seed. Several `--jobs` share the device:
  the losses stay comparable, the speeds do not.
- wide: a mixture of 0.9B parameters, 0.25B active, 32,768 tokens a step, one run after the other: tokens per second,
  MFU, watts of training (~ where nothing counts them), and peak memory and step time against what `frugal plan`
  foretells.
- throughput: beside the peers (`throughput.py`).

Without a GPU it runs the modes that a CPU has. fp8 is model.fp8 (tensorwise) over bf16-mixed.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

CPU = [("32-true", False), ("bf16-mixed", False), ("32-true", True)]
CUDA = [(p, c) for p in ("32-true", "tf32", "bf16-mixed", "16-mixed", "bf16-true", "fp8") for c in (False, True)]
STRATEGIES = {
    "ddp": ["--config", "configs/strategy/ddp.yaml"],
    "fsdp2": ["--config", "configs/strategy/fsdp2.yaml"],
    "fsdp2, bf16-mixed": ["--config", "configs/strategy/fsdp2.yaml", "--trainer.precision", "bf16-mixed"],
    "fsdp2, 16-mixed": ["--config", "configs/strategy/fsdp2.yaml", "--trainer.precision", "16-mixed"],
    "fsdp2, bf16-mixed, compiled": [
        *("--config", "configs/strategy/fsdp2.yaml", "--trainer.precision", "bf16-mixed", "--model.compile", "true")
    ],
    "fsdp2, recomputed": ["--config", "configs/strategy/fsdp2.yaml", "--model.activation_checkpointing", "true"],
    "fsdp2, offloaded": ["--config", "configs/strategy/fsdp2_cpu_offload.yaml"],
    "fsdp2, experts": ["--config", "configs/strategy/fsdp2_expert.yaml"],
}
VERB = "from frugal.cli.verbs import main; main()"
WIDE = """
data: {seq_len: 2048, batch_size: 16, eval_batch_size: 8}
model:
  transformer:
    d_model: 1024
    n_layers: 16
    d_ff: 2560
    attention: {n_heads: 8, n_kv_heads: 8}
    moe: {n_experts: 32, top_k: 4, d_expert: 512}
    tie_embeddings: false
  optimizer: {lr: 3.0e-4}
  schedule: {warmup_steps: 10}
trainer: {val_check_interval: 60, limit_val_batches: 1, log_every_n_steps: 10}
checkpoint: {every_n_steps: 1000}
samples: {max_new_tokens: 4}
"""
WIDE_MODES = [
    *(("bf16-mixed", True), ("bf16-mixed", False), ("fp8", True), ("16-mixed", True), ("tf32", True), ("32-true", True))
]


def options_of(precision: str, compiled: bool) -> list[str]:
    """Options of train.py for a number format."""
    special = {
        "fp8": ["--trainer.precision", "bf16-mixed", "--model.fp8.recipe", "tensorwise"],
        "tf32": ["--trainer.precision", "32-true", "--model.tf32", "true"],
    }
    options = special.get(precision, ["--trainer.precision", precision])
    return [*options, "--model.compile", str(compiled).lower()]


def train(folder: Path, name: str, steps: str, options: list[str]) -> tuple[Path | None, dict[str, Any], str]:
    """One run in a process of its own: its folder, its receipt, or the last line of its error."""
    slug = name.replace(", ", "-")
    command = [sys.executable, "train.py", "fit", "--config", "configs/base.yaml", *options]
    command += ["--run.name", slug, "--run.root", str(folder / "runs"), "--run.wandb", "disabled"]
    result = subprocess.run([*command, "--trainer.max_steps", steps], capture_output=True, text=True)
    (folder / f"{slug}.log").write_text(result.stdout + result.stderr)
    if result.returncode:
        lines = (result.stderr.strip() or "no message").splitlines()
        return None, {}, next((x for x in reversed(lines) if "rror" in x), lines[-1])[:200]
    newest = max((folder / "runs" / slug).iterdir(), key=lambda path: path.stat().st_mtime)
    return newest, json.loads((newest / "summary.json").read_text()), ""


def modes(folder: Path, steps: str, jobs: int, only: list[str]) -> list[str]:
    """The default run in every mode of this machine."""
    cuda = torch.cuda.is_available()
    wanted = {f"{p}{', compiled' if c else ''}": options_of(p, c) for p, c in (CUDA if cuda else CPU)}
    wanted |= STRATEGIES if cuda else {}
    wanted = {name: options for name, options in wanted.items() if not only or any(part in name for part in only)}
    table = ["| mode | val loss | tokens/s | MFU | error |", "|---|---|---|---|---|"]

    def row(name: str) -> str:
        _, s, error = train(folder, name, steps, wanted[name])
        numbers = f"{s['val_loss']:.4f} | {s['tokens_per_second']:,.0f} | {s['mfu']:.1%}" if s else "| |"
        print(f"| {name} | {numbers} | {error} |", flush=True)
        return f"| {name} | {numbers} | {error} |"

    with ThreadPoolExecutor(jobs) as pool:
        return table + list(pool.map(row, wanted))


def wide(folder: Path, only: list[str]) -> list[str]:
    """Speed, energy and memory of a model that fills a GPU, beside what was planned."""
    overlay = folder / "wide.yaml"
    overlay.write_text(WIDE)
    base = ["--config", "configs/optim/adamw.yaml", "--config", str(overlay)]
    table = [
        "| mode | val loss | tokens/s | MFU | watts | peak GiB | planned | ms a step | planned | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for precision, compiled in WIDE_MODES:
        name = f"wide, {precision}{', compiled' if compiled else ''}"
        if only and not any(part in name for part in only):
            continue
        run, s, error = train(folder, name, "60", [*base, *options_of(precision, compiled)])
        if run is None:
            table.append(f"| {name} ||||||||| {error} |")
        else:
            command = [sys.executable, "-c", VERB, "plan", "--audit", str(run), "--json", "true"]
            answer = subprocess.run(command, capture_output=True, text=True)
            (folder / f"{run.parent.name}.audit.json").write_text(answer.stdout or answer.stderr)
            rows = {row["quantity"].split(",")[0]: row for row in json.loads(answer.stdout)} if answer.stdout else {}
            memory, seconds = (
                f"{rows[q]['actual'] / u:.1f} | {rows[q]['predicted'] / u:.1f}" if q in rows else " | "
                for q, u in (("peak memory", 2**30), ("training time", 0.06))
            )
            trained = s["seconds_by_part"]["step"] + s["seconds_by_part"]["data_wait"]  # without compiling
            watts = f"{'' if s['joules_measured'] else '~'}{s['train_joules'] / trained:.0f}"
            mfu = s["flops"] / trained / (s["peak_tflops_measured"] * 1e12)
            speed = f"{s['tokens_seen'] / trained:,.0f} | {mfu:.1%} | {watts}"
            table.append(f"| {name} | {s['val_loss']:.4f} | {speed} | {memory} | {seconds} | |")
        print(table[-1], flush=True)
    return table


def main() -> None:
    """Run the parts that are wanted, write their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="*", default=["paths", "modes", "wide", "throughput"])
    parser.add_argument("--steps", default="300")
    parser.add_argument("--jobs", type=int, default=1, help="modes at a time")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the modes to run")
    known = parser.parse_args()
    known.out.mkdir(parents=True, exist_ok=True)
    scripts = Path(__file__).parent
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    head = f"`python benchmarks/gpu_check.py` on {device}, torch {torch.__version__}"
    if "paths" in known.parts:
        subprocess.run([sys.executable, str(scripts / "check_paths.py"), str(known.out)])  # a mismatch is written down
    if "modes" in known.parts:
        table = modes(known.out, known.steps, known.jobs, known.only)
        lines = [f"{head}, {known.steps} steps, {known.jobs} at a time", "", *table]
        (known.out / "modes.md").write_text("\n".join(lines) + "\n")
    if "wide" in known.parts:
        (known.out / "wide.md").write_text("\n".join([head, "", *wide(known.out, known.only)]) + "\n")
    if "throughput" in known.parts:
        subprocess.run([sys.executable, str(scripts / "throughput.py"), "--out", str(known.out), "--together", "2"])


if __name__ == "__main__":
    main()
