"""A fault of the user's is one line on stderr and exit code 2; a fault of ours keeps its traceback.

Of several processes that fail together one speaks.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from frugal.errors import UserError

# How jsonargparse says that a key does not exist; group 1 is the key (or group and key).
UNKNOWN_KEY = (
    r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'",
    r"does not accept option '(?P<key>[^']+)'",
    r"Option '(?P<key>[^']+)' is not accepted",
    r"Key '(?P<key>[^']+)' is not expected",
    r"[Uu]nrecognized arguments?:? *(?P<key>[^\s=]+)",
)
# Lines of a nested report that say nothing about the value itself.
FRAME = (
    r'[Pp]arser key "|Does not validate|Subtypes:|Errors:|Given value|Problem with given|'
    r"Expected a <class 'NoneType'>|Expected a path but|Expected a dot import path"
)
# How gloo and NCCL say that the other end of a connection is gone.
PEER_GONE = r"Connection (closed|reset) by peer|Broken pipe|remote process exited"
CALLABLE = r"Type typing\.Callable\[.*?\] expects a function or a callable class: "


def one_line(message: str, known_keys: Iterable[str] = ()) -> str:
    """Reduce jsonargparse's nested report to `key: what is wrong`, with a suggestion for a misspelt key."""
    message = re.sub(CALLABLE, "", message.replace('Parser key "config": ', ""))
    keys = [key for key in re.findall(r'[Pp]arser key "([^"]+)"', message) if key != "config"]
    for pattern in UNKNOWN_KEY:
        if found := re.search(pattern, message):
            parts = [*keys, found.groupdict().get("group"), found["key"].lstrip("-")]
            name = ".".join(part for part in parts if part)
            if "recognized" in pattern and not found["key"].startswith("--"):
                return f"unexpected argument {found['key']!r}"
            close = difflib.get_close_matches(name, list(known_keys), n=1)
            return f"{name}: there is no such key" + (f"; did you mean {close[0]}?" if close else "")
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    # Our own checks name their key in full: their line needs nothing around it.
    if own := [line for line in lines if re.match(r"[a-z_]+(\.[a-z_0-9]+)+: ", line)]:
        return own[0]
    told = [line for line in lines if not re.match(FRAME, line)] or lines
    text = re.sub(r"<class '([^']+)'>", r"\1", "; ".join(told)).split(". Got value: Namespace(")[0]
    if "Got value" not in text and (given := re.search(r"Given value: ([^\s{]+?)(?:\. Got|\s|$)", message)):
        text += f". Got value: {given[1]}"
    return f"{'.'.join(keys)}: {text}" if keys else text


def in_words(error: UserError | argparse.ArgumentError, known_keys: Iterable[str] = ()) -> str:
    """What a user is told of an error, on one line."""
    message = str(error) if isinstance(error, UserError) else one_line(str(error), known_keys)
    return " ".join(message.split())


@contextmanager
def one_line_errors(known_keys: Iterable[str] = ()) -> Iterator[None]:
    """Print a UserError or a parser's error as one line and exit with code 2."""
    try:
        yield
    except (UserError, argparse.ArgumentError) as error:
        print(f"error: {in_words(error, known_keys)}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def one_voice() -> Iterator[None]:
    """What becomes of a run whose processes fail: the first that does says why, others that lose it say nothing.

    Raises:
        SystemExit: with code 2 if another process has told the user's fault already; with code 1, after one line, if a
            process or a loader's worker is gone: that may be tried again.
    """
    try:
        yield
    except UserError:
        if not _is_first_to_fail(alone=False):
            sys.exit(2)
        raise
    except (RuntimeError, OSError) as error:
        if (told := _what_is_gone(error)) is None:
            raise
        if _is_first_to_fail(alone=True):
            print(f"error: {told}; go on with --ckpt_path last", file=sys.stderr)
        sys.exit(1)


def _what_is_gone(error: BaseException) -> str | None:
    """A process that has ended while others needed it, in words. torch and gloo have no classes of errors for that."""
    import torch.distributed as dist

    each: BaseException | None = error
    while each is not None:
        if found := re.search(r"DataLoader worker \(pid.*?\) [^\n]*", str(each)):
            return f"data: {found[0].rstrip('. ')} (memory?)"
        if isinstance(each, ConnectionError) and "torch/utils/data" in _origin(each):
            return "data: a worker of the DataLoader has ended (memory?)"
        if dist.is_initialized() and re.search(PEER_GONE, str(each)):
            return "another process of this run has ended (killed, if it said nothing)"
        each = each.__cause__
    return None


def _origin(error: BaseException) -> str:
    """The files that an error came through."""
    return "\n".join(frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _is_first_to_fail(alone: bool) -> bool:
    """Whether no other process has asked this before; `alone` if the process that counts them is gone, too."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("frugal/failed", 1) == 1
    except RuntimeError:
        return alone
