"""The life of a run, whole: start, stop, resume on other ranks and engines, and what happens when something breaks."""

import gzip
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from officina.trainer.config import (
    AdamWConfig,
    DDPConfig,
    DecoderConfig,
    EvalConfig,
    FSDP2Config,
    HSDPConfig,
    LrScheduleConfig,
    MuonConfig,
    ObjectiveConfig,
    ProfileConfig,
    SingleConfig,
    ZeroConfig,
)
from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.ledger import audit, read_ledger
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.removal import remove
from officina.trainer.errors import EXIT_CONTINUE, EXIT_DONE
from officina.trainer.metrics import read_metrics
from officina.trainer.run_dir import committed_steps
from officina.trainer.spikes import SpikeDetector
from tests.data_sets import write_tokens
from tests.distributed import RankFailure
from tests.lives import begin, changed, copy_of, losses, plain_run, states

ENGINES = {"single": (1, SingleConfig()), "ddp": (3, DDPConfig()), "fsdp2": (2, FSDP2Config()),
           "hsdp": (4, HSDPConfig(shard_size=2)), "zero1": (2, ZeroConfig(stage=1)), "zero2": (3, ZeroConfig(stage=2)),
           "zero3": (2, ZeroConfig(stage=3, persistence_threshold=0))}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    texts = tmp_path_factory.mktemp("texts")
    for i in range(40):
        lines = [f"def f_{i}_{j}(x):\n    return x * {i * j} + {j}\n" for j in range(3 + i % 5)]
        (texts / f"m{i:02d}.py").write_text("\n".join(lines))
    folder = tmp_path_factory.mktemp("data") / "text"
    build(folder, BuildOptions(inputs=[texts], vocab_size=300))
    return folder


def lived(pool, run_dir: Path, world_size: int, **kwargs) -> int:
    """The exit status all ranks agree on."""
    statuses = pool.run(world_size, "tests.lives:live", str(run_dir), **kwargs)
    assert len(set(statuses)) == 1, statuses
    return statuses[0]


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ENGINES)
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(pool, data, tmp_path, name, precision):
    world_size, engine = ENGINES[name]
    run = plain_run(data, engine=engine, precision=precision)
    begin(tmp_path / "whole", run)
    assert lived(pool, tmp_path / "whole", world_size) == EXIT_DONE
    begin(tmp_path / "parts", run)
    assert lived(pool, tmp_path / "parts", world_size, stop_after=4) == EXIT_CONTINUE
    assert committed_steps(tmp_path / "parts") == [3, 4]
    assert lived(pool, tmp_path / "parts", world_size) == EXIT_DONE
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ours, theirs = states(tmp_path / "parts", 8), states(tmp_path / "whole", 8)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and ours.keys() == theirs.keys()


def test_a_last_step_without_learning_rate_is_no_fault_of_the_engine(pool, data, tmp_path):
    """All that is left after the resume is the end of a decay to 0, which changes nothing."""
    begin(tmp_path / "run", plain_run(data, steps=4, lr_schedule=LrScheduleConfig(warmup_steps=1, min_ratio=0.0)))
    assert lived(pool, tmp_path / "run", 1, stop_after=3) == EXIT_CONTINUE
    assert lived(pool, tmp_path / "run", 1) == EXIT_DONE


def test_engines_and_ranks_change_at_every_stop(pool, data, tmp_path):
    run = plain_run(data, objective=ObjectiveConfig(z_loss=1e-3))
    begin(tmp_path / "one", run)
    assert lived(pool, tmp_path / "one", 1) == EXIT_DONE
    legs = [(4, FSDP2Config(), 2), (2, ZeroConfig(stage=2), 4), (3, DDPConfig(), 6), (2, ZeroConfig(stage=3), 0)]
    begin(tmp_path / "many", run)
    for world_size, engine, stop_after in legs:
        changed(tmp_path / "many", engine=engine)
        status = lived(pool, tmp_path / "many", world_size, stop_after=stop_after)
        assert status == (EXIT_CONTINUE if stop_after else EXIT_DONE)
    for step, (loss, norm) in losses(tmp_path / "one").items():
        got = losses(tmp_path / "many")[step]
        assert got[0] == pytest.approx(loss, abs=1e-5) and got[1] == pytest.approx(norm, rel=1e-5)
    assert largest_difference(states(tmp_path / "one", 8), states(tmp_path / "many", 8)) <= 1e-5

    z_losses = [[step.z_loss for step in read_metrics(tmp_path / name).steps] for name in ("one", "many")]
    assert z_losses[0][0] == pytest.approx(1e-3 * math.log(320) ** 2, rel=0.02)  # of logits that say little yet
    assert z_losses[1] == pytest.approx(z_losses[0], rel=1e-5)

    one, many = read_ledger(tmp_path / "one")[0], read_ledger(tmp_path / "many")[0]
    assert [(e.first_sample, e.stop_sample, e.digest) for e in one] == [
        (e.first_sample, e.stop_sample, e.digest) for e in many]
    assert audit(tmp_path / "many").ok


def test_a_load_into_bf16_is_checked_as_well(pool, data, tmp_path):
    """What was saved in fp32 is held rounded, what was saved in bf16 as it is, and else the run does not go on."""
    begin(tmp_path / "run", plain_run(data, steps=2))
    assert lived(pool, tmp_path / "run", 1) == EXIT_DONE
    for steps in (3, 4):
        changed(tmp_path / "run", precision="bf16_pure", steps=steps)
        with pytest.raises(RankFailure, match=r"embed\.weight param: the engine holds other values than were saved"):
            lived(pool, tmp_path / "run", 1, fault="other weights")
        assert lived(pool, tmp_path / "run", 1) == EXIT_DONE


def test_a_signal_to_one_rank_stops_all_at_the_same_step(pool, data, tmp_path):
    begin(tmp_path / "run", plain_run(data, engine=DDPConfig()))
    assert lived(pool, tmp_path / "run", 3, stop_after=5) == EXIT_CONTINUE
    stop = read_metrics(tmp_path / "run").generations[-1].stop
    assert (stop.step, stop.reason) == (5, "signal to another rank") and committed_steps(tmp_path / "run")[-1] == 5


def test_a_profile_is_of_the_chosen_step_and_rank(pool, data, tmp_path):
    profile = ProfileConfig(steps=[1, 1], ranks=[1])
    begin(tmp_path / "run", plain_run(data, steps=3, engine=DDPConfig(), profile=profile))
    assert lived(pool, tmp_path / "run", 2) == EXIT_DONE
    [trace] = (tmp_path / "run/profile").iterdir()
    assert trace.name == "steps-00000001-00000001.rank-00001.trace.json.gz"
    seen = [event.get("name") for event in json.loads(gzip.open(trace).read())["traceEvents"]]
    assert seen.count("DistributedDataParallel.forward") == 1 + 2  # what only the first step does, and its micro-batches


def test_one_ranks_clock_stops_all_before_the_job_ends(pool, data, tmp_path):
    begin(tmp_path / "run", plain_run(data, engine=DDPConfig()))
    assert lived(pool, tmp_path / "run", 3, fault="job ends") == EXIT_CONTINUE
    stop = read_metrics(tmp_path / "run").generations[-1].stop
    assert (stop.step, stop.reason) == (4, "time limit") and committed_steps(tmp_path / "run")[-1] == 4


def test_a_run_directory_moves_and_the_data_with_it(pool, data, tmp_path):
    begin(tmp_path / "here", plain_run(data))
    lived(pool, tmp_path / "here", 1, stop_after=4)
    begin(tmp_path / "whole", plain_run(data))
    lived(pool, tmp_path / "whole", 1)
    there = copy_of(tmp_path / "here", tmp_path / "elsewhere" / "renamed")
    moved = copy_of(data, tmp_path / "elsewhere" / "data")
    run = plain_run(data)
    source = replace(run.data.sources["text"], path=str(moved))
    changed(there, data=replace(run.data, sources={"text": source}))
    assert lived(pool, there, 1) == EXIT_DONE and losses(there) == losses(tmp_path / "whole")


def test_the_newest_checkpoint_is_damaged_and_the_one_before_is_taken(pool, data, tmp_path):
    begin(tmp_path / "run", plain_run(data))
    lived(pool, tmp_path / "run", 1, stop_after=5)
    begin(tmp_path / "whole", plain_run(data))
    lived(pool, tmp_path / "whole", 1)
    file = tmp_path / "run" / "checkpoints" / "step-00000005" / "rank-00000.bin"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert lived(pool, tmp_path / "run", 1) == EXIT_DONE
    start = read_metrics(tmp_path / "run").generations[-1].start
    assert start.step == 3 and "rank-00000.bin" in start.problems[0] and "step-00000005" in start.problems[0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and audit(tmp_path / "run").ok


def test_data_that_are_one_sample_late_are_refused(pool, data, tmp_path):
    begin(tmp_path / "run", plain_run(data))
    lived(pool, tmp_path / "run", 1, stop_after=4)
    with pytest.raises(RankFailure, match=r"position=\d+: the checkpoint's data order has position="):
        lived(pool, tmp_path / "run", 1, fault="shifted data")


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_steps_that_are_no_number_are_left_out_and_end_the_run(pool, data, tmp_path, name):
    world_size, engine = ENGINES[name]
    run = plain_run(data, engine=engine, objective=ObjectiveConfig(max_nonfinite_steps=3),
                    checkpoint=replace(plain_run(data).checkpoint, every_steps=1))
    begin(tmp_path / "run", run)
    with pytest.raises(RankFailure, match="not finite in 3 steps in a row") as failure:
        lived(pool, tmp_path / "run", world_size, fault="nan")
    last = read_ledger(tmp_path / "run")[0][-1]
    assert f"data.skip=[[{last.first_sample},{last.stop_sample}]]" in str(failure.value)  # what a checkpoint has passed is past
    metrics = read_metrics(tmp_path / "run")
    steps, stop = metrics.steps, metrics.generations[-1].stop
    assert [s.applied for s in steps][-3:] == [False] * 3 and not math.isfinite(steps[-1].grad_norm)
    assert (stop.step, stop.reason, stop.exit_status) == (steps[-1].step, "no progress", 76)
    saved = committed_steps(tmp_path / "run")
    before, after = states(tmp_path / "run", saved[-2]), states(tmp_path / "run", saved[-1])
    assert len(saved) >= 2 and all(torch.equal(before[key], after[key]) for key in before)
    assert lived(pool, tmp_path / "run", world_size) == EXIT_DONE  # without the fault the run goes on from there


def test_the_advice_leaves_out_all_samples_whose_steps_were_no_number(pool, data, tmp_path):
    begin(tmp_path / "run", plain_run(data, objective=ObjectiveConfig(max_nonfinite_steps=2)))
    with pytest.raises(RankFailure, match=r"not finite in 2 .* changed the model\. Try: .*data.skip=\[\[0,14\]\]"):
        lived(pool, tmp_path / "run", 1, fault="nan")
    begin(tmp_path / "more", plain_run(data, steps=12, objective=ObjectiveConfig(max_nonfinite_steps=5)))
    with pytest.raises(RankFailure, match=r"and the checkpoint of step 3 is intact\. Try: .*data.skip=\[\[21,35\]\]"):
        lived(pool, tmp_path / "more", 1, fault="nan")


def test_an_optimizer_that_changes_nothing_is_found_at_the_first_step(pool, data, tmp_path):
    begin(tmp_path / "run", plain_run(data, optim=AdamWConfig(lr=1e-30, weight_decay=0)))
    with pytest.raises(RankFailure, match="changed none of the"):
        lived(pool, tmp_path / "run", 1)


def test_a_step_without_loss_bearing_tokens_is_neither_a_loss_nor_a_spike(pool, tmp_path):
    trained = np.repeat(np.arange(70) >= 4 * 7, 32)  # the first four steps have none
    write_tokens(tmp_path / "set", {"train": [32] * 70}, trained={"train": trained}, samples="answers")
    run = plain_run(tmp_path / "set", engine=DDPConfig(), optim=AdamWConfig(lr=1e-3, weight_decay=0),
                    model=DecoderConfig(vocab_size=70 * 32, n_layers=1, d_model=16, n_heads=2, d_ff=32),
                    lr_schedule=LrScheduleConfig(warmup_steps=0),
                    objective=ObjectiveConfig(spike_sigma=6, spike_window=3, on_spike="stop", max_nonfinite_steps=1))
    begin(tmp_path / "run", replace(run, data=replace(run.data, shuffle=False)))
    assert lived(pool, tmp_path / "run", 2) == EXIT_DONE
    steps = read_metrics(tmp_path / "run").steps
    assert [math.isnan(s.loss_nats) for s in steps] == [s.tokens == 0 for s in steps] == [True] * 4 + [False] * 4
    assert all(s.applied and not s.spike for s in steps)


def test_a_spike_stops_the_run_where_asked(pool, data, tmp_path):
    objective = ObjectiveConfig(spike_sigma=0.001, spike_window=2, on_spike="stop")
    run = plain_run(data, objective=objective)
    begin(tmp_path / "run", replace(run, data=replace(run.data, skip=[[900, 903]])))
    with pytest.raises(RankFailure, match=r"is a spike .*data\.skip=\[\[900,903\],\[\d+,\d+\]\]"):  # what was left out stays so
        lived(pool, tmp_path / "run", 1)
    assert any(s.spike for s in read_metrics(tmp_path / "run").steps)


def test_a_spiking_step_is_left_out_where_asked(pool, data, tmp_path):
    objective = ObjectiveConfig(spike_sigma=0.001, spike_window=2, on_spike="skip")
    for name in ("single", "fsdp2"):
        world_size, engine = ENGINES[name]
        begin(tmp_path / name, plain_run(data, objective=objective, engine=engine))
        assert lived(pool, tmp_path / name, world_size) == EXIT_DONE
        losses, norms = SpikeDetector(2, 0.001), SpikeDetector(2, 0.001)
        kinds = set()
        for s in read_metrics(tmp_path / name).steps:
            kinds.add((by_loss := s.loss_nats > losses.bound(), by_norm := s.grad_norm > norms.bound()))
            assert (s.spike, s.applied) == (by_loss or by_norm, not (by_loss or by_norm)), s
            losses.observe(s.loss_nats)
            norms.observe(s.grad_norm)
        assert {(True, False), (False, True), (False, False)} <= kinds


def test_skipped_samples_are_left_out_and_in_the_ledger(pool, data, tmp_path):
    run = plain_run(data)
    begin(tmp_path / "run", replace(run, data=replace(run.data, skip=[[10, 13]])))
    assert lived(pool, tmp_path / "run", 1) == EXIT_DONE
    entries = {entry.step: entry for entry in read_ledger(tmp_path / "run")[0]}
    assert entries[2].skipped == [[10, 13]] and (entries[2].first_sample, entries[2].stop_sample) == (7, 17)
    assert audit(tmp_path / "run").ok


def test_held_out_loss_is_the_same_on_any_ranks(pool, data, tmp_path):
    found = []
    for world_size, engine in ((1, SingleConfig()), (3, FSDP2Config())):
        run_dir = tmp_path / f"on-{world_size}"
        begin(run_dir, plain_run(data, engine=engine, eval=EvalConfig(every_steps=4, max_rows=5)))
        lived(pool, run_dir, world_size)
        found.append([(e.step, e.tokens, e.loss_nats) for e in read_metrics(run_dir).evals])
    assert [e[:2] for e in found[0]] == [e[:2] for e in found[1]] and [e[0] for e in found[0]] == [4, 8]
    for ours, theirs in zip(*found, strict=True):
        assert ours[2] == pytest.approx(theirs[2], abs=1e-5)


def test_muon_resumes_on_other_ranks(pool, data, tmp_path):
    optim = MuonConfig(lr=1e-3, eps=1e-6, muon_lr=1e-3, newton_schulz_dtype="fp32")
    begin(tmp_path / "one", plain_run(data, optim=optim))
    lived(pool, tmp_path / "one", 1)
    begin(tmp_path / "run", plain_run(data, optim=optim, engine=FSDP2Config()))
    lived(pool, tmp_path / "run", 3, stop_after=4)
    changed(tmp_path / "run", engine=DDPConfig())
    lived(pool, tmp_path / "run", 2)
    assert largest_difference(states(tmp_path / "one", 8), states(tmp_path / "run", 8)) <= 1e-5


def test_a_last_save_that_fails_is_an_error_that_says_where(pool, data, tmp_path):
    begin(tmp_path / "run", plain_run(data))
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(RankFailure, match="step 8 could not be saved"):
        lived(pool, tmp_path / "run", 1)
    assert [s.step for s in read_metrics(tmp_path / "run").saves if s.problem] == [3, 6, 8]


@pytest.mark.parametrize(("fault", "asynchronous"), [
    ("full disk", False), ("full disk", True), ("no inodes", False), ("no inodes", True)])
def test_a_disk_that_takes_nothing_for_a_while_costs_a_checkpoint_and_nothing_else(pool, data, tmp_path, mount, fault,
                                                                                   asynchronous):
    """Metrics, ledger and the save of step 3 fail; the lines are there afterwards, and the steps those of the other run."""
    run = plain_run(data, engine=FSDP2Config())
    run = replace(run, checkpoint=replace(run.checkpoint, asynchronous=asynchronous))
    begin(tmp_path / "whole", run)
    assert lived(pool, tmp_path / "whole", 2) == EXIT_DONE
    disk = mount("size=16m,nr_inodes=200")
    begin(disk, run)
    (disk / "ledger.jsonl").write_text('{"start":0}'.ljust(4096 - 150) + "\n")  # step 2 does not fit into its page
    assert lived(pool, disk, 2, fault=fault) == EXIT_DONE
    assert committed_steps(disk) == [6, 8] and losses(disk) == losses(tmp_path / "whole")
    assert [s.step for s in read_metrics(disk).saves if s.problem] == [3]
    assert audit(disk).ok and [e.step for e in read_ledger(disk)[0]] == list(range(1, 9))


def test_asynchronous_saves_are_the_same_checkpoints(pool, data, tmp_path):
    found = []
    for asynchronous in (False, True):
        run = plain_run(data, engine=FSDP2Config())
        run_dir = tmp_path / str(asynchronous)
        begin(run_dir, replace(run, checkpoint=replace(run.checkpoint, asynchronous=asynchronous)))
        assert lived(pool, run_dir, 2) == EXIT_DONE
        found.append(states(run_dir, 8))
        assert committed_steps(run_dir)[-1] == 8
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_metrics_have_the_promised_keys(pool, data, tmp_path):
    begin(tmp_path / "run", plain_run(data))
    lived(pool, tmp_path / "run", 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    assert len(steps) == 8
    promised = {"step", "tokens", "loss_nats", "grad_norm", "lr", "step_time_s", "data_wait_s", "tokens_per_s"}
    assert promised <= steps[0].keys()


def test_the_wait_for_data_is_of_the_step_that_waited(pool, data, tmp_path):
    run = plain_run(data)
    begin(tmp_path / "run", replace(run, data=replace(run.data, prefetch_batches=1)))
    lived(pool, tmp_path / "run", 1, fault="slow data")
    steps = read_metrics(tmp_path / "run").steps
    assert all(s.data_wait_s <= s.step_time_s for s in steps)
    assert steps[3].data_wait_s >= 0.2  # the fourth step lasts until the fifth's data is there


@pytest.mark.parametrize("other", ["content", "removed", ""])
def test_a_disk_of_a_node_with_other_data_is_found_before_the_first_step(pool, data, tmp_path, other):
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    for disk in disks:
        shutil.copytree(data, disk / "data")
    if other == "content":
        shutil.rmtree(disks[1] / "data")
        write_tokens(disks[1] / "data", {"train": [40] * 60})
    elif other == "removed":
        remove(disks[1] / "data", [f"{open_dataset(data).shards[0].path}:0"])
    begin(tmp_path / "run", plain_run(Path("data"), engine=FSDP2Config(), steps=2))
    lives = ("tests.lives:live_on_disks_of_their_own", str(tmp_path / "run"), [str(disk) for disk in disks])
    if not other:
        assert pool.run(2, *lives) == [EXIT_DONE, EXIT_DONE]
        return
    with pytest.raises(RankFailure, match=r"rank 1 on \S+ finds other data, or other lists"):
        pool.run(2, *lives)
    assert not (tmp_path / "run/ledger.jsonl").exists() or not (tmp_path / "run/ledger.jsonl").read_text()
