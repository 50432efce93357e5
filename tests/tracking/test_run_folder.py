from pathlib import Path

import pytest

from frugal.errors import UserError
from frugal.tracking.card import card_rows
from frugal.tracking.run_folder import RunConfig, folder_of, keep_steps, new_run, newest_run, read_lines
from frugal.units import duration, short


def test_the_newest_run_with_a_checkpoint_is_found(tmp_path: Path) -> None:
    config = RunConfig(name="a", root=str(tmp_path))
    assert newest_run(config, "last.ckpt") is None
    for run_id in ("20260101-000000-aaaa", "20260102-000000-aaaa", "20260103-000000-aaaa"):
        (tmp_path / "a" / run_id / "checkpoints").mkdir(parents=True)
        (tmp_path / "a" / run_id / "config.yaml").touch()
    for run_id in ("20260101-000000-aaaa", "20260102-000000-aaaa"):
        (tmp_path / "a" / run_id / "checkpoints" / "last.ckpt").touch()
    found = newest_run(config, "last.ckpt")
    assert found and found.id == "20260102-000000-aaaa"
    assert folder_of(found.checkpoints / "last.ckpt") == found
    assert folder_of(tmp_path / "x.ckpt") is None
    assert new_run(config).path.parent == tmp_path / "a"


def test_steps_to_be_done_again_are_dropped_and_a_cut_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 2}\n{"step": 3, "a": 4}\n{"step": 5, "a"')
    assert read_lines(path) == [{"step": 1, "a": 2}, {"step": 3, "a": 4}]
    keep_steps(path, 2)
    assert path.read_text() == '{"step": 1, "a": 2}\n'
    keep_steps(tmp_path / "none.jsonl", 2)


def test_run_names_are_safe_for_folders_and_shells() -> None:
    for name in ("a b", "../x", "", "a;b"):
        with pytest.raises(UserError, match=r"run\.name"):
            RunConfig(name=name)


@pytest.mark.parametrize(
    ("value", "text"),
    [(3868928, "3.869M"), (999, "999"), (0.5, "0.5"), (1.426e12, "1.426T"), (2e18, "2E"), (3.707e24, "3.707Y")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_durations() -> None:
    assert [duration(s) for s in (5.26, 61, 3600 * 2 + 185, 4.9e6)] == [
        "5.3 s",
        "1 min 01 s",
        "2 h 03 min",
        "56 d 17 h",
    ]


def test_the_card_shows_what_the_summary_holds() -> None:
    summary = {
        "params_total": 2e6,
        "params_active": 1e6,
        "params_active_without_input_embedding": 9e5,
        "tokens_seen": 1000,
        "global_step": 10,
        "flops": 6e9,
        "seconds": 90,
        "seconds_by_phase": {"train": 80, "validation": 10},
        "tokens_per_second": 12.5,
        "mfu": 0.25,
        "peak_tflops_measured": 0.3,
        "joules": 3.6e6,
        "dollars": 0.0125,
        "assumption": "cpu: 10 W",
        "val_loss": 2.5,
        "val_bits_per_byte": 1.25,
        "router": None,
        "sample": "In the [beginning]",
    }
    rows = dict(card_rows(summary, {"run folder": "runs/a/b"}))
    assert rows["best validation"] == "1.2500 bits per byte · 2.5000 nats per token"
    assert "1 min 30 s" in rows["spent"] and "6 GFLOPs" in rows["spent"]
    assert "25%" in rows["speed"] and "300 GFLOP/s measured here" in rows["speed"]
    given = dict(card_rows({**summary, "peak_given": True}, {}))["speed"]
    assert "25% of the 300 GFLOP/s given as cost.peak_tflops" in given
    assert "1.0000 kWh" in rows["estimate"] and "$0.0125" in rows["estimate"] and "cpu: 10 W" in rows["estimate"]
    unknown = card_rows({**summary, "joules": None, "dollars": None, "assumption": "no row for 'X'"}, {})
    assert dict(unknown)["estimate"] == "energy and dollars unknown  [no row for 'X']"
    counted = dict(card_rows({**summary, "joules_measured": 3.6e6, "dollars": None}, {}))["energy"]
    assert counted.startswith("3.6 MJ (1.0000 kWh) · dollars unknown  [")
    assert "experts" not in rows and rows["run folder"] == "runs/a/b"
