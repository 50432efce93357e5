"""The pure functions of freezing: schedules, choices, and what they save."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frugal.errors import UserError
from frugal.model.config import AttentionConfig, Frozen, MoEConfig, TransformerConfig
from frugal.model.transformer import Transformer
from frugal.training.freezing import (
    Decision,
    ExpertChoice,
    Importance,
    Prefix,
    Window,
    changes,
    check_aliases,
    chosen_experts,
    complaint,
    frozen_at,
    frozen_names,
    least_important,
    savings,
    summary,
)
from frugal.training.importance import block_mean_squares, block_units, expert_mean_squares, routing_scores

CONFIG = TransformerConfig(
    vocab_size=32,
    d_model=16,
    n_layers=4,
    d_ff=24,
    attention=AttentionConfig(n_heads=2),
    moe=MoEConfig(n_experts=4, top_k=2, d_expert=8, n_shared_experts=1, first_k_dense=1),
    max_seq_len=12,
    init_std=0.3,
)
with torch.device("meta"):
    NAMES = [name for name, _ in Transformer(CONFIG).named_parameters()]


@given(st.integers(1, 4), st.integers(0, 9), st.integers(1, 5), st.integers(0, 40), st.none() | st.integers(10, 30))
def test_a_prefix_grows_by_one_layer_at_a_time(
    layers: int, start: int, every: int, step: int, stop: int | None
) -> None:
    prefix = Prefix(layers, start, every, stop=stop)
    frozen = frozen_names(step, prefix.windows(), NAMES, 4)
    running = step >= start and (stop is None or step < stop)
    depth = min(layers, (step - start) // every + 1) if running else 0
    assert {name.split(".")[1] for name in frozen if name.startswith("blocks")} == {str(i) for i in range(depth)}
    assert ("embedding.weight" in frozen) == (depth > 0)
    assert all(name in frozen for name in NAMES if name.startswith(tuple(f"blocks.{i}." for i in range(depth))))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.sampled_from(NAMES)), max_size=4))
def test_the_pattern_changes_at_the_announced_steps_only(spans: list[tuple[int, int, str]]) -> None:
    windows = [Window(parameters=(name,), start=start, stop=start + length) for start, length, name in spans]
    edges = set(changes(windows, 50))
    before: Any = None
    for step in range(50):
        frozen = frozen_names(step, windows, NAMES, 4)
        assert frozen == {name for start, length, name in spans if start <= step < start + length}
        assert frozen == before or step in edges
        before = frozen


def test_patterns_name_modules_and_parameters() -> None:
    def of(**what: Any) -> set[str]:
        return set(frozen_names(0, [Window(**what)], NAMES, 4))

    assert of(parameters=("blocks.1",)) == {name for name in NAMES if name.startswith("blocks.1.")}
    assert of(parameters=("*.attention",)) == {name for name in NAMES if ".attention." in name}
    assert of(parameters=("*.experts.w*",)) == of(parameters=("*.experts.w2", "*.w13"))
    assert of(layers=(-1,)) == of(layers=(3,)) == of(parameters=("blocks.3",))
    assert summary(frozenset(of(layers=(0, 2), parameters=("norm",))), NAMES) == ["blocks.0", "blocks.2", "norm.weight"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(), "a window freezes nothing"),
        (lambda: Window(layers=(0,), start=5, stop=5), r"stop: must be greater than start \(5\), got 5"),
        (lambda: Window(layers=(0,), start=-1), "start: must not be negative"),
        (lambda: frozen_names(0, [Window(layers=(4,))], NAMES, 4), "there is no layer 4; the model has 4"),
        (lambda: frozen_names(0, [Window(parameters=("block.0",))], NAMES, 4), "'block.0' matches no parameter"),
        (lambda: Prefix(0), "prefix.layers: must be positive"),
        (lambda: Importance("fisher", 1.0, 1, 1), "share: must lie between 0 and 1"),
        (lambda: Importance("plasticity", 0.5, 1, 1), "reference: plasticity needs a checkpoint"),
        (lambda: Importance("fisher", 0.5, 0, 1), "measure_steps: must be at least 1"),
        (lambda: ExpertChoice(threshold=0), r"threshold: must lie in \(0, 1\]"),
        (lambda: check_aliases(frozenset({"a.w"}), [("a.w", "b.w")]), "a.w and b.w are one shared parameter"),
        (
            lambda: check_aliases(frozenset({"head.weight"}), [("embedding.weight", "head.weight")]),
            "the head is tied to the embedding",
        ),
    ],
)
def test_bad_values_name_their_key(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^freezing\\..*{message}"):
        make()


def test_cycles_of_measuring_and_freezing() -> None:
    importance = Importance("fisher", 0.5, measure_steps=2, freeze_steps=3, start=4)
    assert [step for step in range(15) if importance.measures(step)] == [4, 5, 9, 10, 14]
    assert [step for step in range(15) if importance.decides_after(step)] == [5, 10]


def test_decisions_act_in_their_window_and_freezing_by_name_is_stronger() -> None:
    decision = Decision(
        3, 6, names=("norm.weight",), trained_experts=((1, (0, 2)), (2, (1,))), shares=((1, 0.7), (2, 0.2))
    )
    window = Window(layers=(2,), start=5)
    assert frozen_at(2, [], [decision], NAMES, 4) == (frozenset(), {}, {})
    assert frozen_at(3, [window], [decision], NAMES, 4) == (
        {"norm.weight"}, {1: (0, 2), 2: (1,)}, {1: 0.7, 2: 0.2},
    )  # fmt: skip
    frozen, experts, shares = frozen_at(5, [window], [decision], NAMES, 4)
    assert "blocks.2.ffn.experts.w13" in frozen and (experts, shares) == ({1: (0, 2)}, {1: 0.7})
    assert frozen_at(6, [], [decision], NAMES, 4) == (frozenset(), {}, {})


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_fewest_experts_reach_the_threshold(scores: list[float], threshold: float) -> None:
    chosen = chosen_experts(scores, threshold)
    inside, outside = [scores[i] for i in chosen], [s for i, s in enumerate(scores) if i not in chosen]
    assert chosen == sorted(set(chosen)) and chosen
    assert sum(inside) >= threshold * sum(scores) * (1 - 1e-6) - 1e-300
    assert len(chosen) == 1 or sum(inside) - min(inside) < threshold * sum(scores) * (1 + 1e-9)
    assert not outside or min(inside) >= max(outside)


def test_the_least_important_are_the_lowest_and_ties_go_to_the_first() -> None:
    assert least_important([3.0, 1.0, 2.0, 1.0], 0.5) == [1, 3]
    assert least_important([1.0, 1.0, 1.0], 0.34) == [0]
    assert least_important([1.0, 2.0], 0.4) == []


def test_a_freeze_that_saves_nothing_is_named() -> None:
    def told(config: TransformerConfig, *parts: str) -> str | None:
        frozen = Frozen(frozenset(name for name in NAMES if name.startswith(parts)))
        return complaint(config, frozen, NAMES)

    tied = replace(CONFIG, tie_embeddings=True)
    assert complaint(CONFIG, Frozen(), NAMES) is None
    assert told(CONFIG, "embedding", "blocks.0.") is None
    assert told(CONFIG, "blocks.2.") is None
    assert "no product is left out" in (told(CONFIG, "norm.") or "")
    assert "no product is left out" in (told(CONFIG, "embedding") or "")
    text = told(tied, "blocks.0.", "blocks.1.") or ""
    assert "the whole backward pass runs through them" in text and "tied to the head" in text
    less = savings(tied, Frozen(frozenset(n for n in NAMES if n.startswith(("blocks.0.", "blocks.1.")))))
    more = savings(tied, Frozen(frozenset(n for n in NAMES if n.startswith(("blocks.0.", "blocks.1.", "emb")))))
    assert f"{less:.1%}" in text and f"{more:.1%}" in text and more > less > 0


def test_units_and_their_mean_squares() -> None:
    model = Transformer(CONFIG)
    tensors = {
        name: torch.full_like(p, 2.0 if name.startswith("blocks.2.") else 1.0) for name, p in model.named_parameters()
    }
    assert block_mean_squares(tensors, block_units(model)) == {
        "blocks.0": 1,
        "blocks.1": 1,
        "blocks.2": 4,
        "blocks.3": 1,
    }
    stem = "blocks.1.ffn.experts"
    tensors[f"{stem}.w13"][3] = 5.0
    found = expert_mean_squares(tensors, [stem])
    size13, size2 = 16 * 16, 16 * 8
    assert found == pytest.approx(
        {f"{stem}.{i}": 1.0 for i in range(3)} | {f"{stem}.3": (25 * size13 + size2) / (size13 + size2)}
    )


@pytest.mark.parametrize("score", ["token", "gate"])
def test_routing_scores_equal_a_plain_loop(score: Any) -> None:
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, n_mtp=1))
    batches = [torch.randint(0, 32, (2, 12)) for _ in range(2)]
    inputs: dict[int, list] = {}
    for layer, moe in model.moe_layers().items():
        moe.register_forward_pre_hook(lambda m, args, layer=layer: inputs.setdefault(layer, []).append(args[0]))
    visit = lambda ids: list(model.mtp_hidden(model.hidden(ids), ids))  # noqa: E731
    scores = routing_scores(model, batches, visit, score)
    assert model.training and not any(moe.experts._forward_pre_hooks for moe in model.moe_layers().values())
    for layer, moe in model.moe_layers().items():
        expected = [0.0] * 4
        for x in inputs[layer]:
            weights_TK, experts_TK = moe.router(x.flatten(0, 1))
            for weights, experts in zip(weights_TK.tolist(), experts_TK.tolist(), strict=True):
                for weight, expert in zip(weights, experts, strict=True):
                    expected[expert] += 0.5 if score == "token" else weight / sum(weights)
        assert scores[layer].tolist() == pytest.approx(expected, rel=1e-6)
        assert scores[layer].sum().item() == pytest.approx(2 * 2 * (12 if layer < 4 else 11))
    assert sorted(scores) == [1, 2, 3, 4]
