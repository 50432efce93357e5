"""`model.compile`: the same numbers, and one line where it cannot work."""

import pytest
import torch

from frugal.errors import UserError
from frugal.model.config import AttentionConfig, MoEConfig, TransformerConfig
from frugal.model.transformer import Transformer
from frugal.schedule import WarmupStableDecay
from frugal.training.compilation import compile_blocks, require_compiler
from frugal.training.language_model import LanguageModel
from frugal.training.losses import summed_nll

CONFIG = TransformerConfig(
    vocab_size=32,
    d_model=16,
    n_layers=3,
    d_ff=24,
    attention=AttentionConfig(n_heads=2),
    moe=MoEConfig(n_experts=4, top_k=2, d_expert=8, n_shared_experts=1, first_k_dense=1),
    max_seq_len=12,
    init_std=0.3,
)


def test_a_cpu_without_a_compiler_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"^model\.compile: .*C\+\+ compiler.*install g\+\+"):
        require_compiler("cpu")
    require_compiler("cuda")


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_gradients_and_loads_equal_eager_ones(frozen: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    model.blocks[0].requires_grad_(not frozen)
    model.embedding.requires_grad_(not frozen)
    model.train()
    ids, labels = torch.randint(0, 32, (2, 4, 12))
    results = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(model, fullgraph=True)
        model.zero_grad()
        for moe in model.moe_layers().values():
            moe.load.zero_()
        loss = summed_nll(model.hidden(ids), model.head.weight, labels) / labels.numel()
        loss.backward()
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        results.append((loss.detach(), grads, [moe.load.tolist() for moe in model.moe_layers().values()]))
    (loss, grads, loads), (compiled_loss, compiled_grads, compiled_loads) = results
    torch.testing.assert_close(compiled_loss, loss)
    assert compiled_loads == loads and sum(loads[0]) == 4 * 12 * 2
    for name, grad in grads.items():
        torch.testing.assert_close(compiled_grads[name], grad, atol=1e-5, rtol=1e-5)
    assert (grads["blocks.0.ffn.w1.weight"] is None) == frozen


def test_the_module_checks_before_any_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^model\.compile: "):
        LanguageModel(CONFIG, torch.optim.AdamW, WarmupStableDecay(), compile=True)


@pytest.mark.slow
def test_generation_with_a_cache_leaves_the_compiled_graphs_alone() -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    ids = torch.randint(0, 32, (2, 12))
    with torch.no_grad():
        expected = model(ids)
        compile_blocks(model, fullgraph=True)
        caches = model.new_caches(2, 12)
        steps = [model(ids[:, i : i + 1], caches) for i in range(12)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
