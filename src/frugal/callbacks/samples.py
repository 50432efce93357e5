"""Read what the model writes while it learns."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from frugal.data.tokenization import EOT
from frugal.errors import UserError
from frugal.model.generation import generate
from frugal.training.loggers import SafeWandbLogger


class TextSamples(pl.Callback):
    """Continue a few prompts at each validation; the samples go to a W&B table, the last one onto the closing card.

    Args:
        prompts: beginnings to continue.
        max_new_tokens: length of a sample; 0 switches sampling off.
        temperature: 0 takes the likeliest token.
        top_p: nucleus of the distribution that is sampled from.
        seed: samples of one seed and step are always the same.
    """

    def __init__(
        self,
        prompts: list[str],
        max_new_tokens: int = 60,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> None:
        if temperature < 0:
            raise UserError(f"samples.temperature: must not be negative, got {temperature}")
        if not 0 < top_p <= 1:
            raise UserError(f"samples.top_p: must lie in (0, 1], got {top_p}")
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.rows: list[list[Any]] = []

    @property
    def last(self) -> str | None:
        """The newest sample of the first prompt, prompt included."""
        return self.rows[-len(self.prompts)][2] if self.rows else None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw the samples and log the table of all so far."""
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # none: it does not train on text
        if trainer.sanity_checking or trainer.state.fn != "fit" or not self.prompts or self.max_new_tokens <= 0:
            return
        if tokenizer is None:
            return
        # Where the weights are sharded, all processes take part, and write the same.
        if not (trainer.is_global_zero or any(hasattr(p, "to_local") for p in pl_module.parameters())):
            return
        for prompt in self.prompts:
            ids = torch.tensor([tokenizer.encode(prompt).ids or [tokenizer.token_to_id(EOT)]], device=pl_module.device)
            generator = torch.Generator(device=pl_module.device).manual_seed(self.seed)
            out = generate(pl_module.model, ids, self.max_new_tokens, self.temperature, self.top_p, generator=generator)
            self.rows.append([trainer.global_step, prompt, tokenizer.decode(out[0].tolist())])
        for logger in trainer.loggers:
            if isinstance(logger, SafeWandbLogger):
                logger.log_rows("samples", ["step", "prompt", "text"], self.rows)

    def state_dict(self) -> dict[str, Any]:
        """The table so far, for the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the table."""
        self.rows = list(state_dict["rows"])
