"""A model writes text, verifiers keep some of it, and the record says what it cost."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from frugal.cli.verbs import main
from frugal.data.sources import LocalText
from frugal.data.synthetic.generated import Generated
from frugal.data.synthetic.reasoning import ReasoningGym
from frugal.data.synthetic.verifiers import MinimumQuality, Novel, RightAnswer
from frugal.errors import UserError
from frugal.training.synthesis import synthesize, write_file

TASKS = ReasoningGym({"chain_sum": 1.0}, levels=[0, 1], n=60)


def half_right(prompts: list[str], seed: int) -> list[str]:
    """A model that knows every second answer and says too much after it."""
    answers = {TASKS.prompt(item): item.answer for item in TASKS.training_items()}
    return [f"{answers[p] if i % 2 else '77777'}\nand so on" for i, p in enumerate(prompts)]


def test_only_right_answers_are_kept_and_every_refusal_is_counted() -> None:
    rows, record = synthesize(half_right, 50, [""], TASKS, [RightAnswer(TASKS)], 0, 10, 3)
    items = {(item.task, item.level, item.index): TASKS.text(item) for item in TASKS.training_items()}
    assert len(rows) == 50 and all(row["text"] == items[row["task"], row["level"], row["index"]] for row in rows)
    assert record["kept"] == 50 and record["refused"] == {"wrong answer": 50} and record["tried"] == 100
    assert record["acceptance"] == 0.5
    assert record["seconds"] == sum(record["seconds_by_stage"].values()) > 0
    rows, record = synthesize(half_right, 1000, [""], TASKS, [RightAnswer(TASKS)], 0, 10, 20)
    assert record["tried"] == 120 and len(rows) == 60  # the questions are exhausted


def test_prompts_take_turns_and_give_up_in_the_end() -> None:
    rows, record = synthesize(lambda p, seed: [f" {seed}"] * len(p), 4, ["a", "b"], None, [], 1, 3, 5)
    assert [row["text"] for row in rows] == ["a 1000003", "b 1000003", "a 1000003", "b 1000004"]
    rows, record = synthesize(lambda p, seed: [""] * len(p), 4, [""], None, [], 1, 3, 5)
    assert not rows and record["tried"] == 20 and record["refused"] == {"empty": 20}


def test_verifiers_name_their_reasons(tmp_path: Path) -> None:
    quality = MinimumQuality(min_words=6, min_distinct=0.4)
    assert quality.reason("one two three", None) == "too short"
    assert quality.reason("la la la la la la la", None) == "few different words"
    assert quality.reason("a b c d a b c e a b c f", None) == "repeats a phrase"
    assert quality.reason("the cat sat on a mat near my door", None) is None
    (tmp_path / "a.txt").write_text("In the beginning God created the heaven and the earth.")
    novel = Novel(LocalText(str(tmp_path / "a.txt")), n=4, max_copied=0.3)
    assert novel.reason("in the beginning, god created the HEAVEN!", None) == "copied"
    own = "a wholly new line about cats and then some dogs"
    assert novel.reason(own, None) is None
    assert novel.reason(own, None) == "copied"  # it was accepted before
    assert novel.reason("too few", None) == "too short"


def test_generated_text_is_a_source_whose_seconds_are_known(tmp_path: Path) -> None:
    out = str(tmp_path / "new" / "out.jsonl")
    write_file(out, [{"text": "one é\n", "level": 2}, {"text": "two", "level": None}], {"seconds": 8.0})
    source = Generated(out, share_of_seconds=0.25)
    assert [(d.text, d.level, d.source) for d in source.documents()] == [("one é\n", 2, out), ("two", None, out)]
    assert source.seconds_by_stage() == {"synthesis": 2.0}
    first = source.fingerprint()
    with Path(out).open("a") as file:
        file.write('{"text": "three", "level": null}\n')
    with pytest.raises(UserError, match="is the record of another text"):
        source.fingerprint()
    Path(out).unlink()
    write_file(out, [{"text": "other", "level": None}], {"seconds": 1.0})
    assert source.fingerprint() != first
    Path(out).with_suffix(".meta.json").unlink()
    with pytest.raises(UserError, match=r"data\.source\.path: no record"):
        list(source.documents())
    with pytest.raises(UserError, match="frugal synthesize"):
        Generated(str(tmp_path / "none.jsonl")).fingerprint()


def test_the_verb_writes_with_our_checkpoint_and_with_transformers(
    train: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    adamw = ("--config", "configs/optim/adamw.yaml", "--model.optimizer.lr", "0.02")
    folder = train("fit", *adamw, "--trainer.max_steps", "40")
    options = ["--n", "6", "--max_new_tokens", "9", "--batch_size", "4"]
    quality = ["--verifiers+", "MinimumQuality", "--verifiers.min_words", "3", "--verifiers.min_distinct", "0"]
    main(["synthesize", str(folder), "a.jsonl", *options, *quality])
    assert "6 texts in a.jsonl" in capsys.readouterr().out
    main(["synthesize", str(folder), "b.jsonl", *options, *quality])
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    record = json.loads(Path("a.meta.json").read_text())
    assert record["kept"] == 6 and record["verifiers"] == ["MinimumQuality"] and record["seconds"] > 0
    assert len(list(Generated("a.jsonl").documents())) == 6
    # The likeliest continuation is the same, whichever library runs the model.
    main(["export", str(folder), "hf"])
    greedy = ["--n", "1", "--temperature", "0", "--max_new_tokens", "9"]
    main(["synthesize", str(folder), "ours.jsonl", *greedy])
    main(["synthesize", "hf", "theirs.jsonl", *greedy])
    assert Path("ours.jsonl").read_text() == Path("theirs.jsonl").read_text()
    capsys.readouterr()
    for args, expected in {
        (str(folder), "a.jsonl"): "out: a.jsonl exists already",
        (str(folder), "a.txt"): "out: must end with .jsonl",
        (str(folder), "c.jsonl", "--n", "0"): "n: must be at least 1",
        (str(folder), "c.jsonl", "--verifiers+", "Novelty"): "Novelty",
        (str(folder), "c.jsonl", "--n", "2", "--verifiers+", "MinimumQuality"): "verifiers: none of 40 texts",
        ("none", "c.jsonl"): "none",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(["synthesize", *args])
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert "error: " in err and expected in err and "Traceback" not in err, err
    assert not Path("c.jsonl").exists()
