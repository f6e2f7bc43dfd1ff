"""Best-fit rows: no token lost, no document crossed, loss where it belongs; a plan that is one function of the data."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_run, write_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from officina.launch.cli import main as officina
from officina.trainer.batch import IGNORE
from officina.trainer.config import ObjectiveConfig, RunConfig
from officina.trainer.data.contents import extents_of_row
from officina.trainer.data.loader import Loader, validation_rows
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.packing import Plan, load_plan, make_plan, plan_path, store_plan
from officina.trainer.data.reader import RowReader
from officina.trainer.data.removal import remove
from officina.trainer.data.stream import Stream
from officina.trainer.data.verify import verify
from officina.trainer.errors import DataError

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
FIXTURES = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def best_fit_one_by_one(lengths: list[int], room: int) -> list[int]:
    """Sums of the rows when each document in turn, longest first, goes where it leaves the least room."""
    sums: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, filled in enumerate(sums) if filled + length <= room]
        if fits:
            sums[max(fits, key=lambda i: (sums[i], -i))] += length
        else:
            sums.append(length)
    return sums


def test_a_row_longer_than_all_there_is_holds_all() -> None:
    plan = make_plan(np.cumsum([3, 4, 1]), 10**12, "split")
    assert (plan.starts.tolist(), plan.lengths.tolist(), plan.rows.tolist()) == ([0, 3, 7], [3, 4, 1], [0, 3])


@given(lengths=LENGTHS, seq_len=st.integers(1, 40))
@settings(deadline=None, max_examples=200)
def test_every_token_has_one_place_and_rows_are_those_of_best_fit(lengths, seq_len) -> None:
    plan = make_plan(np.cumsum(lengths), seq_len, "split")
    piece, row = plan.pieces(np.arange(len(plan)))
    assert piece.tolist() == list(range(len(plan.starts)))
    sums = np.bincount(row, weights=plan.lengths, minlength=len(plan))
    assert sums.max() <= seq_len + 1
    assert sorted(sums) == sorted(best_fit_one_by_one(plan.lengths.tolist(), seq_len + 1))
    labels = Counter(int(k) for a, n in zip(plan.starts, plan.lengths, strict=True) for k in range(a + 1, a + n))
    firsts = set(np.cumsum([0, *lengths[:-1]]).tolist())
    assert labels == Counter(k for k in range(sum(lengths)) if k not in firsts)
    document_of = np.searchsorted(np.cumsum(lengths), plan.starts, side="right")
    assert (np.searchsorted(np.cumsum(lengths), plan.starts + plan.lengths - 1, side="right") == document_of).all()
    starts, stops = plan.ranges(np.arange(len(plan)))
    counted = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
    assert sorted(counted.tolist()) == list(range(sum(lengths)))


def labels_of_an_epoch(run: RunConfig, world_size: int) -> tuple[Counter, set]:
    """Each (input, label) that carries loss, how often; and of each its (document's first token, position)."""
    rows = sum(RowReader(run).rows.values())
    found, seen = Counter(), set()
    for rank in range(world_size):
        with Loader(run, rank=rank, world_size=world_size, position=0) as loader:
            for _ in range(rows // run.batch.rows):
                step = loader.next_step()
                assert step.loss_tokens == sum(int((m.fields["labels"] != IGNORE).sum()) for m in step.micros)
                for micro in step.micros:
                    fields = {name: value.numpy() for name, value in micro.fields.items()}
                    for b, t in zip(*np.nonzero(fields["labels"] != IGNORE), strict=True):
                        token, label = int(fields["tokens"][b, t]), int(fields["labels"][b, t])
                        found[token, label] += 1
                        first = t - fields["positions"][b, t]
                        same = fields["documents"][b] == fields["documents"][b, t]
                        assert np.flatnonzero(same)[0] == first
                        seen.add((token, int(fields["tokens"][b, first]), int(fields["positions"][b, t])))
    return found, seen


@given(lengths=st.lists(st.integers(1, 30), min_size=12, max_size=60), seed=st.integers(0, 99), world_size=st.integers(1, 3))
@FIXTURES
def test_an_epoch_trains_each_marked_token_once_within_its_document(tmp_path_factory, lengths, seed, world_size) -> None:
    folder = tmp_path_factory.mktemp("data") / "a"
    folder.mkdir()
    marked = np.random.default_rng(seed).random(sum(lengths)) < 0.4
    write_tokens(folder, {"train": lengths}, shard_bytes=400, trained={"train": marked}, samples="answers")
    run = make_run({"a": (folder, 1.0)}, seq_len=32, rows=1, seed=seed)
    ends = np.cumsum(lengths)
    found, seen = labels_of_an_epoch(run, world_size)
    inside = np.setdiff1d(np.arange(sum(lengths)), ends - 1)
    assert found == Counter((int(k), int(k) + 1) for k in inside if marked[k + 1])
    for token, first, position in seen:  # a document begins at position 0 with its first token
        document = int(np.searchsorted(ends, token, side="right"))
        assert first == ends[document] - lengths[document] and position == token - first


def test_packed_and_cut_sources_mix_and_any_ranks_give_the_same_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for name, base in (("chat", 0), ("web", 10**6)):
        (tmp_path / name).mkdir()
        lengths = rng.integers(1, 30, 70).tolist()
        marked = {"trained": {"train": rng.random(sum(lengths)) < 0.5}, "samples": "answers"} if name == "chat" else {}
        write_tokens(tmp_path / name, {"train": lengths}, base=base, shard_bytes=700, **marked)
    run = make_run({"chat": (tmp_path / "chat", 0.7), "web": (tmp_path / "web", 0.3)}, seq_len=32, rows=6, micro_rows=2)

    def batches(world_size: int, position: int) -> tuple[list, int]:
        loaders = [Loader(run, rank=r, world_size=world_size, position=position) for r in range(world_size)]
        steps = [loader.next_step() for loader in loaders]
        [loader.close() for loader in loaders]
        rows = [tuple(row) for s in steps for m in s.micros for row in m.fields["labels"].tolist() if set(row) != {IGNORE}]
        assert sum(s.digest for s in steps) % 2**32 == RowReader(run).digest(np.arange(position, position + 6))
        return sorted(rows), sum(m.filled_tokens for s in steps for m in s.micros)

    for position in (0, 6, 48):
        assert batches(1, position) == batches(2, position) == batches(5, position)
    reader = RowReader(run)
    assert set(reader.packing) == {"chat"} and len(reader.streams["chat"].plan) == reader.rows["chat"]


def test_what_padding_and_neighbours_are_does_not_matter(tmp_path: Path) -> None:
    """The padding of a row is one more document, without labels, and `filled_tokens` leaves it out."""
    write_tokens(tmp_path, {"train": [5, 4, 3, 2]}, trained={"train": np.ones(14, bool)}, samples="answers")
    run = make_run({"a": (tmp_path, 1.0)}, seq_len=10, rows=2, shuffle=False)
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        [micro] = loader.next_step().micros
    assert micro.fields["tokens"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 12], [9, 10, 11, 0, 0, 0, 0, 0, 0, 0]]
    i = IGNORE
    assert micro.fields["labels"].tolist() == [[1, 2, 3, 4, i, 6, 7, 8, i, 13], [10, 11, i, i, i, i, i, i, i, i]]
    assert micro.fields["documents"].tolist() == [[0] * 5 + [1] * 4 + [2], [0] * 3 + [1] * 7]
    assert micro.fields["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]]
    assert (micro.loss_tokens, micro.filled_tokens) == (10, 13)
    extents = extents_of_row(Stream(open_dataset(tmp_path), "train").lay_out(run.data, 10), 0, 10)
    assert [(e.document.rpartition(":")[2], e.start, e.stop) for e in extents] == [("0", 0, 5), ("1", 5, 9), ("3", 9, 11)]


def test_documents_are_packed_whole_when_asked_and_held_out_rows_are_too(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"train": [20, 3, 4], "validation": [3, 3]})
    run = make_run({"a": (tmp_path, 1.0)}, seq_len=8, rows=1, packing="best_fit", shuffle=False)
    assert sum(labels_of_an_epoch(run, 1)[0].values()) == 27 - 3
    [batch] = validation_rows(run, 0, 1)
    assert batch.loss_tokens == 4 and batch.fields["documents"][0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert RowReader(dataclasses.replace(run, data=dataclasses.replace(run.data, packing="auto"))).rows == {"a": 3}  # cut


def test_removed_documents_give_no_loss_in_packed_rows(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"train": [5, 4, 3]})
    run = make_run({"a": (tmp_path, 1.0)}, seq_len=11, rows=1, packing="best_fit")
    before = RowReader(run).packing
    remove(tmp_path, ["shards/train-00000.dls:1"])
    found, _ = labels_of_an_epoch(run, 1)
    assert set(found) == {(0, 1), (1, 2), (2, 3), (3, 4), (9, 10), (10, 11)}
    assert RowReader(run).packing == before


def test_lost_blocks_give_no_loss_in_packed_rows_and_part_what_is_around_them(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"train": [65_530, 20, 100]})  # a block of the shard is 65,536 tokens
    run = make_run({"a": (tmp_path, 1.0)}, seq_len=65_699, rows=1, packing="best_fit")
    stream = Stream(open_dataset(tmp_path), "train").lay_out(run.data, 65_699)
    stream.set_aside({"shards/train-00000.dls": [0]})
    rows = stream.gather(np.arange(1), 65_699, borders=True)
    assert rows.border_columns.tolist() == [65_530, 65_536, 65_550, 65_650]  # a document, the loss's end, a document, padding
    assert rows.removed[0, :65_536].all() and not rows.removed[0, 65_536:].any()
    assert rows.tokens[0, 65_536:65_650].tolist() == list(range(65_536, 65_650))
    assert rows.lost == {"shards/train-00000.dls": [0]}


OVERLONG = {"trained": {"train": np.isin(np.arange(30), (1, 2, 25, 28))}, "samples": "answers"}  # documents 0-9, 10-27, 28-29


def test_samples_longer_than_a_row_are_refused_cut_off_or_left_out_and_counted(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"train": [10, 18, 2]}, **OVERLONG)

    def plan(overlong: str, seq_len: int = 8) -> Plan:
        run = make_run({"a": (tmp_path, 1.0)}, seq_len=seq_len, overlong=overlong)
        return Stream(open_dataset(tmp_path), "train").lay_out(run.data, seq_len, "data.sources.a").plan

    with pytest.raises(DataError, match=r"data\.sources\.a: 2 of 3 samples are longer than a row of batch\.seq_len=8 and its "
                       r"label, the longest has 18 tokens \(number 1\)\. Try: batch\.seq_len=17, or data\.overlong=truncate"):
        plan("auto")
    assert len(plan("refuse", 17)) == 2
    cut = plan("truncate")
    assert (cut.truncated, cut.emptied, cut.left_out) == (1, 1, 0)  # of the second sample only the prompt would be left
    assert sorted(zip(cut.starts.tolist(), cut.lengths.tolist(), strict=True)) == [(0, 9), (28, 2)]
    left = plan("leave_out")
    assert (left.left_out, left.starts.tolist()) == (2, [28])
    assert plan("split").tokens == 30 + 3  # 10 = 9 + 2, 18 = 9 + 9 + 2
    assert plan("split").facts()["truncated"] == 0


def of_pairs(folder: Path, **how: object) -> RunConfig:
    return dataclasses.replace(make_run({"a": (folder, 1.0)}, **how), objective=ObjectiveConfig(kind="dpo"))


def test_pairs_stay_in_one_row(tmp_path: Path) -> None:
    lengths = [3, 4, 2, 2, 5, 5, 1, 2]
    write_tokens(tmp_path, {"train": lengths}, samples="pairs")
    run = of_pairs(tmp_path, seq_len=11, rows=1, shuffle=False)
    plan = RowReader(run).streams["a"].plan
    assert sorted(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True)) == [(0, 7), (7, 4), (11, 10), (21, 3)]
    rows = RowReader(run).read(np.arange(len(plan)))
    borders = Counter(rows.border_rows.tolist())
    for r in range(len(plan)):
        pairs = int(plan.rows[r + 1] - plan.rows[r])
        assert borders[r] == 2 * pairs - (rows.filled[r] == 12)  # the padding is one more
    with pytest.raises(DataError, match=r"data\.overlong=split would compare parts of answers\. Try: data\.overlong=leave_out"):
        RowReader(of_pairs(tmp_path, seq_len=8, overlong="split"))
    with pytest.raises(DataError, match=r"1 of 4 pairs are longer .* batch\.seq_len=9, or data\.overlong=leave_out"):
        RowReader(of_pairs(tmp_path, seq_len=8))
    with pytest.raises(DataError, match=r"holds pairs, which data\.packing=cut would cut through\. Try: data\.packing=auto"):
        RowReader(of_pairs(tmp_path, seq_len=8, packing="cut"))


def test_data_of_which_every_row_is_left_out_is_told_so(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"train": [30, 40, 50, 25]}, samples="pairs")
    with pytest.raises(DataError, match=r"data\.sources\.a: nothing is left of split train .* longer than a row of "
                       r"batch\.seq_len=8 .*Try: batch\.seq_len=74"):
        RowReader(of_pairs(tmp_path, seq_len=8, overlong="leave_out"))
    assert RowReader(of_pairs(tmp_path, seq_len=74, overlong="leave_out")).rows == {"a": 2}


def test_a_rank_without_a_row_has_the_fields_of_the_others(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"train": [3, 4, 2, 2]}, samples="pairs")
    run, fields = of_pairs(tmp_path, seq_len=11, rows=1), []
    for rank in range(2):
        with Loader(run, rank=rank, world_size=2, position=0) as loader:
            loader.refer({"a": np.zeros((2, 2), np.float32)})
            step = loader.next_step()
        fields.append(set(step.micros[0].fields))
    assert step.loss_tokens == 2 and fields[0] == fields[1] == {"tokens", "labels", "documents", "positions", "reference"}


def test_a_stored_plan_is_the_one_that_would_be_made_and_damage_shows(tmp_path: Path, capsys) -> None:
    write_tokens(tmp_path, {"train": [10, 18, 2, 7, 7]})
    run = make_run({"a": (tmp_path, 1.0)}, seq_len=8, packing="best_fit")
    made, dataset = RowReader(run).streams["a"].plan, open_dataset(tmp_path)
    path = plan_path(tmp_path, "train", 8, "split")
    store_plan(path, made, dataset.manifest.fingerprint)
    found = RowReader(run).streams["a"].plan
    assert found.digest == made.digest and found.facts() == made.facts()
    assert all((getattr(found, n) == getattr(made, n)).all() for n in ("starts", "lengths", "rows"))
    path.unlink()
    assert officina(["data", "pack", str(tmp_path), "--seq-len", "8"]) == 0
    out = capsys.readouterr().out  # rows of 9, 9, 9, 7 + 2, 7 + 2, 2: 47 tokens of 54
    assert ["train", "6", "87.04%", "0", "0", made.digest] in [line.split() for line in out.splitlines()]
    assert "batch.seq_len=8 data.packing=best_fit" in out
    assert load_plan(path, dataset.manifest.fingerprint).digest == made.digest and verify(tmp_path).faults == []
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(DataError, match="train-8-split.plan: is damaged: it does not match its checksum. Make it again: "
                       f"officina data pack {tmp_path}"):
        RowReader(run)
    assert [fault for fault in verify(tmp_path).faults if "plan: is damaged" in fault]
    path.write_bytes(content[:-9])
    with pytest.raises(DataError, match="is damaged"):
        load_plan(path, dataset.manifest.fingerprint)
    store_plan(path, made, "0" * 64)
    with pytest.raises(DataError, match="is of another version of the data set"):
        RowReader(run)


def test_a_checkpoint_goes_on_only_with_its_plan(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"train": [5, 9, 2, 7, 12] * 5})

    def loader(**data: object) -> Loader:
        return Loader(make_run({"a": (tmp_path, 1.0)}, seq_len=8, **data), rank=0, world_size=1, position=4)

    packed, cut = loader(packing="best_fit"), loader()
    packed.check_state(loader(packing="best_fit").state())
    for mine, theirs, why in ((packed, cut, "best_fit, but the checkpoint was trained on rows cut"),
                              (cut, packed, r"is cut into rows, but the checkpoint was trained by another plan"),
                              (loader(packing="best_fit", overlong="leave_out"), packed,
                               r"is packed by plan [0-9a-f]{16}, but the checkpoint was trained by another plan")):
        with pytest.raises(DataError, match=why):
            mine.check_state(theirs.state())
