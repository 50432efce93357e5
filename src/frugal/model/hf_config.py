"""Our shapes as Hugging Face configs, and back. What has no counterpart is refused by the name of its key."""

from __future__ import annotations

from typing import Any

from frugal.errors import UserError
from frugal.model.config import AttentionConfig, LatentConfig, MoEConfig, TransformerConfig, YarnConfig

# model_type of `transformers` -> its class with a language-model head.
CLASSES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",  # latent attention, softmax router
    "deepseek_v3": "DeepseekV3ForCausalLM",  # latent attention, sigmoid router or dense
    "glm4_moe": "Glm4MoeForCausalLM",  # grouped-query attention, sigmoid router with bias, shared experts
    "llama": "LlamaForCausalLM",  # grouped-query attention, dense
    "olmoe": "OlmoeForCausalLM",  # full QK-norm, softmax router
    "qwen3": "Qwen3ForCausalLM",  # QK-norm per head, dense
    "qwen3_moe": "Qwen3MoeForCausalLM",  # QK-norm per head, softmax router
}


def _refuse_unless(condition: bool, key: str, why: str) -> None:
    if not condition:
        raise UserError(f"model.transformer.{key}: {why}, so that no Hugging Face architecture fits")


def hf_architecture(config: TransformerConfig) -> str:
    """The model_type that computes the same function.

    Raises:
        UserError: there is none; the message names the key that stands in the way.
    """
    attention, moe = config.attention, config.moe
    _refuse_unless(config.ngrams is None, "ngrams", "embeddings of n-grams")
    if moe is None or config.n_moe_layers == 0:
        if attention.latent:
            return "deepseek_v3"
        _refuse_unless(attention.qk_norm != "full", "attention.qk_norm", "full beside a dense feed-forward")
        return "llama" if attention.qk_norm == "none" else "qwen3"
    grouped = moe.topk_group < moe.n_group
    if moe.score == "sigmoid":
        _refuse_unless(not grouped or moe.group_score == "top2", "moe.group_score", "max with sigmoid scores")
        _refuse_unless(
            moe.shared_width % moe.d_expert == 0, "moe.d_shared_expert", "shared width is no multiple of d_expert"
        )
        _refuse_unless(attention.qk_norm != "full", "attention.qk_norm", "full beside a sigmoid router")
        return "deepseek_v3" if attention.latent else "glm4_moe"
    _refuse_unless(not moe.expert_bias, "moe.expert_bias", "a balancing bias on a softmax router")
    if attention.latent:
        _refuse_unless(not grouped or moe.group_score == "max", "moe.group_score", "top2 with softmax scores")
        _refuse_unless(not moe.normalize_weights, "moe.normalize_weights", "latent attention with a normalised softmax")
        _refuse_unless(
            moe.shared_width % moe.d_expert == 0, "moe.d_shared_expert", "shared width is no multiple of d_expert"
        )
        return "deepseek_v2"
    _refuse_unless(not grouped, "moe.n_group", "groups beside grouped-query attention and a softmax router")
    _refuse_unless(moe.shared_width == 0, "moe.n_shared_experts", "shared experts beside a softmax router")
    _refuse_unless(moe.routed_scaling == 1, "moe.routed_scaling", "a factor other than 1 on a softmax router")
    _refuse_unless(attention.qk_norm != "none", "attention.qk_norm", "none beside a softmax router")
    if attention.qk_norm == "head":
        return "qwen3_moe"
    _refuse_unless(moe.first_k_dense == 0, "moe.first_k_dense", "dense layers beside full QK-norm")
    same_width = config.head_dim * attention.n_heads == config.d_model
    _refuse_unless(same_width, "attention.head_dim", "heads that do not add up to d_model beside full QK-norm")
    return "olmoe"


def to_hf_config(config: TransformerConfig) -> dict[str, Any]:
    """The content of `config.json`; token ids are left out (null) for the caller to fill in."""
    kind = hf_architecture(config)
    attention, moe, latent, yarn = config.attention, config.moe, config.attention.latent, config.attention.rope_scaling
    values: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "rope_theta": attention.rope_theta,
        "rope_scaling": _yarn_to_hf(yarn) if yarn else None,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if latent:
        names = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        values |= {name: getattr(latent, name) for name in names}
    elif kind != "olmoe":  # its heads always add up to the hidden size
        values["head_dim"] = config.head_dim
    if kind == "deepseek_v3":
        values |= {"rope_interleave": True, "num_nextn_predict_layers": 0}
    if kind == "glm4_moe":
        values |= {
            "partial_rotary_factor": 1.0,
            "use_qk_norm": attention.qk_norm == "head",
            "num_nextn_predict_layers": 0,
        }
    if moe is None or config.n_moe_layers == 0:
        return values | ({"first_k_dense_replace": config.n_layers} if latent else {})
    values |= {"num_experts_per_tok": moe.top_k, "norm_topk_prob": moe.normalize_weights}
    if kind == "olmoe":
        return values | {"num_experts": moe.n_experts, "intermediate_size": moe.d_expert, "clip_qkv": None}
    values["moe_intermediate_size"] = moe.d_expert
    if kind == "qwen3_moe":
        dense = list(range(moe.first_k_dense))
        return values | {"num_experts": moe.n_experts, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    values |= {
        "n_routed_experts": moe.n_experts,
        "n_shared_experts": moe.shared_width // moe.d_expert,
        "first_k_dense_replace": moe.first_k_dense,
        "routed_scaling_factor": moe.routed_scaling,
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
    }
    if kind == "deepseek_v2":
        values["topk_method"] = "group_limited_greedy" if moe.topk_group < moe.n_group else "greedy"
    return values


def _yarn_to_hf(yarn: YarnConfig) -> dict[str, Any]:
    optional = {
        "mscale": yarn.mscale or None,
        "mscale_all_dim": yarn.mscale_all_dim or None,
        "attention_factor": yarn.attention_factor,
    }
    return {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_seq_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        **{name: value for name, value in optional.items() if value is not None},
    }


def from_hf_config(values: Any) -> TransformerConfig:
    """Our shape of a `transformers` config object.

    Raises:
        UserError: another architecture, or an option of this one that our model lacks; it names the option.
    """
    kind = values.model_type
    if kind not in CLASSES:
        raise UserError(f"config.json: model_type {kind!r} is none of {', '.join(sorted(CLASSES))}")
    for option, neutral in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("clip_qkv", None),
        ("use_sliding_window", False),
        ("decoder_sparse_step", 1),
        ("quantization_config", None),
    ):
        if (found := getattr(values, option, neutral)) != neutral:
            raise UserError(f"config.json: {option} is {found!r}; only {neutral!r} can be read")
    latent = None
    if kind in ("deepseek_v2", "deepseek_v3"):
        names = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        latent = LatentConfig(**{name: getattr(values, name) for name in names})
    qk_norm = {"olmoe": "full", "qwen3": "head", "qwen3_moe": "head"}.get(kind, "none")
    if getattr(values, "use_qk_norm", False):
        qk_norm = "head"
    rope = dict(values.rope_parameters)
    return TransformerConfig(
        vocab_size=values.vocab_size,
        d_model=values.hidden_size,
        n_layers=values.num_hidden_layers,
        d_ff=values.intermediate_size,
        attention=AttentionConfig(
            n_heads=values.num_attention_heads,
            n_kv_heads=None if latent else values.num_key_value_heads,
            head_dim=None if latent else getattr(values, "head_dim", None),
            qk_norm=qk_norm,  # type: ignore[arg-type]
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_yarn_from_hf(rope),
            latent=latent,
        ),
        moe=_moe_from_hf(values, kind),
        max_seq_len=values.max_position_embeddings,
        tie_embeddings=values.tie_word_embeddings,
        norm_eps=values.rms_norm_eps,
        init_std=values.initializer_range,
    )


def _yarn_from_hf(rope: dict[str, Any]) -> YarnConfig | None:
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"config.json: partial_rotary_factor is {rope['partial_rotary_factor']}; only 1.0 can be read")
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "yarn" or not rope.get("truncate", True):
        raise UserError(f"config.json: rope_parameters of type {kind!r}; only default and yarn can be read")
    return YarnConfig(
        factor=float(rope["factor"]),
        original_max_seq_len=rope["original_max_position_embeddings"],
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(rope.get("mscale") or 0),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
        attention_factor=rope.get("attention_factor"),
    )


def _moe_from_hf(values: Any, kind: str) -> MoEConfig | None:
    if kind in ("llama", "qwen3"):
        return None
    if kind in ("olmoe", "qwen3_moe"):
        dense = list(getattr(values, "mlp_only_layers", None) or [])
        if dense != list(range(len(dense))):
            raise UserError(f"config.json: mlp_only_layers is {dense}; only the first layers can be dense")
        return MoEConfig(
            n_experts=values.num_experts,
            top_k=values.num_experts_per_tok,
            d_expert=values.intermediate_size if kind == "olmoe" else values.moe_intermediate_size,
            first_k_dense=len(dense),
            score="softmax",
            normalize_weights=values.norm_topk_prob,
            expert_bias=False,
        )
    if values.first_k_dense_replace >= values.num_hidden_layers:
        return None
    v2 = kind == "deepseek_v2"
    grouped = not v2 or values.topk_method == "group_limited_greedy"
    return MoEConfig(
        n_experts=values.n_routed_experts,
        top_k=values.num_experts_per_tok,
        d_expert=values.moe_intermediate_size,
        n_shared_experts=values.n_shared_experts or 0,
        first_k_dense=values.first_k_dense_replace,
        score="softmax" if v2 else "sigmoid",
        normalize_weights=False if v2 else values.norm_topk_prob,  # transformers' DeepSeek-V2 never normalises
        routed_scaling=values.routed_scaling_factor,
        expert_bias=not v2,
        n_group=(values.n_group or 1) if grouped else 1,
        topk_group=(values.topk_group or 1) if grouped else 1,
        group_score="max" if v2 else "top2",
    )
