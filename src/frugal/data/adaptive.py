"""An adaptive curriculum: which group of sequences is drawn how often is decided from the losses measured so far.

A decision falls between two steps, and takes effect `lead` steps later: beyond everything that workers have read ahead.
It is recorded with its first sample, so that which sequence a sample is stays a pure function, of the sample's number
and the record; the record is in the checkpoint.

Shape letters: G groups, W windows measured so far, M sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from frugal.data.difficulty import Difficulty, Scorer, check_reference
from frugal.data.mixture import BLOCK, Mixer
from frugal.data.transforms.base import SampleClock
from frugal.errors import UserError, require


@dataclass(frozen=True)
class AdaptiveCurriculum:
    """Draw more often what the model learns from now; weights follow the measured training loss of each group.

    Args:
        by: what the groups are: the sources; the levels of one source that knows them; or one source's sequences in
            `bands` of equal size by another difficulty (see data.curriculum).
        every: steps of a window. After each, the weights are decided anew from the windows' mean losses.
        lead: steps from a decision until it takes effect; more than the workers read ahead.
        rule: progress favours groups whose loss changed most between their last two windows, in either direction
            (Matiisen et al. 2017, arXiv 1707.00183); loss those with the highest loss (as group DRO, Sagawa et al.
            2020, arXiv 1911.08731: noise that cannot be learned draws it, too); mastery opens the groups one after
            the other, the next one when the loss of the newest is at most `mastered`.
        sharpness: of progress and loss: a group's weight is its usual one times e^(sharpness v), where v is its value
            relative to the highest, in [0, 1]; 0 keeps the usual weights: a control.
        mastered: of mastery: mean loss in nats per token below which a group counts as learned.
        floor: share of the samples that is always drawn as usual, so that nothing is forgotten or left unmeasured.
        bands: how many bands.
        reference: the model whose loss is the difficulty, for by: loss.
    """

    by: Literal["source"] | Difficulty
    every: int = 100
    lead: int = 32
    rule: Literal["progress", "loss", "mastery"] = "progress"
    sharpness: float = 2.0
    mastered: float | None = None
    floor: float = 0.2
    bands: int = 4
    reference: Scorer | None = None

    def __post_init__(self) -> None:
        for key, least in (("every", 1), ("lead", 1), ("bands", 2)):
            require(getattr(self, key) >= least, f"data.adaptive.{key}: must be at least {least}")
        require(self.sharpness >= 0, f"data.adaptive.sharpness: must not be negative, got {self.sharpness}")
        require(0 < self.floor <= 1, f"data.adaptive.floor: must lie in (0, 1], got {self.floor}")
        require(
            (self.rule == "mastery") == (self.mastered is not None),
            "data.adaptive.mastered: rule mastery needs it, and no other rule does",
        )
        check_reference("data.adaptive", self.by, self.reference)

    def takes_effect(self, window: int) -> int:
        """The step from which the decision after window number `window` (from 0) holds."""
        return (window + 1) * self.every + self.lead

    def decisions_by(self, step: int) -> int:
        """How many decisions have taken effect at a step."""
        return max(0, (step - self.lead) // self.every)


def check_adaptive(
    config: AdaptiveCurriculum, sources: int, num_workers: int, prefetch: int, others: Sequence[str]
) -> None:
    """Refuse what an adaptive curriculum cannot work with, before any data is read.

    Args:
        sources: how many there are.
        num_workers: processes that read ahead, `prefetch` batches each; a step has one batch at least.
        others: keys in use that decide on what is drawn, too.

    Raises:
        UserError: naming the key.
    """
    if others:
        raise UserError(f"data.adaptive: decides what is drawn, as does {others[0]}; switch one of them off")
    if (config.by == "source") != (sources > 1):
        wanted = "several sources" if config.by == "source" else "one source"
        raise UserError(
            f"data.adaptive.by: {config.by} needs {wanted}, there {'are' if sources > 1 else 'is'} {sources}"
        )
    least = num_workers * prefetch + 2
    require(
        config.lead >= least,
        f"data.adaptive.lead: {num_workers} workers read ahead, so it must be at least {least}, got {config.lead}",
    )


def decide(config: AdaptiveCurriculum, usual_G: Sequence[float], losses_WG: Sequence[Sequence[float]]) -> list[float]:
    """Each group's share of the samples after the windows measured so far; a pure function of what was measured.

    Args:
        usual_G: shares without a curriculum; they add up to one.
        losses_WG: mean loss of each group in each window, in nats per token; NaN where none of it was drawn.
    """
    usual = np.asarray(usual_G, dtype=np.float64)
    losses = np.asarray(losses_WG, dtype=np.float64).reshape(-1, len(usual))
    if config.rule == "mastery":
        chosen = np.where(np.arange(len(usual)) < _opened(config, losses), usual, 0.0)
    else:
        value = np.zeros(len(usual))
        for group, column in enumerate(losses.T):
            seen = column[np.isfinite(column)]
            if config.rule == "loss" and len(seen):
                value[group] = seen[-1]
            elif len(seen) > 1:
                value[group] = abs(seen[-1] - seen[-2])
        relative = value / value.max() if value.max() > 0 else value
        chosen = usual * np.exp(config.sharpness * relative)
    return (config.floor * usual + (1 - config.floor) * chosen / chosen.sum()).tolist()


def _opened(config: AdaptiveCurriculum, losses: np.ndarray) -> int:
    """How many groups are open: one more after each window in which the newest is mastered, never fewer again."""
    opened = 1
    assert config.mastered is not None
    for window in losses:
        if opened < losses.shape[1] and window[opened - 1] <= config.mastered:
            opened += 1
    return opened


class Bands:
    """The sequences of one source in groups by difficulty: bands of equal size, or the levels themselves.

    Each band is gone through in an order of its own, drawn anew for every epoch of it.

    Args:
        kind: of the difficulty.
        difficulty: of each sequence, [M].
        bands: how many, unless the difficulty is a level.
        seed: decides the orders.
    """

    def __init__(self, kind: str, difficulty: np.ndarray, bands: int, seed: int) -> None:
        self.seed = seed
        if kind == "level":
            levels = np.unique(difficulty)
            self.members = [np.flatnonzero(difficulty == level) for level in levels]
            self.names = [f"level_{int(level)}" for level in levels]
            require(len(levels) > 1, f"data.adaptive.by: the source has one level only ({self.names[0]})")
        else:
            require(len(difficulty) >= bands, f"data.adaptive.bands: {bands} bands of {len(difficulty)} sequences")
            self.members = np.array_split(np.argsort(difficulty, kind="stable"), bands)
            self.names = [f"{kind}_{i + 1}" for i in range(bands)]
        self._order: dict[int, tuple[int, np.ndarray]] = {}  # of each band, its latest epoch

    @property
    def shares(self) -> list[float]:
        """Each band's share of the sequences."""
        sizes = np.array([len(members) for members in self.members], dtype=np.float64)
        return (sizes / sizes.sum()).tolist()

    def sequence(self, band: int, number: int) -> int:
        """Which sequence the n-th draw from a band is, in [0, M)."""
        epoch, position = divmod(number, len(self.members[band]))
        known = self._order.get(band)
        if known is None or known[0] != epoch:
            # A counter of its own, as that of the other curriculum's draws (data.curriculum).
            rng = np.random.Generator(
                np.random.Philox(key=[self.seed, (band << 40) + epoch], counter=[0, 0, 0, 1 << 41])
            )
            known = self._order[band] = (epoch, rng.permutation(self.members[band]))
        return int(known[1][position])


class AdaptiveMixer(Mixer):
    """A mixer whose stages are decided as the run goes: worker processes read them from shared memory.

    Args:
        config: when decisions fall.
        usual: shares of the groups until the first decision.
        clock: of this process.
        rows: decisions that the run can take at most.
        seed: decides the order within blocks.
    """

    def __init__(
        self, config: AdaptiveCurriculum, usual: Sequence[float], clock: SampleClock, rows: int, seed: int
    ) -> None:
        super().__init__([0], [usual], seed)
        self.config, self.clock = config, clock
        # A row of each decision: first sample, then shares; NaN until it is taken.
        self.table = torch.full((max(rows, 1), 1 + len(usual)), math.nan, dtype=torch.float64).share_memory_()

    def add(self, decision: int, first_sample: int, weights: Sequence[float]) -> None:
        """Write decision number `decision` (from 0)."""
        self.table[decision, 1:] = torch.tensor(weights, dtype=torch.float64)
        self.table[decision, 0] = first_sample

    def locate(self, index: int) -> tuple[int, int]:
        """Which group, and which of its samples.

        Raises:
            RuntimeError: the sample is asked for before what decides on it was measured.
        """
        due = min(self.config.decisions_by(self.clock.at(index)), len(self.table))
        while len(self.starts) <= due:
            first, *weights = self.table[len(self.starts) - 1].tolist()
            if math.isnan(first):
                raise RuntimeError(f"data.adaptive.lead: sample {index} is read before its group is decided; raise it")
            self.append(int(first), weights)
        return super().locate(index)


class AdaptiveOrder:
    """The running state of an adaptive curriculum, the same on every rank.

    Args:
        config: what it is.
        names: of the groups.
        usual: their shares without it; they need not add up to one.
        bands: of one source's sequences; null when the groups are the sources.
    """

    def __init__(
        self, config: AdaptiveCurriculum, names: Sequence[str], usual: Sequence[float], bands: Bands | None
    ) -> None:
        self.config, self.names, self.bands = config, list(names), bands
        self.usual = (np.asarray(usual) / np.sum(usual)).tolist()
        for name, share in zip(self.names, self.usual, strict=True):
            if share * config.floor * BLOCK < 1:
                raise UserError(
                    f"data.adaptive.floor: {config.floor:g} of {name}'s usual {share:.2g} is less than one "
                    f"sample in {BLOCK}; raise it, or the weight of {name}"
                )
        self.losses: list[list[float]] = []  # of each window and group
        self.weights: list[list[float]] = []  # decided after each window
        self.first_samples: list[int] = []  # of each decision
        self.mixer: AdaptiveMixer | None = None

    def start(self, clock: SampleClock, total_steps: int, seed: int) -> AdaptiveMixer:
        """The mixer of this process; decisions that have yet to take effect are counted in its samples."""
        rows = self.config.decisions_by(total_steps - 1)
        self.mixer = AdaptiveMixer(self.config, self.usual, clock, rows, seed)
        while len(self.losses) < clock.step // self.config.every:  # windows before it was switched on
            self.losses.append([math.nan] * len(self.usual))
            self.weights.append(list(self.usual))
        begun = min(self.config.decisions_by(clock.step), len(self.first_samples))
        self.first_samples = self.first_samples[:begun]
        for window, weights in enumerate(self.weights):
            if window >= begun:
                self.first_samples.append(self._first_sample(window))
            if window < rows:
                self.mixer.add(window, self.first_samples[window], weights)
        return self.mixer

    def _first_sample(self, window: int) -> int:
        assert self.mixer is not None
        clock = self.mixer.clock
        return max(0, clock.sample(self.config.takes_effect(window)))

    def observe(self, losses: Sequence[float]) -> dict[str, Any]:
        """Take the decision after one more window; returns its record.

        Args:
            losses: mean loss of each group in the window, in nats per token; NaN where none of it was drawn.
        """
        assert self.mixer is not None
        window = len(self.losses)
        self.losses.append(list(losses))
        self.weights.append(decide(self.config, self.usual, self.losses))
        self.first_samples.append(self._first_sample(window))
        if window < len(self.mixer.table):
            self.mixer.add(window, self.first_samples[window], self.weights[-1])
        shares = dict(zip(self.names, self.weights[-1], strict=True))
        return {"effective": self.config.takes_effect(window), "loss": self.latest_losses(), "share": shares}

    def shares_at(self, step: int) -> dict[str, float]:
        """Each group's share of the samples at a step."""
        decisions = self.config.decisions_by(step)
        return dict(zip(self.names, self.weights[decisions - 1] if decisions else self.usual, strict=True))

    def latest_losses(self) -> dict[str, float]:
        """Mean loss in the latest window of the groups that were drawn in it."""
        latest = zip(self.names, self.losses[-1], strict=True) if self.losses else ()
        return {name: loss for name, loss in latest if math.isfinite(loss)}

    def assume_unchanged(self) -> None:
        """Keep the usual shares throughout: what a plan shows before anything is measured."""
        assert self.mixer is not None
        for window in range(len(self.mixer.table)):
            self.mixer.add(window, self._first_sample(window), self.usual)

    def state_dict(self) -> dict[str, Any]:
        """The record of what was measured and decided."""
        return {
            "names": self.names,
            "every": self.config.every,
            "lead": self.config.lead,
            "losses": self.losses,
            "weights": self.weights,
            "first_samples": self.first_samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a record.

        Raises:
            UserError: it is of other groups, or its decisions fall at other steps.
        """
        require(
            state["names"] == self.names,
            f"data.adaptive: the checkpoint has the groups {', '.join(state['names'])}, not {', '.join(self.names)}",
        )
        for key in ("every", "lead"):
            ours = getattr(self.config, key)
            require(state[key] == ours, f"data.adaptive.{key}: the run began with {state[key]}; keep it")
        self.losses, self.weights = [list(x) for x in state["losses"]], [list(x) for x in state["weights"]]
        self.first_samples = list(state["first_samples"])
