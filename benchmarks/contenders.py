"""The models that `throughput.py` compares: each as (module, loss function of ids and labels), built from one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frugal.model.config import AttentionConfig, MoEConfig, TransformerConfig, flops_per_token
from frugal.model.transformer import Transformer
from frugal.training.compilation import compile_blocks
from frugal.training.fp8 import Float8, convert_to_float8
from frugal.training.losses import summed_nll

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """One benchmark: the model's shape, and the batch of one optimizer step."""

    config: TransformerConfig
    batch_size: int

    @property
    def moe(self) -> MoEConfig:
        assert self.config.moe
        return self.config.moe

    @property
    def seq_len(self) -> int:
        return self.config.max_seq_len

    @property
    def flops_per_step(self) -> float:
        """Of our model; the dense contender has the same active products, less the routers'."""
        return flops_per_token(self.config, self.seq_len).training * self.batch_size * self.seq_len


def shape_for(device: str, n_experts: int | None = None) -> Shape:
    """Small on a CPU, 0.5B parameters with 0.17B active on a GPU; numbers of experts vary at equal active FLOPs."""
    if device == "cpu":
        moe = MoEConfig(n_experts=n_experts or 16, top_k=2, d_expert=256, n_shared_experts=1, first_k_dense=1)
        return Shape(
            TransformerConfig(256, 4, 768, AttentionConfig(n_heads=4), moe, vocab_size=4096, max_seq_len=256), 8
        )
    moe = MoEConfig(n_experts=n_experts or 32, top_k=4, d_expert=512, n_shared_experts=1, first_k_dense=1)
    attention = AttentionConfig(n_heads=8)
    return Shape(TransformerConfig(1024, 8, 2560, attention, moe, vocab_size=32768, max_seq_len=2048), 8)


def _ours(config: TransformerConfig, compiled: bool, fp8: bool = False) -> tuple[nn.Module, Loss]:
    model = Transformer(config)
    if fp8:
        convert_to_float8(model, Float8())

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return summed_nll(model.hidden(ids), model.head.weight, labels, fuse=compiled) / labels.numel()

    return model, loss, (lambda: compile_blocks(model)) if compiled else None  # type: ignore


def _hugging_face(config: Any, compiled: bool, half: bool = False) -> tuple[nn.Module, Loss]:
    """Under autocast over float32 weights its grouped experts compute in float32; `half` stores bfloat16 weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    if half:
        model.to(torch.bfloat16)
    model.train()

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float(), labels.flatten())

    return model, torch.compile(loss) if compiled else loss


def _deepseek(shape: Shape, experts: str) -> Any:
    """Multi-head latent attention with as many parameters as our heads' four matrices (within 1%)."""
    from transformers import DeepseekV3Config

    c, moe = shape.config, shape.moe
    half = c.head_dim // 2
    latent = (3 * c.d_model * c.d_model - c.d_model * half - c.d_model * c.d_model) // (c.d_model + 3 * c.d_model // 2)
    return DeepseekV3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        moe_intermediate_size=moe.d_expert,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.attention.n_heads,
        num_key_value_heads=c.attention.n_heads,
        n_shared_experts=moe.n_shared_experts,
        n_routed_experts=moe.n_experts,
        num_experts_per_tok=moe.top_k,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=moe.first_k_dense,
        q_lora_rank=None,
        kv_lora_rank=latent // 8 * 8,
        qk_nope_head_dim=half,
        qk_rope_head_dim=half,
        v_head_dim=c.head_dim,
        max_position_embeddings=c.max_seq_len,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )


def _qwen3(shape: Shape) -> Any:
    """No shared experts there: one more routed expert per token instead, so that the active FLOPs agree."""
    from transformers import Qwen3MoeConfig

    c, moe = shape.config, shape.moe
    return Qwen3MoeConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        moe_intermediate_size=moe.d_expert,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.attention.n_heads,
        num_key_value_heads=c.attention.n_heads,
        head_dim=c.head_dim,
        num_experts=moe.n_experts,
        num_experts_per_tok=moe.top_k + moe.n_shared_experts,
        decoder_sparse_step=1,
        mlp_only_layers=list(range(moe.first_k_dense)),
        norm_topk_prob=True,
        output_router_logits=False,
        max_position_embeddings=c.max_seq_len,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )


def _llama(shape: Shape) -> Any:
    from transformers import LlamaConfig

    c = shape.config
    return LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=_dense_width(shape),
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.attention.n_heads,
        num_key_value_heads=c.attention.n_heads,
        max_position_embeddings=c.max_seq_len,
        attn_implementation="sdpa",
    )


def _dense_width(shape: Shape) -> int:
    """Hidden width of a dense feed-forward with the FLOPs of the experts that one token uses."""
    return (shape.moe.top_k + shape.moe.n_shared_experts) * shape.moe.d_expert


# Neighbours run together on a GPU that holds two: a large one beside a small one.
CONTENDERS: dict[str, Callable[[Shape], tuple[nn.Module, Loss]]] = {
    "frugal, compiled": lambda shape: _ours(shape.config, True),
    "DeepseekV3 (HF, grouped_mm), compiled": lambda shape: _hugging_face(_deepseek(shape, "grouped_mm"), True),
    "frugal, eager": lambda shape: _ours(shape.config, False),
    "DeepseekV3 (HF, grouped_mm), eager": lambda shape: _hugging_face(_deepseek(shape, "grouped_mm"), False),
    "frugal dense, compiled": lambda shape: _ours(replace(shape.config, moe=None, d_ff=_dense_width(shape)), True),
    "Llama (HF, dense), compiled": lambda shape: _hugging_face(_llama(shape), True),
    "DeepseekV3 (HF, loop), eager": lambda shape: _hugging_face(_deepseek(shape, "eager"), False),
    "DeepseekV3 (HF, loop), compiled": lambda shape: _hugging_face(_deepseek(shape, "eager"), True),
    "Qwen3Moe (HF, grouped_mm), eager": lambda shape: _hugging_face(_qwen3(shape), False),
    "Qwen3Moe (HF, grouped_mm), compiled": lambda shape: _hugging_face(_qwen3(shape), True),
}
# Other number formats, on a GPU; what ours are told is in `throughput_worker.py`.
FORMATS: dict[str, Callable[[Shape], tuple[nn.Module, Loss]]] = {
    "frugal, compiled, fp8": lambda shape: _ours(shape.config, True, fp8=True),
    "frugal, compiled, float16": CONTENDERS["frugal, compiled"],
    "frugal, compiled, tf32": CONTENDERS["frugal, compiled"],
    "frugal, compiled, float32": CONTENDERS["frugal, compiled"],
    "DeepseekV3 (HF, grouped_mm), compiled, bfloat16 weights": (
        lambda shape: _hugging_face(_deepseek(shape, "grouped_mm"), True, half=True)
    ),
    "DeepseekV3 (HF, grouped_mm), eager, bfloat16 weights": (
        lambda shape: _hugging_face(_deepseek(shape, "grouped_mm"), False, half=True)
    ),
    "Qwen3Moe (HF, grouped_mm), compiled, bfloat16 weights": (
        lambda shape: _hugging_face(_qwen3(shape), True, half=True)
    ),
}
