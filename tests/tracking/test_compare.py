"""Runs side by side: differences, costs at a validation, the Pareto front, and the same run from its three sources."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import wandb
from hypothesis import given
from hypothesis import strategies as st

from frugal.cli.verbs import main
from frugal.errors import UserError
from frugal.tracking.compare import (
    AXES,
    as_call,
    comparison_figure,
    config_differences,
    curve,
    loss_of,
    metric_table,
    pareto,
)
from frugal.tracking.read_runs import RunData, flat, read_runs


def run(name: str, config: dict | None = None, rows: list[dict] | None = None) -> RunData:
    return RunData(name, flat(config or {}), rows or [], {})


def test_only_what_differs_is_shown() -> None:
    a = run("a", {"model": {"init_args": {"d": 1, "moe": None}}, "run": {"name": "a"}, "seed": 1})
    b = run("b", {"model": {"init_args": {"d": 2, "moe": {"k": 2}}}, "run": {"name": "b"}, "seed": 1})
    assert config_differences([a, b]) == {"model.d": [1, 2], "model.moe": [None, "set"]}
    c = run("c", {"model": {"init_args": {"d": 2, "moe": {"k": 3}}}, "seed": 1})
    assert config_differences([a, b, c])["model.moe.k"] == ["-", 2, 3]
    assert config_differences([b, c]) == {"model.moe.k": [2, 3]}


def test_classes_are_shown_as_calls() -> None:
    near = {"class_path": "frugal.data.NearDuplicates", "init_args": {"threshold": 0.7, "by": {"class_path": "a.B"}}}
    assert as_call([near, {"class_path": "a.Exact"}]) == "NearDuplicates(threshold=0.7, by=B), Exact"
    assert (as_call([]), as_call(None), as_call({"a": 1})) == ("none", "None", "{'a': 1}")


def test_a_validation_costs_what_stands_in_the_training_row_at_or_after_it() -> None:
    rows = [
        {"step": 3, "val/bits_per_byte": 3.0},
        {"step": 4, "cost/flops": 50.0},
        {"step": 9, "cost/flops": 100.0},
        {"step": 9, "val/bits_per_byte": 2.0},
        {"step": 11, "val/bits_per_byte": 1.9},
    ]
    assert curve(run("a", rows=rows), "cost/flops") == [(50.0, 3.0), (100.0, 2.0), (100.0, 1.9)]
    assert curve(run("a", rows=rows), "cost/dollars") == []


def test_a_run_shorter_than_the_logging_interval_has_a_curve(train: Callable[..., Path]) -> None:
    folder = train("fit", "--trainer.max_steps", "4", "--trainer.val_check_interval", "2")
    short = train("fit", "--run.name", "short", "--trainer.max_steps", "4", "--trainer.val_check_interval", "2",
                  "--trainer.log_every_n_steps", "50")  # fmt: skip
    (often,), (never,) = read_runs([str(folder)]), read_runs([str(short)])
    for axis in ("cost/tokens", "cost/flops"):
        assert curve(never, axis) == curve(often, axis)
    assert [cost for cost, _ in curve(never, "cost/tokens")] == [2 * 64, 4 * 64]


def test_runs_without_bits_per_byte_are_compared_by_their_loss() -> None:
    rows = [{"step": 0, "cost/tokens": 10.0}, {"step": 0, "val/loss": 0.2, "val/accuracy": 0.9}]
    images = [run("a/1", rows=rows)]
    header, table = metric_table(images)
    assert table[0][header.index("validation loss")] == "0.2000"
    assert comparison_figure(images).axes[0].get_ylabel() == "validation loss"
    assert loss_of([run("t", rows=[{"step": 1, "val/bits_per_byte": 1.0}]), *images]) == "val/bits_per_byte"


POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from("abc")), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int, str]]) -> None:
    def beaten(p: tuple[int, int, str]) -> bool:
        return any(q[0] <= p[0] and q[1] <= p[1] and q[:2] != p[:2] for q in points)

    assert pareto(points) == sorted(p for p in points if not beaten(p))


def test_the_same_run_from_its_folder_and_from_the_offline_file(
    train: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    folder = train("fit", "--run.wandb", "offline", "--trainer.max_steps", "8")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    (own,), (offline,) = read_runs([str(folder)]), read_runs([str(file)])
    assert own.name == offline.name == f"base/{folder.name}"
    assert len(read_runs([str(folder), str(file)])) == 1  # the same run
    assert own.config == offline.config
    for axis in AXES:
        assert curve(own, axis) == [pytest.approx(point) for point in curve(offline, axis)]
        assert len(curve(own, axis)) == 2  # one point for each validation
    header, rows = metric_table([own])
    summary = json.loads((folder / "summary.json").read_text())
    assert rows[0][header.index("bits per byte")] == f"{summary['val_bits_per_byte']:.4f}"
    assert rows[0][header.index("on the front of")] == "tokens, FLOPs, seconds, US dollars"

    train("fit", "--run.name", "wide", "--trainer.max_steps", "8", "--model.transformer.d_ff", "64")
    capsys.readouterr()
    main(["compare", "runs", "--out", "side.png"])
    shown = capsys.readouterr().out
    assert "| `model.transformer.d_ff` | 32 | 64 |" in shown and "optimizer" not in shown
    assert Path("side.png").stat().st_size > 20_000


def test_runs_that_are_called_alike_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, place in enumerate(("a/runs/base/x", "b/runs/base/x", "a/runs/base/y", "a/old/base/y")):
        Path(place).mkdir(parents=True)
        Path(place, "metrics.jsonl").write_text(f'{{"step": {number}}}\n')
    Path("again").symlink_to("a")

    def named(*sources: str) -> dict[str, int]:
        return {run.name: run.rows[0]["step"] for run in read_runs(sources)}

    both = {"a/runs/base/x": 0, "b/runs/base/x": 1}
    assert named("a/runs/base/x", "b/runs/base/x") == both
    assert named("a/runs/base", "a/runs/base/x", "again/runs", "./b/../a/runs") == {"base/x": 0, "base/y": 2}
    assert named("a/runs", "b/runs") == {**both, "base/y": 2}
    assert named("a/runs/base/y", "a/old") == {"runs/base/y": 2, "old/base/y": 3}
    rows = metric_table(read_runs(["a/runs", "b"]))[1]
    assert [row[0] for row in rows] == ["a/runs/base/x", "base/y", "b/runs/base/x"]
    monkeypatch.chdir("a/runs/base/x")
    assert named(".") == {"base/x": 0}


def test_the_offline_files_of_a_resumed_run_are_one_run(tmp_path: Path) -> None:
    for steps in (range(0, 60, 10), range(40, 100, 10)):  # killed after step 50, resumed from step 40
        sent = wandb.init(
            mode="offline", dir=tmp_path, project="p", id="one", name="base/one",
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        sent.config.update({"first": steps.start})
        for step in steps:
            sent.log({"trainer/global_step": step, "val/loss": 3.0 - steps.start / 100, "cost/tokens": step + 1.0})
        sent.summary["best"] = steps.start
        sent.finish()
        time.sleep(1.1)  # its folder is named by the second
    files = sorted(map(str, tmp_path.glob("wandb/offline-run-*/*.wandb")))
    assert len(files) == 2
    for sources in ([str(tmp_path)], files, [*reversed(files), files[0]]):
        (run,) = read_runs(sources)
        assert [row["step"] for row in run.rows] == list(range(0, 100, 10))
        assert [row["val/loss"] for row in run.rows] == [3.0] * 4 + [2.6] * 6
        assert run.config["first"] == 40 and run.summary["best"] == 40


def test_the_picture_has_units_and_the_front() -> None:
    rows = [{"step": 0, "cost/tokens": 10.0, "cost/flops": 1e3}, {"step": 0, "val/bits_per_byte": 2.0}]
    figure = comparison_figure([run("a/1", rows=rows), run("b/1", rows=rows)])
    labels = [axis.get_xlabel() for axis in figure.axes]
    assert labels == ["tokens", "FLOPs", "seconds", "US dollars"]
    assert figure.axes[0].get_ylabel() == "validation loss (bits per byte)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a/1", "b/1", "Pareto front"]
    assert figure.axes[2].texts[0].get_text() == "not logged by these runs"


def test_what_is_no_run_is_said(project: Path, capsys: pytest.CaptureFixture) -> None:
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as refused:
            main(["compare", *options])
        error = capsys.readouterr().err
        assert refused.value.code == 2 and error.startswith("error: runs: name at least one run"), error
    assert not Path("compare.png").exists()
    with pytest.raises(UserError, match="holds neither a run"):
        read_runs(["configs"])
    with pytest.raises(UserError, match="no run nothing/at/all/here"):
        read_runs(["nothing/at/all/here"])
    (project / "broken.wandb").write_bytes(b"no log")
    with pytest.raises(UserError, match=r"wandb cannot read broken\.wandb"):
        read_runs(["broken.wandb"])


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("summary.json", '{"val_loss": 1', r"summary\.json: damaged"),
        ("summary.json", "[]", r"summary\.json: damaged: it holds a list"),
        ("summary.json", "null", r"summary\.json: damaged: it holds a NoneType"),
        ("config.yaml", "a: [", r"config\.yaml: is no YAML"),
        ("config.yaml", "- 1", r"config\.yaml: must hold keys, not a list"),
    ],
)
def test_a_damaged_run_is_named_in_one_line(tmp_path: Path, file: str, content: str, told: str) -> None:
    folder = tmp_path / "a/id"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "val/loss": 2.0}\n')
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=told) as refused:
        read_runs([str(tmp_path)])
    assert "\n" not in str(refused.value)


def test_what_is_no_measurement_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = ['{"step": 1, "cost/tokens": 8, "val/loss": null}', '{"val/loss": 1.0}', '{"step": 2, "val/loss": NaN}']
    rows += ['{"step": 3, "cost/tokens": 9, "val/loss": 2.5}', "7"]
    for name in ("a", "b"):
        (tmp_path / name / "id").mkdir(parents=True)
        (tmp_path / name / "id/metrics.jsonl").write_text("\n".join(rows))
        (tmp_path / name / "id/config.yaml").write_text(f"model: {{d: {name}}}\n")
    runs = read_runs([str(tmp_path)])
    assert [curve(run, "cost/tokens", "val/loss") for run in runs] == [[(9, 2.5)]] * 2
    comparison_figure(runs)
    main(["compare", str(tmp_path), "--json", "true"])
    told = json.loads(capsys.readouterr().out)
    assert told["differs"] == {"model.d": ["a", "b"]} and not Path("compare.png").exists()
    assert [row["validation loss"] for row in told["runs"]] == ["2.5000", "2.5000"]
