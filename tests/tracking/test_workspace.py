"""W&B as code: the workspace shows metrics that real runs log, sweeps start commands that are accepted, artifacts."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from frugal.cli.train import build
from frugal.cli.verbs import main
from frugal.errors import UserError
from frugal.tracking.run_folder import RunConfig, read_lines
from frugal.tracking.savings import Finding
from frugal.tracking.statistics import Reach, ratio
from frugal.tracking.workspace import SECTIONS, metric_names, workspace
from frugal.training.loggers import log_study

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def records(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def test_every_metric_of_the_workspace_exists_in_a_real_run_and_artifacts_are_logged(
    train: Callable[..., Path],
) -> None:
    options = (
        "--run.wandb",
        "offline",
        "--run.group",
        "a-study",
        "--run.tags",
        "[study, arm]",
    )
    folder = train("fit", *options, "--run.upload_checkpoint", "true", "--trainer.max_steps", "8")
    sent = records(folder)
    logged = read_lines(folder / "metrics.jsonl")
    for rows in (logged, [r["history"]["item"] for r in sent if r["type"] == "history"]):
        assert set(metric_names()) <= set().union(*rows)
        for title, x, metrics in itertools.chain(*SECTIONS.values()):
            for y in metrics if x else []:  # W&B plots points of one row only (wandb issue 3531)
                assert sum(x in row and y in row for row in rows) == sum(y in row for row in rows) > 1, title
    (run,) = [r["run"] for r in sent if r["type"] == "run"]
    assert run["run_group"] == "a-study" and run["tags"] == ["study", "arm"]
    artifacts = {r["artifact"]["name"]: r["artifact"] for r in sent if r["type"] == "artifact"}
    meta = json.loads(next(Path(".cache").glob("*/meta.json")).read_text())
    dataset = artifacts[f"data-{meta['fingerprint'][:16]}"]
    assert dataset["type"] == "dataset" and meta["fingerprint"] in json.dumps(dataset)
    checkpoint = artifacts[f"checkpoint-{folder.name}"]
    (content,) = checkpoint["manifest"]["contents"]
    assert checkpoint["type"] == "model" and content["path"] == "best.ckpt"
    assert int(content["size"]) == (folder / "checkpoints/best.ckpt").stat().st_size


def test_a_checkpoint_is_sent_only_if_wished_and_nothing_when_disabled(train: Callable[..., Path]) -> None:
    folder = train("fit", "--run.wandb", "offline", "--trainer.max_steps", "4")
    names = [r["artifact"]["name"] for r in records(folder) if r["type"] == "artifact"]
    assert any(name.startswith("data-") for name in names) and not any(name.startswith("checkpoint") for name in names)
    folder = train("fit", "--run.name", "quiet", "--run.upload_checkpoint", "true", "--trainer.max_steps", "4")
    assert not (folder / "wandb").exists()


def test_a_study_is_logged_as_a_table_in_its_group(tmp_path: Path) -> None:
    found = ratio([Reach({"flops": 80.0})] * 2, [Reach({"flops": 100.0})] * 2, "flops", 0.02)
    config = RunConfig("my-study", root=str(tmp_path), group="my-study", tags=["study", "report"], wandb="offline")
    log_study(config, [Finding("arm", "base", {"flops": found}, None)], {})
    folder = tmp_path / "my-study-report"
    (run,) = [r["run"] for r in records(folder) if r["type"] == "run"]
    assert (run["run_id"], run["run_group"], run["tags"]) == ("my-study-report", "my-study", ["study", "report"])
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/study/*.json")
    content = json.loads(table.read_text())
    (row,) = [dict(zip(content["columns"], values, strict=True)) for values in content["data"]]
    assert (row["arm"], row["axis"], row["verdict"], row["ratio"]) == ("arm", "flops", "saves", pytest.approx(0.8))


def test_the_workspace_is_what_wandb_takes() -> None:
    made = workspace("someone/frugal", "costs")
    sent = json.loads(made._to_model().spec.model_dump_json(by_alias=True))
    text = json.dumps(sent)
    for name in metric_names():
        assert name in text, name
    assert [section.name for section in made.sections] == list(SECTIONS)
    assert made.sections[0].panels[0].log_x and (made.entity, made.project) == ("someone", "frugal")


def test_a_workspace_needs_entity_and_project_and_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UserError, match="project: must be ENTITY/PROJECT, got frugal"):
        workspace("frugal")
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", lambda self: 1 / 0)
    with pytest.raises(SystemExit):
        main(["workspace", "someone/frugal"])
    assert capsys.readouterr().err == "error: project: W&B does not take the workspace: division by zero\n"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_are_well_formed_and_start_commands_that_are_accepted(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(path.read_text())
    # https://docs.wandb.ai/guides/sweeps/sweep-config-keys
    known = {
        "program",
        "method",
        "metric",
        "parameters",
        "command",
        "early_terminate",
        "run_cap",
        "name",
        "description",
    }
    assert sweep.keys() <= known and sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"]["name"] in metric_names() and sweep["metric"]["goal"] in ("minimize", "maximize")
    for parameter in sweep["parameters"].values():
        assert parameter.keys() in ({"values"}, {"value"}, {"distribution", "min", "max"})
    choices = [p.get("values") or [p["min"], p["max"]] for p in sweep["parameters"].values()]
    for values in (next(itertools.product(*choices)), tuple(choice[-1] for choice in choices)):
        arguments = [f"--{key}={value}" for key, value in zip(sweep["parameters"], values, strict=True)]  # ${args}
        command = [word for part in sweep["command"] for word in (arguments if part == "${args}" else [part])]
        assert command[:3] == ["${env}", "${interpreter}", "${program}"] and sweep["program"] == "train.py"
        build([*command[3:], "--trainer.logger", "false", "--run.root", str(tmp_path)])
