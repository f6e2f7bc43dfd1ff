"""Plans: memory against what ranks really hold, hours only from a speed that is known, cost in the site's unit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from officina.launch import cli
from officina.launch.memory_plan import checkpoint_bytes, plan_memory
from officina.trainer.config import CustomModelConfig, LoraConfig, MuonConfig, RunConfig
from officina.trainer.model.flops import flops_per_token
from tests.launch.submit_cases import data_set, prepared, words
from tests.trainer.parallel.cases import NONE, Case

GB8 = ["model=llama3_8b", "batch.seq_len=4096", "batch.global_tokens=4194304", "steps=1000"]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    data_set(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- memory ------------------------------------------------------------------------------------------------------------
LORA = LoraConfig(rank=8, train=["head"])
QLORA = LoraConfig(rank=8, base="nf4")


@pytest.mark.parametrize(("engine", "ranks", "adapter"), [
    ("single", 1, NONE), ("ddp", 2, NONE), ("fsdp2", 2, NONE), ("hsdp", 4, NONE), ("zero1", 2, NONE), ("zero3", 2, NONE),
    ("single", 1, LORA), ("fsdp2", 2, LORA), ("single", 1, QLORA)])
def test_state_is_what_ranks_hold(pool, engine, ranks, adapter):
    case = Case(engine=engine, adapter=adapter)
    found = pool.run(ranks, "tests.launch.held_state:held", case)
    plan = plan_memory(case.run, ranks, precision="fp32")
    assert sum(f["moments"] for f in found) == pytest.approx(plan.moments * ranks, rel=0.02)
    if not engine.startswith("zero"):
        assert sum(f["parameters"] for f in found) == pytest.approx(plan.parameters * ranks, rel=0.02)
        shards = 2 if engine in ("fsdp2", "hsdp") else 1
        whole = sum(f["gradients"] for f in found) / ranks * shards
        alone = plan_memory(replace(case.run, engine=Case().run.engine), 1, precision="fp32")
        assert whole == pytest.approx(alone.gradients, rel=0.02)


def test_a_base_in_4_bits_is_planned_as_such():
    """Llama-3 8B with rank 16: 6.98 of its 8.03 billion weights in 4.5 bits, embedding and head in bf16."""
    from officina.configs.compose import compose_all

    plans = {name: plan_memory(compose_all([f"experiment=h200_8b_{name}"]).run, 1) for name in ("lora", "qlora")}
    matrices = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert plans["lora"].parameters - plans["qlora"].parameters == matrices * (16 - 4.5) / 8
    assert plans["qlora"].gathered - plans["lora"].gathered == 6 * 4096 * 14336, "one matrix is unpacked at a time"
    assert plans["lora"].moments == plans["qlora"].moments
    assert plans["qlora"].parameters == pytest.approx(matrices * 9 / 16 + 2 * 128256 * 4096 * 2 + 41943040 * 4, rel=1e-4)


def test_activations_are_what_the_kernels_keep():
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "saved_activations.py")], capture_output=True, text=True,
                          check=False, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kept, estimated = found.pop("recomputed")
    assert kept <= estimated < 1.2 * kept, "the model is small: the stream after the last block, counted twice, is 14 % of it"
    for name, (kept, estimated) in found.items():
        assert estimated == pytest.approx(kept, rel=0.03), name


def test_a_published_run_fits_where_it_ran():
    """KempnerForge, Llama-3 8B on one H200, states in bf16, full recomputation: 80.7 GB at the peak (docs/benchmarks.md)."""
    from officina.configs.compose import compose_all

    run = compose_all(["experiment=h200_8b"]).run
    assert 0.85 * 80.7e9 < plan_memory(run, 1).total < 80.7e9


def test_memory_goes_the_right_way():
    def total(*more: str, nodes: int = 2) -> float:
        return prepared(*words("lumi-g", f"nodes={nodes}", *GB8, "batch.micro_rows=1", *more)).planned.memory.total

    base = total()
    assert total(nodes=4) < base < total("engine=zero2") < total("engine=ddp")
    assert total("engine.recompute=full") < total("engine.recompute=selective") < base < total("batch.micro_rows=2")
    assert total("precision=bf16_pure") < base < total("precision=fp32")
    muon, adamw = RunConfig(optim=MuonConfig()), RunConfig()
    assert plan_memory(muon, 1).moments < plan_memory(adamw, 1).moments
    assert checkpoint_bytes(muon) < checkpoint_bytes(adamw)
    custom = CustomModelConfig(factory="a:b", loss="a:c", decoder="a:d")
    assert plan_memory(RunConfig(model=custom), 4) is None and checkpoint_bytes(RunConfig(model=custom)) == 0


def test_an_engine_that_the_plan_does_not_know_is_not_taken_for_another():
    with pytest.raises(NotImplementedError, match="the engine mine keeps"):
        plan_memory(RunConfig(engine=SimpleNamespace(kind="mine", recompute="none")), 2)


@pytest.mark.parametrize("more", [["engine=ddp", "batch.micro_rows=8"], ["batch.micro_rows=8"],
                                  ["engine=zero1", "batch.micro_rows=1"], ["engine.recompute=full", "batch.micro_rows=64"]])
@pytest.mark.parametrize("site", ["leonardo-booster", "karolina-gpu"])
def test_a_model_that_cannot_fit_is_refused_with_words_that_fit(site, more):
    given = words(site, *GB8, "nodes=2", *more)
    found = prepared(*given).problems
    assert len(found) == 1 and "GB of each GPU" in found[0].rule and "parameters" in found[0].rule
    new = found[0].remedy.split()
    keys = {word.split("=")[0] for word in new}
    assert not prepared(*(w for w in given if w.split("=")[0] not in keys), *new).problems, found[0].remedy


def test_checkpoints_that_outgrow_a_quota(monkeypatch, tmp_path):
    given = words("lumi-g", *GB8, "nodes=2", "batch.micro_rows=1", "checkpoint.keep_last=25")
    found = prepared(*given, dry_run=False, runs_dir="/flash/project_465000000/runs").problems
    mine = [p for p in found if p.key == "checkpoint.keep_last"]
    assert mine and "2,505 GB" in mine[0].rule and mine[0].remedy == "checkpoint.keep_last=19"
    few = [w for w in given if "keep_last" not in w]
    assert not [p for p in prepared(*few, mine[0].remedy, dry_run=False, runs_dir="/flash/project_465000000/runs").problems
                if p.key == "checkpoint.keep_last"]
    many = words("lumi-g", "nodes=1024", "steps=1000000", "checkpoint.every_steps=100", "checkpoint.keep_every=100",
                 "batch.global_tokens=4194304")
    found = prepared(*many, dry_run=False, runs_dir="/flash/project_465000000/runs").problems
    assert any("files, and flash" in p.rule for p in found), found


# ---- hours and cost ----------------------------------------------------------------------------------------------------
def shown(*given: str) -> dict[str, str]:
    from officina.launch.job_plan import plan_lines

    found = prepared(*given)
    assert not found.problems, found.problems
    return dict(plan_lines(found.planned))


def test_hours_come_from_a_known_speed_only():
    base = [*GB8, "batch.micro_rows=1", "nodes=2"]
    assert shown(*words("leonardo-booster", *base))["hours"].startswith("not known: no speed was measured or published")
    cited = shown(*words("jupiter-booster", *base))["hours"]
    assert "cited: 254.8 TFLOP/s a GPU, as Qwen3-1.7B" in cited and "third party" in cited and "was not measured" in cited
    assumed = prepared(*words("leonardo-booster", *base, "tflops=100")).planned
    run = assumed.run
    expected = 1000 * 4194304 * flops_per_token(run.model, 4096, causal=False) / (8 * 100e12) / 3600
    assert assumed.hours == pytest.approx(expected) and "assumed, as you said" in assumed.speed.basis
    assert assumed.jobs_needed == -(-int(expected * 3600) // (2 * 3600 - 300))


def test_a_run_s_own_speed_counts(project):
    from officina.launch.job_plan import make_plan
    from officina.trainer.run_dir import Start, append_history

    asked = prepared(*words("leonardo-booster", "nodes=2"))
    folder = project / "ran"
    folder.mkdir()
    start = {"run_id": "r", "action": "start", "words": [], "step": 0, "engine": "fsdp2", "commit": None}
    append_history(folder, Start(**start, world_size=8))
    rows = [{"step": step, "tokens_per_s": 50_000.0} for step in range(1, 60)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = make_plan(asked.request, asked.planned.run, run_dir=folder, steps_done=500)
    assert plan.speed.tokens_per_s == pytest.approx(50_000) and plan.speed.basis.startswith("measured: 50,000 tokens/s")
    assert plan.hours == pytest.approx(500 * 65536 / 50_000 / 3600)
    append_history(folder, Start(**start, world_size=16))
    assert make_plan(asked.request, asked.planned.run, run_dir=folder).speed is None, "another number of ranks"


@pytest.mark.parametrize(("site", "nodes", "cost"), [
    ("lumi-g", 4, "at most 32 GPU-hours a job (2h)"), ("leonardo-booster", 4, "at most 256 core-hours"),
    ("marenostrum5-acc", 4, "at most 640 core-hours"), ("jupiter-booster", 4, "at most 2,304 core-hours"),
    ("meluxina-gpu", 4, "at most 8 node-hours"), ("karolina-gpu", 4, "at most 8 node-hours")])
def test_cost_is_in_the_site_s_unit(site, nodes, cost):
    assert shown(*words(site, f"nodes={nodes}"))["cost"].startswith(cost)


def test_cost_of_a_part_of_a_node_and_of_a_chain():
    assert shown(*words("lumi-g", "partition=small-g", "gpus=2", "nodes=1"))["cost"].startswith("at most 2 GPU-hours")
    chain = prepared(*words("leonardo-booster", "nodes=4", "budget=1000"))
    assert chain.text.count("--dependency=singleton") == 1
    lines = shown(*words("leonardo-booster", "nodes=4", "budget=1000"))
    assert "768 for 3" in lines["cost"] and lines["jobs"].startswith("3, each goes on")
    lines = shown(*words("vega-gpu", "nodes=1"))
    assert "cost" not in lines and lines["time"].startswith("at most ")
    lines = shown(*words("leonardo-booster", "nodes=4", "seed=1,2,3", "at_once=2"))
    assert "768 for 3" in lines["cost"] and lines["jobs"] == "3, one a run of the sweep, 2 at a time"


def test_the_queue_is_told_also_where_nobody_named_one():
    told = shown(*words("marenostrum5-acc", "nodes=2"))
    assert told["site"] == "MareNostrum 5 ACC: qos acc_ehpc, account ehpc00"
    assert told["nodes"] == "2 nodes x 4 H100 64GB = 8 ranks, one a GPU, started by srun, 20 CPUs each"


def test_the_mesh_is_named():
    groups = shown(*words("lumi-g", "nodes=2", "engine=hsdp", "engine.shard_size=8"))
    assert groups["mesh"] == "dp_replicate 2 x dp_shard 8 (hsdp)"
    assert shown(*words("lumi-g", "nodes=2"))["mesh"] == "dp_shard 16 (fsdp2)"


# ---- the command -------------------------------------------------------------------------------------------------------
def test_plan_without_a_site(capsys):
    assert cli.main(["plan", *GB8, "engine=fsdp2", "--ranks", "64"]) == 0
    out = capsys.readouterr().out
    assert "dp_shard 64 (fsdp2)" in out and "activations" in out and "where it fits" in out
    assert "lumi-g" in out and "checkpoints of 96.4 GB" in out
    assert cli.main(["plan", *GB8, "engine=fsdp2", "ranks=8"]) == 0
    assert "dp_shard 8 (fsdp2)" in capsys.readouterr().out
    assert cli.main(["plan", *GB8, "--ranks", "64"]) == 2
    assert "engine=single: is one process, and there are 64 ranks" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", ["0", "-5"])
def test_a_plan_is_for_a_rank_at_least(capsys, ranks):
    assert cli.main(["plan", *GB8, "--ranks", ranks]) == 2 and f"--ranks {ranks}: " in capsys.readouterr().err


def test_plan_on_a_site_is_that_of_submit(capsys):
    given = words("leonardo-booster", "nodes=4")
    assert cli.main(["plan", *given]) == 0
    planned = capsys.readouterr().out
    assert cli.main(["submit", *given, "--dry-run"]) == 0
    seen = capsys.readouterr()
    assert planned.strip() in seen.err and seen.out.startswith("#!/bin/bash")


def test_a_dry_run_is_quick_and_brings_no_torch(project):
    code = ("import sys; from officina.launch import cli; status = cli.main(sys.argv[1:]); "
            "assert not {'torch', 'numpy.testing', 'triton', 'deepspeed'} & set(sys.modules), 'torch'; sys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code, "submit", *words("lumi-g", "nodes=4"), "--dry-run"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0 and "#SBATCH --nodes=4" in done.stdout, done.stderr
    assert list(project.glob("runs*")) == [], "a dry run writes nothing"
