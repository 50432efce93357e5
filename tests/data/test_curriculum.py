"""Curricula: pacing in closed form, difficulties by hand, pools that grow, lengths that keep the tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugal.data.batches import TrainingSequences
from frugal.data.curriculum import Curriculum, LengthStage, PacedOrder, check_lengths, length_at
from frugal.data.difficulty import difficulties
from frugal.data.transforms.base import SampleClock
from frugal.errors import UserError

PACINGS = ["linear", "root", "step", "exponential"]


@given(pacing=st.sampled_from(PACINGS), start=st.floats(0.01, 1), steps=st.integers(1, 500), step=st.integers(0, 600))
def test_the_pool_grows_from_start_to_everything(pacing: str, start: float, steps: int, step: int) -> None:
    curriculum = Curriculum("rarity", steps, start, pacing)  # type: ignore[arg-type]
    assert curriculum.share(0) == pytest.approx(start if steps > 0 else 1)
    assert start - 1e-12 <= curriculum.share(step) <= curriculum.share(step + 1) + 1e-12 <= 1 + 1e-9
    assert curriculum.share(steps) == 1


def test_pacing_by_hand() -> None:
    shares = {p: Curriculum("rarity", 100, 0.04, p).share(50) for p in PACINGS}  # type: ignore[arg-type]
    assert shares["linear"] == pytest.approx(0.52) and shares["exponential"] == pytest.approx(0.2)
    assert shares["root"] == pytest.approx(((0.04**2 + 1) / 2) ** 0.5) and shares["step"] == 1


def score(kind: str, tokens: list[int], seq_len: int, starts: list[int], levels: list[int]) -> list[float]:
    stream = np.array(tokens, dtype=np.uint16)
    counts = np.bincount(stream)
    found = difficulties(kind, stream, seq_len, np.array(starts), np.array(levels), counts, 0)  # type: ignore[arg-type]
    return found.tolist()


def test_difficulties_by_hand() -> None:
    # Sequences of 4: common tokens, then a rare one among them; the last (incomplete) one is not scored.
    tokens = [1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    rarity = score("rarity", tokens, 4, [0, 14], [-1])
    assert len(rarity) == 2 and rarity[0] == pytest.approx(-np.log(13 / 14))
    assert rarity[1] == pytest.approx((-3 * np.log(13 / 14) - np.log(1 / 14)) / 4)
    # Documents of 2, 6 and 6 tokens: the first sequence has the first two, the second only the second.
    assert score("length", tokens, 4, [0, 2, 8, 14], [0, 5, 1]) == [4.0, 6.0]
    assert score("level", tokens, 4, [0, 2, 8, 14], [0, 5, 1]) == [5.0, 5.0]
    rng = np.random.default_rng(0)
    noise = [*([7] * 256), *rng.integers(0, 60_000, 256).tolist(), *([7] * 300)]
    low, high = score("compressibility", noise, 256, [0, len(noise)], [-1])[:1], score("rarity", noise, 256, [0], [-1])
    assert low[0] < 0.1 and len(high) == 2
    with pytest.raises(UserError, match=r"level needs a source"):
        score("level", tokens, 4, [0, 14], [-1])


def sequences(curriculum: Curriculum | None, n: int = 200, seed: int = 3, **options: object) -> TrainingSequences:
    """Sequence k consists of the token k, and is the harder the larger k."""
    tokens = np.repeat(np.arange(n + 2), 8).astype(np.uint16)
    paced = [PacedOrder(curriculum, np.arange(n, dtype=float), seed)] if curriculum else []
    return TrainingSequences(tokens, 8, seed, clock=SampleClock(0, 0, 4), paced=paced, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("reverse", [False, True])
def test_samples_come_from_the_pool_of_their_step(reverse: bool) -> None:
    curriculum = Curriculum("rarity", steps=100, start=0.1, pacing="linear", reverse=reverse)
    data = sequences(curriculum)
    seen = np.array([data.locate(i)[1] // 8 for i in range(400)])
    for step in range(100):
        pool = np.ceil(curriculum.share(step) * 200)
        rank = 199 - seen[4 * step : 4 * step + 4] if reverse else seen[4 * step : 4 * step + 4]
        assert rank.max() < pool
    late = seen[320:] if not reverse else 199 - seen[320:]
    assert late.max() > 150  # and the whole pool is used
    plain = sequences(None)
    assert [data.locate(i) for i in range(400, 900)] == [plain.locate(i) for i in range(400, 900)]  # then as ever


def test_lengths_keep_the_tokens() -> None:
    stages = [LengthStage(0, 2), LengthStage(3, 4), LengthStage(10, 8)]
    assert [length_at(stages, 8, step) for step in (0, 2, 3, 9, 10, 99)] == [2, 2, 4, 4, 8, 8]
    short, plain = sequences(None, lengths=stages), sequences(None)
    for step, shape in ((0, (16, 2)), (3, (8, 4)), (10, (4, 8))):
        indices = list(range(4 * step, 4 * step + 4))
        batch, whole = short.__getitems__(indices), plain.__getitems__(indices)
        assert batch["input_ids"].shape == batch["labels"].shape == shape
        assert batch["input_ids"].flatten().equal(whole["input_ids"].flatten())
        assert batch["labels"].flatten().equal(whole["labels"].flatten())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Curriculum("rarity", 0), r"curriculum\.steps"),
        (lambda: Curriculum("rarity", 5, start=0), r"curriculum\.start"),
        (
            lambda: check_lengths([LengthStage(0, 3)], 8),
            r"lengths\[0\]\.seq_len: 3 does not divide .* \(8\)",
        ),
        (lambda: check_lengths([LengthStage(1, 4)], 8), r"lengths\[0\]\.start"),
        (lambda: check_lengths([LengthStage(0, 4), LengthStage(0, 8)], 8), r"lengths\[1\]\.start: 0 does not come"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_run_with_a_curriculum_from_yaml(train: Callable[..., Path], project: Path) -> None:
    (project / "easy.yaml").write_text("""
data:
  curriculum: {difficulty: compressibility, steps: 6, pacing: linear}
  lengths:
    - {start: 0, seq_len: 8}
    - {start: 4, seq_len: 16}
""")
    run = train("fit", "--config", "easy.yaml")
    plain = train("fit", "--run.name", "plain")
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run, plain))
    assert first["tokens_seen"] == second["tokens_seen"] and first["flops"] < second["flops"]  # shorter attention
    with pytest.raises(SystemExit):
        train("fit", "--config", "easy.yaml", "--data.curriculum.difficulty", "level")
