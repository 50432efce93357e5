import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugal.errors import UserError
from frugal.schedule import LossWeight, Ramp, WarmupStableDecay


def test_values_by_hand() -> None:
    schedule = WarmupStableDecay(warmup_steps=4, decay_fraction=0.5)
    factors = [schedule.factor(step, 20) for step in range(20)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4:11] == [1.0] * 7
    assert factors[11:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert schedule.factor(20, 20) == 0


@given(
    warmup=st.integers(0, 50),
    fraction=st.floats(0, 1),
    shape=st.sampled_from(["linear", "cosine", "1-sqrt"]),
    final=st.floats(0, 0.5),
    total=st.integers(1, 200),
)
def test_rises_once_falls_once_and_stays_in_range(
    warmup: int, fraction: float, shape: str, final: float, total: int
) -> None:
    schedule = WarmupStableDecay(warmup, fraction, shape, final)  # type: ignore[arg-type]
    factors = [schedule.factor(step, total) for step in range(total + 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    rises = [b > a + 1e-12 for a, b in itertools.pairwise(factors)]
    falls = [b < a - 1e-12 for a, b in itertools.pairwise(factors)]
    assert True not in rises[falls.index(True) :] if True in falls else True


@pytest.mark.parametrize(("kwargs", "key"), [({"warmup_steps": -1}, "warmup_steps"), ({"decay_fraction": 2}, "decay")])
def test_impossible_values_name_their_key(kwargs: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        WarmupStableDecay(**kwargs)


def test_ramp_rises_stays_and_falls() -> None:
    ramp = Ramp(0.8, start=2, ramp_in=3, stop=12, ramp_out=1)
    values = [ramp.at(step) for step in range(14)]
    assert values == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.4, 0, 0])
    assert Ramp().at(0) == Ramp().at(10**9) == 1
    assert Ramp(0.5, start=3).at(2) == 0 and Ramp(0.5, start=3).at(3) == 0.5


@pytest.mark.parametrize(
    "options", [{"start": -1}, {"ramp_in": -1}, {"ramp_out": 2}, {"stop": 3, "start": 1, "ramp_in": 3}]
)
def test_impossible_ramps_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match=r"ramp\."):
        Ramp(**options)


def test_a_losss_weight_changes_once() -> None:
    weight = LossWeight(0.3, final=0.1, final_fraction=0.25)
    assert [weight.at(step, 8) for step in range(8)] == [0.3] * 6 + [0.1] * 2
    assert {LossWeight(0.3).at(step, 8) for step in range(8)} == {0.3}
    with pytest.raises(UserError, match=r"mtp_loss_weight\.final_fraction"):
        LossWeight(final_fraction=2)
    with pytest.raises(UserError, match="mtp_loss_weight"):
        LossWeight(-1)
