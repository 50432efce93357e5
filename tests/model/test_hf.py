"""Random weights through `transformers` and back: the same logits, the same greedy continuation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from frugal.errors import UserError
from frugal.model.config import AttentionConfig, LatentConfig, MoEConfig, TransformerConfig, YarnConfig
from frugal.model.generation import generate
from frugal.model.hf import export, from_hf
from frugal.model.transformer import Transformer

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {"num_experts_per_tok": 3, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
DEEPSEEK = {**SHAPE, **MOE, **LATENT, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
PEERS: dict[str, tuple[str, dict]] = {
    "deepseek_v3": ("DeepseekV3", {**DEEPSEEK, "q_lora_rank": 20, "n_group": 4, "topk_group": 2}),
    "deepseek_v3_yarn": (
        "DeepseekV3",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
        },
    ),
    "deepseek_v3_half_split": (
        "DeepseekV3",
        {**DEEPSEEK, "q_lora_rank": 20, "n_group": 1, "topk_group": 1, "rope_interleave": False},
    ),
    "deepseek_v2": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": None}),
    "deepseek_v2_groups": (
        "DeepseekV2",
        {**DEEPSEEK, "q_lora_rank": 20, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **SHAPE,
            **MOE,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "partial_rotary_factor": 1.0,
            "use_qk_norm": True,
        },
    ),
    "llama": ("Llama", {**SHAPE, "num_key_value_heads": 2}),
    "llama_yarn_tied": ("Llama", {**SHAPE, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "olmoe": ("Olmoe", {**SHAPE, "num_experts": 8, "num_experts_per_tok": 3}),
    "qwen3": ("Qwen3", {**SHAPE, "num_key_value_heads": 2, "head_dim": 12}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **SHAPE,
            **MOE,
            "num_experts": 8,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
}


def peer(name: str) -> torch.nn.Module:
    """A model of `transformers` whose every tensor is random, norms and biases too."""
    torch.manual_seed(0)
    kind, values = PEERS[name]
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values)).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "norm" in key:
                tensor.uniform_(0.5, 1.5)
            elif "bias" in key:
                tensor.normal_(std=0.1)
    return model


def assert_same(ours: Transformer, theirs: torch.nn.Module) -> None:
    torch.manual_seed(1)
    ids = torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    continued = theirs.generate(ids[:, :8], max_new_tokens=24, do_sample=False)
    assert generate(ours, ids[:, :8], 24, temperature=0).tolist() == continued.tolist()


@pytest.mark.parametrize("name", PEERS)
def test_from_hf_then_forward_and_export_then_load(name: str, tmp_path: Path) -> None:
    theirs = peer(name)
    theirs.save_pretrained(tmp_path / "theirs")
    config, state = from_hf(tmp_path / "theirs")
    ours = Transformer(config)
    ours.load_state_dict(state)
    assert_same(ours, theirs)
    written = export(config, ours.state_dict(), tmp_path / "ours")
    assert written == type(theirs).__name__
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same(ours, loaded.eval())
    again, state_again = from_hf(tmp_path / "ours")
    assert again == config and state_again.keys() == state.keys()
    assert all(torch.equal(state_again[key], state[key]) for key in state)


EMBEDDED = TransformerConfig(
    vocab_size=96,
    d_model=32,
    n_layers=3,
    d_ff=48,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2),
    moe=MoEConfig(n_experts=8, top_k=2, d_expert=16, n_shared_experts=1, first_k_dense=1),
    max_seq_len=64,
    tie_embeddings=True,
    init_std=0.2,
)
LATENT_ONLY = AttentionConfig(4, latent=LatentConfig(12, None, 6, 4, 10))


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (EMBEDDED, "Glm4MoeForCausalLM"),
        (replace(EMBEDDED, moe=MoEConfig(8, 2, 16, expert_bias=False)), "Glm4MoeForCausalLM"),
        (replace(EMBEDDED, moe=MoEConfig(8, 2, 16, 1, 32, n_group=4, topk_group=2)), "Glm4MoeForCausalLM"),
        (replace(EMBEDDED, moe=None), "LlamaForCausalLM"),
        (replace(EMBEDDED, moe=None, attention=LATENT_ONLY), "DeepseekV3ForCausalLM"),
        (
            replace(EMBEDDED, attention=replace(LATENT_ONLY, rope_scaling=YarnConfig(4.0, 16))),
            "DeepseekV3ForCausalLM",
        ),
    ],
    ids=["embedded", "no_bias_no_shared", "wide_shared_groups", "dense", "dense_latent", "latent_yarn"],
)
def test_our_shapes_find_their_architecture(config: TransformerConfig, architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Transformer(config)
    for moe in model.moe_layers().values():
        if moe.router.expert_bias is not None:
            moe.router.expert_bias.normal_(std=0.2)
    assert export(config, model.state_dict(), tmp_path) == architecture
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path).eval())


SOFTMAX = MoEConfig(8, 2, 16, score="softmax", expert_bias=False)
NORMED = AttentionConfig(4, qk_norm="head")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"moe": replace(SOFTMAX, expert_bias=True)}, r"moe\.expert_bias"),
        ({"moe": SOFTMAX}, r"attention\.qk_norm"),
        ({"moe": replace(SOFTMAX, n_shared_experts=1), "attention": NORMED}, r"moe\.n_shared_experts"),
        ({"moe": replace(SOFTMAX, routed_scaling=2), "attention": NORMED}, r"moe\.routed_scaling"),
        ({"moe": replace(SOFTMAX, n_group=4), "attention": NORMED}, None),  # one group of four: not yet
        ({"moe": SOFTMAX, "attention": LATENT_ONLY}, r"moe\.normalize_weights"),
        ({"moe": None, "attention": AttentionConfig(4, qk_norm="full")}, r"attention\.qk_norm"),
        ({"moe": MoEConfig(8, 2, 16, 1, d_shared_expert=10)}, r"moe\.d_shared_expert"),
        ({"moe": MoEConfig(8, 2, 16, n_group=2, group_score="max")}, r"moe\.group_score"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_its_key(changes: dict, key: str | None, tmp_path: Path) -> None:
    config = replace(EMBEDDED, **changes)
    with pytest.raises(UserError, match=rf"model\.transformer\.{key or r'moe.n_group'}"):
        export(config, Transformer(config).state_dict(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 4}, r"lacks the tensor model\.layers\.3"),
    ],
)
def test_what_cannot_be_read_is_refused(values: dict, expected: str, tmp_path: Path) -> None:
    peer("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UserError, match=expected):
        from_hf(tmp_path)


def damage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors")


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (damage, "damaged"),
    ],
)
def test_a_damaged_folder_is_refused(harm: Callable[[Path], object], expected: str, tmp_path: Path) -> None:
    peer("llama").save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=expected):
        from_hf(tmp_path)


def test_large_models_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    whole = huggingface_hub.save_torch_state_dict
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", lambda t, f: whole(t, f, max_shard_size="50KB"))
    model = Transformer(EMBEDDED)
    export(EMBEDDED, model.state_dict(), tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    _, state = from_hf(tmp_path)
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="holds a model already"):
        export(EMBEDDED, model.state_dict(), tmp_path)
