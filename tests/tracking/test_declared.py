"""What was declared before the first run is told with the results, and what has changed since."""

from dataclasses import replace
from pathlib import Path

import pytest

from frugal.errors import UserError
from frugal.tracking.declared import declare, said_of_declaration
from frugal.tracking.study import Arm, Study

STUDY = Study("?", 100, arms=[Arm("a")])
FILES = [Path("q.yaml")]


def test_a_later_change_is_told(tmp_path: Path) -> None:
    declare(tmp_path, replace(STUDY, steps=7), FILES)
    declare(tmp_path, STUDY, FILES)  # nothing has run yet
    (tmp_path / "runs").mkdir()
    assert said_of_declaration(tmp_path, STUDY, STUDY.seeds) == [
        "Target, margin, lengths and seeds were declared before the first run."
    ]
    changed = replace(STUDY, margin=0.0, lengths=[*STUDY.lengths, 2.0])
    declare(tmp_path, changed, FILES)  # the first declaration stays
    (said,) = said_of_declaration(tmp_path, changed, STUDY.seeds)
    assert said.startswith("Changed since the first run: margin from 0.02 to 0.0, lengths from [0.25")
    assert said_of_declaration(tmp_path, STUDY, [1, 3])[1] == "Of the declared seeds [1, 2, 3] only [1, 3]."


def test_of_runs_older_than_any_declaration_nothing_is_claimed(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    declare(tmp_path, STUDY, FILES)
    assert said_of_declaration(tmp_path, STUDY, STUDY.seeds) == []


def test_another_study_of_the_same_name_is_refused(tmp_path: Path) -> None:
    declare(tmp_path, STUDY, FILES)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"holds runs of q\.yaml; rename yours"):
        declare(tmp_path, STUDY, [Path("mine/q.yaml")])
