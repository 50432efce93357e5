"""`frugal savings`: every shipped study is accepted, and a real one of seconds goes from arms to a report."""

import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from frugal.cli.train import build
from frugal.cli.train import main as train
from frugal.cli.verbs import main
from frugal.tracking import processes
from frugal.tracking.read_runs import flat
from frugal.tracking.receipts import read_results
from frugal.tracking.study import read_study, run_spec

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_of_a_shipped_study_is_accepted(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    study = read_study(str(path))
    said = flat(run_spec(study, study.base, 1, study.steps, {}).overlay)
    assert {"model.optimizer.class_path", "data.batch_size"} <= said.keys()  # its results outlive a change of defaults
    seen = []
    steps = round(study.lengths[0] * study.steps)  # the shortest run: where shares of the steps come closest
    for arm in study.all_arms():
        tuned = {other.name: {other.tune.key: other.tune.grid[0]} for other in study.all_arms() if other.tune}
        spec = run_spec(study, arm, 1, steps, tuned)
        spec.overlay.get("model", {}).pop("init_from", None)  # a run that fine-tunes starts from one of the user's
        if spec.overlay in seen:
            continue
        seen.append(spec.overlay)
        file = tmp_path / "overlay.yaml"
        file.write_text(yaml.safe_dump({**spec.overlay, "run": {"root": str(tmp_path)}}))
        assert build(["fit", "--config", str(file), "--trainer.logger", "false"]).trainer.max_steps == steps
    assert len(seen) > 1


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_open_with_a_header(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Question:", "Command:", "Time:", "Result:"):
        assert any(line.startswith(f"# {word}") for line in header), f"{path.name} lacks {word}"
    assert f"configs/studies/{path.name}" in "\n".join(header) or "make study" in "\n".join(header)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "claims").glob("[a-z]*.md")), ids=lambda path: path.stem)
def test_a_claim_card_has_its_four_parts_and_names_studies_that_exist(path: Path) -> None:
    text = path.read_text()
    parts = [line for line in text.splitlines() if line.startswith("## ")]
    assert parts == ["## Published", "## Scale and conditions", "## Here", "## Counter-evidence"]
    named = text.splitlines()[2].removeprefix("Study: ").split(", ")
    folder = (ROOT / named[0]).parent
    assert (ROOT / named[0]).is_file() and all((folder / name).is_file() for name in named[1:])
    assert f"({path.name})" in (path.parent / "README.md").read_text()


NUMBER = r"[+-]?\d+\.\d+"
QUOTED = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER}|∞)\]|at least ({NUMBER})")


def quotes(card: str) -> list[tuple[str, str, list[str]]]:
    """Figures with an interval, and bounds, that a card quotes of a study: its name, the text, estimate and ends."""
    found = []
    for paragraph in card.partition("## Here")[2].partition("## Counter")[0].split("\n\n"):
        for said in re.split(r"(?:^|(?<=\. )|(?<=\n))(?=\w+\.yaml, )", paragraph.strip()):
            if match := re.match(r"([a-z_]+)\.yaml, ", said):
                own = re.split(r"\w+\.yaml", said[match.end() :])[0]
                found += [(match[1], m[0], [part for part in m.groups() if part]) for m in QUOTED.finditer(own)]
    return found


def test_cards_quote_what_the_results_say() -> None:
    """So that a study that is run again cannot leave two verdicts behind."""
    results = {result.study: result for result in read_results([str(ROOT / "docs" / "claims" / "results")])}
    checked = 0
    for path in sorted((ROOT / "docs" / "claims").glob("[a-z]*.md")):
        for study, text, parts in quotes(path.read_text()):
            if study not in results:
                continue
            known: list[tuple[float, ...]] = []
            for finding in results[study].findings:
                known += [(r.estimate, r.low, r.high) for r in finding.ratios.values()]
                if finding.loss:
                    mean, low, high = finding.loss
                    known += [(mean, low, high), (-mean, -high, -low)]
            shown = [math.inf if part == "∞" else float(part) for part in parts]
            exact = 0.5001 * 10.0 ** -len(parts[0].partition(".")[2])
            close = [k for k in known if all(a == b or abs(a - b) <= exact for a, b in zip(shown, k, strict=False))]
            assert close, f"{path.name}: {text} is no figure of {study}.json"
            checked += 1
    assert checked > 60


def test_every_study_has_a_claim_card() -> None:
    cards = "".join(card.read_text().splitlines()[2] + "\n" for card in (ROOT / "docs" / "claims").glob("[a-z]*.md"))
    assert [path.name for path in STUDIES if path.name not in cards] == []


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs of a study are made in this process, which is faster than a new one each; returns the overlays' names."""
    made: list[str] = []

    def start(command: list[str], log_file: Path, threads: int = 1, devices: object = None) -> int:
        made.append(log_file.stem)
        train(command[2:])
        return 0

    monkeypatch.setattr("frugal.tracking.processes.start_process", start)
    monkeypatch.setattr("frugal.cli.savings.refuse_faulty", lambda samples: None)  # a process of its own
    return made


def test_a_study_runs_reports_and_is_not_run_twice(
    project: Path, in_process: list[str], capsys: pytest.CaptureFixture
) -> None:
    shutil.copy(ROOT / "train.py", project)
    (project / "small.yaml").write_text(
        "question: does a wider feed-forward layer save steps?\nsteps: 8\nseeds: [1, 2]\nlengths: [0.5, 1.0]\n"
        "overlays: [tiny.yaml]\narms:\n- {name: wide, options: {model: {transformer: {d_ff: 64}}}}\n- {name: same}\n"
        "- {name: swept, tune: {key: model.optimizer.lr, grid: [0.01, 0.02]}}\n"
    )
    command = ["savings", "small.yaml", "--out", "out", "--wandb", "disabled"]
    with pytest.raises(SystemExit):
        main([*command, "--report_only"])
    assert "no finished run of small" in capsys.readouterr().err
    main([*command, "--arms", "wide"])
    shown = capsys.readouterr().out
    assert "# Savings study: small" in shown and "| wide | **" in shown
    assert "Target, margin, lengths and seeds were declared before the first run." in shown
    before = list(in_process)
    assert 4 <= len(before) == len(set(before)) <= 8
    main([*command, "--arms", "wide", "--report_only"])
    main([*command, "--report_only"])  # one arm has no run, not even its sweep
    shown = (project / "out/small/small.md").read_text()
    assert "| wide | **" in shown and "swept" not in shown and "without a result" not in shown
    main([*command, "--arms", "wide"])
    assert in_process == before
    main([*command, "--arms", "same"])  # the report keeps the other arm, and leaves out what never ran
    assert all(name.startswith("same") for name in in_process[len(before) :])
    shown = (project / "out/small/small.md").read_text()
    assert "| wide | **" in shown and "| same | **" in shown and "| swept |" not in shown
    assert (project / "out/small/small.png").is_file() and (project / "out/small/small.md").is_file()
    kept = json.loads((project / "out/small/small.json").read_text())
    told = "\n".join(kept["conditions"])
    assert "1 run(s) of the study at a time." in told and "Code: " in told and "Software: python 3" in told
    assert kept["conditions"][0].startswith("Target, margin") and "Of the declared seeds" not in told
    main([*command, "--arms", "wide", "--seeds", "1", "--report_only"])
    assert "Of the declared seeds [1, 2] only [1]." in capsys.readouterr().out
    (last,) = [run for run in kept["runs"]["base"]["1"] if run["share"] == 1]
    assert last.keys() == {"share", "loss", "tokens", "flops", "seconds", "joules", "dollars"} and last["tokens"] > 0


def test_a_key_misspelt_in_an_arm_is_told_before_anything_has_trained(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copy(ROOT / "train.py", project)
    (project / "small.yaml").write_text(
        "question: q\nsteps: 8\nseeds: [1]\noverlays: [tiny.yaml]\narms:\n"
        "- {name: good, options: {model: {transformer: {d_ff: 64}}}}\n"
        "- {name: bad, options: {model: {transformer: {n_layerz: 2}}}}\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["savings", "small.yaml", "--out", "out", "--wandb", "disabled"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and not (project / "out/small/runs").exists()
    assert "arms: bad: model.transformer.n_layerz: there is no such key; did you mean model.transformer" in said


def test_a_study_with_a_failed_run_says_so_and_ends_with_1(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def start(command: list[str], log_file: Path, threads: int = 1, devices: object = None) -> int:
        if log_file.name.startswith("same_8_s2"):
            log_file.write_text("error: it broke\n")
            return 1
        return train(command[2:]) or 0

    monkeypatch.setattr("frugal.tracking.processes.start_process", start)
    monkeypatch.setattr("frugal.cli.savings.refuse_faulty", lambda samples: None)
    shutil.copy(ROOT / "train.py", project)
    (project / "small.yaml").write_text(
        "question: q\nsteps: 8\nseeds: [1, 2, 3]\nlengths: [1.0]\noverlays: [tiny.yaml]\n"
        "arms: [{name: same, options: {model: {optimizer: {lr: 0.011}}}}]\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["savings", "small.yaml", "--out", "out", "--wandb", "disabled"])
    said = capsys.readouterr()
    assert ended.value.code == 1 and "small: 1 run(s) failed (same_8_s2" in said.err and "it broke" in said.err
    # The seeds that are left are no fair draw of all.
    assert "| same (1 of 3 seeds without a result) | **open** " in said.out


def test_a_study_that_is_told_to_stop_ends_with_75_and_gives_the_signal_back(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def start(command: list[str], log_file: Path, threads: int = 1, devices: object = None) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        while not processes.TOLD:  # the main thread's handler
            time.sleep(0.01)
        return -signal.SIGTERM  # as of a run that was still starting

    monkeypatch.setattr("frugal.tracking.processes.start_process", start)
    monkeypatch.setattr("frugal.cli.savings.refuse_faulty", lambda samples: None)
    shutil.copy(ROOT / "train.py", project)
    (project / "small.yaml").write_text("question: q\nsteps: 8\noverlays: [tiny.yaml]\narms: [{name: same}]\n")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["savings", "small.yaml", "--out", "out", "--wandb", "disabled"])
    assert ended.value.code == 75 and signal.getsignal(signal.SIGTERM) is before
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "study: no file nowhere.yaml"),
        (["configs/studies/quick.yaml", "--launcher", "nosuch --gpus 1"], "launcher: there is no program nosuch"),
        (["configs/studies/quick.yaml", "--launcher", "srun --comment 'x"], "launcher: "),
        (["configs/studies/quick.yaml", "--launcher", ""], "launcher: there is no program ''"),
        (["configs/studies/quick.yaml", "--seeds", "9"], "seeds: the study has 3, got 9"),
        (["configs/studies/quick.yaml", "--wandb", "maybe"], "wandb: "),
        (["configs/studies/quick.yaml", "--jobs", "0"], "jobs: must be positive"),
    ],
)
def test_a_fault_is_one_line(project: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    shutil.copy(ROOT / "train.py", project)
    with pytest.raises(SystemExit) as stopped:
        main(["savings", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
