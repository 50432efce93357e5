"""Preparing data on a disk that is really full, and killed at any moment: nothing half-written is trusted."""

import io
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from frugal.data.cache import new_folder
from frugal.data.curation.pipeline import CurationConfig
from frugal.data.curation.quality import Length
from frugal.data.difficulty import difficulty_scores
from frugal.data.image_difficulty import image_difficulty
from frugal.data.image_store import TRAIN, prepare_images
from frugal.data.images import SklearnDigits
from frugal.data.packing import prepare
from frugal.data.progress import progress_bar
from frugal.data.sources import LocalText
from frugal.data.tokenization import TokenizerConfig
from frugal.errors import UserError


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The system refuses to write more into a file, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def text(folder: Path, curated: bool = False) -> Callable[[], np.ndarray]:
    (folder / "a.txt").write_text("".join(f"line {i} of the text, {i * 7919 % 1000} words\n" for i in range(9000)))
    curation = CurationConfig([Length(10)]) if curated else None
    source = LocalText(str(folder / "a.txt"))
    return lambda: np.array(prepare(source, TokenizerConfig(300), 0.2, str(folder / "cache"), curation=curation).train)


def digits(folder: Path) -> Callable[[], np.ndarray]:
    cache = str(folder / "cache")
    return lambda: np.array(prepare_images(SklearnDigits(), 8, 1, 10, 0.1, cache, 10**6, None).images)


# What is prepared, the size beyond which no file can be written, and what an earlier stage may leave behind.
FULL: dict[str, tuple[Callable[[Path], Callable[[], np.ndarray]], int, list[str]]] = {
    "tokens": (text, 100_000, []),
    "curated text": (lambda folder: text(folder, curated=True), 60_000, []),
    "tokens of curated text": (lambda folder: text(folder, curated=True), 150_000, ["curated"]),
    "images": (digits, 50_000, []),
}


@pytest.mark.parametrize(("make", "size", "left"), FULL.values(), ids=FULL)
def test_a_full_disk_is_said_and_loses_nothing(
    tmp_path: Path, make: Callable[[Path], Callable[[], np.ndarray]], size: int, left: list[str]
) -> None:
    run = make(tmp_path)
    with no_file_beyond(size), pytest.raises(UserError, match=r"data\.cache_dir: cannot write ") as error:
        run()
    assert "None" not in str(error.value) and "\n" not in str(error.value)
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == left
    after = run()
    (other := tmp_path / "elsewhere").mkdir()
    assert np.array_equal(after, make(other)())


def test_a_full_disk_while_scoring_is_said(tmp_path: Path) -> None:
    text(tmp_path)()
    corpus = prepare(LocalText(str(tmp_path / "a.txt")), TokenizerConfig(300), 0.2, str(tmp_path / "cache"))
    digits(tmp_path)()
    images = prepare_images(SklearnDigits(), 8, 1, 10, 0.1, str(tmp_path / "cache"), 10**6, None)
    for score, folder in (
        (lambda: difficulty_scores(corpus, "rarity", 16, 0), corpus.folder),
        (lambda: image_difficulty(images, images.of(TRAIN), "random", None, 0), images.folder),
    ):
        with no_file_beyond(500), pytest.raises(UserError, match=r"data\.cache_dir: cannot write .*difficulty-"):
            score()
        assert not list(folder.glob("difficulty-*"))
        assert len(score()[0]) > 0


# Kills itself at the nth time that it opens a file in the cache for writing.
PREPARE = """
import os, signal, sys
from frugal.data.curation.pipeline import CurationConfig
from frugal.data.curation.quality import Length
from frugal.data.packing import prepare
from frugal.data.sources import LocalText
from frugal.data.tokenization import TokenizerConfig
left = int(sys.argv[3])
def watch(event, arguments):
    global left
    if event == "open" and str(arguments[0]).startswith(sys.argv[2]) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
prepare(LocalText(sys.argv[1]), TokenizerConfig(300), 0.2, sys.argv[2], curation=CurationConfig([Length(10)]))
"""


@pytest.mark.parametrize("moment", [2, 6, 9], ids=["curating", "tokenizing", "writing the last file"])
def test_a_killed_preparation_is_begun_anew(tmp_path: Path, moment: int) -> None:
    run, cache = text(tmp_path, curated=True), tmp_path / "cache"
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "a.txt"), str(cache), str(moment)]
    assert subprocess.run(command, capture_output=True).returncode == -9
    names = [path.name for path in cache.iterdir()]
    assert sum(name.endswith(".tmp") for name in names) == 1 and not list(cache.glob("*/meta.json"))
    after = run()
    assert not list(cache.glob("*.tmp"))  # what the killed process left
    (other := tmp_path / "elsewhere").mkdir()
    assert np.array_equal(after, text(other, curated=True)())


def test_the_bar_says_what_is_done_and_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    with progress_bar() as progress:
        progress("decoding: 256 images", None)
        progress("tokenizing", 0.5)
    assert "tokenizing" in written.getvalue()


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a", "proof") as first, new_folder(tmp_path / "a", "proof") as second:
        assert first.is_dir() and second.is_dir() and first != second
        (second / "proof").write_text("second")
        (first / "proof").write_text("first")
    assert (tmp_path / "a" / "proof").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
