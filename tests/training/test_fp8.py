"""Float8 maps: which modules become one, what they compute (emulated here), and where they are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from frugal.errors import UserError
from frugal.model.config import AttentionConfig, LatentConfig, MoEConfig, TransformerConfig
from frugal.model.generation import generate
from frugal.model.hf_model import HFModel, hf_config
from frugal.model.transformer import Transformer
from frugal.training.fp8 import Float8, convert_to_float8, converted_modules, require_float8

pytest.importorskip("torchao")
Train = Callable[..., Path]
CONFIG = TransformerConfig(
    vocab_size=64, max_seq_len=32, d_model=32, n_layers=2, d_ff=48, attention=AttentionConfig(n_heads=2),
    moe=MoEConfig(n_experts=4, top_k=2, d_expert=16, n_shared_experts=1, first_k_dense=1), tie_embeddings=True,
)  # fmt: skip
ATTENTION = ("wq", "wk", "wv", "wo")
IDS = torch.arange(32).view(2, 16)


def test_attention_dense_and_shared_maps_are_converted_and_nothing_else() -> None:
    expected = [f"blocks.{layer}.attention.{name}" for layer in (0, 1) for name in ATTENTION]
    expected += [f"blocks.0.ffn.{name}" for name in ("w1", "w2", "w3")]
    expected += [f"blocks.1.ffn.shared_experts.{name}" for name in ("w1", "w2", "w3")]
    model = Transformer(CONFIG)
    before = dict(model.named_parameters(remove_duplicate=False))
    assert sorted(converted_modules(model)) == sorted(expected)
    assert sorted(convert_to_float8(model, Float8(emulate=True))) == sorted(expected)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert type(model.head).__name__ == "Linear" and type(model.blocks[1].ffn.router).__name__ == "Router"
    assert not any("ffn.w" in name for name in converted_modules(Transformer(replace(CONFIG, d_ff=40))))  # not by 16


def test_of_a_transformers_model_the_head_and_the_gates_stay() -> None:
    values = {"model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 16, "num_experts": 4,
              "num_experts_per_tok": 2, "vocab_size": 64, "max_position_embeddings": 32}  # fmt: skip
    names = converted_modules(HFModel(hf_config(values)))
    assert sorted(names) == [f"lm.model.layers.0.self_attn.{x}_proj" for x in "koqv"]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_products_are_those_of_rounded_operands(recipe: str) -> None:
    """E4M3 has 3 bits behind the point, E5M2 two: relative errors up to 1/16 and 1/8 an operand, less in a sum."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 48, bias=False))
    rounded = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 48, bias=False))
    rounded.load_state_dict(plain.state_dict())
    assert convert_to_float8(rounded, Float8(recipe, emulate=True)) == ["0", "1"]  # type: ignore[arg-type]
    x, grad = torch.randn(128, 64), torch.randn(128, 48)
    for model in (plain, rounded):
        model(x).backward(grad)

    def error(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).detach().norm() / one.detach().norm())

    assert 0.005 < error(plain(x), rounded(x)) < 0.08
    for ours, theirs in zip(plain.parameters(), rounded.parameters(), strict=True):
        assert 0.005 < error(ours.grad, theirs.grad) < 0.12  # type: ignore[arg-type]


def test_latent_attention_decodes_with_a_converted_matrix() -> None:
    latent = AttentionConfig(n_heads=2, latent=LatentConfig(16, 16, 16, 16, 16))
    model = Transformer(replace(CONFIG, attention=latent)).eval()
    assert "blocks.0.attention.wkv_up" in convert_to_float8(model, Float8(emulate=True))
    assert generate(model, IDS[:1, :4], 8, 0.0).shape == (1, 12)


def test_what_a_machine_or_run_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, wanted = torch.device("cuda"), Float8()
    with pytest.raises(UserError, match=r"model\.fp8: needs a CUDA device of compute capability 8\.9, not cpu"):
        require_float8(wanted, "bf16-mixed", torch.device("cpu"))
    require_float8(Float8(emulate=True), "32-true", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, precision, said in (
        ((8, 0), "bf16-mixed", "NVIDIA A100 has compute capability 8.0, float8 needs 8.9"),
        ((9, 0), "16-mixed", "needs trainer.precision bf16-mixed or bf16-true, not 16-mixed"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(UserError, match=said):
            require_float8(wanted, precision, cuda)
    require_float8(wanted, "bf16-true", cuda)
    with pytest.raises(UserError, match="no matrix to convert"):
        convert_to_float8(nn.Linear(5, 7), Float8(emulate=True))


def test_an_emulated_run_resumes_exactly_and_exports_plain_weights(
    resumes_exactly: Callable[..., tuple[Path, Path]], train: Train, capsys: pytest.CaptureFixture
) -> None:
    whole, _ = resumes_exactly("--model.fp8.emulate", "true", "--trainer.precision", "bf16-mixed")
    plain = train("fit", "--run.name", "plain", "--trainer.precision", "bf16-mixed")
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (whole, plain)]
    assert states[0].keys() == states[1].keys()
    name = "model.blocks.0.attention.wq.weight"
    assert not torch.equal(states[0][name], states[1][name])
    torch.testing.assert_close(states[0][name], states[1][name], rtol=0.1, atol=0.02)
    for options, said in (
        ((), "model.fp8: needs a CUDA device of compute capability 8.9, not cpu"),
        (("--model.fp8.emulate", "true", "--freezing.prefix.layers", "1"), "freezing: not with model.fp8"),
        (("--model.lora.rank", "2"), "model.fp8: not with model.lora"),
    ):
        with pytest.raises(SystemExit):
            train("fit", "--model.fp8.recipe", "tensorwise", *options)
        assert said in (error := capsys.readouterr().err) and "Traceback" not in error
