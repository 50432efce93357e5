"""Accuracy on held-out questions: right for a model that knows, wrong for one that does not, logged by level."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from frugal.callbacks.accuracy import TaskAccuracy, accuracy
from frugal.data.synthetic.reasoning import ReasoningGym
from frugal.data.tokenization import EOT, TokenizerConfig, train_tokenizer
from frugal.errors import UserError
from frugal.model.config import AttentionConfig, MoEConfig, TransformerConfig
from frugal.model.transformer import Transformer
from frugal.tracking.run_folder import read_lines
from frugal.training.inference import complete

TASKS = ReasoningGym({"chain_sum": 1.0, "gcd": 1.0}, levels=[0, 1], n=60)

CONFIG = TransformerConfig(
    attention=AttentionConfig(n_heads=2, n_kv_heads=1),
    vocab_size=300,
    max_seq_len=24,
    d_model=16,
    n_layers=2,
    d_ff=32,
    moe=MoEConfig(n_experts=4, top_k=2, d_expert=16, n_shared_experts=1, first_k_dense=1),
)


class Oracle(nn.Module):
    """Says the answer to every question that it knows, token by token, and then ends the document."""

    def __init__(self, tokenizer: Tokenizer, known: dict[str, str]) -> None:
        super().__init__()
        self.tokenizer, self.known = tokenizer, known
        self.config = replace(CONFIG, vocab_size=tokenizer.get_vocab_size(), max_seq_len=400)
        self.parameter = nn.Parameter(torch.zeros(1))

    def new_caches(self, *sizes: int) -> list:
        self.seen = None
        return []

    def forward(self, ids: torch.Tensor, caches: list | None = None) -> torch.Tensor:
        self.seen = ids if self.seen is None else torch.cat((self.seen, ids), dim=1)
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        for row, tokens in enumerate(self.seen.tolist()):
            text = self.tokenizer.decode(tokens)
            prompt = next((prompt for prompt in self.known if text.startswith(prompt)), None)
            whole = [0, *self.tokenizer.encode(prompt + self.known[prompt]).ids, 0] if prompt else [*tokens, 0]
            logits[row, -1, whole[min(len(tokens), len(whole) - 1)]] = 1
        return logits


def test_accuracy_is_the_share_of_right_answers() -> None:
    items = [i for task in TASKS.tasks for level in (0, 1) for i in TASKS.held_out_items(task, level, 8)]
    tokenizer = train_tokenizer([TASKS.text(item) for item in items], TokenizerConfig(300))
    known = {TASKS.prompt(item): item.answer + "\n" for item in items if item.task == "gcd" or item.level == 0}
    model = Oracle(tokenizer, known)
    found = accuracy(model, tokenizer, TASKS, items)
    assert found == {("chain_sum", 0): 1.0, ("chain_sum", 1): 0.0, ("gcd", 0): 1.0, ("gcd", 1): 1.0}
    known[TASKS.prompt(items[0])] = "-999"
    asked = sum((item.task, item.level) == ("chain_sum", 0) for item in items)
    assert accuracy(model, tokenizer, TASKS, items)["chain_sum", 0] == pytest.approx(1 - 1 / asked)


def test_a_prompt_is_tokenized_as_it_was_in_training() -> None:
    """What precedes the answer must not merge with it, or the model would be asked in tokens that it never saw."""
    tokenizer = train_tokenizer([document.text for document in TASKS.documents()], TokenizerConfig(600))
    for item in TASKS.training_items():
        prompt, whole = (tokenizer.encode(text).ids for text in (TASKS.prompt(item), TASKS.text(item)))
        assert whole[: len(prompt)] == prompt


def test_completions_do_not_depend_on_their_neighbours() -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat\n" * 20], TokenizerConfig(300))
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    prompts = ["the cat", "a", "the cat sat on", "", "mat", "x" * 30]
    together = complete(model, tokenizer, prompts, 8)
    assert together == [complete(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert together[-1] == ""  # no room
    assert all(EOT not in text for text in together)


def test_a_run_logs_accuracy_by_task_and_level(train: Callable[..., Path]) -> None:
    source = """{class_path: frugal.data.synthetic.reasoning.ReasoningGym,
      init_args: {tasks: {chain_sum: 1.0}, levels: [0, 2], n: 300}}"""
    Path("tasks.yaml").write_text(f"""
data: {{source: {source}, seq_len: 96}}
trainer:
  max_steps: 4
  val_check_interval: 2
  callbacks:
    - class_path: frugal.callbacks.accuracy.TaskAccuracy
      init_args: {{questions: 5, max_new_tokens: 4, tasks: {source}}}
""")
    folder = train("fit", "--config", "tasks.yaml")
    rows = [row for row in read_lines(folder / "metrics.jsonl") if "val/accuracy" in row]
    assert [row["step"] for row in rows] == [1, 3]
    for row in rows:
        parts = [row[f"val/accuracy/chain_sum/{level}"] for level in (0, 2)]
        assert row["val/accuracy"] == pytest.approx(sum(parts) / 2) and all(0 <= part <= 1 for part in parts)


def test_impossible_values_are_refused() -> None:
    with pytest.raises(UserError, match=r"TaskAccuracy\.questions must be at least 1"):
        TaskAccuracy(TASKS, questions=0)
