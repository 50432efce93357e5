"""How the embedded default was chosen: shapes and learning rates at a fixed budget of FLOPs, results in LOG.md.

    python benchmarks/default_sweep.py '{"d_model": 128, "d_ff": 352, "d_expert": 96, "lr": 0.003}' '{...}' ...

Each argument is one variant, as changes to DEFAULT. Variants run two at a time with one thread each (on two cores that
is faster than one after the other with two) in a plain loop over the project's own parts: the same model, data order,
loss, optimizer and balancing as `train.py`, without Lightning. One JSON line per variant goes to stdout.
"""

import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

DEFAULT = {
    "vocab_size": 2048,
    "d_model": 192,
    "n_layers": 4,
    "d_ff": 512,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_experts": 16,
    "top_k": 2,
    "d_expert": 128,
    "init_std": 0.02,
    "seq_len": 256,
    "batch_size": 8,
    "lr": 3e-3,
    "weight_decay": 0.1,
    "warmup_fraction": 0.03,
    "decay_fraction": 0.5,
    "bias_rate": 3e-3,
    "budget": 1.1e13,  # FLOPs
    "seed": 0,
}


def run(changes: dict) -> dict:
    """Train one variant and validate it on the whole held-out text."""
    import torch
    import torch.nn.functional as F

    from frugal.callbacks.expert_bias import updated_bias
    from frugal.callbacks.routing import load_metrics
    from frugal.cli.memory import keep_freed_memory
    from frugal.data.batches import EvaluationSequences, TrainingSequences
    from frugal.data.packing import prepare
    from frugal.data.sources import KingJames
    from frugal.data.tokenization import TokenizerConfig
    from frugal.model.config import AttentionConfig, MoEConfig, TransformerConfig, count_parameters, flops_per_token
    from frugal.model.transformer import Transformer
    from frugal.schedule import WarmupStableDecay
    from frugal.training.optim import build_optimizer, parameter_groups

    keep_freed_memory()
    torch.set_num_threads(1)
    v = {**DEFAULT, **changes}
    torch.manual_seed(v["seed"])
    moe = MoEConfig(v["n_experts"], v["top_k"], v["d_expert"], n_shared_experts=1, first_k_dense=1)
    attention = AttentionConfig(v["n_heads"], v["n_kv_heads"])
    config = TransformerConfig(
        v["vocab_size"],
        v["d_model"],
        v["n_layers"],
        v["d_ff"],
        attention,
        moe,
        v["seq_len"],
        True,
        init_std=v["init_std"],
    )
    model = Transformer(config)
    flops = flops_per_token(config, v["seq_len"]).training
    steps = int(v["budget"] / flops / (v["batch_size"] * v["seq_len"]))
    schedule = WarmupStableDecay(int(steps * v["warmup_fraction"]), v["decay_fraction"])
    adamw = partial(torch.optim.AdamW, lr=v["lr"], betas=(0.9, 0.95), weight_decay=v["weight_decay"], fused=True)
    optimizer = build_optimizer(adamw, parameter_groups(model))
    prepared = prepare(KingJames(), TokenizerConfig(v["vocab_size"]), 0.05, ".cache")
    data = TrainingSequences(prepared.train, v["seq_len"], v["seed"])
    loads = []
    start = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = v["lr"] * schedule.factor(step, steps)
        batch = data.__getitems__(list(range(step * v["batch_size"], (step + 1) * v["batch_size"])))
        loss = F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for layer in model.moe_layers().values():
            layer.router.expert_bias.copy_(updated_bias(layer.router.expert_bias, layer.load, v["bias_rate"]))
        loads = [*loads[-9:], torch.stack([layer.load.clone() for layer in model.moe_layers().values()])]
        for layer in model.moe_layers().values():
            layer.load.zero_()
    seconds = time.process_time() - start
    held_out = EvaluationSequences(prepared.val, 256)
    nats = 0.0
    model.eval()
    with torch.no_grad():
        for first in range(0, len(held_out), 16):
            batch = held_out.__getitems__(list(range(first, min(first + 16, len(held_out)))))
            logits = model(batch["input_ids"]).flatten(0, 1)
            nats += F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=-100, reduction="sum").item()
    counts = count_parameters(config)
    tokens = steps * v["batch_size"] * v["seq_len"]
    return {
        "changes": changes,
        "val_bits_per_byte": round(nats / prepared.val_bytes / math.log(2), 4),
        "steps": steps,
        "tokens": tokens,
        "tokens_per_cpu_second": round(tokens / seconds),
        "max_violation": round(load_metrics(sum(loads))["max_violation"], 2),
        "active": counts.active,
        "total": counts.total,
    }


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(run(json.loads(sys.argv[2]))), flush=True)
    else:
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(lambda v: subprocess.run([sys.executable, __file__, "--one", v], check=True), sys.argv[1:]))
