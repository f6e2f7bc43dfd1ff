"""Every sample exactly once, whatever the ranks, micro-batches, kills and changes; and rows that say the truth."""

import dataclasses
import json
import re
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import make_run, tokenizer_info, write_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from officina.trainer.batch import IGNORE, Batch
from officina.trainer.config import BatchConfig, CustomModelConfig, RunConfig, SourceConfig
from officina.trainer.data import readahead
from officina.trainer.data.loader import Loader, StepData, validation_rows, validation_sources
from officina.trainer.data.order import extend_timeline
from officina.trainer.data.shard_writer import write_records
from officina.trainer.data.shards import HEADER_BYTES
from officina.trainer.errors import DataError

FIXTURES = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two data sets of several shards each; tokens of b begin at a million."""
    rng = np.random.default_rng(3)
    folders = {name: tmp_path_factory.mktemp("data") / name for name in "ab"}
    for base, folder in zip((0, 10**6), folders.values(), strict=True):
        folder.mkdir()
        lengths = {"train": rng.integers(1, 40, 60).tolist(), "validation": rng.integers(1, 40, 9).tolist()}
        write_tokens(folder, lengths, base=base, shard_bytes=1000)
    return folders


def rows_of(step: StepData) -> list[tuple[int, ...]]:
    """Tokens of the rows that carry loss somewhere, in order."""
    found = []
    for micro in step.micros:
        real = (micro.fields["labels"] != IGNORE).any(dim=1)
        found += [tuple(row) for row in micro.fields["tokens"][real].tolist()]
    return found


def global_batch(run: RunConfig, world_size: int, position: int, steps: int) -> list[tuple[list, int, int]]:
    """Per step: rows of all ranks in order, summed digest, stop position."""
    loaders = [Loader(run, rank=r, world_size=world_size, position=position) for r in range(world_size)]
    out = []
    for _ in range(steps):
        found = [loader.next_step() for loader in loaders]
        assert len({len(step.micros) for step in found}) == 1
        assert len({tuple(m.fields["tokens"].shape for m in step.micros) for step in found}) == 1
        assert len({(s.first_sample, s.stop_sample, str(s.source_rows)) for s in found}) == 1
        rows = [row for step in found for row in rows_of(step)]
        out.append((rows, sum(s.digest for s in found) % 2**32, found[0].stop_sample))
    for loader in loaders:
        loader.close()
    return out


@given(worlds=st.lists(st.integers(1, 7), min_size=1, max_size=4), rows=st.integers(1, 9),
       micros=st.lists(st.integers(1, 5), min_size=4, max_size=4), steps=st.lists(st.integers(1, 6), min_size=4, max_size=4),
       share=st.sampled_from([0.5, 0.9, 0.37]), seed=st.integers(0, 3), block=st.sampled_from([1, 4, 50]))
@FIXTURES
def test_any_ranks_and_stops_give_the_one_order(two_sources, worlds, rows, micros, steps, share, seed, block) -> None:
    """Stop and go on with other ranks and micro-batches at random steps: rows and digests equal one rank's, and
    within an epoch of a source no row comes twice."""
    run = make_run({"a": (two_sources["a"], share), "b": (two_sources["b"], 1 - share)}, rows=rows, seed=seed,
                   micro_rows=rows, mask_documents=False, shuffle_block=block)
    position, found = 0, []
    for world_size, micro_rows, n in zip(worlds, micros, steps, strict=False):
        split = dataclasses.replace(run, batch=dataclasses.replace(run.batch, micro_rows=micro_rows))
        part = global_batch(split, world_size, position, n)
        found += part
        position = part[-1][2]
    assert found == global_batch(run, 1, 0, len(found))
    for base in (0, 10**6):
        firsts = [row[0] for step_rows, _, _ in found for row in step_rows if base <= row[0] < base + 10**6]
        epoch = (two_sources_rows(two_sources, base) - 1) // 8
        for start in range(0, len(firsts), epoch):
            assert len(set(firsts[start:start + epoch])) == len(firsts[start:start + epoch])


def two_sources_rows(folders: dict[str, Path], base: int) -> int:
    from officina.trainer.data.manifest import open_dataset
    return open_dataset(folders["b" if base else "a"]).manifest.splits["train"].tokens


def test_whole_epochs_have_every_row_once(tmp_path: Path) -> None:
    stream = write_tokens(tmp_path / "a", {"train": [3, 50, 9, 1, 18]}, shard_bytes=200)["train"]
    run = make_run({"a": (tmp_path / "a", 1)}, rows=5, micro_rows=2, mask_documents=False)
    epoch = [row for rows, _, _ in global_batch(run, 2, 0, 6) for row in rows]  # 30 rows: three epochs of ten
    assert len(stream) == 81
    for start in (0, 10, 20):
        assert sorted(row[0] for row in epoch[start:start + 10]) == list(range(0, 80, 8))
    assert epoch[:10] != epoch[10:20]


@pytest.mark.parametrize("shard_bytes", [100, 1 << 30])
def test_labels_are_the_next_tokens_and_end_at_documents(tmp_path: Path, shard_bytes: int) -> None:
    """Against a slow reading of the stream, token by token; some rows lie on two shards."""
    lengths = [1, 1, 5, 8, 3, 30, 2, 1, 1, 16, 7, 8, 8, 1, 9]
    stream = write_tokens(tmp_path / "a", {"train": lengths}, shard_bytes=shard_bytes)["train"]
    assert (len(list((tmp_path / "a" / "shards").iterdir())) > 3) is (shard_bytes == 100)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    run = make_run({"a": (tmp_path / "a", 1)}, rows=12, micro_rows=5)
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        step = loader.next_step()
    seen = 0
    for micro in step.micros:
        fields = {name: value.numpy() for name, value in micro.fields.items()}
        assert micro.loss_tokens == np.count_nonzero(fields["labels"] != IGNORE)
        for b in range(len(fields["tokens"])):
            start = int(fields["tokens"][b, 0])
            here = np.arange(start, start + 8)
            assert np.array_equal(fields["tokens"][b], stream[here])
            same = document_of[here + 1] == document_of[here]
            assert np.array_equal(fields["labels"][b], np.where(same, stream[here + 1], IGNORE))
            documents = document_of[here] - document_of[start]
            assert np.array_equal(fields["documents"][b], documents)
            first_of_document = np.searchsorted(documents, documents)
            assert np.array_equal(fields["positions"][b], np.arange(8) - first_of_document)
            seen += 1
    assert seen == 12 and step.loss_tokens == sum(m.loss_tokens for m in step.micros)
    types = {name: value.dtype for name, value in step.micros[0].fields.items()}
    assert types == {"tokens": torch.int64, "labels": torch.int64, "documents": torch.int32, "positions": torch.int64}


def test_missing_rows_carry_no_loss(two_sources) -> None:
    run = make_run({"a": (two_sources["a"], 1)}, rows=5, micro_rows=2)
    loss_tokens, shapes = [], set()
    for rank in range(4):
        with Loader(run, rank=rank, world_size=4, position=0) as loader:
            step = loader.next_step()
        loss_tokens.append(step.loss_tokens)
        shapes.add(tuple(micro.fields["labels"].shape for micro in step.micros))
        missing = 2 - len(run.batch.rows_of_rank(rank, 4))
        without_loss = sum(int((m.fields["labels"] == IGNORE).all(dim=1).sum()) for m in step.micros)
        assert without_loss == missing
    assert len(shapes) == 1
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        assert loader.next_step().loss_tokens == sum(loss_tokens)


def test_more_ranks_than_rows(two_sources) -> None:
    run = make_run({"a": (two_sources["a"], 1)}, rows=2)
    with Loader(run, rank=0, world_size=3, position=0) as loader:
        step = loader.next_step()
    assert step.loss_tokens == 0 and step.digest == 0 and [m.loss_tokens for m in step.micros] == [0]


def test_skip_leaves_out_and_moves_nothing_else(two_sources) -> None:
    source = {"a": (two_sources["a"], 1)}
    plain = [row for rows, _, _ in global_batch(make_run(source, mask_documents=False), 1, 0, 8) for row in rows]
    run = make_run(source, mask_documents=False, skip=[[5, 9], [14, 15], [2, 3]])
    found = global_batch(run, 2, 0, 4)
    kept = [k for k in range(100) if k not in {2, 5, 6, 7, 8, 14}][:16]
    assert [row for rows, _, _ in found for row in rows] == [plain[k] for k in kept]
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        assert [loader.next_step().skipped for _ in range(4)] == [[[2, 3]], [[5, 9]], [[14, 15]], []]


def test_unshuffled_reads_in_order(two_sources) -> None:
    run = make_run({"a": (two_sources["a"], 1)}, rows=3, shuffle=False, mask_documents=False)
    assert [row[0] for rows, _, _ in global_batch(run, 1, 0, 3) for row in rows] == list(range(0, 72, 8))


def test_new_weights_and_a_new_source_keep_every_cursor(two_sources) -> None:
    """a alone, then b joins, then other weights: each source's rows are those it would have given alone."""
    alone = {name: [row for rows, _, _ in global_batch(make_run({name: (folder, 1)}, mask_documents=False), 1, 0, 20)
                    for row in rows] for name, folder in two_sources.items()}
    run, position, found = make_run({"a": (two_sources["a"], 1)}, mask_documents=False), 0, []
    for weights in ({"a": 1}, {"a": 1, "b": 3}, {"a": 2, "b": 1}, {"b": 1}):
        mixture = {name: SourceConfig(path=str(two_sources[name]), weight=w) for name, w in weights.items()}
        state = None
        if position:
            with Loader(run, rank=0, world_size=1, position=position) as loader:
                state = loader.state()
        run = dataclasses.replace(run, data=extend_timeline(run.data, position, mixture))
        if state:
            with Loader(run, rank=0, world_size=1, position=position) as loader:
                loader.check_state(state)
                assert loader.state() == state  # also of a source that gives no rows any more
        part = global_batch(run, 2, position, 4)
        found += [row for rows, _, _ in part for row in rows]
        position = part[-1][2]
    for name, base in (("a", 0), ("b", 10**6)):
        of_source = [row for row in found if base <= row[0] < base + 10**6]
        assert len(of_source) > 12 and of_source == alone[name][:len(of_source)]


@pytest.mark.parametrize("version", [1, 2])
def test_state_is_checked(two_sources, tmp_path: Path, version: int) -> None:
    run = make_run({"a": (two_sources["a"], 1), "b": (two_sources["b"], 1)})
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        first, _ = loader.next_step(), loader.next_step()
        state = loader.state(first.stop_sample)
        assert state["position"] == 4 and loader.state()["position"] == 8
        fingerprints = loader.fingerprints
    if version == 1:  # as in checkpoints from before there were blocks
        state = {"position": 4, "seed": 0, "seq_len": 8, "shuffle": 1, "split": "train", "cursors": {"a": 2, "b": 2},
                 "fingerprints": fingerprints}
    write_tokens(tmp_path / "other", {"train": [400]})

    def check(changed: RunConfig, position: int = 4) -> None:
        with Loader(changed, rank=0, world_size=1, position=position) as loader:
            loader.check_state(state)

    check(run)
    with pytest.raises(DataError, match=r"position=8.*position=4"):
        check(run, 8)
    with pytest.raises(DataError, match=r"Try: seed=0"):
        check(dataclasses.replace(run, seed=1))
    with pytest.raises(DataError, match=r"Try: batch\.seq_len=8"):
        check(dataclasses.replace(run, batch=BatchConfig(seq_len=4, global_tokens=16)))
    with pytest.raises(DataError, match=r"Try: data\.shuffle=1"):
        check(dataclasses.replace(run, data=dataclasses.replace(run.data, shuffle=False)))
    with pytest.raises(DataError, match=r"Try: data\.shuffle_block=1"):
        check(dataclasses.replace(run, data=dataclasses.replace(run.data, shuffle_block=4)))
    with pytest.raises(DataError, match=r"Try: data\.split=train"):
        check(dataclasses.replace(run, data=dataclasses.replace(run.data, split="validation")))
    with pytest.raises(DataError, match=r"data\.timeline: at sample 4 .*officina resume"):
        check(make_run({"a": (two_sources["a"], 3), "b": (two_sources["b"], 1)}))
    with pytest.raises(DataError, match=rf"data\.sources\.b: .* trained on {fingerprints['b'][:8]}\.\.\."):
        check(make_run({"a": (two_sources["a"], 1), "b": (tmp_path / "other", 1)}))
    state = {"version": 3}
    with pytest.raises(DataError, match="version 3, this officina reads 1 and 2"):
        check(run)


def test_the_state_of_400_sources_is_below_4_kib(two_sources) -> None:
    run = make_run({f"a source with a long name, number {i}": (two_sources["a"], 1 + i % 7) for i in range(400)}, rows=400)
    with Loader(run, rank=0, world_size=1, position=10**9) as loader:
        state = loader.state()
        loader.check_state(state)
    assert len(json.dumps(state)) < 4096


def test_a_data_set_may_move(two_sources, tmp_path: Path) -> None:
    run = make_run({"a": (two_sources["a"], 1)})
    with Loader(run, rank=0, world_size=1, position=8) as loader:
        state, step = loader.state(), loader.next_step()
    (tmp_path / "moved").symlink_to(two_sources["a"])
    with Loader(make_run({"a": (tmp_path / "moved", 1)}), rank=0, world_size=1, position=8) as loader:
        loader.check_state(state)
        assert loader.next_step().digest == step.digest


def test_a_damaged_footer_stops_the_consumer_with_its_file(tmp_path: Path) -> None:
    """Found by the thread that reads ahead; damaged tokens are another matter, see test_integrity.py."""
    write_tokens(tmp_path / "a", {"train": [500, 500]})
    shard = tmp_path / "a" / "shards" / "train-00000.dls"
    content = bytearray(shard.read_bytes())
    content[HEADER_BYTES + 4000 + 32] ^= 1  # sections begin at multiples of 64
    shard.write_bytes(content)
    with Loader(make_run({"a": (tmp_path / "a", 1)}), rank=0, world_size=1, position=0) as loader:
        with pytest.raises(DataError, match=rf"{shard}: document_ends in the footer .* does not match its checksum"):
            loader.next_step()
        with pytest.raises(RuntimeError, match=r"closed"):
            loader.next_step()


def test_closing_ends_the_thread_even_when_nobody_reads(two_sources, monkeypatch) -> None:
    monkeypatch.setattr(readahead, "memory_bytes", lambda: 1)  # so that a thread has to tell the kernel
    before = threading.active_count()
    loaders = [Loader(make_run({"a": (two_sources["a"], 1)}, prefetch_batches=1), rank=0, world_size=1, position=0)
               for _ in range(5)]
    for loader in loaders:
        loader.next_step()
        loader.next_step()
    assert threading.active_count() > before + 5  # the threads that read ahead end too
    for loader in loaders:
        loader.close()
        loader.close()
    assert threading.active_count() == before


def test_validation_is_the_same_on_any_ranks(two_sources) -> None:
    run = make_run({"a": (two_sources["a"], 1), "b": (two_sources["b"], 5)}, max_rows=7, micro_rows=2)
    assert validation_sources(run) == ["a", "b"]
    whole = list(validation_rows(run, 0, 1))
    assert sum(len(b.fields["tokens"]) for b in whole) == 14
    assert whole[0].fields["tokens"][:, 0].tolist() == [0, 8]
    for world_size in (2, 3, 9):
        ranks = [list(validation_rows(run, rank, world_size)) for rank in range(world_size)]
        assert len({tuple(b.fields["tokens"].shape for b in batches) for batches in ranks}) == 1
        assert sum(b.loss_tokens for batches in ranks for b in batches) == sum(b.loss_tokens for b in whole)
        assert labels_of(*ranks) == labels_of(whole)
    only = list(validation_rows(run, 0, 1, "b"))
    assert [b.loss_tokens for b in only] == [b.loss_tokens for b in whole[4:]]


def labels_of(*ranks: list[Batch]) -> list[int]:
    labels = torch.cat([b.fields["labels"].flatten() for batches in ranks for b in batches])
    return sorted(labels[labels != IGNORE].tolist())


# ---- what does not fit ---------------------------------------------------------------------------------------------
def test_data_that_does_not_fit_the_run(two_sources, tmp_path: Path) -> None:
    def opened(run: RunConfig) -> None:
        Loader(run, rank=0, world_size=1, position=0)

    with pytest.raises(DataError, match=r"is no data set: it has no dataset\.json.*officina data build"):
        opened(make_run({"a": (tmp_path, 1)}))
    with pytest.raises(DataError, match=r"has no split dev, only"):
        opened(make_run({"a": (two_sources["a"], 1)}, split="dev"))
    with pytest.raises(DataError, match=r"fewer than one row of batch\.seq_len=100000.*Try batch\.seq_len="):
        opened(make_run({"a": (two_sources["a"], 1)}, seq_len=100_000))
    write_records(tmp_path / "records", [b"x"], name="r")
    with pytest.raises(DataError, match=r"holds records, but model\.kind=decoder reads tokens"):
        opened(make_run({"a": (tmp_path / "records", 1)}))
    run = make_run({"a": (two_sources["a"], 1)})
    gone = dataclasses.replace(run, data=extend_timeline(run.data, 9, {"c": SourceConfig(path="c")}))
    gone = dataclasses.replace(gone, data=dataclasses.replace(gone.data, sources=run.data.sources))
    with pytest.raises(DataError, match=r"names source c.*Try: data\.sources\.c\.path=DIR"):
        opened(gone)
    for name in "xy":
        write_tokens(tmp_path / name, {"train": [90]}, tokenizer=tokenizer_info(f"{ord(name):02x}" * 32, 300))
    with pytest.raises(DataError, match=r"has 300 tokens, but model\.vocab_size=256.*Try: model\.vocab_size=300"):
        opened(make_run({"x": (tmp_path / "x", 1)}, vocab_size=256))
    with pytest.raises(DataError, match=r"x \(7878.*y \(7979.*different tokenizers"):
        opened(make_run({"x": (tmp_path / "x", 1), "y": (tmp_path / "y", 1)}))


# ---- records -------------------------------------------------------------------------------------------------------
def decode(record: bytes) -> dict[str, torch.Tensor]:
    if record == b"\xff":
        raise ValueError("secret words of the record")
    if record.startswith(b"odd"):
        return {"x": int(record)}
    return {"x": torch.frombuffer(bytearray(record), dtype=torch.uint8)[:2].float(), "n": torch.tensor(len(record))}


def records_run(folder: Path, decoder: str = "test_loader_decoders:decode", rows: int = 5, **data: object) -> RunConfig:
    run = make_run({"r": (folder, 1)}, seq_len=1, rows=rows, **data)
    return dataclasses.replace(run, model=CustomModelConfig(factory="m:f", loss="m:l", decoder=decoder))


@pytest.fixture(autouse=True)
def _decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types
    module = types.ModuleType("test_loader_decoders")
    module.decode = decode
    monkeypatch.setitem(sys.modules, "test_loader_decoders", module)


def test_records_once_each_on_any_ranks(tmp_path: Path) -> None:
    records = [bytes([i, i + 1, *range(i)]) for i in range(10)]
    write_records(tmp_path / "r", records, name="r", shard_bytes=30)
    write_records(tmp_path / "r", records[:3], name="r", split="validation")
    run, digests = records_run(tmp_path / "r"), {}
    for world_size in (1, 2, 3, 7):
        loaders = [Loader(run, rank=r, world_size=world_size, position=0) for r in range(world_size)]
        firsts = []
        for _ in range(2):  # one epoch
            steps = [loader.next_step() for loader in loaders]
            digests.setdefault(world_size, []).append(sum(s.digest for s in steps) % 2**32)
            assert sum(s.loss_tokens for s in steps) == 5
            for step in steps:
                for micro in step.micros:
                    assert micro.fields["x"].shape == (len(micro.fields["valid"]), 2)
                    firsts += micro.fields["x"][micro.fields["valid"], 0].tolist()
        assert sorted(firsts) == list(range(10))
        for loader in loaders:
            loader.close()
    assert all(d == digests[1] for d in digests.values())
    held_out = list(validation_rows(run, 1, 2))
    assert [b.fields["valid"].tolist() for b in held_out] == [[True, True]]


def test_faults_of_a_decoder(tmp_path: Path) -> None:
    write_records(tmp_path / "bad", [b"\xff"], name="r")
    with Loader(records_run(tmp_path / "bad"), rank=0, world_size=1, position=0) as loader:
        with pytest.raises(DataError, match=r"train-00000\.dls record 0: model\.decoder .* raised ValueError") as told:
            loader.next_step()
        assert "secret" not in str(told.value)
    write_records(tmp_path / "uneven", [b"a", b"bcd"], name="r")
    with Loader(records_run(tmp_path / "uneven"), rank=0, world_size=1, position=0) as loader:
        with pytest.raises(DataError, match=r"field x differs in shape or is missing"):
            loader.next_step()
    with pytest.raises(DataError, match=r"model\.decoder=nowhere:f: cannot be imported.*package\.module:name"):
        Loader(records_run(tmp_path / "bad", "nowhere:f"), rank=0, world_size=1, position=0)
    write_tokens(tmp_path / "tokens", {"train": [50]})
    with pytest.raises(DataError, match=r"holds tokens, but model.kind=custom reads records"):
        Loader(records_run(tmp_path / "tokens"), rank=0, world_size=1, position=0)


def test_what_a_decoder_says_of_a_record_is_told_nowhere(tmp_path: Path) -> None:
    """Not even in the traceback that a rank leaves behind: it may quote the record, and the record may be secret."""
    write_records(tmp_path / "bad", [b"odd secret"], name="r")
    with Loader(records_run(tmp_path / "bad"), rank=0, world_size=1, position=0) as loader:
        with pytest.raises(DataError) as told:
            loader.next_step()
    text = "".join(traceback.format_exception(told.value))
    assert "odd secret" not in text and re.search(r"raised ValueError at \S+\.py:\d+ on its 10 bytes", text)
    line = next(n for n, words in enumerate(Path(__file__).read_text().splitlines(), 1) if 'return {"x": int(record)}' in words)
    assert f"at {__file__}:{line} on" in text
