"""Weights to and from Hugging Face `transformers`, as a folder of `config.json` and safetensors.

Every architecture we match uses the same names for the same tensors and stores one tensor per expert on disk, so one
map serves all. DeepSeek interleaves its rotary dimensions: the rows of those projections are permuted on the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.errors import UserError
from frugal.model.config import TransformerConfig
from frugal.model.hf_config import from_hf_config, hf_architecture, to_hf_config
from frugal.model.sharing import without_sharing

ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}
LATENT_ATTENTION = {
    "wq": "q_proj",
    "wq_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_up": "q_b_proj",
    "wkv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_up": "kv_b_proj",
    "wo": "o_proj",
}
FEED_FORWARD = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def _names(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """Pairs (ours, theirs) of every tensor that is the same in both, apart from the routed experts."""
    yield "embedding.weight", "model.embed_tokens.weight"
    yield "norm.weight", "model.norm.weight"
    if not config.tie_embeddings:
        yield "head.weight", "lm_head.weight"
    attention, latent = config.attention, config.attention.latent
    projections = dict(LATENT_ATTENTION if latent else ATTENTION)
    unused: tuple[str, ...]
    if latent:
        unused = ("wq_down", "q_norm", "wq_up") if latent.q_lora_rank is None else ("wq",)
    else:
        unused = ("q_norm", "k_norm") if attention.qk_norm == "none" else ()
    for name in unused:
        del projections[name]
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        yield f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"
        yield f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight"
        for a, b in projections.items():
            yield f"{ours}.attention.{a}.weight", f"{theirs}.self_attn.{b}.weight"
        moe = config.moe if config.moe and layer >= config.moe.first_k_dense else None
        if moe is None:
            for a, b in FEED_FORWARD.items():
                yield f"{ours}.ffn.{a}.weight", f"{theirs}.mlp.{b}.weight"
            continue
        yield f"{ours}.ffn.router.weight", f"{theirs}.mlp.gate.weight"
        if moe.expert_bias:
            yield f"{ours}.ffn.router.expert_bias", f"{theirs}.mlp.gate.e_score_correction_bias"
        if moe.shared_width:
            for a, b in FEED_FORWARD.items():
                yield f"{ours}.ffn.shared_experts.{a}.weight", f"{theirs}.mlp.shared_experts.{b}.weight"


def _moe_layers(config: TransformerConfig) -> range:
    return range(config.n_layers - config.n_moe_layers, config.n_layers)


def _permute_rotary(config: TransformerConfig, state: dict[str, Tensor], to_interleaved: bool) -> None:
    """Reorder the rotary rows of latent attention's projections in place, from half-split to interleaved or back."""
    latent = config.attention.latent
    assert latent is not None
    dim = latent.qk_rope_head_dim
    order = torch.arange(dim).view(2, -1).t().flatten()  # 0, P/2, 1, P/2 + 1, ...
    order = order if to_interleaved else order.argsort()
    query = "wq" if latent.q_lora_rank is None else "wq_up"
    for layer in range(config.n_layers):
        for name, heads in ((query, config.attention.n_heads), ("wkv_down", 1)):
            key = f"blocks.{layer}.attention.{name}.weight"
            rows = state[key].unflatten(0, (heads, -1))
            kept, rotary = rows[:, :-dim], rows[:, -dim:]
            state[key] = torch.cat((kept, rotary[:, order]), dim=1).flatten(0, 1)


def to_hf(config: TransformerConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reorder a Transformer's state_dict for the architecture that `hf_architecture` names.

    Shared blocks are written out as copies, their layers' low-rank corrections added in.
    """
    kind = hf_architecture(config)
    ours = without_sharing(state) if config.sharing else dict(state)
    if config.attention.latent:
        _permute_rotary(config, ours, to_interleaved=True)
    theirs = {name_theirs: ours[name_ours] for name_ours, name_theirs in _names(config)}
    for layer in _moe_layers(config):
        assert config.moe is not None
        mlp = f"model.layers.{layer}.mlp"
        if kind in ("deepseek_v3", "glm4_moe") and not config.moe.expert_bias:
            theirs[f"{mlp}.gate.e_score_correction_bias"] = torch.zeros(config.moe.n_experts)
        w13_EHD, w2_EDI = (ours[f"blocks.{layer}.ffn.experts.{name}"] for name in ("w13", "w2"))
        for expert, (w13_HD, w2_DI) in enumerate(zip(w13_EHD, w2_EDI, strict=True)):
            gate_ID, up_ID = w13_HD.chunk(2)
            for name, weight in (("gate_proj", gate_ID), ("up_proj", up_ID), ("down_proj", w2_DI)):
                theirs[f"{mlp}.experts.{expert}.{name}.weight"] = weight.clone()  # a file holds no views
    return {name: tensor.detach().contiguous() for name, tensor in theirs.items()}


def export(
    config: TransformerConfig, state: Mapping[str, Tensor], folder: Path, eos_token_id: int | None = None
) -> str:
    """Write `config.json` and safetensors that AutoModelForCausalLM loads; returns the architecture's class name.

    Args:
        state: a Transformer's state_dict.
        eos_token_id: token at which generation ends.

    Raises:
        UserError: the folder holds a model already, or no Hugging Face architecture computes this model.
    """
    from huggingface_hub import save_torch_state_dict

    values = to_hf_config(config) | {"eos_token_id": eos_token_id}
    if (folder / "config.json").exists():
        raise UserError(f"folder: {folder} holds a model already")
    tensors = to_hf(config, state)
    values["dtype"] = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, folder)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return values["architectures"][0]


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"folder: {folder} has no {name}")
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise UserError(f"folder: {folder / name} is damaged ({error})") from None
    return tensors


def read_hf_shape(folder: Path) -> tuple[TransformerConfig, Any]:
    """Our shape of a folder's model, and the `transformers` config it was read from.

    Raises:
        UserError: no config there, another architecture, or an option that our model lacks.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f"folder: {folder} has no config.json")
    try:
        values = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"folder: {folder}/config.json cannot be read ({str(error).splitlines()[0]})") from None
    return from_hf_config(values), values


def from_hf(folder: Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Read a folder that `transformers` wrote or that was downloaded from the Hub.

    Returns the shape and a state_dict for `Transformer(config).load_state_dict`, in the file's precision.

    Raises:
        UserError: no such model, another architecture, an option that our model lacks, or missing weights.
    """
    config, values = read_hf_shape(folder)
    theirs = _read_safetensors(folder)
    try:
        state = {name_ours: theirs[name_theirs] for name_ours, name_theirs in _names(config)}
        for layer in _moe_layers(config):
            for name, tensor in _stack_experts(config, theirs, f"model.layers.{layer}.mlp.experts").items():
                state[f"blocks.{layer}.ffn.experts.{name}"] = tensor
    except KeyError as error:
        raise UserError(f"folder: {folder} lacks the tensor {error.args[0]}") from None
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    if config.attention.latent and getattr(values, "rope_interleave", True):
        _permute_rotary(config, state, to_interleaved=False)
    return config, state


def _stack_experts(config: TransformerConfig, theirs: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our w13 [E, 2I, D] and w2 [E, D, I] from one tensor per expert, or from tensors that are stacked already."""
    assert config.moe is not None
    if f"{prefix}.gate_up_proj" in theirs:
        return {"w13": theirs[f"{prefix}.gate_up_proj"], "w2": theirs[f"{prefix}.down_proj"]}
    experts = range(config.moe.n_experts)
    gate_EID, up_EID, w2_EDI = (
        torch.stack([theirs[f"{prefix}.{expert}.{name}.weight"] for expert in experts])
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    return {"w13": torch.cat((gate_EID, up_EID), dim=1), "w2": w2_EDI}
