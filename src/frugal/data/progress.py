"""A bar for what takes long before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float | None], None]]:
    """A bar on the terminal's error stream, moved by (what is at work, the share done); nothing without a terminal.

    A share of None says that nobody knows how much there is.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=1.0)

        def show(name: str, share: float | None) -> None:
            title = name if len(name) < 40 else f"{name[:37]}..."
            bar.update(task, description=title, completed=share or 0.0, total=None if share is None else 1.0)

        yield show
