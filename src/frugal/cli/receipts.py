"""The verb that gathers finished savings studies."""

from __future__ import annotations


def receipts(studies: list[str], out: str = "receipts", json: bool = False) -> None:
    """Gather finished savings studies: every technique in one table and one picture, what saves most first.

    Args:
        studies: results that `frugal savings` wrote (NAME.json), or folders that hold them, such as runs/studies.
        out: where to write: OUT.md and OUT.png.
        json: print the results as JSON and write nothing.
    """
    from json import dumps
    from pathlib import Path

    from frugal.errors import UserError
    from frugal.tracking.receipts import as_tree, read_results, receipts_figure, receipts_table, techniques

    results = read_results(studies)
    if json:
        print(dumps([as_tree(result) for result in results], indent=1))
        return
    if not techniques(results):
        raise UserError(f"studies: nothing in {', '.join(studies)} that can be compared yet")
    table = receipts_table(results)
    try:
        Path(f"{out}.md").write_text(
            "# Receipts\n\nCost to reach the target, as a multiple of the baseline's; 95% intervals over "
            f"paired seeds.\n\n![ratios of costs]({Path(out).name}.png)\n\n{table}",
            encoding="utf-8",
        )
        receipts_figure(results).savefig(f"{out}.png")
    except OSError as error:
        raise UserError(f"out: cannot write {out}.md ({error.strerror})") from None
    print(table)
    print(f"written to {out}.md, {out}.png")
