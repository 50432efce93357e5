"""Ask the model held-out questions at each validation, and let the tasks' own verifiers score its answers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from frugal.data.synthetic.tasks import Item, Tasks
from frugal.errors import UserError
from frugal.model.hf_model import HFModel
from frugal.model.transformer import Transformer
from frugal.training.inference import complete


def accuracy(
    model: Transformer | HFModel, tokenizer: Any, tasks: Tasks, items: list[Item], max_new_tokens: int = 32
) -> dict[tuple[str, int], float]:
    """Share of right answers, by task and level, when the model takes the likeliest token each time.

    Args:
        model: answers; left in the mode it was in.
        tokenizer: the model's.
        tasks: knows the prompts and the right answers.
        items: what is asked.
        max_new_tokens: an answer's length at most.
    """
    answers = complete(model, tokenizer, [tasks.prompt(item) for item in items], max_new_tokens)
    right: dict[tuple[str, int], list[bool]] = {}
    for item, answer in zip(items, answers, strict=True):
        right.setdefault((item.task, item.level), []).append(tasks.score(item, tasks.answer_in(answer)) >= 1)
    return {key: sum(values) / len(values) for key, values in right.items()}


class TaskAccuracy(pl.Callback):
    """Log `val/accuracy/<task>/<level>` and their mean, `val/accuracy`, at the end of each validation.

    Args:
        tasks: the tasks to ask; give the same settings as for training, so that no question was trained on.
        questions: how many held-out questions per task and level (tasks with few questions have fewer).
        max_new_tokens: an answer's length at most.
    """

    def __init__(self, tasks: Tasks, questions: int = 50, max_new_tokens: int = 32) -> None:
        for key, value in (("questions", questions), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise UserError(f"trainer.callbacks: TaskAccuracy.{key} must be at least 1, got {value}")
        self.tasks, self.questions, self.max_new_tokens = tasks, questions, max_new_tokens
        self._items: list[Item] | None = None

    def items(self) -> list[Item]:
        """The held-out questions, always the same."""
        if self._items is None:
            self._items = [
                item
                for task, weight in self.tasks.tasks.items()
                if weight > 0
                for level in self.tasks.levels
                for item in self.tasks.held_out_items(task, level, self.questions)
            ]
            if not self._items:
                raise UserError("trainer.callbacks: TaskAccuracy has no held-out questions; raise tasks.holdout")
        return self._items

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Every process asks its share of the questions (all, where they share the weights); the means are over all."""
        if trainer.sanity_checking:
            return
        tokenizer = trainer.datamodule.tokenizer
        sharded = any(hasattr(p, "to_local") for p in pl_module.parameters())
        share = self.items() if sharded else self.items()[trainer.global_rank :: trainer.world_size]
        found = accuracy(pl_module.model, tokenizer, self.tasks, share, self.max_new_tokens)
        asked = {key: sum((item.task, item.level) == key for item in share) for key in found}
        keys = list(dict.fromkeys((item.task, item.level) for item in self.items()))
        counts = torch.tensor([[found.get(k, 0.0) * asked.get(k, 0), asked.get(k, 0)] for k in keys])
        counts = trainer.strategy.reduce(counts.to(pl_module.device), reduce_op="sum").cpu()
        for (task, level), (right, total) in zip(keys, counts.tolist(), strict=True):
            pl_module.log(f"val/accuracy/{task}/{level}", right / total)
        pl_module.log("val/accuracy", float((counts[:, 0] / counts[:, 1]).mean()))
