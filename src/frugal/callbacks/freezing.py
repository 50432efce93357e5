"""Leave a part of the model alone for a part of the run, and save the work."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from frugal.callbacks.cost import CostMeter
from frugal.errors import UserError, require
from frugal.model.config import Frozen
from frugal.model.transformer import BlockStack
from frugal.tracking.run_folder import RunFolder, keep_steps
from frugal.training import freezing as plan
from frugal.training.checkpointing import read_checkpoint
from frugal.training.expert_slices import ExpertSlices
from frugal.training.freezing import Decision, ExpertChoice, Importance, Prefix, Window
from frugal.training.importance import (
    Units,
    block_mean_squares,
    block_units,
    expert_mean_squares,
    routing_scores,
)
from frugal.training.sharded import distribute_like
from frugal.training.strategies import FSDP2Strategy

log = logging.getLogger(__name__)


class Freezing(pl.Callback):
    """Freeze by schedule, by measured importance, or all but the experts that the data use; all off by default.

    A frozen parameter has no gradient, and the optimizer passes it over: its weights do not decay and its moments rest
    until the thaw. The pattern changes between optimizer steps only. Decisions and changes go to `freezing.jsonl`.

    Args:
        windows: parameters, layers or the embedding, from one step to another.
        prefix: the lowest layers, one after the other.
        importance: the least important layers or experts, measured again and again.
        experts: everything but the experts that the training data use.
    """

    def __init__(
        self,
        windows: list[Window] | None = None,
        prefix: Prefix | None = None,
        importance: Importance | None = None,
        experts: ExpertChoice | None = None,
    ) -> None:
        self.windows = [*(windows or []), *(prefix.windows() if prefix else [])]
        self.importance, self.experts = importance, experts
        require(
            importance is None or experts is None,
            "freezing.experts: cannot be combined with freezing.importance, which thaws what it froze",
        )
        self.decisions: list[Decision] = []
        self._loaded_slices: dict[str, Any] | None = None
        self._slices: ExpertSlices | None = None
        self._now: tuple[frozenset[str], dict[int, tuple[int, ...]], dict[int, float]] = (frozenset(), {}, {})
        self._lookup: Any = None
        self._said: set[str] = set()
        # A measurement under way: sums over its steps by unit, and loads by layer.
        self._sums: dict[str, float] = {}
        self._loads: dict[int, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether anything is switched on, or was in the checkpoint."""
        return bool(self.windows or self.importance or self.experts or self.decisions or self._loaded_slices)

    # --- setting up

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Let DDP look for parameters without a gradient: it must not wait for them."""
        if stage != "fit" or not (self.windows or self.importance or self.experts):
            return
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy):
            strategy._ddp_kwargs["find_unused_parameters"] = True
            require(not strategy._ddp_kwargs.get("static_graph"), "trainer.strategy: freezing needs static_graph off")
        elif isinstance(strategy, FSDP2Strategy):
            chooses = self.experts is not None or (self.importance is not None and self.importance.unit == "expert")
            require(
                not chooses, "freezing: single experts cannot be frozen where trainer.strategy shards them; use ddp"
            )
        elif not isinstance(strategy, SingleDeviceStrategy):
            raise UserError(
                "trainer.strategy: freezing works on one device, under DDP and FSDP2, not with "
                f"{type(strategy).__name__}"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Check the whole plan, take over a checkpoint's state, and look at the routing where experts are chosen."""
        if not self.active:
            return
        self.model = pl_module.model
        require(pl_module.lora is None, "freezing: model.lora freezes all but its adapters already; use one of both")
        require(pl_module.fp8 is None, "freezing: not with model.fp8, which takes frozen weights' gradients")
        require(isinstance(self.model, BlockStack), "freezing: works with our own model, not with one of transformers")
        self.named = dict(self.model.named_parameters(remove_duplicate=False))
        self.names = list(self.named)
        self.aliases: dict[int, list[str]] = {}
        for name, parameter in self.named.items():
            self.aliases.setdefault(id(parameter), []).append(name)
        self.units: Units = block_units(self.model)
        for step in plan.changes(self.windows, trainer.max_steps):
            self._check(plan.frozen_at(step, self.windows, [], self.names, self.model.config.n_layers))
        for window in self.windows:  # those beyond the last step, too: a pattern that matches nothing is a mistake
            plan.names_in(window, self.names, self.model.config.n_layers)
        self._check_importance(pl_module)
        if trainer.is_global_zero:
            keep_steps(RunFolder(Path(trainer.default_root_dir)).freezing, trainer.global_step - 1)
        self._slices = ExpertSlices(self.model, trainer.optimizers[0])
        if self._loaded_slices:
            self._slices.adopt(self._loaded_slices)
        self._loads = {layer: load.to(pl_module.device) for layer, load in self._loads.items()}
        if not (self.importance or self.experts):
            self.decisions = []  # switched off since the checkpoint
        self._apply(trainer, pl_module, trainer.global_step - 1, say=False)  # where the checkpoint left off
        if self.experts and not self.decisions:
            meters = [c for c in trainer.callbacks if isinstance(c, CostMeter)]  # type: ignore[attr-defined]
            # The choice is a part of what it costs to train.
            with meters[0].during("step") if meters else nullcontext():
                self._choose_experts(trainer, pl_module, self.experts, meters)

    def _check(self, state: Any) -> None:
        frozen, experts, _ = state
        plan.check_aliases(frozen, self.aliases.values())
        trains = any(not set(names) <= frozen for names in self.aliases.values()) or bool(experts)
        require(trains, "freezing.windows: at some step nothing is left to train")

    def _check_importance(self, pl_module: Any) -> None:
        if not (wanted := self.importance):
            return
        moes = self.model.moe_layers()
        count = len(self.units)
        if wanted.unit == "expert":
            require(bool(moes), "freezing.importance.unit: the model has no routed experts")
            count = next(iter(moes.values())).config.n_experts
            require(
                len(set(map(id, (m.experts.w13 for m in moes.values())))) == len(moes),
                "freezing.importance.unit: layers that share their experts can only be frozen whole (unit: block)",
            )
        require(
            int(wanted.share * count + 1e-9) > 0,
            f"freezing.importance.share: {wanted.share} of {count} {wanted.unit}s is none",
        )
        if wanted.reference:
            state = read_checkpoint(wanted.reference)["state_dict"]
            self._reference = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
            same = all(k in self._reference and self._reference[k].shape == p.shape for k, p in self.named.items())
            require(same, f"freezing.importance.reference: {wanted.reference} holds a model of another shape")

    # --- the pattern of a step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the pattern of this optimizer step; it stays the same for all of its micro-batches."""
        if self.active:
            self._apply(trainer, pl_module, trainer.global_step, say=True)

    def _apply(self, trainer: pl.Trainer, pl_module: Any, step: int, say: bool) -> None:
        state = plan.frozen_at(step, self.windows, self.decisions, self.names, self.model.config.n_layers)
        assert self._slices is not None
        if state == self._now and self._slices.narrowed == state[1]:
            return
        self._check(state)
        frozen, experts, shares = self._now = state
        self._slices.set(experts)
        stacks = {name for layer in experts for name in plan.expert_stacks(layer, self.model.config.n_layers)}
        for names in self.aliases.values():
            parameter = self.named[names[0]]
            parameter.requires_grad_(not set(names) <= frozen and not stacks & set(names))
            if not parameter.requires_grad:
                parameter.grad = None
        tied = self.model.head.weight is self.model.embedding.weight
        detach = tied and plan.EMBEDDING in frozen and plan.HEAD not in frozen
        if detach != (self._lookup is not None):
            if detach:
                self._lookup = self.model.embedding.register_forward_hook(lambda module, args, out: out.detach())
            else:
                self._lookup.remove()
                self._lookup = None
        pl_module.frozen = Frozen(frozen, tuple(sorted(shares.items())))
        if say:
            self._tell(trainer, pl_module.frozen, step, experts, detach)

    def _tell(
        self, trainer: pl.Trainer, frozen: Frozen, step: int, experts: dict[int, tuple[int, ...]], detach: bool
    ) -> None:
        parts = plan.summary(frozen.names, self.names)
        saved = plan.savings(self.model.config, frozen)
        self._record(
            trainer,
            step,
            {"event": "frozen", "parameters": parts, "trained_experts": {str(k): v for k, v in experts.items()},
             "saved_flops": round(saved, 6)},
        )  # fmt: skip
        if not trainer.is_global_zero:
            return
        shown = ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
        if experts:
            stacks = self._slices.stacks if self._slices else {}
            resting = sum(len(stacks[layer].w13) - len(trained) for layer, trained in experts.items())
            shown += f"{', ' if shown else ''}{resting} experts"
        log.info("step %d: frozen: %s; saves %.1f%% of a step's FLOPs", step, shown or "nothing", 100 * saved)
        if detach:
            self._say(
                "freezing: the embedding is tied to the head, which goes on training the shared weight; frozen is its "
                "look-up: no gradient flows below the lowest layer, but the weights that are looked up still move"
            )
        if text := plan.complaint(self.model.config, frozen, self.names):
            self._say(f"freezing: {text}")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text)

    def _record(self, trainer: pl.Trainer, step: int, row: dict[str, Any]) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            path = RunFolder(Path(trainer.default_root_dir)).freezing
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")

    # --- measuring

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Sum the trained experts' gradients over the ranks (DDP does not know them); take a step's measurement."""
        if self._slices is None:
            return
        if trainer.world_size > 1:
            for leaf in self._slices.slices():
                if leaf.grad is not None:
                    leaf.grad.copy_(pl_module.all_reduce_sum(leaf.grad) / trainer.world_size)
        if not (self.importance and self.importance.measures(trainer.global_step)):
            return
        if self.importance.measure == "update_ratio":
            self._before = {name: p.detach().clone() for name, p in self.named.items() if p.grad is not None}
        elif self.importance.measure != "plasticity":
            grads = {name: p.grad for name, p in self.named.items() if p.grad is not None}
            root = self.importance.measure == "gradient_norm"
            self._add({unit: value**0.5 if root else value for unit, value in self._squares(grads).items()})

    def _squares(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        assert self.importance is not None
        if self.importance.unit == "block":
            return block_mean_squares(tensors, self.units)
        return expert_mean_squares(tensors, map(self._stem, self.model.moe_layers()))

    def _stem(self, layer: int) -> str:
        return plan.expert_stacks(layer, self.model.config.n_layers)[0].removesuffix(".w13")

    def _add(self, values: dict[str, float]) -> None:
        if all(
            value < float("inf") for value in values.values()
        ):  # an overflow that the scaler skips is no measurement
            for unit, value in values.items():
                self._sums[unit] = self._sums.get(unit, 0.0) + value

    def _ratios(self, change: Callable[[str, Tensor], Tensor], base: dict[str, Tensor]) -> dict[str, float]:
        changed = self._squares({name: change(name, tensor) for name, tensor in base.items()})
        squares = self._squares(base)
        return {unit: (value / max(squares[unit], 1e-30)) ** 0.5 for unit, value in changed.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Finish a step's measurement; decide after the last one."""
        if not self.active or not pl_module.step_complete:
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log("freezing/saved_flops", plan.savings(self.model.config, pl_module.frozen))
        step = trainer.global_step - 1
        if not (self.importance and self.importance.measures(step)):
            return
        if self._before:
            self._add(self._ratios(lambda name, old: self.named[name].detach() - old, self._before))
            self._before = {}
        for layer, moe in self.model.moe_layers().items():
            self._loads[layer] = self._loads.get(layer, 0) + moe.load
        if self.importance.decides_after(step):
            if self.importance.measure == "plasticity":
                base = {name: distribute_like(self._reference[name], p) for name, p in self.named.items()}
                self._add(self._ratios(lambda name, old: self.named[name].detach() - old, base))
            self._decide(trainer, step, self.importance)

    def _decide(self, trainer: pl.Trainer, step: int, importance: Importance) -> None:
        scores, loads = self._sums, self._loads
        self._sums, self._loads = {}, {}
        start, stop = step + 1, step + 1 + importance.freeze_steps
        if importance.unit == "block":
            units = list(scores)
            chosen = [units[i] for i in plan.least_important(list(scores.values()), importance.share)]
            decision = Decision(start, stop, names=tuple(name for unit in chosen for name in self.units[unit]))
        else:
            trained, shares = [], []
            for layer, moe in self.model.moe_layers().items():
                stem, n = self._stem(layer), moe.config.n_experts
                if f"{stem}.0" in scores:
                    out = plan.least_important([scores[f"{stem}.{i}"] for i in range(n)], importance.share)
                    left = tuple(i for i in range(n) if i not in out)
                    trained.append((layer, left))
                    shares.append((layer, _share(loads[layer], left)))
            decision = Decision(start, stop, trained_experts=tuple(trained), shares=tuple(shares))
        self._decided(trainer, step, decision, scores)

    def _decided(self, trainer: pl.Trainer, step: int, decision: Decision, scores: Any) -> None:
        self.decisions.append(decision)
        row = {"event": "decision", "effective": decision.start, "until": decision.stop, "scores": scores}
        frozen = plan.summary(frozenset(decision.names), self.names)
        experts = {str(layer): list(experts) for layer, experts in decision.trained_experts}
        self._record(trainer, step, {**row, "frozen": frozen, "trained_experts": experts})

    def _choose_experts(
        self, trainer: pl.Trainer, pl_module: Any, choice: ExpertChoice, meters: list[CostMeter]
    ) -> None:
        moes = self.model.moe_layers()
        require(bool(moes), "freezing.experts: the model has no routed experts")
        require(
            len(set(map(id, (m.experts.w13 for m in moes.values())))) == len(moes),
            "freezing.experts: cannot choose among experts that layers share (model.transformer.sharing)",
        )
        keep = plan.matching(choice.train, self.names, "freezing.experts.train")
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed
            loader = _aside(trainer.datamodule).train_dataloader()

            def batches() -> Iterator[Any]:
                for batch in itertools.islice(loader, choice.batches):
                    for meter in meters:
                        meter.add_forward(trainer, pl_module, batch)
                    yield trainer.strategy.batch_to_device(batch)

            context = trainer.precision_plugin.forward_context()
            scores = routing_scores(self.model, batches(), pl_module.visit, choice.score, context)
        stacks = {name for layer in moes for name in plan.expert_stacks(layer, self.model.config.n_layers)}
        trained, shares = [], []
        for layer in moes:
            scores[layer] = pl_module.all_reduce_sum(scores[layer]) if trainer.world_size > 1 else scores[layer]
            experts = tuple(plan.chosen_experts(scores[layer].tolist(), choice.threshold))
            trained.append((layer, experts))
            shares.append((layer, _share(scores[layer], experts)))
        names = tuple(name for name in self.names if name not in keep | stacks)
        decision = Decision(trainer.global_step, None, names, tuple(trained), tuple(shares))
        plan.check_aliases(frozenset(names), self.aliases.values())
        self._decided(trainer, trainer.global_step, decision, {str(k): v.tolist() for k, v in scores.items()})

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Decisions, a measurement under way, and the optimizer state that rests."""
        if not self.active:
            return {}
        if self._slices:
            self._slices.write_back()  # an optimizer that keeps averages has just put them into the slices
        return {
            "decisions": [asdict(decision) for decision in self.decisions],
            "sums": dict(self._sums),
            "loads": dict(self._loads),
            "slices": self._slices.state_dict() if self._slices else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stood."""
        if state_dict:
            self.decisions = [Decision(**values) for values in state_dict["decisions"]]
            self._sums, self._loads = dict(state_dict["sums"]), dict(state_dict["loads"])
            self._loaded_slices = state_dict["slices"]


def _aside(datamodule: Any) -> Any:
    """A copy that may make a second loader: the run's own, and what an adaptive mixture draws from, stay in place."""
    made = copy.copy(datamodule)
    if getattr(made, "adaptive", None) is not None:
        made.adaptive = copy.copy(made.adaptive)
    return made


def _share(load_E: Tensor, experts: tuple[int, ...]) -> float:
    """The share of rows that these experts get."""
    return float(load_E[list(experts)].sum() / load_E.sum().clamp_min(1e-12))
