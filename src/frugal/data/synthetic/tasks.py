"""Tasks whose every answer can be checked: items by index, documents to train on, held-out items to be asked."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from frugal.data.documents import Document
from frugal.data.sources import Source
from frugal.errors import UserError, require

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One question with its answer; a pure function of (seed, task, level, index)."""

    task: str
    level: int
    index: int
    question: str
    answer: str
    details: Any = field(default=None, compare=False, repr=False)  # what the verifier needs beside the answer


class Tasks(Source):
    """Questions and answers of several tasks at several levels.

    A question belongs to the held-out part by its hash, whatever the seed, the level or the index that led to it: so
    no held-out question is ever trained on, and tasks with few different questions cannot leak. No question is given
    twice.

    Args:
        tasks: weight of each task.
        levels: difficulties; each becomes the documents' level.
        n: documents per level, shared out among the tasks by their weights.
        seed: decides the items.
        holdout: share of all questions that is kept for measuring accuracy.
        template: a document's text; `{question}` and `{answer}` stand for what they say. The prompt is what precedes
            the answer; end it with a line's end, which no tokenizer of ours joins with what follows.
        order: documents of all levels mixed (so that any part of them is like the whole), or level by level.
    """

    PATIENCE = 1000  # draws without a new question, before a task counts as exhausted

    def __init__(
        self,
        tasks: dict[str, float],
        levels: list[int],
        n: int,
        seed: int,
        holdout: float,
        template: str,
        order: Literal["mixed", "levels"] = "mixed",
    ) -> None:
        require(bool(tasks), "data.source.tasks: name at least one task")
        for name, weight in tasks.items():
            require(weight >= 0, f"data.source.tasks: the weight of {name} must not be negative, got {weight}")
        require(sum(tasks.values()) > 0, "data.source.tasks: all weights are zero")
        require(bool(levels), "data.source.levels: name at least one level")
        require(len(set(levels)) == len(levels), f"data.source.levels: each level once, got {levels}")
        require(n >= 1, f"data.source.n: must be at least 1, got {n}")
        require(seed >= 0, f"data.source.seed: must not be negative, got {seed}")
        require(0 < holdout < 1, f"data.source.holdout: must lie between 0 and 1, got {holdout}")
        ordered = template.count("{question}") == template.count("{answer}") == 1 and template.index(
            "{question}"
        ) < template.index("{answer}")
        require(ordered, "data.source.template: must hold {question} and then {answer}, each once")
        self.tasks, self.levels, self.n, self.seed = tasks, levels, n, seed
        self.holdout, self.template, self.order = holdout, template, order
        self._seconds = 0.0

    @abstractmethod
    def item(self, task: str, level: int, index: int) -> Item:
        """Item number `index` of a task at a level."""

    @abstractmethod
    def score(self, item: Item, answer: str) -> float:
        """How good an answer is, from 0 to 1 (right). Never raises, whatever the answer."""

    @abstractmethod
    def version(self) -> str:
        """Of what makes the items: other items, another version."""

    def prompt(self, item: Item) -> str:
        """The text before the answer."""
        return self.template.split("{answer}")[0].replace("{question}", item.question.strip())

    def text(self, item: Item) -> str:
        """The whole document."""
        return self.prompt(item) + item.answer.strip() + self.template.split("{answer}")[1]

    def answer_in(self, continuation: str) -> str:
        """What a model answered: its continuation of the prompt up to what follows an answer in the template."""
        after = self.template.split("{answer}")[1]
        return (continuation.split(after)[0] if after else continuation).strip()

    def is_held_out(self, question: str) -> bool:
        """Whether a question is kept for measuring."""
        digest = hashlib.sha256(question.strip().encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.holdout * 2**64

    def _distinct(self, task: str, level: int, n: int, held_out: bool, seen: set[str]) -> Iterator[Item]:
        """The first n questions of a part that are not in `seen`, which grows."""
        share = self.holdout if held_out else 1 - self.holdout
        found, index, last = 0, 0, 0
        # A task counts as exhausted when what it draws has brought nothing new for long.
        while found < n and (index - last) * share < self.PATIENCE + 10 * found:
            item = self.item(task, level, index)
            question, index = item.question.strip(), index + 1
            if self.is_held_out(question) == held_out and question not in seen:
                seen.add(question)
                found, last = found + 1, index
                yield item
        if found < n and not held_out:
            log.warning("%s at level %d has only %d different questions, not %d", task, level, found, n)

    def training_items(self) -> Iterator[Item]:
        """Every item that documents are made of, in their order."""
        seen: set[str] = set()
        groups = [self._level(level, seen) for level in self.levels]
        if self.order == "mixed":
            groups = [[item for group in groups for item in group]]
        for number, group in enumerate(groups):
            order = np.random.Generator(np.random.Philox(key=[self.seed, number])).permutation(len(group))
            yield from (group[i] for i in order.tolist())

    def _level(self, level: int, seen: set[str]) -> list[Item]:
        """The training items of a level, task by task."""
        names = [name for name, weight in self.tasks.items() if weight > 0]
        shares = np.array([self.tasks[name] for name in names]) / sum(self.tasks.values())
        # Largest remainder: the counts add up to n.
        counts = np.floor(shares * self.n).astype(int)
        for i in np.argsort(counts - shares * self.n, kind="stable")[: self.n - counts.sum()]:
            counts[i] += 1
        return [
            item
            for name, count in zip(names, counts.tolist(), strict=True)
            for item in self._distinct(name, level, count, held_out=False, seen=seen)
        ]

    def held_out_items(self, task: str, level: int, n: int) -> list[Item]:
        """At most n questions that no training document holds; fewer where the task has not so many."""
        return list(self._distinct(task, level, n, held_out=True, seen=set()))

    def documents(self) -> Iterator[Document]:
        """One document per training item; the seconds that making them takes are counted."""
        items, seconds = self.training_items(), 0.0
        while True:
            start = time.perf_counter()
            item = next(items, None)
            seconds += time.perf_counter() - start
            if item is None:
                break
            yield Document(self.text(item), source=f"{self.name}/{item.task}", level=item.level)
        self._seconds = seconds

    def seconds_by_stage(self) -> dict[str, float]:
        """What making the documents took."""
        return {"synthesis": self._seconds}

    def fingerprint(self) -> str:
        """Hash of the settings and of the version of what makes the items."""
        settings = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        parts = [type(self).__name__, self.version(), settings]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def refuse_level(task: str, level: int, highest: int) -> None:
    """Raise for a level that a task does not have."""
    if not 0 <= level <= highest:
        raise UserError(f"data.source.levels: {task} has levels 0 to {highest}, not {level}")
