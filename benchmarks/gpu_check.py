"""One call for a CUDA machine: does the default run train in every precision, eager and compiled, and how fast?

    python benchmarks/gpu_check.py OUT [--steps 300] [extra options of train.py ...]

First the experts on every path against a plain loop (OUT/paths.md), last the throughput table beside the peers
(OUT/throughput_*.md). Between them OUT/gpu_check.md with one row per mode: validation loss after the same steps (they
should agree within the noise of a seed), tokens/s, MFU, or the last line of the error. Without a GPU it runs the modes
that a CPU has.

fp8 is model.fp8 (tensorwise) over bf16-mixed. To be looked at besides the loss: at this width of 96 it should be slower
than bf16-mixed, so add wide rows, such as --model.transformer.d_model 2048 --model.transformer.d_ff 5504 (does it pay
there, and does the compiled one fuse the casts?); the log says how many matrices were converted; on a card below
compute capability 8.9 the row must hold the one-line refusal. With --model.fp8.recipe rowwise, likewise.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

CPU = [("32-true", False), ("bf16-mixed", False), ("32-true", True)]
CUDA = [(p, c) for p in ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "fp8") for c in (False, True)]


def main(out: str, *options: str) -> None:
    """Run every mode in a process of its own."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    steps = "300"
    if options[:1] == ("--steps",):
        steps, options = options[1], options[2:]
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "cpu"
    scripts = Path(__file__).parent
    subprocess.run([sys.executable, str(scripts / "check_paths.py"), out])  # a mismatch is written down; go on
    table = [
        f"`python benchmarks/gpu_check.py` on {device}, torch {torch.__version__}, {steps} steps {' '.join(options)}\n",
        "| precision | compiled | val loss | tokens/s | MFU | error |",
        "|---|---|---|---|---|---|",
    ]
    for precision, compiled in CUDA if cuda else CPU:
        name = f"check-{precision}{'-compiled' if compiled else ''}"
        command = [sys.executable, "train.py", "fit", "--run.name", name, "--run.root", str(folder / "runs")]
        command += ["--run.wandb", "disabled", "--trainer.max_steps", steps]
        fp8 = ["--model.fp8.recipe", "tensorwise"] if precision == "fp8" else []
        command += ["--trainer.precision", "bf16-mixed" if fp8 else precision, *fp8]
        command += ["--model.compile", str(compiled).lower(), *options]
        result = subprocess.run(command, capture_output=True, text=True)
        (folder / f"{name}.log").write_text(result.stdout + result.stderr)
        if result.returncode:
            lines = (result.stderr.strip() or "no message").splitlines()
            table.append(f"| {precision} | {compiled} | | | | {lines[-1][:120]} |")
        else:
            newest = max((folder / "runs" / name).iterdir(), key=lambda path: path.stat().st_mtime)
            s = json.loads((newest / "summary.json").read_text())
            row = f"{s['val_loss']:.4f} | {s['tokens_per_second']:,.0f} | {s['mfu']:.1%}"
            table.append(f"| {precision} | {compiled} | {row} | |")
        print(table[-1], flush=True)
    (folder / "gpu_check.md").write_text("\n".join(table) + "\n")
    subprocess.run([sys.executable, str(scripts / "throughput.py"), "--out", out, "--rounds", "5"])


if __name__ == "__main__":
    main(*sys.argv[1:])
