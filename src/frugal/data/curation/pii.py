"""Mask personal data: e-mail and public IP addresses, telephone, card and account numbers."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from frugal.data.curation.base import DocumentFilter, Measured
from frugal.errors import require

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b")
# A search for a character set is three times as fast as one that begins with a look-behind: what must not stand
# before a match is asked after its first character.
_IPV4 = re.compile(r"\d(?<![\w.]\d)\d{0,2}(?:\.\d{1,3}){3}(?!\w|\.\w)")
_VERSION = re.compile(r"(?:\bv|version|release|section|rfc)[ .:]*$", re.IGNORECASE)
# In one piece, in groups of four, or as American Express prints it: a number that stands beside it is not part of it.
_CARD = re.compile(
    r"\d(?<![\w.-]\d)(?:\d{12,18}|\d{3}(?:([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|[ -]\d{6}[ -]\d{5}))(?![\w]|[.-]\d)"
)
_IBAN = re.compile(r"[A-Z](?<!\w[A-Z])[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
# International with +, or the North American ten digits with separators: a bare run of digits is more often no number.
_PHONE = re.compile(
    r"[+(\d](?<![\w.+-][+(\d])(?:"
    r"(?<=\+)[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
    r"|(?:(?<=1)[ .-](?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])|(?<=\()[2-9]\d\d\) ?|(?<=[2-9])\d\d[.-])[2-9]\d\d[ .-]\d{4}"
    r"|(?<=[2-9])\d\d [2-9]\d\d \d{4})"
    r"(?![\w]|[.-]\d)"
)
# Ten digits with blanks alone count where no other number stands beside them: else it is a row of a table.
_SPACED = re.compile(r"\d{3} \d{3} \d{4}")
_NUMBER_BEFORE = re.compile(r"\d[,;|]?[ \t]*$")
_NUMBER_AFTER = re.compile(r"[,;|]?[ \t]*[|+(]?\d")
_DIGITS = re.compile(r"\d\d")


def luhn(digits: str) -> bool:
    """Whether a card number's check digit holds (ISO/IEC 7812-1)."""
    odd, even = digits[-1::-2], digits[-2::-2]
    return (sum(map(int, odd)) + sum(sum(divmod(2 * int(d), 10)) for d in even)) % 10 == 0


def iban(text: str) -> bool:
    """Whether an account number's check digits hold (ISO 13616)."""
    compact = text.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _is_card(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    return digits[0] in "3456" and len(set(digits)) > 2 and luhn(digits)


def _is_public_address(match: re.Match[str]) -> bool:
    before = match.string[max(0, match.start() - 10) : match.start()]
    if _VERSION.search(before):
        return False
    try:
        address = ipaddress.IPv4Address(match[0])
        return address.is_global and not address.is_multicast
    except ValueError:
        return False


def _is_phone(match: re.Match[str]) -> bool:
    if not _SPACED.fullmatch(match[0]):
        return 9 <= sum(map(str.isdigit, match[0])) <= 15
    text, (start, end) = match.string, match.span()
    if match[0][1:3] == "11" or match[0][5:7] == "11":  # 911 and the like are neither area nor exchange
        return False
    return not (_NUMBER_BEFORE.search(text[max(0, start - 4) : start]) or _NUMBER_AFTER.match(text, end))


_Kind = tuple[str, re.Pattern[str], Callable[[re.Match[str]], bool], str]
# In this order: an account or card number contains what looks like a telephone number. The last field is a character
# without which there is nothing to find; an empty one stands for two digits in a row.
_KINDS: tuple[_Kind, ...] = (
    ("email", _EMAIL, lambda match: True, "@"),
    ("iban", _IBAN, lambda match: iban(match[0]), ""),
    ("card", _CARD, _is_card, ""),
    ("ip", _IPV4, _is_public_address, "."),
    ("phone", _PHONE, _is_phone, ""),
)


class MaskPII(DocumentFilter):
    """Put `<email>`, `<iban>`, `<card>`, `<ip>` and `<phone>` where such data stand.

    What has a check digit must pass it; addresses of private and documentation networks stay, as do version numbers;
    telephone numbers must be international or have North American separators, blanks alone included where no other
    number stands beside them.

    Args:
        kinds: which of them.
    """

    def __init__(self, kinds: list[str] | None = None) -> None:
        known = [kind for kind, *_ in _KINDS]
        self.kinds = list(known if kinds is None else kinds)
        for kind in self.kinds:
            require(kind in known, f"data.curation: MaskPII.kinds: {kind!r} is none of {', '.join(known)}")

    def __call__(self, document: Measured) -> str:
        """The text with its personal data masked."""
        text = document.text
        digits = bool(_DIGITS.search(text))
        for kind, pattern, holds, needs in _KINDS:
            if kind not in self.kinds or (needs and needs not in text) or (kind != "email" and not digits):
                continue
            mask = f"<{kind}>"
            text = pattern.sub(lambda match, holds=holds, mask=mask: mask if holds(match) else match[0], text)  # type: ignore[misc]
        return document.text if text == document.text else text
