"""Adaptive curricula: rules in closed form, the mixer against one that knew all along, workers, resume, refusals."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stand_in import trainer

from frugal.data.adaptive import AdaptiveCurriculum, AdaptiveMixer, AdaptiveOrder, Bands, check_adaptive, decide
from frugal.data.datamodule import TextDataModule
from frugal.data.mixture import Mixer
from frugal.data.sources import LocalText, Mixture, WeightedSource
from frugal.data.tokenization import TokenizerConfig
from frugal.data.transforms.base import SampleClock
from frugal.errors import UserError
from frugal.tracking.run_folder import read_lines

NAN = math.nan


def test_progress_by_hand() -> None:
    config = AdaptiveCurriculum("source", sharpness=math.log(3), floor=0.2)
    usual = [0.5, 0.25, 0.25]
    assert decide(config, usual, []) == usual == decide(config, usual, [[3, 2, 1]])  # nothing to compare with yet
    # Changes 0.4 (relative 1), 0.2 (a rise counts as well; relative 1/2), 0: e^(ln 3 v) = 3, sqrt 3, 1.
    weights = np.array([0.5 * 3, 0.25 * 3**0.5, 0.25])
    expected = 0.2 * np.array(usual) + 0.8 * weights / weights.sum()
    assert decide(config, usual, [[3, 2, 1], [2.6, 2.2, 1]]) == pytest.approx(expected.tolist())
    # A window in which a group was not drawn says nothing about it.
    assert decide(config, usual, [[3, 2, 1], [NAN, 2.2, 1], [2.6, NAN, 1]]) == pytest.approx(expected.tolist())


def test_loss_by_hand() -> None:
    config = AdaptiveCurriculum("source", rule="loss", sharpness=1.0, floor=0.1)
    e = math.exp(0.5)
    expected = 0.1 * np.array([0.5, 0.5]) + 0.9 * np.array([math.e, e]) / (math.e + e)
    assert decide(config, [0.5, 0.5], [[9, 9], [4, 2]]) == pytest.approx(expected.tolist())


def test_mastery_opens_one_group_after_the_other_and_closes_none() -> None:
    config = AdaptiveCurriculum("level", rule="mastery", mastered=1.0, floor=0.3)
    third = [1 / 3] * 3
    history: list[list[float]] = []
    for losses, opened in (([2, 3, 4], 1), ([1, 3, 4], 2), ([5, 1.2, 4], 2), ([5, NAN, 4], 2), ([9, 0.5, 0.1], 3)):
        history.append(losses)
        floor, open_share = 0.1, 0.7 / opened
        expected = [floor + open_share] * opened + [floor] * (3 - opened)
        assert decide(config, third, history) == pytest.approx(expected)


@given(
    rule=st.sampled_from(["progress", "loss"]),
    sharpness=st.floats(0, 20),
    floor=st.floats(0.05, 1),
    losses=st.lists(st.lists(st.one_of(st.floats(0, 20), st.just(NAN)), min_size=3, max_size=3), max_size=5),
)
def test_shares_add_up_and_keep_the_floor(rule: Any, sharpness: float, floor: float, losses: list[Any]) -> None:
    usual = [0.6, 0.3, 0.1]
    shares = decide(AdaptiveCurriculum("source", rule=rule, sharpness=sharpness, floor=floor), usual, losses)
    assert sum(shares) == pytest.approx(1)
    assert all(share >= floor * own - 1e-12 for share, own in zip(shares, usual, strict=True))
    if sharpness == 0:
        assert shares == pytest.approx(usual)


def test_bands_are_of_equal_size_by_difficulty_and_gone_through_again_and_again() -> None:
    difficulty = np.random.default_rng(0).random(42)
    bands = Bands("rarity", difficulty, 4, seed=3)
    assert bands.names == ["rarity_1", "rarity_2", "rarity_3", "rarity_4"]
    assert [len(members) for members in bands.members] == [11, 11, 10, 10] and sum(bands.shares) == 1
    hardest = [difficulty[members].max() for members in bands.members]
    assert all(difficulty[after].min() > hard for hard, after in zip(hardest, bands.members[1:], strict=False))
    first, second = ([bands.sequence(2, 10 * epoch + i) for i in range(10)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == sorted(bands.members[2].tolist()) and first != second
    assert [bands.sequence(2, i) for i in range(10)] == first  # back to an earlier epoch
    levels = Bands("level", np.array([3, 1, 1, 3, 7]), 4, seed=0)
    assert levels.names == ["level_1", "level_3", "level_7"] and levels.members[0].tolist() == [1, 2]


def order(config: AdaptiveCurriculum, n: int = 2) -> AdaptiveOrder:
    return AdaptiveOrder(config, [f"g{i}" for i in range(n)], [1.0] * n, None)


def test_equals_a_mixer_that_knew_the_decisions_all_along() -> None:
    config = AdaptiveCurriculum("source", every=100, lead=30, rule="loss", sharpness=3)
    adaptive = order(config)
    mixer = adaptive.start(SampleClock(0, 0, 4), 500, seed=5)
    found, shares = [], []
    for step in range(500):
        found += [mixer.locate(index) for index in range(4 * step, 4 * step + 4)]
        if (step + 1) % 100 == 0:
            shares.append(adaptive.observe([2 - step / 500, 1 + step / 400])["share"])
    weights = [[0.5, 0.5], *([share["g0"], share["g1"]] for share in shares[:4])]
    assert shares[0]["g0"] > 0.5 > shares[3]["g0"]
    known = Mixer([0, 520, 920, 1320, 1720], weights, seed=5)
    assert found == [known.locate(index) for index in range(2000)]


def test_reading_before_the_decision_is_a_fault_and_not_another_batch() -> None:
    config = AdaptiveCurriculum("source", every=10, lead=5)
    mixer = order(config).start(SampleClock(0, 0, 2), 50, seed=5)
    mixer.locate(29)
    with pytest.raises(RuntimeError, match=r"data\.adaptive\.lead: sample 30 is read before"):
        mixer.locate(30)


def module(tmp_path: Path, config: AdaptiveCurriculum, **options: Any) -> TextDataModule:
    names = ("a", "b") if config.by == "source" else ("a",)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}: line {i} of the text\n" for i in range(400)))
    sources = [WeightedSource(LocalText(str(tmp_path / f"{name}.txt")), 1, name) for name in names]
    source = Mixture(sources) if len(sources) > 1 else sources[0].source
    options = {"seq_len": 32, "cache_dir": str(tmp_path / "cache"), "adaptive": config, "batch_size": 3, **options}
    return TextDataModule(source, TokenizerConfig(300), **options)


def run(data: TextDataModule, stop: int, resume: Any = None, **where: int) -> list[torch.Tensor]:
    """Train to step `stop`: both micro-batches' tokens of each step, and a decision after each window."""
    data.trainer = trainer(**{"max_steps": 40, **where})
    data.prepare_data()
    data.setup("fit")
    if resume:
        data.load_state_dict(resume)
    steps: list[torch.Tensor] = []
    pair: list[torch.Tensor] = []
    for batch in data.train_dataloader():
        pair.append(batch["input_ids"])
        if len(pair) < 2:
            continue
        steps.append(torch.cat(pair))
        pair = []
        data.trainer.global_step += 1
        done = data.trainer.global_step
        assert data.adaptive and batch["groups"].max() < len(data.adaptive.names)
        if done % data.adaptive.config.every == 0:
            data.adaptive.observe([math.sin(done + i) + 2 for i in range(len(data.adaptive.names))])
        if done == stop:
            break
    return steps


BY = pytest.mark.parametrize("by", ["source", "rarity"])


@BY
def test_batches_do_not_depend_on_workers_and_resume_is_exact(tmp_path: Path, by: Any) -> None:
    config = AdaptiveCurriculum(by, every=5, lead=10, rule="loss", sharpness=4)
    made = []
    for workers in (0, 1, 4):
        data = module(tmp_path, config, num_workers=workers)
        made.append(torch.stack(run(data, 40)))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    first = module(tmp_path, config, num_workers=1)
    run(first, 17)  # one decision has taken effect, two are under way
    second = module(tmp_path, config)
    state = json.loads(json.dumps(first.state_dict()))
    assert torch.equal(torch.stack(run(second, 40, state, global_step=17)), made[0][17:])
    assert data.adaptive and second.adaptive and data.adaptive.state_dict() == second.adaptive.state_dict()


def test_decisions_under_way_keep_their_step_at_another_batch_size(tmp_path: Path) -> None:
    config = AdaptiveCurriculum("source", every=5, lead=10)
    first = module(tmp_path, config)
    run(first, 17)
    assert first.adaptive and first.adaptive.first_samples == [15 * 6, 20 * 6, 25 * 6]
    second = module(tmp_path, config, batch_size=6)
    run(second, 18, first.state_dict(), global_step=17)
    assert second.adaptive and second.adaptive.first_samples == [15 * 6, 17 * 6 + 3 * 12, 17 * 6 + 8 * 12]


def test_switched_on_in_the_middle_of_a_run(tmp_path: Path) -> None:
    data = module(tmp_path, AdaptiveCurriculum("source", every=5, lead=10))
    assert len(run(data, 40, global_step=27)) == 13
    assert data.adaptive and len(data.adaptive.losses) == 8
    assert data.adaptive.shares_at(34) == {"a": 0.5, "b": 0.5}  # from windows that nobody measured


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveCurriculum("source", every=0), r"adaptive\.every"),
        (lambda: AdaptiveCurriculum("source", floor=0), r"adaptive\.floor: must lie in \(0, 1\]"),
        (lambda: AdaptiveCurriculum("source", sharpness=-1), r"adaptive\.sharpness"),
        (lambda: AdaptiveCurriculum("level", rule="mastery"), r"adaptive\.mastered: rule mastery needs it"),
        (lambda: AdaptiveCurriculum("loss"), r"adaptive\.reference: difficulty loss needs a reference"),
        (
            lambda: check_adaptive(AdaptiveCurriculum("source", lead=9), 2, 4, 2, []),
            r"adaptive\.lead: 4 .* at least 10, got 9",
        ),
        (lambda: AdaptiveOrder(AdaptiveCurriculum("source"), ["a", "b"], [1, 500], None), r"floor: 0\.2 of a's usual"),
        (lambda: Bands("level", np.zeros(9), 4, 0), r"adaptive\.by: the source has one level only \(level_0\)"),
        (lambda: Bands("rarity", np.zeros(3), 4, 0), r"adaptive\.bands: 4 bands of 3 sequences"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_what_does_not_go_together_is_refused(train: Callable[..., Path]) -> None:
    for options, message in (
        (("--data.adaptive.by", "source"), r"data\.adaptive\.by: source needs several sources, there is 1"),
        (
            ("--data.adaptive.by", "rarity", "--data.curriculum.difficulty", "rarity", "--data.curriculum.steps", "3"),
            r"data\.adaptive: decides what is drawn, as does data\.curriculum",
        ),
        (("--data.adaptive.by", "level"), r"level needs a source that knows levels"),
    ):
        with pytest.raises(SystemExit):
            train("fit", *options)
        with pytest.raises(UserError, match=message):
            from frugal.cli.train import build

            build(["fit", "--config", "tiny.yaml", *options]).datamodule.prepare_data()


def test_a_checkpoint_of_other_groups_is_refused(tmp_path: Path) -> None:
    data = module(tmp_path, AdaptiveCurriculum("rarity", every=5, lead=10))
    run(data, 6)
    for config, message in (
        (AdaptiveCurriculum("rarity", bands=2, every=5, lead=10), r"the checkpoint has the groups rarity_1, .* not"),
        (AdaptiveCurriculum("rarity", every=4, lead=10), r"data\.adaptive\.every: the run began with 5"),
    ):
        other = module(tmp_path, config)
        with pytest.raises(UserError, match=message):
            run(other, 10, data.state_dict(), global_step=6)


def test_a_run_moves_to_what_it_has_not_learned(train: Callable[..., Path], project: Path) -> None:
    (project / "easy.txt").write_text("and again and again\n" * 1500)
    (project / "adaptive.yaml").write_text("""
data:
  source:
    class_path: frugal.data.sources.Mixture
    init_args:
      sources:
        - {name: easy, source: {class_path: frugal.data.sources.LocalText, init_args: {path: easy.txt}}}
        - {name: hard, source: {class_path: frugal.data.sources.LocalText, init_args: {path: text.txt}}}
  adaptive: {by: source, every: 10, lead: 2, rule: loss, sharpness: 4}
model: {optimizer: {lr: 0.01}}
trainer: {max_steps: 60}
""")
    folder = train("fit", "--config", "adaptive.yaml")
    decisions = read_lines(folder / "curriculum.jsonl")
    assert [row["step"] for row in decisions] == [9, 19, 29, 39, 49, 59]
    assert [row["effective"] for row in decisions] == [12, 22, 32, 42, 52, 62]
    last = decisions[-1]
    assert last["loss"]["easy"] < last["loss"]["hard"] and last["share"]["hard"] > 0.7
    metrics = {row["step"]: row for row in read_lines(folder / "metrics.jsonl") if "curriculum/share/hard" in row}
    assert metrics[9]["curriculum/share/hard"] == 0.5  # decided, and not yet in effect
    for row in decisions[:-1]:
        assert metrics[row["effective"] + 1]["curriculum/share/hard"] == pytest.approx(row["share"]["hard"])
        assert metrics[row["effective"] + 1]["curriculum/loss/easy"] == pytest.approx(row["loss"]["easy"])


def test_the_mixer_is_read_by_other_processes(tmp_path: Path) -> None:
    """What is decided after a worker has begun reaches it: the table is shared memory, not a copy."""
    mixer = AdaptiveMixer(AdaptiveCurriculum("source"), [0.5, 0.5], SampleClock(), 3, 0)
    assert mixer.table.is_shared()
