"""Damaged blocks: read once more, taken from the origin of a copy, else without loss, the same on any ranks; then the end."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import make_run, write_tokens
from lives import DECODER, begin, changed, losses, plain_run, states

from officina.launch.report_gather import gather
from officina.launch.report_page import page
from officina.trainer.batch import IGNORE, Batch
from officina.trainer.config import CustomModelConfig, ObjectiveConfig, RunConfig
from officina.trainer.data import shards
from officina.trainer.data.integrity import mend, origin_of, read_past_cache, still_lost
from officina.trainer.data.ledger import Ledger, audit, read_ledger
from officina.trainer.data.loader import Loader, StepData, validation_batches
from officina.trainer.data.manifest import open_dataset, write_manifest
from officina.trainer.data.reader import validation_streams
from officina.trainer.data.removal import remove
from officina.trainer.data.shard_writer import SplitWriter, write_records
from officina.trainer.data.shards import GRANULE_BYTES, HEADER_BYTES, Shard
from officina.trainer.data.stage import stage
from officina.trainer.data.summary import receipt, summarise
from officina.trainer.data.verify import verify
from officina.trainer.errors import EXIT_CONTINUE, EXIT_DONE, DataError
from officina.trainer.evaluate import held_out
from officina.trainer.ranks import LONE, Ranks
from officina.trainer.run_dir import committed_steps, save_config

BLOCK = GRANULE_BYTES // 4
"""Tokens of a block in u32."""
T = 4000
"""Divides no block: what stands around a lost one lies within rows."""


def flip(folder: Path, block: int, shard: int = 0, split: str = "train") -> None:
    """One bit of a block of a shard on the disk."""
    path = folder / "shards" / f"{split}-{shard:05d}.dls"
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + block * GRANULE_BYTES + 12345)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


@pytest.fixture()
def data(tmp_path: Path) -> Path:
    """Two shards of 3.4 blocks each, tokens 0, 1, ..., in documents of 5,000."""
    write_tokens(tmp_path / "d", {"train": [5_000] * 88}, shard_bytes=44 * 20_000)
    assert [e.tokens for e in open_dataset(tmp_path / "d").shards] == [220_000, 220_000]
    return tmp_path / "d"


def run_of(data: Path, **how: object) -> RunConfig:
    return make_run({"a": (data, 1)}, **{"seq_len": T, "rows": 6, "micro_rows": 2, **how})


def steps(run: RunConfig, n: int, world_size: int = 1, position: int = 0) -> list[list[StepData]]:
    """Of each step, what each rank got."""
    loaders = [Loader(run, rank=r, world_size=world_size, position=position) for r in range(world_size)]
    found = [[loader.next_step() for loader in loaders] for _ in range(n)]
    for loader in loaders:
        loader.close()
    return found


def field(found: list[list[StepData]], name: str) -> np.ndarray:
    """(rows, T) of all ranks in order, padding left out."""
    parts = []
    for ranks in found:
        for data in ranks:
            rows = np.concatenate([m.fields[name].numpy() for m in data.micros])
            real = np.concatenate([m.fields["tokens"].numpy() for m in data.micros])[:, -1] > 0
            parts.append(rows[real])
    return np.concatenate(parts)


@pytest.mark.parametrize("mask", [True, False])
def test_a_lost_block_gives_no_loss_and_changes_nothing_else(data: Path, mask: bool) -> None:
    run = run_of(data, mask_documents=mask)
    n = -(-(440_000 // T) // 6)  # a whole epoch: every row
    before = steps(run, n)
    flip(data, 1)
    flip(data, 3, shard=1)  # the last, shorter than the others
    lost = np.zeros(440_001, bool)
    lost[BLOCK:2 * BLOCK] = lost[220_000 + 3 * BLOCK:440_000] = True
    after = steps(run, n)
    tokens, labels = field(before, "tokens"), field(before, "labels")
    wrong, wrong_label = lost[tokens], lost[tokens] | lost[np.minimum(tokens + 1, 440_000)]
    edge = np.isin(tokens + 1, [BLOCK, 2 * BLOCK]) if mask else np.zeros_like(wrong)
    real = field(after, "tokens")  # rows that end in a lost block look like padding to `field`: compare by place
    keep = ~wrong[:, -1]
    assert np.array_equal(real, np.where(wrong, 0, tokens)[keep])
    assert np.array_equal(field(after, "labels"), np.where(wrong_label | edge, IGNORE, labels)[keep])
    if mask:  # what follows the block does not attend to what stood before it
        positions = field(after, "positions")
        assert (positions[real == 2 * BLOCK] == 0).all()
    for [step] in after:
        assert step.loss_tokens == sum(int((m.fields["labels"] != IGNORE).sum()) for m in step.micros)
    named = {"a": {"shards/train-00000.dls": [1], "shards/train-00001.dls": [3]}}
    assert shards.merge_lost(*(s.lost for [s] in after)) == named
    assert sum(len(s.mended) for [s] in after) == 2 and "block 1 (bytes 266,240 to 528,384)" in str([s.mended for [s] in after])


@pytest.mark.parametrize(("world_size", "packing"), [(2, "cut"), (3, "best_fit"), (5, "cut")])
def test_the_same_on_any_ranks_and_after_a_resume(data: Path, world_size: int, packing: str) -> None:
    flip(data, 1)
    flip(data, 0, shard=1)
    run = run_of(data, packing=packing)
    alone, many = steps(run, 9), steps(run, 4, world_size) + steps(run, 5, 7 - world_size, position=24)
    for name in ("tokens", "labels", "documents", "positions"):
        if name != "documents":  # which count from each micro-batch's own zero, as rows do
            assert np.array_equal(field(alone, name), field(many, name)), name
    for [one], several in zip(alone, many, strict=True):
        assert one.digest == sum(s.digest for s in several) % 2**32
        assert one.loss_tokens == sum(s.loss_tokens for s in several)
        assert one.lost == shards.merge_lost(*(s.lost for s in several))


def test_a_wrong_page_is_read_once_more(data: Path) -> None:
    """What memory holds is wrong, the disk is right: nothing is lost."""
    run = run_of(data)
    wanted = field(steps(run, 8), "tokens")
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        shard = loader._reader.streams["a"].shard(0)
        bad = shard._bytes.copy()
        bad[GRANULE_BYTES + 7] ^= 1
        shard._bytes, shard.data = bad, bad.view("<u4")
        found = [[loader.next_step()] for _ in range(8)]
    assert np.array_equal(field(found, "tokens"), wanted) and not any(s.lost for [s] in found)
    [told] = [text for [s] in found for text in s.mended]
    assert "train-00000.dls: block 1" in told and "read once more" in told


def test_a_staged_copy_is_mended_from_its_origin(data: Path, tmp_path: Path) -> None:
    fast = tmp_path / "fast"
    stage(data, fast)
    assert origin_of(fast) == str(data.resolve()) and origin_of(data) is None
    wanted = field(steps(run_of(data), 8), "tokens")
    flip(fast, 2)
    found = steps(run_of(fast), 8, world_size=2)
    assert np.array_equal(field(found, "tokens"), wanted) and not any(s.lost for pair in found for s in pair)
    told = [text for pair in found for s in pair for text in s.mended]
    assert told and all("block 2" in text and "origin of the staged copy" in text for text in told)
    assert verify(fast).faults == []  # the copy itself is whole again
    flip(fast, 2)
    flip(data, 2)  # the origin has the same damage: then it is lost
    assert any(s.lost for [s] in steps(run_of(fast), 8))


def test_blocks_are_read_past_the_cache(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
    (tmp_path / "f").write_bytes(content)
    assert read_past_cache(tmp_path / "f", 4096, 270_000) == content[4096:270_000]
    assert read_past_cache(tmp_path / "f", 262_144, 524_288) == content[262_144:]
    assert read_past_cache(tmp_path / "none", 0, 4096) == b""


def keep_ledger(run: RunConfig, folder: Path, n: int, world_size: int, first: int = 1) -> None:
    save_config(run, folder / "config.yaml")
    with Ledger(folder) as ledger:
        for step, ranks in enumerate(steps(run, n, world_size, (first - 1) * run.batch.rows), first):
            lost = shards.merge_lost(*(s.lost for s in ranks))
            ledger.write(step, replace(ranks[0], lost=lost), sum(s.digest for s in ranks))


def test_audit_and_summary_know_of_it_before_and_after_a_repair(data: Path, tmp_path: Path) -> None:
    run, folder, copy = run_of(data), tmp_path / "run", tmp_path / "copy"
    folder.mkdir()
    stage(data, copy)
    remove(data, ["shards/train-00000.dls:15"])  # tokens 75,000 to 80,000: in block 1, and not read anyway
    flip(data, 1)
    n = -(-(440_000 // T) // 6) - 1
    keep_ledger(run, folder, n, 3)
    assert audit(folder).faults == [] and audit(folder).lost == {"a": {"shards/train-00000.dls": [1]}}
    read = np.concatenate([np.arange(r * T, r * T + T) for e in read_ledger(folder)[0]
                           for r in rows_of(run, e.samples())])
    in_block = (read >= BLOCK) & (read < 2 * BLOCK)
    gone = (read >= 75_000) & (read < 80_000)
    used = summarise(folder).sources["a"]
    assert used.lost == int((in_block & ~gone).sum()) > 50_000 and used.tokens == int((~in_block & ~gone).sum())
    whole = summarise(folder)
    assert whole.by_licence == whole.by_contributor == {"not stated": used.tokens}
    slip = receipt(whole)
    assert (slip["total"], slip["items"][0]["tokens"], slip["items"][0]["lost"]) == (used.tokens, used.tokens, used.lost)
    flip(data, 1)  # repaired: what was read then is still proved
    assert verify(data).faults == [] and audit(folder).faults == [] and summarise(folder).sources["a"] == used
    text = (folder / "ledger.jsonl").read_text()
    (folder / "ledger.jsonl").write_text(text.replace('"lost":{"a":{"shards/train-00000.dls":[1]}}', '"lost":{}'))
    assert any("digest" in fault for fault in audit(folder).faults)  # it did read without them
    flip(data, 1)
    assert any("cannot be read again" in fault and "bytes 266240 to 528384" in fault for fault in audit(folder).faults)
    (folder / "ledger.jsonl").write_text(text.replace(":[1]}", ":[9]}"))
    with pytest.raises(DataError, match="has no block 9, but the ledger says"):
        summarise(folder)


def rows_of(run: RunConfig, samples: np.ndarray) -> np.ndarray:
    from officina.trainer.data.reader import RowReader

    return RowReader(run, 0).place(samples).row


def decode(record: bytes) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([record[0], len(record)])}


def test_records_of_a_lost_block_are_not_valid(tmp_path: Path) -> None:
    write_records(tmp_path / "d", [bytes([i]) * 100_000 for i in range(40)], name="r")
    run = replace(make_run({"a": (tmp_path / "d", 1)}, seq_len=1, rows=10, micro_rows=4),
                  model=CustomModelConfig(factory="x:x", loss="x:x", decoder="test_integrity:decode"))
    sys.modules["test_integrity"] = sys.modules[__name__]
    flip(tmp_path / "d", 2)  # bytes 524,288 to 786,432: records 5, 6, 7
    for world_size in (1, 3, 11):
        found = steps(run, 4, world_size)
        seen = [int(x[0]) for ranks in found for s in ranks for m in s.micros
                for x, good in zip(m.fields["x"], m.fields["valid"], strict=True) if good]
        assert sorted(seen) == [i for i in range(40) if i not in (5, 6, 7)]
        assert sum(s.loss_tokens for ranks in found for s in ranks) == 37
        assert shards.merge_lost(*(s.lost for ranks in found for s in ranks)) == {"a": {"shards/train-00000.dls": [2]}}
    (tmp_path / "run").mkdir()
    keep_ledger(run, tmp_path / "run", 4, 2)
    assert audit(tmp_path / "run").faults == []
    assert (summarise(tmp_path / "run").sources["a"].lost, summarise(tmp_path / "run").total) == (3, 37)


def test_held_out_records_of_a_lost_block_are_not_valid_even_the_first(tmp_path: Path) -> None:
    sys.modules["test_integrity"] = sys.modules[__name__]
    for split in ("train", "validation"):
        write_records(tmp_path / "d", [bytes([i]) * 300_000 for i in range(3)], split=split, name="r")
    run = replace(make_run({"a": (tmp_path / "d", 1)}, seq_len=1, rows=2, micro_rows=2),
                  model=CustomModelConfig(factory="x:x", loss="x:x", decoder="test_integrity:decode"))
    flip(tmp_path / "d", 0, split="validation")  # record 0
    stream = validation_streams(run, on_damage=mend)["a"]
    found = [(batch, lost) for rank in range(2) for batch, _, lost in validation_batches(run, stream, rank, 2)]
    seen = [int(x[0]) for batch, _ in found for x, good in zip(batch.fields["x"], batch.fields["valid"], strict=True) if good]
    assert seen == [1, 2] and found[0][1] == {"shards/validation-00000.dls": [0]}


@pytest.fixture()
def pairs(tmp_path: Path) -> RunConfig:
    """Two pairs a split, a row each; the first fills a block and 14 tokens of the next."""
    write_tokens(tmp_path / "d", {split: [BLOCK - 6, 20, 100, 50] for split in ("train", "validation")}, samples="pairs")
    return replace(make_run({"a": (tmp_path / "d", 1)}, seq_len=BLOCK + 13, rows=1, micro_rows=1),
                   objective=ObjectiveConfig(kind="dpo"))


def test_a_pair_that_lost_a_part_is_not_counted_at_all(pairs: RunConfig, tmp_path: Path) -> None:
    flip(tmp_path / "d", 0)
    (tmp_path / "run").mkdir()
    keep_ledger(pairs, tmp_path / "run", 2, 1)
    assert audit(tmp_path / "run").faults == []
    found = summarise(tmp_path / "run")
    assert (found.sources["a"].lost, found.total) == (BLOCK + 14, 150)


def test_damage_under_held_out_pairs_is_told(pairs: RunConfig, tmp_path: Path) -> None:
    class Engine:
        def evaluate(self, batch: Batch) -> torch.Tensor:
            return torch.zeros(5)

    flip(tmp_path / "d", 0, split="validation")
    said: list[str] = []
    [found] = held_out(Engine(), pairs, Ranks(LONE, torch.device("cpu")), 3, said.append, {"a": np.zeros((2, 2), np.float32)})
    assert (found.tokens, found.lost_blocks) == (1, 1)
    [told] = said
    assert "validation-00000.dls: block 0" in told and "is set aside" in told


# ---- whole runs ----------------------------------------------------------------------------------------------------
@pytest.fixture()
def text(tmp_path: Path) -> Path:
    """320 kinds of tokens in u16: 131,072 to a block, 3.8 blocks."""
    entries = []
    rng = np.random.default_rng(0)
    for split, n in (("train", 50), ("validation", 2)):
        with SplitWriter(tmp_path / "d", split, dtype="u16") as writer:
            for _ in range(n):
                writer.add(rng.integers(0, 320, 10_000))
            entries += writer.close()
    write_manifest(tmp_path / "d", entries, {}, kind="tokens", dtype="u16", name="d")
    return tmp_path / "d"


def life_of(text: Path, **data: object) -> RunConfig:
    run = plain_run(text, model=DECODER)
    return replace(run, data=replace(run.data, **data))


def test_a_run_goes_on_without_the_block_on_any_ranks(pool, text: Path, tmp_path: Path) -> None:
    """Loss, gradient norm and weights of one rank, of three, and of a run that is stopped and goes on with two."""
    for block in (0, 1, 3):
        flip(text, block)
    for name, lives in (("one", [(1, 0)]), ("three", [(3, 0)]), ("stopped", [(3, 4), (2, 0)])):
        folder = tmp_path / name
        begin(folder, replace(life_of(text), engine=replace_engine(lives[0][0])))
        for world_size, stop_after in lives:
            changed(folder, engine=replace_engine(world_size))
            pool.run(world_size, "tests.lives:live", str(folder), stop_after=stop_after)
    for name in ("three", "stopped"):
        for step, (loss, norm) in losses(tmp_path / "one").items():
            assert losses(tmp_path / name)[step] == pytest.approx((loss, norm), rel=2e-5, nan_ok=True)
        for key, value in states(tmp_path / "one", 8).items():
            torch.testing.assert_close(states(tmp_path / name, 8)[key], value, rtol=1e-4, atol=2e-6)
        assert audit(tmp_path / name).faults == [] and audit(tmp_path / name).lost == audit(tmp_path / "one").lost
    lost = audit(tmp_path / "one").lost["text"]["shards/train-00000.dls"]
    assert set(lost) <= {0, 1, 3} and len(lost) >= 2
    facts, metrics = gather(tmp_path / "one")
    assert facts.damaged_blocks == audit(tmp_path / "one").lost
    assert "did not match the checksums and gave no loss" in page(facts, metrics)


def replace_engine(world_size: int):
    from officina.trainer.config import DDPConfig, SingleConfig

    return SingleConfig() if world_size == 1 else DDPConfig()


def test_beyond_the_budget_the_run_stops_with_names_and_goes_on_after_the_repair(pool, text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    stage(text, copy)
    for block in (0, 1, 3):
        flip(text, block)
    folder = tmp_path / "run"
    begin(folder, replace(life_of(text, max_damaged_blocks=1), engine=replace_engine(2)))
    with pytest.raises(AssertionError) as stopped:
        pool.run(2, "tests.lives:live", str(folder))
    message = str(stopped.value)
    assert "DataError: stopped in good order after step" in message and "more than data.max_damaged_blocks=1" in message
    assert f"{text}/shards/train-00000.dls: blocks " in message and f"officina data stage COPY {text}" in message
    saved = committed_steps(folder)
    with pytest.raises(AssertionError) as again:
        pool.run(1, "tests.lives:live", str(folder))
    assert message.split("DataError: ")[-1].rstrip() in str(again.value) and committed_steps(folder) == saved, "no step more"
    stage(copy, text)  # as the message says
    assert verify(text).faults == []
    assert pool.run(2, "tests.lives:live", str(folder)) == [0, 0]
    assert audit(folder).faults == [] and audit(folder).steps == 8
    [line, *_] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"stop"' in line]
    assert (line["reason"], line["exit_status"]) == ("damaged data", 2)


def test_a_source_of_which_nothing_is_left_stops_the_run(pool, tmp_path: Path) -> None:
    """A small one, which the budget would let train on without any loss."""
    with SplitWriter(tmp_path / "d", "train", dtype="u16") as writer:
        writer.add(np.random.default_rng(0).integers(0, 320, 10_000))
        entries = writer.close()
    write_manifest(tmp_path / "d", entries, {}, kind="tokens", dtype="u16", name="d")
    flip(tmp_path / "d", 0)
    begin(tmp_path / "run", life_of(tmp_path / "d"))
    with pytest.raises(AssertionError, match=r"every block of data\.sources\.text is damaged:\n.*: block 0\n"
                                             rf"Mend .* \(officina data stage COPY {tmp_path / 'd'}\)"):
        pool.run(1, "tests.lives:live", str(tmp_path / "run"))
    assert committed_steps(tmp_path / "run") == [0]


def test_the_budget_is_of_the_run_and_not_of_each_start(pool, text: Path, tmp_path: Path) -> None:
    """Blocks that were repaired do not count, and a larger budget goes on."""
    name, folder = "shards/train-00000.dls", tmp_path / "run"
    for block in (0, 2):
        flip(text, block)
    run = life_of(text, max_damaged_blocks=1, shuffle=False,  # 4,096 rows of 32 to a block: two steps in each
                  skip=[[14, 4200], [4214, 8300], [8314, 12400]])
    begin(folder, run)
    assert pool.run(1, "tests.lives:live", str(folder), stop_after=3) == [EXIT_CONTINUE]
    for at in (4, 4):
        with pytest.raises(AssertionError, match=rf"after step {at}, with a checkpoint: 2 blocks are damaged, more than .*=1"):
            pool.run(1, "tests.lives:live", str(folder))
    assert still_lost(run, folder, 4, ["text", "other"]) == {"text": {name: [0]}} and not still_lost(run, folder, 4, ["other"])
    life = changed(folder, data=replace(run.data, max_damaged_blocks=2))
    assert pool.run(1, "tests.lives:live", str(folder), stop_after=6) == [EXIT_CONTINUE]
    assert still_lost(run, folder, 6, ["text"]) == {"text": {name: [0, 2]}}
    changed(folder, data=replace(life.data, max_damaged_blocks=1), engine=replace_engine(2))
    with pytest.raises(AssertionError, match=r"after step 6, with a checkpoint: 2 blocks are damaged, more than .*=1") as over:
        pool.run(2, "tests.lives:live", str(folder))
    assert "no answer from rank" not in str(over.value), "all ranks know of the blocks that the earlier starts lost"
    flip(text, 0)  # repaired
    assert still_lost(run, folder, 6, ["text"]) == {"text": {name: [2]}}
    assert pool.run(2, "tests.lives:live", str(folder)) == [EXIT_DONE] * 2
    assert audit(folder).faults == [] and audit(folder).lost == {"text": {name: [0, 2]}}


def test_a_strict_reader_still_raises(data: Path) -> None:
    flip(data, 1)
    entry = open_dataset(data).shards[0]
    with pytest.raises(DataError, match=r"bytes 266240 to 528384 do not match"):
        Shard(data / entry.path, entry).read(BLOCK, BLOCK + 1)
    assert len(verify(data).faults) == 1
