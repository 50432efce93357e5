"""Tokens per second, share of the matmul peak and memory of this model beside its peers, in one run.

    python benchmarks/throughput.py                              # CPU, or CUDA if there is one: all contenders
    python benchmarks/throughput.py --experts 4 8 16 32 64       # more experts at equal active FLOPs
    python benchmarks/throughput.py --device cuda --out results  # both write a markdown table and a PNG

Every contender is a process of its own with the same batch, fused AdamW and allocator settings. On a CPU (float32) all
stay alive and take turns, a few steps each, round after round, so that a noisy machine is noisy for all; on CUDA
(bfloat16 autocast, unless the name says otherwise) `--together` says how many memory holds. The large matrix product
whose speed is the peak takes its turn like a contender. Medians over rounds; ratios are medians of each round's ratio,
and those marked ~ the ratio of two medians: that contender was not alive in the same rounds as the reference.
A step is forward, loss, backward and optimizer. Peak memory on a CPU is the resident peak of the timed steps less
what the imports alone took; on CUDA it is what torch allocated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.contenders import CONTENDERS, FORMATS, Shape, shape_for  # noqa: E402

REFERENCE = "DeepseekV3 (HF, grouped_mm), eager"
SWEEP = ["frugal, compiled", "frugal, eager", REFERENCE, "DeepseekV3 (HF, loop), eager"]


@dataclass
class Worker:
    """A contender's process and what it measured."""

    name: str
    n_experts: int
    group: int  # those of one take turns
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    memory_gib: float = 0.0
    parameters: int = 0

    @staticmethod
    def start(name: str, device: str, n_experts: int, steps: int, group: int = 0) -> Worker:
        command = [sys.executable, "-m", "benchmarks.throughput_worker", name, device, str(n_experts), str(steps)]
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
        )
        return Worker(name, n_experts, group, process)

    def read(self) -> dict[str, Any]:
        """Next line of JSON; a contender that fell over says why in one."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                if "error" in answer:
                    raise RuntimeError(f"{self.name}: {answer['error']}")
                return answer
        raise RuntimeError(f"{self.name}: ended without a word")

    def go(self) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()

    def take_turn(self) -> None:
        answer = self.go()
        self.seconds.append(answer["seconds"])
        self.memory_gib = max(self.memory_gib, answer["memory_gib"])

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


def measure(
    device: str, wanted: list[tuple[str, int]], rounds: int, steps: int, together: int
) -> Iterator[tuple[list[Worker], dict[str, float], list[str]]]:
    """Run all contenders, `together` at a time; yields those done, the peak in TFLOP/s by library, and what failed."""
    peaks: dict[str, list[float]] = {}
    failures: list[str] = []
    done: list[Worker] = []

    def peak(worker: Worker) -> None:
        for library, value in worker.go()["peak"].items():
            peaks.setdefault(library, []).append(value)

    matmul = Worker.start("matmul", device, 0, 0)
    matmul.read()
    for first in range(0, len(wanted), together):
        workers = [Worker.start(name, device, n, steps, first) for name, n in wanted[first : first + together]]
        alive: list[Worker] = []
        for worker in workers:
            print(f"starting {worker.name} {worker.n_experts or ''}", file=sys.stderr, flush=True)
            try:
                worker.parameters = worker.read()["parameters"]
                alive.append(worker)
            except RuntimeError as error:
                failures.append(str(error))
        for number in range(rounds if alive else 0):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            peak(matmul)
            for worker in alive:
                worker.take_turn()
        for worker in alive:
            worker.end()
        done += alive
        yield done, {library: statistics.median(values) for library, values in peaks.items()}, failures
    matmul.end()


def ratio(worker: Worker, reference: Worker) -> str:
    """How many times the reference's tokens per second: round by round where both took turns, else of the medians."""
    if worker.group == reference.group:
        return f"{statistics.median(b / a for a, b in zip(worker.seconds, reference.seconds, strict=True)):.2f}"
    return f"~{statistics.median(reference.seconds) / statistics.median(worker.seconds):.2f}"


def table(workers: list[Worker], peaks: dict[str, float], shapes: dict[int, Shape]) -> str:
    """One row per contender. Its share of the peak counts the model's FLOPs, the same for all of one shape."""
    lines = [
        "| experts | contender | tokens/s | ratio | " + " | ".join(f"of {p}'s peak" for p in peaks) + " | memory GiB |",
        "|---|---|---|---|" + "---|" * len(peaks) + "---|",
    ]
    for worker in workers:
        shape = shapes[worker.n_experts]
        seconds = statistics.median(worker.seconds)
        reference = next((w for w in workers if w.name == REFERENCE and w.n_experts == worker.n_experts), None)
        shares = " | ".join(f"{shape.flops_per_step / seconds / value / 1e12:.0%}" for value in peaks.values())
        times = ratio(worker, reference) if reference else "-"
        tokens = shape.batch_size * shape.seq_len / seconds
        experts = shape.moe.n_experts if "dense" not in worker.name else "-"
        lines.append(f"| {experts} | {worker.name} | {tokens:,.0f} | {times} | {shares} | {worker.memory_gib:.2f} |")
    return "\n".join(lines)


def plot(workers: list[Worker], shapes: dict[int, Shape], path: Path, sweep: bool) -> None:
    """Bars of tokens per second, or lines over the number of experts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def tokens(worker: Worker) -> float:
        shape = shapes[worker.n_experts]
        return shape.batch_size * shape.seq_len / statistics.median(worker.seconds)

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if sweep:
        for name in dict.fromkeys(worker.name for worker in workers):
            mine = [worker for worker in workers if worker.name == name]
            axes.plot([w.n_experts for w in mine], [tokens(w) for w in mine], marker="o", label=name)
        axes.set(xscale="log", xlabel="experts (equal active FLOPs)", ylabel="tokens per second", ylim=(0, None))
        axes.set_xticks([n for n in shapes], [str(n) for n in shapes], minor=False)
        axes.minorticks_off()
        axes.legend()
    else:
        ordered = sorted(workers, key=tokens)
        colours = ["tab:orange" if worker.name.startswith("frugal") else "tab:gray" for worker in ordered]
        bars = axes.barh([worker.name for worker in ordered], [tokens(worker) for worker in ordered], color=colours)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.set(xlabel="tokens per second")
        axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def describe(device: str, shapes: dict[int, Shape], peaks: dict[str, float], command: str, failures: list[str]) -> str:
    """What was run where: the head of the report."""
    import transformers

    shape = next(iter(shapes.values()))
    config, moe = shape.config, shape.moe
    chip = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} cores, {platform.machine()}"
    )
    lines = [
        f"`{command}`, {datetime.date.today()}, {chip}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {'bfloat16 autocast' if device == 'cuda' else 'float32'}.",
        "",
        f"d_model {config.d_model}, {config.n_layers} layers (first dense), {config.attention.n_heads} heads, "
        f"vocabulary {config.vocab_size}, {shape.batch_size} sequences of {shape.seq_len}, "
        f"top-{moe.top_k} of the experts + {moe.n_shared_experts} shared of width {moe.d_expert}; "
        f"{shape.flops_per_step / 1e9:,.0f} GFLOP/step. "
        + "Matmul peak of this run: "
        + ", ".join(f"{library} {value * 1e3:,.0f} GFLOP/s" for library, value in peaks.items())
        + f". Ratios are to {REFERENCE}.",
    ]
    return "\n".join(lines + [f"\nFailed: {failure}" for failure in failures])


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--experts", type=int, nargs="*", default=[], help="numbers of experts to compare")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the contenders to run")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="steps of one turn")
    parser.add_argument("--together", type=int, help="contenders at a time: as many as memory holds; all on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(args)
    names = [
        name
        for name in (SWEEP if options.experts else [*CONTENDERS, *(FORMATS if options.device == "cuda" else ())])
        if not options.only or any(part in name for part in options.only)
    ]
    if not names:
        parser.error(f"--only: no contender's name holds any of {', '.join(options.only)}")
    wanted = [(name, n) for n in options.experts or [0] for name in names]
    shapes = {n: shape_for(options.device, n or None) for n in options.experts or [0]}
    command = shlex.join(["python", "benchmarks/throughput.py", *(sys.argv[1:] if args is None else args)])
    stem = f"throughput_{options.device}" + ("_experts" if options.experts else "")
    options.out.mkdir(parents=True, exist_ok=True)
    together = options.together or (len(wanted) if options.device == "cpu" else 1)
    report = ""
    for workers, peaks, failures in measure(options.device, wanted, options.rounds, options.steps, together):
        report = (
            describe(options.device, shapes, peaks, command, failures) + "\n\n" + table(workers, peaks, shapes) + "\n"
        )
        (options.out / f"{stem}.md").write_text(report, encoding="utf-8")
    if workers:
        plot(workers, shapes, options.out / f"{stem}.png", bool(options.experts))
    print(report)


if __name__ == "__main__":
    main()
