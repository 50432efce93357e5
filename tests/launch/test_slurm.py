"""Submitting to Slurm: what is submitted, and a real cluster of one node that preempts, requeues and finishes runs."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from frugal.cli.verbs import main
from frugal.errors import UserError
from frugal.launch.jobs import Job, all_jobs, config_of, jobs_for
from frugal.launch.slurm import Cluster, load_cluster, planned_hours
from frugal.launch.state import state_of
from frugal.planning.hardware import choose_hardware, load_hardware
from frugal.planning.offers import COMPILING, OVERHEAD, make_offer
from frugal.planning.run_config import read_run
from frugal.tracking.run_folder import read_lines

ROOT = Path(__file__).parents[2]
CLUSTER = """
warning_seconds: 5
hours: 0.5
by_priority:
  0: {partition: low}
  10: {partition: high}
"""


@pytest.fixture
def cluster(slurm: dict[str, str], project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for key, value in slurm.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    (project / "cluster.yaml").write_text(CLUSTER)
    return project


def launch(*words: str) -> list[Job]:
    before = {job.id for job in all_jobs(Path("runs"))}
    main(["launch", "slurm", *words[: words.index("--")], "--cluster", "cluster.yaml", *words[words.index("--") :]])
    return [job for job in all_jobs(Path("runs").absolute()) if job.id not in before]


def until(condition: Callable[[], Any], jobs: list[Job]) -> None:
    stop = time.time() + 240
    while not condition():
        logs = [job.output.read_text()[-1500:] if job.output.is_file() else "" for job in jobs]
        assert time.time() < stop, logs
        assert not any(state_of(job, True)["state"] == "failed" for job in jobs), logs
        time.sleep(0.1)


def steps(job: Job) -> int:
    rows = read_lines(job.folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.slow
def test_preempted_runs_are_requeued_and_end_as_if_undisturbed(
    cluster: Path, train: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    long = ("--trainer.max_steps", "400", "--trainer.val_check_interval", "200", "--run.wandb", "offline")
    low = launch("tiny.yaml", "--seeds", "1", "2", "--", *long, "--run.name", "low")
    assert [re.fullmatch(r"\d+_[01]", job.slurm_id or "") is not None for job in low] == [True, True]
    until(lambda: any(steps(job) > 10 for job in low), low)
    (high,) = launch("tiny.yaml", "--priority", "10", "--", "--run.name", "high")
    until(lambda: all(state_of(job, True)["state"] == "done" for job in [*low, high]), [*low, high])
    gave_way = [re.findall(r"SIG\w+: stopped at step", job.output.read_text()) != [] for job in low]
    assert any(gave_way), [job.output.read_text() for job in low]
    for seed, job in enumerate(low, start=1):
        if not gave_way[seed - 1]:
            continue
        undisturbed = train("fit", "--run.name", f"whole{seed}", "--seed_everything", str(seed), *long)
        ours, theirs = last(job.folder), last(undisturbed)
        assert ours["global_step"] == 400
        assert all(torch.equal(ours["state_dict"][key], theirs["state_dict"][key]) for key in theirs["state_dict"])
        rows = [[row["step"] for row in read_lines(run / "metrics.jsonl")] for run in (job.folder, undisturbed)]
        assert rows[0] == rows[1]
        tokens = [json.loads((run / "summary.json").read_text())["tokens_seen"] for run in (job.folder, undisturbed)]
        assert tokens[0] == tokens[1] == 400 * 4 * 16
        ids = {path.name.rsplit("-", 1)[-1] for path in job.folder.glob("wandb/offline-run-*")}
        assert ids == {job.id.rsplit("-", 1)[-1]}  # one W&B run, however often it was requeued
    capsys.readouterr()
    main(["launch", "status", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["state"]) for row in rows] == [("low", "done"), ("low", "done"), ("high", "done")]


TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
folder = Path(*(words[words.index("--run." + key) + 1] for key in ("root", "name", "id")))
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
(folder / "words.json").write_text(json.dumps(words))
if "--refuse" in words:
    sys.exit("error: refused") if False else (print("error: refused"), sys.exit(2))
while "--wait" in words and not told:
    time.sleep(0.05)
sys.exit(75 if told else 0)
"""


@pytest.mark.slow
def test_arguments_arrive_and_cancelled_and_refused_jobs_are_not_requeued(cluster: Path) -> None:
    (cluster / "train.py").write_text(TRAIN)
    nasty = ["--a", "x y", "--b=; touch executed", "$(touch executed)", "'\"", "*"]
    (quoted,) = launch("base", "--", *nasty)
    (refused,) = launch("base", "--", "--refuse")
    (waiting,) = launch("base", "--", "--wait")
    stop = time.time() + 120
    while not all((job.folder / "words.json").is_file() for job in (quoted, refused, waiting)):
        assert time.time() < stop
        time.sleep(0.1)
    main(["launch", "cancel", waiting.id])
    expected = {quoted: "done", refused: "failed", waiting: "cancelled"}
    while {job: state_of(job, True)["state"] for job in expected} != expected:
        assert time.time() < stop, {job.id: state_of(job, True) for job in expected}
        time.sleep(0.1)
    assert json.loads((quoted.folder / "words.json").read_text())[1 : 1 + len(nasty)] == nasty
    assert not list(cluster.rglob("executed"))
    queued = subprocess.run(["squeue", "--noheader", "--states=PENDING"], capture_output=True, text=True).stdout
    assert queued == ""


def test_parameters_follow_the_cluster_and_the_priority() -> None:
    cluster = Cluster(2, 4, 8, 4, mem_gb=1.5, hours=2, setup=["module load cuda"], slurm={"account": "a"},
                      by_priority={0: {"partition": "low"}, 10: {"partition": "high", "qos": "now"}})  # fmt: skip
    low, high = cluster.parameters(9, None), cluster.parameters(10, 0.25)
    assert low["additional_parameters"] == {"requeue": True, "account": "a", "partition": "low"}
    assert high["additional_parameters"] == {"requeue": True, "account": "a", "partition": "high", "qos": "now"}
    assert (low["time"], high["time"], low["mem"], low["gpus_per_node"]) == (120, 15, "1536MB", 4)
    assert (low["nodes"], low["ntasks_per_node"], low["setup"]) == (2, 4, ["module load cuda"])
    assert Cluster().parameters(5, None)["additional_parameters"] == {"requeue": True}


def test_the_time_limit_is_taken_from_the_plan(project: Path) -> None:
    def jobs(*options: str) -> list[Job]:
        return jobs_for(["tiny.yaml"], seeds=[1, 2], options=["--model.compile", "true", *options])

    cluster = Cluster(hardware="cpu", cpus_per_task=4, hours=3)
    short = planned_hours(jobs(), cluster)
    long = planned_hours(jobs("--trainer.max_steps=20_000_000", "--data.batch_size", "8"), replace(cluster, hours=1e6))
    plan = make_offer(read_run("tiny.yaml"), choose_hardware(load_hardware("configs/hardware.yaml"), "", "cpu"), 4)
    assert plan.seconds and short == pytest.approx(1.5 * (plan.seconds + COMPILING) / 3600 + 1 / 6)
    run = read_run("tiny.yaml")
    muon = run.optimizer_flops / (run.flops / run.steps)  # its share does not grow with the batch
    at_work = (plan.seconds - OVERHEAD[True]) * (2 - muon) * 20_000_000 / 12
    assert long == pytest.approx(1.5 * (at_work + OVERHEAD[True] + COMPILING) / 3600 + 1 / 6)
    assert planned_hours(jobs("--trainer.max_steps", "200000000"), cluster) == 3  # the most that is allowed
    strings = ("--data.source.path=*.txt", "--samples.prompts=To be: or not: that", "--run.tags=@a")
    named, *_ = jobs(*strings, "--model.optimizer", "torch.optim.AdamW")
    whole = config_of(named)
    assert (whole["samples"]["prompts"], whole["run"]["tags"]) == ("To be: or not: that", "@a")
    assert whole["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert planned_hours([named], cluster) is not None
    assert planned_hours(jobs("--trainer.max_steps", "many"), cluster) is None
    assert planned_hours(jobs(), Cluster()) is None
    assert planned_hours(jobs_for(["configs/experiments/003_hf_model.yaml"]), cluster) is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nodez: 1", "there is no key nodez; known are nodes,"),
        ("nodes: two", "nodes: expected int, got 'two'"),
        ("hours: -1", "hours: expected float, got -1"),
        ("hardware: 8", "hardware: expected str | None, got 8"),
        ("setup: module load", "setup: expected list"),
    ],
)
def test_a_faulty_cluster_file_is_refused_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(line)):
        load_cluster(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="no file"):
        load_cluster(tmp_path / "none.yaml")


def test_the_shipped_clusters_are_valid() -> None:
    for path in (ROOT / "configs/cluster").glob("*.yaml"):
        load_cluster(path)


def test_what_cannot_be_submitted_is_one_line_and_leaves_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (project / "bin").mkdir()
    monkeypatch.setenv("PATH", str(project / "bin"))
    (project / "abacus.yaml").write_text("hardware: abacus\n")

    def refusal(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["launch", "slurm", "base", *words])
        assert stopped.value.code == 2 and not all_jobs(Path("runs")) and not Path("runs").exists()
        return capsys.readouterr().err

    assert refusal().startswith("error: launch: no sbatch here")
    (project / "bin/sbatch").write_text("")
    (project / "bin/sbatch").chmod(0o755)
    assert "error: cluster: hardware: no row 'abacus'" in refusal("--cluster", "abacus.yaml")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal() == 'error: launch: Slurm needs submitit: pip install -e ".[slurm]"\n'
