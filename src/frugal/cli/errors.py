"""A fault of the user's is one line on stderr and exit code 2; a fault of ours keeps its traceback."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from frugal.errors import UserError


def one_line(message: str) -> str:
    """Reduce jsonargparse's nested report to `key: what is wrong`."""
    keys = [key for key in re.findall(r'[Pp]arser key "([^"]+)"', message)]
    refused = (
        re.search(r"Option '([^']+)' is not accepted", message)
        or re.search(r"Key '([^']+)' is not expected", message)
        or re.search(r"Unrecognized arguments?:? ?(.+)", message, re.IGNORECASE)
    )
    if group := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
        return ".".join([*keys, group[1], group[2]]) + ": there is no such key"
    if refused:
        return ".".join([*keys, refused[1].strip().lstrip("-")]) + ": there is no such key"
    # The deepest report is the one of the option that was meant; alternatives such as None follow it.
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    told = [
        line
        for line in lines
        if not re.match(r'[Pp]arser key "|Does not validate|Subtypes:|Errors:|Given value|Problem with given', line)
        and line != "Expected a <class 'NoneType'>"
    ]
    text = re.sub(r"<class '([^']+)'>", r"\1", "; ".join(told) or "; ".join(lines))
    return f"{'.'.join(keys)}: {text}" if keys else text


def suggest(key: str, known: list[str]) -> str:
    """`; did you mean ...?` for a misspelt key, or nothing."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a UserError or a parser's error as one line and exit with code 2."""
    try:
        yield
    except (UserError, argparse.ArgumentError) as error:
        message = str(error) if isinstance(error, UserError) else one_line(str(error))
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
