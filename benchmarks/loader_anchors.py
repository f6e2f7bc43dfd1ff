"""Other loaders on the same tokens, each run as a script by the Python of its own environment, so it imports nothing of ours.

    python loader_anchors.py NAME prepare FOLDER           make NAME's files from FOLDER/tokens.npy and FOLDER/ends.npy
    python loader_anchors.py NAME serve FOLDER WORKERS     read a number of seconds a line, answer `block TOKENS S CPU_S`

Each is used as its documentation says: shuffled, batches of `BATCH` rows, on the CPU. WORKERS 0 is the calling process alone;
grain has threads instead of worker processes.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN, BATCH, SEED, WORKERS = 4096, 8, 1, 2
ROW = SEQ_LEN + 1
EOD = 0


def rows_of(folder: Path) -> np.ndarray:
    """(rows, SEQ_LEN + 1) uint32, not in memory."""
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    n = len(tokens) // ROW
    return tokens[:n * ROW].reshape(n, ROW)


def documents_of(folder: Path) -> Iterator[np.ndarray]:
    """Each document's tokens."""
    tokens, start = np.load(folder / "tokens.npy"), 0
    for end in np.load(folder / "ends.npy").tolist():
        yield tokens[start:end]
        start = end


def forever(make: Callable[[], Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from make()


# ---- numpy alone -----------------------------------------------------------------------------------------------------
def prepare_numpy(folder: Path, out: Path) -> None:
    """It reads the tokens as they are."""


def numpy(folder: Path, out: Path, workers: int) -> Iterator[int]:
    """uint32 rows by np.take from a map, in an order held in memory: what a loader comes to that knows nothing else."""
    rows, ring, rng = rows_of(folder), [np.empty((BATCH, ROW), np.uint32) for _ in range(8)], np.random.default_rng(SEED)
    while True:
        order = rng.permutation(len(rows))
        for n, first in enumerate(range(0, len(order) - BATCH + 1, BATCH)):
            yield np.take(rows, order[first:first + BATCH], axis=0, out=ring[n % 8], mode="clip").shape[0] * SEQ_LEN


# ---- litdata ---------------------------------------------------------------------------------------------------------
def _one_of_litdata(what: tuple[str, int]) -> Iterator[Any]:
    import torch

    path, part = what
    yield torch.from_numpy(np.array_split(np.load(path, mmap_mode="r"), 64)[part].astype(np.int32))


def prepare_litdata(folder: Path, out: Path) -> None:
    """Chunks of tokens."""
    from litdata import TokensLoader, optimize

    parts = [(str(folder / "tokens.npy"), part) for part in range(64)]
    optimize(fn=_one_of_litdata, inputs=parts, output_dir=str(out), num_workers=1, chunk_size=ROW * 2048,
             item_loader=TokensLoader(block_size=ROW))


def litdata(folder: Path, out: Path, workers: int) -> Iterator[int]:
    """int32 rows."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    data = StreamingDataset(str(out), shuffle=True, drop_last=True, seed=SEED, item_loader=TokensLoader(block_size=ROW))
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)
    return (batch.numel() // ROW * SEQ_LEN for batch in forever(lambda: loader))


# ---- mosaicml-streaming ----------------------------------------------------------------------------------------------
def prepare_mosaicml(folder: Path, out: Path) -> None:
    """A sample is a row."""
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"tokens": "ndarray:uint32"}) as writer:
        for row in rows_of(folder):
            writer.write({"tokens": np.array(row)})


def mosaicml(folder: Path, out: Path, workers: int) -> Iterator[int]:
    """uint32 rows, stacked."""
    import torch
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    data = StreamingDataset(local=str(out), shuffle=True, batch_size=BATCH, shuffle_seed=SEED)
    loader = DataLoader(data, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0,
                        collate_fn=lambda samples: torch.from_numpy(np.stack([s["tokens"] for s in samples]).view(np.int32)))
    return (batch.numel() // ROW * SEQ_LEN for batch in forever(lambda: loader))


# ---- Hugging Face datasets -------------------------------------------------------------------------------------------
def prepare_datasets(folder: Path, out: Path) -> None:
    """A row of an Arrow table is a row."""
    import datasets

    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("int32"), length=ROW)})
    rows = rows_of(folder)
    data = datasets.Dataset.from_generator(lambda: ({"tokens": row.astype(np.int32)} for row in rows), features=features,
                                           cache_dir=str(out / "cache"))
    data.save_to_disk(str(out / "data"))


def datasets(folder: Path, out: Path, workers: int) -> Iterator[int]:
    """int32 rows."""
    import datasets
    import torch
    from torch.utils.data import DataLoader

    data = datasets.load_from_disk(str(out / "data")).with_format("torch", dtype=torch.int32)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
                        generator=torch.Generator().manual_seed(SEED))
    return (batch["tokens"].numel() // ROW * SEQ_LEN for batch in forever(lambda: loader))


# ---- megatron-core ---------------------------------------------------------------------------------------------------
def prepare_megatron(folder: Path, out: Path) -> None:
    """X.bin and X.idx."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(out / "data.bin"), dtype=np.int32)
    for document in documents_of(folder):
        builder.add_item(torch.from_numpy(document.astype(np.int32)))
        builder.end_document()
    builder.finalize(str(out / "data.idx"))


def megatron(folder: Path, out: Path, workers: int, documents: bool = False) -> Iterator[int]:
    """int64 tokens, labels, positions and a loss mask; `documents`: positions begin anew and no loss crosses a border."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from torch.utils.data import DataLoader

    class Tokenizer:
        eod, vocab_size = EOD, 50_000

        def __init__(self) -> None:
            self.unique_identifiers = {"class": "none"}

    config = GPTDatasetConfig(random_seed=SEED, sequence_length=SEQ_LEN, blend=([str(out / "data")], None), split="1,0,0",
                              path_to_cache=str(out / "cache"), reset_position_ids=documents,
                              reset_attention_mask=False, eod_mask_loss=documents, create_attention_mask=False,
                              tokenizer=Tokenizer(), mid_level_dataset_surplus=0.005)
    n = len(np.load(folder / "tokens.npy", mmap_mode="r")) // SEQ_LEN - 1
    data, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [n, 0, 0], lambda: True, config).build()
    loader = DataLoader(data, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)
    return (batch["tokens"].numel() for batch in forever(lambda: loader))


def megatron_documents(folder: Path, out: Path, workers: int) -> Iterator[int]:
    """As `megatron`, with documents."""
    return megatron(folder, out, workers, documents=True)


# ---- grain -----------------------------------------------------------------------------------------------------------
def prepare_grain(folder: Path, out: Path) -> None:
    """A record is a row."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(out / "data.array_record"), "group_size:1,uncompressed")
    for row in rows_of(folder):
        writer.write(row.tobytes())
    writer.close()


def grain(folder: Path, out: Path, workers: int, documents: bool = False) -> Iterator[int]:
    """uint32 rows, by its Dataset interface; prefetch is by threads. `documents`: what the model needs, by a map of ours."""
    import grain

    source = grain.sources.ArrayRecordDataSource(str(out / "data.array_record"))
    data = grain.MapDataset.source(source).shuffle(SEED).repeat().map(lambda record: np.frombuffer(record, np.uint32))
    if documents:
        data = data.map(_fields)
    data = data.batch(BATCH)
    if workers:
        batches: Any = data.to_iter_dataset()
    else:
        batches = (data[i] for i in range(1 << 62))
    return ((batch["tokens"].size if documents else batch.size // ROW * SEQ_LEN) for batch in batches)


def grain_documents(folder: Path, out: Path, workers: int) -> Iterator[int]:
    """As `grain`, with documents."""
    return grain(folder, out, workers, documents=True)


def _fields(row: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens, labels, documents and positions of a row, whose documents end with EOD; no label crosses a border."""
    labels = row[1:].astype(np.int64)
    ends = np.flatnonzero(row[:-1] == EOD)
    labels[ends] = -100
    borders = np.concatenate(([0], ends + 1, [SEQ_LEN]))
    lengths = np.diff(borders)
    return {"tokens": row[:-1].astype(np.int64), "labels": labels,
            "documents": np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
            "positions": np.arange(SEQ_LEN) - np.repeat(borders[:-1], lengths)}


ANCHORS = {"numpy": (prepare_numpy, numpy), "litdata": (prepare_litdata, litdata),
           "mosaicml-streaming": (prepare_mosaicml, mosaicml), "datasets": (prepare_datasets, datasets),
           "grain": (prepare_grain, grain), "grain, documents": (prepare_grain, grain_documents),
           "megatron-core": (prepare_megatron, megatron), "megatron-core, documents": (prepare_megatron, megatron_documents)}


def serve(batches: Iterator[int]) -> None:
    """Answer each line, a number of seconds, with the tokens delivered, the seconds they took, and the process's CPU time."""
    next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        wanted, tokens, begun, cpu = float(line), 0, time.perf_counter(), time.process_time()
        while (took := time.perf_counter() - begun) < wanted:
            tokens += next(batches)
        print("block", tokens, took, time.process_time() - cpu, flush=True)


def main() -> None:
    """See above."""
    name, command, folder, *rest = sys.argv[1:]
    prepare, read = ANCHORS[name]
    out = Path(folder) / name.partition(",")[0]
    if command == "prepare":
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        prepare(Path(folder), out)
    else:
        import torch

        torch.set_num_threads(1)
        serve(read(Path(folder), out, int(rest[0])))
    sys.stdout.flush()
    os._exit(0)  # worker processes need not be waited for


if __name__ == "__main__":
    main()
