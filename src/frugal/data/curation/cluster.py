"""The same filters on many machines: datatrove reads, filters and writes, task by task and stage by stage.

Filters that judge a document alone run in all tasks; filters that compare documents run in one task over what is left.
The last stage writes the folder that preparing the run's data looks for, so training goes on from it. Import this
module only where it is used: it needs datatrove.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from datatrove.data import Document as Row
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter
from loguru import logger

from frugal.data.curation.base import CorpusFilter, DocumentFilter, Drop, Measured
from frugal.data.curation.pipeline import Account, Curated, CurationConfig, text_bytes
from frugal.data.curation.stage import curated_folder, write_curated
from frugal.data.documents import Document, as_document
from frugal.data.packing import curation_key
from frugal.data.sources import LocalText, Source
from frugal.data.splits import is_held_out
from frugal.errors import UserError

log = logging.getLogger(__name__)
MEASURED = "measured"  # where a row carries what several filters want to know of its text; never written
KEPT = pa.schema(
    [
        ("text", pa.large_string()),
        ("id", pa.string()),
        ("part", pa.int32()),
        ("level", pa.int16()),
        ("source", pa.string()),
        ("shard", pa.string()),
    ]
)
DROPPED = pa.schema(
    [("text", pa.large_string()), ("id", pa.string()), ("source", pa.string()), ("reason", pa.string())]
)


def shard_of(source: Source, rank: int, world_size: int) -> Iterator[tuple[str, int, Document]]:
    """Every `world_size`-th file of local text, or document of anything else, with its place and its source's number.

    Places sort as the documents follow each other in the source, whatever `world_size`.
    """
    for number, part in enumerate(source.parts()):
        files = part.source.files() if isinstance(part.source, LocalText) else []
        if len(files) >= world_size and isinstance(part.source, LocalText):
            for i in range(rank, len(files), world_size):
                for row, text in enumerate(part.source.read(files[i])):
                    yield _place(number, i, row), number, Document(text, part.called)
            continue
        for row, (place, document) in enumerate(_every(part.source, number, files)):
            if row % world_size == rank:
                yield place, number, replace(document, source=part.called)


def _every(source: Source, number: int, files: Sequence[Path]) -> Iterator[tuple[str, Document]]:
    if isinstance(source, LocalText):
        for i, file in enumerate(files):
            for row, text in enumerate(source.read(file)):
                yield _place(number, i, row), Document(text)
        return
    for row, document in enumerate(source.documents()):
        yield _place(number, 0, row), as_document(document)


def _place(number: int, file: int, row: int) -> str:
    return f"{number:05d}/{file:08d}/{row:012d}"


def _kept(self: Any, row: Row) -> dict[str, Any]:
    names = ("part", "level", "source", "shard")
    return {"text": row.text, "id": row.id, **{name: row.metadata.get(name) for name in names}}


def _dropped(self: Any, row: Row) -> dict[str, Any]:
    metadata = row.metadata
    return {"text": row.text, "id": row.id, "source": metadata["source"], "reason": metadata["filter_reason"]}


def _writer(folder: Path, name: str = "${rank}.parquet") -> ParquetWriter:
    return ParquetWriter(str(folder), output_filename=name, adapter=_kept, schema=KEPT)


def _rows(folder: Path) -> list[Row]:
    """All rows below a folder, by their places."""
    rows = ParquetReader(str(folder))() if any(folder.rglob("*.parquet")) else []
    return sorted(rows, key=lambda row: row.id)


class ReadSource(PipelineStep):
    """A task's share of the source; validation documents go to a folder of their own, untouched."""

    type, name = "📖 - READER", "source"

    def __init__(self, source: Source, val_fraction: float, held_out: Path) -> None:
        super().__init__()
        self.source, self.val_fraction, self.held_out = source, val_fraction, held_out

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        """The training documents, as rows."""
        with _writer(self.held_out) as writer:
            for place, number, document in shard_of(self.source, rank, world_size):
                metadata = {"part": number, "level": document.level, "source": document.source, "shard": f"{rank:05d}"}
                row = Row(document.text, place, metadata=metadata)
                if is_held_out(document.text, self.val_fraction):
                    writer.write(row, rank)
                else:
                    yield row


class FilterStep(BaseFilter):
    """One filter as a step of datatrove: what it drops is written with the reason, what it did is added up.

    Args:
        one: the filter.
        examples: documents left out that the account shows.
        accounts: folder with what it did in each task.
        dropped: folder with what it left out in each task.
    """

    def __init__(self, one: DocumentFilter | CorpusFilter, examples: int, accounts: Path, dropped: Path) -> None:
        writer = ParquetWriter(str(dropped), output_filename="${rank}.parquet", adapter=_dropped, schema=DROPPED)
        super().__init__(exclusion_writer=writer)
        self.one, self.examples, self.accounts = one, examples, accounts
        self.name = one.name
        self.account = Account(one.name)

    def filter(self, doc: Row) -> bool | tuple[bool, str]:
        """Judge or rewrite one row."""
        assert isinstance(self.one, DocumentFilter)
        measured = doc.metadata.pop(MEASURED, None) or Measured(doc.text)
        start = time.process_time()
        after = self.one(measured)
        self.account.seconds += time.process_time() - start
        return self._enter(doc, measured, after)

    def _enter(self, doc: Row, measured: Measured, after: str | Drop) -> bool | tuple[bool, str]:
        before = Document(doc.text, doc.metadata["source"])
        self.account.note(before, text_bytes(doc.text), after, self.examples)
        if isinstance(after, Drop):
            return False, after.reason
        doc.metadata[MEASURED] = measured if after is doc.text else Measured(after)
        doc.text = after
        return True

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        """Rows that are kept."""
        self.account = Account(self.one.name)
        yield from super().run(data, rank, world_size)
        self.accounts.mkdir(parents=True, exist_ok=True)
        (self.accounts / f"{rank:05d}.json").write_text(json.dumps(vars(self.account)))


class CompareStep(FilterStep):
    """A filter that compares documents: it sees all rows that are left at once, in order, in the memory of one task."""

    def __init__(self, one: CorpusFilter, examples: int, accounts: Path, dropped: Path, held_out: Path) -> None:
        super().__init__(one, examples, accounts, dropped)
        self.held_out, self.batch_size = held_out, sys.maxsize

    def filter_batch(self, batch: list[Row]) -> list[bool | tuple[bool, str]]:
        """Judge all rows."""
        assert isinstance(self.one, CorpusFilter)
        measured = [row.metadata.pop(MEASURED, None) or Measured(row.text) for row in batch]
        against = [Measured(row.text) for row in _rows(self.held_out)]
        start = time.process_time()
        verdicts = self.one.verdicts(measured, against)
        self.account.seconds += time.process_time() - start
        triples = zip(batch, measured, verdicts, strict=True)
        return [self._enter(row, known, verdict or row.text) for row, known, verdict in triples]


class SortRows(PipelineStep):
    """All rows in the order of the source."""

    type, name = "📖 - READER", "by place"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        """Every row of the folder."""
        yield from _rows(self.folder)


@dataclass(frozen=True)
class Job:
    """A curation to be run in stages.

    Args:
        source: what is curated.
        config: how.
        val_fraction: share of validation, held out by the hash of the content.
        cache_dir: folder of prepared corpora, where the result goes.
        out: folder of the stages' files: what is left after each, what was dropped and why, logs.
        tasks: parts that the work on single documents is divided into.
    """

    source: Source
    config: CurationConfig
    val_fraction: float
    cache_dir: Path
    out: Path
    tasks: int

    @property
    def folder(self) -> Path:
        """Where the result will be."""
        key = curation_key(self.source, self.val_fraction, "hash")
        return curated_folder(key, self.config, str(self.cache_dir))

    def stages(self) -> list[tuple[str, list[PipelineStep], int]]:
        """Name, steps and number of tasks of each stage, each of which needs the one before it."""
        held_out, stages = self.out / "held_out", []
        filters = list(enumerate(self.config.chosen()))
        before: Path | None = None
        for alone, group in groupby(filters, key=lambda pair: isinstance(pair[1], DocumentFilter)):
            if before is None and not alone:  # the source is always read in all tasks
                before = self.out / "kept" / "source"
                stages.append(
                    ("source", [ReadSource(self.source, self.val_fraction, held_out), _writer(before)], self.tasks)
                )
            members: list[tuple[int, Any]] = list(group)
            name = "-".join(f"{k:02d}" for k in (members[0][0], members[-1][0])) + ("-alone" if alone else "-compared")
            steps: list[PipelineStep] = []
            if before is None:
                steps.append(ReadSource(self.source, self.val_fraction, held_out))
            else:
                steps.append(ParquetReader(str(before)) if alone else SortRows(before))
            for k, one in members:
                label = f"{k:02d}-{one.name}"
                folders = self.out / "accounts" / label, self.out / "dropped" / label
                if alone:
                    steps.append(FilterStep(one, self.config.examples, *folders))
                else:
                    steps.append(CompareStep(one, self.config.examples, *folders, held_out))
            before = self.out / "kept" / name
            # After a comparison the rows go back into as many files, so that the next stage can share them out.
            stages.append((name, [*steps, _writer(before, "${shard}.parquet")], self.tasks if alone else 1))
        assert before is not None
        stages.append(("collect", [Collect(self, before)], 1))
        return stages

    def check(self) -> None:
        """Write down what the folder is for.

        Raises:
            UserError: it already holds stages of something else, which would be taken for this one's.
        """
        definition = json.dumps({"result": self.folder.name, "tasks": self.tasks})
        file = self.out / "definition.json"
        if file.is_file():
            if file.read_text() != definition:
                raise UserError(f"out: {self.out} holds another curation, or one in other tasks; choose a new folder")
            return
        if self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"out: {self.out} is not empty; choose a new folder")
        self.out.mkdir(parents=True, exist_ok=True)
        file.write_text(definition)

    def run_local(self, workers: int) -> None:
        """All stages on this machine; stages and tasks that are complete are not done again.

        Raises:
            UserError: of a filter or the source; nothing is left; a folder cannot be written.
        """
        self.check()
        logger.disable("datatrove")  # its lines about each task; failures are raised here anyway
        for name, steps, tasks in self.stages():
            log.info("%s: %d tasks", name, tasks)
            executor = LocalPipelineExecutor(
                steps,
                tasks=tasks,
                workers=min(workers, tasks),
                logging_dir=str(self.out / "logs" / name),
                start_method="fork" if sys.platform == "linux" else "spawn",
                skip_completed=name != "collect",  # it looks itself, in the cache, from which its work may be gone
            )
            try:
                executor.run()
            except OSError as error:
                raise UserError(f"out: cannot write {self.out}: {error.strerror or error}") from None
            if name != "collect" and not any((self.out / "kept").rglob("*.parquet")):
                raise UserError(f"data.curation: nothing is left after {name}; see {self.out / 'dropped'}")

    def submit(self, **slurm: Any) -> list[str]:
        """Submit all stages to Slurm, each after the one before; gives the jobs' ids.

        Args:
            slurm: arguments of datatrove's SlurmPipelineExecutor.
        """
        self.check()
        executor: SlurmPipelineExecutor | None = None
        jobs = []
        for name, steps, tasks in self.stages():
            executor = SlurmPipelineExecutor(
                steps,
                tasks=tasks,
                depends=executor,
                job_name=f"curate-{name}",
                logging_dir=str(self.out / "logs" / name),
                skip_completed=name != "collect",
                env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
                **slurm,
            )
            executor.run()
            jobs.append(str(executor.job_id))
        return [job for job in jobs if job != "-1"]  # -1: it was complete


class Collect(PipelineStep):
    """What is left and the account of all tasks, as the run's data preparation looks for them.

    The seconds charged to runs are those of the filters, summed over tasks: what one core would need.
    """

    type, name = "💽 - WRITER", "collect"

    def __init__(self, job: Job, kept: Path) -> None:
        super().__init__()
        self.job, self.kept = job, kept

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Row]:
        """Nothing goes on from here."""
        job = self.job
        rows = {row.id: row for row in _rows(self.kept)}
        documents: list[Document] = []
        part_of: list[int] = []
        kept: list[int] = []
        for place, number, document in shard_of(job.source, 0, 1):
            if not is_held_out(document.text, job.val_fraction):
                if place in rows:
                    kept.append(len(documents))
                documents.append(document)
                part_of.append(number)
        left = [Document(row.text, row.metadata["source"], row.metadata["level"]) for row in rows.values()]
        accounts = self._accounts()
        curated = Curated(left, kept, accounts, sum(account.seconds for account in accounts))
        names = [part.called for part in job.source.parts()]
        if not (job.folder / "documents.parquet").is_file():
            write_curated(job.folder, names, documents, part_of, curated, job.config)
        yield from ()

    def _accounts(self) -> list[Account]:
        result = []
        for k, one in enumerate(self.job.config.chosen()):
            account = Account(one.name)
            for file in sorted((self.job.out / "accounts" / f"{k:02d}-{one.name}").glob("*.json")):
                values = json.loads(file.read_text())
                counters = {name: Counter(values[name]) for name in ("reasons", "dropped_by_source")}
                account.add(Account(**(values | counters)), self.job.config.examples)
            result.append(account)
        return result
