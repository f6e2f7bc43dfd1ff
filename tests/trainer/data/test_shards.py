"""What is written is read back; every damage is found and named; the fingerprint knows the content alone."""

import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
from data_sets import tokenizer_info, write_tokens

from officina.trainer.data.manifest import fingerprint, open_dataset, write_manifest
from officina.trainer.data.shard_writer import ShardWriter, SplitWriter, write_records
from officina.trainer.data.shards import GRANULE_BYTES, HEADER_BYTES, Shard
from officina.trainer.data.verify import verify
from officina.trainer.errors import DataError


@pytest.fixture()
def large(tmp_path: Path) -> Path:
    """A data set whose train shard has four granules."""
    write_tokens(tmp_path / "large", {"train": [90_000, 1, 100_000, 40_000], "validation": [10]})
    return tmp_path / "large"


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(("dtype", "top"), [("u8", 255), ("u16", 65535), ("u32", 2**32 - 1)])
def test_documents_come_back(tmp_path: Path, dtype: str, top: int) -> None:
    documents = [np.asarray([0, top]), np.asarray([top] * 70_001), np.asarray([1])]
    writer = ShardWriter(tmp_path / "x.dls", dtype=dtype, tokenizer_sha256="ab" * 32)
    for i, document in enumerate(documents):
        writer.add(document, source_id=i)
    assert not (tmp_path / "x.dls").exists()
    entry = writer.close(relative_to=tmp_path, split="train")
    assert [p.name for p in tmp_path.iterdir()] == ["x.dls"]
    shard = Shard(tmp_path / "x.dls", entry)
    assert shard.dtype == dtype and shard.tokenizer_sha256 == "ab" * 32 and shard.source_ids.tolist() == [0, 1, 2]
    for i, document in enumerate(documents):
        assert np.array_equal(shard.document(i), document)
    content = (tmp_path / "x.dls").read_bytes()
    assert entry.sha256 == hashlib.sha256(content).hexdigest() and entry.bytes == len(content)
    assert content[HEADER_BYTES:HEADER_BYTES + shard.data.nbytes] == np.concatenate(documents).astype(
        shard.data.dtype).tobytes()  # raw little-endian tokens, as any other program can read them


def test_what_a_shard_refuses(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.dls", dtype="u8")
    with pytest.raises(DataError, match=r"document 0 is empty"):
        writer.add(np.empty(0, np.int64))
    with pytest.raises(DataError, match=r"token id 256, but u8 holds 0 to 255. Take a wider dtype"):
        writer.add(np.asarray([256]))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_an_abandoned_split_leaves_no_half_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"full"), SplitWriter(tmp_path, "train", dtype="u8", shard_bytes=4) as w:
        w.add(np.asarray([1, 2, 3]))
        w.add(np.asarray([4, 5, 6]))
        raise RuntimeError("full")
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["train-00000.dls"]
    with pytest.raises(DataError, match=r"A build was begun there and not finished"):
        open_dataset(tmp_path)


def test_damage_is_found_on_first_touch_and_only_there(large: Path) -> None:
    path = large / "shards" / "train-00000.dls"
    flip(path, HEADER_BYTES + GRANULE_BYTES + 17)
    shard = Shard(path)
    assert shard.read(0, 60_000)[-1] == 59_999  # the first granule is sound
    for start, stop in ((65_536, 65_537), (0, 200_000), (60_000, 70_000)):
        with pytest.raises(DataError, match=rf"{path}: bytes {HEADER_BYTES + GRANULE_BYTES} to "
                                            rf"{HEADER_BYTES + 2 * GRANULE_BYTES} do not match"):
            shard.read(start, stop)
    assert shard.read(131_072, 230_001)[-1] == 230_000


@pytest.mark.parametrize("part", ["header", "magic", "ends", "hashes", "trailer"])
def test_damage_of_header_and_footer_is_found_when_they_are_read(large: Path, part: str) -> None:
    path = large / "shards" / "train-00000.dls"
    size = path.stat().st_size
    flip(path, {"header": 40, "magic": 1, "ends": HEADER_BYTES + 230_001 * 4 + 70, "hashes": size - 80,
                "trailer": size - 3}[part])
    told = {"header": "the header .bytes 0 to 4096. does not match", "magic": "a shard begins with"}
    with pytest.raises(DataError, match=rf"{path}: .*{told.get(part, 'the footer .* does not match')}"):
        shard = Shard(path)
        assert part == "ends" and not shard.source_ids.any()  # a section that nobody asks for is not read
        _ = shard.ends
    assert part != "ends" or any("document_ends in the footer" in fault for fault in verify(large).faults)


def as_version_1(path: Path) -> None:
    """Write the shard as before its sections had checksums of their own."""
    content = bytearray(path.read_bytes())
    fixed, (n,) = 88, struct.unpack_from("<I", content, 80)
    lines = [struct.unpack_from("<24sQQQ", content, fixed + 48 * i) for i in range(n)]
    header = bytearray(bytes(content[:fixed]) + b"".join(struct.pack("<24sQQ", *line[:3]) for line in lines))
    header[8:12] = struct.pack("<I", 1)
    header = header.ljust(HEADER_BYTES - 8, b"\0")
    header += struct.pack("<Q", xxhash.xxh3_64_intdigest(header))
    root = xxhash.xxh3_64(header)
    for _, offset, length, _ in lines:
        root.update(content[offset:offset + length])
    content[:HEADER_BYTES], content[-16:-8] = header, struct.pack("<Q", root.intdigest())
    path.write_bytes(content)


def test_shards_of_version_1_are_read(large: Path) -> None:
    path = large / "shards" / "train-00000.dls"
    names = ("ends", "source_ids", "language_ids", "document_ids")
    now = [getattr(Shard(path), name).tolist() for name in names]
    as_version_1(path)
    then = Shard(path)
    assert path.read_bytes()[8] == 1 and then.check_all() == []
    assert now[0] == [90_000, 90_001, 190_001, 230_001] and now == [getattr(then, name).tolist() for name in names]
    assert np.array_equal(then.read(0, 230_001), np.arange(230_001))
    flip(path, HEADER_BYTES + 230_001 * 4 + 70)
    with pytest.raises(DataError, match=rf"{path}: the footer .* does not match"):
        Shard(path)


def test_files_that_are_no_shards(large: Path, tmp_path: Path) -> None:
    path = large / "shards" / "train-00000.dls"
    entry = open_dataset(large).of_split("train")[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=rf"has {len(whole) - 100} bytes, but its header says {len(whole)}"):
        Shard(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be opened"):
        Shard(path)
    write_tokens(tmp_path / "other", {"train": [230_001]})
    shutil.copy(tmp_path / "other" / "shards" / "train-00000.dls", path)
    with pytest.raises(DataError, match=r"it is a shard of another data set"):
        Shard(path, entry)
    newer = whole[:8] + struct.pack("<I", 3) + whole[12:HEADER_BYTES - 8]
    path.write_bytes(newer + struct.pack("<Q", xxhash.xxh3_64_intdigest(newer)) + whole[HEADER_BYTES:])
    with pytest.raises(DataError, match=r"shard version 3 .* reads versions up to 2.*Update officina"):
        Shard(path)


def test_verify_names_every_damage(large: Path) -> None:
    report = verify(large)
    assert report.faults == [] and report.bytes == sum(e.bytes for e in report.dataset.shards)
    path = large / "shards" / "train-00000.dls"
    for granule in (0, 3):
        flip(path, HEADER_BYTES + granule * GRANULE_BYTES + 5)
    (large / "shards" / "validation-00000.dls").unlink()
    faults = verify(large).faults
    assert len(faults) == 3 and f"{path}: bytes {HEADER_BYTES} to" in faults[0]
    assert f"bytes {HEADER_BYTES + 3 * GRANULE_BYTES} to" in faults[1]
    assert "missing, but shards.jsonl lists" in faults[2]


def test_verify_sees_bytes_between_the_sections_and_the_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    write_tokens(folder, {"train": [3]}, tokenizer=tokenizer_info(hashlib.sha256(b"right").hexdigest(), 10))
    flip(folder / "shards" / "train-00000.dls", HEADER_BYTES + 20)
    assert "bytes between the sections differ" in verify(folder).faults[1]
    assert "missing, but dataset.json says" in verify(folder).faults[0]
    (folder / "tokenizer.json").write_bytes(b"wrong")
    assert f"sha256 {hashlib.sha256(b'wrong').hexdigest()}, but" in verify(folder).faults[0]


# ---- manifest ------------------------------------------------------------------------------------------------------
def test_fingerprint_follows_the_content_alone(tmp_path: Path) -> None:
    def made(name: str, lengths: list[int], **about: object) -> str:
        write_tokens(tmp_path / name, {"train": lengths}, **about)
        return open_dataset(tmp_path / name).manifest.fingerprint

    one = made("one", [5, 6])
    assert one == made("two", [5, 6], licence="CC0-1.0", provenance={"by": "hand"})
    assert len({one, made("three", [6, 5]), made("four", [5, 6], dtype="u16")}) == 3
    shards = open_dataset(tmp_path / "one").shards
    assert fingerprint("tokens", "u32", "ab" * 32, shards) != fingerprint("tokens", "u32", None, shards)


@pytest.mark.parametrize(("change", "told"), [
    ({"format": 2}, "format=2"), ({"nmae": "x"}, "nmae"), ({"kind": "images"}, "kind='images'"),
    ({"version": "1"}, "version='1'"), ({"personal_data": "some"}, "personal_data"),
    ({"splits": {"train": {"shards": -1, "documents": 1, "tokens": 1, "bytes": 1}}}, "splits.train.shards=-1"),
    ({"fingerprint": "0" * 64}, "Somebody edited the manifest"),
    ({"splits": {"train": {"shards": 1, "documents": 1, "tokens": 1, "bytes": 1}}}, "splits are not the sums over shards"),
    ({"removals": [{"path": "../others.jsonl", "sha256": "0" * 64, "documents": 1, "tokens": 1}]}, "removals.0.path="),
    ({"shards_sha256": "0" * 64}, "do not belong together"),
    ({"kind": "records"}, "Somebody edited")])
def test_an_edited_manifest_is_refused(large: Path, change: dict, told: str) -> None:
    values = json.loads((large / "dataset.json").read_text())
    (large / "dataset.json").write_text(json.dumps(values | change))
    with pytest.raises(DataError, match=told):
        open_dataset(large)


def test_damaged_lists_are_refused(large: Path) -> None:
    lines = (large / "shards.jsonl").read_bytes()
    values = json.loads((large / "dataset.json").read_text())

    def with_lines(content: bytes) -> None:
        (large / "shards.jsonl").write_bytes(content)
        values["shards_sha256"] = hashlib.sha256(content).hexdigest()
        (large / "dataset.json").write_text(json.dumps(values))

    with_lines(lines + b"[" * 100_000)
    with pytest.raises(DataError, match=r"shards\.jsonl line 3: not JSON \(maximum recursion depth"):
        open_dataset(large)
    with_lines(lines + b"{half")
    with pytest.raises(DataError, match=r"shards\.jsonl line 3: not JSON"):
        open_dataset(large)
    with_lines(lines.replace(b"shards/train", b"../train"))
    with pytest.raises(DataError, match=r"leaves the data set's folder"):
        open_dataset(large)
    (large / "shards.jsonl").unlink()
    with pytest.raises(DataError, match=r"shards\.jsonl: No such file"):
        open_dataset(large)


def test_a_manifest_that_would_be_refused_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.json: name="):
        write_manifest(tmp_path, [], {}, kind="tokens", dtype="u8", name="")
    assert list(tmp_path.iterdir()) == []


def test_records(tmp_path: Path) -> None:
    write_records(tmp_path, (bytes([i]) * (i + 1) for i in range(9)), name="tiles", shard_bytes=16, licence="CC0-1.0")
    write_records(tmp_path, [b"held out"], name="tiles", split="validation")
    dataset = open_dataset(tmp_path)
    assert dataset.manifest.licence == "CC0-1.0" and dataset.manifest.kind == "records"
    assert {n: t.documents for n, t in dataset.manifest.splits.items()} == {"train": 9, "validation": 1}
    assert len(dataset.of_split("train")) > 2 and verify(tmp_path).faults == []
    shard = Shard(tmp_path / dataset.of_split("validation")[0].path)
    assert shard.document(0).tobytes() == b"held out"
    with pytest.raises(DataError, match=r"split train cannot be written. Take another split name"):
        write_records(tmp_path, [b"x"], name="tiles")
    with pytest.raises(DataError, match=r"split train has no record"):
        write_records(tmp_path / "empty", [], name="tiles")
