"""Reasoning tasks and simulated physics: right answers pass, wrong ones fail, held-out ones are not trained on."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal.data.synthetic.physics import Physics, simulate
from frugal.data.synthetic.reasoning import ReasoningGym
from frugal.data.synthetic.tasks import Tasks
from frugal.errors import UserError

GYM = {"chain_sum": 3.0, "gcd": 1.0}


def gym(**changes: Any) -> ReasoningGym:
    return ReasoningGym(**{"tasks": GYM, "levels": [0, 2], "n": 200, **changes})


def physics(**changes: Any) -> Physics:
    return Physics(**{"levels": [0, 3], "n": 40, "holdout": 0.3, **changes})


def test_documents_carry_task_and_level_in_the_asked_numbers() -> None:
    documents = list(gym(n=80, order="levels").documents())
    assert [document.level for document in documents] == [0] * 80 + [2] * 80
    for level in (0, 2):
        sources = [document.source for document in documents if document.level == level]
        assert sources.count("reasoning-gym/chain_sum") == 60 and sources.count("reasoning-gym/gcd") == 20
    assert all(document.text.count("\n") == 2 and document.text.endswith("\n") for document in documents)
    sums = [(d.level, d.text.split(": ")[1].split(" =")[0]) for d in documents if "=" in d.text]
    # Two terms of one digit; four terms of three digits.
    assert all(len(text.split()) == {0: 3, 2: 7}[level] and len(text) == {0: 5, 2: 21}[level] for level, text in sums)


def test_levels_are_mixed_unless_asked_for_in_turn() -> None:
    levels = [document.level for document in gym(n=80).documents()]
    assert 5 < sum(level == 2 for level in levels[-20:]) < 15 and levels.count(0) == levels.count(2) == 80
    texts = [{document.text for document in gym(n=80, order=order).documents()} for order in ("mixed", "levels")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("source", [gym(), physics()], ids=["reasoning-gym", "physics"])
def test_training_and_held_out_questions_are_disjoint_whatever_the_seed(source: Tasks) -> None:
    trained = {item.question.strip() for item in source.training_items()}
    assert len(trained) == len(list(source.documents())) >= 0.9 * source.n * len(source.levels)
    other = type(source)(**{**arguments(source), "seed": 1})
    for task in source.tasks:
        for level in source.levels:
            held_out = [*source.held_out_items(task, level, 10), *other.held_out_items(task, level, 10)]
            assert len({item.question for item in held_out}) >= 5
            assert not trained & {item.question.strip() for item in held_out}
    also_trained = {item.question.strip() for item in other.training_items()}
    assert len(also_trained & trained) < 0.6 * len(trained)  # easy questions are few; the others differ


def arguments(source: Tasks) -> dict[str, Any]:
    return {"tasks": source.tasks, "levels": source.levels, "n": source.n, "holdout": source.holdout}


@pytest.mark.parametrize(
    "source",
    [gym(tasks={"chain_sum": 1, "gcd": 1, "prime_factorization": 1, "word_sorting": 1}, n=40), physics(n=9)],
    ids=["reasoning-gym", "physics"],
)
def test_the_verifier_accepts_the_truth_alone_and_never_raises(source: Tasks) -> None:
    items = list(source.training_items())
    for i, item in enumerate(items):
        assert source.score(item, item.answer) == 1
        assert source.answer_in(source.text(item).removeprefix(source.prompt(item))) == item.answer
        other = items[i - 1]
        if other.task == item.task and other.answer != item.answer:
            assert source.score(item, other.answer) < 1 or isinstance(source, Physics)
        for junk in ("", "no", "\u00d7 \u00d7", "1e999", "(", "\x00", item.answer + " 7"):
            assert source.score(item, junk) < 1, (item, junk)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 9))
def test_an_item_is_a_function_of_seed_and_index(index: int, level: int) -> None:
    for source, task in ((ReasoningGym(GYM), "chain_sum"), (Physics(), "spring")):
        again = ReasoningGym(GYM) if task == "chain_sum" else Physics()
        assert source.item(task, level, index) == again.item(task, level, index)


def test_free_fall_has_its_closed_form() -> None:
    states = simulate("projectile", 9.81, [0.0, 10.0], [3.0, 4.0], 0.1, 11)
    t = np.arange(11) * 0.1
    expected = np.stack((3 * t, 10 + 4 * t - 9.81 / 2 * t**2, np.full(11, 3.0), 4 - 9.81 * t), axis=1)
    np.testing.assert_allclose(states, expected, atol=1e-9)


def test_a_spring_swings_as_its_closed_form_says() -> None:
    states = simulate("spring", 20.0, [1.5], [-2.0], 0.1, 40)
    t, w = np.arange(40) * 0.1, math.sqrt(20.0)
    np.testing.assert_allclose(states[:, 0], 1.5 * np.cos(w * t) - 2 / w * np.sin(w * t), atol=1e-6)


def test_a_pendulum_keeps_its_energy_and_has_its_period() -> None:
    states = simulate("pendulum", 0.7, [2.4], [-1.0], 0.1, 100)
    energy = 0.5 * (0.7 * states[:, 1]) ** 2 + 9.81 * 0.7 * (1 - np.cos(states[:, 0]))
    assert energy.max() - energy.min() < 1e-5 * energy[0]
    period = 2 * math.pi * math.sqrt(0.7 / 9.81)
    small = simulate("pendulum", 0.7, [0.001], [0.0], period, 4)[:, 0]
    np.testing.assert_allclose(small, 0.001, rtol=1e-4)


def test_the_label_is_the_later_state_or_the_parameter() -> None:
    item = physics().item("projectile", 3, 5)
    lines = item.question.split("\n")
    x, z = (np.array([float(line.split()[i]) for line in lines[1:5]]) for i in (0, 1))
    answer = [float(word) for word in item.answer.split()]
    # Uniform motion along x; along z, second differences stay the same: extrapolated from what is shown.
    assert lines[0] == "projectile" and lines[-1] == "after 4?"
    assert answer[0] == pytest.approx(x[3] + 4 * (x[3] - x[0]) / 3, abs=0.03)
    gravity = physics(ask="parameter", decimals=4).item("projectile", 0, 5)
    z = np.array([float(line.split()[1]) for line in gravity.question.split("\n")[1:5]])
    assert gravity.question.endswith("gravity?") and float(gravity.answer) == gravity.details
    assert float(gravity.answer) == pytest.approx(-np.diff(z, 2).mean() / 0.1**2, abs=0.02)
    source = physics(tolerance=1.0)
    near = " ".join(f"{value + 0.01:.2f}" for value in answer)
    far = " ".join(f"{value + 0.02:.2f}" for value in answer)
    assert source.score(item, near) == 1 and source.score(item, far) == 0


def test_fingerprints_follow_every_setting() -> None:
    made = [gym(), gym(seed=1), gym(n=3), gym(levels=[0]), gym(tasks={"gcd": 1.0}), gym(template="{question} {answer}")]
    made += [gym(options={"gcd": {"max_value": 50}}), gym(holdout=0.1)]
    made += [physics(), physics(decimals=1), physics(ask="parameter"), physics(given=5)]
    prints = [source.fingerprint() for source in made]
    list(made[0].documents())  # what it has in memory by then is no setting
    assert made[0].fingerprint() == prints[0] == gym().fingerprint()
    assert len(set(prints)) == len(prints)


def test_a_task_with_few_questions_says_so(caplog: pytest.LogCaptureFixture) -> None:
    documents = list(gym(tasks={"products": 1.0}, levels=[0], n=150).documents())
    assert 80 < len(documents) < 100  # ten digits times ten digits, less the held-out ones
    assert "products at level 0 has only" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: list(gym(tasks={"no_such": 1.0}).documents()), r"data\.source\.tasks: reasoning-gym has no task"),
        (lambda: list(gym(levels=[11]).documents()), r"data\.source\.levels: chain_sum has levels 0 to 10, not 11"),
        (lambda: list(gym(levels=[-1]).documents()), "chain_sum has levels 0 to 10, not -1"),
        (lambda: list(gym(tasks={"rush_hour": 1.0}, levels=[0]).documents()), "rush_hour gives no answers"),
        (lambda: list(gym(options={"gcd": {"max_valu": 5}}).documents()), r"data\.source\.options: gcd at level 0:"),
        (lambda: gym(tasks={}), r"data\.source\.tasks: name at least one"),
        (lambda: gym(tasks={"gcd": -1.0}), "the weight of gcd must not be negative"),
        (lambda: gym(tasks={"gcd": 0.0}), "all weights are zero"),
        (lambda: gym(levels=[0, 0]), "each level once"),
        (lambda: gym(n=0), r"data\.source\.n: must be at least 1"),
        (lambda: gym(holdout=1.0), r"data\.source\.holdout"),
        (lambda: gym(template="{answer} {question}"), r"data\.source\.template"),
        (lambda: physics(tasks={"string": 1.0}), "no system 'string'; there are projectile, pendulum, spring"),
        (lambda: physics(levels=[10]), "physics has levels 0 to 9, not 10"),
        (lambda: physics(given=2), "at least 3 states"),
    ],
)
def test_bad_values_are_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
