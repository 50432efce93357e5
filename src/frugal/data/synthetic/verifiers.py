"""What decides whether a generated text is kept."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter

from frugal.data.documents import Document
from frugal.data.sources import Source
from frugal.data.synthetic.tasks import Item, Tasks
from frugal.errors import require


class Verifier(ABC):
    """Accepts a text or names the reason why not."""

    @abstractmethod
    def reason(self, text: str, item: Item | None) -> str | None:
        """Why the text is refused, in a word or two; None if it is accepted.

        Args:
            text: the generated text, prompt included.
            item: the task whose question was the prompt, if it was one.
        """


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


class MinimumQuality(Verifier):
    """Length, variety and repetition, after the rules of Gopher (Rae et al. 2021, arXiv 2112.11446, table A1).

    Args:
        min_words: words a text must have.
        min_distinct: least share of different words.
        max_repeated: highest share of the words that the most frequent group of three words may make up.
    """

    def __init__(self, min_words: int = 20, min_distinct: float = 0.3, max_repeated: float = 0.2) -> None:
        require(min_words >= 1, f"verifiers.min_words: must be at least 1, got {min_words}")
        require(0 <= min_distinct <= 1, f"verifiers.min_distinct: must lie in [0, 1], got {min_distinct}")
        require(0 < max_repeated <= 1, f"verifiers.max_repeated: must lie in (0, 1], got {max_repeated}")
        self.min_words, self.min_distinct, self.max_repeated = min_words, min_distinct, max_repeated

    def reason(self, text: str, item: Item | None) -> str | None:
        """Too short, too few different words, or a phrase again and again."""
        words = words_of(text)
        if len(words) < self.min_words:
            return "too short"
        if len(set(words)) < self.min_distinct * len(words):
            return "few different words"
        groups = Counter(zip(words, words[1:], words[2:], strict=False))
        most = max(groups.values(), default=0)
        return "repeats a phrase" if most > 1 and 3 * most > self.max_repeated * len(words) else None


class Novel(Verifier):
    """Refuses what was copied: word groups that stand in a source already, or in a text accepted before.

    Args:
        source: the corpus not to copy from.
        n: words per group.
        max_copied: highest share of a text's groups that may be known.
    """

    def __init__(self, source: Source, n: int = 8, max_copied: float = 0.2) -> None:
        require(n >= 1, f"verifiers.n: must be at least 1, got {n}")
        require(0 <= max_copied < 1, f"verifiers.max_copied: must lie in [0, 1), got {max_copied}")
        self.source, self.n, self.max_copied = source, n, max_copied
        self._known: set[int] | None = None

    def _groups(self, text: str) -> list[int]:
        words = words_of(text)
        return [hash(tuple(words[i : i + self.n])) for i in range(len(words) - self.n + 1)]

    def reason(self, text: str, item: Item | None) -> str | None:
        """Too short to tell, or copied."""
        if self._known is None:
            texts = (d.text if isinstance(d, Document) else d for d in self.source.documents())
            self._known = {group for text in texts for group in self._groups(text)}
        groups = self._groups(text)
        if not groups:
            return "too short"
        if sum(group in self._known for group in groups) > self.max_copied * len(groups):
            return "copied"
        self._known.update(groups)
        return None


class RightAnswer(Verifier):
    """Keeps the answers to a task's questions that its own verifier finds right.

    Args:
        tasks: the tasks whose questions are asked.
        least: score that an answer must reach.
    """

    def __init__(self, tasks: Tasks, least: float = 1.0) -> None:
        self.tasks, self.least = tasks, least

    def reason(self, text: str, item: Item | None) -> str | None:
        """Wrong, or no answer at all."""
        if item is None:
            return "no question"
        continuation = text.removeprefix(self.tasks.prompt(item))
        return None if self.tasks.score(item, self.tasks.answer_in(continuation)) >= self.least else "wrong answer"
