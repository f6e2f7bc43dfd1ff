"""Which checkpoints a run keeps, and how directories make way for each other. No torch here."""

import os
from collections.abc import Iterable
from pathlib import Path

from officina.trainer.checkpoint.disk import remove_checkpoint, sync_dir
from officina.trainer.checkpoint.layout import (
    COMMIT,
    Unreadable,
    checkpoints_dir,
    parse_step_dir,
    read_commit,
    step_dir,
)


def superseded(steps: Iterable[int], newest: int, *, keep_last: int, keep_every: int) -> list[int]:
    """Of the committed `steps`, those to remove now that `newest` is committed, oldest first.

    Kept are `newest`, the keep_last - 1 steps before it, and multiples of keep_every. Steps beyond `newest` belong to
    nobody's past (an earlier run came further) and are left alone.
    """
    older = sorted(s for s in set(steps) if s < newest)
    kept = set(older[-(keep_last - 1):] if keep_last > 1 else [])
    return [s for s in older if s not in kept and not (keep_every and s % keep_every == 0)]


def committed_steps(run_dir: Path) -> list[int]:
    """Steps with a directory that holds a valid COMMIT, its own or that of a step that was being written anew (`.old`)."""
    steps = []
    for path in checkpoints_dir(run_dir).iterdir():
        parsed = parse_step_dir(path.name)
        if parsed and parsed[1] in ("", ".old"):
            try:
                steps.append(read_commit(path).step)
            except (Unreadable, OSError):
                continue
    return steps


def tidy(run_dir: Path, newest: int, *, keep_last: int, keep_every: int) -> str | None:
    """Remove what `newest` supersedes. Returns what could not be removed and why, or None."""
    problems = []
    steps = superseded(committed_steps(run_dir), newest, keep_last=keep_last, keep_every=keep_every)
    gone = [path for s in steps for path in (step_dir(run_dir, s), old_dir(step_dir(run_dir, s)))]
    for path in [old_dir(step_dir(run_dir, newest)), *gone]:
        try:
            if os.path.lexists(path):
                remove_checkpoint(path)
        except OSError as e:
            problems.append(f"{path} is superseded and could not be removed: {e.strerror or e}")
    return "; ".join(problems) or None


def clear_leftovers(run_dir: Path, damaged: Iterable[Path]) -> None:
    """Before a process's first save: set aside what was found damaged, remove what was never finished."""
    for path in damaged:
        if path.exists():
            set_aside(path)
    for path in list(checkpoints_dir(run_dir).iterdir()):
        parsed = parse_step_dir(path.name)
        if not parsed or not path.is_dir():
            continue
        unfinished = not (path / COMMIT).exists() and not parsed[1].startswith(".damaged")
        replaced = parsed[1] == ".old" and (step_dir(run_dir, parsed[0]) / COMMIT).exists()
        if unfinished or replaced:
            remove_checkpoint(path)


def old_dir(directory: Path) -> Path:
    """Where a whole checkpoint of the same step waits until the new one is committed; a reader counts it too."""
    return directory.with_name(directory.name + ".old")


def set_aside(directory: Path) -> Path:
    """Rename a damaged checkpoint to a name that is never loaded."""
    target, n = directory.with_name(directory.name.removesuffix(".old") + ".damaged"), 1
    while target.exists():
        n += 1
        target = target.with_name(f"{target.name.split('.')[0]}.damaged-{n}")
    directory.rename(target)
    sync_dir(directory.parent)
    return target


def make_way(directory: Path, whole: bool) -> None:
    """A committed checkpoint of the step that is about to be saved again: keep it as `.old`, or set it aside."""
    if not whole:
        set_aside(directory)
        return
    old = old_dir(directory)
    if os.path.lexists(old):
        remove_checkpoint(old)
    directory.rename(old)
    sync_dir(directory.parent)


def undo(directory: Path) -> None:
    """Remove a save that failed and put back the checkpoint that had made way for it."""
    if os.path.lexists(directory):
        remove_checkpoint(directory)
    if old_dir(directory).exists():
        old_dir(directory).rename(directory)
    sync_dir(directory.parent)
