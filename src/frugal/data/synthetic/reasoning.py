"""Procedural reasoning tasks of the reasoning-gym package."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from typing import Any, Literal

from frugal.data.synthetic.tasks import Item, Tasks, refuse_level
from frugal.errors import UserError

log = logging.getLogger(__name__)


class ReasoningGym(Tasks):
    """Tasks of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760): `pip install -e '.[reasoning]'`.

    A level sets every attribute of the task's own curriculum to its value at that level alone (easier values are not
    mixed in). Fast enough to make by the ten thousand: chain_sum, gcd, lcm, products, base_conversion, count_bits,
    fraction_simplification, spell_backward, letter_counting, word_sorting, caesar_cipher, number_filtering and others.

    Args:
        tasks: weight of each task, by reasoning-gym's name.
        levels: difficulties, from 0.
        n: documents per level.
        seed: decides the items. Unlike in reasoning-gym itself, neighbouring seeds do not share their items.
        holdout: share of all questions that is kept for measuring accuracy.
        template: a document's text.
        order: documents of all levels mixed, or level by level.
        options: settings of a task that its curriculum leaves alone, by task.
    """

    name = "reasoning-gym"

    def __init__(
        self,
        tasks: dict[str, float],
        levels: list[int] = [0],  # noqa: B006 (never changed; jsonargparse shows it)
        n: int = 10000,
        seed: int = 0,
        holdout: float = 0.05,
        template: str = "{question}\n{answer}\n",
        order: Literal["mixed", "levels"] = "mixed",
        options: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(tasks, levels, n, seed, holdout, template, order)
        self.options = options or {}
        self._datasets: dict[tuple[str, int], Any] = {}

    def _dataset(self, task: str, level: int) -> Any:
        if (task, level) in self._datasets:
            return self._datasets[task, level]
        try:
            from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
            from reasoning_gym.factory import CURRICULA, DATASETS, create_curriculum
        except ModuleNotFoundError as error:
            raise UserError(f"data.source: {error.name} is missing; run `pip install -e '.[reasoning]'`") from None
        import reasoning_gym  # noqa: F401 (registers the tasks)

        if task not in DATASETS:
            raise UserError(f"data.source.tasks: reasoning-gym has no task {task!r}")
        make, config_class = DATASETS[task]
        # reasoning-gym draws item i from Random(seed + i), so seeds 1 and 2 would share all items but one.
        digest = hashlib.sha256(json.dumps([self.seed, task, level]).encode()).digest()
        fixed = {"seed": int.from_bytes(digest[:4], "big") // 2, **self.options.get(task, {})}
        try:
            if task in CURRICULA:
                curriculum = create_curriculum(task)
                refuse_level(task, level, max(len(a.levels) for a in curriculum.attributes.values()) - 1)
                curriculum.set_global_level(level)
                config = curriculum.generate_configuration(
                    fixed, DefaultCurriculumContext(RangeAttributeMode.UPPER_BOUND)
                )
            else:
                refuse_level(task, level, 0)
                config = config_class(**fixed)
            dataset = make(config)
        except (TypeError, ValueError, AssertionError) as error:
            if isinstance(error, UserError):
                raise
            reason = str(error).splitlines()[0] if str(error) else "its configuration is refused"
            raise UserError(f"data.source.options: {task} at level {level}: {reason}") from None
        self._datasets[task, level] = dataset
        return dataset

    def item(self, task: str, level: int, index: int) -> Item:
        """Item number `index`.

        Raises:
            UserError: there is no such task or level, or the task gives no answers that could be learned.
        """
        entry = self._dataset(task, level)[index]
        if not isinstance(entry["answer"], str):
            raise UserError(f"data.source.tasks: {task} gives no answers to learn from")
        return Item(task, level, index, entry["question"], entry["answer"], entry)

    def score(self, item: Item, answer: str) -> float:
        """The task's own verifier; an answer that it cannot read is wrong."""
        try:
            return float(self._dataset(item.task, item.level).score_answer(answer, item.details))
        except Exception as error:  # verifiers parse what a model wrote, and some raise on junk
            log.debug("the verifier of %s raised %r on %r", item.task, error, answer)
            return 0.0

    def version(self) -> str:
        """Of the package."""
        try:
            return importlib.metadata.version("reasoning-gym")
        except importlib.metadata.PackageNotFoundError:
            raise UserError("data.source: reasoning-gym is missing; run `pip install -e '.[reasoning]'`") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_datasets": {}}
