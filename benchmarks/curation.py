"""Precision and recall of each filter on planted noise, duplicates and personal data, and MB/s of each filter.

python benchmarks/curation.py [--seed 1] [--copies 300] [--out table.md]

The King James Bible's chapters; into copies of them goes what a filter should find, with known labels.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from frugal.data.curation.base import CorpusFilter, DocumentFilter, Drop, Measured
from frugal.data.curation.duplicates import Contamination, ExactDuplicates, NearDuplicates
from frugal.data.curation.language import Language
from frugal.data.curation.normalise import BoilerplateLines, NormaliseUnicode, StripHtml
from frugal.data.curation.pii import MaskPII, luhn
from frugal.data.curation.pipeline import CurationConfig, curate, quick_profile
from frugal.data.curation.quality import C4Quality, FineWebQuality, GopherQuality, GopherRepetition, Length
from frugal.data.curation.report import as_markdown, build_report
from frugal.data.documents import Document
from frugal.data.sources import KingJames

GERMAN = (
    "Am Anfang schuf Gott Himmel und Erde. Und die Erde war wüst und leer, und es war finster auf der Tiefe; und der "
    "Geist Gottes schwebte auf dem Wasser. Und Gott sprach: Es werde Licht! Und es ward Licht. "
)


def in_html(text: str, rng: random.Random) -> str:
    lines = "".join(f"<p>{line}</p>" for line in text.split("\n") if line)
    return f"<html><head><style>p {{ x: {rng.random()} }}</style></head><body>{lines}</body></html>"


def with_controls(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text))
    return text[:at] + rng.choice(["\u200b", "\ufeff", "\x07", "e\u0301", "\r\n"]) + text[at:]


def with_boilerplate(text: str, rng: random.Random) -> str:
    line = rng.choice(["This site uses cookies.", "All rights reserved.", "Read our privacy policy", "Terms of use"])
    lines = text.split("\n")
    lines.insert(rng.randrange(len(lines)), line)
    return "\n".join(lines)


def personal(rng: random.Random) -> str:
    """One e-mail address, number or public address, in one of the ways that people write them."""
    d = rng.randrange
    card = "4" + "".join(str(d(10)) for _ in range(14))
    card += next(c for c in "0123456789" if luhn(card + c))
    spaced = rng.choice([card, " ".join(card[i : i + 4] for i in range(0, 16, 4))])
    return rng.choice(
        [
            f"{rng.choice(['ruth', 'n.aomi'])}{d(99)}@{rng.choice(['mail.example.com', 'x-y.org', 'a.co.uk'])}",
            f"({d(201, 999)}) {d(201, 999)}-{d(1000, 9999)}",
            f"{d(201, 999)}-{d(201, 999)}-{d(1000, 9999)}",
            f"+44 20 {d(1000, 9999)} {d(1000, 9999)}",
            f"+49 {d(30, 99)} {d(1000000, 9999999)}",
            f"{d(201, 999)} {d(201, 999)} {d(1000, 9999)}",
            f"{d(11, 99)}.{d(256)}.{d(256)}.{d(1, 255)}",
            spaced,
            "GB82 WEST 1234 5698 7654 32",
        ]
    )


def with_personal(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    words.insert(rng.randrange(1, len(words)), personal(rng))
    return " ".join(words)


def with_decoy(text: str, rng: random.Random) -> str:
    """What looks like personal data and is none."""
    d = rng.randrange
    decoy = rng.choice(
        [
            f"version {d(9)}.{d(9)}.{d(20)}.{d(9)}",
            f"192.168.{d(256)}.{d(256)}",
            f"{d(1900, 2030)}-{d(10, 13)}-{d(10, 28)}",
            f"{d(10**9, 10**10)}",
            f"{d(10**15, 10**16) // 10 * 10}1"[:13] + "x",
            f"order {d(100, 999)}/{d(100, 999)}",
            "@media and a @ b",
            f"3.{d(10**9, 10**10)}",
            f"{d(201, 999)} {d(201, 999)} {d(1000, 9999)} {d(1000, 9999)}",
            f"{d(9)}.{d(9)}.{d(9)}.{d(9)}.v{d(9)}",
        ]
    )
    words = text.split(" ")
    words.insert(rng.randrange(1, len(words)), decoy)
    return " ".join(words)


def changed_words(text: str, rng: random.Random, share: float = 0.02) -> str:
    words = text.split(" ")
    for _ in range(max(1, round(share * len(words)))):
        words[rng.randrange(len(words))] = rng.choice(["selah", "moreover", "thereof", "yea"])
    return " ".join(words)


def symbols(text: str, rng: random.Random) -> str:
    return "".join(c if c.isspace() or rng.random() < 0.3 else rng.choice("#$%&*0123456789/|_=") for c in text)


def again(text: str, rng: random.Random) -> str:
    line = rng.choice([line for line in text.split("\n") if line])
    return "\n".join([line] * 10)


def menu(text: str, rng: random.Random) -> str:
    return "\n".join(" ".join(rng.sample(text.split(), 3)).strip(".,;:!?") for _ in range(40))


def german(text: str, rng: random.Random) -> str:
    words = (GERMAN * 3).split()
    at = rng.randrange(len(words) - 60)
    return " ".join(words[at : at + 60])


Plant = Callable[[str, random.Random], str]
PLANTS: list[tuple[DocumentFilter | CorpusFilter, Plant]] = [
    (NormaliseUnicode(), with_controls),
    (StripHtml(), in_html),
    (BoilerplateLines(), with_boilerplate),
    (Length(), lambda text, rng: text[: rng.randrange(5, 50)]),
    (GopherQuality(), symbols),
    (GopherRepetition(), again),
    (C4Quality(), lambda text, rng: text + "\nvar x = { }"),
    (FineWebQuality(), menu),
    (Language(["en"]), german),
    (MaskPII(), with_personal),
    (ExactDuplicates(), lambda text, rng: rng.choice([text, text.upper(), text.replace("\n", "  ")])),
    (NearDuplicates(), changed_words),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--copies", type=int, default=300)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    chapters = [text for text in KingJames().documents() if len(text.split()) >= 100]
    lines = [f"{len(chapters)} chapters, {args.copies} planted each, seed {args.seed}", ""]
    lines += ["| filter | planted | found | precision | recall |", "|---|---|---|---|---|"]
    for one, plant in PLANTS:
        rng = random.Random(args.seed)
        chosen = rng.sample(range(len(chapters)), args.copies)
        if isinstance(one, CorpusFilter):
            texts = chapters + [plant(chapters[i], rng) for i in chosen]
            labels = set(range(len(chapters), len(texts)))
            verdicts = one.verdicts([Measured(text) for text in texts], [])
            found = {i for i, verdict in enumerate(verdicts) if verdict}
        else:
            marked = set(chosen)
            decoy = with_decoy if isinstance(one, MaskPII) else (lambda text, rng: text)
            texts = [plant(t, rng) if i in marked else decoy(t, rng) for i, t in enumerate(chapters)]
            labels = marked
            results = [one(Measured(text)) for text in texts]
            found = {i for i, r in enumerate(results) if isinstance(r, Drop) or r != texts[i]}
        lines.append(row(one.name, labels, found))
    rng = random.Random(args.seed)
    held_out, training = chapters[-100:], chapters[:-100]
    quoting = set(rng.sample(range(len(training)), args.copies))
    texts = []
    for i, text in enumerate(training):
        words = rng.choice(held_out).split()
        at = rng.randrange(len(words) - 20)
        texts.append(text + " " + " ".join(words[at : at + 20]) if i in quoting else text)
    against = [Measured(text) for text in held_out]
    # The Bible quotes itself: what does so without being planted is known by a plain search and counts as right.
    itself = {i for i, text in enumerate(training) if shares(text, held_out)}
    verdicts = Contamination().verdicts([Measured(text) for text in texts], against)
    lines.append(row("Contamination", quoting | itself, {i for i, v in enumerate(verdicts) if v}))
    documents = [Document(text, "king-james") for text in chapters]
    others = [GopherRepetition(), C4Quality(), Language(["en"])]
    for name, filters in (("quick profile", quick_profile()), ("the others", others)):
        curated = curate(documents, [], CurationConfig(filters=filters, processes=1, terms={}))
        page = as_markdown(build_report(documents, curated, {}))
        lines += ["", f"Speed, one process: {name}", "", page.split("\n## ")[0]]
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


def shares(text: str, held_out: list[str], n: int = 13) -> bool:
    own = grams(text, n)
    return any(own & grams_of for grams_of in _HELD_OUT.setdefault(id(held_out), [grams(t, n) for t in held_out]))


_HELD_OUT: dict[int, list[set[tuple[str, ...]]]] = {}


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = Measured(text).plain_words
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def row(name: str, labels: set[int], found: set[int]) -> str:
    right = len(labels & found)
    precision = right / len(found) if found else 0.0
    return f"| {name} | {len(labels)} | {len(found)} | {precision:.3f} | {right / len(labels):.3f} |"


if __name__ == "__main__":
    main()
