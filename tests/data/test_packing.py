import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugal.data.documents import Document
from frugal.data.packing import prepare
from frugal.data.sources import KingJames, LocalText
from frugal.data.splits import split_documents
from frugal.data.tokenization import TokenizerConfig, pieces, token_byte_lengths
from frugal.errors import UserError

LINES = "".join(f"line {i} of the text, with é and 🙂\n" for i in range(300))


def texts(sides: tuple[list[Document], list[Document]]) -> tuple[list[str], ...]:
    return tuple([document.text for document in side] for side in sides)


@pytest.fixture
def source(tmp_path: Path) -> LocalText:
    (tmp_path / "a.txt").write_text(LINES, encoding="utf-8")
    return LocalText(str(tmp_path / "a.txt"))


@given(
    st.lists(st.text(st.sampled_from("ab\né🙂"), min_size=1), max_size=8),
    st.floats(0.01, 0.99),
)
def test_split_keeps_the_text_and_its_order(documents: list[str], val_fraction: float) -> None:
    try:
        train, val = texts(split_documents(documents, val_fraction))
    except UserError as error:
        assert str(error).startswith(("data.source:", "data.val_fraction:"))
        return
    assert "".join(train + val) == "".join(documents)
    assert all(train) and all(val)
    total, kept = (sum(len(d.encode()) for d in part) for part in (documents, train))
    position = int(total * (1 - val_fraction))
    assert kept >= position
    # Nothing but the rest of one line lies between the position and the cut, unless the document ends there.
    assert b"\n" not in "".join(documents).encode()[position : kept - 1]


def test_split_cuts_inside_a_document() -> None:
    assert texts(split_documents(["aaaa\nbbbb\ncccc\n"], 0.5)) == (["aaaa\nbbbb\n"], ["cccc\n"])


@pytest.mark.parametrize("end", ["", "\n"])
def test_one_long_line_is_cut_between_words(end: str) -> None:
    train, val = texts(split_documents(["word " * 100 + "end" + end], 0.1))
    assert "".join(train + val) == "word " * 100 + "end" + end and val[0].startswith("word ") and len(val[0]) < 60


@pytest.mark.parametrize("documents", [[], [""]])
def test_no_text_is_refused(documents: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.source: there is no text"):
        split_documents(documents, 0.5)


def test_a_split_without_validation_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.val_fraction.*no text for validation"):
        split_documents(["one line without an end"], 0.1)


def test_king_james_validation_starts_in_colossians() -> None:
    train, val = texts(split_documents(KingJames().documents(), 0.05))
    assert train[-1].startswith("Colossians 1\n")
    assert val[0].startswith("For by him were all things created")
    assert sum(len(document) for document in val) == 207_477


def test_tokens_decode_to_the_text(source: LocalText, tmp_path: Path) -> None:
    prepared = prepare(source, TokenizerConfig(300), 0.2, str(tmp_path / "cache"))
    assert prepared.train[0] == prepared.val[0] == 0
    assert prepared.train.dtype == np.uint16
    text = [prepared.tokenizer.decode(part.tolist()) for part in (prepared.train, prepared.val)]
    assert "".join(text) == LINES
    lengths = token_byte_lengths(prepared.tokenizer)
    for name, part in (("train", prepared.train), ("val", prepared.val)):
        assert prepared.meta[name]["tokens"] == len(part)
        assert prepared.meta[name]["bytes"] == lengths[part].sum()
    assert prepared.meta["train"]["bytes"] + prepared.meta["val"]["bytes"] == len(LINES.encode())


def test_cache_is_used_again_and_follows_every_setting(source: LocalText, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first = prepare(source, TokenizerConfig(300), 0.2, cache)
    written = (first.folder / "train.bin").stat().st_mtime_ns
    assert prepare(source, TokenizerConfig(300), 0.2, cache).folder == first.folder
    assert (first.folder / "train.bin").stat().st_mtime_ns == written
    others = [prepare(source, TokenizerConfig(301), 0.2, cache), prepare(source, TokenizerConfig(300), 0.3, cache)]
    others.append(prepare(source, TokenizerConfig(300, special_tokens=("<|mask|>",)), 0.2, cache))
    (tmp_path / "a.txt").write_text(LINES + "one more\n", encoding="utf-8")
    others.append(prepare(source, TokenizerConfig(300), 0.2, cache))
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_an_interrupted_preparation_leaves_no_cache(
    source: LocalText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("frugal.data.packing._write", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, TokenizerConfig(300), 0.2, str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


PREPARE = """
import sys
from frugal.data.documents import Document
from frugal.data.packing import prepare
from frugal.data.sources import LocalText
from frugal.data.tokenization import TokenizerConfig
print(prepare(LocalText(sys.argv[1]), TokenizerConfig(300), 0.2, sys.argv[2]).fingerprint)
"""


def test_two_processes_at_once(source: LocalText, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", PREPARE, source.path, str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [process.communicate(timeout=300)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(set(found)) == 1
    assert [folder.name for folder in cache.iterdir()] == [found[0][:16]]


def test_a_loaded_tokenizer_is_part_of_the_fingerprint(source: LocalText, tmp_path: Path) -> None:
    made = prepare(source, TokenizerConfig(300), 0.2, str(tmp_path / "cache"))
    loaded = prepare(source, TokenizerConfig(300, path=str(made.folder)), 0.2, str(tmp_path / "cache"))
    assert loaded.fingerprint != made.fingerprint
    assert np.array_equal(loaded.train, made.train)
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size: 299 is less than the 300"):
        prepare(source, TokenizerConfig(299, path=str(made.folder)), 0.2, str(tmp_path / "cache"))


def test_the_marker_inside_a_text_is_text(tmp_path: Path) -> None:
    text = "Once there was a fox.\n<|endoftext|>\nA dog ran.\n" * 50
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepared = prepare(LocalText(str(tmp_path / "a.txt")), TokenizerConfig(300), 0.2, str(tmp_path / "cache"))
    assert prepared.train_bytes + prepared.val_bytes == len(text)
    assert np.flatnonzero(prepared.train == 0).tolist() == [0]


def test_one_very_long_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is encoded in pieces, from which the same tokens come; alone it is cut between two words."""
    words = "a word and " * 270_000
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": words}))
    made = [prepare(LocalText(str(tmp_path / "long.jsonl")), TokenizerConfig(300), 0.2, str(tmp_path / "cache"))]
    monkeypatch.setattr("frugal.data.tokenization.PIECE", 2**30)
    made.append(prepare(LocalText(str(tmp_path / "long.jsonl")), TokenizerConfig(300), 0.2, str(tmp_path / "whole")))
    assert made[0].train_bytes + made[0].val_bytes == len(words)
    assert np.array_equal(made[0].train, made[1].train) and np.array_equal(made[0].val, made[1].val)
    assert made[0].tokenizer.decode(made[0].train[:50].tolist()).startswith("a word and a word")
    assert made[0].tokenizer.decode(made[0].train[-50:].tolist()).endswith(("a ", "word ", "and "))


def test_a_line_of_100_megabytes_is_read_and_split(tmp_path: Path) -> None:
    (tmp_path / "wide.jsonl").write_text('{"text": "' + "a word " * (100_000_000 // 7) + '"}')
    ((head,), (tail,)) = texts(split_documents(LocalText(str(tmp_path / "wide.jsonl")).documents(), 0.05))
    assert len(head) + len(tail) == 99_999_998 - 99_999_998 % 7 and len(tail) == pytest.approx(5e6, rel=1e-3)
    assert head.endswith(" ") and max(map(len, pieces(head))) < 2**16 + 10


def test_a_truncated_cache_is_refused(source: LocalText, tmp_path: Path) -> None:
    prepared = prepare(source, TokenizerConfig(300), 0.2, str(tmp_path / "cache"))
    file = prepared.folder / "train.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"data\.cache_dir: .*train\.bin does not hold its"):
        prepare(source, TokenizerConfig(300), 0.2, str(tmp_path / "cache"))


def test_a_cache_folder_that_cannot_be_made_is_refused(source: LocalText, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write"):
        prepare(source, TokenizerConfig(300), 0.2, str(tmp_path / "a.txt" / "cache"))


def test_the_tokenizer_never_sees_the_held_out_text(tmp_path: Path) -> None:
    """A word that only the last part has is no token, although it is frequent there."""
    (tmp_path / "a.txt").write_text("a plain line of words\n" * 300 + "zebrazebra\n" * 100)
    prepared = prepare(LocalText(str(tmp_path / "a.txt")), TokenizerConfig(400), 0.15, str(tmp_path / "cache"))
    assert not any("zeb" in token for token in prepared.tokenizer.get_vocab())
    assert any("plain" in token for token in prepared.tokenizer.get_vocab())
