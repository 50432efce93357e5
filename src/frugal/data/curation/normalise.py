"""Filters that clean a text: Unicode, HTML, boilerplate lines."""

from __future__ import annotations

import html
import re
import unicodedata

from frugal.data.curation.base import DocumentFilter, Drop, Measured
from frugal.errors import UserError

# Control characters but tab and line feed, the byte order mark and zero-width spaces; soft hyphens; lone surrogates.
# Zero-width joiners stay: Indic and Persian words and emoji need them.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff\ud800-\udfff]")
_UNSEEN_ASCII = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_ODD_BLANK = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_BLANKS = re.compile(r"(?<=\S)[ \t]{2,}")  # not at a line's beginning: indentation means something
_LINE_ENDS = re.compile(r"[ \t]+\n")
_BLANK_LINES = re.compile(r"\n{3,}")
_TAG = re.compile(r"<(?:/?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?|!--.*?--|!DOCTYPE[^>]*)>", re.DOTALL)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});")
_BLOCK = re.compile(
    r"</?(?:address|article|aside|blockquote|br|dd|div|dl|dt|fieldset|figure|footer|form|h[1-6]|header|hr|li|main|"
    r"nav|ol|p|pre|section|table|tr|ul|note|important|title|body)\b[^<>]*>",
    re.IGNORECASE,
)


class NormaliseUnicode(DocumentFilter):
    """Canonical composition (NFC, Unicode Standard Annex 15); unseen characters, CR LF and runs of blanks go."""

    def __call__(self, document: Measured) -> str:
        """The clean text."""
        text = document.text
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if text.isascii():
            text = _UNSEEN_ASCII.sub("", text)
        else:
            text = _ODD_BLANK.sub(" ", _UNSEEN.sub("", unicodedata.normalize("NFC", text)))
        if "  " in text or "\t" in text:
            text = _BLANKS.sub(" ", text)
        if " \n" in text or "\t\n" in text:
            text = _LINE_ENDS.sub("\n", text)
        if "\n\n\n" in text:
            text = _BLANK_LINES.sub("\n\n", text)
        return document.text if text == document.text else text


class StripHtml(DocumentFilter):
    """HTML to text with the Lexbor parser; blocks become lines, scripts, styles and comments go.

    A text without a tag or character reference is left as it is, so prose with `a < b` is safe.
    """

    def __call__(self, document: Measured) -> str:
        """The text that a reader would see."""
        text = document.text
        if "<" not in text or not _TAG.search(text):
            return html.unescape(text) if "&" in text and _ENTITY.search(text) else text
        try:
            from selectolax.lexbor import LexborHTMLParser
        except ImportError:
            raise UserError("data.curation: StripHtml needs selectolax; pip install -e '.[curation]'") from None
        tree = LexborHTMLParser(_BLOCK.sub(r"\n\g<0>", text))
        tree.strip_tags(["script", "style", "noscript", "template"])
        seen = tree.body.text(separator="") if tree.body else ""
        return "\n".join(line for line in (" ".join(line.split()) for line in seen.split("\n")) if line)


class BoilerplateLines(DocumentFilter):
    """Leave out the lines about scripts, cookies and terms of use (C4: Raffel et al. 2020, section 2.2 and code).

    Args:
        phrases: a line that has one of these, in any case, goes if it is short.
        max_words: longer lines are prose about the subject and stay.
    """

    PHRASES = (
        "terms of use",
        "terms of service",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
        "enable javascript",
        "requires javascript",
        "all rights reserved",
    )

    def __init__(self, phrases: list[str] | None = None, max_words: int = 30) -> None:
        self.phrases, self.max_words = list(phrases or self.PHRASES), max_words

    def __call__(self, document: Measured) -> str | Drop:
        """The text without those lines."""
        text = document.text
        lower = text.lower()
        if not any(phrase in lower for phrase in self.phrases):
            return text
        kept = [line for line in text.split("\n") if not self._boilerplate(line)]
        return "\n".join(kept) if any(line.strip() for line in kept) else Drop("nothing but boilerplate")

    def _boilerplate(self, line: str) -> bool:
        lower = line.lower()
        return any(phrase in lower for phrase in self.phrases) and len(line.split()) <= self.max_words
