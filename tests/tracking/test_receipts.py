"""Receipts: results of studies go through their files unchanged, and many come to one table and one picture."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from frugal.cli.verbs import main
from frugal.errors import UserError
from frugal.tracking.receipts import (
    StudyResult,
    read_results,
    receipts_figure,
    receipts_table,
    result_of,
    techniques,
    write_result,
)
from frugal.tracking.savings import Finding, compare
from frugal.tracking.savings_report import axis_groups
from frugal.tracking.statistics import Point, Ratio
from frugal.tracking.study import Arm, Equal, Study

STUDY = Study(
    'does "it" save, and is it better than Infinity?',
    1000,
    arms=[
        Arm("dear", "costs twice as much", controls=["half", "shorter"]),
        Arm("cheap"),
        Arm("half", "a control"),
        Arm("shorter", equal=Equal("dear")),
        Arm("never", "does not get there"),
    ],
    seeds=[1, 2, 3],
)


def points(seeds: list[int]) -> dict[str, dict[int, list[tuple[float, Point]]]]:
    def runs(price: float, short: float, full: float) -> dict[int, list[tuple[float, Point]]]:
        def point(share: float, loss: float, seed: int) -> tuple[float, Point]:
            axes = ("tokens", "flops", "seconds", "joules", "dollars")
            return share, Point(loss, dict.fromkeys(axes, 1000 * share * price * (1 + 0.001 * seed)))

        return {seed: [point(0.5, short, seed), point(1.0, full + 0.001 * seed, seed)] for seed in seeds}

    return {
        "base": {seed: [found[-1]] for seed, found in runs(1, 2.5, 2.0).items()},
        "dear": runs(2, 2.4, 1.9),
        "cheap": runs(0.5, 2.5, 1.99),
        "half": runs(1, 2.4, 1.9),
        "shorter": {seed: [found[-1]] for seed, found in runs(1, 2.5, 2.1).items()},
        "never": runs(1, 3.0, 2.5),
    }


def results(folder: Path, seeds: list[int] = STUDY.seeds) -> Path:
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        found = result_of(
            name, STUDY, compare(STUDY, points(seeds)), ["Machine: a test"], {"base": {0.004: 2.1}}, points(seeds)
        )
        write_result(found, folder / name / f"{name}.json")
    return folder


@pytest.mark.parametrize("seeds", [[1, 2, 3], [1]])
def test_a_result_comes_back_as_it_was_written(seeds: list[int], tmp_path: Path) -> None:
    written = result_of(
        "one", STUDY, compare(STUDY, points(seeds)), ["Machine: a test"], {"base": {0.004: 2.1}}, points(seeds)
    )
    assert any(math.isinf(r.high) for finding in written.findings for r in finding.ratios.values())
    write_result(written, tmp_path / "one.json")
    json.loads((tmp_path / "one.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert read_results([str(tmp_path)]) == [written]


def test_what_saves_stands_first_and_controls_beside_their_technique(tmp_path: Path) -> None:
    found = read_results([str(results(tmp_path))])
    shown = [(r.study, f.arm) for r, f in techniques(found)]
    # "half" is a control that saves too; the bound of "never" says nothing yet.
    assert shown == [(study, arm) for arm in ("cheap", "half", "never", "dear") for study in ("one", "two")]
    rows = [line for line in receipts_table(found).splitlines() if line.startswith("| ")]
    assert rows[0].startswith("| technique | tokens = FLOPs = seconds = joules = dollars |")
    (dear,) = [row for row in rows if row.startswith("| one: **dear**, costs twice as much | **costs** ")]
    assert "half: FLOPs **costs** 2.00" in dear and "shorter: loss -0.2000 [" in dear
    assert any(row.startswith("| one: **half** (control), a control | **saves** ") for row in rows)
    labels = [tick.get_text() for tick in receipts_figure(found).axes[0].get_yticklabels()]
    assert labels[0] == "one: cheap" and "two: half (control)" in labels and len(labels) == len(shown)


def test_the_verb_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["receipts", str(results(tmp_path)), "--out", str(tmp_path / "all")])
    assert (tmp_path / "all.md").read_text().count("| **saves**") == 4 and (tmp_path / "all.png").is_file()
    assert "two: **cheap**" in capsys.readouterr().out


def test_what_failed_is_said_and_one_study_is_not_shown_twice(tmp_path: Path) -> None:
    some = points(STUDY.seeds)
    del some["cheap"], some["dear"][3]
    write_result(result_of("one", STUDY, compare(STUDY, some), [], {}, some), tmp_path / "one.json")
    found = read_results([str(tmp_path), str(tmp_path / "one.json")])  # the same file: once
    table = receipts_table(found)
    assert (
        "one: **dear** (1 of 3 seeds without a result)" in table
        and "Left out: one: cheap (3 of 3 seeds without a result)" in table
    )
    (tmp_path / "elsewhere").mkdir()
    write_result(found[0], tmp_path / "elsewhere" / "one.json")
    with pytest.raises(UserError, match=r"studies: .*one\.json and .*one\.json are both of one; name one"):
        read_results([str(tmp_path)])


def test_columns_are_one_only_where_intervals_and_verdicts_agree() -> None:
    def finding(high: float, joules: bool = True) -> Finding:
        one = Ratio(0.8, 0.79, 0.81, "saves", 3)
        other = replace(one, high=high, verdict="saves" if high < 0.98 else "ties")
        return Finding("a", "base", {"flops": one, "seconds": other, **({"joules": other} if joules else {})}, None)

    assert axis_groups([finding(0.81)]) == [("flops", "seconds", "joules")]
    assert axis_groups([finding(1.3)]) == [("flops",), ("seconds", "joules")]
    # A finding without joules stands in the same column, which says so.
    lacks = finding(1.3, joules=False)
    assert axis_groups([finding(1.3), lacks]) == [("flops",), ("seconds", "joules")]
    result = StudyResult("s", "?", "base", {}, [], 1, [1, 2, 3], 0.02, "m", "baseline", [], "2026-11-30", [lacks])
    assert "[0.79, 1.30] (no joules)" in receipts_table([replace(result, findings=[finding(1.3), lacks])])
    receipts_figure([replace(result, findings=[finding(1.3), replace(lacks, ratios={"flops": lacks.ratios["flops"]})])])


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"studies: no result of `frugal savings` in .*empty"):
        read_results([str(tmp_path / "empty")])
    (tmp_path / "old.json").write_text(json.dumps([{"arm": "moe"}]))
    with pytest.raises(UserError, match=r"studies: .*old\.json is no result of `frugal savings` .*--report_only"):
        read_results([str(tmp_path)])
    assert Finding("a", "b", {}, None).row()["loss_difference"] is None


def test_the_table_that_is_kept_is_that_of_the_results_that_are_kept() -> None:
    folder = Path(__file__).parents[2] / "docs" / "claims" / "results"
    assert (folder / "README.md").read_text().endswith(receipts_table(read_results([str(folder)])))


def spoilt(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        tree = json.loads(file.read_text())
        change(tree)
        file.write_text(json.dumps(tree))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda file: file.write_text(file.read_text()[:200]), "JSONDecodeError"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "UnicodeDecodeError"),
        (spoilt(lambda tree: tree["findings"][0].pop("flops")), "KeyError: 'flops'"),
        (spoilt(lambda tree: tree["findings"][0]["flops"].update(verdict="wins")), "flops is .*wins"),
        (spoilt(lambda tree: tree["findings"][0]["flops"].update(bound="about")), "flops is .*about"),
        (spoilt(lambda tree: tree["findings"][0]["flops"].update(estimate=None)), "flops is None"),
        (spoilt(lambda tree: tree["findings"][0]["flops"].update(low=None)), "flops is None"),
        (spoilt(lambda tree: tree["findings"][0].update(note=None)), "note is None"),
        (spoilt(lambda tree: tree.update(arms=None)), "arms is None"),
        (spoilt(lambda tree: tree.update(conditions=[1])), "conditions is 1"),
        (spoilt(lambda tree: tree.update(findings=[1])), "TypeError"),
        (spoilt(lambda tree: tree.update(extra=1)), "extra"),
    ],
)
def test_a_damaged_result_is_named_in_one_line(spoil: Callable[[Path], Any], told: str, tmp_path: Path) -> None:
    file = results(tmp_path) / "one/one.json"
    spoil(file)
    with pytest.raises(UserError, match=rf"studies: {file} is no result of `frugal savings` \(.*{told}") as refused:
        read_results([str(file)])
    assert "\n" not in str(refused.value)


def test_results_as_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["receipts", str(results(tmp_path)), "--json", "true"])
    told = json.loads(capsys.readouterr().out)
    assert [result["study"] for result in told] == ["one", "two"] and told[0]["sweeps"] == {"base": {"0.004": 2.1}}
    assert told[0]["runs"]["cheap"]["1"][0].keys() >= {"share", "loss", "flops"}
