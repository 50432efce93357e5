"""Mixing sources: shares, order, stages, provenance, and what is refused."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal.data.batches import EvaluationSequences, TrainingSequences
from frugal.data.documents import Document, content_hash
from frugal.data.mixture import BLOCK, Mixer, MixtureStage, apportion, check_stages
from frugal.data.packing import prepare
from frugal.data.sources import LocalText, Mixture, Source, WeightedSource
from frugal.data.splits import split_documents
from frugal.data.tokenization import TokenizerConfig
from frugal.errors import UserError


class Texts(Source):
    """Documents from memory."""

    def __init__(self, name: str, texts: list[str], level: int | None = None) -> None:
        self._name, self.texts, self.level = name, texts, level

    @property
    def name(self) -> str:
        return self._name

    def documents(self):  # type: ignore[no-untyped-def]
        yield from (Document(text, self._name, self.level) for text in self.texts)

    def fingerprint(self) -> str:
        return repr((self._name, self.texts, self.level))


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 3000), min_size=2, max_size=2),
    seed=st.integers(0, 2**31),
)
def test_every_source_is_walked_through_at_its_share(weights: list[list[int]], lengths: list[int], seed: int) -> None:
    starts = [0, *np.cumsum(lengths)][: len(weights)]
    mixer = Mixer(starts, weights, seed)
    numbers: Counter[int] = Counter()
    for i in range(starts[-1] + BLOCK):
        part, number = mixer.locate(i)
        assert number == numbers[part]  # one after the other, nothing skipped or repeated
        numbers[part] += 1
        stage = int(np.searchsorted(starts, i, side="right")) - 1
        assert weights[stage][part] > 0
    drawn = Counter(mixer.locate(i)[0] for i in range(starts[-1], starts[-1] + BLOCK))
    for part, weight in enumerate(weights[-1]):
        assert abs(drawn[part] - BLOCK * weight / sum(weights[-1])) <= 1
    assert Mixer(starts, weights, seed).locate(starts[-1] + 5) == mixer.locate(starts[-1] + 5)  # needs no history


def test_shares_hold_locally() -> None:
    mixer = Mixer([0], [[0.75, 0.25]], seed=1)
    drawn = [mixer.locate(i)[0] for i in range(10 * BLOCK)]
    windows = np.array(drawn).reshape(-1, 128).mean(axis=1)
    assert np.abs(windows - 0.25).max() < 0.2 and sum(drawn) == 10 * BLOCK // 4
    assert drawn[:BLOCK] != drawn[BLOCK : 2 * BLOCK]


def test_apportioning() -> None:
    assert apportion([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert apportion([0, 5], 7).tolist() == [0, 7]
    with pytest.raises(UserError, match="less than one sample"):
        apportion([1, 1e-6], BLOCK)


def test_a_prepared_mixture_keeps_where_everything_is_from(tmp_path: Path) -> None:
    a = Texts("a", [f"alpha {i} " * 5 for i in range(60)])
    b = Texts("b", [f"beta {i} " * 7 for i in range(40)], level=3)
    mixture = Mixture([WeightedSource(a), WeightedSource(b, 2.0, "other")])
    prepared = prepare(mixture, TokenizerConfig(300), 0.2, str(tmp_path), "hash")
    decode = prepared.tokenizer.decode
    assert [part.name for part in prepared.parts] == ["a", "other"] and [p.weight for p in prepared.parts] == [1, 2]
    assert np.array_equal(np.concatenate([part.train for part in prepared.parts]), prepared.train)
    assert np.array_equal(np.concatenate([part.val for part in prepared.parts]), prepared.val)
    for part, source, word, level in zip(prepared.parts, (a, b), ("alpha", "beta"), (-1, 3), strict=True):
        train, val = split_documents(source.documents(), 0.2, "hash")
        assert part.starts[0] == 0 and part.starts[-1] == len(part.train)
        texts = [decode(part.train[i:j].tolist()) for i, j in zip(part.starts, part.starts[1:], strict=False)]
        assert texts == [document.text for document in train]
        assert decode(part.val.tolist()) == "".join(document.text for document in val)
        assert set(part.levels.tolist()) == {level} and len(part.levels) == len(train)
        assert all(word in text for text in texts)
    again = prepare(mixture, TokenizerConfig(300), 0.2, str(tmp_path), "hash")
    assert again.folder == prepared.folder and np.array_equal(again.parts[1].starts, prepared.parts[1].starts)


def test_sequences_lie_within_their_source_and_labels_know_theirs() -> None:
    tokens = np.concatenate([np.full(500, 1), np.full(300, 2)]).astype(np.uint16)
    data = TrainingSequences(tokens, 16, 0, [(0, 500), (500, 800)], Mixer([0], [[1, 3]], 0))
    parts = [data.locate(i)[0] for i in range(BLOCK)]
    for i in range(0, BLOCK, 64):
        batch = data.__getitems__(list(range(i, i + 64)))
        for row, part in zip(batch["input_ids"], parts[i : i + 64], strict=True):
            assert set(row.tolist()) == {part + 1}
    held_out = EvaluationSequences(tokens, 16, [500, 800])
    batch = held_out.__getitems__(list(range(len(held_out))))
    valid = batch["labels"] != -100
    assert valid.sum() == 799 and bool((batch["labels"][valid] == batch["parts"][valid] + 1).all())


def test_copies_of_a_text_lie_on_one_side() -> None:
    documents = [text for i in range(200) for text in (f"Text number {i}", f"text  NUMBER {i}\n")]
    train, val = split_documents(documents, 0.3, "hash")
    hashes = [{content_hash(document.text) for document in side} for side in (train, val)]
    assert not hashes[0] & hashes[1] and 0.15 < len(val) / 400 < 0.45
    more, _ = split_documents([*documents, "one more"], 0.3, "hash")
    assert [d.text for d in more if d.text != "one more"] == [d.text for d in train]  # nobody moved


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: Mixture([WeightedSource(s, -1)]), r"sources\[0\]\.weight: must not be negative"),
        (lambda s: Mixture([WeightedSource(s, 0)]), "no source has a weight above zero"),
        (lambda s: Mixture([WeightedSource(s), WeightedSource(s)]), "two sources are called 'x'"),
        (lambda s: Mixture([WeightedSource(Mixture([WeightedSource(s)]))]), "a mixture within a mixture"),
        (lambda s: check_stages([MixtureStage(3, {"x": 1})], ["x"]), "first stage starts at step 0, got 3"),
        (lambda s: check_stages([MixtureStage(0, {"y": 1})], ["x"]), r"mixture\[0\]\.weights: no source 'y'"),
        (lambda s: check_stages([MixtureStage(0, {"x": 1}), MixtureStage(0, {"x": 1})], ["x"]), "does not come after"),
        (lambda s: check_stages([MixtureStage(0, {"x": 0})], ["x"]), "no source has a weight"),
        (lambda s: check_stages([MixtureStage(0, {"x": -1})], ["x"]), "must not be negative"),
        (lambda s: split_documents(["one"], 0.1, "hash"), r"data\.split position \(1 documents"),
    ],
)
def test_what_is_refused(make: Callable[[Source], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(Texts("x", ["text"]))


def test_a_weight_of_zero_is_said_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    mixture = Mixture([WeightedSource(Texts("a", ["t"])), WeightedSource(Texts("b", ["t"]), 0)])
    assert [part.called for part in mixture.parts()] == ["a"] and "b has weight 0" in caplog.text


def test_a_run_on_a_mixture_logs_each_sources_loss(train: Callable[..., Path], project: Path) -> None:
    (project / "b.txt").write_text("".join(f"number {i % 7} and {i % 5}\n" for i in range(800)))
    (project / "mix.yaml").write_text("""
data:
  source:
    class_path: frugal.data.sources.Mixture
    init_args:
      sources:
        - {source: {class_path: frugal.data.sources.LocalText, init_args: {path: text.txt}}, name: words}
        - {source: {class_path: frugal.data.sources.LocalText, init_args: {path: b.txt}}, name: numbers, weight: 2}
  mixture:
    - {start: 0, weights: {words: 1}}
    - {start: 6, weights: {words: 1, numbers: 3}}
""")
    run = train("fit", "--config", "mix.yaml")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val/loss" in row][-1]
    assert last["val/words/loss"] != last["val/numbers/loss"]
    low, high = sorted((last["val/words/bits_per_byte"], last["val/numbers/bits_per_byte"]))
    assert low < last["val/bits_per_byte"] < high
    assert LocalText("text.txt").name == "text.txt"
