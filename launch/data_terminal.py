"""What the commands of `officina data` share: arguments, tables, progress bars. No torch."""

import argparse
import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from officina.trainer.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NAMES = ("split", "source", "shard", "language", "licence", "document id")
"""Columns that are set to the left."""
_NOT_WRITTEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR)
OWN_COPY = "Make room, ask the owner of the data set, or work on a copy of your own: officina data stage DATASET DIR"
LINE_EVERY_S = 60.0
"""Between two lines of progress where there is no terminal."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, what: str,
               examples: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    return subparsers.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".",
                                 epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)


def writing(command: Callable[[argparse.Namespace], int], remedy: str) -> Callable[[argparse.Namespace], int]:
    """`command`, which writes; where it may not, or there is no room, that is said with the remedy."""
    def told(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except OSError as exc:
            if exc.errno not in _NOT_WRITTEN:
                raise
            raise DataError(f"{exc.filename or args.folder}: {exc.strerror}. {remedy}") from exc
    return told


def count(text: str) -> int:
    """A number as people write it, such as 512k."""
    from officina.trainer.quantities import parse_count

    try:
        number = int(parse_count(text))  # type: ignore[call-overload]
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: {exc}") from exc
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative; write for example 4")
    return number


def share(text: str) -> float:
    """A number from 0 to below 1."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to below 1; write for example 0.05")
    return found


def console() -> "Console":
    """Where results go, as they are: names and texts of data may look like markup."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def table(*columns: str) -> "Table":
    """An empty table."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="left" if name in _NAMES else "right")
    return made


def size(n_bytes: int) -> str:
    """Bytes as people read them."""
    from rich.filesize import decimal

    return decimal(n_bytes)


@contextmanager
def progress(console: "Console", phases: dict[str, str], unit: str = "bytes") -> Iterator[Callable[[str, int, int], None]]:
    """A bar per phase with rate and time left; in a log, a line now and then. Calls with a total of 0 show that something
    goes on, without an end."""
    if not console.is_terminal:
        yield _lines(console, phases, unit)
        return
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    steps = TextColumn("{task.completed}/{task.total} steps")
    rate: ProgressColumn = TransferSpeedColumn() if unit == "bytes" else steps
    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(TextColumn("{task.description}", markup=False), BarColumn(), rate, remaining,
                  console=console) as bars:
        tasks = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phases[phase], total=total or None)
            bars.update(tasks[phase], completed=done)

        yield report
        for task in tasks.values():  # a phase without a known end is done when the next one is
            if bars.tasks[task].total is None:
                bars.update(task, total=1, completed=1)


def _lines(console: "Console", phases: dict[str, str], unit: str) -> Callable[[str, int, int], None]:
    """For the log of a job: how far the phase is, its rate and the time left, once every `LINE_EVERY_S`."""
    begun: dict[str, tuple[float, int]] = {}
    last_s = time.monotonic()

    def report(phase: str, done: int, total: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        begun_s, first = begun.setdefault(phase, (now_s, done))
        if now_s - last_s < LINE_EVERY_S:
            return
        last_s = now_s
        rate = (done - first) / max(now_s - begun_s, 1e-9)
        shown = size if unit == "bytes" else lambda n: f"{n:,} {unit}"
        words = [phases[phase]]
        if total:
            words.append(f"{shown(done)} of {shown(total)}")
        if rate > 0:
            words.append(f"{shown(round(rate))}/s")
        if total and rate > 0:
            words.append(f"{timedelta(seconds=round((total - done) / rate))} left")
        console.print(" · ".join(words))

    return report
