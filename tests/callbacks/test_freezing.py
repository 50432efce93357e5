"""Freezing while training: bit-identical weights, resting moments, accumulation, memory, chosen experts, compile."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from frugal.callbacks import freezing as freezing_module
from frugal.callbacks.cost import CostMeter
from frugal.callbacks.freezing import Freezing
from frugal.errors import UserError
from frugal.model.config import AttentionConfig, MoEConfig, SharingConfig, TransformerConfig, flops_per_token
from frugal.model.transformer import Transformer
from frugal.schedule import WarmupStableDecay
from frugal.tracking.run_folder import read_lines
from frugal.training.compilation import compile_blocks
from frugal.training.expert_slices import ExpertSlices
from frugal.training.freezing import ExpertChoice, Importance, Prefix, Window
from frugal.training.language_model import LanguageModel
from frugal.training.losses import summed_nll

CONFIG = TransformerConfig(
    vocab_size=32,
    d_model=16,
    n_layers=3,
    d_ff=24,
    attention=AttentionConfig(n_heads=2),
    moe=MoEConfig(n_experts=4, top_k=2, d_expert=8, n_shared_experts=1, first_k_dense=1),
    max_seq_len=12,
    init_std=0.3,
)


class Data(pl.LightningDataModule):
    def __init__(self, micro_batch: int = 8) -> None:
        super().__init__()
        self.ids = torch.randint(0, 32, (8, 12), generator=torch.Generator().manual_seed(0))
        self.micro_batch, self.token_bytes = micro_batch, torch.ones(32, dtype=torch.int64)

    def train_dataloader(self) -> DataLoader:
        return DataLoader([{"input_ids": x, "labels": x} for x in self.ids.split(self.micro_batch)], batch_size=None)  # type: ignore


class Spy(pl.Callback):
    """After each optimizer step: weights, first moments and gradients by name; before each micro-batch: what trains."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Tensor]] = []
        self.grads: list[dict[str, Tensor]] = []
        self.trained: list[tuple[int, frozenset[str]]] = []

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.weights.append({k: v.clone() for k, v in module.model.state_dict().items()})

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        names = {name: p for name, p in module.model.named_parameters()}
        trained = frozenset(name for name, p in names.items() if p.requires_grad)
        self.trained.append((trainer.global_step - module.step_complete, trained))
        if module.step_complete:
            state = trainer.optimizers[0].state
            self.weights.append({k: v.clone() for k, v in module.model.state_dict().items()})
            self.moments.append({n: state[p]["exp_avg"].clone() for n, p in names.items() if p in state})
            self.grads.append({n: p.grad.clone() for n, p in names.items() if p.grad is not None})


def fit(
    folder: Path,
    freezing: Freezing,
    steps: int,
    config: TransformerConfig = CONFIG,
    micro_batch: int = 8,
    accumulate: int = 1,
) -> tuple[LanguageModel, Spy, pl.Trainer]:
    torch.manual_seed(0)
    module = LanguageModel(config, partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5), WarmupStableDecay())
    spy = Spy()
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[freezing, spy],
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=Data(micro_batch))
    return module, spy, trainer


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name]) and "expert_bias" not in name}


def below(name: str) -> bool:
    return name.startswith(("embedding.", "blocks.0."))


def test_frozen_weights_rest_bit_for_bit_and_moments_go_on_at_the_thaw(tmp_path: Path) -> None:
    window = Window(layers=(0,), embedding=True, start=2, stop=4)
    _, spy, _ = fit(tmp_path, Freezing([window]), 6)
    names = set(spy.moments[0])
    frozen = {name for name in names if below(name)}
    for step in range(6):
        expected = names - frozen if 2 <= step < 4 else names
        assert changed(spy.weights[step], spy.weights[step + 1]) == expected  # weight decay is 0.5: nothing was decayed
        assert set(spy.grads[step]) == expected
    for name in frozen:
        assert torch.equal(spy.moments[1][name], spy.moments[3][name])  # untouched
        resumed = 0.9 * spy.moments[3][name] + 0.1 * spy.grads[4][name]
        torch.testing.assert_close(spy.moments[4][name], resumed, rtol=1e-5, atol=1e-8)
    rows = read_lines(tmp_path / "freezing.jsonl")
    assert [(row["step"], row["parameters"]) for row in rows] == [(2, ["blocks.0", "embedding.weight"]), (4, [])]


def test_what_never_trains_has_no_optimizer_state(tmp_path: Path) -> None:
    _, spy, trainer = fit(tmp_path, Freezing(prefix=Prefix(layers=2)), 3)
    (first, trained), state = spy.trained[-1], trainer.optimizers[0].state
    moments = [s[key] for s in state.values() for key in ("exp_avg", "exp_avg_sq")]
    sizes = {name: w.nbytes for name, w in spy.weights[0].items()}
    # The second layer trained in step 0 and keeps its moments; the embedding and the first never had any.
    assert sum(m.nbytes for m in moments) == 2 * sum(sizes[n] for n in sizes if not below(n) and "bias" not in n)
    assert first == 2 and not any(below(name) or name.startswith("blocks.1.") for name in trained)


def test_a_pattern_changes_between_optimizer_steps_only(tmp_path: Path) -> None:
    window = Window(layers=(0, 1), embedding=True, start=1, stop=3)
    _, plain, _ = fit(tmp_path, Freezing([window]), 4)
    _, cut, _ = fit(tmp_path, Freezing([window]), 4, micro_batch=2, accumulate=4)
    assert [step for step, _ in cut.trained] == [step for step in range(4) for _ in range(4)]
    assert all(len({trained for at, trained in cut.trained if at == step}) == 1 for step in range(4))
    for one, other in zip(plain.weights, cut.weights, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=1e-4, msg=name)
    above = {name for name in cut.moments[0] if name.startswith(("blocks.2.", "norm", "head"))}
    assert changed(cut.weights[1], cut.weights[3]) == above


def test_a_tied_embedding_rests_as_a_look_up_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tied = replace(CONFIG, tie_embeddings=True)
    with caplog.at_level("WARNING"):
        _, spy, _ = fit(tmp_path, Freezing([Window(layers=(0,), embedding=True, start=1, stop=2)]), 3, tied)
    moved = changed(spy.weights[1], spy.weights[2])
    assert "embedding.weight" in moved and not any(name.startswith("blocks.0.") for name in moved)
    assert caplog.text.count("frozen is its look-up") == 1 and "whole backward" not in caplog.text
    # The head's gradient alone: that of a model whose look-up is detached.
    oracle = Transformer(tied)
    oracle.load_state_dict(spy.weights[1])
    oracle.embedding.register_forward_hook(lambda module, args, out: out.detach())
    data = Data()
    (summed_nll(oracle.hidden(data.ids), oracle.head.weight, data.ids) / data.ids.numel()).backward()
    torch.testing.assert_close(spy.grads[1]["embedding.weight"], oracle.embedding.weight.grad, rtol=1e-5, atol=1e-7)
    with caplog.at_level("WARNING"):
        fit(tmp_path, Freezing([Window(layers=(0,), start=1)]), 3, tied)
    assert caplog.text.count("the whole backward pass runs through them") == 1


@pytest.mark.parametrize("unit", ["block", "expert"])
@pytest.mark.parametrize("measure", ["gradient_norm", "fisher", "update_ratio", "plasticity"])
def test_the_least_important_are_frozen_until_the_next_measurement(tmp_path: Path, measure: Any, unit: Any) -> None:
    reference = None
    if measure == "plasticity":
        torch.manual_seed(0)  # as the run itself starts
        reference = str(tmp_path / "reference.ckpt")
        state = {f"model.{k}": v for k, v in Transformer(CONFIG).state_dict().items()}
        torch.save({"state_dict": state}, reference)
    importance = Importance(measure, 0.5, measure_steps=2, freeze_steps=2, unit=unit, reference=reference)
    module, spy, _ = fit(tmp_path, Freezing(importance=importance), 5)
    (decision, *_), w = [r for r in read_lines(tmp_path / "freezing.jsonl") if r["event"] == "decision"], spy.weights
    assert (decision["step"], decision["effective"], decision["until"]) == (1, 2, 4)
    stems = [f"blocks.{i}" for i in range(3)] if unit == "block" else [f"blocks.{i}.ffn.experts" for i in (1, 2)]

    def parts(tensors: dict[str, Tensor], stem: str, index: int | None) -> Tensor:
        inside = [t for name, t in tensors.items() if name.startswith(f"{stem}.") and "bias" not in name]
        return torch.cat([(t if index is None else t[index]).flatten() for t in inside])

    expected = {}
    for stem in stems:
        for index in [None] if unit == "block" else range(4):
            at = [parts(weights, stem, index) for weights in w[:3]]
            grads = [parts(spy.grads[i], stem, index) for i in range(2)]
            score = {
                "gradient_norm": sum(g.square().mean().sqrt().item() for g in grads),
                "fisher": sum(g.square().mean().item() for g in grads),
                "update_ratio": sum(((at[i + 1] - at[i]).norm() / at[i].norm()).item() for i in range(2)),
                "plasticity": ((at[2] - at[0]).norm() / at[0].norm()).item(),
            }[measure]
            expected[stem if index is None else f"{stem}.{index}"] = score
    assert decision["scores"] == pytest.approx(expected, rel=1e-4)
    for stem in stems:
        if unit == "expert":
            trained = decision["trained_experts"][stem.split(".")[1]]
            for i in range(4):
                rests = torch.equal(parts(w[2], stem, i), parts(w[4], stem, i))
                assert rests == (i not in trained)
                assert rests == (expected[f"{stem}.{i}"] <= sorted(expected[f"{stem}.{j}"] for j in range(4))[1])
        else:
            assert torch.equal(parts(w[2], stem, None), parts(w[4], stem, None)) == (stem in decision["frozen"])
            assert (stem in decision["frozen"]) == (expected[stem] == min(expected.values()))
        assert not torch.equal(parts(w[4], stem, None), parts(w[5], stem, None))  # thawed
    assert all(moe.experts.trained is None for moe in module.model.moe_layers().values())  # type: ignore[union-attr]


def test_only_the_experts_that_the_data_use_train(tmp_path: Path) -> None:
    module, spy, trainer = fit(tmp_path, Freezing(experts=ExpertChoice(threshold=0.4, batches=1)), 2)
    (decision,) = [r for r in read_lines(tmp_path / "freezing.jsonl") if r["event"] == "decision"]
    assert changed(spy.weights[0], spy.weights[2]) == {
        f"blocks.{i}.ffn.experts.{w}" for i in (1, 2) for w in ("w13", "w2")
    }
    trained_numbers = 0
    for layer in (1, 2):
        experts = decision["trained_experts"][str(layer)]
        for name in ("w13", "w2"):
            before, after = (w[f"blocks.{layer}.ffn.experts.{name}"] for w in (spy.weights[0], spy.weights[2]))
            assert [i for i in range(4) if not torch.equal(before[i], after[i])] == experts
            trained_numbers += len(experts) * before[0].numel()
    moments = [s["exp_avg"] for s in trainer.optimizers[0].state.values()]
    assert sum(m.numel() for m in moments) == trained_numbers
    # The first step is that of a run in which everything trains, for these experts.
    _, full, _ = fit(tmp_path, Freezing(), 1)
    for layer, experts in decision["trained_experts"].items():
        for name in ("w13", "w2"):
            mine, theirs = (s.weights[1][f"blocks.{layer}.ffn.experts.{name}"][experts] for s in (spy, full))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    cost = flops_per_token(CONFIG, 12, module.frozen).training
    assert cost < 0.7 * flops_per_token(CONFIG, 12).training


def test_the_choice_is_booked_once_as_training_and_leaves_the_loader(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = []
    start, scores = CostMeter.on_train_start, freezing_module.routing_scores

    def look(self: CostMeter, trainer: Any, module: Any) -> None:
        data = trainer.datamodule
        assert data.train_loader is trainer.train_dataloader and data.training_data is data.train_loader.dataset
        assert data.adaptive.mixer is data.training_data.mixer
        forward = flops_per_token(module.config, 16).forward
        began.append((self.ledger.flops, self.ledger.seconds["step"], 2 * 4 * 16 * forward))
        start(self, trainer, module)

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return scores(*args)

    monkeypatch.setattr(CostMeter, "on_train_start", look)
    monkeypatch.setattr(freezing_module, "routing_scores", slow)
    options = (
        "--freezing.experts",
        "{threshold: 0.4, batches: 2}",
        "--data.adaptive",
        "{by: rarity, every: 2, lead: 2}",
    )
    folder = train("fit", "--trainer.max_steps", "2", *options)
    flops, seconds, expected = began[0]
    assert flops == pytest.approx(expected) and seconds > 0.5
    first = json.loads((folder / "summary.json").read_text())
    assert first["tokens_seen"] == 2 * 4 * 16
    train("fit", "--trainer.max_steps", "4", "--ckpt_path", "last", *options)
    assert began[1][0] == first["flops"]


def test_slices_carry_their_moments_there_and_back() -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    slices = ExpertSlices(model, optimizer)
    stack = model.moe_layers()[1].experts
    w13 = stack.w13
    moments = []
    for step in range(6):
        slices.set({1: (1, 3)} if 2 <= step < 4 else {})
        optimizer.zero_grad()
        before = w13.detach().clone()
        ids = Data().ids
        summed_nll(model.hidden(ids), model.head.weight, ids).backward()
        leaf = w13 if stack.trained is None else stack.trained.w13_SHD
        grad = leaf.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        moved = [i for i in range(4) if not torch.equal(before[i], w13[i])]
        assert moved == ([1, 3] if 2 <= step < 4 else [0, 1, 2, 3])
        moments.append((optimizer.state[leaf]["exp_avg"].clone(), grad))
        assert (w13 in optimizer.state) == (stack.trained is None)
    (at1, _), (at3, _), (at4, grad4) = moments[1], moments[3], moments[4]
    rested = at1.clone()
    rested[[1, 3]] = at3
    torch.testing.assert_close(at4, rested.lerp(grad4, 0.1), rtol=1e-6, atol=1e-9)
    assert sum(p is w13 for group in optimizer.param_groups for p in group["params"]) == 1


@pytest.mark.parametrize(
    ("freezing", "config", "message"),
    [
        (Freezing([Window(parameters=("*",))]), CONFIG, "nothing is left to train"),
        (Freezing([Window(layers=(7,), start=99)]), CONFIG, "there is no layer 7"),
        (
            Freezing([Window(parameters=("head",), start=1)]),
            replace(CONFIG, tie_embeddings=True),
            "tied to the embedding",
        ),
        (Freezing(importance=Importance("fisher", 0.1, 1, 1)), CONFIG, r"share: 0.1 of 3 blocks is none"),
        (
            Freezing(importance=Importance("fisher", 0.5, 1, 1, "expert")),
            replace(CONFIG, moe=None),
            "no routed experts",
        ),
        (Freezing(experts=ExpertChoice()), replace(CONFIG, moe=None), "no routed experts"),
        (
            Freezing([Window(layers=(1,), start=1)]),
            replace(CONFIG, sharing=SharingConfig(layers=(0, 1, 1))),
            "are one shared parameter",
        ),
    ],
)
def test_an_impossible_plan_is_refused_before_the_first_step(
    tmp_path: Path, freezing: Freezing, config: TransformerConfig, message: str
) -> None:
    with pytest.raises(UserError, match=f"^freezing\\..*{message}"):
        fit(tmp_path, freezing, 2, config)
    assert not (tmp_path / "freezing.jsonl").exists()


@pytest.mark.slow
def test_compiled_blocks_are_compiled_once_per_pattern() -> None:
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, n_layers=2))
    optimizer = torch.optim.AdamW(model.parameters())
    slices = ExpertSlices(model, optimizer)
    compile_blocks(model, fullgraph=True)
    ids = Data().ids
    torch._dynamo.utils.counters.clear()

    def cycle() -> int:
        for depth, experts in ((0, ()), (1, ()), (0, (1, 3))):
            slices.set({1: experts} if experts else {})
            for name, p in model.named_parameters():
                low = name.startswith(tuple(["embedding.", *(f"blocks.{i}." for i in range(depth))])) and depth > 0
                p.requires_grad_(not low and not (experts and ".experts." in name))
            optimizer.zero_grad()
            summed_nll(model.hidden(ids), model.head.weight, ids).backward()
            compiled = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            leaves = [leaf.grad.clone() for leaf in slices.slices()]
            optimizer.zero_grad()
            with torch.compiler.set_stance("force_eager"):
                summed_nll(model.hidden(ids), model.head.weight, ids).backward()
            for n, p in model.named_parameters():
                assert (p.grad is None) == (n not in compiled)
                if p.grad is not None:
                    torch.testing.assert_close(compiled[n], p.grad, atol=1e-5, rtol=1e-4)
            for mine, leaf in zip(leaves, slices.slices(), strict=True):
                torch.testing.assert_close(mine, leaf.grad, atol=1e-5, rtol=1e-4)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    first = cycle()
    # Each block: everything trains; the block or all below it is frozen; only some experts train.
    assert 4 <= first <= 6
    assert cycle() == first
