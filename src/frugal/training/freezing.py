"""What is frozen at which step: pure functions of the step, of parameters' names, and of recorded decisions.

A parameter is named as in the transformer's `state_dict()`: `embedding.weight`, `blocks.0.attention.wq.weight`,
`blocks.1.ffn.experts.w13`, `norm.weight`, `head.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from frugal.errors import UserError, require
from frugal.model.config import BlocksConfig, Frozen, flops_per_token
from frugal.model.frozen_counts import block_name

EMBEDDING, HEAD = "embedding.weight", "head.weight"


@dataclass(frozen=True)
class Window:
    """Freeze some parameters from one step to another.

    Args:
        parameters: names of parameters or of modules that hold them, with wildcards: blocks.0, *.attention, head.
        layers: whole layers by number; negative ones count from the last.
        embedding: the embedding too, and that of n-grams; without it the backward pass runs through the frozen lowest
            layers.
        start: first step that is frozen.
        stop: first step that trains again; null: the end of the run.
    """

    parameters: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    embedding: bool = False
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        key = "freezing.windows"
        require(
            bool(self.parameters or self.layers or self.embedding),
            f"{key}: a window freezes nothing; set parameters, layers or embedding",
        )
        require(self.start >= 0, f"{key}.start: must not be negative, got {self.start}")
        require(
            self.stop is None or self.stop > self.start,
            f"{key}.stop: must be greater than start ({self.start}), got {self.stop}",
        )


@dataclass(frozen=True)
class Prefix:
    """Freeze the lowest layers one after the other, the lowest first (FreezeOut, Brock et al. 2017, 1706.04983).

    Args:
        layers: how many are frozen in the end.
        start: first step at which the lowest layer is frozen.
        every: steps until the next one follows.
        embedding: freeze the embedding together with the lowest layer.
        stop: first step at which all train again; null: never.
    """

    layers: int
    start: int = 0
    every: int = 1
    embedding: bool = True
    stop: int | None = None

    def __post_init__(self) -> None:
        require(self.layers > 0, f"freezing.prefix.layers: must be positive, got {self.layers}")
        require(self.start >= 0, f"freezing.prefix.start: must not be negative, got {self.start}")
        require(self.every > 0, f"freezing.prefix.every: must be positive, got {self.every}")
        require(
            self.stop is None or self.stop > self.start,
            f"freezing.prefix.stop: must be greater than start ({self.start}), got {self.stop}",
        )

    def windows(self) -> list[Window]:
        """The same as one window per layer."""
        starts = [self.start + i * self.every for i in range(self.layers)]
        return [
            Window(layers=(i,), embedding=self.embedding and i == 0, start=start, stop=self.stop)
            for i, start in enumerate(starts)
            if self.stop is None or start < self.stop
        ]


@dataclass(frozen=True)
class Importance:
    """Measure for a while with everything training, freeze the least important share for a while, and again.

    Args:
        measure: gradient_norm (root mean square of the gradient), fisher (its mean square: the empirical Fisher
            information's diagonal, of the step's batch), update_ratio (norm of a step's update over that of the
            weights), each averaged over the measuring steps; or plasticity (distance from `reference` over its norm).
        unit: whole layers, or the routed experts within each layer.
        share: how many of the units are frozen, as a share; experts per layer.
        measure_steps: steps of one measurement.
        freeze_steps: steps that its decision lasts.
        start: first step of the first measurement.
        reference: checkpoint that plasticity compares with, of the same shape.
    """

    measure: Literal["gradient_norm", "fisher", "update_ratio", "plasticity"]
    share: float
    measure_steps: int
    freeze_steps: int
    unit: Literal["block", "expert"] = "block"
    start: int = 0
    reference: str | None = None

    def __post_init__(self) -> None:
        key = "freezing.importance"
        require(0 < self.share < 1, f"{key}.share: must lie between 0 and 1, got {self.share}")
        for name, least in (("measure_steps", 1), ("freeze_steps", 1), ("start", 0)):
            require(getattr(self, name) >= least, f"{key}.{name}: must be at least {least}, got {getattr(self, name)}")
        require(
            (self.measure == "plasticity") == (self.reference is not None),
            f"{key}.reference: plasticity needs a checkpoint, and no other measure uses one",
        )

    def measures(self, step: int) -> bool:
        """Whether this step belongs to a measurement."""
        return step >= self.start and (step - self.start) % self._cycle < self.measure_steps

    def decides_after(self, step: int) -> bool:
        """Whether this step is the last of a measurement."""
        return step >= self.start and (step - self.start) % self._cycle == self.measure_steps - 1

    @property
    def _cycle(self) -> int:
        return self.measure_steps + self.freeze_steps


@dataclass(frozen=True)
class ExpertChoice:
    """Train only the experts that the data use (expert-specialised fine-tuning, Wang et al. 2024, arXiv 2407.01906).

    Before the first step the routers see some training batches; in each layer the experts with the highest scores
    train, as few as add up to `threshold` (section 3.3), and everything else is frozen.

    Args:
        score: token (share of a layer's token choices that fall on the expert) or gate (share of the gates' weight).
        threshold: how much of the score the trained experts hold together.
        batches: training batches looked at on each device.
        train: parameters that train besides the experts; names or patterns as in freezing.windows.
    """

    score: Literal["token", "gate"] = "token"
    threshold: float = 0.2
    batches: int = 32
    train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        key = "freezing.experts"
        require(0 < self.threshold <= 1, f"{key}.threshold: must lie in (0, 1], got {self.threshold}")
        require(self.batches > 0, f"{key}.batches: must be positive, got {self.batches}")


@dataclass(frozen=True)
class Decision:
    """Something that training measured, as a pure function of the step from then on.

    Args:
        start: the step at which it takes effect.
        stop: first step at which it is over; null: never.
        names: parameters that it freezes.
        trained_experts: by layer, the experts that go on training; layers that are not listed train all.
        shares: by layer, the share of rows that these experts got when it was taken.
    """

    start: int
    stop: int | None
    names: tuple[str, ...] = ()
    trained_experts: tuple[tuple[int, tuple[int, ...]], ...] = ()
    shares: tuple[tuple[int, float], ...] = ()


# --- from patterns to names


def matching(patterns: Iterable[str], names: Sequence[str], key: str) -> set[str]:
    """The parameters that any pattern names, directly or through a module that holds them.

    Raises:
        UserError: a pattern matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        require(bool(hits), f"{key}: {pattern!r} matches no parameter (for example {names[0]}, {names[-1]})")
        found |= hits
    return found


def names_in(window: Window, names: Sequence[str], n_layers: int) -> set[str]:
    """The parameters that a window freezes.

    Raises:
        UserError: a pattern matches nothing, or there is no such layer.
    """
    found = matching(window.parameters, names, "freezing.windows.parameters")
    for layer in window.layers:
        require(
            -n_layers <= layer < n_layers,
            f"freezing.windows.layers: there is no layer {layer}; the model has {n_layers}, numbered from 0",
        )
        found |= matching((f"blocks.{layer % n_layers}",), names, "freezing.windows.layers")
    return found | (matching(("*embedding.*",), names, "freezing.windows.embedding") if window.embedding else set())


def expert_stacks(layer: int, n_layers: int) -> tuple[str, str]:
    """The two stacks of a layer's experts; layers of multi-token prediction come after the last one."""
    stem = f"{block_name(layer, n_layers)}.ffn.experts"
    return f"{stem}.w13", f"{stem}.w2"


def frozen_names(step: int, windows: Iterable[Window], names: Sequence[str], n_layers: int) -> frozenset[str]:
    """The parameters that the windows freeze at a step."""
    sets = (names_in(w, names, n_layers) for w in windows if w.start <= step and (w.stop is None or step < w.stop))
    return frozenset().union(*sets)


def frozen_at(
    step: int, windows: Iterable[Window], decisions: Iterable[Decision], names: Sequence[str], n_layers: int
) -> tuple[frozenset[str], dict[int, tuple[int, ...]], dict[int, float]]:
    """Frozen parameters, and by layer the experts that train and the share of rows they get, at a step.

    A layer whose experts are frozen by name appears in neither of the two.
    """
    frozen = set(frozen_names(step, windows, names, n_layers))
    experts: dict[int, tuple[int, ...]] = {}
    shares: dict[int, float] = {}
    for decision in decisions:
        if decision.start <= step and (decision.stop is None or step < decision.stop):
            frozen |= set(decision.names)
            experts |= dict(decision.trained_experts)
            shares |= dict(decision.shares)
    for layer in [i for i in experts if expert_stacks(i, n_layers)[0] in frozen]:
        del experts[layer], shares[layer]
    return frozenset(frozen), experts, shares


def changes(windows: Iterable[Window], max_steps: int) -> list[int]:
    """The steps at which the windows' frozen set may change, the first one included."""
    edges = {0} | {w.start for w in windows} | {w.stop for w in windows if w.stop is not None}
    return sorted(step for step in edges if step < max_steps)


def check_aliases(frozen: frozenset[str], aliases: Iterable[Sequence[str]]) -> None:
    """Refuse to freeze a shared parameter in one place and train it in another (but for the embedding's look-up).

    Raises:
        UserError: naming the two places.
    """
    for group in aliases:
        inside = [name for name in group if name in frozen]
        outside = [name for name in group if name not in frozen]
        if not inside or not outside or (EMBEDDING in inside and outside == [HEAD]):
            continue
        require(
            set(group) != {EMBEDDING, HEAD},
            "freezing.windows: the head is tied to the embedding; freeze both, or the embedding alone (its look-up)",
        )
        raise UserError(f"freezing.windows: {inside[0]} and {outside[0]} are one shared parameter; freeze both or none")


# --- decisions


def least_important(scores: Sequence[float], share: float) -> list[int]:
    """The units with the lowest scores: floor(share * n) of them, the earlier one where two are equal."""
    count = int(share * len(scores) + 1e-9)
    return sorted(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count])


def chosen_experts(scores: Sequence[float], threshold: float) -> list[int]:
    """The fewest experts, best first, whose scores add up to `threshold` of all (Wang et al. 2024, section 3.3)."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    chosen: list[int] = []
    total, sum_so_far = sum(scores), 0.0
    for expert in order:
        if sum_so_far >= threshold * total * (1 - 1e-9) and chosen:
            break
        chosen.append(expert)
        sum_so_far += scores[expert]
    return sorted(chosen)


# --- does it save anything?


def savings(config: BlocksConfig, frozen: Frozen) -> float:
    """The share of a step's FLOPs that freezing saves, at the longest sequence."""
    full = flops_per_token(config, config.max_seq_len).training
    return 1 - flops_per_token(config, config.max_seq_len, frozen).training / full


def complaint(config: BlocksConfig, frozen: Frozen, names: Sequence[str]) -> str | None:
    """What a user should know about a freeze that saves nothing, or much less than it could; None if it is fine."""
    if not frozen:
        return None
    saved = savings(config, frozen)
    lowest = 0
    while lowest < config.n_layers and matching((f"blocks.{lowest}",), names, "") <= frozen.names:
        lowest += 1
    if lowest and not set(config.input_names) <= frozen.names:
        could = savings(config, Frozen(frozen.names | {*config.input_names}, frozen.trained_rows))
        tied = " (tied to the head, which goes on training it)" if config.tie_embeddings else ""
        return (
            f"the embedding below the {lowest} frozen lowest layer(s) still trains, so the whole backward pass runs "
            f"through them: {saved:.1%} of a step's FLOPs are saved, {could:.1%} with the embedding's "
            f"look-up{tied} frozen, too (embedding: true)"
        )
    if saved < 0.01:
        return f"this freeze saves {saved:.2%} of a step's FLOPs: no product is left out (norms and look-ups have none)"
    return None


def summary(frozen: Mapping[str, None] | frozenset[str], names: Sequence[str]) -> list[str]:
    """Frozen parameters in few words: a layer that is frozen as a whole is one entry."""
    blocks = sorted({name.split(".")[1] for name in frozen if name.startswith("blocks.")}, key=int)
    whole = [b for b in blocks if all(name in frozen for name in names if name.startswith(f"blocks.{b}."))]
    rest = [n for n in names if n in frozen and not (n.startswith("blocks.") and n.split(".")[1] in whole)]
    return [f"blocks.{b}" for b in whole] + rest
