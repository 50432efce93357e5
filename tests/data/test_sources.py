import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frugal.data.documents import as_document
from frugal.data.sources import ApiDocs, HubText, KingJames, LocalText
from frugal.errors import UserError


def test_king_james_is_whole() -> None:
    documents = list(KingJames().documents())
    assert len(documents) == 1189
    assert len("\n".join(documents).encode()) == 4_151_620
    assert len({document.split("\n")[0].rsplit(" ", 1)[0] for document in documents}) == 66
    assert documents[0].startswith("Genesis 1\nIn the beginning God created the heaven and the earth.\n")
    assert all(document.isascii() and document.endswith("\n") for document in documents)


def test_folder_reads_every_format_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n', encoding="utf-8")
    pq.write_table(pa.table({"text": ["four", None, ""]}), tmp_path / "c.parquet")
    (tmp_path / "ignored.csv").write_text("x", encoding="utf-8")
    assert list(LocalText(str(tmp_path)).documents()) == ["one\n", "two", "three", "four"]
    assert list(LocalText(str(tmp_path / "*.txt")).documents()) == ["one\n"]


def test_the_mark_that_windows_puts_first_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\r\n", encoding="utf-8-sig", newline="")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\r\n{"text": "three"}', encoding="utf-8-sig", newline="")
    assert list(LocalText(str(tmp_path)).documents()) == ["one\r\n", "two", "three"]


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one", encoding="utf-8")
    first = LocalText(str(file)).fingerprint()
    assert LocalText(str(file)).fingerprint() == first
    file.write_text("two", encoding="utf-8")
    assert LocalText(str(file)).fingerprint() != first


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home", encoding="utf-8")
    assert list(LocalText("~/a.txt").documents()) == ["home"]


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.txt", lambda path: path.write_bytes(b"abc\xe9"), "a.txt: not UTF-8 at byte 3; convert"),
        ("a.jsonl", lambda path: path.write_text('{"text": "x"}\n{oops\n'), "a.jsonl:2: no valid JSON"),
        ("a.jsonl", lambda path: path.write_text(json.dumps({"body": "x"})), "a.jsonl:1: no text under 'text'"),
        ("s.jsonl", lambda path: path.write_text(r'{"text": "a\ud800"}'), "s.jsonl:1: .*lone surrogate"),
        ("a.parquet", parquet, "no column 'text' .there are body."),
        ("b.parquet", lambda path: path.write_bytes(b"no parquet"), "b.parquet: no valid parquet file"),
        ("a.csv", lambda path: path.write_text("x"), "a.csv: unknown suffix"),
        ("none.txt", lambda path: None, "data.source.path: no such file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, write: Callable[[Path], object], message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        list(LocalText(str(tmp_path / name)).documents())
    assert "\n" not in str(error.value)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["one", "", "two", "three"]}), folder / "train.parquet")
    return str(folder)


def test_hub_text_reads_a_local_dataset(dataset: str) -> None:
    assert list(HubText(dataset).documents()) == ["one", "two", "three"]
    assert list(HubText(dataset, max_documents=3).documents()) == ["one", "two"]
    assert HubText(dataset).fingerprint() == HubText(dataset).fingerprint()
    assert HubText(dataset).fingerprint() != HubText(dataset, max_documents=3).fingerprint()


def test_hub_text_streams(dataset: str) -> None:
    assert list(HubText(dataset, max_documents=3, streaming=True).documents()) == ["one", "two"]
    keys = {HubText(dataset, max_documents=n, streaming=True).fingerprint() for n in (2, 3, 3)}
    assert len(keys) == 2
    with pytest.raises(UserError, match=r"no column 'body' but text"):
        list(HubText(dataset, text_key="body", max_documents=3, streaming=True).documents())
    with pytest.raises(UserError, match=r"data\.source\.streaming: .*max_documents"):
        HubText(dataset, streaming=True)
    with pytest.raises(UserError, match=r"data\.source\.max_documents: must be positive"):
        HubText(dataset, max_documents=0)


def test_hub_text_says_when_a_stream_breaks_off(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def select_columns(self, names: list[str]) -> "Broken":
            return self

        def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
            yield {"text": ["one"]}
            raise ConnectionError("the other side\nhung up")

    monkeypatch.setattr(HubText, "_load", lambda self: Broken())
    documents = HubText(dataset).documents()
    assert next(documents) == "one"
    with pytest.raises(UserError, match=r"data\.source\.path: cannot read on in .*: the other side$"):
        next(documents)


def test_hub_text_errors_are_one_line(dataset: str) -> None:
    with pytest.raises(UserError, match="no column 'body' but text"):
        list(HubText(dataset, text_key="body").documents())
    with pytest.raises(UserError, match=r"data\.source\.path: cannot load dataset") as error:
        list(HubText(dataset + "/missing").documents())
    assert "\n" not in str(error.value)


def test_api_docs_are_raw_html() -> None:
    pytest.importorskip("botocore")
    source = ApiDocs(["sqs"])
    texts = [as_document(document).text for document in source.documents()]
    assert len(texts) > 30 and sum("<p>" in text for text in texts) > 0.5 * len(texts)
    assert source.fingerprint() != ApiDocs(["sns"]).fingerprint() and source.name == "api-docs/sqs"
    with pytest.raises(UserError, match=r"services: botocore has no service 'nope'"):
        ApiDocs(["nope"])


def test_bad_lines_are_skipped_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"text": "good"}\n{"text": \n{"text": 3}\n{"text": "\xe9"}\n\n{"text": "fine"}\n')
    source = LocalText(str(file), bad_lines="skip")
    assert list(source.documents()) == ["good", "fine"] and "3 bad lines were skipped" in caplog.text
    with pytest.raises(UserError, match=r"bad\.jsonl:2: no valid JSON"):
        list(LocalText(str(file)).documents())


def test_a_changed_local_stream_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    stream = HubText(str(tmp_path), streaming=True, max_documents=7)
    before = stream.fingerprint()
    (tmp_path / "rows.jsonl").write_text('{"text": "two"}\n')
    assert stream.fingerprint() != before
