"""Removal requests: documents whose tokens give no loss and are never shown to a model again, with the order unchanged.

A list, DATASET/removed/00001.jsonl, names documents by shard and number, one line per shard:

    {"shard":"shards/train-00003.dls","documents":[12,99],"ids":["9f...","07..."]}

Lists are added, never changed: dataset.json counts them, and a run's ledger says how many were in force, so that steps
before and after a request can both be audited. Shards and fingerprint stay, and with them every run's order and position.
To delete the tokens themselves, build the data set anew without the documents.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from officina.trainer.data.documents import document_id
from officina.trainer.data.manifest import MANIFEST, Dataset, Removal, ShardEntry, claimed, rewrite_manifest, write_whole
from officina.trainer.data.remote import open_whole
from officina.trainer.data.shards import Shard
from officina.trainer.errors import DataError

FOLDER = "removed"


@dataclass(frozen=True, slots=True)
class RemovalReport:
    """What a request removed."""

    documents: int
    tokens: int
    before: int
    """Documents of the request that had been removed before."""
    missing: list[str]
    """Lines of the request that name no document of the data set."""


def remove(folder: str | Path, names: Iterable[str]) -> RemovalReport:
    """Remove documents from the data set: by their ids, as the inputs gave them or as 32 hexadecimal digits, or by
    SHARD:NUMBER as `officina data inspect` shows them. Raises DataError if none of them is found.

    A list that lies there and that dataset.json does not name, since it was killed before it or is an older copy, is heeded
    again from then on."""
    wanted = [name.strip() for name in names if name.strip()]
    dataset = open_whole(folder)
    with claimed(dataset.folder):
        return _remove(_with_all_lists(open_whole(folder)), wanted)


def _remove(dataset: Dataset, wanted: list[str]) -> RemovalReport:
    folder = dataset.folder
    found, missing = _find(dataset, wanted)
    gone = removed_documents(dataset)
    before = tokens = 0
    lines: list[dict[str, Any]] = []
    for entry in dataset.shards:
        numbers = np.asarray(sorted(found.get(entry.path, ())), np.int64)
        again = np.isin(numbers, gone.get(entry.path, np.empty(0, np.int64)))
        before, numbers = before + int(again.sum()), numbers[~again]
        if len(numbers):
            shard = Shard(dataset.folder / entry.path, entry)
            tokens += int(np.sum(np.diff(shard.ends, prepend=0)[numbers]))
            ids = [shard.document_ids[n].tobytes().hex() for n in numbers] if len(shard.document_ids) else []
            lines.append({"shard": entry.path, "documents": numbers.tolist(), "ids": ids})
    documents = sum(len(line["documents"]) for line in lines)
    if not documents and not before:
        raise DataError(f"{folder}: has none of the {len(wanted)} documents, such as {', '.join(wanted[:3]) or '(no line)'}. "
                        "A line is an id as the inputs gave it, 32 hexadecimal digits, or SHARD:NUMBER such as "
                        f"{dataset.shards[0].path}:0; `officina data inspect {folder}` shows them.")
    if documents:
        content = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        path = f"{FOLDER}/{len(dataset.manifest.removals) + 1:05d}.jsonl"
        (folder / FOLDER).mkdir(exist_ok=True)
        write_whole(folder / path, content)
        entry = Removal(path=path, sha256=hashlib.sha256(content).hexdigest(), documents=documents, tokens=tokens)
        rewrite_manifest(folder, replace(dataset.manifest, removals=[*dataset.manifest.removals, entry]))
    return RemovalReport(documents, tokens, before, missing)


def _unnamed(dataset: Dataset) -> list[str]:
    """The lists that lie there and that dataset.json does not name."""
    named = {removal.path for removal in dataset.manifest.removals}
    there = sorted(f"{FOLDER}/{path.name}" for path in (dataset.folder / FOLDER).glob("*.jsonl"))
    return [path for path in there if path not in named]


def check_all_named(dataset: Dataset) -> None:
    """Raise DataError if a list lies there that dataset.json does not name: its documents would be trained on again."""
    if unnamed := _unnamed(dataset):
        raise DataError(f"{dataset.folder}: {', '.join(unnamed)} names documents that were removed on request, but {MANIFEST} "
                        "does not name the list: the request was cut off, or the file is an older one. Give the last request "
                        f"again, and all lists are heeded: officina data remove {dataset.folder} IDS")


def _with_all_lists(dataset: Dataset) -> Dataset:
    """The data set with all lists that lie there, named in its dataset.json."""
    added, shards = [], {entry.path: entry for entry in dataset.shards}
    for path in _unnamed(dataset):
        content, documents, tokens = (dataset.folder / path).read_bytes(), 0, 0
        for line in map(json.loads, content.splitlines()):
            shard = Shard(dataset.folder / line["shard"], shards[line["shard"]])
            documents += len(line["documents"])
            tokens += int(np.sum(np.diff(shard.ends, prepend=0)[line["documents"]]))
        added.append(Removal(path=path, sha256=hashlib.sha256(content).hexdigest(), documents=documents, tokens=tokens))
    if added:
        dataset = replace(dataset, manifest=replace(dataset.manifest, removals=[*dataset.manifest.removals, *added]))
        rewrite_manifest(dataset.folder, dataset.manifest)
    return dataset


def removed_documents(dataset: Dataset, lists: int | None = None) -> dict[str, np.ndarray]:
    """Shard path -> (n,) int64 numbers of its removed documents, sorted; by all lists or by the first `lists`.

    Raises DataError for a list that is missing or changed, or that dataset.json does not name.
    """
    removals = dataset.manifest.removals
    if lists is None:
        check_all_named(dataset)
    if lists is not None and lists > len(removals):
        raise DataError(f"{dataset.folder}: has {len(removals)} lists of removed documents, but the run read it with {lists}. "
                        "Restore dataset.json and the folder removed/ from a copy.")
    found: dict[str, list[int]] = {}
    for removal in removals[:lists]:
        path = dataset.folder / removal.path
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != removal.sha256:
            raise DataError(f"{path}: is missing or changed: its sha256 is not {removal.sha256}. Restore it from a copy: "
                            "without it, removed documents would be trained on.")
        for line in map(json.loads, content.splitlines()):
            found.setdefault(line["shard"], []).extend(line["documents"])
    return {shard: np.unique(np.asarray(numbers, np.int64)) for shard, numbers in found.items()}


def removed_spans(dataset: Dataset, entries: list[ShardEntry], lists: int | None,
                  shard: Callable[[int], Shard]) -> tuple[np.ndarray, np.ndarray]:
    """Where the removed documents lie in a split's token stream: (n,) first tokens and (n,) ends, sorted.

    shard: opens the shard of an entry, by its number.
    """
    starts, stops, first = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    documents = removed_documents(dataset, lists)
    for number, entry in enumerate(entries):
        if entry.path in documents:
            ends, numbers = shard(number).ends, documents[entry.path]
            starts.append(first + np.where(numbers > 0, ends[numbers - 1], 0))
            stops.append(first + ends[numbers])
        first += entry.tokens
    return np.concatenate(starts), np.concatenate(stops)


def _find(dataset: Dataset, names: list[str]) -> tuple[dict[str, set[int]], list[str]]:
    """Shard -> numbers of the documents meant, and the names that mean none. An id may stand for several documents."""
    found: dict[str, set[int]] = {}
    by_id = {document_id(name): name for name in names}
    unseen = dict.fromkeys(names)
    for entry in dataset.shards:
        for name in names:
            path, _, number = name.rpartition(":")
            if path == entry.path and number.isdecimal() and int(number) < entry.documents:
                found.setdefault(path, set()).add(int(number))
                unseen.pop(name, None)
        ids = Shard(dataset.folder / entry.path, entry).document_ids
        halves = np.ascontiguousarray(ids).view("<u8").reshape(-1, 2)
        wanted = np.frombuffer(b"".join(by_id), "<u8").reshape(-1, 2)
        for number in np.flatnonzero(np.isin(halves[:, 0], wanted[:, 0])):
            if (key := ids[number].tobytes()) in by_id:
                found.setdefault(entry.path, set()).add(int(number))
                unseen.pop(by_id[key], None)
    return found, list(unseen)
