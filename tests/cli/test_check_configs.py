"""Overlays are judged as train.py judges them, and nothing is built for it."""

from pathlib import Path

import pytest

from frugal.cli.check_configs import main
from frugal.cli.train import main as train

BAD = {
    "misspelt": (
        "model: {transformer: {moe: {top_kk: 3}}}",
        "model.transformer.moe.top_kk: there is no such key; did you mean model.transformer.moe.top_k?",
    ),
    "wrong_type": ("trainer: {max_steps: many}", "trainer.max_steps: "),
    "other_class": (
        "data: {class_path: frugal.data.image_datamodule.ImageDataModule}",
        "data.class_path: LanguageModel trains on text, and ImageDataModule gives images",
    ),
    "a_list": ("- 1", "must hold keys, not a list"),
}


def checked(*files: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(files))
    return int(str(done.value.code))


def test_good_overlays_pass_in_silence_and_leave_nothing(project: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(project.rglob("*"))
    files = ["tiny.yaml", "configs/experiments/100_digits.yaml", "configs/experiments/006_adamw.yaml"]
    assert checked(*files) == 0
    assert capsys.readouterr().out == "" and sorted(project.rglob("*")) == before


@pytest.mark.parametrize("name", BAD)
def test_a_bad_overlay_is_told_as_train_py_tells_it(name: str, project: Path, capsys: pytest.CaptureFixture) -> None:
    text, line = BAD[name]
    (project / f"{name}.yaml").write_text(text)
    assert checked(f"{name}.yaml") == 2
    told = capsys.readouterr().out
    assert told.startswith(f"{name}.yaml: {line}") and told.count("\n") == 1
    with pytest.raises(SystemExit):
        train(["fit", "--config", f"{name}.yaml"])
    told_by_train = capsys.readouterr().err.splitlines()[-1].removeprefix("error: ").removeprefix(f"{name}.yaml: ")
    assert told == f"{name}.yaml: {told_by_train}\n"


def test_of_several_files_the_bad_ones_are_named(project: Path, capsys: pytest.CaptureFixture) -> None:
    (project / "bad.yaml").write_text("model: {optimizer: {lrr: 1}}")
    assert checked("tiny.yaml", "bad.yaml", "none.yaml", "configs/experiments/100_digits.yaml") == 2
    assert capsys.readouterr().out == (
        "bad.yaml: model.optimizer.lrr: there is no such key; did you mean model.optimizer.lr?\n"
        "none.yaml: no such file\n"
    )
