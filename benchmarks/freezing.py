"""What freezing saves of a training step: seconds, FLOPs and optimizer state, side by side in one process.

    python benchmarks/freezing.py OUT [--rounds 7] [--d_model 256] [--layers 8] [--threads 2]

Writes OUT/freezing.md. Every arm is a model of its own with the same seed; a round times one step of each arm in turn,
so that a busy machine slows all alike, and the median over the rounds counts. A step is forward, backward, clipping and
fused AdamW. The FLOPs are counted from the config (tests hold them against PyTorch's own counter).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from frugal.model.config import AttentionConfig, Frozen, MoEConfig, TransformerConfig, flops_per_token
from frugal.model.transformer import Transformer
from frugal.training.freezing import EMBEDDING, HEAD, Window, frozen_names
from frugal.training.losses import summed_nll


@dataclass
class Arm:
    """A model with one pattern of frozen parameters, ready to take steps."""

    config: TransformerConfig
    window: Window | None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = Transformer(self.config)
        self.model.train()
        named = dict(self.model.named_parameters(remove_duplicate=False))
        windows = [self.window] if self.window else []
        self.frozen = Frozen(frozen_names(0, windows, list(named), self.config.n_layers))
        for name, p in named.items():
            if name in self.frozen.names and not (self.config.tie_embeddings and name == EMBEDDING):
                p.requires_grad_(False)
        if self.config.tie_embeddings and EMBEDDING in self.frozen.names and HEAD not in self.frozen.names:
            self.model.embedding.register_forward_hook(lambda module, args, out: out.detach())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        self.seconds: list[float] = []

    def step(self, ids: torch.Tensor) -> None:
        """One training step, timed."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        (summed_nll(self.model.hidden(ids), self.model.head.weight, ids) / ids.numel()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    @property
    def state_bytes(self) -> int:
        """Of the optimizer's moments."""
        return sum(s[key].nbytes for s in self.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))


def main() -> None:
    """Time all arms and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, value in (("rounds", 7), ("d_model", 256), ("layers", 8), ("batch", 4), ("seq_len", 256), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TransformerConfig(
        vocab_size=2048,
        d_model=args.d_model,
        n_layers=args.layers,
        d_ff=4 * args.d_model,
        attention=AttentionConfig(n_heads=8, n_kv_heads=4),
        moe=MoEConfig(n_experts=8, top_k=2, d_expert=args.d_model, n_shared_experts=1, first_k_dense=1),
        max_seq_len=args.seq_len,
    )
    tied, half = replace(config, tie_embeddings=True), tuple(range(args.layers // 2))
    others = ("embedding", "head", "norm", "*attention*", "*ffn_norm", "*router", "*shared_experts", "blocks.0.ffn")
    arms = {
        "nothing frozen": Arm(config, None),
        "prefix: lower half and embedding": Arm(config, Window(layers=half, embedding=True)),
        "prefix: lower half, embedding trains": Arm(config, Window(layers=half)),
        "suffix: upper half": Arm(config, Window(layers=tuple(i + len(half) for i in half))),
        "alternate: every other layer": Arm(config, Window(layers=tuple(range(0, args.layers, 2)))),
        "routed experts only train": Arm(config, Window(parameters=others)),
        "tied, nothing frozen": Arm(tied, None),
        "tied, lower half and the look-up": Arm(tied, Window(layers=half, embedding=True)),
        "tied, lower half, embedding trains": Arm(tied, Window(layers=half)),
    }
    generator = torch.Generator().manual_seed(0)
    for number in range(args.rounds + 1):
        ids = torch.randint(0, config.vocab_size, (args.batch, args.seq_len), generator=generator)
        for arm in arms.values():
            arm.step(ids)
            if number == 0:
                arm.seconds.clear()  # the first step warms up
    lines = [
        f"Width {args.d_model}, {args.layers} layers, {args.batch} x {args.seq_len} tokens a step, "
        f"{args.threads} threads, torch {torch.__version__}; medians of {args.rounds} interleaved rounds.",
        "",
        "| frozen | ms a step | of the full step | FLOPs, of the full step | optimizer state, MB |",
        "|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        full = arms["tied, nothing frozen" if arm.config.tie_embeddings else "nothing frozen"]
        ratio = statistics.median(a / b for a, b in zip(arm.seconds, full.seconds, strict=True))
        flops = flops_per_token(arm.config, args.seq_len, arm.frozen).training
        flops /= flops_per_token(arm.config, args.seq_len).training
        ms = 1000 * statistics.median(arm.seconds)
        lines.append(f"| {name} | {ms:.0f} | {ratio:.2f} | {flops:.2f} | {arm.state_bytes / 1e6:.1f} |")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "freezing.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
