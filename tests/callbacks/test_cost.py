import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from frugal.callbacks.cost import CostMeter, number_format
from frugal.callbacks.ledger import PARTS
from frugal.callbacks.matmul_peak import measure_matmul_peak
from frugal.data.datamodule import TextDataModule
from frugal.errors import UserError
from frugal.planning.hardware import choose_hardware
from frugal.tracking.run_folder import read_lines
from frugal.training.fp8 import Float8

TABLE = str(Path(__file__).parents[2] / "configs" / "hardware.yaml")


def test_a_resumed_meter_goes_on_and_keeps_the_best_peak() -> None:
    first = CostMeter(hardware_file=TABLE)
    first.ledger.tokens, first.ledger.flops = 100, 5e9
    first.ledger.seconds |= {"step": 7.0, "validation": 2.0, "other": 1.0}
    first._keep_peak("cpu", 2e11)
    state = first.state_dict()
    second = CostMeter(hardware_file=TABLE)
    second.device_name = "cpu"
    second._keep_peak("cpu", 4e10)  # measured while the machine was busy
    second.load_state_dict(state)
    assert (second.ledger.tokens, second.ledger.flops, second.peak_flops) == (100, 5e9, 2e11)
    assert second.ledger.train_seconds == 7.0 and second.ledger.total_seconds == 10.0
    assert second._mfu(5e10, devices=2) == pytest.approx(0.125)
    assert CostMeter(hardware_file=TABLE, peak_tflops=3).peak_flops == 3e12


def test_the_peak_is_plausible() -> None:
    peak = measure_matmul_peak(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < peak < 1e14


def test_a_device_without_a_row_has_no_estimate() -> None:
    meter = CostMeter(hardware_file=TABLE)
    meter.row = None
    assert meter._bill() == {"joules": None, "dollars": None}


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


def test_the_parts_add_up_to_the_wall_time(train: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    start = time.perf_counter()
    folder = train("fit")
    elapsed = time.perf_counter() - start
    summary = json.loads((folder / "summary.json").read_text())
    parts = summary["seconds_by_part"]
    assert parts.keys() == set(PARTS) and all(seconds >= 0 for seconds in parts.values())
    for total in (parts, summary["seconds_by_phase"]):
        assert sum(total.values()) == pytest.approx(summary["seconds"])
    # The corpus was made in this process, so nothing is billed beside the wall time; plots come after the bill.
    assert summary["wall_seconds"] == summary["seconds"] < elapsed
    assert (
        parts["start_up"] > 0 and parts["checkpoint"] > 0 and parts["step"] > 0 and parts["data"] == 0 == parts["lost"]
    )
    assert summary["goodput"] == parts["step"] / summary["wall_seconds"] and summary["validations"] == 3
    rows = [row for row in read_lines(folder / "metrics.jsonl") if "speed/goodput" in row]
    for row in rows:
        assert row["cost/seconds"] == pytest.approx(sum(row[f"cost/seconds/{part}"] for part in PARTS), rel=1e-5)
        assert row["cost/seconds/training"] <= row["cost/seconds"] and 0 < row["speed/goodput"] < 1
    assert f"goodput {summary['goodput']:.0%}" in capsys.readouterr().out


def test_scoring_the_test_set_is_no_training(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []

    def scores(trainer: pl.Trainer, module: object) -> dict[str, float]:
        parts.extend(callback._phase for callback in trainer.callbacks if isinstance(callback, CostMeter))
        time.sleep(0.5)
        return {"loss": 1.0}

    monkeypatch.setattr("frugal.callbacks.report._test_scores", scores)
    monkeypatch.setattr(TextDataModule, "has_test_split", True, raising=False)
    folder = train("fit", "--trainer.max_steps", "2")
    summary = json.loads((folder / "summary.json").read_text())
    assert parts == ["other"] and summary["seconds_by_part"]["other"] > 0.5 and summary["test_loss"] == 1.0


def test_what_a_killed_run_spent_is_billed_and_its_steps_count_once(
    resumes_exactly: Callable[..., tuple[Path, Path]],
) -> None:
    whole, cut = (json.loads((run / "summary.json").read_text()) for run in resumes_exactly())
    # Cut within the hooks of step 8, before the meter had counted it; the checkpoint is that of step 6.
    assert cut["lost"] == {"steps": 1, "tokens": 4 * 16, "flops": pytest.approx(whole["flops"] / 12)}
    assert whole["lost"] == {"steps": 0, "tokens": 0, "flops": 0.0} and whole["seconds_by_part"]["lost"] == 0
    assert cut["tokens_seen"] == whole["tokens_seen"] and cut["flops"] == whole["flops"]
    assert cut["seconds_by_part"]["lost"] > 0
    watts = cut["joules"] / cut["seconds"]
    assert watts == pytest.approx(whole["joules"] / whole["seconds"], rel=1e-6)  # the lost seconds are paid for


def test_compiling_has_an_account_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"compile": 0.0}
    monkeypatch.setattr("frugal.callbacks.cost.compile_seconds", lambda: clock["compile"])
    monkeypatch.setattr("frugal.callbacks.cost.time.perf_counter", lambda: clock["now"])
    meter = CostMeter(hardware_file=TABLE)
    clock["now"] = meter._mark = 100.0
    meter._phase = "step"
    meter._datamodule = SimpleNamespace(waited_seconds=0.0)
    clock |= {"now": 110.0, "compile": 4.0}
    meter._datamodule.waited_seconds = 1.0
    meter._enter("validation")
    clock |= {"now": 113.0, "compile": 5.0}
    meter._enter("checkpoint")
    clock |= {"now": 113.5}
    meter._enter("step")
    spent = {part: seconds for part, seconds in meter.ledger.seconds.items() if seconds}
    assert spent == {"step": 5.0, "data_wait": 1.0, "compile": 5.0, "validation": 2.0, "checkpoint": 0.5}


@pytest.mark.parametrize(("worked", "training"), [(3.0, 3.0), (9.5, 4.0)])
def test_compiling_is_no_processor_time_of_training(
    monkeypatch: pytest.MonkeyPatch, worked: float, training: float
) -> None:
    """Six of ten seconds compiling, mostly in the compiler's own process or all in this one."""
    meter = CostMeter(hardware_file=TABLE)
    meter._phase = "step"
    monkeypatch.setattr("frugal.callbacks.cost.compile_seconds", lambda: 6.0)
    monkeypatch.setattr("frugal.callbacks.cost.time.perf_counter", lambda: 10.0)
    monkeypatch.setattr("frugal.callbacks.cost.time.process_time", lambda: worked)
    meter._lap()
    assert meter.ledger.train_cpu_seconds == training and meter.ledger.seconds["compile"] == 6.0


def test_measured_energy_replaces_the_estimate() -> None:
    meter = CostMeter(hardware_file=TABLE, hardware="cpu")
    meter.row, meter.units, meter.nodes = meter.rows[0], 2, 3
    meter._pay(10.0)
    assert meter.ledger.joules == 10 * meter.row.watts * 2
    meter._counters = [SimpleNamespace(name="a", joules=lambda: 7.0), SimpleNamespace(name="b", joules=lambda: 2.0)]
    meter._mark = time.perf_counter()
    meter._lap()
    assert meter.ledger.joules_measured == 27.0 and meter.ledger.joules == 200 + 27.0
    assert meter._assumption().startswith("12% of the energy measured (a and b), the start estimated; cpu: 10 W")


@pytest.mark.parametrize("watts", [120.0, 0.0])  # zero where no counter tells
def test_a_start_that_nothing_counted_costs_what_was_drawn_at_its_end(
    monkeypatch: pytest.MonkeyPatch, watts: float
) -> None:
    meter = CostMeter(hardware_file=TABLE, hardware="cpu")
    meter.row, meter.units = meter.rows[0], 2
    meter._counters = [SimpleNamespace(name="a", joules=lambda: 9.0)]
    monkeypatch.setattr("frugal.callbacks.cost.time.perf_counter", lambda: 130.0)
    meter._mark = 100.0
    meter._lap(watts)
    assert meter.ledger.joules == (30 * watts or meter.row.joules(30.0, 2)) and meter.ledger.joules_measured == 0.0
    assert meter.ledger.dollars == meter.row.dollars(30.0, 2) and meter.ledger.train_joules == 0.0
    meter._phase = "step"
    meter._lap()
    assert meter.ledger.train_joules == meter.ledger.joules_measured == 9.0


@pytest.mark.parametrize(("row", "joules"), [("h100-80gb", 1000 - 50 * 6), ("cpu", 1000 * 4 / 10)])
def test_joules_of_compiling_are_none_of_training(row: str, joules: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds and 1,000 J of a step, six seconds of them compiling: a GPU waits (at 50 W), a CPU works on."""
    meter = CostMeter()
    meter.row, meter._waiting, meter._phase = choose_hardware(meter.rows, "", row), 50.0, "step"
    meter._counters = [SimpleNamespace(joules=lambda: 1000.0)]  # type: ignore[list-item]
    monkeypatch.setattr("frugal.callbacks.cost.time.perf_counter", lambda: 10.0)
    monkeypatch.setattr("frugal.callbacks.cost.compile_seconds", lambda: 6.0)
    meter._lap()
    assert meter.ledger.seconds["compile"] == 6.0 and meter.ledger.seconds["step"] == 4.0
    assert meter.ledger.train_joules == pytest.approx(joules) and meter.ledger.joules == 1000.0


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_cores_of_every_node_are_paid(nodes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    meter = CostMeter(hardware_file=TABLE, peak_tflops=1.0, measure_energy=False)
    trainer = SimpleNamespace(
        datamodule=None,
        num_nodes=nodes,
        world_size=2 * nodes,
        default_root_dir=tmp_path,
        is_global_zero=True,
        fast_dev_run=False,
        save_checkpoint=None,
    )
    meter.on_fit_start(trainer, SimpleNamespace(device=torch.device("cpu")))  # type: ignore[arg-type]
    assert meter.units == 4 * nodes and meter.row is not None
    assert meter.ledger.dollars == pytest.approx(meter.row.dollars(meter.ledger.total_seconds, 4 * nodes))


@pytest.mark.parametrize(
    ("precision", "tf32", "fp8", "named"),
    [
        ("32-true", False, None, "32-true"),
        ("32-true", True, None, "tf32"),
        ("bf16-mixed", False, None, "bf16-mixed"),
        ("bf16-mixed", False, Float8(), "bf16-mixed, fp8"),
    ],
)
def test_the_number_format_is_told_with_what_the_model_sets(
    precision: str, tf32: bool, fp8: Float8 | None, named: str
) -> None:
    trainer, module = SimpleNamespace(precision=precision), SimpleNamespace(tf32=tf32, fp8=fp8)
    assert number_format(trainer, module) == named  # type: ignore[arg-type]
