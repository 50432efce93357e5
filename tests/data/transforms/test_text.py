"""Every text transform against its inverse, its statistics, or an oracle."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from frugal.data.tokenization import EOT, TokenizerConfig, train_tokenizer
from frugal.data.transforms.base import IGNORE, TextTransform, TextTransforms, special_tokens
from frugal.data.transforms.encoding import ByteCodec
from frugal.data.transforms.rewriting import (
    STYLES,
    BpeDropout,
    DropoutEncoder,
    NumberRendering,
    parse_numbers,
    render_number,
    render_numbers,
)
from frugal.data.transforms.text import DocumentShuffle, FillInTheMiddle, SpanCorruption, TokenDrop, TokenMask
from frugal.errors import UserError
from frugal.schedule import Ramp

ALWAYS = Ramp()
TEXTS = [
    "the cat sat on the mat with the other cat\n" * 8,
    "naïve 🙂🙂 café and the rest of it\n" * 8,
    "7 plus 15 is 22\n" * 9,
]
ALL: list[TextTransform] = [
    FillInTheMiddle(ALWAYS),
    SpanCorruption(ALWAYS),
    TokenMask(),
    TokenDrop(),
    DocumentShuffle(),
    BpeDropout(),
    NumberRendering(ALWAYS),
]
TOKENIZER = train_tokenizer(TEXTS, TokenizerConfig(420, special_tokens=special_tokens(ALL)))
CODEC = ByteCodec(TOKENIZER)
END = TOKENIZER.token_to_id(EOT)
T = 64


def stream(texts: list[str] = TEXTS) -> np.ndarray:
    return np.array([i for text in texts for i in (END, *TOKENIZER.encode(text).ids)], dtype=np.uint16)


STREAM = stream(TEXTS * 3)


def ids(token: str) -> int:
    return TOKENIZER.token_to_id(token)


def bound(*transforms: TextTransform, seed: int = 1) -> TextTransforms:
    return TextTransforms(transforms, TOKENIZER, seed)


def run(transform: TextTransform, start: int = 0, index: int = 0, seq_len: int = T) -> tuple[np.ndarray, np.ndarray]:
    """The whole row of T + 1 tokens that a transform gives, and whether each is predicted (the first never is)."""
    function = bound(transform)
    window = STREAM[start : start + function.reads(seq_len + 1)]
    inputs, labels = function(window, seq_len, index, 0)
    assert inputs.shape == labels.shape == (seq_len,)
    return inputs, labels


def row(inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tokens 0 to T of an unmasked sequence, without the filling."""
    assert np.array_equal(inputs[1:][labels[:-1] != IGNORE], labels[:-1][labels[:-1] != IGNORE])
    full = np.append(inputs, labels[-1])
    filled = np.flatnonzero(labels != IGNORE)
    return full[: filled[-1] + 2] if len(filled) else full[:1]


@pytest.mark.parametrize("transform", ALL, ids=lambda t: type(t).__name__)
def test_a_sample_is_a_function_of_seed_and_index(transform: TextTransform) -> None:
    window = stream([f"{i} and {i * i} on the mat\n" for i in range(40)])
    function, another = bound(transform), bound(transform, seed=2)
    followed = bound(transform, DocumentShuffle(Ramp(0.0)))
    results = [function(window, 150, index, 0)[0].tolist() for index in range(7)]
    assert results == [function(window, 150, index, 0)[0].tolist() for index in range(7)]
    assert len({str(result) for result in results}) > 3
    assert results != [another(window, 150, index, 0)[0].tolist() for index in range(7)]
    assert np.array_equal(followed(window, 150, 3, 0), function(window, 150, 3, 0))


@pytest.mark.parametrize("transform", ALL, ids=lambda t: type(t).__name__)
@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, len(STREAM) - 2), index=st.integers(0, 10**6), seq_len=st.integers(1, 90))
def test_the_length_is_exact_everywhere(transform: TextTransform, start: int, index: int, seq_len: int) -> None:
    """Also where the stream ends inside the window, and where it begins inside a character."""
    inputs, labels = run(transform, start, index, seq_len)
    assert ((inputs >= 0) & (inputs < TOKENIZER.get_vocab_size())).all()
    assert ((labels == IGNORE) | ((labels >= 0) & (labels < TOKENIZER.get_vocab_size()))).all()


def documents(tokens: np.ndarray) -> list[list[int]]:
    bounds = [*np.flatnonzero(tokens == END).tolist(), len(tokens)]
    return ([tokens[: bounds[0]].tolist()] if bounds[0] else []) + [
        tokens[a + 1 : b].tolist() for a, b in pairwise(bounds)
    ]


def unfill(document: list[int]) -> bytes:
    """Undo fill-in-the-middle from the definition of the two orders."""
    pre, suf, mid = (ids(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle"))
    if pre not in document:
        return CODEC.bytes(np.array(document))
    assert [document.count(i) for i in (pre, suf, mid)] == [1, 1, 1] and document[0] == pre
    s, m = document.index(suf), document.index(mid)
    prefix, suffix, rest = document[1:s], document[s + 1 : m], document[m + 1 :]
    return CODEC.bytes(np.array([*prefix, *rest, *suffix], dtype=np.int64))


@pytest.mark.parametrize("spm", [0.0, 1.0])
def test_fill_in_the_middle_can_be_undone(spm: float) -> None:
    changed, n = 0, len(stream())
    for index in range(20):
        tokens = row(*run(FillInTheMiddle(ALWAYS, spm), 0, index, n + 12))
        whole = [unfill(document) for document in documents(tokens)]
        assert whole[:2] == [text.encode() for text in TEXTS[:2]]  # exactly the bytes of the documents
        assert len(whole) < 4 or TEXTS[0].encode().startswith(whole[3])  # the last one is shortened at its end
        pre, suf = ids("<|fim_prefix|>"), ids("<|fim_suffix|>")
        following = [b for a, b in pairwise(tokens.tolist()) if a == pre]
        assert spm == 0 or set(following) == {suf}
        changed += len(following)
    assert changed >= 60


def test_fill_in_the_middle_keeps_a_window_inside_one_document() -> None:
    """A window without a document's beginning, cut inside characters at both ends: a permutation of its bytes."""
    for start in range(130, 150):
        window = STREAM[start : start + 41]
        if END in window:
            continue
        bytes_before = CODEC.bytes(window)
        tokens = row(*run(FillInTheMiddle(ALWAYS), start, start, 40))
        assert bytes_before.startswith(unfill(tokens.tolist()))
        assert len(unfill(tokens.tolist())) > len(bytes_before) // 2


@pytest.mark.parametrize("sentinels", [2, 32])
def test_span_corruption_can_be_undone(sentinels: int) -> None:
    names = [ids(f"<|span_{i}|>") for i in range(sentinels)]
    masked = []
    for index in range(30):
        tokens = row(*run(SpanCorruption(ALWAYS, sentinels=sentinels), 3, index)).tolist()
        assert len(tokens) == T + 1
        second = [i for i, token in enumerate(tokens) if token == names[0]][1]
        visible, targets = tokens[:second], tokens[second:]
        spans: dict[int, list[int]] = {}
        for token in targets:
            if token in names:
                spans[token] = []
                name = token
            else:
                spans[name].append(token)
        restored = [t for token in visible for t in (spans[token] if token in names else [token])]
        assert restored == STREAM[3 : 3 + len(restored)].tolist()
        assert len(restored) == T + 1 - 2 * len(spans) and len(spans) == min(sentinels, round((T + 1) * 0.05))
        assert all(spans.values()) and list(spans) == names[: len(spans)]
        masked.append(sum(map(len, spans.values())) / len(restored))
    assert np.mean(masked) == pytest.approx(0.15, abs=0.02)


def test_span_corruption_may_predict_its_targets_only() -> None:
    _, labels = run(SpanCorruption(ALWAYS, labels="targets"), 3)
    _, everything = run(SpanCorruption(ALWAYS), 3)
    kept = labels != IGNORE
    assert np.array_equal(labels[kept], everything[kept]) and (everything != IGNORE).all()
    assert not kept[: kept.argmax()].any() and kept[kept.argmax() :].all() and 0 < kept.sum() < T // 3
    assert labels[kept][0] == ids("<|span_0|>")


def test_masking_hides_inputs_at_its_rate() -> None:
    n, rate = 0, 0.2
    for index in range(60):
        inputs, labels = run(TokenMask(rate=rate), index, index)
        hidden = inputs == ids("<|mask|>")
        assert np.array_equal(inputs[~hidden], STREAM[index : index + T][~hidden])
        assert np.array_equal(labels, STREAM[index + 1 : index + T + 1])  # the truth is predicted all the same
        assert not (hidden & (STREAM[index : index + T] == END)).any()
        n += hidden.sum()
    total = sum((STREAM[i : i + T] != END).sum() for i in range(60))
    assert abs(n - total * rate) < 4 * np.sqrt(total * rate * (1 - rate))


def test_masked_tokens_may_be_no_labels_and_random_ones_ordinary() -> None:
    inputs, labels = run(TokenMask(rate=0.3, labels="ignore"), 2)
    assert np.array_equal(inputs[1:] == ids("<|mask|>"), labels[:-1] == IGNORE) and (labels == IGNORE).any()
    inputs, labels = run(TokenMask(rate=0.3, replace="random"), 2)
    differs = inputs != STREAM[2 : 2 + T]
    assert 0.1 < differs.mean() < 0.5 and not np.isin(inputs[differs], CODEC.special).any()
    assert np.array_equal(labels, STREAM[3 : 3 + T])


def test_dropping_leaves_a_subsequence_and_fills_the_sequence() -> None:
    for index in range(30):
        tokens = row(*run(TokenDrop(rate=0.3), index, index)).tolist()
        assert len(tokens) == T + 1
        rest = iter(STREAM[index:].tolist())
        assert all(token in rest for token in tokens)  # in order
    reads = bound(TokenDrop(rate=0.3)).reads(T + 1)
    assert 1.3 * T < reads < 2 * T


def test_whole_documents_change_places() -> None:
    short = stream([f"{i} and {i * i}\n" for i in range(12)])
    transforms = bound(DocumentShuffle())
    orders = set()
    for index in range(6):
        inputs, labels = transforms(short[1 : T + 2], T, index, 0)
        tokens = np.append(inputs, labels[-1])
        before, after = documents(short[1 : T + 2]), documents(tokens)
        assert after[0] == before[0] and after[-1] == before[-1]
        assert sorted(after) == sorted(before)
        orders.add(str(after))
    assert len(orders) > 3


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1.0])
def test_bpe_dropout_writes_the_same_bytes(dropout: float) -> None:
    for index in range(10):
        tokens = row(*run(BpeDropout(dropout=dropout), index, index))
        text = b"".join(CODEC.bytes(np.array(document, dtype=np.int64)) for document in documents(tokens))
        before = b"".join(CODEC.bytes(np.array(d, dtype=np.int64)) for d in documents(STREAM[index : index + T + 1]))
        assert before.startswith(text) and len(tokens) == T + 1
        if dropout == 1:  # nothing is merged: one token per byte
            assert len(text) == sum(token != END for token in tokens)


def test_bpe_dropout_has_the_distribution_of_the_tokenizers_library() -> None:
    """The library cannot be seeded, but what it draws is the oracle: the same segmentations, equally often."""
    own, rng, n = DropoutEncoder(TOKENIZER, 0.3), np.random.default_rng(0), 3000
    library = Tokenizer.from_str(TOKENIZER.to_str())
    library.model.dropout = 0.3
    for word in ("the", " other", " with"):
        ours = Counter(tuple(own.encode(word, rng, 99).tolist()) for _ in range(n))
        theirs: Counter[tuple[int, ...]] = Counter()
        for _ in range(n):
            theirs[tuple(library.encode(word).ids)] += 1
        assert len(ours) > 2
        for tokens in set(ours) | set(theirs):
            p = (ours[tokens] + theirs[tokens]) / (2 * n)
            assert abs(ours[tokens] - theirs[tokens]) / n < 5 * np.sqrt(2 * p * (1 - p) / n), (word, tokens)
    exact = DropoutEncoder(TOKENIZER, 0.0)
    assert exact.encode(TEXTS[1], rng, 10**6).tolist() == TOKENIZER.encode(TEXTS[1]).ids


@given(st.text(st.sampled_from("0123456789 ,._-~+=onetwthr\né"), max_size=40), st.sampled_from(STYLES))
def test_rendered_numbers_can_be_read_back(text: str, style: str) -> None:
    rendered = render_numbers(text, style)
    assert rendered == text or parse_numbers(rendered, style) == text


@given(
    st.lists(st.tuples(st.integers(-(10**12), 10**12), st.sampled_from("+-*=: ")), max_size=6), st.sampled_from(STYLES)
)
def test_plain_arithmetic_is_always_rendered(parts: list[tuple[int, str]], style: str) -> None:
    text = " ".join(f"{number} {sign}" for number, sign in parts)
    rendered = render_numbers(text, style)
    assert parse_numbers(rendered, style) == text
    assert style not in ("words", "reversed") or (rendered != text) == bool(parts)


def test_numbers_take_the_documented_styles() -> None:
    assert [render_number("1234", style) for style in STYLES] == ["1_2_3_4", "one-two-three-four", "1,234", "~4321"]
    assert render_numbers("-12 + 7 = -5", "spaced") == "-1_2 + 7 = -5"
    assert render_numbers("one of 3", "words") == "one of 3"  # could not be read back
    assert render_numbers("3 of 7", "words") == "three of seven"


def test_a_document_has_one_style_and_its_answer_stays_right() -> None:
    texts = [f"{a} + {b} = {a + b}\n" for a, b in zip(range(10, 40), range(977, 1007), strict=True)]
    tokens, transforms = stream(texts), bound(NumberRendering(ALWAYS))
    seen = set()
    for index in range(10):
        inputs, labels = transforms(tokens, 150, index, 0)
        for document in documents(np.append(inputs, labels[-1]))[:-1]:
            text = CODEC.bytes(np.array(document)).decode()
            (style,) = {style for style in STYLES if render_numbers(parse_numbers(text, style), style) == text} & {
                style for style in STYLES if parse_numbers(text, style) in texts
            } or {None}
            assert style is not None, text
            seen.add(style)
    assert seen == set(STYLES)


def test_the_probability_follows_the_step() -> None:
    transforms = bound(TokenMask(Ramp(0.5, start=10, stop=20), rate=0.5))
    window = STREAM[: T + 1]

    def share(step: int) -> float:
        changed = [not np.array_equal(transforms(window, T, i, step)[0], window[:-1]) for i in range(200)]
        return float(np.mean(changed))

    assert share(9) == share(20) == 0
    assert share(10) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenMask(rate=1.0), r"TokenMask\.rate must lie between 0 and 1, got 1.0"),
        (lambda: TokenDrop(rate=0.0), r"TokenDrop\.rate"),
        (lambda: SpanCorruption(mean_span=0.5), r"SpanCorruption\.mean_span"),
        (lambda: SpanCorruption(sentinels=0), r"SpanCorruption\.sentinels"),
        (lambda: FillInTheMiddle(spm=2), r"FillInTheMiddle\.spm"),
        (lambda: BpeDropout(dropout=0), r"BpeDropout\.dropout"),
        (lambda: NumberRendering(styles=("roman",)), r"styles must be some of spaced, .*got \['roman'\]"),
        (lambda: TokenMask(Ramp(1.5)), r"probability\.value must lie in \[0, 1\], got 1.5"),
        (lambda: bound(TokenMask(), BpeDropout()), "TokenMask must come after BpeDropout"),
        (
            lambda: TextTransforms([FillInTheMiddle()], train_tokenizer(TEXTS, TokenizerConfig(300)), 1),
            r"FillInTheMiddle needs the token <\|fim_prefix\|>, which the tokenizer of data.tokenizer.path lacks",
        ),
    ],
)
def test_bad_values_are_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
