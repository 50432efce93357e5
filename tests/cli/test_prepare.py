"""`frugal prepare`: the data are prepared and what the run will see is drawn, without training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from frugal.cli.verbs import main
from frugal.data.batches import TrainingSequences
from frugal.data.curriculum import Curriculum, LengthStage, PacedOrder
from frugal.data.mixture import Mixer
from frugal.data.plan import plan_of
from frugal.data.transforms.base import SampleClock
from frugal.planning.hints import late_curriculum
from frugal.schedule import WarmupStableDecay


def test_it_draws_and_trains_nothing(
    project: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["frugal"])
    text = (project / "tiny.yaml").read_text().replace("  seq_len: 16\n", """  seq_len: 16
  curriculum: {difficulty: rarity, steps: 12}
  lengths: [{start: 0, seq_len: 8}, {start: 6, seq_len: 16}]
""")  # fmt: skip
    (project / "easy.yaml").write_text(text)
    main(["prepare", "easy.yaml", "--out", "seen.png"])
    out = capsys.readouterr().out
    assert (
        "text.txt: 9," in out and "100% of the samples at first" in out and "8 tokens per sequence at first, 16" in out
    )
    assert (project / "seen.png").read_bytes().startswith(b"\x89PNG") and not list((project / "runs").rglob("*"))
    main(["prepare", str(Path("configs/experiments/103_progressive_resizing.yaml")), "--out", "digits.png"])
    assert "14 pixels of a side at first, 28 at last" in capsys.readouterr().out and Path("digits.png").is_file()
    for arguments, message in (
        (["easy.yaml", "--out", "seen.txt"], "out: seen.txt must end in"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["easy.yaml", "--out", "no/such/folder.png"], "cannot write no/such/folder.png"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["prepare", *arguments])
        error = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and message in error[-1]


def test_the_plan_is_what_the_sequences_say() -> None:
    """Two sources of 100 sequences each; the first stage has only the first source."""
    tokens = np.zeros(2 * 816, dtype=np.uint16)
    difficulty = [np.arange(100.0), np.arange(100.0)]
    paced = [PacedOrder(Curriculum("rarity", 50, 0.1, "linear"), scores, 0) for scores in difficulty]
    mixer = Mixer([0, 200], [[1, 0], [1, 1]], 0)
    stages = [LengthStage(0, 4), LengthStage(30, 8)]
    data = TrainingSequences(
        tokens, 8, 0, [(0, 816), (816, 1632)], mixer, clock=SampleClock(0, 0, 4), paced=paced, lengths=stages
    )
    plan = plan_of(data, difficulty, "rarity", 100, points=10, samples=40)
    assert plan.steps.tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert plan.size.tolist() == [4, 4, 4, 8, 8, 8, 8, 8, 8, 8]
    assert plan.shares[0].tolist() == [1, 0] and 0.2 < plan.shares[8][1] < 0.8
    assert plan.difficulty[0, 2] < 30 and plan.difficulty[-1, 1] > 30  # the pool grew
    assert data.size_at(29) == 4 and plan.size_name == "tokens per sequence"
    assert plan_of(data, difficulty, "rarity", 50, points=5, samples=200).shares.tolist() == [[1, 0]] * 5
    assert plan.epochs == pytest.approx(mixer.drawn_before(400) / 100)
    assert sum(mixer.drawn_before(400)) == 400 and mixer.drawn_before(200).tolist() == [200, 0]


@pytest.mark.parametrize(
    ("steps", "expected"), [(400, None), (1000, "never trains on the whole"), (980, "down to 8% of its peak")]
)
def test_a_curriculum_that_lives_where_the_rate_is_zero(steps: int, expected: str | None) -> None:
    rate: Callable[[int, int], float] = WarmupStableDecay(decay_fraction=0.25).factor
    hint = late_curriculum(steps, 1000, rate)
    assert hint is None if expected is None else expected in (hint or "")
