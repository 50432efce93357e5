"""The local queue, with a stand-in for train.py that counts steps, saves on SIGTERM and goes on from there."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from frugal.cli.verbs import main
from frugal.errors import UserError
from frugal.launch.jobs import Job, all_jobs, jobs_for
from frugal.launch.local import LocalQueue, run_jobs
from frugal.launch.state import is_locked, queue_folder, state_of

TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
value = lambda key, default="": words[words.index(key) + 1] if key in words else default
folder = Path(value("--run.root"), value("--run.name"), value("--run.id"))
state = folder / "step"
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
step = int(state.read_text()) if state.is_file() else 0
with (folder / "trace.jsonl").open("a") as trace:
    trace.write(json.dumps({"from": step, "time": time.time(), "words": words, "env": dict(os.environ)}) + "\\n")
kind = value("--kind", "good")
while step < int(value("--steps", "3")):
    time.sleep(0.05)
    step += 1
    if kind == "crash" and step == 2:
        state.write_text("2")
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hopeless":
        raise RuntimeError("broken")
    if kind == "refused":
        print("error: data.seq_len: too long", file=sys.stderr)
        sys.exit(2)
    if told:
        state.write_text(str(step))
        sys.exit(75)
with (folder / "trace.jsonl").open("a") as trace:
    trace.write(json.dumps({"to": step, "time": time.time()}) + "\\n")
"""


@pytest.fixture
def queue(project: Path) -> Path:
    (project / "train.py").write_text(TRAIN)
    return project


def trace(job: Job) -> list[dict]:
    return [json.loads(line) for line in (job.folder / "trace.jsonl").read_text().splitlines()]


def states(jobs: list[Job]) -> list[str]:
    return [state_of(job)["state"] for job in jobs]


def test_configs_seeds_and_grid_make_one_run_each(queue: Path) -> None:
    (queue / "mine.yaml").write_text("run: {name: mine}\n")
    grid = {"model.optimizer.lr": ["1e-3", "2e-3"], "data.lengths": [[{"start": 0, "seq_len": 8}]]}
    jobs = jobs_for(["tiny.yaml+mine.yaml", "configs/experiments/010_curation_raw.yaml"], [1, 2], grid, ["--kind", "x"])
    assert [job.name for job in jobs] == ["mine"] * 4 + ["010_curation_raw"] * 4
    assert len({job.id for job in jobs}) == 8
    command = jobs[1].command
    lengths = '--data.lengths=[{"start": 0, "seq_len": 8}]'
    assert command[-11:-8] == ["--model.optimizer.lr=1e-3", lengths, "--seed_everything=2"]
    assert command[-8:-6] == ["--run.name", "mine"] and command[-2:] == ["--ckpt_path", "last"]
    overlays = [Path(command[i + 1]) for i, word in enumerate(command) if word == "--config"]
    assert [path.read_text() for path in overlays] == [(queue / n).read_text() for n in ("tiny.yaml", "mine.yaml")]
    assert jobs_for([], options=["--run.name=other"])[0].name == "other"
    assert [job.name for job in jobs_for(["base", "tiny.yaml+mine.yaml"])] == ["base", "mine"]


def test_what_is_submitted_is_what_runs(queue: Path) -> None:
    (job,) = jobs_for(["tiny.yaml"])
    code = job.folder / "launch/code"
    assert (code / "src/frugal/launch/local.py").is_file() and len((code / "COMMIT").read_text()) > 1
    (queue / "train.py").write_text("raise SystemExit(1)")  # edited after submission
    (queue / "configs/base.yaml").write_text("nonsense: 1\n")
    run_jobs([job])
    begin, end = trace(job)
    assert end["to"] == 3
    assert begin["env"]["FRUGAL_BASE_CONFIG"] == str(code / "configs/base.yaml")
    assert begin["env"]["PYTHONPATH"] == str(code / "src")


def test_arguments_arrive_as_they_were_written(queue: Path) -> None:
    nasty = ["--a", "x y", "--b=; touch executed", "$(touch executed)", "'\"", "*", "", "é\n"]
    main(["launch", "local", "base", "--", *nasty])
    (job,) = all_jobs(Path("runs"))
    assert trace(job)[0]["words"][1 : 1 + len(nasty)] == nasty
    assert not list(queue.rglob("executed"))


def test_no_more_than_so_many_at_once(queue: Path) -> None:
    jobs = jobs_for([], seeds=[1, 2, 3, 4])
    run_jobs(jobs, at_once=2)
    assert states(jobs) == ["done"] * 4
    moments = sorted((row["time"], 1 if "from" in row else -1) for job in jobs for row in trace(job))
    running = [sum(change for _, change in moments[: i + 1]) for i in range(len(moments))]
    assert max(running) == 2
    assert {row["env"]["OMP_NUM_THREADS"] for job in jobs for row in trace(job) if "env" in row} == {
        os.environ["OMP_NUM_THREADS"]
    }


def test_the_higher_priority_goes_first_and_the_devices_are_dealt(queue: Path) -> None:
    low, high = jobs_for([], priority=0), jobs_for([], priority=5)
    run_jobs([*low, *high], devices=["3"])
    assert trace(high[0])[-1]["time"] < trace(low[0])[0]["time"]
    assert trace(high[0])[0]["env"]["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_crash_is_tried_again_and_a_refusal_is_not(queue: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = ["crash", "hopeless", "refused"]
    jobs = [jobs_for([], options=["--kind", kind])[0] for kind in kinds]
    with caplog.at_level("INFO"):
        run_jobs(jobs, at_once=3, retries=2)
    assert states(jobs) == ["done", "failed", "failed"]
    assert [[row["from"] for row in trace(job) if "from" in row] for job in jobs] == [[0, 2], [0, 0, 0], [0]]
    assert "failed (exit code 2): error: data.seq_len: too long" in caplog.text
    assert "RuntimeError: broken" in caplog.text


def background(jobs: list[Job]) -> threading.Thread:
    thread = threading.Thread(target=run_jobs, args=[jobs])
    thread.start()
    return thread


def until(condition: object) -> None:
    stop = time.time() + 20
    while not condition():  # type: ignore[operator]
        assert time.time() < stop
        time.sleep(0.02)


def test_an_urgent_job_of_another_process_makes_a_run_give_way(queue: Path) -> None:
    low = jobs_for([], options=["--steps", "40"])
    first = background(low)
    until(lambda: states(low) == ["running"])
    high = jobs_for([], priority=1)
    second = background(high)
    first.join(), second.join()
    assert states(low + high) == ["done", "done"]
    (begin, again, end), urgent = trace(low[0]), trace(high[0])
    assert begin["from"] == 0 and 0 < again["from"] < 40 and end["to"] == 40
    assert begin["time"] < urgent[0]["time"] < urgent[-1]["time"] < again["time"]


def test_cancelled_jobs_end_or_never_begin(queue: Path, capsys: pytest.CaptureFixture) -> None:
    jobs = jobs_for([], seeds=[1, 2], options=["--steps", "400"])
    thread = background(jobs)
    until(lambda: states(jobs) == ["running", "waiting"])
    main(["launch", "cancel", "base"])
    thread.join()
    assert states(jobs) == ["cancelled", "cancelled"]
    assert len(trace(jobs[0])) == 1 and not (jobs[1].folder / "trace.jsonl").exists()
    capsys.readouterr()
    main(["launch", "status", "--json"])
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["cancelled", "cancelled"]
    for words, told in ((["base"], "no unfinished run base"), ([], "runs: name at least one, or all")):
        with pytest.raises(SystemExit):
            main(["launch", "cancel", *words])
        assert told in capsys.readouterr().err


FRUGAL = str(Path(sys.executable).parent / "frugal")


@pytest.fixture
def launcher(queue: Path) -> Iterator[subprocess.Popen]:
    command = [FRUGAL, "launch", "local", "base", "--seeds", "1", "2", "--", "--steps", "60"]
    # A suite that was begun in the background may ignore Ctrl-C, and processes inherit that.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeds)
    until(lambda: any(Path("runs").glob("*/*/trace.jsonl")))
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_ends_leaves_runs_that_go_on_later(queue: Path, launcher: subprocess.Popen, how: int) -> None:
    launcher.send_signal(how)
    launcher.wait()
    jobs = all_jobs(Path("runs"))
    if how == signal.SIGKILL:  # the run goes on alone and holds its place
        assert states(jobs) == ["running", "stopped"] and is_locked(queue_folder(jobs[0]) / "slot-0")
        with pytest.raises(UserError, match="in the hands of another process"):
            LocalQueue(jobs[:1])
        until(lambda: states(jobs) == ["stopped", "stopped"])
    else:
        assert states(jobs) == ["stopped", "stopped"] and launcher.returncode == 130
    main(["launch", "local", "--at_once", "2"])  # go on with what was stopped
    assert states(jobs) == ["done", "done"]
    assert [row["to"] for job in jobs for row in trace(job) if "to" in row][-2:] == [60, 60]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["base", "none.yaml"], "configs: no file"),
        (["base", "--seeds", "1", "1"], "seeds: each only once"),
        (["base", "--grid", "lr"], "grid: write key=value,value"),
        (["base", "--at_once", "0"], "at_once: must be positive"),
        (["base", "--", "--ckpt_path", "x"], "--ckpt_path: the launcher sets it"),
        ([], "configs: name one; no stopped job"),
    ],
    ids=str,
)
def test_refusals_are_one_line(queue: Path, args: list[str], line: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["launch", "local", *args])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and line in err, err
    assert not all_jobs(Path("runs"))
