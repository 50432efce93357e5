"""Any causal language model of `transformers`, behind the few methods by which the program uses a model.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frugal.errors import UserError, require
from frugal.model.counts import Counts, Flops


def hf_config(values: dict[str, Any]) -> Any:
    """A `transformers` config from `model_type` and its fields.

    Raises:
        UserError: no or an unknown model_type, or a field that this type does not have.
    """
    from transformers import CONFIG_MAPPING

    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise UserError(f"model.config.model_type: transformers knows no {kind!r} (examples: llama, qwen3, gpt2)")
    kind_class = CONFIG_MAPPING[kind]
    known = kind_class().to_dict().keys() | set(getattr(kind_class, "attribute_map", {}))
    if unknown := sorted(values.keys() - known):
        raise UserError(f"model.config.{unknown[0]}: no field of {kind_class.__name__}")
    try:
        return kind_class(**{key: value for key, value in values.items() if key != "model_type"})
    except (ValueError, TypeError) as error:
        raise UserError(f"model.config: {' '.join(str(error).split())}") from None


def read_hf_config(path: str) -> Any:
    """The config of a local folder, or of a model on the Hub."""
    from transformers import AutoConfig

    local = Path(path).expanduser()
    require(not local.exists() or (local / "config.json").is_file(), f"model.path: {path} has no config.json")
    require(local.exists() or path.count("/") == 1, f"model.path: no folder {path}")
    try:
        return AutoConfig.from_pretrained(str(local) if local.exists() else path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.path: cannot read the config of {path} ({str(error).splitlines()[0]})") from None


class HFCache:
    """A `transformers` cache of the whole model, with the length that our generation reads."""

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache()

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return int(self.cache.get_seq_length())


@dataclass(frozen=True)
class HFShape:
    """What the program asks of any model's config."""

    vocab_size: int
    max_seq_len: int
    n_mtp: int = 0


class HFModel(nn.Module):
    """Token ids [B, T] -> logits [B, T, V], by whatever architecture the config names."""

    def __init__(self, config: Any, max_seq_len: int | None = None) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        try:
            self.lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, KeyError) as error:
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

    @property
    def values(self) -> str:
        """The config as JSON: what a checkpoint keeps of it."""
        content = self.lm.config.to_dict() | {"frugal_max_seq_len": self.config.max_seq_len}
        return json.dumps(content, sort_keys=True, default=str)

    @staticmethod
    def rebuild(values: str) -> HFModel:
        """The model, its weights random, from what `values` gave."""
        from transformers import AutoConfig

        content = json.loads(values)
        max_seq_len = content.pop("frugal_max_seq_len")
        return HFModel(AutoConfig.for_model(**content), max_seq_len)

    def forward(self, ids_BT: Tensor, caches: list[HFCache] | None = None) -> Tensor:
        """Logits [B, T, V] of the next token at each position."""
        cache = caches[0].cache if caches else None
        out = self.lm(input_ids=ids_BT, past_key_values=cache, use_cache=cache is not None)
        auxiliary = getattr(out, "aux_loss", None)
        if self.training and isinstance(auxiliary, Tensor):
            self._router_loss = self.lm.config.router_aux_loss_coef * auxiliary
        return out.logits

    def new_caches(self, batch_size: int, max_len: int) -> list[HFCache]:
        """One cache for all layers; it grows by itself."""
        return [HFCache()]

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

        Kaplan et al. 2020, section 2.1; heads count as hidden_size wide in all.
        """
        config = self.lm.config
        scores = config.num_hidden_layers * 4 * config.hidden_size * (seq_len + 1) / 2
        forward = 2.0 * self.counts().active_without_input_embedding + scores
        return Flops(forward=forward, backward=2 * forward)


EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
