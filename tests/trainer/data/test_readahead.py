"""Reading ahead: which blocks, when, and on which threads; and that it changes nothing."""

import os
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from officina.trainer.config import RunConfig
from officina.trainer.data import readahead, remote, stage_remote, storage
from officina.trainer.data.loader import Loader
from officina.trainer.data.readahead import ReadAhead
from officina.trainer.data.reader import RowReader
from officina.trainer.data.shards import GRANULE_BYTES, Shard
from officina.trainer.data.storage import FileArray
from officina.trainer.errors import DataError
from tests.data_sets import make_run, write_tokens

BLOCK = GRANULE_BYTES // 4
"""Tokens of a block."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 blocks in 5 shards, documents of 1 to 3,000 tokens."""
    folder = tmp_path_factory.mktemp("data") / "a"
    lengths = np.random.default_rng(0).integers(1, 3000, 24 * BLOCK // 1500).tolist()
    write_tokens(folder, {"train": lengths}, shard_bytes=5 * GRANULE_BYTES + 1000)
    return folder


def run_over(folder: Path, **how: object) -> RunConfig:
    """Rows of 1,024 tokens, 64 a block."""
    return make_run({"a": (folder, 1)}, seq_len=1024, rows=4, micro_rows=4, **how)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("how", [{"read": "mmap"}, {"read": "pread"}, {"read": "mmap", "shuffle_block": 64},
                                 {"read": "pread", "shuffle_block": 64}, {"read": "mmap", "packing": "best_fit"}], ids=str)
def test_blocks_are_verified_before_their_step_and_once(
        folder: Path, how: dict, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loader's thread where they lie in memory, else by others."""
    monkeypatch.setattr(readahead, "SLOW_BLOCK_S", 0 if slow else 1e9)
    monkeypatch.setattr(readahead, "TASK_BLOCKS", 1)
    run = run_over(folder, **how)
    steps, checked = verified(run, monkeypatch)
    assert len(checked) == 25 and all(len(threads) == 1 for threads in checked.values())
    reader = RowReader(run)
    of_first = {(f"train-{shard:05d}.dls", block) for _, shard, block in
                blocks_of(reader, [("a", row) for row in reader.place(np.arange(4)).row.tolist()])}
    ahead = {block for block, [thread] in checked.items() if thread.startswith("officina-ahead")}
    assert not ahead & of_first  # the first step waits for nothing but itself
    assert len(ahead) >= len(checked) - len(of_first) - 1 if slow else not ahead  # by one block it is found out
    assert steps == [reader.digest(np.arange(4 * i, 4 * i + 4)) for i in range(len(steps))]


def test_blocks_that_come_to_lie_in_memory_are_verified_by_the_loaders_thread_again(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "SLOW_BLOCK_S", 0.1)
    monkeypatch.setattr(readahead, "TASK_BLOCKS", 1)
    monkeypatch.setattr(readahead, "KEPT", 6)
    _, checked = verified(run_over(folder, shuffle=False), monkeypatch, slow=8, slow_s=0.2)
    own = [not threads[0].startswith("officina-ahead") for threads in checked.values()]  # in the order in which they began
    assert own[:2] == [True, True] and own.count(False) >= 5  # the first step's, the first that is slow; then threads
    assert all(own[-8:])


def verified(run: RunConfig, monkeypatch: pytest.MonkeyPatch, *, slow: int = 0,
             slow_s: float = 0.0) -> tuple[list[str], dict[tuple[str, int], list[str]]]:
    """Digests of an epoch's steps, and which threads verified which block. The first `slow` blocks take slow_s."""
    checked: dict[tuple[str, int], list[str]] = defaultdict(list)
    check = Shard._check_granule

    def told(shard: Shard, granule: int) -> None:
        checked[shard.path.name, granule].append(threading.current_thread().name)
        if len(checked) <= slow:
            time.sleep(slow_s)
        check(shard, granule)

    with monkeypatch.context() as patch:
        patch.setattr(Shard, "_check_granule", told)
        with Loader(run, rank=0, world_size=1, position=0) as loader:
            return [loader.next_step().digest for _ in range(loader._reader.rows["a"] // 4)], checked


def blocks_of(reader: RowReader, step_rows: list[tuple[str, int]]) -> set[tuple[str, int, int]]:
    """(source, shard, block) under the rows, token by token."""
    found = set()
    for name, row in step_rows:
        stream = reader.streams[name]
        places = stream.places(np.asarray([row]), reader.seq_len)[0]
        places = places[places >= 0]
        shard = np.searchsorted(stream.token_starts, places, side="right") - 1
        size = {"u16": 2, "u32": 4}[stream.dataset.manifest.dtype]
        found |= {(name, int(s), int(p - stream.token_starts[s]) * size // readahead.GRANULE_BYTES)
                  for s, p in zip(shard, places, strict=True)}
    return found


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=12, max_size=40), seq_len=st.integers(2, 50), rows=st.integers(1, 5),
       shard_bytes=st.integers(80, 600), shuffle_block=st.sampled_from([1, 4]), two=st.booleans(),
       packing=st.sampled_from(["cut", "best_fit"]))
def test_the_blocks_are_those_under_the_rows(
        tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, rows: int, shard_bytes: int,
        shuffle_block: int, two: bool, packing: str) -> None:
    """Each block is asked for by the first step that needs it, and by no other."""
    folder = tmp_path_factory.mktemp("blocks")
    write_tokens(folder / "a", {"train": [*lengths, 60]}, shard_bytes=shard_bytes)
    write_tokens(folder / "b", {"train": [*lengths, 60]}, shard_bytes=shard_bytes, dtype="u16", base=7)
    sources = {"a": (folder / "a", 2)} | ({"b": (folder / "b", 1)} if two else {})
    how = {"shuffle_block": shuffle_block, "packing": packing}
    reader = RowReader(make_run(sources, seq_len=seq_len, rows=rows, micro_rows=1, **how))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readahead, "GRANULE_BYTES", 64)
        blocks = readahead._Blocks(reader)
        steps = readahead.plan_steps(reader, 0, rows, range(rows))[:12]
        asked: dict[int, set] = defaultdict(set)
        now: set = set()
        for name, stream in reader.streams.items():
            patch.setattr(stream, "meet", lambda number, here, name=name: now.update((name, number, k) for k in here))
        patch.setattr(readahead, "TASK_BLOCKS", 1)
        for first, part in ((0, steps[:5]), (5, steps[5:])):
            for task in blocks.work(part, first):
                task.work()
                asked[task.step] |= now
                now.clear()
        met: set = set()
        for i, planned in enumerate(steps):
            names = [reader.order.names[k] for k in planned.places.source]
            under = blocks_of(reader, list(zip(names, planned.places.row.tolist(), strict=True)))
            assert asked[i] == under - met
            met |= under


@pytest.mark.parametrize(("read", "memory_bytes"), [("mmap", 1 << 20), ("pread", 1 << 20), ("mmap", 1 << 40)])
def test_the_kernel_is_told_what_comes_where_memory_is_small(
        folder: Path, read: str, memory_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that were met may be gone from memory: of them, the bytes of the coming rows are asked for."""
    monkeypatch.setattr(readahead, "memory_bytes", lambda: memory_bytes)
    reader = RowReader(run_over(folder, read=read))
    stream, ahead, position = reader.streams["a"], ReadAhead(reader, 4, range(4)), 0
    for _ in range(reader.rows["a"] // 4 + 1):
        position = ahead.next(position).stop
    told: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(Shard, "will_need", lambda shard, start, stop: told.append((shard.path, start, stop)))
    steps = []
    for _ in range(300):
        steps.append(ahead.next(position))
        position = steps[-1].stop
    ahead.close()
    if memory_bytes == 1 << 40:
        assert not told
        return
    assert 0 < sum(stop - start for _, start, stop in told) <= (len(steps) + readahead.AHEAD_STEPS) * 4 * 1025
    for row in np.concatenate([step.places.row for step in steps[readahead.AHEAD_STEPS + 1:]]).tolist():
        number = int(np.searchsorted(stream.token_starts, row * 1024, side="right")) - 1
        start = row * 1024 - int(stream.token_starts[number])
        path, stop = stream.shard(number).path, min(start + 1025, stream.entries[number].tokens)
        assert any(p == path and a <= start and stop <= b for p, a, b in told)


def test_what_is_read_ahead_is_bounded_and_grows_from_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "AHEAD_BYTES", 6 * 4 * 1024 * 4)  # six steps of four rows
    ahead, position, asked = ReadAhead(RowReader(run_over(folder)), 4, range(4)), 0, []
    [blocks, _] = ahead._blocks
    work = blocks.work

    def told(steps: list, first: int) -> list:
        asked.append((ahead._served, first + len(steps) - 1))
        return work(steps, first)

    monkeypatch.setattr(blocks, "work", told)
    for _ in range(60):
        position = ahead.next(position).stop
    ahead.close()
    assert asked[:2] == [(1, 3), (2, 6)] and max(last - now for now, last in asked) == 6
    assert [now for now, _ in asked[3:]] == list(range(asked[3][0], 60, 4))  # half of it at a time


# ---- stores ----------------------------------------------------------------------------------------------------------
@pytest.fixture()
def fetched(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], list[str]]:
    """The threads that fetched each piece of tokens, by shard and number; pieces are as large as blocks."""
    pytest.importorskip("fsspec")
    found: dict[tuple[str, int], list[str]] = defaultdict(list)
    fetch = remote.RemoteFile._fetch

    def told(file: remote.RemoteFile, number: int) -> bytes:
        if 0 < number < len(file._bounds) - 2:  # no header, no footer
            found[Path(file.entry.path).name, number - 1].append(threading.current_thread().name)
        return fetch(file, number)

    monkeypatch.setattr(remote.RemoteFile, "_fetch", told)
    monkeypatch.setattr(remote, "PIECE_BYTES", GRANULE_BYTES)
    monkeypatch.setattr(stage_remote, "LEAST_BUDGET_BYTES", 1)
    return found


@pytest.mark.parametrize("how", [{}, {"packing": "best_fit"}, {"shuffle_block": 64}], ids=str)
def test_pieces_of_a_store_are_fetched_before_their_step_and_once(folder: Path, fetched: dict, tmp_path: Path,
                                                                  how: dict) -> None:
    stage_remote.stage_from_store(f"file://{folder}", tmp_path / "here", on_demand=True)
    run = run_over(folder, **how)
    with Loader(run_over(tmp_path / "here", **how), rank=0, world_size=1, position=0) as loader:
        steps = loader._reader.rows["a"] // 4
        found = [loader.next_step().digest for _ in range(steps)]
    reader = RowReader(run)
    of_first = {(f"train-{shard:05d}.dls", block) for _, shard, block in
                blocks_of(reader, [("a", row) for row in reader.place(np.arange(4)).row.tolist()])}
    assert len(fetched) == 25 and all(len(threads) == 1 for threads in fetched.values())
    for piece, [thread] in fetched.items():
        assert thread.startswith("officina-ahead") != (piece in of_first)
    assert found == [reader.digest(np.arange(4 * i, 4 * i + 4)) for i in range(steps)]


@pytest.mark.parametrize("block", [64, 1])
def test_no_more_is_fetched_ahead_than_may_be_kept(folder: Path, fetched: dict, tmp_path: Path, block: int) -> None:
    """A third of the pieces may stay: that is room for what blocks of rows need next, and too little for scattered rows."""
    stage_remote.stage_from_store(f"file://{folder}", tmp_path / "here", 10 * GRANULE_BYTES, on_demand=True)
    with Loader(run_over(tmp_path / "here", shuffle_block=block), rank=0, world_size=1, position=0) as loader:
        first = loader.next_step()
        early = sum(map(len, fetched.values()))
        found = [first.digest, *(loader.next_step().digest for _ in range(2 * loader._reader.rows["a"] // 4))]
    here = [path.stat().st_size for path in (tmp_path / "here" / remote.PIECES).iterdir()]
    threads = [thread for of_piece in fetched.values() for thread in of_piece]
    ahead = sum(thread.startswith("officina-ahead") for thread in threads)
    assert sum(here) <= 10 * GRANULE_BYTES and len(fetched) == 25
    assert ahead == 0 if block == 1 else len(threads) - ahead <= early and len(threads) < 4 * 25
    reader = RowReader(run_over(folder, shuffle_block=block))
    assert found == [reader.digest(np.arange(4 * i, 4 * i + 4)) for i in range(len(found))]


def test_a_piece_that_is_here_is_not_the_next_to_go(folder: Path, fetched: dict, tmp_path: Path) -> None:
    stage_remote.stage_from_store(f"file://{folder}", tmp_path / "here", on_demand=True)
    stream = RowReader(run_over(tmp_path / "here")).streams["a"]
    stream.meet(0, [1])
    [piece] = (tmp_path / "here" / remote.PIECES).glob("*-00002")
    os.utime(piece, (1000, 1000))
    stream.meet(0, [1])
    assert piece.stat().st_mtime > 1000 and fetched == {("train-00000.dls", 1): ["MainThread"]}


def test_a_shard_that_is_gone_stops_the_step_that_needs_it_and_none_before(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", {"train": [BLOCK] * 20}, shard_bytes=GRANULE_BYTES)
    run = make_run({"a": (tmp_path / "a", 1)}, seq_len=1024, rows=16, micro_rows=4, shuffle=False)
    (tmp_path / "a" / "shards" / "train-00015.dls").unlink()  # blocks of several shards are read ahead together
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        for _ in range(4 * 15 - 1):  # four steps a shard; the last row of each goes on in the next one
            stop = loader.next_step().stop_sample
        with pytest.raises(DataError, match=r"train-00015\.dls: cannot be opened"):
            loader.next_step()
    assert stop == 16 * (4 * 15 - 1)


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_rows_that_must_be_waited_for_are_read_several_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                               packing: str) -> None:
    """A slow read sends the rest to threads, and all of the next call; a fast call brings them back."""
    reader, mapped = (RowReader(run_over(folder, packing=packing, read=read)) for read in ("pread", "mmap"))
    samples = np.arange(64)
    reader.read(samples)  # verified
    threads: list[str] = []
    fill, me = FileArray.fill, threading.current_thread().name

    def told(self: FileArray, at: int, out: memoryview) -> None:
        threads.append(threading.current_thread().name.rpartition("_")[0] or me)
        fill(self, at, out)

    monkeypatch.setattr(FileArray, "fill", told)
    for slow_s, before, by_others in ((0.0, True, range(50, 200)), (0.0, False, range(50, 200)),
                                      (60.0, True, range(1, 200)), (60.0, False, range(1))):
        monkeypatch.setattr(storage, "SLOW_S", slow_s)
        storage._of_thread.slow = before
        threads.clear()
        rows = reader.read(samples)
        assert len(threads) >= 64 and threads.count("officina-read") in by_others
        assert storage._of_thread.slow == (slow_s == 0)
        assert rows.digest == mapped.digest(samples) and np.array_equal(rows.tokens, mapped.read(samples).tokens)
