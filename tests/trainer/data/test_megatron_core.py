"""Megatron's files are what megatron-core says they are: it reads our exports, and we read in place what it writes."""

import hashlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from data_sets import make_run, tokenizer_info, write_tokens
from tokenizers import Tokenizer, models

from officina.trainer.batch import IGNORE
from officina.trainer.data.loader import Loader
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.megatron import export_megatron, index_folder
from officina.trainer.data.removal import remove
from officina.trainer.data.verify import verify

VOCABULARY = 5_000


@pytest.fixture(scope="module")
def core() -> ModuleType:
    """megatron-core's module of the format; its import takes seconds."""
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs officina[test]")


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(("dtype", "theirs"), [("u8", np.uint8), ("u16", np.uint16), ("u32", np.int32)])
def test_it_reads_an_export(core: ModuleType, tmp_path: Path, dtype: str, theirs: type, mmap: bool) -> None:
    """Every document of every split but those that were removed; from several shards."""
    lengths = {"train": [3, 60, 1, 20, 9, 33], "validation": [4, 2]}
    streams = write_tokens(tmp_path / "set", lengths, dtype=dtype, shard_bytes=90 * np.dtype(theirs).itemsize)
    assert [entry.documents for entry in open_dataset(tmp_path / "set").of_split("train")] == [4, 2]
    remove(tmp_path / "set", ["shards/train-00000.dls:1"])
    export_megatron(tmp_path / "set", tmp_path / "meg")
    documents = {split: np.split(streams[split], np.cumsum(n)[:-1]) for split, n in lengths.items()}
    del documents["train"][1]
    for split, wanted in documents.items():
        found = core.IndexedDataset(str(tmp_path / "meg" / split), mmap=mmap)
        assert found.index.dtype is theirs and len(found) == len(wanted)
        assert found.document_indices.tolist() == list(range(len(wanted) + 1))
        assert found.sequence_lengths.tolist() == list(map(len, wanted))
        for number, document in enumerate(wanted):
            assert found[number].dtype == theirs and np.array_equal(found[number], document)
            assert np.array_equal(found.get(number, offset=len(document) // 2), document[len(document) // 2:])


@pytest.mark.parametrize("theirs", [np.uint16, np.int32])
def test_what_it_wrote_is_read_in_place(core: ModuleType, tmp_path: Path, theirs: type) -> None:
    """Documents of several sequences and of none, added one by one, whole, and merged from another pair."""
    rng = np.random.default_rng(0)
    (tmp_path / "meg").mkdir()

    def written(path: Path, documents: list[list[int]], merged: Path | None = None) -> list[np.ndarray]:
        builder, found = core.IndexedDatasetBuilder(f"{path}.bin", dtype=theirs), []
        for number, lengths in enumerate(documents):
            sequences = [torch.from_numpy(rng.integers(0, VOCABULARY, n)) for n in lengths]
            if number % 2 and sequences:
                builder.add_document(torch.cat(sequences), lengths)
            else:
                for sequence in sequences:
                    builder.add_item(sequence)
                builder.end_document()
            found += [torch.cat(sequences).numpy()] if sequences else []
        if merged:
            builder.add_index(str(merged))
        builder.finalize(f"{path}.idx")
        return found

    other = written(tmp_path / "other", [[70, 5], [300]])
    documents = written(tmp_path / "meg" / "a", [[900], [40, 1, 7], [], [2, 2], [33], [65]], tmp_path / "other") + other
    before = [(tmp_path / "meg" / name).read_bytes() for name in ("a.bin", "a.idx")]
    vocabulary = {"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, VOCABULARY)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t1")).save(str(tmp_path / "tokenizer.json"))
    manifest = index_folder(tmp_path / "meg", tmp_path / "tokenizer.json")
    assert [(tmp_path / "meg" / name).read_bytes() for name in ("a.bin", "a.idx")] == before
    assert verify(tmp_path / "meg").faults == []
    totals, stream = manifest.splits["train"], np.concatenate(documents)
    assert (totals.documents, totals.tokens) == (len(documents), len(stream)) == (7, 1425)
    rows = (len(stream) - 1) // 32
    with Loader(make_run({"m": (tmp_path / "meg", 1)}, seq_len=32, rows=rows, micro_rows=rows, shuffle=False), rank=0,
                world_size=1, position=0) as loader:
        [batch] = loader.next_step().micros
    ends = np.isin(np.arange(1, 32 * rows + 1), np.cumsum([len(d) for d in documents]))
    assert np.array_equal(batch.fields["tokens"].numpy().ravel(), stream[:32 * rows])
    assert np.array_equal(batch.fields["labels"].numpy().ravel(), np.where(ends, IGNORE, stream[1:32 * rows + 1]))
    export_megatron(tmp_path / "meg", tmp_path / "back")
    back = core.IndexedDataset(str(tmp_path / "back" / "train"))
    assert len(back) == len(documents) and all(map(np.array_equal, back, documents))


def test_ours_and_its_files_are_the_same_bytes(core: ModuleType, tmp_path: Path) -> None:
    info = tokenizer_info(hashlib.sha256(b"").hexdigest(), VOCABULARY)
    stream = write_tokens(tmp_path / "set", {"train": [30, 500, 7]}, dtype="u16", tokenizer=info)["train"]
    export_megatron(tmp_path / "set", tmp_path / "meg")
    builder = core.IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=np.uint16)
    for document in np.split(stream, [30, 530]):
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "train.idx"))
    for name in ("train.bin", "train.idx"):
        assert (tmp_path / "meg" / name).read_bytes() == (tmp_path / name).read_bytes()
