"""Removed documents give no loss and are not read, everything else stays where it is, and the ledger can be audited."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_run, tokenizer_info
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from officina.trainer.batch import IGNORE
from officina.trainer.data import removal
from officina.trainer.data.ledger import Ledger, audit, read_ledger
from officina.trainer.data.loader import Loader, StepData, validation_rows
from officina.trainer.data.manifest import open_dataset, write_manifest
from officina.trainer.data.megatron import export_megatron
from officina.trainer.data.removal import remove, removed_documents
from officina.trainer.data.shard_writer import SplitWriter, write_records
from officina.trainer.data.stage import stage
from officina.trainer.data.verify import verify
from officina.trainer.errors import DataError
from officina.trainer.run_dir import save_config

EOS = 7_000_000


def write(folder: Path, lengths: list[int], shard_bytes: int = 150, ids: bool = True) -> None:
    """Tokens 0, 1, ...; the id of document i is i in 16 bytes."""
    entries = []
    for split in ("train", "validation"):
        with SplitWriter(folder, split, dtype="u32", shard_bytes=shard_bytes) as writer:
            for i, document in enumerate(np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])):
                writer.add(document, document_id=i.to_bytes(16) if ids else b"")
            entries += writer.close()
    (folder / "tokenizer.json").write_bytes(b"{}")
    info = tokenizer_info(hashlib.sha256(b"{}").hexdigest(), EOS + 1)
    write_manifest(folder, entries, {}, kind="tokens", dtype="u32", name="d",
                   tokenizer=type(info)(**{**vars(info), "eos_id": EOS}))


def steps(folder: Path, n: int, **how: object) -> list[StepData]:
    with Loader(make_run({"a": (folder, 1)}, **how), rank=0, world_size=1, position=0) as loader:
        return [loader.next_step() for _ in range(n)]


def fields(found: list[StepData], name: str) -> np.ndarray:
    return np.concatenate([m.fields[name].numpy() for step in found for m in step.micros])


@given(lengths=st.lists(st.integers(1, 30), min_size=8, max_size=30), gone=st.sets(st.integers(0, 7), min_size=1),
       mask=st.booleans(), shard_bytes=st.sampled_from([100, 400, 1 << 20]), shuffle=st.booleans())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_the_removed_tokens_change(tmp_path_factory, lengths, gone, mask, shard_bytes, shuffle) -> None:
    """Against the same batches before the removal, token by token."""
    folder = tmp_path_factory.mktemp("d")
    write(folder, lengths + [9], shard_bytes)
    how = {"rows": 3, "micro_rows": 2, "mask_documents": mask, "shuffle": shuffle}
    before, fingerprint = steps(folder, 9, **how), open_dataset(folder).manifest.fingerprint
    report = remove(folder, [i.to_bytes(16).hex() for i in gone])
    assert (report.documents, report.missing) == (2 * len(gone), [])  # in both splits
    assert report.tokens == 2 * sum(lengths[i] for i in gone)
    assert open_dataset(folder).manifest.fingerprint == fingerprint and verify(folder).faults == []
    after = steps(folder, 9, **how)
    document_of = np.repeat(np.arange(len(lengths) + 1), [*lengths, 9])
    tokens, labels = fields(before, "tokens"), fields(before, "labels")
    padding = (labels == IGNORE).all(1) & (tokens == 0).all(1)
    removed = np.isin(document_of[tokens], list(gone)) & ~padding[:, None]
    following = np.minimum(tokens + 1, len(document_of) - 1)  # what the label would be
    removed_label = np.isin(document_of[following], list(gone)) | removed
    assert np.array_equal(fields(after, "tokens"), np.where(removed, EOS, tokens))
    assert np.array_equal(fields(after, "labels"), np.where(removed_label, IGNORE, labels))
    assert [s.loss_tokens for s in after] == [int((fields([s], "labels") != IGNORE).sum()) for s in after]
    assert [s.loss_tokens for s in after] == [sum(m.loss_tokens for m in s.micros) for s in after]
    if mask:
        assert np.array_equal(fields(after, "documents"), fields(before, "documents"))
        assert np.array_equal(fields(after, "positions"), fields(before, "positions"))
    for step, other in zip(before, after, strict=True):
        touched = removed_any(step, document_of, gone)
        assert (step.first_sample, step.stop_sample, step.source_rows) == (other.first_sample, other.stop_sample,
                                                                           other.source_rows)
        assert (step.digest == other.digest) is not touched


def removed_any(step: StepData, document_of: np.ndarray, gone: set[int]) -> bool:
    """Does a row of the step hold a token of a removed document, its last label's included?"""
    for micro in step.micros:
        for row, labels in zip(micro.fields["tokens"].numpy(), micro.fields["labels"].numpy(), strict=True):
            if (labels == IGNORE).all() and (row == 0).all():
                continue
            last = min(row[-1] + 1, len(document_of) - 1)
            if np.isin(document_of[[*row, last]], list(gone)).any():
                return True
    return False


def test_validation_heeds_it_and_mixtures_too(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, [10] * 12)
    remove(tmp_path / "b", [(3).to_bytes(16).hex()])
    run = make_run({"a": (tmp_path / "a", 1), "b": (tmp_path / "b", 1)}, rows=17, seq_len=7, micro_rows=17)
    for name, wanted in (("a", 0), ("b", 10)):
        tokens = np.concatenate([b.fields["tokens"].numpy().ravel() for b in validation_rows(run, 0, 1, name)])
        assert np.count_nonzero(tokens == EOS) == wanted
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        found = [loader.next_step() for _ in range(2)]  # 17 samples of each: all rows of both
    tokens, labels = fields(found, "tokens"), fields(found, "labels")
    assert np.count_nonzero(tokens == EOS) == 10 and not (labels == EOS).any() and found[0].removals == {"b": 1}
    gone = set(range(30, 40))
    assert set(range(119)) - gone <= set(tokens.ravel().tolist()) and np.count_nonzero(np.isin(tokens, list(gone))) == 10


def test_steps_before_and_after_a_request_are_both_audited(tmp_path: Path) -> None:
    write(tmp_path / "d", [10] * 20)
    run = make_run({"a": (tmp_path / "d", 1)}, rows=4, seq_len=8)
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(run, folder / "config.yaml")

    def train(first: int, last: int) -> None:
        with Loader(run, rank=0, world_size=1, position=(first - 1) * 4) as loader, Ledger(folder) as ledger:
            for step in range(first, last + 1):
                data = loader.next_step()
                ledger.write(step, data, data.digest)

    train(1, 3)
    for request in ([2, 3, 4], [5, 6], [11, 12, 13, 14, 15]):
        remove(tmp_path / "d", [i.to_bytes(16).hex() for i in request])
        first = len(read_ledger(folder)[0]) + 1
        train(first, first + 3)
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [line for line in lines if "start" in line] == [
        {"start": 0}, {"start": 3, "removals": {"a": 1}}, {"start": 7, "removals": {"a": 2}},
        {"start": 11, "removals": {"a": 3}}]
    assert audit(folder).faults == [] and audit(folder).removals == [(4, {"a": 1}), (8, {"a": 2}), (12, {"a": 3})]
    text = (folder / "ledger.jsonl").read_text()
    (folder / "ledger.jsonl").write_text(text.replace('{"a":2}', '{"a":1}').replace('{"a":3}', '{"a":0}'))
    assert any("digest" in fault for fault in audit(folder).faults)  # it did read without the documents
    (folder / "ledger.jsonl").write_text(text.replace('{"a":3}', '{"a":4}'))
    with pytest.raises(DataError, match=r"has 3 lists of removed documents, but the run read it with 4"):
        audit(folder)


def test_requests_for_one_shard_add_up(tmp_path: Path) -> None:
    """The second list of a shard does not replace the first, nor is it hidden by it."""
    write(tmp_path / "d", [8] * 10, shard_bytes=1 << 20)
    before = fields(steps(tmp_path / "d", 1, rows=9, shuffle=False), "tokens")
    for number in (6, 1, 3):
        remove(tmp_path / "d", [number.to_bytes(16).hex()])
    dataset = open_dataset(tmp_path / "d")
    for lists, gone in enumerate([[], [6], [1, 6], [1, 3, 6]]):
        found = removed_documents(dataset, lists)
        assert {shard: documents.tolist() for shard, documents in found.items()} == (
            {f"shards/{split}-00000.dls": gone for split in ("train", "validation")} if gone else {})
    after = fields(steps(tmp_path / "d", 1, rows=9, shuffle=False), "tokens")
    assert np.array_equal(after, np.where(np.isin(before // 8, [1, 3, 6]), EOS, before))
    assert export_megatron(tmp_path / "d", tmp_path / "out")["train"][1:] == (7, 56)


def test_a_run_that_went_on_with_a_copy_from_before_the_request_is_audited(tmp_path: Path) -> None:
    """It read the documents again, and its ledger says so: that start heeded no list."""
    write(tmp_path / "old", [10] * 20)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    remove(tmp_path / "new", [i.to_bytes(16).hex() for i in range(0, 20, 2)])
    for first, name in ((1, "new"), (3, "old")):
        run = make_run({"a": (tmp_path / name, 1)}, rows=4, seq_len=8)
        with Loader(run, rank=0, world_size=1, position=4 * (first - 1)) as loader, Ledger(tmp_path) as ledger:
            for step in (first, first + 1):
                data = loader.next_step()
                ledger.write(step, data, data.digest)
    save_config(make_run({"a": (tmp_path / "new", 1)}, rows=4, seq_len=8), tmp_path / "config.yaml")
    assert audit(tmp_path).faults == [] and audit(tmp_path).removals == [(1, {"a": 1}), (3, {})]


def test_names_of_documents(tmp_path: Path) -> None:
    write(tmp_path, [3] * 20)
    report = remove(tmp_path, ["shards/train-00000.dls:2", "shards/train-00000.dls:99", "nothing", "", (2).to_bytes(16).hex()])
    assert (report.documents, report.tokens, report.before) == (2, 6, 0)  # the same one twice, and validation's
    assert report.missing == ["shards/train-00000.dls:99", "nothing"]
    again = remove(tmp_path, [(2).to_bytes(16).hex(), (3).to_bytes(16).hex()])
    assert (again.documents, again.before) == (2, 2)
    [first, second] = open_dataset(tmp_path).manifest.removals
    assert (first.path, second.path, second.documents, second.tokens) == ("removed/00001.jsonl", "removed/00002.jsonl", 2, 6)
    assert remove(tmp_path, [(2).to_bytes(16).hex()]).documents == 0 and len(open_dataset(tmp_path).manifest.removals) == 2
    with pytest.raises(DataError, match=r"has none of the 2 documents, such as x, y\. .*SHARD:NUMBER"):
        remove(tmp_path, ["x", "y"])


def test_old_shards_have_no_ids_but_numbers(tmp_path: Path) -> None:
    write(tmp_path, [3] * 20, ids=False)
    with pytest.raises(DataError, match=r"has none of the 1 documents"):
        remove(tmp_path, [(2).to_bytes(16).hex()])
    assert remove(tmp_path, ["shards/train-00001.dls:0"]).tokens == 3


def test_a_lost_or_changed_list_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [30] * 5)
    remove(tmp_path, ["shards/train-00000.dls:0"])
    (tmp_path / "removed" / "00001.jsonl").write_text("")
    with pytest.raises(DataError, match=r"removed/00001\.jsonl: is missing or changed.*would be trained on"):
        steps(tmp_path, 1)
    assert "removed/00001.jsonl: is missing or changed" in verify(tmp_path).faults[0]


@pytest.mark.parametrize("second", ["remove", "change"])
def test_who_changes_a_data_set_does_so_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    """No request is lost that was said to be done, whatever else was written at the same moment."""
    write(tmp_path, [3] * 20)
    script = {"remove": "from officina.trainer.data.removal import remove; remove(sys.argv[1], [(2).to_bytes(16).hex()])",
              "change": "from officina.trainer.data.describe import change; change(sys.argv[1], licence='MIT')"}[second]
    script = f"import sys; {script}"
    other: list[subprocess.CompletedProcess] = []

    def meanwhile(*args: object) -> object:
        other.append(subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False))
        return find(*args)

    find = removal._find
    monkeypatch.setattr(removal, "_find", meanwhile)
    assert remove(tmp_path, [(1).to_bytes(16).hex()]).documents == 2
    assert other[0].returncode and "is being built or changed by another process. Wait for it" in other[0].stderr
    monkeypatch.undo()
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)
    manifest = open_dataset(tmp_path).manifest
    assert sum(each.documents for each in manifest.removals) == (4 if second == "remove" else 2)
    assert manifest.licence == ("" if second == "remove" else "MIT") and not (tmp_path / ".build").exists()


@pytest.mark.parametrize("request_again", [0, 3])
def test_a_list_that_the_manifest_does_not_name_is_not_forgotten(tmp_path: Path, request_again: int) -> None:
    """After a kill before dataset.json, or where an older copy of it was put back."""
    write(tmp_path / "d", [30] * 5)
    before = (tmp_path / "d" / "dataset.json").read_bytes()
    remove(tmp_path / "d", [i.to_bytes(16).hex() for i in (0, 2)])
    named = open_dataset(tmp_path / "d").manifest.removals
    (tmp_path / "d" / "dataset.json").write_bytes(before)
    for use in (lambda: steps(tmp_path / "d", 1), lambda: stage(tmp_path / "d", tmp_path / "copy")):
        with pytest.raises(DataError, match=r"removed/00001\.jsonl names documents .* older one.* officina data remove"):
            use()
    assert "names documents that were removed" in verify(tmp_path / "d").faults[0]
    report = remove(tmp_path / "d", [request_again.to_bytes(16).hex()])
    removals = open_dataset(tmp_path / "d").manifest.removals
    assert removals[:1] == named and (report.documents, report.before) == ((0, 2) if request_again == 0 else (2, 0))
    assert len(removals) == (1 if request_again == 0 else 2) and verify(tmp_path / "d").faults == []


def test_a_split_that_is_added_brings_no_record_back(tmp_path: Path) -> None:
    write_records(tmp_path / "d", [b"one", b"two"], name="d")
    remove(tmp_path / "d", ["shards/train-00000.dls:1"])
    write_records(tmp_path / "d", [b"three"], name="d", split="validation")
    assert len(open_dataset(tmp_path / "d").manifest.removals) == 1 and verify(tmp_path / "d").faults == []
