from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from frugal.data import tokenization
from frugal.data.tokenization import (
    EOT,
    TokenizerConfig,
    load_tokenizer,
    pieces,
    token_byte_lengths,
    train_tokenizer,
)
from frugal.errors import UserError

TOKENIZER = train_tokenizer(["the cat sat on the mat\n" * 20, "naïve 🙂🙂 café\n" * 20], TokenizerConfig(300))
TOKENIZER.encode_special_tokens = True  # as packing does: a marker inside a text is text like any other
LENGTHS = token_byte_lengths(TOKENIZER)


@settings(deadline=None)
@example(EOT)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_of_tokens_are_bytes_of_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert LENGTHS[ids].sum() == len(text.encode())
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_end_of_text_is_token_0_and_stands_for_no_bytes() -> None:
    assert TOKENIZER.token_to_id(EOT) == 0
    assert LENGTHS[0] == 0
    assert LENGTHS[1:].min() == 1
    # Merging stops when no pair is left, so a small text gives fewer tokens than asked for.
    assert 257 < len(LENGTHS) == TOKENIZER.get_vocab_size() <= 300


def test_training_is_deterministic() -> None:
    texts = ["a stitch in time saves nine\n" * 9]
    assert (
        train_tokenizer(texts, TokenizerConfig(270)).to_str() == train_tokenizer(texts, TokenizerConfig(270)).to_str()
    )


def test_json_round_trip() -> None:
    assert load_tokenizer(TOKENIZER.to_str()).encode("the cat").ids == TOKENIZER.encode("the cat").ids


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size.*257.*got 256"):
        TokenizerConfig(256)


def test_path_may_be_a_file_or_a_folder(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    assert TokenizerConfig(path=str(tmp_path)).file == TokenizerConfig(path=str(tmp_path / "tokenizer.json")).file
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: no tokenizer\.json"):
        _ = TokenizerConfig(path=str(tmp_path / "missing")).file


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({EOT: 0, "a": 1, "?": 2}, unk_token="?"))
    with pytest.raises(UserError, match="only byte-level"):
        load_tokenizer(words.to_str())
    with pytest.raises(UserError, match="has no <|endoftext|> token".replace("|", r"\|")):
        load_tokenizer(Tokenizer(models.BPE()).to_str())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no valid tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_special_tokens_have_ids_and_stand_for_no_bytes() -> None:
    tokenizer = train_tokenizer(["the <|mask|> cat\n" * 9], TokenizerConfig(300, special_tokens=("<|mask|>", EOT)))
    assert [tokenizer.token_to_id(token) for token in (EOT, "<|mask|>")] == [0, 1]
    assert token_byte_lengths(tokenizer)[:3].tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="258 has no room for all bytes, the end and 2 special tokens"):
        TokenizerConfig(258, special_tokens=("a", "b"))


# The pattern of Llama 3, which takes line ends after punctuation into one word; GPT-2's is that of ByteLevel itself.
LLAMA_3 = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
OTHER = load_tokenizer(TOKENIZER.to_str())
OTHER.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


@given(st.text(st.sampled_from("the cat \n\r\t.,'_é1\u0301漢。\u00a0")), st.integers(1, 5))
def test_tokens_of_the_pieces_are_those_of_the_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "PIECE", size)
        parts = list(pieces(text))
    assert "".join(parts) == text and parts[0] == text[: len(parts[0])]
    for tokenizer in (TOKENIZER, OTHER):
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        assert [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False).ids] == whole


def test_a_long_text_is_cut_often_and_trains_the_same_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the cat sat on the mat, and so did the dog\n" * 300
    whole = train_tokenizer([text], TokenizerConfig(290)).to_str()
    monkeypatch.setattr(tokenization, "PIECE", 100)
    assert max(map(len, pieces(text))) < 120 and len(list(pieces("x" * 500))) == 1
    assert train_tokenizer([text], TokenizerConfig(290)).to_str() == whole
