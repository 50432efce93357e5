"""Any causal language model of `transformers`, behind the few methods by which the program uses a model.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from frugal.errors import UserError, require
from frugal.model.counts import Counts, Flops

EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")  # what configs call the number of routed ones
CONFIG_ERRORS = (ValueError, StrictDataclassError)  # what a config of `transformers` raises for a wrong value


def hf_config(values: dict[str, Any], defaults: dict[str, Any] | None = None) -> Any:
    """A `transformers` config from `model_type` and its fields.

    Args:
        values: model_type and fields, by any name that `transformers` knows them by.
        defaults: fields that follow the data; those that this type lacks, or that `values` sets, are left out.

    Raises:
        UserError: no or an unknown model_type, one that is no causal language model, or a field that it does not have.
    """
    from transformers import CONFIG_MAPPING

    kind = str(values.get("model_type"))
    require(
        kind in CONFIG_MAPPING,
        f"model.config.model_type: transformers knows no {kind!r} (examples: llama, qwen3, gpt2)",
    )
    _require_causal_type(kind, "model.config.model_type")
    kind_class = CONFIG_MAPPING[kind]
    aliases: dict[str, str] = getattr(kind_class, "attribute_map", {})
    known = kind_class().to_dict().keys() | set(aliases)
    require("vocab_size" in known, f"model.config.model_type: {kind!r} is no model of text alone (no vocab_size)")
    # Published configs say more than the type declares, and the model reads it.
    also = {"head_dim", "rope_theta", "rope_scaling"} if "rope_parameters" in known else set()
    if unknown := sorted(values.keys() - known - also):
        raise UserError(f"model.config.{unknown[0]}: no field of {kind_class.__name__}")
    given = {aliases.get(key, key) for key in values}
    follow = {
        key: value for key, value in (defaults or {}).items() if key in known and aliases.get(key, key) not in given
    }
    try:
        return kind_class(**follow, **{key: value for key, value in values.items() if key != "model_type"})
    except (*CONFIG_ERRORS, TypeError) as error:
        raise UserError(f"model.config: {' '.join(str(error).split())[:300]}") from None


def _require_causal_type(kind: str, key: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    require(kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, f"{key}: {kind!r} is no causal language model of transformers")


def read_hf_config(path: str) -> Any:
    """The config of a local folder, or of a model on the Hub."""
    from transformers import AutoConfig

    local = Path(path).expanduser()
    require(not local.exists() or (local / "config.json").is_file(), f"model.path: {path} has no config.json")
    require(local.exists() or path.count("/") == 1, f"model.path: no folder {path}")
    try:
        config = AutoConfig.from_pretrained(str(local) if local.exists() else path)
    except (*CONFIG_ERRORS, OSError, KeyError) as error:
        raise UserError(f"model.path: cannot read the config of {path} ({str(error).splitlines()[0]})") from None
    _require_causal_type(config.model_type, "model.path")
    require(hasattr(config, "vocab_size"), f"model.path: {path} is no model of text alone (no vocab_size)")
    return config


@dataclass(frozen=True)
class HFShape:
    """What the program asks of any model's config."""

    vocab_size: int
    max_seq_len: int
    n_mtp: int = 0


def _read_values(values: str) -> tuple[Any, int]:
    """The config and the longest sequence that `HFModel.values` gave."""
    from transformers import AutoConfig

    content = json.loads(values)
    max_seq_len = content.pop("frugal_max_seq_len")
    return AutoConfig.for_model(**content), max_seq_len


class HFModel(nn.Module):
    """Token ids [B, T] -> logits [B, T, V], by whatever architecture the config names."""

    shared_by = (0, 1)  # as `Transformer` has it

    def __init__(self, config: Any, max_seq_len: int | None = None) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        try:
            self.lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (*CONFIG_ERRORS, TypeError, KeyError, AssertionError) as error:
            raise UserError(f"model.config: {' '.join(str(error).split())[:300]}") from None
        self.config = HFShape(config.vocab_size, max_seq_len or config.max_position_embeddings)
        self._router_loss: Tensor | None = None

    def load_pretrained(self, path: str) -> None:
        """Fill in the weights of a local folder or of a model on the Hub."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            answer: Any = AutoModelForCausalLM.from_pretrained(
                str(Path(path).expanduser()), dtype=torch.float32, output_loading_info=True
            )
            loaded, report = answer
        except Exception as error:  # damaged or missing files: each reader raises its own kind
            raise UserError(f"model.path: cannot load weights from {path} ({str(error).splitlines()[0]})") from None
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"model.path: {path} lacks the tensor {missing[0]}")
        self.lm.load_state_dict(loaded.state_dict())

    @torch.no_grad()
    def require_causal(self) -> None:
        """Refuse a model that cannot run, or whose guess at a position depends on later tokens (as BERT's does)."""
        weight = self.lm.get_input_embeddings().weight
        ids_BT = torch.arange(4, device=weight.device).repeat(2, 1) % self.config.vocab_size
        ids_BT[1, -1] = 4 % self.config.vocab_size
        was_training = self.training
        self.eval()
        try:
            first_TV, second_TV = self(ids_BT)[:, :-1].float()
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"model.config: the model cannot run ({' '.join(str(error).split())[:300]})") from None
        self.train(was_training)
        require(
            bool((first_TV - second_TV).abs().max() <= 1e-5 * first_TV.abs().max()),
            f"model.config: {type(self.lm).__name__} sees later tokens (BERT-like types need is_decoder: true)",
        )

    @property
    def values(self) -> str:
        """The config as JSON: what a checkpoint keeps of it."""
        content = self.lm.config.to_dict() | {"frugal_max_seq_len": self.config.max_seq_len}
        return json.dumps(content, sort_keys=True, default=str)

    @staticmethod
    def comparable(values: str) -> dict[str, Any]:
        """What `values` gave, as this version of `transformers` writes it, without what does not shape the model."""
        config, max_seq_len = _read_values(values)
        content = json.loads(json.dumps(config.to_dict(), default=str)) | {"max_seq_len": max_seq_len}
        return {key: value for key, value in content.items() if key not in ("transformers_version", "_name_or_path")}

    @staticmethod
    def rebuild(values: str) -> HFModel:
        """The model, its weights random, from what `values` gave."""
        return HFModel(*_read_values(values))

    def forward(self, ids_BT: Tensor, caches: list[Any] | None = None) -> Tensor:
        """Logits [B, T, V] of the next token at each position."""
        cache = caches[0] if caches else None
        # A compiled model is left alone by generation with a cache, where every call has another shape.
        call = self.lm if cache is None else self.lm.forward
        out = call(input_ids=ids_BT, past_key_values=cache, use_cache=cache is not None)
        auxiliary = getattr(out, "aux_loss", None)
        if self.training and isinstance(auxiliary, Tensor):
            self._router_loss = self.lm.config.router_aux_loss_coef * auxiliary
        return out.logits

    def new_caches(self, batch_size: int, max_len: int) -> list[Any] | None:
        """One cache for all layers, which grows by itself; None for types that remember in other ways (Mamba, RWKV)."""
        from transformers import DynamicCache

        cached = "past_key_values" in inspect.signature(self.lm.forward).parameters
        return (
            [DynamicCache(config=self.lm.config)] if cached else None
        )  # the config names layers with windows or states

    def take_router_loss(self) -> Tensor | None:
        """The weighted balance loss of the last training call, where `output_router_logits` asks for it."""
        loss, self._router_loss = self._router_loss, None
        return loss

    def moe_layers(self) -> dict[int, Any]:
        """None that our balancing could steer."""
        return {}

    def counts(self) -> Counts:
        """From the built model: of the routed experts' parameters (names with `experts`) top_k / n are active."""
        config = self.lm.config
        experts = sum(p.numel() for name, p in self.lm.named_parameters() if ".experts." in name)
        number = next((n for key in EXPERTS if (n := getattr(config, key, None))), 1)
        idle = experts - experts * min(getattr(config, "num_experts_per_tok", None) or number, number) // number
        total = sum(p.numel() for p in self.lm.parameters())
        embedding = self.lm.get_input_embeddings().weight
        head = self.lm.get_output_embeddings()
        active = total - idle
        tied = head is not None and head.weight is embedding
        without_input = active if tied else active - embedding.numel()
        tables = embedding.numel() if tied or head is None else embedding.numel() + head.weight.numel()
        return Counts(total, active, without_input, active - tables, active)

    def flops_per_token(self, seq_len: int) -> Flops:
        """2 N forward with N the active parameters without the input embedding, and causal attention's products.

        Kaplan et al. 2020, section 2.1; heads count as hidden_size wide in all. Backward as much for the inputs'
        gradients, and for the weights' that of the parameters that train.
        """
        config = self.lm.config
        scores = config.num_hidden_layers * 4 * config.hidden_size * (seq_len + 1) / 2
        n = self.counts().active_without_input_embedding
        forward = 2.0 * n + scores
        trained: float = sum(p.numel() for p in self.lm.parameters() if p.requires_grad)
        if all(p.requires_grad for p in self.lm.parameters()):
            trained = n
        return Flops(forward=forward, backward=2.0 * (n + trained) + 2 * scores)
