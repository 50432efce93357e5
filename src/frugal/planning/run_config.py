"""What a config says about a run, without building or importing anything of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from frugal.errors import UserError, require
from frugal.model.config import TransformerConfig, flops_per_token, muon_flops
from frugal.planning.model_card import is_run, on_base, read_layers, read_transformer

PRECONDITIONED = ("SOAP", "Shampoo", "ScalableShampoo")  # their products are counted in a run and not in a plan


@dataclass(frozen=True)
class PlannedRun:
    """A run as far as its cost goes.

    Args:
        model: the shape.
        steps: optimizer steps.
        tokens_per_step: over all micro-batches and devices of the config.
        micro_batch: sequences per micro-batch and device.
        seq_len: tokens per sequence, where `lengths` says nothing else.
        lengths: (step, tokens per sequence) from which on sequences are that long.
        accumulate: micro-batches per step.
        precision: as in `trainer.precision`; tf32 with `model.tf32`.
        optimizer: name of its class.
        ns_steps: iterations of Muon's orthogonalization; 0 where the matrices are frozen under adapters.
        sharded: whether devices share the weights, as the config's strategy has it; else each has a copy.
        experts_apart: whether such devices leave the routed experts in their places (expert parallelism).
        eval_batch: sequences per validation batch.
        validations: how often the run validates.
        compiled: whether blocks are compiled.
        recompute: whether the backward pass computes activations anew.
        fp8: whether some products are float8; they are planned as the others.
        left_out: what the config has and the plan does not count, in words.
    """

    model: TransformerConfig
    steps: int
    tokens_per_step: int
    micro_batch: int
    seq_len: int
    lengths: tuple[tuple[int, int], ...] = ()
    accumulate: int = 1
    precision: str = "32-true"
    optimizer: str = "AdamW"
    ns_steps: int = 5
    sharded: bool = False
    experts_apart: bool = False
    eval_batch: int = 0
    validations: int = 0
    compiled: bool = False
    recompute: bool = False
    fp8: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """That the run trains on."""
        return self.steps * self.tokens_per_step

    @property
    def optimizer_flops(self) -> int:
        """Of a step's orthogonalizations, if the optimizer is Muon."""
        return muon_flops(self.model, self.ns_steps) if self.optimizer == "Muon" else 0

    @property
    def flops(self) -> float:
        """Of the whole run on one device: forward and backward passes, stage of lengths by stage, and Muon's own."""
        stages = [(0, self.seq_len), *self.lengths]
        ends = [*(start for start, _ in stages[1:]), self.steps]
        return self.steps * self.optimizer_flops + sum(
            max(min(end, self.steps) - start, 0) * self.tokens_per_step * flops_per_token(self.model, length).training
            for (start, length), end in zip(stages, ends, strict=True)
        )


def read_run(
    path: str,
    tokens: float | None = None,
    seq_len: int | None = None,
    batch_tokens: int = 2**22,
    key: str = "experiment",
    processes: int = 1,
) -> PlannedRun:
    """Read an experiment, a whole config, a run's, or a bare shape of `configs/model/`.

    Args:
        path: the file, or several joined by `+`, each upon those before it.
        tokens: train on so many; a bare shape has no length of its own.
        seq_len: in place of the config's; of a bare shape, 4096 or its longest.
        batch_tokens: tokens per step of a bare shape.
        key: the argument that named the file.
        processes: how many there are in all where the config leaves that to the machine (devices auto or -1).

    Raises:
        UserError: no such file, no model of ours in it, a bare shape without `tokens`, or less than a step of them.
    """
    model = read_transformer(path, key)
    values = read_layers(path, key)
    if not is_run(values):
        if tokens is None:
            raise UserError(f"tokens: {path} is a shape without a run; say how long to train, such as --tokens 1T")
        length = min(seq_len or 4096, model.max_seq_len)
        batch = max(batch_tokens // length, 1) * length
        return PlannedRun(
            replace(model, max_seq_len=length), max(round(tokens / batch), 1), batch, 1, length, precision="bf16-mixed"
        )
    values = on_base(values)
    data, trainer, module = _args(values, "data"), values.get("trainer") or {}, _args(values, "model")
    settings = _args(module, "optimizer")
    optimizer = str(settings.get("class_path", "AdamW")).rpartition(".")[2]
    length = seq_len or int(data.get("seq_len", model.max_seq_len))
    strategy = _args(trainer, "strategy")
    tensor = int(strategy.get("tensor_parallel_size") or 1)
    micro, accumulate = int(data.get("batch_size", 8)), int(trainer.get("accumulate_grad_batches") or 1)
    per_step = micro * accumulate * length * max(_processes(trainer, processes) // tensor, 1)
    steps = round(tokens / per_step) if tokens else int(trainer.get("max_steps") or 0)
    if tokens and steps < 1:
        raise UserError(f"tokens: {tokens:g} are less than a step of {path}, {per_step}; give more")
    if steps < 1:
        raise UserError(f"trainer.max_steps: {path} does not say how long the run is; give --tokens")
    interval = trainer.get("val_check_interval")
    validations = -(-steps * accumulate // interval) if isinstance(interval, int) and interval > 0 else 1
    precision = _precision(trainer.get("precision"))
    if module.get("tf32"):
        require(precision == "32-true", f"model.tf32: trainer.precision {precision} leaves no products in float32")
        precision = "tf32"
    freezing = {key: value for key, value in (values.get("freezing") or {}).items() if value}
    left_out = ["freezing (the plan is an upper bound)"] if freezing else []
    left_out += ["the growing batch"] if data.get("batch_ramp") else []
    left_out += [f"{optimizer}'s own matrix products"] if optimizer in PRECONDITIONED else []
    left_out += ["tensor parallelism (memory and time are those without)"] if tensor > 1 else []
    left_out += [f"fp8 (planned as {precision})"] if module.get("fp8") else []
    left_out += (
        ["low-rank adapters (the base counts as if it trained: the plan is an upper bound)"]
        if module.get("lora")
        else []
    )
    return PlannedRun(
        model=replace(model, max_seq_len=length),
        steps=steps,
        tokens_per_step=per_step,
        micro_batch=micro,
        seq_len=length,
        lengths=tuple((int(stage["start"]), int(stage["seq_len"])) for stage in data.get("lengths") or ()),
        accumulate=accumulate,
        precision=precision,
        optimizer=optimizer,
        ns_steps=0 if module.get("lora") else int(settings.get("ns_steps", 5)),
        sharded="FSDP" in str(strategy.get("class_path", "")).upper(),
        experts_apart=int(strategy.get("expert_parallel_size") or 1) > 1,
        eval_batch=int(data.get("eval_batch_size") or micro),
        validations=validations,
        compiled=bool(module.get("compile")),
        recompute=bool(module.get("activation_checkpointing")),
        fp8=bool(module.get("fp8")),
        left_out=tuple(left_out),
    )


def _args(values: dict[str, Any], key: str) -> dict[str, Any]:
    """A class's arguments, whether or not `init_args` is spelt out."""
    section = values.get(key) or {}
    section = {"class_path": section} if isinstance(section, str) else section
    return section | (section.get("init_args") or {})


def _processes(trainer: dict[str, Any], automatic: int) -> int:
    """Of all nodes; `automatic` where the config leaves their number to the machine."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, str) and ("," in devices or devices.startswith("[")):  # by index: 0,1
        devices = [part for part in devices.strip("[]").split(",") if part.strip()]
    if isinstance(devices, list):
        devices = len(devices)
    count = int(devices) if str(devices).isdigit() else 0  # a number from the command line is dumped as text
    return count * int(trainer.get("num_nodes") or 1) if count else automatic


def _precision(value: Any) -> str:
    return {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}.get(str(value), str(value))
