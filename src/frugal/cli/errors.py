"""A fault of the user's is one line on stderr and exit code 2; a fault of ours keeps its traceback.

Of several processes that fail together one speaks.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

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
    r"Expected a <class 'NoneType'>|Expected a path but|Expected a dot import path|"
    r"Subclass types expect|a class path \(str\)|a dict with"
)
# What a value was taken for that names neither a file nor a class, or a file that does not read; group 1 is the value.
NO_FILE = (
    r"Unable to load config ['\"]([^'\"]+)['\"]",
    r"Unexpected import path format: (\S+)",
    r"Expected a dot import path string: (\S+)",
    r"File does not exist: '([^']+)'",
    r"Invalid content in sub-config file (\S+):",
)
NO_CLASS = (
    r"(?:Problem with given class_path '(?P<path>[^']+)':\s*)?"
    r"module '(?P<module>[^']+)' has no attribute '(?P<name>\w+)'"
)
EXPECTED = r"Expected an? (?P<type>.+?)(?:\. Got value: .*)?$|Not a valid subclass of (?P<class>\w+).*"
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
}
TUPLE, LIST = r"tuple with (\d+) elements", r"list of \1"
LITERAL = r"typing\.Literal(\[[^\]]*\])"
OWN_TEXT = "configs/experiments/001_own_text.yaml"
# How gloo and NCCL say that the other end of a connection is gone.
PEER_GONE = r"Connection (closed|reset) by peer|Broken pipe|remote process exited"
CALLABLE = r"Type typing\.Callable\[.*?\] expects a function or a callable class: "


def one_line(message: str, known_keys: Iterable[str] = ()) -> str:
    """Reduce jsonargparse's nested report to `key: what is wrong`, with a suggestion for a misspelt key."""
    message = re.sub(CALLABLE, "", message.replace('Parser key "config": File', 'Parser key "--config": File'))
    message = message.replace('Parser key "config": ', "")
    message = re.sub(r'- Parser key "[^"]+": Unable to load config.*', "", message)  # said in the line above it
    keys = [key for key in re.findall(r'[Pp]arser key "([^"]+)"', message) if key != "config"]
    at = ".".join(keys)
    for pattern in UNKNOWN_KEY:
        if found := re.search(pattern, message):
            if "recognized" in pattern and not found["key"].startswith("--"):
                return f"unexpected argument {found['key']!r}"
            parts = [at, found.groupdict().get("group"), found["key"].lstrip("-")]
            return _no_key(".".join(part for part in parts if part), message, known_keys)
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    # Our own checks name their key in full: their line needs nothing around it.
    if own := [line for line in lines if re.match(r"[a-z_]+(\.[a-z_0-9]+)+: ", line)]:
        return own[0]
    if found := re.search(NO_CLASS, message):
        text = _no_class(found["path"] or f"{found['module']}.{found['name']}")
        return f"{at}.class_path: {text}" if at else text
    told = [line for line in lines if not re.match(FRAME, line)]
    wanted = [found for line in told if (found := re.fullmatch(EXPECTED, line))]
    for pattern in NO_FILE:
        if not wanted and (found := re.search(pattern, message)):
            return f"{at}: {_no_file(found[1])}" if at else _no_file(found[1])
    others = [line for line in told or lines if not re.fullmatch(EXPECTED, line)]
    text = re.sub(r"<class '([^']+)'>", r"\1", "; ".join(others)).split(". Got value: Namespace(")[0]
    if wanted:
        text = "; ".join(part for part in (text, _must_be(wanted, message)) if part)
    elif (given := _given(message)) and given not in text:
        text += f", got {given}"
    text = text.replace(". Got value: ", ", got ")
    return f"{at}: {text}" if at else text


def _no_key(name: str, message: str, known_keys: Iterable[str]) -> str:
    """A key that is none, with the one that was meant: of those of the class that refused it, too."""
    classes = re.findall(r"Problem with given class_path '([^']+)'", message)
    kind = _class(classes[-1]) if classes else None
    place = name.rpartition(".")[0]
    if name == "data.source.path" and "frugal.data.datamodule.TextDataModule" in classes:
        return f"{name}: {classes[-1].rpartition('.')[2]} reads no file; --config {OWN_TEXT} reads your text"
    own = [f"{place}.{key}" for key in inspect.signature(kind).parameters] if kind and len(classes) > 1 else []
    known = [key for key in [*own, *known_keys] if not name.startswith(f"{key}.")]
    groups = [".".join(key.split(".")[: name.count(".") + 1]) for key in known]
    close = difflib.get_close_matches(name, dict.fromkeys([*known, *groups]), n=1)
    return f"{name}: there is no such key" + (f"; did you mean {close[0]}?" if close else "")


def _class(path: str) -> type | None:
    """A class of a module that is loaded."""
    module, _, name = path.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    return kind if isinstance(kind, type) else None


def _no_class(path: str) -> str:
    module, _, name = path.rpartition(".")
    there = [key for key, value in vars(sys.modules.get(module, object)).items() if isinstance(value, type)]
    close = difflib.get_close_matches(name, there, n=1)
    return f"there is no class {path}" + (f"; did you mean {module}.{close[0]}?" if close else "")


def _no_file(value: str) -> str:
    path = Path(value)
    if path.is_file():
        return f"{value} is no YAML file that holds keys"
    if path.is_relative_to(Path.cwd()):
        value = str(path.relative_to(Path.cwd()))
    return f"no file {value}" if path.suffix or "/" in value else f"no class or file {value}"


def _must_be(wanted: list[re.Match[str]], message: str) -> str:
    """What a value must be, of one or several types, and what it is."""
    types = [found["type"] or found["class"] for found in wanted]
    subtypes = re.findall(r"Subtypes: (.*)", message)
    literals = re.findall(LITERAL, subtypes[-1] if subtypes else "")
    if len(literals) == len(types):  # of a choice between numbers the line itself says only that they are whole
        types = []
    else:
        literals = [values for each in types for values in re.findall(LITERAL, each)]
        types = [re.sub(r"<class '(.+)'>", r"\1", each) for each in types if not re.match(LITERAL, each)]
    words = list(
        dict.fromkeys(TYPES.get(each) or f"a {re.sub(TUPLE, LIST, each.rpartition('.')[2])}" for each in types)
    )
    if "a number" in words:
        words = [word for word in words if word != "a whole number"]
    choices = dict.fromkeys(str(value) for values in literals for value in ast.literal_eval(values))
    if choices:
        words.append(f"one of {', '.join(choices)}" if len(choices) > 1 else next(iter(choices)))
    given = _given(message)
    return f"must be {' or '.join(words)}" + (f"{';' if len(choices) > 1 else ','} got {given}" if given else "")


def _given(message: str) -> str:
    """The value that was refused, where it is short enough to show."""
    forms = (
        r"Got value: (.+?)(?:\. Got value|$)",
        r"Given value: NestedArg\(key='[^']*', val=(.+)\)$",
        r"Given value: (.+)$",
    )
    found = next((found for form in forms if (found := re.search(form, message, re.MULTILINE))), None)
    value = found[1].strip("'") if found else ""
    return "" if value.startswith(("{", "Namespace(")) else value


def keys_of(kind: Any, prefix: str) -> list[str]:
    """Every key that a dataclass or another class takes, those of the dataclasses in it included."""
    found = []
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else None
    try:
        hints = get_type_hints(kind if fields is not None else kind.__init__)
    except (NameError, TypeError):  # a class that hides its types
        return []
    for name, hint in hints.items():
        if name in fields if fields is not None else name != "return":
            inner = [option for option in (hint, *get_args(hint)) if dataclasses.is_dataclass(option)]
            nested = [key for option in inner for key in keys_of(option, f"{prefix}.{name}")]
            found += nested or [f"{prefix}.{name}"]
    return found


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
