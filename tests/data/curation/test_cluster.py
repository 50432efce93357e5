import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from frugal.cli.verbs import main
from frugal.data.curation.base import DocumentFilter, Measured
from frugal.data.curation.cluster import Job, shard_of
from frugal.data.curation.duplicates import Contamination, ExactDuplicates, NearDuplicates
from frugal.data.curation.normalise import NormaliseUnicode, StripHtml
from frugal.data.curation.pii import MaskPII
from frugal.data.curation.pipeline import CurationConfig
from frugal.data.curation.quality import GopherQuality, Length
from frugal.data.packing import prepare
from frugal.data.sources import KingJames, LocalText, Mixture, WeightedSource
from frugal.data.tokenization import TokenizerConfig
from frugal.errors import UserError

MIXED = [NormaliseUnicode(), StripHtml(), ExactDuplicates(), Length(200), GopherQuality(), MaskPII()]
COMPARED_LAST = [Length(200), MaskPII(), NearDuplicates(), Contamination()]


@pytest.fixture
def source(tmp_path: Path) -> Mixture:
    """Chapters in six files and one, with copies, markup, addresses and documents too short."""
    folder = tmp_path / "texts"
    folder.mkdir()
    chapters = list(KingJames().documents())[:140]
    for i in range(6):
        texts = [*chapters[20 * i : 20 * i + 22], "short", f"<p>{chapters[i]}</p>", f"write to a{i}@example.org " * 20]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{i}.jsonl").write_text("\n".join(lines))
    (tmp_path / "more.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in chapters[100:]))
    return Mixture(
        [
            WeightedSource(LocalText(str(folder)), 1.0, "texts"),
            WeightedSource(LocalText(str(tmp_path / "more.jsonl")), 1.0, "more"),
        ]
    )


def result(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """Rows, and the report without what depends on the clock or on the order of tasks."""
    report = json.loads((folder / "curation.json").read_text())
    for key in ("seconds", "core_seconds", "mb_per_second_and_core"):
        report.pop(key)
    for row in report["filters"]:
        for key in ("seconds", "mb_per_second", "examples"):
            row.pop(key)
    return pq.read_table(folder / "documents.parquet").to_pylist(), report


def job(source: Mixture, filters: list[Any], out: Path, tasks: int) -> Job:
    return Job(source, CurationConfig(filters=filters), 0.2, out / "cache", out / "stages", tasks)


@pytest.mark.parametrize(("filters", "tasks"), [(MIXED, 4), (COMPARED_LAST, 3), (COMPARED_LAST[2:] + MIXED, 9)])
def test_equals_what_one_process_makes(tmp_path: Path, source: Mixture, filters: list[Any], tasks: int) -> None:
    config, cache = CurationConfig(filters=filters), tmp_path / "here"
    prepare(source, TokenizerConfig(300), 0.2, str(cache), "hash", config)
    cluster = job(source, filters, tmp_path, tasks)
    cluster.run_local(workers=1)
    (here,) = cache.glob("curated-*")
    assert here.name == cluster.folder.name
    rows, report = result(cluster.folder)
    assert (rows, report) == result(here)
    assert 20 < len(rows) < 200 and report["documents_out"] == len(rows)
    # Every document left out is there with its reason.
    dropped = [
        row["reason"]
        for file in (tmp_path / "stages/dropped").rglob("*.parquet")
        for row in pq.read_table(file).to_pylist()
    ]
    assert len(dropped) == report["documents_in"] - report["documents_out"] > 20
    assert sorted(dropped) == sorted(
        r for row in report["filters"] for r, n in row["reasons"].items() for _ in range(n)
    )
    # A run finds it: nothing is curated again, and its seconds are charged.
    made = prepare(source, TokenizerConfig(300), 0.2, str(cluster.cache_dir), "hash", config)
    assert (
        made.meta["seconds_by_stage"]["curation"] == json.loads((made.folder / "curation.json").read_text())["seconds"]
    )
    assert made.train_bytes == sum(len(row["text"].encode()) for row in rows)


@pytest.mark.parametrize("world_size", [1, 2, 4, 9])
def test_shards_are_the_source(source: Mixture, world_size: int) -> None:
    shards = [list(shard_of(source, rank, world_size)) for rank in range(world_size)]
    documents = [
        document for _, _, document in sorted((row for shard in shards for row in shard), key=lambda row: row[0])
    ]
    assert documents == list(source.documents())
    assert all(shards)


class FailsOnce(DocumentFilter):
    """The disk is full until a file appears."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __call__(self, document: Measured) -> str:
        if "Genesis 30" in document.text and not Path(self.file).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return document.text


def test_goes_on_where_it_stopped(tmp_path: Path, source: Mixture) -> None:
    cluster = job(source, [FailsOnce(str(tmp_path / "space")), ExactDuplicates()], tmp_path, 4)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        cluster.run_local(workers=1)
    assert not cluster.folder.exists()
    done = sorted((tmp_path / "stages/logs/00-00-alone/completions").iterdir())
    assert [file.name for file in done] == ["00000"]  # the second file has the fatal chapter
    before = (tmp_path / "stages/kept/00-00-alone/000_00000.parquet").stat().st_mtime_ns
    (tmp_path / "space").touch()
    cluster.run_local(workers=1)
    assert (tmp_path / "stages/kept/00-00-alone/000_00000.parquet").stat().st_mtime_ns == before
    rows, report = result(cluster.folder)
    again = job(source, [FailsOnce(str(tmp_path / "space")), ExactDuplicates()], tmp_path / "whole", 4)
    again.run_local(workers=1)
    assert result(again.folder) == (rows, report)


def test_a_folder_of_another_curation_is_refused(tmp_path: Path, source: Mixture) -> None:
    job(source, [Length(200)], tmp_path, 2).run_local(workers=1)
    for other in (job(source, [Length(300)], tmp_path, 2), job(source, [Length(200)], tmp_path, 3)):
        with pytest.raises(UserError, match="holds another curation"):
            other.run_local(workers=1)
    with pytest.raises(UserError, match="not empty"):
        Job(source, CurationConfig(), 0.2, tmp_path, tmp_path, 2).check()
    with pytest.raises(UserError, match="nothing is left after 00-00-alone"):
        job(source, [Length(10**6)], tmp_path / "x", 2).run_local(workers=1)


SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
number = len(os.listdir("{jobs}")) + 1
open(f"{jobs}/{{number}}", "w").write(" ".join(sys.argv[1:-1]) + chr(10) + script)
last = re.search(r"--array=0-(\\d+)", script)
for task in range(int(last[1]) + 1 if last and "merge_stats" not in script else 0):
    subprocess.run(["bash", sys.argv[-1]], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env={{**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here"}})
print("Submitted batch job", number)
"""


@pytest.mark.slow
def test_slurm_jobs_depend_on_each_other(
    tmp_path: Path, source: Mixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for sbatch runs each array at once: what is submitted works, in the order of its dependencies."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    commands = {
        "sbatch": SBATCH.format(python=sys.executable, jobs=tmp_path / "jobs"),
        "srun": '#!/bin/bash\nshift 3\nexec "$@"\n',  # -l -n 1
        "scontrol": "#!/bin/bash\necho here\n",
    }
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    (tmp_path / "config.yaml").write_text(
        f"""
data:
  source: {{class_path: frugal.data.sources.LocalText, init_args: {{path: {tmp_path}/texts}}}}
  split: hash
  val_fraction: 0.2
  cache_dir: {tmp_path}/cache
  curation:
    filters:
      - {{class_path: frugal.data.curation.quality.Length, init_args: {{min_bytes: 200}}}}
      - {{class_path: frugal.data.curation.duplicates.ExactDuplicates}}
"""
    )
    out = tmp_path / "out"
    main(["curate", f"{tmp_path}/config.yaml", str(out), "--executor", "slurm", "--tasks", "2", "--partition", "long"])
    printed = capsys.readouterr().out
    jobs = [file.read_text() for file in sorted((tmp_path / "jobs").iterdir(), key=lambda file: int(file.name))]
    arrays = {i: text for i, text in enumerate(jobs, 1) if "merge_stats" not in text}
    assert len(arrays) == 3 and "submitted jobs " + ", ".join(map(str, arrays)) in printed
    first, second, third = arrays
    assert "--dependency" not in arrays[first].split("\n")[0]
    assert f"--dependency=afterok:{first}" in arrays[second] and f"--dependency=afterok:{second}" in arrays[third]
    assert all("#SBATCH --partition=long" in text for text in arrays.values())
    (folder,) = (tmp_path / "cache").glob("curated-*")
    filters = [Length(200), ExactDuplicates()]
    local = Job(
        LocalText(f"{tmp_path}/texts"), CurationConfig(filters=filters), 0.2, tmp_path / "c2", tmp_path / "o2", 5
    )
    local.run_local(workers=1)
    assert local.folder.name == folder.name and result(local.folder) == result(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.split", "position"], "data.split: many tasks need hash"),
        (["--tasks", "0"], "tasks: must be positive"),
        (["--executor", "slurm"], "partition: slurm needs one"),
        (["no curation"], "has no data.curation"),
    ],
)
def test_what_it_cannot_do(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = "position" if "--data.split" in arguments else "hash"
    curation = "" if "no curation" in arguments else "  curation: {}\n"
    (tmp_path / "config.yaml").write_text(f"data:\n  split: {split}\n{curation}")
    rest = [word for word in arguments if word not in ("--data.split", "position", "no curation")]
    with pytest.raises(SystemExit) as ended:
        main(["curate", f"{tmp_path}/config.yaml", f"{tmp_path}/out", *rest])
    assert ended.value.code == 2 and message in capsys.readouterr().err
