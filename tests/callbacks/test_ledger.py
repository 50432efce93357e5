"""The account of a run that is killed, resumed, killed again."""

from frugal.callbacks.ledger import PARTS, Ledger


def ledger(done: int, **seconds: float) -> Ledger:
    return Ledger(
        step=done,
        tokens=10 * done,
        flops=100.0 * done,
        dollars=sum(seconds.values()),
        joules=2 * sum(seconds.values()),
        seconds=dict.fromkeys(PARTS, 0.0) | seconds,
    )


def test_two_kills_in_a_row() -> None:
    checkpoint = ledger(6, step=60.0, start_up=5.0).state()
    first = Ledger.load(checkpoint)
    first.add_lost(ledger(8, step=80.0, start_up=5.0, checkpoint=1.0))
    assert first.seconds["lost"] == 21.0 and first.seconds["step"] == 60.0
    assert first.lost == {"steps": 2, "tokens": 20, "flops": 200.0}
    assert first.dollars == 86.0 and first.joules == 172.0 and first.tokens == 60
    # The second process starts from the same checkpoint, spends 7 seconds and one step, and is killed, too.
    first.seconds["start_up"] += 4.0
    first.seconds["step"] += 3.0
    first.step, first.tokens, first.flops, first.dollars = 7, 70, 700.0, 93.0
    second = Ledger.load(checkpoint)
    second.add_lost(Ledger.load(first.state()))
    assert second.seconds["lost"] == 28.0 and second.total_seconds == 93.0 == second.dollars
    assert second.lost == {"steps": 3, "tokens": 30, "flops": 300.0} and second.tokens == 60
    assert second.goodput == 60 / 93


def test_what_follows_the_last_checkpoint_is_not_lost() -> None:
    done = Ledger.load(ledger(12, step=12.0).state())
    done.add_lost(ledger(12, step=12.0, validation=3.0, checkpoint=1.0))
    assert done.seconds["validation"] == 3.0 and done.seconds["lost"] == 0 and done.lost["steps"] == 0
    assert done.dollars == 16.0


def test_data_made_here_is_billed_once_and_data_from_the_cache_on_top() -> None:
    here = ledger(0, start_up=10.0)
    assert here.charge_data(4.0, 6.0) == 0
    assert here.seconds["start_up"] == 6.0 and here.total_seconds == 10.0 == here.wall_seconds
    cached = ledger(0, start_up=10.0)
    assert cached.charge_data(4.0, 0.25) == 3.75
    assert cached.total_seconds == 13.75 and cached.wall_seconds == 10.0


def test_older_checkpoints_can_be_read() -> None:
    old = Ledger.load({"tokens": 5, "flops": 1.0, "seconds": {"train": 3.0, "validation": 1.0}, "waited": 1.0})
    assert old.seconds["step"] == 3.0 and old.total_seconds == 4.0 and old.tokens == 5


def test_the_larger_peak_is_kept() -> None:
    account = Ledger()
    account.note_peak(None)
    assert account.peak_bytes is None
    for size in (5, 9, None, 7):
        account.note_peak(size)
    assert account.peak_bytes == 9
