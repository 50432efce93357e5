"""Studies as data: arms and runs, what is made when, and what an interrupted study goes on with."""

import itertools
import json
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import yaml

from frugal.errors import UserError
from frugal.provenance import source
from frugal.tracking.processes import start_process
from frugal.tracking.run_costs import Result, conditions, costs_of, how_measured
from frugal.tracking.savings import compare, is_flat, recipe_effects
from frugal.tracking.savings_report import forest_figure, markdown, write_report
from frugal.tracking.statistics import Point
from frugal.tracking.study import Arm, Equal, Study, Tune, read_study, run_spec
from frugal.tracking.study_runs import StudyRuns

PART = {"a": 0.8, "b": 0.9, "c": 1.0}  # steps that a part leaves to be done


def fake_train(log: list[str], fail: str = "") -> Any:
    """Stands for train.py: a loss that falls with the logarithm of the steps, faster with each part that is on."""

    def start(command: list[str], log_file: Path) -> int:
        overlay = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())
        name, steps = overlay["run"]["name"], overlay["trainer"]["max_steps"]
        log.append(name)
        if fail and name.startswith(fail):
            log_file.write_text("error: it broke\n")
            return 1
        model = overlay.get("model", {})
        work = math.prod(PART[part] for part in model.get("parts", {}))
        lr = model.get("lr", 1.0)
        loss = 2.0 - 0.15 * math.log(steps / work) + 0.05 * math.log(lr) ** 2 + 0.001 * (overlay["seed_everything"] % 3)
        folder = Path(overlay["run"]["root"]) / name / "id"
        folder.mkdir(parents=True)
        seconds = {"train": steps * 0.3, "validation": 5.0, "other": 0.0}
        spent = sum(seconds.values())
        summary = {
            "val_bits_per_byte": loss,
            "tokens_seen": steps * 1024,
            "flops": steps * 4e9 * model.get("price", 1.0),
        }
        summary |= {"seconds": spent, "seconds_by_phase": seconds, "train_cpu_seconds": steps * 0.1, "threads": 1}
        summary |= {"joules": 10 * spent, "dollars": spent / 1e5, "assumption": "cpu: 10 W", "global_step": steps}
        (folder / "metrics.jsonl").write_text(json.dumps({"step": steps, "val/bits_per_byte": loss}) + "\n")
        (folder / "summary.json").write_text(json.dumps(summary))
        return 0

    return start


def part(name: str) -> Arm:
    return Arm(name, options={"model": {"parts": {name: True}}})


LENGTHS = [0.1, 0.15, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4]
STUDY = Study("?", 1000, parts=[part("a"), part("b"), part("c")], seeds=[1, 2], margin=0.02)


def test_a_recipe_makes_all_alone_and_without() -> None:
    names = [arm.name for arm in STUDY.all_arms()]
    assert names == ["base", "recipe", "only-a", "only-b", "only-c", "without-a", "without-b", "without-c"]
    options = {arm.name: arm.options for arm in STUDY.all_arms()}
    assert options["recipe"] == {"model": {"parts": {"a": True, "b": True, "c": True}}}
    assert options["without-b"] == {"model": {"parts": {"a": True, "c": True}}}


def test_a_recipe_is_first_run_where_its_parts_savings_would_multiply() -> None:
    parts = [replace(part(name), start=start) for name, start in (("a", 0.7), ("b", 0.5), ("c", 1.0))]
    starts = {arm.name: arm.start for arm in replace(STUDY, parts=parts).all_arms()}
    assert starts["recipe"] == 0.35 and starts["without-b"] == 0.7 and starts["without-a"] == 0.5


def test_some_arms_alone_come_with_what_they_are_compared_with() -> None:
    arms = [Arm("x", controls=["shorter"]), Arm("shorter", equal=Equal("y")), Arm("y"), Arm("z")]
    study = Study("?", 1000, arms=arms, parts=STUDY.parts)
    for only, names in ((["x"], ["base", "x", "shorter", "y"]), (["recipe", "z"], ["base", "z", "recipe"])):
        assert [arm.name for arm in replace(study, only=only).all_arms()] == names
    with pytest.raises(UserError, match="there is no arm 'w', only base, x"):
        replace(study, only=["w"])


def test_the_engine_finds_what_was_planted(tmp_path: Path) -> None:
    log: list[str] = []
    runs = StudyRuns("s", STUDY, tmp_path, start=fake_train(log))
    results = runs.all(jobs=2)
    assert len(log) == len(set(log))
    points = {arm: {s: [(r.length, r.point) for r in rs] for s, rs in seeds.items()} for arm, seeds in results.items()}
    findings = compare(STUDY, points)
    found = {f.arm: f.ratios for f in findings}
    for axis in ("tokens", "flops", "seconds", "joules", "dollars"):
        assert found["only-a"][axis].estimate == pytest.approx(0.8, rel=1e-3)
        assert found["recipe"][axis].estimate == pytest.approx(0.72, rel=1e-3)
        assert found["only-a"][axis].verdict == "saves" and found["only-c"][axis].verdict == "ties"
    effects, product = recipe_effects(STUDY, findings)
    assert [effect.within["flops"] for effect in effects] == pytest.approx([0.8, 0.9, 1.0], rel=1e-3)
    assert product["flops"] == pytest.approx(0.72, rel=1e-3)
    # A CPU's training seconds are the processor's, the clock's 0.3 a step are not; validation is left out.
    assert {share: point.costs["seconds"] for share, point in points["base"][1]} == pytest.approx({0.7: 70, 1.0: 100})
    text = markdown("s", STUDY, points, findings, conditions(results), runs.sweeps, runs.failures)
    assert "| only-a | **saves** 0.80 [0.80, 0.80]" in text and "| only-c | **ties** within 1% 1.00" in text
    assert "3.00 times as many training seconds" in text
    assert "| a | 0.80 | 0.80 |" in text  # alone, and within the recipe
    alone = {arm: points[arm] for arm in ("base", "recipe")}
    only = replace(STUDY, only=["recipe"])
    assert "The recipe's parts" not in markdown("s", only, alone, compare(only, alone), [], {}, {})
    paths = write_report(tmp_path, "s", STUDY, points, findings, text)
    assert paths["figure"].stat().st_size > 10_000
    figure = forest_figure("s", findings, "base", 0.02)
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "tokens = FLOPs = seconds = joules = dollars\n/ those of base"
    ]


def test_unlike_machines_are_named_each(tmp_path: Path) -> None:
    runs = StudyRuns("s", replace(STUDY, parts=[], arms=[part("a")]), tmp_path, start=fake_train([])).all()
    one = conditions(runs)
    assert one[1] == "1 run(s) of the study at a time." and sum(line.startswith("Machine:") for line in one) == 1
    summary = runs["a"][2][0].summary
    summary |= {"device": "NVIDIA H100", "assumption": "h100: 700 W"}
    two = conditions(runs)
    assert sum(line.startswith("Machine:") for line in two) == 2 and "Machine: h100: 700 W" in two[1]
    assert any("in 2 ways" in line for line in two)


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_what_is_compared_shares_its_hours(jobs: int, tmp_path: Path) -> None:
    study = Study("?", 1000, arms=[part("a"), part("b")], seeds=[1, 2, 3], lengths=[1.0])
    order = StudyRuns("s", study, tmp_path, start=None)._order(jobs)
    assert sorted((arm.name, seed) for arm, seed in order) == [(a, s) for a in ("a", "b", "base") for s in (1, 2, 3)]
    names = [f"{arm.name}{seed}" for arm, seed in order]
    for seed in (1, 2, 3):
        first = min(names.index(f"{arm}{seed}") for arm in ("a", "b"))
        assert names.index(f"base{seed}") < first
        if seed + jobs <= 3:  # a later baseline waits for its turn
            assert names.index(f"base{seed + jobs}") > first
    log: list[str] = []
    StudyRuns("s", study, tmp_path, start=fake_train(log)).all(jobs)
    assert len(log) == len(set(log)) == 9


def test_a_second_start_makes_nothing_and_a_report_needs_no_run(tmp_path: Path) -> None:
    log: list[str] = []
    StudyRuns("s", STUDY, tmp_path, start=fake_train(log)).all()
    again = StudyRuns("s", STUDY, tmp_path, start=None)
    assert again.all()["recipe"].keys() == {1, 2} and not again.failures and again.made == 0
    shorter = StudyRuns("s", Study("?", 900, arms=[part("a")], seeds=[1]), tmp_path, start=None)
    assert shorter.all() == {"base": {}, "a": {}}  # other steps are other runs


def test_a_stopped_run_stops_the_study_and_the_next_start_goes_on(tmp_path: Path) -> None:
    log: list[str] = []
    train, calls = fake_train(log), itertools.count()

    def start(command: list[str], log_file: Path) -> int:
        return 75 if next(calls) >= 3 else train(command, log_file)

    with pytest.raises(UserError, match="the same command goes on"):
        StudyRuns("s", STUDY, tmp_path, start=start).all(jobs=2)
    assert len(log) == 3
    runs = StudyRuns("s", STUDY, tmp_path, start=train)
    assert all(seeds.keys() == {1, 2} for seeds in runs.all().values())
    assert len(log) == len(set(log)) == 3 + runs.made


@pytest.mark.parametrize(
    "handler", ["signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))", ""], ids=["saves", "starts"]
)
def test_a_signal_reaches_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: str) -> None:
    """Two runs at a time are told and end, with their state saved or still starting; no third one begins."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(
        f"import os, signal, sys, time\n{handler}\nopen(f'{{os.getpid()}}.begun', 'w').close()\ntime.sleep(600)\n"
    )
    runs = StudyRuns("s", replace(STUDY, target=1.0), tmp_path, start=start_process)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(runs.all, jobs=2)
        while len(list(tmp_path.glob("*.begun"))) < 2:
            assert not ended.done()
            time.sleep(0.01)
        runs.stop(signal.SIGTERM)
        with pytest.raises(UserError, match="the same command goes on"):
            ended.result()
    assert len(list(tmp_path.glob("*.begun"))) == 2 and not runs.failures


def test_what_a_failed_arm_leaves(tmp_path: Path) -> None:
    log: list[str] = []
    runs = StudyRuns("s", STUDY, tmp_path, start=fake_train(log, fail="only-b"))
    results = runs.all()
    assert results["only-b"] == {} and "error: it broke" in runs.failures.values()
    points = {arm: {s: [(r.length, r.point) for r in rs] for s, rs in seeds.items()} for arm, seeds in results.items()}
    findings = compare(STUDY, points)
    (finding,) = [f for f in findings if f.arm == "only-b"]
    assert finding.ratios == {} and finding.note == "2 of 2 seeds without a result"
    assert "| not known |" in markdown("s", STUDY, points, findings, [], {}, runs.failures)


def test_a_search_that_is_cut_off_is_no_bound(tmp_path: Path) -> None:
    slow = Arm("slow", options={"model": {"lr": 3.0}})  # reaches the target between 1.0 and 1.4 of the steps
    study = Study("?", 1000, arms=[slow], seeds=[1, 2, 3])
    for fail, seeds in (("slow_1400", {}), ("slow_1400_s2", {1, 3}), ("slow_9", {1, 2, 3})):
        runs = StudyRuns("s", study, tmp_path / fail, start=fake_train([], fail=fail))
        results = runs.all()
        assert results["slow"].keys() == set(seeds) and bool(runs.failures) == (len(seeds) < 3)
        points = {a: {s: [(r.length, r.point) for r in rs] for s, rs in found.items()} for a, found in results.items()}
        (finding,) = compare(study, points)
        verdicts = {r.verdict for r in finding.ratios.values()}
        assert verdicts == {0: set(), 2: {"open"}, 3: {"costs"}}[len(seeds)]


Results = dict[str, dict[int, list[Result]]]


def points_of(results: Results) -> dict[str, dict[int, list[tuple[float, Point]]]]:
    return {arm: {s: [(r.length, r.point) for r in rs] for s, rs in seeds.items()} for arm, seeds in results.items()}


def test_a_sweep_that_lost_a_run_leaves_its_arms_open(tmp_path: Path) -> None:
    base = Arm("base", tune=Tune("model.lr", [0.4, 1.0, 3.0]))
    study = Study("?", 1000, base=base, arms=[Arm("same", tune=Tune("model.lr", [0.4, 1.0, 3.0], seed=77))])
    lost = run_spec(study, base, 9001, 1000, {"base": {"model.lr": 1.0}}).name
    runs = StudyRuns("s", study, tmp_path, start=fake_train([], fail=lost))
    points = points_of(runs.all())
    assert runs.tuned == {"base": {"model.lr": 0.4}, "same": {"model.lr": 1.0}}
    (finding,) = compare(study, points, runs.sweeps)
    assert finding.ratios["flops"].estimate < 0.8 and finding.ratios["flops"].verdict == "open"
    assert finding.note == "a run of base's sweep failed; base's best value, 0.4, is its grid's first"


def test_unlike_measurement_makes_no_ratio(tmp_path: Path) -> None:
    study = Study("?", 1000, arms=[Arm("a", options={"model": {"lr": 1.1}})], seeds=[1, 2])
    results = StudyRuns("s", study, tmp_path, start=fake_train([])).all()
    (finding,) = compare(study, points_of(results))
    assert finding.ratios.keys() == {"tokens", "flops", "seconds", "joules", "dollars"} and not finding.note
    for change, gone in (
        ({"device": "NVIDIA H100"}, {"seconds", "joules", "dollars"}),
        ({"threads": 2}, {"seconds", "joules", "dollars"}),
        ({"assumption": "cpu: 20 W"}, {"joules", "dollars"}),
        ({"source": "abc"}, set()),
    ):
        other = {seed: [replace(r, summary=r.summary | change) for r in rs] for seed, rs in results["a"].items()}
        (finding,) = compare(study, points_of({**results, "a": other}))
        assert {"tokens", "flops", "seconds", "joules", "dollars"} - finding.ratios.keys() == gone, change
        assert ("unlike ways" in finding.note) == bool(gone) and ("unlike code" in finding.note) == ("source" in change)


def test_processes_that_read_ahead_are_paid_for_by_the_clock() -> None:
    """An estimate of energy has all cores at full power, so it cannot tell a core that reads ahead from an idle one."""
    summary: dict[str, Any] = {"device": "cpu", "threads": 1, "train_cpu_seconds": 1.0, "assumption": "cpu: 10 W"}
    alone, ahead = how_measured(summary), how_measured(summary | {"workers": 2})
    assert alone["seconds"].endswith("processor") and ahead["seconds"].endswith("clock")
    del summary["train_cpu_seconds"]  # as a study by the clock does
    alone, ahead = how_measured(summary), how_measured(summary | {"workers": 2})
    assert alone["seconds"] == ahead["seconds"] and alone["dollars"] == ahead["dollars"]
    assert alone["joules"] != ahead["joules"]


def test_a_flat_baseline_is_told() -> None:
    def points(slope: float) -> dict[str, dict[int, list[tuple[float, Point]]]]:
        losses = {1: 0.01, 2: -0.01, 3: 0.0}
        return {"base": {s: [(0.7, Point(1 + d + slope, {})), (1.0, Point(1 + d, {}))] for s, d in losses.items()}}

    study = Study("?", 1000, arms=[Arm("a")])
    assert is_flat(study, points(0.005)) and not is_flat(study, points(0.05))
    costs = {"flops": 1.0, "seconds": 1.0}
    told = {
        slope: {arm: {s: [(share, replace(p, costs=costs)) for share, p in ps] for s, ps in seeds.items()}}
        for slope in (0.005, 0.05)
        for arm, seeds in points(slope).items()
    }
    said = {slope: markdown("s", study, found, [], [], {}, {}) for slope, found in told.items()}
    assert "hardly depends on its length" in said[0.005] and "hardly" not in said[0.05]


def test_a_run_counts_if_it_has_done_all_its_steps(tmp_path: Path) -> None:
    """Whatever it ended with, and the same at the second call."""
    study, made = Study("?", 1000, arms=[part("a")], seeds=[1, 2]), fake_train([])

    def start(command: list[str], log_file: Path) -> int:
        made(command, log_file)
        log_file.write_text("OSError: no space for a picture\n")
        return 1

    for _ in range(2):
        runs = StudyRuns("s", study, tmp_path, start=start)
        assert set(runs.all()["a"]) == {1, 2} and not runs.failures


def test_runs_of_other_code_are_counted(tmp_path: Path) -> None:
    study = Study("?", 1000, arms=[part("a")], seeds=[1])
    runs = StudyRuns("s", study, tmp_path, start=fake_train([]))
    runs.all()
    assert runs.of_other_code == 0
    for number, file in enumerate(sorted(tmp_path.glob("runs/*/id/summary.json"))):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"source": source() if number else "other"}))
    runs = StudyRuns("s", study, tmp_path, start=fake_train([]))
    runs.all()
    assert runs.of_other_code == 1 and runs.made == 0


def test_a_baseline_whose_search_begins_with_a_shorter_run_has_its_full_one(tmp_path: Path) -> None:
    study = Study("?", 1000, base=Arm("base", start=0.5), arms=[part("a")], seeds=[1, 2], target=1.1)
    results = StudyRuns("s", study, tmp_path, start=fake_train([])).all()
    assert all(1.0 in [r.length for r in rs] for rs in results["base"].values())
    assert compare(replace(study, target="baseline"), points_of(results))


def test_runs_that_are_there_but_of_no_use(tmp_path: Path) -> None:
    study = Study("?", 1000, arms=[part("a")], seeds=[1], metric="val/typo")
    for _ in range(2):  # the second call finds the runs that the first has made
        runs = StudyRuns("s", study, tmp_path, start=fake_train(log := []))
        assert runs.all() == {"base": {}, "a": {}} and list(runs.failures)
    assert not log and "no finite val/typo" in " ".join(runs.failures.values())
    nothing = next(tmp_path.glob("runs/base*/id/summary.json")).read_text().replace('"flops": ', '"flops": 0, "a": ')
    next(tmp_path.glob("runs/base*/id/summary.json")).with_name("study.json").write_text("")
    StudyRuns("s", replace(study, metric="val/bits_per_byte"), tmp_path, start=fake_train([])).all()
    for damage in ('{"seconds": ', "{}", nothing, nothing.replace('"flops": 0', '"flops": null')):
        next(tmp_path.glob("runs/base*/id/summary.json")).write_text(damage)
        with pytest.raises(UserError, match=r"summary\.json: damaged; remove its folder"):
            StudyRuns("s", replace(study, metric="val/bits_per_byte"), tmp_path, start=fake_train([])).all()


def test_a_sweep_chooses_for_the_baseline_and_for_arms_without_their_own(tmp_path: Path) -> None:
    tune = Tune("model.lr", [0.5, 1.1, 3.0])
    own = Arm("own", tune=Tune("model.lr", [0.9, 5.0], seed=77))
    study = Study("?", 1000, base=Arm("base", tune=tune), arms=[part("a"), own], seeds=[1])
    runs = StudyRuns("s", study, tmp_path, start=fake_train([]))
    results = runs.all()
    assert runs.tuned == {"base": {"model.lr": 1.1}, "own": {"model.lr": 0.9}}
    used = {arm: results[arm][1][0].spec.overlay["model"]["lr"] for arm in results}
    assert used == {"base": 1.1, "a": 1.1, "own": 0.9}


def test_what_sweeps_chose_adds_up(tmp_path: Path) -> None:
    """An arm's options win over the baseline's sweep, its own sweep over both; other keys stay."""
    base = Arm("base", tune=Tune("model.lr", [0.5, 1.1]))
    arms = [
        Arm("own", options={"model": {"price": 2.0}}, tune=Tune("model.price", [3.0, 4.0], seed=77)),
        Arm("set", options={"model": {"lr": 0.7}}, tune=Tune("model.price", [5.0, 6.0], seed=77)),
        Arm("like", tuned_by=["own"]),
    ]
    results = StudyRuns("s", Study("?", 1000, base=base, arms=arms, seeds=[1]), tmp_path, start=fake_train([])).all()
    used = {arm: results[arm][1][0].spec.overlay["model"] for arm in results}
    assert used["own"] == {"lr": 1.1, "price": 3.0} and used["set"] == {"lr": 0.7, "price": 5.0}
    assert used["like"] == {"lr": 1.1, "price": 3.0}
    with pytest.raises(UserError, match="arms: like: tuned_by: plain has no sweep"):
        Study("?", 1000, arms=[Arm("like", tuned_by=["plain"]), Arm("plain")])
    circle = [Arm(a, tune=Tune("model.lr", [1.0, 2.0]), tuned_by=[b]) for a, b in (("a", "b"), ("b", "a"))]
    with pytest.raises(UserError, match="goes round in a circle"):
        StudyRuns("s", Study("?", 1000, arms=circle), tmp_path, start=None).all()


def test_a_recipe_and_what_it_is_without_a_part_have_the_values_of_its_sweeps(tmp_path: Path) -> None:
    tuned_part = replace(part("a"), tune=Tune("model.price", [1.0, 2.0], seed=77))
    study = replace(STUDY, parts=[tuned_part, part("b"), part("c")], recipe_tune=Tune("model.lr", [0.9, 5.0], seed=77))
    results = StudyRuns("s", replace(study, seeds=[1]), tmp_path, start=fake_train([])).all()
    used = {arm: results[arm][1][0].spec.overlay.get("model", {}) for arm in results}
    values = {arm: (model.get("lr"), model.get("price")) for arm, model in used.items()}
    assert values["recipe"] == values["without-b"] == (0.9, 1.0) and values["without-a"] == (0.9, None)
    assert values["only-a"] == (None, 1.0) and values["only-b"] == (None, None)
    with pytest.raises(UserError, match="parts: a: tune needs add_one_in"):
        replace(study, add_one_in=False)


def test_a_baseline_that_gets_there_earlier_gives_nothing_away(tmp_path: Path) -> None:
    """Where a shorter run is as good (a text learnt by heart), an arm that changes nothing must not save."""

    def by_heart(command: list[str], log_file: Path) -> int:  # best at 400 steps, or half of them
        overlay = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())
        overlay["trainer"]["max_steps"] /= 400 * (0.5 if "half" in overlay["run"]["name"] else 1)
        status = fake_train([])(command, log_file)
        folder = tmp_path / "runs" / overlay["run"]["name"] / "id"
        loss = 1.5 + 0.1 * math.log(overlay["trainer"]["max_steps"]) ** 2
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "val/bits_per_byte": loss}) + "\n")
        return status

    arms = [Arm("same", options={"x": 1}), Arm("half", options={"x": 2})]
    study = Study("?", 1000, arms=arms, seeds=[1, 2], lengths=[0.05, *LENGTHS])
    results = StudyRuns("s", study, tmp_path, start=by_heart).all()
    points = {arm: {s: [(r.length, r.point) for r in rs] for s, rs in seeds.items()} for arm, seeds in results.items()}
    found = {f.arm: f.ratios["flops"] for f in compare(study, points)}
    assert found["same"].estimate == pytest.approx(1.0) and found["same"].verdict == "ties"
    assert found["half"].estimate == pytest.approx(0.5, rel=0.1) and found["half"].verdict == "saves"
    text = markdown("s", study, points, compare(study, points), [], {}, {})
    assert (
        "The baseline has this loss earlier, and that is its cost (shares of its steps: seed 1: 0.25, seed 2: 0.25)"
        in text
    )


def test_a_run_is_known_by_all_that_makes_it(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/base.yaml").write_text("data: {cache_dir: .cache, seq_len: 8}\nrun: {name: base}\n")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/one.txt").write_text("one")
    study = Study("?", 10, arms=[Arm("x", options={"data": {"source": {"path": "texts/*.txt"}}})])

    def name() -> str:
        return run_spec(study, study.arms[0], 1, 10, {}, tmp_path).name

    names = [name()]
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/made").write_text("what a run writes")
    (tmp_path / "configs/base.yaml").write_text("run: {name: other}\n\ndata: {seq_len: 8, cache_dir: .cache}\n")
    assert name() == names[0]
    for file, text in (
        ("configs/base.yaml", "data: {seq_len: 16}\n"),
        ("texts/one.txt", "two"),
        ("texts/new.txt", "3"),
    ):
        (tmp_path / file).write_text(text)
        names.append(name())
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"- 1\n", "must hold keys, not a list"),
        (b"a: [\n", "is no YAML"),
        (b"\xff\xfe", "codec can't decode"),
        (b"trainer:\n", "options.trainer: must hold keys"),
    ],
)
def test_an_overlay_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "over.yaml").write_bytes(content)
    study = Study("?", 10, arms=[Arm("x", overlays=["over.yaml"])])
    with pytest.raises(UserError, match=told):
        run_spec(study, study.arms[0], 1, 10, {}, tmp_path)


def test_seconds_of_several_threads_are_the_clock_s_and_compiling_is_no_training() -> None:
    summary = {
        "seconds_by_phase": {"train": 30.0, "validation": 1.0, "data": 2.0, "other": 3.0},
        "seconds_by_part": {"compile": 10.0},
        **{"train_cpu_seconds": 28.0, "threads": 1, "assumption": "cpu: 10 W", "seconds": 36.0, "tokens_seen": 1},
        **{"flops": 1.0, "joules": 360.0, "dollars": 36.0},
    }
    one = costs_of(summary)
    # Processor seconds hold no compiling: the meter has left it out.
    assert one["seconds"] == pytest.approx(28 + 2) and one["dollars"] == pytest.approx(30)
    for others in ({"threads": 2}, {"workers": 2}):  # nor what processes that read ahead have done
        assert costs_of({**summary, **others})["seconds"] == pytest.approx(30 - 10 + 2)


def test_a_control_of_equal_flops_has_that_length(tmp_path: Path) -> None:
    dear = Arm("dear", options={"model": {"price": 0.6}}, controls=["equal"])
    study = Study("?", 1000, arms=[dear, Arm("equal", equal=Equal("dear"))], seeds=[1, 2])
    results = StudyRuns("s", study, tmp_path, start=fake_train([])).all()
    assert [r.spec.steps for r in results["equal"][1]] == [600]
    points = {arm: {s: [(r.length, r.point) for r in rs] for s, rs in seeds.items()} for arm, seeds in results.items()}
    against = next(f for f in compare(study, points) if f.reference == "equal")
    assert against.ratios == {} and against.loss is not None
    assert against.loss[0] == pytest.approx(-0.15 * math.log(1 / 0.6))  # it sees more tokens for as many FLOPs


def test_an_arm_that_never_gets_there_is_a_bound(tmp_path: Path) -> None:
    slow = Arm("slow", options={"model": {"lr": 20.0}})
    study = Study("?", 1000, arms=[slow], seeds=[1, 2, 3])
    results = StudyRuns("s", study, tmp_path, start=fake_train([])).all()
    points = {arm: {s: [(r.length, r.point) for r in rs] for s, rs in seeds.items()} for arm, seeds in results.items()}
    (finding,) = compare(study, points)
    assert finding.ratios["flops"].bound == "at least" and finding.ratios["flops"].verdict == "costs"
    assert finding.ratios["flops"].low == pytest.approx(1.4) and math.isinf(finding.ratios["flops"].high)


def test_shares_follow_the_length_and_validation_comes_once() -> None:
    arm = Arm(
        "x", options={"freezing": {"windows": [{"start": "0.25 steps"}]}, "trainer": {"accumulate_grad_batches": 4}}
    )
    study = Study("?", 1000, arms=[arm])
    tree = run_spec(study, arm, 3, 700, {}).overlay
    assert tree["freezing"]["windows"][0]["start"] == 175
    assert tree["trainer"] == {"accumulate_grad_batches": 4, "max_steps": 700, "val_check_interval": 2800}
    assert tree["seed_everything"] == 3


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        ("question: q\nsteps: 10\n", "arms: a study needs an arm"),
        ("question: q\nsteps: 10\narms: [{name: A b}]\n", "name an arm with lower-case"),
        ("question: q\nsteps: 10\narms: [{name: a, controls: [b]}]\n", "there is no other arm 'b'"),
        ("question: q\nsteps: 10\narms: [{name: a, start: 0.9}]\n", "start 0.9 is none of the lengths"),
        ("question: q\nsteps: 10\nseeds: [1, 1]\narms: [{name: a}]\n", "each once"),
        ("question: q\nsteps: 10\narms: [{name: a}, {name: a}]\n", "a stands there twice"),
        (
            "question: q\nsteps: 9\narms: [{name: a}, {name: b, equal: {arm: a}}]\n",
            "b: no arm names it among its controls",
        ),
        ("question: q\nsteps: 10\ntarget: .nan\narms: [{name: a}]\n", "target: must be baseline or a value of val/"),
        ("question: q\nsteps: 10\narms: [{name: a, options: null}]\n", "arms: a: options: must hold keys, got None"),
        ("question: q\nsteps: 10\noptions: null\narms: [{name: a}]\n", "options: must hold keys, got None"),
        ("- 1\n", "s.yaml: must hold keys, not a list"),
        ("", "must hold a study's keys"),
        ("arms: [\n", "s.yaml: is no YAML"),
    ],
)
def test_a_faulty_study_is_refused(yaml_text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml_text)
    with pytest.raises(Exception, match=message):
        read_study(str(tmp_path / "s.yaml"))
    with pytest.raises(UserError, match="no file"):
        read_study("nowhere.yaml")


def test_a_study_lies_upon_another(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("question: q\nsteps: 9\noptions: {data: {x: 1}}\narms: [{name: a}]\n")
    (tmp_path / "b.yaml").write_text("steps: 8\noptions: {data: {split: hash}}\n")
    study = read_study(f"{tmp_path}/a.yaml+{tmp_path}/b.yaml")
    assert study.steps == 8 and study.options == {"data": {"x": 1, "split": "hash"}} and study.question == "q"
    with pytest.raises(UserError, match=r"study: no file c\.yaml"):
        read_study(f"{tmp_path}/a.yaml+c.yaml")


def test_runs_at_a_time_have_a_device_each(tmp_path: Path) -> None:
    free: SimpleQueue[str] = SimpleQueue()
    for device in ("0", "3"):
        free.put(device)
    # Each says its device and waits for the other, in vain if both have the same.
    program = "import os, time; from pathlib import Path; Path(os.environ['CUDA_VISIBLE_DEVICES']).touch()\n"
    program += (
        "for i in range(6000): Path('0').exists() and Path('3').exists() and exit(0) or time.sleep(0.01)\nexit(1)"
    )
    command = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); exec({program!r})"]
    with ThreadPoolExecutor(2) as pool:
        codes = pool.map(lambda n: start_process(command, tmp_path / f"{n}.log", devices=free), range(2))
    assert list(codes) == [0, 0] and {free.get(), free.get()} == {"0", "3"}


def test_a_launcher_stands_before_the_command_and_its_exit_code_is_the_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    queue = tmp_path / "queue.sh"
    queue.write_text(f'#!/bin/sh\necho "$1" "$OMP_NUM_THREADS" > {tmp_path}/said; shift; exec "$@"\n')
    queue.chmod(0o755)
    command = [sys.executable, "-c", "print('ran'); exit(75)"]
    assert start_process(command, tmp_path / "log", launcher=[str(queue), "--gpus=1"]) == 75
    # How many threads a run gets is the launcher's affair.
    assert (tmp_path / "said").read_text().split() == ["--gpus=1"] and (tmp_path / "log").read_text() == "ran\n"


def test_a_launcher_s_runs_are_told_by_a_signal_that_it_hands_on(tmp_path: Path) -> None:
    program = "import signal, time; from pathlib import Path\n"
    program += "signal.signal(signal.SIGUSR1, lambda *_: exit(75)); Path('up').touch(); time.sleep(60)"
    command = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); exec({program!r})"]
    runs = StudyRuns("s", STUDY, tmp_path, start=None)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(start_process, command, tmp_path / "log", launcher=["env"])
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            runs.interrupt(signal.SIGINT)
        assert ended.result() == 75 and runs.stopped


def test_a_run_that_lost_its_place_begins_again_and_a_failed_one_gives_its_own_reason(tmp_path: Path) -> None:
    study = Study("?", 1000, arms=[Arm("a"), Arm("z")], seeds=[1])
    log: list[str] = []
    train, ends = fake_train(log), iter([75, 75])

    def start(command: list[str], log_file: Path) -> int:
        if log_file.name.startswith("z"):
            log_file.write_text("error: data.path: no such file\nsrun: error: node7: task 0: Exited with code 2\n")
            return 2
        return next(ends, None) or train(command, log_file)

    runs = StudyRuns("s", study, tmp_path, start=start, restarts=2)
    assert runs.result(study.base, 1, 1.0) is not None and not runs.stopped
    assert runs.result(study.arms[1], 1, 0.5) is None
    assert list(runs.failures.values()) == ["error: data.path: no such file"]
    ends = iter([75, 75, 75])
    with pytest.raises(UserError, match="told to stop"):
        runs.result(study.base, 1, 0.5)  # more often than it may
    assert runs.stopped


def test_joules_are_those_of_training_where_the_summary_tells() -> None:
    def run(
        train: float, **more: float
    ) -> dict[str, Any]:  # 30 s of start at 110 W, then training at 600 W, 10 s of data
        joules = 30 * 110.0 + train * 600 + 10 * 110
        phases = {"train": train, "validation": 0.0, "data": 10.0, "other": 30.0}
        spent = {"tokens_seen": 1, "flops": 1.0, "joules": joules, "dollars": train + 40.0, "seconds": train + 40}
        return {**spent, "seconds_by_phase": phases, "assumption": "NVML", **more}

    for train in (50.0, 100.0):
        told = costs_of(run(train, train_joules=600 * train))
        assert told["joules"] == pytest.approx(600 * train + 110 * 10)
        assert told["dollars"] == pytest.approx(train + 10)
    even = {**run(100.0), "joules": 140.0 * 5}
    assert costs_of(even)["joules"] == pytest.approx(costs_of({**even, "train_joules": 500.0})["joules"])
