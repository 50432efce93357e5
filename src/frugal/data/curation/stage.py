"""Curation as a stage of preparing a corpus: between the split and the tokenizer, cached on its own."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from frugal.data.cache import new_folder
from frugal.data.curation.pipeline import Curated, CurationConfig, curate
from frugal.data.curation.report import build_report, write_report
from frugal.data.documents import Document
from frugal.data.progress import progress_bar
from frugal.errors import UserError

log = logging.getLogger(__name__)
REPORT_FILES = ("curation.json", "curation.md", "curation.png")


def curated_parts(
    names: Sequence[str],
    train: Sequence[list[Document]],
    held_out: Sequence[Document],
    config: CurationConfig,
    key: str,
    cache_dir: str,
) -> tuple[list[list[Document]], Path]:
    """What curation leaves of each source's training documents, and the folder with the report.

    Another tokenizer does not curate again: the folder's name depends on what is curated and how alone.

    Args:
        names: of the sources.
        train: their training documents.
        held_out: the validation documents of all sources, as they are and stay.
        key: hash of everything that `train` and `held_out` depend on.
        cache_dir: folder of prepared corpora.

    Raises:
        UserError: nothing is left of a source.
    """
    folder = curated_folder(key, config, cache_dir)
    if not (folder / "documents.parquet").is_file():
        documents = [
            replace(document, source=name) for name, part in zip(names, train, strict=True) for document in part
        ]
        part_of = [i for i, part in enumerate(train) for _ in part]
        with progress_bar() as progress:
            curated = curate(documents, held_out, config, progress)
        write_curated(folder, names, documents, part_of, curated, config)
    result: list[list[Document]] = [[] for _ in names]
    table = pq.read_table(folder / "documents.parquet")
    for text, level, part in zip(*(table[name].to_pylist() for name in ("text", "level", "part")), strict=True):
        result[part].append(Document(text, names[part], level))
    return result, folder


def curated_folder(key: str, config: CurationConfig, cache_dir: str) -> Path:
    """Where the result lies; the arguments are those of `curated_parts`."""
    digest = hashlib.sha256(f"{key} {config.fingerprint()}".encode()).hexdigest()
    return Path(cache_dir).expanduser() / f"curated-{digest[:16]}"


def write_curated(
    folder: Path,
    names: Sequence[str],
    documents: Sequence[Document],
    part_of: Sequence[int],
    curated: Curated,
    config: CurationConfig,
) -> None:
    """Write the report and what is kept, so that the folder appears whole or not at all.

    Args:
        folder: of `curated_folder`.
        names: of the sources.
        documents: all that were curated, in order.
        part_of: which source each of them is from.
        curated: what became of them.

    Raises:
        UserError: nothing is left of a source, or the folder cannot be written.
    """
    report = build_report(documents, curated, config.terms)
    parts = [part_of[i] for i in curated.kept]
    left = set(parts)
    for i, name in enumerate(names):
        if i not in left:
            raise UserError(f"data.curation: nothing is left of source {name} ({list(part_of).count(i)} documents)")
    with new_folder(folder, "documents.parquet") as temporary:
        write_report(report, temporary)
        columns = {
            "text": pa.array([document.text for document in curated.documents], pa.large_string()),
            "level": pa.array([document.level for document in curated.documents], pa.int16()),
            "part": pa.array(parts, pa.int32()),
        }
        pq.write_table(pa.table(columns), temporary / "documents.parquet")
    log.info(
        "curated %s of %s documents, %.1f of %.1f MB are kept, %.1f s; see %s",
        f"{report['documents_out']:,}",
        f"{report['documents_in']:,}",
        report["bytes_out"] / 1e6,
        report["bytes_in"] / 1e6,
        report["seconds"],
        folder / "curation.md",
    )


def curation_seconds(folder: Path) -> float:
    """What a curation took, by the clock."""
    return float(json.loads((folder / "curation.json").read_text(encoding="utf-8"))["seconds"])
