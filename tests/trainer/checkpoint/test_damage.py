"""Damage is detected, named with file and reason, and the previous good checkpoint is taken."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from officina.benchmarks.checkpoint_faults import corruptions, holds, on_ranks, save_step, state_at
from officina.trainer.checkpoint.layout import COMMIT, step_dir
from officina.trainer.checkpoint.read import latest_valid, list_checkpoints, open_checkpoint
from officina.trainer.errors import CheckpointError

FAST = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


@pytest.fixture
def run(tmp_path):
    """Steps 1 and 2 of a run, by two ranks."""
    for step in (1, 2):
        save_step(tmp_path, step)
    return tmp_path


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def told(run, **kwargs):
    """What is said of step 2; step 1 must be taken."""
    with open_checkpoint(run, **kwargs) as opened:
        assert opened.step == 1 and holds(opened, state_at(1))
        (message,) = opened.passed_over
        return message


def test_flipped_bit_names_file_bytes_and_tensor(run):
    flip(step_dir(run, 2) / "rank-00001.bin", 600)
    assert "step-00000002 is damaged: rank-00001.bin: bytes 512 to" in told(run)
    assert "(embed param, elements 262144 to 524288): the hash is not that of what was written" in told(run)


def test_padding_and_header_are_covered(run):
    size = (step_dir(run, 2) / "rank-00000.bin").stat().st_size
    flip(step_dir(run, 2) / "rank-00000.bin", size - 1)
    assert "rank-00000.bin" in told(run)
    flip(step_dir(run, 2) / "rank-00000.bin", size - 1)
    flip(step_dir(run, 2) / "rank-00000.bin", 300)
    assert "the header says" in told(run)


def test_shard_manifest_and_commit_of_another_step_are_named_as_such(run):
    here, there = step_dir(run, 2), step_dir(run, 1)
    shutil.copyfile(there / "rank-00000.bin", here / "rank-00000.bin")
    assert "header says rank 0 of 2, step 1, run run-a; expected rank 0 of 2, step 2" in told(run)
    shutil.copyfile(there / "rank-00000.json", here / "rank-00000.json")
    assert "rank-00000.json: is of rank 0, step 1, run run-a, not of rank 0, step 2" in told(run)
    shutil.copyfile(there / COMMIT, here / COMMIT)
    assert "COMMIT: is of step 1, in a directory of step 2" in told(run)


def test_another_runs_checkpoint_is_named_when_the_run_is_known(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save_step(other, 2, run_id="run-b")
    shutil.rmtree(step_dir(run, 2))
    shutil.copytree(step_dir(other, 2), step_dir(run, 2))
    assert "is of run run-b, not of this run run-a" in told(run, run_id="run-a")
    with open_checkpoint(run) as opened:
        assert opened.run_id == "run-b"


def test_missing_and_short_files(run):
    here = step_dir(run, 2)
    with open(here / "rank-00001.bin", "r+b") as file:
        file.truncate(5000)
    assert "rank-00001.bin: has 5000 bytes; written were" in told(run)
    (here / "rank-00001.bin").unlink()
    assert "rank-00001.bin: is missing" in told(run)
    (here / "rank-00001.json").write_text("{")
    assert "rank-00001.json: its hash is not the one in COMMIT; not a manifest" in told(run)
    (here / "rank-00001.json").unlink()
    assert "rank-00001.json: is missing" in told(run)
    (here / COMMIT).write_text("no JSON")
    assert "COMMIT: not a readable COMMIT" in told(run)
    (here / COMMIT).unlink()
    assert "is incomplete: no COMMIT" in told(run)


def test_another_format_is_named(run):
    body = json.loads((step_dir(run, 2) / COMMIT).read_text())
    (step_dir(run, 2) / COMMIT).write_text(json.dumps({**body, "format": 2}))
    assert "COMMIT: written in format 2; this officina reads format 1" in told(run)


def test_changed_value_in_commit_is_seen(run):
    text = (step_dir(run, 2) / COMMIT).read_text()
    (step_dir(run, 2) / COMMIT).write_text(text.replace('"tokens": 200', '"tokens": 100'))
    assert "COMMIT: its own hash does not fit" in told(run)


def test_all_ranks_take_the_same_and_hear_the_same(run):
    flip(step_dir(run, 2) / "rank-00001.bin", 10_000)

    def work(ranks):
        with open_checkpoint(run, ranks=ranks) as opened:
            return opened.step, opened.passed_over

    found = on_ranks(3, work)
    assert found[0][0] == 1 and len(set(found)) == 1 and "rank-00001.bin" in found[0][1][0]


def test_a_step_that_is_asked_for_is_never_replaced(run):
    flip(step_dir(run, 2) / "rank-00001.bin", 600)
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(run, step=2)
    assert "rank-00001.bin" in str(e.value) and f"Step 1 is whole: {run}@1, step=1 or --step 1" in str(e.value)
    with pytest.raises(CheckpointError, match=r"step-00000007 does not exist.*Step 1 is whole"):
        open_checkpoint(run, step=7)
    with open_checkpoint(run, step=1) as opened:
        assert opened.step == 1


def test_an_older_step_is_taken_when_asked_for(run):
    with open_checkpoint(run, step=1) as opened:
        assert opened.step == 1 and not opened.passed_over and holds(opened, state_at(1))


def test_nothing_to_load(run, tmp_path_factory):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path_factory.mktemp("empty"))
    for step in (1, 2):
        flip(step_dir(run, step) / "rank-00000.bin", 600)
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(run)
    assert "no checkpoint of" in str(e.value) and "step-00000001 is damaged" in str(e.value)
    assert latest_valid(run) is None


def test_listing_names_each_state(run):
    save_step(run, 3)
    save_step(run, 4)
    (step_dir(run, 3) / COMMIT).unlink()
    (step_dir(run, 2) / "rank-00000.bin").unlink()
    found = {i.name: (i.status, i.problem) for i in list_checkpoints(run)}
    assert found == {"step-00000001": ("complete", None),
                     "step-00000002": ("damaged", "rank-00000.bin: is missing"),
                     "step-00000003": ("incomplete", "no COMMIT: its writing was not finished"),
                     "step-00000004": ("complete", None)}
    newest = latest_valid(run)
    assert (newest.step, newest.tokens, newest.world_size, newest.run_id) == (4, 400, 2, "run-a")


def test_listing_needs_no_torch(run):
    code = (f"import sys; from officina.trainer.checkpoint.verify import list_checkpoints, latest_valid; "
            f"assert latest_valid({str(run)!r}).step == 2; assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sample_of_injected_corruptions_is_all_detected_and_named():
    """The full thousand: python -m officina.benchmarks.checkpoint_faults."""
    found = corruptions(150, seed=random.Random().randrange(10**6), folder=FAST, others=False)["officina"]
    assert found["total"] == {"detected and named": 150}, found


def test_other_formats_load_flipped_bits_without_a_word():
    """Why ours exists. If one of them begins to notice, the table in the documents must say so."""
    found = corruptions(20, seed=1, folder=FAST)
    for name in ("torch.distributed.checkpoint", "torch.save", "safetensors"):
        assert found[name]["by_kind"]["bit flip"].get("SILENT", 0) > 0, name
    assert found["officina"]["total"] == {"detected and named": 20}
