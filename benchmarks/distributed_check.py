"""One call for a machine with several GPUs: does every strategy train there, to the same loss, and how fast?

    python benchmarks/distributed_check.py OUT [--devices 4] [--steps 200] [extra options of train.py ...]

OUT/distributed_check.md gets one row per strategy and mode: validation loss after the same steps over the same tokens
(within float32's rounding of the single device's, within the format's noise for the mixed ones), tokens/s and MFU, or
the last line of the error. Then it resumes the expert-parallel run on half of the devices. Without GPUs it runs on the
CPU over gloo, which shows that it is right and says nothing about speed.

To be looked at on real GPUs, since a CPU cannot show it: whether all-gathers hide behind compute (tokens/s of fsdp2
against ddp at a width where compute counts: add --model.transformer.d_model 2048 --model.transformer.d_ff 5504
--model.transformer.attention.n_heads 16 --data.seq_len 2048), the memory that sharding, recomputation and CPU offload
save (nvidia-smi, or peak memory in the receipt), and compiled blocks under FSDP2.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

FSDP2 = ["--config", "configs/strategy/fsdp2.yaml"]
TENSOR = ["--config", "configs/strategy/fsdp2_tensor.yaml"]
EXPERT = ["--config", "configs/strategy/fsdp2_expert.yaml"]
MODES: list[tuple[str, int, list[str]]] = [  # name, processes that share a batch, options
    ("ddp", 1, ["--config", "configs/strategy/ddp.yaml"]),
    ("fsdp2", 1, FSDP2),
    ("fsdp2-keep", 1, [*FSDP2, "--trainer.strategy.reshard_after_forward", "false"]),
    ("fsdp2-recompute", 1, [*FSDP2, "--model.activation_checkpointing", "true"]),
    ("fsdp2-bf16", 1, [*FSDP2, "--trainer.precision", "bf16-mixed"]),
    ("fsdp2-fp16", 1, [*FSDP2, "--trainer.precision", "16-mixed"]),
    ("fsdp2-compiled", 1, [*FSDP2, "--model.compile", "true"]),
    ("fsdp2-tensor", 2, TENSOR),
    ("fsdp2-tensor-bf16", 2, [*TENSOR, "--trainer.precision", "bf16-mixed"]),
    ("fsdp2-expert", 1, EXPERT),
    ("fsdp2-expert-bf16", 1, [*EXPERT, "--trainer.precision", "bf16-mixed"]),
    ("fsdp2-expert-recompute", 1, [*EXPERT, "--model.activation_checkpointing", "true"]),
]
CUDA_ONLY: list[tuple[str, int, list[str]]] = [
    ("fsdp2-offload", 1, ["--config", "configs/strategy/fsdp2_cpu_offload.yaml"]),
]


def train(folder: Path, name: str, steps: str, options: list[str], title: str = "") -> tuple[str, Path | None]:
    """One run in processes of its own, a resumed one too; its row, and its folder if it went well."""
    title = title or name
    command = [sys.executable, "train.py", "fit", "--run.name", name, "--run.root", str(folder / "runs")]
    command += ["--run.wandb", "disabled", "--trainer.max_steps", steps, "--trainer.val_check_interval", steps]
    result = subprocess.run([*command, *options], capture_output=True, text=True)
    (folder / f"{title}.log").write_text(result.stdout + result.stderr)
    if result.returncode:
        lines = (result.stderr.strip() or "no message").splitlines()
        return f"| {title} | | | | {lines[-1][:160]} |", None
    newest = max((folder / "runs" / name).iterdir(), key=lambda path: path.stat().st_mtime)
    s = json.loads((newest / "summary.json").read_text())
    return f"| {title} | {s['val_loss']:.6f} | {s['tokens_per_second']:,.0f} | {s['mfu']:.1%} | |", newest


def main() -> None:
    """Run every mode, write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--steps", default="200")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a micro-batch over all devices")
    known, extra = parser.parse_known_args()
    known.out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "cpu over gloo: correctness only, no speed"
    accelerator = ["--trainer.accelerator", "cuda" if cuda else "cpu"]
    table = [
        f"`python benchmarks/distributed_check.py` on {known.devices} x {device}, torch {torch.__version__}, "
        f"{known.steps} steps, {known.batch} sequences per micro-batch {' '.join(extra)}\n",
        "| strategy | val loss | tokens/s | MFU | error |",
        "|---|---|---|---|---|",
    ]

    def note(row: str) -> None:
        table.append(row)
        print(row, flush=True)
        (known.out / "distributed_check.md").write_text("\n".join(table) + "\n")

    one = [*accelerator, "--trainer.devices", "1", "--data.batch_size", str(known.batch), *extra]
    note(train(known.out, "single", known.steps, one)[0])
    saved = None
    for name, sharing, options in [*MODES, *(CUDA_ONLY if cuda else [])]:
        batch = str(max(known.batch * sharing // known.devices, 1))
        devices = [*accelerator, "--trainer.devices", str(known.devices), "--data.batch_size", batch]
        row, folder = train(known.out, name, known.steps, [*options, *devices, *extra])
        note(row)
        saved = folder if name == "fsdp2-expert" else saved
    if saved is not None:
        half = max(known.devices // 2, 1)
        options = [*(EXPERT if half > 1 else FSDP2), *accelerator, "--trainer.devices", str(half), "--data.batch_size"]
        options += [str(known.batch // half), "--ckpt_path", str(saved / "checkpoints/last.ckpt"), *extra]
        note(train(known.out, "fsdp2-expert", str(int(known.steps) + 20), options, "fsdp2-expert resumed on half")[0])


if __name__ == "__main__":
    main()
