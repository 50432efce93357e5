import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from frugal.data.curation import pipeline, report, stage
from frugal.data.curation.base import DocumentFilter, Drop, Measured
from frugal.data.curation.duplicates import Contamination, ExactDuplicates
from frugal.data.curation.normalise import NormaliseUnicode, StripHtml
from frugal.data.curation.pii import MaskPII
from frugal.data.curation.pipeline import CurationConfig, curate, judge
from frugal.data.curation.quality import Length
from frugal.data.documents import Document, content_hash
from frugal.data.packing import prepare
from frugal.data.sources import KingJames, LocalText, Mixture, Source, WeightedSource
from frugal.data.splits import split_documents
from frugal.data.tokenization import TokenizerConfig
from frugal.errors import UserError

SIMPLE = CurationConfig(filters=[NormaliseUnicode(), StripHtml(), Length(20), MaskPII(), ExactDuplicates()])


class Listed(Source):
    """Documents from a list."""

    def __init__(self, texts: list[str], name: str = "listed") -> None:
        self.texts, self._name = texts, name

    @property
    def name(self) -> str:
        return self._name

    def documents(self) -> Any:
        return iter(Document(text, level=i % 5) for i, text in enumerate(self.texts))

    def fingerprint(self) -> str:
        return content_hash(repr(self.texts)).hex()


def verses(count: int = 200) -> list[str]:
    return list(KingJames().documents())[:count]


def test_the_account_adds_up() -> None:
    texts = [
        "<p>first of the documents here</p>",
        "tiny",
        "a mail to me@example.org or so",
        "First of the documents  here",
    ]
    documents = [Document(text, "ab"[i % 2], level=i) for i, text in enumerate(texts)]
    result = curate(documents, [], SIMPLE)
    assert [d.text for d in result.documents] == ["first of the documents here", "a mail to <email> or so"]
    assert result.kept == [0, 2] and [d.level for d in result.documents] == [0, 2]
    account = {a.name: a for a in result.accounts}
    assert account["StripHtml"].changed == 1 and account["MaskPII"].changed == 1
    assert account["Length"].reasons == {"too short": 1} and account["Length"].dropped_by_source == {"b": 1}
    for before, after in zip(result.accounts, result.accounts[1:], strict=False):
        assert after.documents == before.documents - before.dropped and after.bytes_in == before.bytes_out
    whole = report.build_report(documents, result, {"mail": ["mail"], "tiny": ["tiny"]})
    assert whole["coverage"]["terms"] == {
        "mail": {"documents": 1, "dropped": 0, "share": 0.0},
        "tiny": {"documents": 1, "dropped": 1, "share": 1.0},
    }
    assert whole["coverage"]["source"]["b"] == {"documents": 2, "dropped": 2, "share": 1.0}
    assert "| source: b | 2 | 2 | 100.0% |" in report.as_markdown(whole)
    sized = [Document("a" * size) for size in (5_000, 50, 500)]
    whole = report.build_report(sized, pipeline.Curated(sized, [0, 1, 2], [pipeline.Account("none")], 0.0), {})
    assert list(whole["coverage"]["length"]) == ["under 100 bytes", "under 1,000 bytes", "under 10,000 bytes"]


def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(pipeline, "CHUNK_BYTES", 50_000)
    documents = [Document(text, "kj") for text in verses(120)] + [Document("short", "kj")]
    one, two = (
        curate(documents, [], CurationConfig(filters=[StripHtml(), Length(), ExactDuplicates()], processes=n))
        for n in (1, 2)
    )
    assert one.documents == two.documents and one.kept == two.kept
    assert [(a.documents, a.dropped, a.bytes_out, a.examples) for a in one.accounts] == [
        (a.documents, a.dropped, a.bytes_out, a.examples) for a in two.accounts
    ]


class Killer(DocumentFilter):
    """Kills its process, as the kernel does when memory runs out."""

    def __call__(self, document: Measured) -> str | Drop:
        os.kill(os.getpid(), signal.SIGKILL)
        return document.text


def test_a_killed_worker_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(pipeline, "CHUNK_BYTES", 5)
    with pytest.raises(UserError, match="worker process was killed"):
        curate([Document("one document"), Document("another one")], [], CurationConfig(filters=[Killer()], processes=2))


def test_everything_filtered_away() -> None:
    with pytest.raises(UserError, match=r"nothing is left of 2 documents, most by Length: too short"):
        curate([Document("a"), Document("b")], [], CurationConfig(filters=[Length(100)]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"filters": []}, "empty list"), ({"processes": 0}, "processes"), ({"examples": -1}, "examples")],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CurationConfig(**arguments)


def test_fingerprint_follows_settings() -> None:
    prints = [
        CurationConfig().fingerprint(),
        SIMPLE.fingerprint(),
        CurationConfig(filters=[Length(10)]).fingerprint(),
        CurationConfig(filters=[Length(11)]).fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert CurationConfig(processes=1).fingerprint() == CurationConfig(processes=2).fingerprint()


def planted(seed: int = 5) -> list[str]:
    rng = random.Random(seed)
    texts = verses(300)
    texts += [text.upper() for text in rng.sample(texts, 30)] + ["buy now " * 3] * 20
    rng.shuffle(texts)
    return texts


def test_prepare_curates_training_alone(tmp_path: Path) -> None:
    source, tokenizer = Listed(planted()), TokenizerConfig(300)
    config = CurationConfig()
    raw = prepare(source, tokenizer, 0.1, str(tmp_path), "hash")
    clean = prepare(source, tokenizer, 0.1, str(tmp_path), "hash", config)
    assert raw.val_bytes == clean.val_bytes and raw.train_bytes > clean.train_bytes
    stages = clean.meta["seconds_by_stage"]
    saved = json.loads((clean.folder / "curation.json").read_text())
    assert stages == {"curation": saved["seconds"]} and saved["seconds"] > 0
    assert saved["documents_out"] == clean.meta["train"]["documents"] == len(clean.parts[0].levels)
    assert (clean.folder / "curation.png").stat().st_size > 10_000
    # Nothing of validation is in training: no thirteen words in a row, no text that says the same.
    _, val = split_documents(source.documents(), 0.1, "hash")
    decode = clean.tokenizer.decode
    training = [
        decode(clean.train[a:b].tolist())
        for a, b in zip(clean.parts[0].starts[:-1].tolist(), clean.parts[0].starts[1:].tolist(), strict=True)
    ]
    assert len(training) == saved["documents_out"]
    against = [Measured(document.text) for document in val]
    assert Contamination().verdicts([Measured(text) for text in training], against) == [None] * len(training)
    assert not {content_hash(text) for text in training} & {content_hash(document.text) for document in val}


def test_another_tokenizer_does_not_curate_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Listed(verses(60))
    first = prepare(source, TokenizerConfig(300), 0.1, str(tmp_path), "hash", SIMPLE)
    monkeypatch.setattr(stage, "curate", None)
    second = prepare(source, TokenizerConfig(320), 0.1, str(tmp_path), "hash", SIMPLE)
    assert second.folder != first.folder
    assert first.meta["seconds_by_stage"] == second.meta["seconds_by_stage"]  # charged again: this run needed it too


def test_default_cache_has_no_curation(tmp_path: Path) -> None:
    made = prepare(Listed(verses(40)), TokenizerConfig(300), 0.1, str(tmp_path))
    assert "curation" not in made.meta["seconds_by_stage"] and not list(made.folder.glob("curation*"))


def test_parts_stay_apart(tmp_path: Path) -> None:
    texts = verses(100)
    mixture = Mixture([WeightedSource(Listed(texts[:50], "a")), WeightedSource(Listed(texts[40:], "b"), 2.0)])
    made = prepare(mixture, TokenizerConfig(300), 0.1, str(tmp_path), "hash", SIMPLE)
    saved = json.loads((made.folder / "curation.json").read_text())
    copies = saved["filters"][-1]["dropped_by_source"]
    assert 0 < copies["b"] <= 10 and "a" not in copies
    assert [part.name for part in made.parts] == ["a", "b"]
    assert sum(len(part.levels) for part in made.parts) == saved["documents_out"]
    assert set(made.parts[1].levels.tolist()) <= set(range(5))


def test_a_source_of_which_nothing_is_left(tmp_path: Path) -> None:
    mixture = Mixture(
        [WeightedSource(Listed(verses(40), "a")), WeightedSource(Listed(["tiny " + c for c in "abcdefgh"] * 9, "b"))]
    )
    with pytest.raises(UserError, match="nothing is left of source b"):
        prepare(mixture, TokenizerConfig(300), 0.3, str(tmp_path), "hash", SIMPLE)


def test_a_document_of_many_megabytes_on_one_line(tmp_path: Path) -> None:
    file = tmp_path / "wide.jsonl"
    wide = "the man and the woman have a word to say of it. " * 400_000  # 19 MB
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*verses(20), wide]))
    documents = [Document(text) for text in LocalText(str(file)).documents()]
    result = curate(documents, [], CurationConfig())
    assert result.kept == [i for i in result.kept if i < 20] and len(result.kept) > 10


def test_judge_alone() -> None:
    filters = [StripHtml(), Length(10)]
    assert judge(filters, "<p>words enough</p>") == "words enough"
    assert judge(filters, "<p>few</p>") == Drop("too short")
