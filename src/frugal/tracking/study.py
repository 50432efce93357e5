"""A savings study as data: arms, seeds, lengths, target; and which runs it needs. Starts nothing and reads no run."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from frugal.errors import UserError, require
from frugal.overlay import overlaid, read_mapping
from frugal.tracking.named_files import named_files

AXES = ("tokens", "flops", "seconds", "joules", "dollars")
BASE = "configs/base.yaml"
SHARE = re.compile(r"(\d*\.?\d+) steps")


@dataclass(frozen=True)
class Equal:
    """A control's length: as many steps as spend what another arm's full run spends.

    Args:
        arm: the arm whose run at length 1 is matched.
        axis: which cost.
    """

    arm: str
    axis: Literal["tokens", "flops", "seconds"] = "flops"


@dataclass(frozen=True)
class Tune:
    """A small sweep before the study, at a seed of its own; its best value is used in all runs of the arm.

    Args:
        key: dotted option, for instance model.optimizer.lr.
        grid: its values, in order.
        seed: must not be among the study's seeds.
    """

    key: str
    grid: list[float]
    seed: int = 9001


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: letters, digits and dashes.
        about: what it is, for the report.
        overlays: YAML files under the project's root, merged in this order.
        options: what differs, as in an experiment's overlay; the text "0.25 steps" stands for that share of a run.
        controls: arms that it must also beat: the same with the technique's idea taken out.
        tune: its own sweep, beside what the baseline's chose.
        tuned_by: other arms whose sweeps' values it takes upon the baseline's.
        equal: makes it a control of one length, compared by loss.
        start: share of the study's steps at which the search for the target begins.
    """

    name: str
    about: str = ""
    overlays: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    controls: list[str] = field(default_factory=list)
    tune: Tune | None = None
    tuned_by: list[str] = field(default_factory=list)
    equal: Equal | None = None
    start: float = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.name):
            raise UserError(f"arms: name an arm with lower-case letters, digits and '-', not {self.name!r}")
        require(isinstance(self.options, dict), f"arms: {self.name}: options: must hold keys, got {self.options!r}")


@dataclass(frozen=True)
class Study:
    """Arms that are compared by what they need to reach one validation loss.

    Args:
        question: what the study asks.
        steps: optimizer steps of the baseline.
        arms: techniques and controls.
        parts: parts of a recipe: makes the arms `recipe` (all), `only-PART` and `without-PART`.
        base: the baseline.
        overlays: for all arms.
        options: for all arms.
        seeds: every arm is run with each.
        target: `baseline` is the final loss of the baseline with the same seed; a number is a value of the metric.
        lengths: shares of `steps` at which an arm may be run, in order; each run has a schedule of its own length.
        margin: relative difference of costs that does not matter.
        metric: the loss that counts, for instance that of one source in place of all validation text's bits per byte.
        clock: what a CPU's seconds are: those of its processor while training, which other programs change less, or
            those of the clock, for techniques that use other processes (a busy machine spoils them).
        add_one_in: with `parts`, run each alone.
        leave_one_out: with `parts`, run the recipe without each.
        recipe_tune: a sweep for the whole recipe; the recipe less a part takes its value.
        only: names of arms to run for now, with the baseline and what they are compared with; empty: all.
    """

    question: str
    steps: int
    arms: list[Arm] = field(default_factory=list)
    parts: list[Arm] = field(default_factory=list)
    base: Arm = field(default_factory=lambda: Arm("base"))
    overlays: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    target: Literal["baseline"] | float = "baseline"
    lengths: list[float] = field(default_factory=lambda: [0.25, 0.35, 0.5, 0.7, 1.0, 1.4])
    margin: float = 0.02
    metric: str = "val/bits_per_byte"
    clock: Literal["processor", "wall"] = "processor"
    add_one_in: bool = True
    leave_one_out: bool = True
    recipe_tune: Tune | None = None
    only: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(self.steps > 0, f"steps: must be positive, got {self.steps}")
        require(isinstance(self.options, dict), f"options: must hold keys, got {self.options!r}")
        require(bool(self.arms or self.parts), "arms: a study needs an arm beside its baseline, or parts of a recipe")
        require(len(set(self.seeds)) == len(self.seeds) > 0, "seeds: give at least one, each once")
        require(
            self.lengths == sorted(set(self.lengths)) and bool(self.lengths) and self.lengths[0] > 0,
            "lengths: positive shares, in rising order",
        )
        require(self.margin >= 0, f"margin: must not be negative, got {self.margin}")
        number = isinstance(self.target, str) or math.isfinite(self.target)
        require(number, f"target: must be baseline or a value of {self.metric}, got {self.target}")
        arms = self._every_arm()
        names = [arm.name for arm in arms]
        for name in names:
            require(names.count(name) == 1, f"arms: {name} stands there twice")
        for name in self.only:
            require(name in names, f"arms: there is no arm {name!r}, only {', '.join(names)}")
        for arm in arms:
            for wanted in arm_names(arm):
                require(wanted in names and wanted != arm.name, f"arms: {arm.name}: there is no other arm {wanted!r}")
            require(arm.start in self.lengths, f"arms: {arm.name}: start {arm.start} is none of the lengths")
            if arm.tune is not None:
                require(arm.tune.seed not in self.seeds, f"arms: {arm.name}: tune.seed is a seed of the study")
                require(len(arm.tune.grid) > 1, f"arms: {arm.name}: tune.grid needs two values or more")
        by_name = {arm.name: arm for arm in arms}
        controls = {control for arm in arms for control in arm.controls}
        for arm in arms:
            if arm.equal:
                require(
                    by_name[arm.equal.arm].equal is None, f"arms: {arm.name}: {arm.equal.arm} is such a control itself"
                )
                require(arm.name in controls, f"arms: {arm.name}: no arm names it among its controls; it has no use")
            for other in arm.tuned_by:
                require(by_name[other].tune is not None, f"arms: {arm.name}: tuned_by: {other} has no sweep")
        require(not self.base.tuned_by, "base: tuned_by: others take the baseline's values, not it theirs")
        if self.target == "baseline":
            require(1.0 in self.lengths, "lengths: 1.0 must be among them when the baseline's loss is the target")

    def all_arms(self) -> list[Arm]:
        """Baseline first, then arms, then those made from the recipe's parts; those that `only` leaves."""
        arms = self._every_arm()
        if not self.only:
            return arms
        by_name, wanted = {arm.name: arm for arm in arms}, [self.base.name, *self.only]
        for name in wanted:  # grows while it is read
            wanted += [other for other in arm_names(by_name[name]) if other not in wanted]
        return [arm for arm in arms if arm.name in wanted]

    def _every_arm(self) -> list[Arm]:
        made = []
        if self.parts:
            made.append(replace(self._joined("recipe", self.parts, "all parts together"), tune=self.recipe_tune))
        if self.parts and self.add_one_in:
            made += [replace(part, name=f"only-{part.name}") for part in self.parts]
        if len(self.parts) > 2 and self.leave_one_out:
            for part in self.parts:
                rest = [other for other in self.parts if other is not part]
                less = self._joined(f"without-{part.name}", rest, f"the recipe less {part.about or part.name}")
                made.append(replace(less, tuned_by=[*less.tuned_by, *(["recipe"] if self.recipe_tune else [])]))
        return [self.base, *self.arms, *made]

    def _joined(self, name: str, parts: Sequence[Arm], about: str) -> Arm:
        """Several parts as one arm, with what their own sweeps chose.

        Its search begins where it would end if their savings multiplied.
        """
        options: dict[str, Any] = {}
        for part in parts:
            options = overlaid(options, part.options)
            require(
                part.tune is None or self.add_one_in, f"parts: {part.name}: tune needs add_one_in, its sweep runs alone"
            )
        guess = math.prod(part.start for part in parts)
        start = min(self.lengths, key=lambda length: abs(length - guess))
        tuned_by = [f"only-{part.name}" for part in parts if part.tune]
        files = [overlay for part in parts for overlay in part.overlays]
        return Arm(name, about, files, options, tuned_by=tuned_by, start=start)


def arm_names(arm: Arm) -> list[str]:
    """Other arms that it is compared with or takes values from."""
    return [*arm.controls, *([arm.equal.arm] if arm.equal else []), *arm.tuned_by]


@dataclass(frozen=True)
class RunSpec:
    """One run of a study: `overlay` is the whole config that differs from configs/base.yaml."""

    name: str
    arm: str
    seed: int
    steps: int
    overlay: dict[str, Any]


def shares_as_steps(tree: Any, steps: int) -> Any:
    """The tree with every text like "0.25 steps" replaced by that share of the steps."""
    if isinstance(tree, Mapping):
        return {key: shares_as_steps(value, steps) for key, value in tree.items()}
    if isinstance(tree, list):
        return [shares_as_steps(value, steps) for value in tree]
    if isinstance(tree, str) and (found := SHARE.fullmatch(tree)):
        return round(float(found[1]) * steps)
    return tree


def nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as {"a": {"b": value}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def run_spec(
    study: Study, arm: Arm, seed: int, steps: int, tuned: Mapping[str, Mapping[str, float]], root: Path = Path()
) -> RunSpec:
    """The run of an arm with a seed and a number of steps.

    Args:
        study: the study.
        arm: one of its arms.
        seed: for weights and data alike, so arms are paired.
        steps: optimizer steps.
        tuned: what sweeps have chosen: by arm, values by dotted key.
        root: where configs/base.yaml and overlay files are looked up.

    Raises:
        UserError: an overlay file that is not there or cannot be read, or options that fit no config.
    """
    tree: dict[str, Any] = {}
    layers = [(study.overlays, study.options), (study.base.overlays, study.base.options)]
    layers.append(([], _chosen(tuned.get(study.base.name, {}))))
    if arm is not study.base:
        # The baseline's tuned values give way to what an arm says, and that to its own sweep.
        layers.append((arm.overlays, arm.options))
        layers += [([], _chosen(tuned.get(name, {}))) for name in (*arm.tuned_by, arm.name)]
    for files, options in layers:
        for name in files:
            require((root / name).is_file(), f"arms: {arm.name}: no file {name}")
            tree = overlaid(tree, read_mapping(root / name))
        tree = overlaid(tree, options)
    tree = shares_as_steps(tree, steps)
    trainer = tree.get("trainer", {})
    require(isinstance(trainer, Mapping), f"arms: {arm.name}: options.trainer: must hold keys, got {trainer!r}")
    # One validation, at the end: it is the measurement, and no part of what a technique saves.
    ends = {"max_steps": steps, "val_check_interval": steps * (trainer.get("accumulate_grad_batches") or 1)}
    tree = overlaid(tree, {"seed_everything": seed, "trainer": ends})
    tree.pop("run", None)
    # A run is found again by all that makes it: the defaults below it and the files it names, too.
    base = read_mapping(root / BASE) if (root / BASE).is_file() else {}
    whole = [{**base, "run": None}, tree, named_files([base, tree], root)]
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]
    return RunSpec(f"{arm.name}_{steps}_s{seed}_{digest}", arm.name, seed, steps, tree)


def _chosen(values: Mapping[str, float]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        tree = overlaid(tree, nested(key, value))
    return tree


def study_files(path: str) -> list[Path]:
    """The files that a study's path names."""
    return [Path(part) for part in ([path] if Path(path).is_file() else path.split("+"))]


def read_study(path: str) -> Study:
    """Read and check a study.

    Args:
        path: its file; of several joined by `+`, each lies upon those before it.

    Raises:
        UserError: no such file, an unknown key or a wrong type, named by key.
    """
    content: dict[str, Any] = {}
    for file in study_files(path):
        require(file.is_file(), f"study: no file {file}")
        content = overlaid(content, read_mapping(file))
    require(bool(content), f"{path}: must hold a study's keys (question, steps, arms, ...)")
    # jsonargparse would build the classes that options name, so it sees a number in the place of each.
    kept: list[dict[str, Any]] = []

    def put_aside(tree: Any) -> Any:
        if isinstance(tree, list):
            return [put_aside(value) for value in tree]
        if not isinstance(tree, dict):
            return tree
        if isinstance(tree.get("options"), dict):
            kept.append(tree["options"])
            tree = {**tree, "options": {"kept": len(kept) - 1}}
        return {key: value if key == "options" else put_aside(value) for key, value in tree.items()}

    def put_back(owner: Any) -> Any:
        return replace(owner, options=kept[owner.options["kept"]]) if owner.options else owner

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, "study")
    study = parser.instantiate_classes(parser.parse_object({"study": put_aside(content)})).study
    study = Study(**vars(study)) if isinstance(study, Namespace) else study
    arms, parts = map(put_back, study.arms), map(put_back, study.parts)
    return replace(put_back(study), base=put_back(study.base), arms=list(arms), parts=list(parts))
