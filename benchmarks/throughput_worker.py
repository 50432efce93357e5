"""One contender in a process of its own; started by `throughput.py`, which writes `go` and reads lines of JSON."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.contenders import CONTENDERS, FORMATS, shape_for

from frugal.cli.memory import keep_freed_memory
from frugal.training.optim import build_optimizer, parameter_groups


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_tflops(device: str, seconds: float = 1.0) -> dict[str, float]:
    """Best speed of a large square product: torch's own, and on a CPU oneDNN's as well."""
    size, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products: dict[str, Any] = {"torch.mm": lambda: a @ b.t()}
    if device == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    best = {}
    for name, product in products.items():
        times, end = [], time.perf_counter() + seconds
        product()
        while time.perf_counter() < end:
            synchronize(device)
            start = time.perf_counter()
            product()
            synchronize(device)
            times.append(time.perf_counter() - start)
        best[name] = 2 * size**3 / statistics.median(times) / 1e12
    return best


def resident_gib(key: str) -> float:
    """VmRSS or VmHWM of this process."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = next(x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith(key))
    return int(line.split()[1]) / 2**20


def answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def main() -> None:
    name, device, n_experts, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) or None, int(sys.argv[4])
    keep_freed_memory()
    if name == "matmul":
        answer(ready=True)
        for _ in sys.stdin:
            answer(peak=matmul_tflops(device))
        return
    torch.manual_seed(0)
    shape = shape_for(device, n_experts)
    number = name.split(", ")[-1]
    if device == "cuda" and number != "float32":
        torch.set_float32_matmul_precision("high")
    half = device == "cuda" and number not in ("float32", "tf32")
    dtype = torch.float16 if number == "float16" else torch.bfloat16  # without a scaler: for the speed alone
    baseline = resident_gib("VmRSS")
    with torch.device(device):
        model, loss, *rest = (CONTENDERS | FORMATS)[name](shape)
    for prepare in rest:
        if prepare:
            prepare()
    model.train()
    optimizer = build_optimizer(partial(torch.optim.AdamW, fused=True), parameter_groups(model))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, shape.config.vocab_size, (shape.batch_size, shape.seq_len + 1), generator=generator)
    ids, labels = tokens[:, :-1].to(device), tokens[:, 1:].contiguous().to(device)

    def step() -> None:
        with torch.autocast(device, dtype=dtype, enabled=half):
            value = loss(ids, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far includes compilation
    answer(ready=True, parameters=sum(p.numel() for p in model.parameters()))
    for _ in sys.stdin:
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            synchronize(device)
            times.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else resident_gib("VmHWM") - baseline
        answer(seconds=statistics.median(times), memory_gib=peak)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # whatever it is, the table should name it and go on
        answer(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
