"""The experts on every path of this machine against a plain loop over experts: outputs and all gradients.

    python benchmarks/check_paths.py OUT

Writes OUT/paths.md: per type of number, eager and compiled, the largest difference relative to the largest value of
the loop in float64. Exit code 1 if one exceeds what its type can do. A CPU runs the types that a CPU has.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from frugal.model.config import AttentionConfig, MoEConfig, TransformerConfig
from frugal.model.moe import MoE

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def loop(moe: MoE, x_TD: Tensor, experts_TK: Tensor) -> Tensor:
    """The oracle, with the choice of experts given (rounding must not change it)."""
    scores = F.linear(x_TD, moe.router.weight).sigmoid().gather(1, experts_TK)
    weights = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    out = torch.zeros_like(x_TD)
    for expert in range(moe.experts.w13.shape[0]):
        for slot in range(experts_TK.shape[1]):
            rows = (experts_TK[:, slot] == expert).nonzero().flatten()
            gate, up = (x_TD[rows] @ moe.experts.w13[expert].T).chunk(2, dim=1)
            y = (F.silu(gate) * up) @ moe.experts.w2[expert].T
            out = out.index_add(0, rows, y * weights[rows, slot].unsqueeze(1))
    return out


def run(moe: MoE, x: Tensor, upstream: Tensor, dtype: torch.dtype, compiled: bool) -> dict[str, Tensor]:
    """Output and gradients of the mixture under autocast."""
    moe.zero_grad()
    x = x.clone().requires_grad_()
    function = torch.compile(moe, fullgraph=True) if compiled else moe
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
        out = function(x)
    out.backward(upstream.to(out.dtype))
    assert x.grad is not None
    return {"output": out, "input": x.grad, **{name: p.grad for name, p in moe.named_parameters()}}  # type: ignore


def main(out: str) -> int:
    """Check every type, eager and compiled."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    mixture = MoEConfig(n_experts=16, top_k=2, d_expert=64)
    config = TransformerConfig(128, 1, 64, AttentionConfig(n_heads=4), mixture, vocab_size=64)
    moe = MoE(config).to(device)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, upstream = torch.randn(2, 512, 128, device=device), torch.randn(2, 512, 128, device=device)
    experts_TK = moe.router.choose(moe.router.logits(x.flatten(0, 1))).experts_TK
    exact, x64 = MoE(config).to(device).double(), x.double().requires_grad_()
    exact.load_state_dict({name: value.double() for name, value in moe.state_dict().items()})
    out64 = loop(exact, x64.flatten(0, 1), experts_TK).view_as(x64)
    out64.backward(upstream.double())
    expected = {"output": out64, "input": x64.grad, **{name: p.grad for name, p in exact.named_parameters()}}
    rows, failed = (
        ["| type | compiled | largest relative difference | where | verdict |", "|---|---|---|---|---|"],
        False,
    )
    for dtype in TOLERANCE if device == "cuda" else (torch.float32, torch.bfloat16):
        for compiled in (False, True):
            try:
                got = run(moe, x, upstream, dtype, compiled)
                worst = {k: float((got[k].double() - v).abs().max() / v.abs().max()) for k, v in expected.items()}
                where = max(worst, key=worst.__getitem__)
                good = worst[where] <= TOLERANCE[dtype]
                rows.append(f"| {dtype} | {compiled} | {worst[where]:.1e} | {where} | {'ok' if good else 'WRONG'} |")
            except Exception as error:
                good = False
                rows.append(f"| {dtype} | {compiled} | | | {type(error).__name__}: {str(error).splitlines()[0]} |")
            failed |= not good
            print(rows[-1], flush=True)
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "paths.md").write_text("\n".join([f"{device}, torch {torch.__version__}\n", *rows]) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
