import random
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugal.data.curation.base import Drop, Measured, ngram_hashes
from frugal.data.curation.duplicates import Contamination, ExactDuplicates, NearDuplicates
from frugal.data.curation.language import Language
from frugal.data.curation.normalise import BoilerplateLines, NormaliseUnicode, StripHtml
from frugal.data.curation.pii import MaskPII, iban, luhn
from frugal.data.curation.quality import C4Quality, FineWebQuality, GopherQuality, GopherRepetition, Length
from frugal.errors import UserError

PROSE = "the man and the woman have to be of good cheer that day, with all the people of the city. "


def run(one: object, text: str) -> str | Drop:
    return one(Measured(text))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("e\u0301", "é"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("a\u200bb\ufeff\x00c", "abc"),
        ("a \u00a0 b\t\tc", "a b c"),
        ("a  \n\n\n\nb", "a\n\nb"),
        ("  indented  twice", "  indented twice"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),  # joiners stay
        ("half \ud83d pair", "half pair"),
    ],
)
def test_unicode(raw: str, clean: str) -> None:
    assert run(NormaliseUnicode(), raw) == clean


@given(st.text())
def test_unicode_twice_is_once(text: str) -> None:
    once = run(NormaliseUnicode(), text)
    assert isinstance(once, str) and run(NormaliseUnicode(), once) == once


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("<p>one <b>two</b> three</p><p>four</p>", "one two three\nfour"),
        ("<ul><li>a &lt; b</li><li>c</li></ul><script>x()</script>", "a < b\nc"),
        ("a<br/>b<!-- no -->", "a\nb"),
        ("if a < b and c > d", "if a < b and c > d"),
        ("AT&amp;T", "AT&T"),
    ],
)
def test_html(raw: str, clean: str) -> None:
    assert run(StripHtml(), raw) == clean


def test_boilerplate_lines_go_and_prose_about_them_stays() -> None:
    long = "the privacy policy " + "of the king " * 10
    assert run(BoilerplateLines(), f"one\nWe use cookies.\n{long}") == f"one\n{long}"
    assert run(BoilerplateLines(), "All rights reserved") == Drop("nothing but boilerplate")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE * 10, None),
        ("the and " * 24, "too few words"),
        ("a b the " * 30, "mean word length"),
        (PROSE * 4 + "# " * 40, "mean word length"),
        (PROSE * 4 + "word# " * 12, "too many hash signs"),
        (PROSE * 4 + "word... " * 12, "too many ellipses"),
        ("- " + f"{PROSE}\n- " * 10, "too many bullets"),
        (f"{PROSE}and so on...\n" * 10, "too many lines end in an ellipsis"),
        (PROSE * 4 + "1234 " * 40, "too few words with letters"),
        ("Wort folgt auf Wort " * 20, "too few stop words"),
    ],
)
def test_gopher_quality(text: str, reason: str | None) -> None:
    result = run(GopherQuality(), text)
    assert result == (text if reason is None else Drop(reason))


def test_gopher_repetition() -> None:
    rng = random.Random(1)
    varied = " ".join("".join(rng.choices("abcdefgh", k=6)) for _ in range(300))
    assert run(GopherRepetition(), varied) == varied
    assert run(GopherRepetition(), "one line\n" * 10 + varied[:50]) == Drop("repeated lines")
    assert run(GopherRepetition(), varied[:600] + " again and" * 40) == Drop("one 2-gram again and again")
    half = varied[:1000]
    result = run(GopherRepetition(), half + " x " + half)
    assert isinstance(result, Drop) and "5-grams" in result.reason


def test_gopher_repetition_counts_as_a_plain_loop_does() -> None:
    rng = random.Random(3)
    for _ in range(200):
        words = rng.choices(["aa", "bbb", "c", "dddd", "ee", "f"], k=rng.randint(5, 60))
        covered, seen = set(), set()
        for i in range(len(words) - 4):
            gram = tuple(words[i : i + 5])
            if gram in seen:
                covered |= set(range(i, i + 5))
            seen.add(gram)
        share = sum(len(words[i]) for i in covered) / sum(map(len, words))
        only = GopherRepetition()
        only.TOP, only.DUPLICATED = {}, {5: 0.15}  # type: ignore[misc]
        assert isinstance(run(only, " ".join(words)), Drop) == (share > 0.15)


def test_c4() -> None:
    good = 'He went to the city.\nAnd she said: "come in here."\nWas it not so, then?'
    assert run(C4Quality(), good) == good
    assert run(C4Quality(), good + "\nHome | News\nToo short.\nPlease turn on your Javascript now.") == good
    assert run(C4Quality(), good + "\nfunction() { }") == Drop("curly bracket")
    assert run(C4Quality(), good + "\nLorem ipsum dolor sit amet.") == Drop("lorem ipsum")
    assert run(C4Quality(), "Only one sentence is here.") == Drop("too few sentences")


def test_fineweb() -> None:
    lines = [f"{PROSE.strip()} {i}." for i in range(10)]
    text = "\n".join(lines)
    assert run(FineWebQuality(), text) == text
    assert run(FineWebQuality(), text.replace(".", "")) == Drop("few lines end in punctuation")
    assert run(FineWebQuality(), "short one.\n" * 7 + "\n".join(lines[:3])) == Drop("mostly short lines")
    assert run(FineWebQuality(), text + "\n" + "\n".join(lines[:3])) == Drop("characters in repeated lines")


def test_length_counts_bytes() -> None:
    assert run(Length(min_bytes=4), "éé") == "éé"
    assert run(Length(min_bytes=5), "éé") == Drop("too short")
    assert run(Length(max_bytes=60), "a" * 61) == Drop("too long")
    with pytest.raises(UserError, match="max_bytes"):
        Length(min_bytes=10, max_bytes=5)


def test_language() -> None:
    english, german = PROSE * 3, "Am Anfang schuf Gott Himmel und Erde. Und die Erde war wüst und leer. " * 3
    assert run(Language(["en"]), english) == english
    assert run(Language(["en"]), german) == Drop("language de")
    assert run(Language(["de", "en"]), german) == german
    with pytest.raises(UserError, match="'xx'"):
        run(Language(["xx"]), english)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jane.doe+x@mail.example.org.", "write to <email>."),
        ("call (212) 555-0187 or +44 20 7946 0958.", "call <phone> or <phone>."),
        ("card 4111 1111 1111 1234", "card 4111 1111 1111 1234"),  # wrong check digit
        ("card 4012-8888-8888-1881!", "card <card>!"),
        ("IBAN GB82 WEST 1234 5698 7654 32.", "IBAN <iban>."),
        ("IBAN GB83 WEST 1234 5698 7654 32.", "IBAN GB83 WEST 1234 5698 7654 32."),
        (
            "from 8.8.8.8 to 192.168.0.1, version 8.8.4.4, 999.1.1.1",
            "from <ip> to 192.168.0.1, version 8.8.4.4, 999.1.1.1",
        ),
        ("tel 212 555 0187, or 646 555 0132.", "tel <phone>, or <phone>."),
        ("rows 210 215 2200 2300 and 100 212 555 0187", None),  # a table's row
        ("sums 210 215 2200, 17 and 911 555 1234, 212 555 01875, 212 555 0187.5", None),
        ("Psalms 4012888888881881 23", "Psalms <card> 23"),  # a number beside it is not part of it
        ("3782 822463 10005 and 4012 8888 8888 1881 7", "<card> and <card> 7"),
        ("4012 88888888 1881, 4012 8888-8888 1881", None),
        (
            "11.2.0.2.v3, 224.0.0.1 and 21.0.0.0.ru-2025, but 8.8.8.8.",
            "11.2.0.2.v3, 224.0.0.1 and 21.0.0.0.ru-2025, but <ip>.",
        ),
        ("in 1611, 1,189 chapters, 2026-11-24 10:20:30, 3.14159265358979", None),
        ("id 123456789012 and @media and a @ b", None),
    ],
)
def test_pii(text: str, masked: str | None) -> None:
    assert run(MaskPII(), text) == (text if masked is None else masked)


def test_check_digits() -> None:
    assert luhn("79927398713") and not luhn("79927398710")
    assert iban("DE89 3704 0044 0532 0130 00") and not iban("DE88 3704 0044 0532 0130 00")


def test_unknown_kind_of_pii() -> None:
    with pytest.raises(UserError, match="'name'"):
        MaskPII(["name"])


def test_ngram_hashes_are_equal_just_where_the_words_are() -> None:
    words = ["a", "b", "c", "a", "b", "c", "d", "a", "b"]
    hashes = ngram_hashes(Measured(" ".join(words)).word_hashes, 2).tolist()
    pairs = list(pairwise(words))
    assert all((hashes[i] == hashes[j]) == (pairs[i] == pairs[j]) for i in range(8) for j in range(8))


def test_exact_duplicates() -> None:
    texts = ["In the beginning", "and God said", "in  the\nBEGINNING", "let there be"]
    verdicts = ExactDuplicates().verdicts([*map(Measured, texts)], [Measured("And God said")])
    assert verdicts == [None, Drop("copy of validation text"), Drop("copy of an earlier document"), None]


def shuffled_words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(count)]


def test_near_duplicates_are_found_and_others_are_not() -> None:
    rng = random.Random(7)
    originals = [shuffled_words(rng, 200) for _ in range(300)]
    documents, copies = list(originals), set()
    for i in range(0, 300, 3):
        copy = list(originals[i])
        copy[rng.randrange(200)] = "changed"  # 5 of 196 n-grams: Jaccard about 0.95
        copy[rng.randrange(200)] = "altered"
        copies.add(len(documents))
        documents.append(copy)
    verdicts = NearDuplicates().verdicts([Measured(" ".join(words)) for words in documents], [])
    found = {i for i, verdict in enumerate(verdicts) if verdict}
    assert len(found & copies) / len(found) >= 0.95
    assert len(found & copies) / len(copies) >= 0.95


def test_signatures_estimate_the_jaccard_similarity() -> None:
    rng = random.Random(8)
    words = shuffled_words(rng, 1000)
    other = words[:700] + shuffled_words(rng, 300)
    near = NearDuplicates(bands=64, rows=8)
    a, b = (set(zip(*(x[i:] for i in range(5)), strict=False)) for x in (words, other))
    truth = len(a & b) / len(a | b)
    first, second = near.signatures([Measured(" ".join(words)), Measured(" ".join(other))])
    assert abs(np.mean(first == second) - truth) < 0.08


def test_contamination() -> None:
    rng = random.Random(9)
    held_out = shuffled_words(rng, 100)
    training = shuffled_words(rng, 100)
    twelve, thirteen = training + held_out[20:32] + training, training + held_out[20:33] + training
    documents = [Measured(" ".join(words)) for words in (training, twelve, thirteen)]
    against = [Measured(" ".join(held_out))]
    assert Contamination().verdicts(documents, against) == [None, None, Drop("shares text with validation")]
    assert Contamination(most=0.1).verdicts(documents, against) == [None] * 3
    assert Contamination().verdicts(documents, []) == [None] * 3


@given(st.text(st.characters(codec="utf-8"), max_size=300))
def test_no_filter_fails_on_any_text(text: str) -> None:
    for one in (NormaliseUnicode(), StripHtml(), BoilerplateLines(), GopherQuality(1), GopherRepetition()):
        assert isinstance(run(one, text), str | Drop)
    for other in (C4Quality(), FineWebQuality(), MaskPII()):
        assert isinstance(run(other, text), str | Drop)


def test_masks_are_not_masked_again() -> None:
    text = "a@b.co, 8.8.8.8, (212) 555-0187"
    once = run(MaskPII(), text)
    assert isinstance(once, str) and run(MaskPII(), once) == once and not re.search(r"\d\d", once)
