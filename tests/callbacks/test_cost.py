import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from frugal.callbacks.cost import CostMeter, measure_matmul_peak
from frugal.errors import UserError

TABLE = str(Path(__file__).parents[2] / "configs" / "hardware.yaml")


def test_a_resumed_meter_goes_on_and_keeps_the_best_peak() -> None:
    first = CostMeter(hardware_file=TABLE)
    first.tokens, first.flops = 100, 5e9
    first.seconds = {"train": 7.0, "validation": 2.0, "other": 1.0}
    first._mark = time.perf_counter()
    first._keep_peak("cpu", 2e11)
    state = first.state_dict()
    second = CostMeter(hardware_file=TABLE)
    second.device_name = "cpu"
    second._keep_peak("cpu", 4e10)  # measured while the machine was busy
    second.load_state_dict(state)
    assert (second.tokens, second.flops, second.peak_flops) == (100, 5e9, 2e11)
    assert second.seconds["train"] == pytest.approx(7.0, abs=0.5)
    assert second._mfu(5e10, devices=2) == pytest.approx(0.125)
    assert CostMeter(hardware_file=TABLE, peak_tflops=3).peak_flops == 3e12


def test_the_peak_is_plausible() -> None:
    peak = measure_matmul_peak(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < peak < 1e14


def test_a_device_without_a_row_has_no_estimate() -> None:
    meter = CostMeter(hardware_file=TABLE)
    meter.row = None
    assert meter._estimates() == {"joules": None, "dollars": None}


def test_impossible_settings_name_their_key() -> None:
    with pytest.raises(UserError, match=r"cost\.peak_tflops: must be positive"):
        CostMeter(hardware_file=TABLE, peak_tflops=0)
    with pytest.raises(UserError, match=r"cost\.hardware: no row 'abacus'"):
        CostMeter(hardware_file=TABLE, hardware="abacus")


def test_what_the_data_took_is_charged_once_however_often_a_run_is_resumed(train: Callable[..., Path]) -> None:
    source = "{class_path: frugal.data.synthetic.physics.Physics, init_args: {n: 150}}"
    options = ("--data.source", source)
    train("fit", "--trainer.max_steps", "4", *options)
    folder = train("fit", "--trainer.max_steps", "8", "--ckpt_path", "last", *options)
    summary = json.loads((folder / "summary.json").read_text())
    (meta,) = (json.loads(path.read_text()) for path in Path(".cache").glob("*/meta.json"))
    assert summary["global_step"] == 8
    assert summary["seconds_by_phase"]["data"] == meta["seconds_by_stage"]["synthesis"] > 0
    assert summary["seconds"] == pytest.approx(sum(summary["seconds_by_phase"].values()))
