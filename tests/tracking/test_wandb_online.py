"""What really reaches a W&B server: runs with their group and artifacts, sweeps, the workspace. Against a stand-in."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_server import Received, wandb_server

from frugal.errors import UserError
from frugal.tracking.read_runs import read_runs
from frugal.tracking.run_folder import read_lines
from frugal.tracking.workspace import metric_names

ROOT = Path(__file__).parents[2]
FRUGAL = [sys.executable, "-c", "from frugal.cli.verbs import main; main()"]


@pytest.fixture
def server(project: Path) -> Iterator[Received]:
    with wandb_server() as received:
        yield received


def start(received: Received, *command: str) -> str:
    """Run a command that believes the stand-in to be W&B; its output."""
    environment = {**os.environ, "WANDB_BASE_URL": received.url, "WANDB_API_KEY": "x" * 40}
    environment["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def sent(received: Received, operation: str) -> list[dict[str, Any]]:
    return [variables.get("input", variables) for variables in received.variables(operation)]


@pytest.mark.slow
def test_an_online_run_sends_metrics_group_tags_and_artifacts(server: Received, project: Path) -> None:
    shutil.copy(ROOT / "train.py", project)
    filters = "[{class_path: frugal.data.curation.normalise.NormaliseUnicode}]"
    options = [
        "--data.curation.filters",
        filters,
        "--run.group",
        "a-study",
        "--run.tags",
        "[study, arm]",
        "--run.upload_checkpoint",
        "true",
    ]
    command = [sys.executable, "train.py", "fit", "--config", "tiny.yaml", "--run.wandb", "online", *options]
    said = start(server, *command)
    assert "W&B logging stopped" not in said
    (folder,) = Path("runs/base").iterdir()
    (first, *_) = sent(server, "UpsertBucket")
    assert (first["groupName"], first["tags"]) == ("a-study", ["study", "arm"])
    rows = server.history()
    keys = set().union(*(row.keys() for row in rows))
    assert set(metric_names()) <= keys
    (curation,) = (row["data/curation_filters"] for row in rows if "data/curation_filters" in row)
    assert curation["_type"] == "table-file" and curation["nrows"] == 1
    assert any(row.get("data/curation", {}).get("_type") == "image-file" for row in rows)
    key = "val/bits_per_byte"
    logged = [row[key] for row in read_lines(folder / "metrics.jsonl") if key in row]
    assert [row[key] for row in rows if key in row] == pytest.approx(logged)
    made = {a["artifactCollectionName"]: a for a in sent(server, "CreateArtifact")}
    meta = json.loads(next(Path(".cache").glob("*/meta.json")).read_text())
    dataset = made[f"data-{meta['fingerprint'][:16]}"]
    assert dataset["artifactTypeName"] == "dataset" and meta["fingerprint"] in dataset["metadata"]
    assert made[f"checkpoint-{folder.name}"]["artifactTypeName"] == "model"
    best = (folder / "checkpoints/best.ckpt").read_bytes()
    assert hashlib.sha256(server.files["best.ckpt"]).digest() == hashlib.sha256(best).digest()
    assert server.files["fingerprint.txt"].decode().strip() == meta["fingerprint"]
    # And back: the project on the server is the run on the disk.
    own, online = (start(server, *FRUGAL, "compare", runs).split("## ")[2] for runs in ("runs/base", "someone/frugal"))
    assert own.split("written")[0] == online.split("written")[0] and folder.name in own


@pytest.mark.slow
def test_every_sweep_is_taken_as_it_stands(server: Received, project: Path) -> None:
    files = sorted(Path("configs/sweeps").glob("*.yaml"))
    for file in files:
        arguments = ("--project", "frugal", "--entity", "someone", str(file))
        assert "wandb agent someone/frugal/sweep-1" in start(
            server, str(Path(sys.executable).parent / "wandb"), "sweep", *arguments
        )
    configs = [yaml.safe_load(variables["config"]) for variables in sent(server, "UpsertSweep")]
    assert configs == [yaml.safe_load(file.read_text()) for file in files]


@pytest.mark.slow
def test_the_workspace_is_saved(server: Received) -> None:
    assert f"{server.url}/someone/frugal?nw=costs" in start(
        server, *FRUGAL, "workspace", "someone/frugal", "--name", "mine"
    )
    (view,) = sent(server, "UpsertView2")
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("someone", "frugal", "mine")
    for name in metric_names():
        assert f'"{name}"' in view["spec"]


def test_what_cannot_be_compared_online_is_one_line(server: Received, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with pytest.raises(UserError, match="the W&B project someone/frugal has no runs"):
        read_runs(["someone/frugal"])
    monkeypatch.setattr("wandb.Api.runs", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="W&B has no such project or does not answer: division by zero"):
        read_runs(["someone/frugal"])


VANISHES = """
import sys, time
from pathlib import Path
import frugal.callbacks.routing as routing
import frugal.training.loggers as loggers
loggers.INIT_TIMEOUT = loggers.FINISH_TIMEOUT = int(sys.argv.pop())
step_end = routing.RoutingMonitor.on_train_batch_end
def on_step_end(self, trainer, *args):
    step_end(self, trainer, *args)
    if trainer.global_step == 5:
        Path("at step 5").touch()
        while not Path("go on").is_file():
            time.sleep(0.01)
routing.RoutingMonitor.on_train_batch_end = on_step_end
from frugal.cli.train import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at the start", "in the middle"])
def test_a_run_outlives_the_server_and_sync_sends_all_of_it_later(project: Path, when: str) -> None:
    Path("vanishes.py").write_text(VANISHES)
    # Without what W&B has put there in this process, such as where its own process listens (WANDB_SERVICE).
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_API_KEY": "x" * 40, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "vanishes.py", "fit", "--config", "tiny.yaml", "--run.wandb", "online"]
    command.append("10" if when == "at the start" else "5")  # seconds; W&B's own process needs some to start, too
    with wandb_server() as received:
        received.vanished = when == "at the start"
        environment["WANDB_BASE_URL"] = received.url
        training = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while training.poll() is None and not Path("at step 5").is_file():
            time.sleep(0.05)
        received.vanished = True
        Path("go on").touch()
        said = training.communicate()[1]
    assert training.returncode == 0, said
    (folder,) = Path("runs/base").iterdir()
    assert ("W&B cannot be reached" in said) == (when == "at the start"), said
    (kept,) = folder.glob(f"wandb/{'offline-' if when == 'at the start' else ''}run-*/*.wandb")
    with wandb_server() as received:
        start(received, str(Path(sys.executable).parent / "wandb"), "sync", "--include-online", str(kept.parent))
        names = {variables.get("name") for variables in sent(received, "UpsertBucket")}
        rows = received.history()
    assert names == {folder.name}
    logged = read_lines(folder / "metrics.jsonl")
    for key in ("train/loss", "val/loss"):
        wanted = [(row["step"], pytest.approx(row[key])) for row in logged if key in row]
        assert [(row["trainer/global_step"], row[key]) for row in rows if key in row] == wanted
