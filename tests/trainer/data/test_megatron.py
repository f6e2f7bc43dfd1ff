"""Megatron's files are read in place like shards, and written as it documents them: checked with a reader apart from ours."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_run, tokenizer_info, write_tokens
from tokenizers import Tokenizer, models

from officina.trainer.data.ledger import Ledger, audit
from officina.trainer.data.loader import Loader
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.megatron import export_megatron, index_folder
from officina.trainer.data.removal import remove
from officina.trainer.data.shard_writer import write_records
from officina.trainer.data.shards import GRANULE_BYTES, HEADER_BYTES
from officina.trainer.data.stage import stage
from officina.trainer.data.verify import verify
from officina.trainer.errors import DataError
from officina.trainer.run_dir import save_config

CODES = {"u8": 1, "u16": 8, "i4": 4}


def write_pair(path: Path, sequences: list[np.ndarray], documents: list[int], code: int) -> None:
    """As the format is documented; `documents` lists first sequences and the end."""
    lengths = np.asarray([len(s) for s in sequences], "<i4")
    path.with_suffix(".bin").write_bytes(b"".join(s.tobytes() for s in sequences))
    begins = np.concatenate(([0], np.cumsum([s.nbytes for s in sequences])))[:-1].astype("<i8")
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
        + lengths.tobytes() + begins.tobytes() + np.asarray(documents, "<i8").tobytes())


def read_pair(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """Sequences and document list of a pair."""
    content = path.with_suffix(".idx").read_bytes()
    assert content[:9] == b"MMIDIDX\x00\x00" and struct.unpack("<Q", content[9:17]) == (1,)
    dtype = {1: np.uint8, 8: np.uint16, 4: np.int32}[content[17]]
    n, listed = struct.unpack("<QQ", content[18:34])
    lengths = np.frombuffer(content[34:34 + 4 * n], "<i4")
    begins = np.frombuffer(content[34 + 4 * n:34 + 12 * n], "<i8")
    documents = np.frombuffer(content[34 + 12 * n:], "<i8")
    assert len(documents) == listed
    data = path.with_suffix(".bin").read_bytes()
    assert sum(lengths) * np.dtype(dtype).itemsize == len(data)
    found = [np.frombuffer(data, dtype, length, begin) for length, begin in zip(lengths, begins, strict=True)]
    return found, documents.tolist()


@pytest.fixture()
def tokenizer(tmp_path: Path) -> Path:
    vocabulary = {"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, 60_000)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t1")).save(str(tmp_path / "tok.json"))
    return tmp_path / "tok.json"


def pairs(folder: Path, dtype: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Two pairs with documents of one or more sequences, one of them empty; returns the documents."""
    folder.mkdir()
    documents = []
    for name in ("a_text_document", "b_text_document"):
        sequences = [rng.integers(1, 60_000, n).astype(f"<{dtype.replace('u16', 'u2')}") for n in (900, 3, 40_000, 150_000, 7)]
        write_pair(folder / name, sequences, [0, 1, 1, 3, 5], CODES[dtype])
        documents += [sequences[0], np.concatenate(sequences[1:3]), np.concatenate(sequences[3:])]
    return documents


@pytest.mark.parametrize("dtype", ["u16", "i4"])
def test_read_in_place_like_shards(tmp_path: Path, tokenizer: Path, dtype: str) -> None:
    """Same batches, order, fingerprint, digests and audit as the same documents in shards of our own."""
    documents = pairs(tmp_path / "meg", dtype, np.random.default_rng(0))
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "meg").iterdir()}
    manifest = index_folder(tmp_path / "meg", tokenizer, licence="CC0-1.0", validation=["none*"])
    after = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "meg").iterdir() if p.name in before}
    assert before == after and manifest.sources == ["a_text_document", "b_text_document"]
    assert {p.suffix for p in (tmp_path / "meg").iterdir()} == {".bin", ".idx", ".dli", ".json", ".jsonl"}
    dataset = open_dataset(tmp_path / "meg")
    assert [(e.path, e.kind, e.documents) for e in dataset.shards] == [
        ("a_text_document.bin", "megatron", 3), ("b_text_document.bin", "megatron", 3)]
    assert verify(tmp_path / "meg").faults == [] and dataset.manifest.dtype == {"u16": "u16", "i4": "u32"}[dtype]
    run = make_run({"m": (tmp_path / "meg", 1)}, seq_len=512, rows=4)
    (tmp_path / "run").mkdir()
    save_config(run, tmp_path / "run" / "config.yaml")
    stream, row = np.concatenate(documents).astype(np.int64), 0
    with Loader(make_run({"m": (tmp_path / "meg", 1)}, seq_len=512, rows=4, shuffle=False), rank=0, world_size=1,
                position=0) as loader:
        borders = np.cumsum([len(d) for d in documents])
        for _ in range(180):
            for micro in loader.next_step().micros:
                for tokens, labels in zip(micro.fields["tokens"].numpy(), micro.fields["labels"].numpy(), strict=True):
                    here = np.arange(row * 512, row * 512 + 512)
                    assert np.array_equal(tokens, stream[here])
                    assert np.array_equal(labels, np.where(np.isin(here + 1, borders), -100, stream[here + 1]))
                    row += 1
    with Loader(run, rank=0, world_size=1, position=0) as loader, Ledger(tmp_path / "run") as ledger:
        for step in range(1, 200):
            data = loader.next_step()
            ledger.write(step, data, data.digest)
    assert audit(tmp_path / "run").faults == []


def test_a_damaged_index_is_not_staged(tmp_path: Path, tokenizer: Path) -> None:
    """No hash in the manifest covers it, and it would take the place of a sound one in a repair."""
    pairs(tmp_path / "meg", "u16", np.random.default_rng(0))
    index_folder(tmp_path / "meg", tokenizer)
    stage(tmp_path / "meg", tmp_path / "copy")
    index = tmp_path / "copy" / "a_text_document.dli"
    sound = index.read_bytes()
    for place in (20, HEADER_BYTES):  # in the header, and in the ends of documents
        index.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1:])
        with pytest.raises(DataError, match=r"copy cannot be staged:\n  - .*a_text_document\.(bin|dli): .*does not match its"):
            stage(tmp_path / "copy", tmp_path / "meg")
        assert (tmp_path / "meg" / index.name).read_bytes() == sound and verify(tmp_path / "meg").faults == []


def test_damage_is_found(tmp_path: Path, tokenizer: Path) -> None:
    pairs(tmp_path / "meg", "u16", np.random.default_rng(0))
    index_folder(tmp_path / "meg", tokenizer)
    path = tmp_path / "meg" / "a_text_document.bin"
    content = bytearray(path.read_bytes())
    content[GRANULE_BYTES + 5] ^= 1
    path.write_bytes(content)
    [fault] = verify(tmp_path / "meg").faults
    assert f"{path}: bytes {GRANULE_BYTES} to {len(content)} do not match" in fault
    content[GRANULE_BYTES + 5] ^= 1
    path.write_bytes(content)
    index = path.with_suffix(".dli")
    whole = index.read_bytes()
    assert verify(tmp_path / "meg").faults == []
    for place in (20, HEADER_BYTES, len(whole) - 12):  # header, first section, checksum at the end
        index.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        assert any("a_text_document" in fault for fault in verify(tmp_path / "meg").faults), place
    index.write_bytes(whole)
    content[GRANULE_BYTES + 5] ^= 1
    path.write_bytes(content[:-2])
    run = make_run({"m": (tmp_path / "meg", 1)}, seq_len=512, shuffle=False)
    with (pytest.raises(DataError, match=r"a_text_document\.bin: has \d+ bytes, but its index a_text_document\.dli says"),
          Loader(run, rank=0, world_size=1, position=0) as loader):
        loader.next_step()


def broken(folder: Path, what: str) -> None:
    one = np.asarray([5, 6, 7], "<u2")
    code = {"code": 6}.get(what, 8)
    write_pair(folder / "x", [one, one], {"list": [0, 1]}.get(what, [0, 1, 2]), code)
    index = bytearray((folder / "x.idx").read_bytes())
    if what == "gap":
        index[34 + 8 + 8] = 8
    content = {"magic": b"MMIDIDY" + bytes(index[7:]), "short": bytes(index[:-1])}.get(what, bytes(index))
    (folder / "x.idx").write_bytes(content)
    if what in ("bin", "token", "empty"):
        (folder / "x.bin").write_bytes({"bin": b"abcd", "token": bytes(11), "empty": b""}[what])
    if what == "vocabulary":
        write_pair(folder / "x", [np.asarray([60_000], "<u2")], [0, 1], 8)
    if what == "dtypes":
        write_pair(folder / "y", [one.astype("<i4")], [0, 1], 4)


@pytest.mark.parametrize(("what", "told"), [
    ("magic", r"x\.idx: begins with b'MMIDIDY"), ("code", r"dtype code 6; officina reads version 1 with codes 1, 8, 4"),
    ("short", r"bytes, but its header asks for"), ("gap", "do not lie end to end"), ("list", "list of documents does not go"),
    ("bin", r"x\.bin: has 4 bytes, but x\.idx says 6 tokens of 2 bytes"), ("token", r"x\.bin: has 11 bytes, but"),
    ("empty", r"x\.bin: has 0 bytes, but"), ("vocabulary", "has token id 60000, but the tokenizer has 60000"),
    ("dtypes", r"x\.bin \(u16\), y\.bin \(u32\) differ in dtype")])
def test_files_that_are_none_of_megatrons(tmp_path: Path, tokenizer: Path, what: str, told: str) -> None:
    (tmp_path / "meg").mkdir()
    broken(tmp_path / "meg", what)
    with pytest.raises(DataError, match=told):
        index_folder(tmp_path / "meg", tokenizer)
    with pytest.raises(DataError, match=r"is no data set"):
        open_dataset(tmp_path / "meg")


def test_what_cannot_be_indexed(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(DataError, match=r"has no X\.bin with an X\.idx"):
        index_folder(tmp_path, tokenizer)
    pairs(tmp_path / "meg", "u16", np.random.default_rng(0))
    with pytest.raises(DataError, match=r"every file is held out.*--validation \*"):
        index_folder(tmp_path / "meg", tokenizer, validation=["*"])
    manifest = index_folder(tmp_path / "meg", tokenizer, validation=["b*"])
    assert {name: totals.documents for name, totals in manifest.splits.items()} == {"train": 3, "validation": 3}
    with pytest.raises(DataError, match=r"holds a data set already"):
        index_folder(tmp_path / "meg", tokenizer)


# ---- export ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["u8", "u16", "u32"])
def test_export_is_read_back_identically(tmp_path: Path, dtype: str) -> None:
    lengths = {"train": [3, 60, 1, 20, 9], "validation": [4, 2]}
    streams = write_tokens(tmp_path / "d", lengths, dtype=dtype, shard_bytes=90)
    assert export_megatron(tmp_path / "d", tmp_path / "meg") == {
        split: (tmp_path / "meg" / f"{split}.bin", len(n), sum(n)) for split, n in lengths.items()}
    for split, n in lengths.items():
        sequences, documents = read_pair(tmp_path / "meg" / split)
        assert documents == list(range(len(n) + 1))
        for found, wanted in zip(sequences, np.split(streams[split], np.cumsum(n)[:-1]), strict=True):
            assert np.array_equal(found, wanted)
    with pytest.raises(DataError, match=r"train\.bin: is there already"):
        export_megatron(tmp_path / "d", tmp_path / "meg")


def test_removed_documents_are_not_exported(tmp_path: Path) -> None:
    stream = write_tokens(tmp_path / "d", {"train": [3, 5, 2, 4, 6]})["train"]
    remove(tmp_path / "d", [f"shards/train-00000.dls:{n}" for n in (0, 2, 3)])
    export_megatron(tmp_path / "d", tmp_path / "meg")
    sequences, _ = read_pair(tmp_path / "meg" / "train")
    assert [s.tolist() for s in sequences] == [stream[3:8].tolist(), stream[14:].tolist()]


def test_records_are_not_for_megatron(tmp_path: Path) -> None:
    write_records(tmp_path, [b"x"], name="r")
    with pytest.raises(DataError, match=r"holds records, but Megatron reads tokens"):
        export_megatron(tmp_path, tmp_path / "out")


def test_there_and_back_is_the_same_data(tmp_path: Path, tokenizer: Path) -> None:
    info = tokenizer_info(hashlib.sha256(tokenizer.read_bytes()).hexdigest(), 60_000)
    stream = write_tokens(tmp_path / "d", {"train": [30, 500, 7]}, dtype="u16", tokenizer=info)["train"]
    export_megatron(tmp_path / "d", tmp_path / "meg")
    index_folder(tmp_path / "meg", tokenizer)
    how = {"seq_len": 32, "rows": 2, "shuffle": False}
    for folder in (tmp_path / "d", tmp_path / "meg"):
        with Loader(make_run({"x": (folder, 1)}, **how), rank=0, world_size=1, position=0) as loader:
            assert loader.next_step().micros[0].fields["tokens"].numpy().ravel().tolist() == stream[:64].tolist()
