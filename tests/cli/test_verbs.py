import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from frugal.cli.errors import one_line
from frugal.cli.verbs import main

FRUGAL = str(Path(sys.executable).parent / "frugal")


def test_generate_continues_a_prompt(train: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    folder = train("fit", "--trainer.max_steps", "4")
    capsys.readouterr()
    arguments = ["generate", str(folder), "--prompt", "the lord", "--max_new_tokens", "5"]
    outputs = []
    for seed in ("1", "1", "2"):
        main([*arguments, "--seed", seed])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert all(out.startswith("the lord") and len(out) > len("the lord\n") for out in outputs)
    main([*arguments, "--temperature", "0", "--num_samples", "2"])
    first, second = capsys.readouterr().out.strip().split("\n---\n")
    assert first == second


def test_generate_refuses_in_one_line(train: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    folder = train("fit", "--trainer.max_steps", "4")
    (folder / "checkpoints/best.ckpt").rename(folder / "checkpoints/mine.ckpt")
    (folder / "checkpoints/last.ckpt").unlink()
    checkpoint = str(folder / "checkpoints/mine.ckpt")
    capsys.readouterr()
    for args, expected in {
        ("none.ckpt",): "error: checkpoint: no file none.ckpt",
        (str(folder),): "no checkpoints/best.ckpt or last.ckpt",
        (checkpoint, "--device", "cuda:7"): "device: 'cuda:7' is not available here",
        ("text.txt",): "error: checkpoint: text.txt is no checkpoint, or holds",
        (checkpoint, "--top_p", "2"): "top_p: must lie in (0, 1], got 2.0",
        (checkpoint, "--temperature", "-1"): "temperature: must not be negative",
        (checkpoint, "--prompt", "lord " * 30): "leave no room; the model reads 16",
        (checkpoint, "second"): "unexpected argument 'second'",
        (checkpoint, "--promt", "x"): "promt: there is no such key; did you mean prompt?",
        (checkpoint, "--temp", "1"): "temp: there is no such key",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(["generate", *args])
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and expected in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"armz": []}, "study.armz: there is no such key; did you mean study.arms?"),
        ({"base": {"nam": "x"}}, "study.base.nam: there is no such key; did you mean study.base.name?"),
    ],
)
def test_a_misspelt_key_of_a_study_is_told_with_the_right_one(
    change: dict, line: str, project: Path, capsys: pytest.CaptureFixture
) -> None:
    study = yaml.safe_load(Path("configs/studies/quick.yaml").read_text())
    Path("train.py").touch()
    Path("mine.yaml").write_text(yaml.safe_dump({**study, **change}))
    with pytest.raises(SystemExit):
        main(["savings", "mine.yaml"])
    assert capsys.readouterr().err == f"error: {line}\n"


def test_help_needs_no_torch() -> None:
    out = subprocess.run([FRUGAL, "--help"], capture_output=True, text=True, check=True).stdout
    assert "generate" in out
    code = (
        "import sys; sys.argv=['frugal']; from frugal.cli.verbs import main; main(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (
            'Parser key "model":\n  Does not validate against any of the Union subtypes\n  Subtypes: [x]\n  Errors:\n'
            "    - Problem with given class_path 'LM':\n        Group 'a' does not accept option 'lyers'\n"
            "    - Expected a <class 'NoneType'>\n  Given value type: <class 'dict'>",
            "model.a.lyers: there is no such key; did you mean model.a.layers?",
        ),
        ("Unrecognized arguments: --trainer.max_stepz", "trainer.max_stepz: there is no such key"),
        (
            "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: x",
            "trainer.max_steps: must be a whole number, got x",
        ),
        (
            'Parser key "a":\n  Does not validate\n  Subtypes: [typing.Literal[32, 16], '
            "typing.Literal['32', 'bf16'], <class 'NoneType'>]\n  Errors:\n    - Expected a <class 'int'>\n"
            "    - Expected a typing.Literal['32', 'bf16']\n"
            "    - Expected a <class 'NoneType'>\n  Given value type: <class 'str'>\n  Given value: fp8",
            "a: must be one of 32, 16, bf16; got fp8",
        ),
        (
            "Parser key \"a\":\n  Does not validate\n  Subtypes: [<class 'int'>, <class 'float'>, "
            "typing.Literal['auto']]\n  Errors:\n    - Expected a <class 'int'>\n    - Expected a <class 'float'>\n"
            "    - Expected a typing.Literal['auto']\n  Given value: 1x",
            "a: must be a number or auto, got 1x",
        ),
    ],
)
def test_nested_reports_become_one_line(report: str, line: str) -> None:
    assert one_line(report, ["model.a.layers"]) == line


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    command = [sys.executable, "-c", "from frugal.cli.verbs import main; main(['count', 'configs/base.yaml'])"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root)
    assert process.stdout and process.stderr
    process.stdout.close()  # as `| head -0` does
    assert process.stderr.read() == b"" and process.wait() == 0
