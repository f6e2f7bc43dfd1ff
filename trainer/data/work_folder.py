"""The folder of a build: claimed by one process, cleared or gone on with, and its shards put in their places."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from officina.trainer.data import manifest
from officina.trainer.data.chat import CHAT_TEMPLATE
from officina.trainer.data.manifest import MANIFEST, WORK, ShardEntry, sync_folder, write_whole
from officina.trainer.data.packing import FOLDER as PLANS
from officina.trainer.data.parts import TRAIN, VALIDATION, Segment
from officina.trainer.data.removal import FOLDER as REMOVED
from officina.trainer.data.shards import Shard
from officina.trainer.errors import DataError

PLAN = "plan.json"
"""In the work folder: all that the result depends on. While it is there, the build is not finished."""


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Be the one build in `folder`, which is made."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(manifest.claimed(folder))
        except OSError as exc:
            raise DataError(f"{folder}: cannot be made ({exc.strerror}). Name a folder that you may write.") from exc
        yield


@contextlib.contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """Raise DataError where no more bytes or files can be written, or a quota is used up."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"{folder}: the build stopped ({exc.strerror}). What is finished is kept: make room there, and the "
                        "same command goes on with it.") from exc


def prepare(folder: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Go on with an unfinished build of the same, or clear the folder: first the manifest, then the rest."""
    stands, file = (folder / MANIFEST).exists(), folder / WORK / PLAN
    if stands and not file.exists() and not overwrite:
        finish(folder)  # another process built it between this one's first look and its claim
        raise DataError(told_of_data_set(folder))
    if stands and (lists := sorted(f"{REMOVED}/{path.name}" for path in (folder / REMOVED).glob("*.jsonl"))):
        raise DataError(f"{folder}: documents were removed from it on request ({', '.join(lists)}), and a build from the same "
                        "inputs would bring them back. Build into another folder, from inputs without them.")
    if file.exists():
        before = json.loads(file.read_bytes())
        differing = [key for key in plan if before.get(key) != json.loads(json.dumps(plan[key]))]
        if not differing and not (stands and overwrite):
            (folder / MANIFEST).unlink(missing_ok=True)  # it was written, but not what comes after it
            return
        if not overwrite and (stands or any((folder / WORK).glob("part-*.json"))):
            raise DataError(f"{folder} holds an unfinished build with other {', '.join(differing)}. Give the same words to go "
                            "on with it, or discard it with --overwrite.")
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in (folder / WORK).iterdir():
        if path.name != "claim":
            path.unlink()
    (folder / "shards").mkdir(exist_ok=True)
    for path in [*(folder / "shards").glob("*.dls*"), *(folder / "removed").glob("*"), *(folder / PLANS).glob("*"),
                 *folder.glob(CHAT_TEMPLATE)]:
        path.unlink()
    write_whole(file, json.dumps(plan, indent=1).encode())


def finish(folder: Path) -> None:
    """Remove the work folder, the plan first: without it nobody goes on with a build that is done."""
    (folder / WORK / PLAN).unlink(missing_ok=True)
    sync_folder(folder / WORK)
    shutil.rmtree(folder / WORK)


def told_of_data_set(folder: Path) -> str:
    """That there is one already."""
    return (f"{folder} holds a data set already. Show it with `officina data inspect {folder}`, build into another folder, or "
            "replace it with --overwrite.")


def place_shards(folder: Path, done: Sequence[list[Segment]]) -> list[ShardEntry]:
    """Give every shard its final name; done again after an interruption, it finds them there."""
    entries = []
    for split in (TRAIN, VALIDATION):
        of_split = [entry for segments in done for segment in segments for entry in segment.shards if entry.split == split]
        for number, entry in enumerate(of_split):
            placed = replace(entry, path=f"shards/{split}-{number:05d}.dls")
            if (folder / WORK / entry.path).exists():
                os.replace(folder / WORK / entry.path, folder / placed.path)
            Shard(folder / placed.path, placed)  # raises if it is another one, or none
            entries.append(placed)
    sync_folder(folder / "shards")
    return entries
