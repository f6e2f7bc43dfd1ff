"""Files are mapped or read by the kind of file system, and either way give the same bytes and find the same damage."""

import errno
import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_run, write_tokens

from officina.trainer.config import RunConfig
from officina.trainer.data import storage
from officina.trainer.data.loader import Loader
from officina.trainer.data.shards import HEADER_BYTES, Shard
from officina.trainer.data.storage import READ_BY_PREAD, FileArray, file_system, reads_by_pread, type_of_mount
from officina.trainer.errors import DataError

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:35 / /scratch rw,nosuid shared:9 - lustre 10.0.0.1@o2ib:/scratch rw,flock
41 40 0:36 / /scratch/node\040local rw - tmpfs tmpfs rw
42 22 0:37 /home /home rw master:3 - nfs4 nas:/home rw,vers=4.2
43 22 0:38 / /weka rw - autofs systemd-1 rw
44 43 0:39 / /weka rw - wekafs default rw""".splitlines()


@pytest.mark.parametrize("path, kind", [
    ("/scratch/p/data", "lustre"), ("/scratch/node local/x", "tmpfs"), ("/scratchy", "ext4"), ("/home/me", "nfs4"),
    ("/", "ext4"), ("/weka/data", "wekafs"), ("/scratch", "lustre")])
def test_the_nearest_and_latest_mount_counts(path: str, kind: str) -> None:
    assert type_of_mount(path, MOUNTS) == kind


def test_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = file_system(tmp_path)
    assert kind
    assert reads_by_pread(tmp_path, "auto") is (kind in READ_BY_PREAD)
    assert reads_by_pread(tmp_path, "pread") and not reads_by_pread(tmp_path, "mmap")
    monkeypatch.setattr(storage, "file_system", lambda folder: "lustre")
    assert reads_by_pread(tmp_path / "other", "auto")


def test_an_array_over_a_file(tmp_path: Path) -> None:
    wanted = np.random.default_rng(0).integers(0, 2**32, 5000, np.uint32)
    (tmp_path / "x").write_bytes(b"head" + wanted.tobytes())
    array = FileArray(tmp_path / "x", 4).view("<u4")
    assert len(array) == 5000 and array.itemsize == 4 and array.dtype == np.uint32
    for a, b in ((0, 5000), (7, 9), (4990, 6000), (8, 8), (9, 4)):
        assert np.array_equal(array[a:b], wanted[a:b])
    places = np.asarray([3, 4, 5, 900, 2, 2, 3])
    assert np.array_equal(array[places], wanted[places]) and len(array[places[:0]]) == 0
    os.truncate(tmp_path / "x", 4000)
    with pytest.raises(DataError, match=r"x: ends at byte 4000, 16004 bytes too early"):
        array[:]


def digests(run: RunConfig, n: int = 12) -> list[int]:
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        return [loader.next_step().digest for _ in range(n)]


@pytest.mark.parametrize("shuffle_block", [1, 8])
def test_maps_and_reads_give_the_same(tmp_path: Path, shuffle_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(1).integers(1, 90, 300).tolist()
    write_tokens(tmp_path / "a", {"train": lengths}, shard_bytes=6000)
    how = {"rows": 7, "shuffle_block": shuffle_block}
    mapped = digests(make_run({"a": (tmp_path / "a", 1)}, read="mmap", **how))
    assert digests(make_run({"a": (tmp_path / "a", 1)}, read="pread", **how)) == mapped

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(mmap, "mmap", refuse)  # as WekaFS does after some 600 maps
    for read in ("mmap", "pread"):
        assert digests(make_run({"a": (tmp_path / "a", 1)}, read=read, **how)) == mapped


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokens(tmp_path / "a", {"train": [100] * 40}, shard_bytes=800)  # 20 shards
    run = make_run({"a": (tmp_path / "a", 1)}, rows=7)
    mapped = digests(run, 100)
    gc.collect()
    before = len(storage._maps)
    monkeypatch.setattr(storage, "most_maps", lambda: before + 5)
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        assert [loader.next_step().digest for _ in range(100)] == mapped
        shards = loader._reader.streams["a"]._open.values()
        n = sum(not shard.pread for shard in shards)
        assert len(shards) == 20 and n == len(storage._maps) - before
        assert 5 <= n <= 5 + storage.THREADS  # that may open shards at the same time


def test_damage_is_found_by_reads_too(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", {"train": [4000] * 3})
    path = tmp_path / "a" / "shards" / "train-00000.dls"
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 5000] ^= 1
    path.write_bytes(content)
    told = Shard(path, pread=True).check_all()
    assert len(told) == 1 and "bytes 4096 to" in told[0] and told == Shard(path).check_all()
    mapped, read = (digests(make_run({"a": (tmp_path / "a", 1)}, read=read)) for read in ("mmap", "pread"))
    assert mapped == read  # the block is set aside either way
