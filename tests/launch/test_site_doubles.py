"""Rendered scripts on a double of each site: accepted, refused where the profile says so, and run to their end."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_sets import tokenizer_info, write_tokens
from site_doubles import start_double
from slurm import SlurmCluster, need_slurm

from officina.configs.sites import find_site
from officina.launch import cli
from officina.launch.job_record import read_jobs
from officina.launch.site_rows import time_words
from officina.launch.supervise import read_attempts
from officina.trainer.metrics import read_metrics
from officina.trainer.run_dir import load_config
from tests.launch.submit_cases import ACCOUNTS, SITES, cases

pytestmark = pytest.mark.slurm
GOLDEN = Path(__file__).parent / "sbatch"
FOUR = ("lumi-g", "leonardo-booster", "marenostrum5-acc", "jupiter-booster")


@pytest.fixture(autouse=True)
def needs_slurm():
    need_slurm()


def judged(cluster: SlurmCluster, text: str, folder: Path, *options: str) -> tuple[bool, str]:
    """What sbatch says of a script."""
    script = folder / "judged.sbatch"
    script.write_text(text)
    done = cluster.run("sbatch", "--test-only", *options, str(script))
    return done.returncode == 0, done.stderr


def without(text: str, option: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith(f"#SBATCH --{option}")) + "\n"


def test_scripts_are_accepted_and_what_the_profile_refuses_is_refused(tmp_path):
    for site in SITES:
        profile = find_site(site).profile
        with start_double(site) as cluster:
            texts = {mode: (GOLDEN / f"{site}-{mode}.sbatch").read_text() for s, mode, _ in cases() if s == site}
            for mode, text in texts.items():
                # The double has no pyxis, whose options are srun's; sbatch judges the rest.
                taken, said = judged(cluster, text, tmp_path)
                assert taken, f"{site} {mode}: {said}"
            srun = texts["srun"]
            for option in set(profile.request.requires) & {"account", "qos"}:
                assert not judged(cluster, without(srun, option), tmp_path)[0], f"{site}: without {option}"
            if profile.request.account_pattern:
                text = srun.replace(f"--account={ACCOUNTS[site]}", "--account=wrong!")
                assert not judged(cluster, text, tmp_path)[0], f"{site}: a wrong account"
            for option in set(profile.request.forbids) - {"mem-per-gpu"}:  # which job_submit.lua of Slurm 22.05 does not see
                value = "normal" if option == "qos" else "1G"
                assert not judged(cluster, srun, tmp_path, f"--{option}={value}")[0], f"{site}: --{option}"
            queue = profile.queues.train
            limits = [q for q in (profile.qos.get(queue.qos), profile.partitions.get(queue.partition)) if q]
            if longest := next((q.max_time for q in limits if q.max_time), 0):
                text = re.sub(r"--time=\S+", f"--time={int(longest // 60) + 1}", srun)
                assert not judged(cluster, text, tmp_path)[0], f"{site}: longer than {time_words(longest)}"
            if most := next((q.max_nodes for q in limits if q.max_nodes), 0):
                text = re.sub(r"--nodes=\S+", f"--nodes={most + 1}", srun)
                assert not judged(cluster, text, tmp_path)[0], f"{site}: more than {most} nodes"
            too_many = {"gpus": "--gpus=1000"}.get(profile.request.gpus, f"--gres=gpu:{profile.gpu.per_node + 1}")
            assert not judged(cluster, without(srun, "gpus-per-task"), tmp_path, too_many)[0], f"{site}: too many GPUs"


# ---- to the end ------------------------------------------------------------------------------------------------------------
MODEL = ["name=mine", "model=tiny", "model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.d_ff=64",
         "model.vocab_size=2048", "engine=fsdp2", "steps=4", "batch.seq_len=32", "batch.global_tokens=512",
         "lr_schedule.warmup_steps=1", "device=cpu", "threads=1", "precision=fp32",
         "logging.tensorboard=false", "data.sources.text.path=data", "stop_before=30s", "attempts=1"]
"""CPU ranks, one for each of the site's (fake) GPUs: `gpus` is given, so the script is that of a run on GPUs."""
RUNS = {
    "leonardo-booster": ["nodes=2", "gpus=1", "engine=zero2"],
    "lumi-g": ["partition=small-g", "nodes=2", "gpus=2", "launcher=torchrun", "container=image.sif", "engine=zero2"],
    "marenostrum5-acc": ["qos=acc_debug", "nodes=1", "gpus=2", "launcher=mpirun"],
    "jupiter-booster": ["nodes=1", "gpus=4", "container=image.sif"],
}
WHOLE = {
    "leonardo-booster": ["nodes=4", "gpus=4", "launcher=torchrun"],
    "lumi-g": ["nodes=2", "gpus=8"],
    "marenostrum5-acc": ["nodes=2", "gpus=4", "engine=zero2"],
    "jupiter-booster": ["nodes=4", "gpus=4", "launcher=torchrun"],
}


def environ_of(cluster: SlurmCluster) -> dict[str, str]:
    return cluster.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none", "OMPI_MCA_rmaps_base_display_map": "1", "XDG_CONFIG_HOME": "/nowhere",
        "HWLOC_SYNTHETIC": "pack:1 numa:4 core:8 pu:1"}  # newer ones map to cores that must be there


def submit(cluster: SlurmCluster, folder: Path, *given: str) -> str:
    """Submit as a person would; the job's id."""
    sent = cluster.run(sys.executable, "-m", "officina.launch.cli", "submit", *given, env=environ_of(cluster), cwd=folder)
    assert sent.returncode == 0, sent.stderr
    return re.search(r"batch job ([0-9]+)", sent.stdout)[1]


def wait(cluster: SlurmCluster, job: str, folder: Path, timeout_s: float = 240) -> None:
    """Return when all tasks of the job have COMPLETED."""
    end = time.monotonic() + timeout_s
    while set(states := re.findall(r"JobState=(\w+)", cluster.run("scontrol", "show", "job", "-o", job).stdout)) & {
            "RUNNING", "PENDING", "COMPLETING", "CONFIGURING"}:
        assert time.monotonic() < end, f"{states}\n{log(folder)}"
        time.sleep(0.2)
    assert set(states) == {"COMPLETED"}, f"{states}\n{log(folder)}"


def base(site: str, more: list[str], folder: Path) -> list[str]:
    write_tokens(folder / "data", {"train": [300] * 6, "validation": [64]}, tokenizer=tokenizer_info("0" * 64, 2048))
    changed = {w.split("=")[0] for w in more}
    given = [*MODEL, f"site={site}", f"account={ACCOUNTS[site]}", "time=20m"]
    return [*(w for w in given if w.split("=")[0] not in changed), *more]


def run_to_the_end(site: str, more: list[str], folder: Path) -> Path:
    (folder / "image.sif").touch()
    with start_double(site) as cluster:
        wait(cluster, submit(cluster, folder, *base(site, more, folder)), folder)
    return folder / "runs/mine"


def log(folder: Path) -> str:
    files = [*folder.glob("runs/*/logs/slurm-*.out"), *folder.glob("runs/*/logs/rank-*.log")]
    return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in sorted(files))


def check(site: str, more: list[str], folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    run_dir = run_to_the_end(site, more, folder)
    done(run_dir, folder)
    assert (run_dir / "job.sbatch").exists() and [r.site for r in read_jobs(run_dir)] == [site]


def done(run_dir: Path, folder: Path) -> None:
    assert '"event": "stop", "reason": "done"' in (run_dir / "metrics.jsonl").read_text().splitlines()[-1], log(folder)
    assert cli.main(["data", "audit", str(run_dir)]) == 0, log(folder)


@pytest.mark.parametrize("site", [
    pytest.param(site, marks=[] if site in ("lumi-g", "leonardo-booster") else pytest.mark.slow) for site in FOUR])
def test_a_run_comes_to_its_end(site, tmp_path, monkeypatch):
    check(site, RUNS[site], tmp_path, monkeypatch)


def test_mpirun_starts_ranks_on_two_nodes(tmp_path, monkeypatch):
    """Open MPI asks Slurm for the nodes and starts its daemon on each by srun, from within the supervisor."""
    check("leonardo-booster", ["nodes=2", "gpus=2", "launcher=mpirun", "engine=zero2"], tmp_path, monkeypatch)
    if "(Open MPI) 4." in subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=True).stdout:
        where = re.findall(r"Data for node: (\S+)\s.*Num procs: ([0-9]+)", log(tmp_path))  # later ones do not tell
        assert where == [("lrdn0001", "2"), ("lrdn0002", "2")]
    assert read_metrics(tmp_path / "runs/mine").generations[-1].start.world_size == 4


def test_a_run_moves_to_another_site_account_and_path(tmp_path, monkeypatch):
    """As docs/life_of_a_run.md says it: copied with its data; another site, account, launcher, engine and number of ranks."""
    here, there = tmp_path / "here", tmp_path / "there" / "elsewhere"
    here.mkdir()
    run_to_the_end("leonardo-booster", ["nodes=1", "gpus=1", "steps=2"], here)
    shutil.copytree(here / "runs/mine", there / "runs/moved")
    shutil.copytree(here / "data", there / "texts")
    shutil.rmtree(here)
    monkeypatch.chdir(there)
    with start_double("lumi-g") as cluster:
        wait(cluster, submit(cluster, there, "resume", "runs/moved", "steps=4", "site=lumi", f"account={ACCOUNTS['lumi-g']}",
                             "partition=small-g", "nodes=2", "gpus=1", "time=20m", "stop_before=30s", "launcher=torchrun",
                             "engine=zero2", "data.sources.text.path=texts"), there)
    done(there / "runs/moved", there)
    assert [r.site for r in read_jobs(there / "runs/moved")] == ["leonardo-booster", "lumi-g"]
    assert [g.start.world_size for g in read_metrics(there / "runs/moved").generations] == [1, 2]


def test_a_sweep_and_another_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("A text to learn from. " * 200)
    with start_double("leonardo") as cluster:
        more = ["nodes=1", "gpus=1", "optim.lr=1e-3,1e-4"]
        sweep = submit(cluster, tmp_path, *base("leonardo-booster", more, tmp_path))
        account = f"account={ACCOUNTS['leonardo-booster']}"
        build = submit(cluster, tmp_path, "site=leonardo", account, "time=20m", "data", "build", "corpus",
                       "texts", "--vocab-size", "300")
        wait(cluster, sweep, tmp_path)
        wait(cluster, build, tmp_path)
    for i, rate in enumerate(("1e-3", "1e-4")):
        run_dir = tmp_path / f"runs/mine-{i}"
        done(run_dir, tmp_path)
        assert [(r.job_id, r.array_index) for r in read_jobs(run_dir)] == [(f"{sweep}_{i}", i)]
        assert (run_dir / read_jobs(run_dir)[0].script).resolve().is_file()
        assert (run_dir / f"logs/slurm-{sweep}_{i}.out").exists()
        assert [(a["job"], a["outcome"]) for a in read_attempts(str(run_dir))] == [(f"{sweep}_{i}", "done")]
        assert load_config(run_dir).optim.lr == float(rate)
    assert (tmp_path / "corpus/dataset.json").is_file(), log(tmp_path)
    assert read_jobs(tmp_path / "runs/data-build-1")[0].what == "data"


@pytest.mark.slow
@pytest.mark.parametrize("site", FOUR)
def test_a_run_on_whole_nodes_comes_to_its_end(site, tmp_path, monkeypatch):
    check(site, WHOLE[site], tmp_path, monkeypatch)


def test_a_node_without_an_address_ends_the_job_and_nothing_hangs(tmp_path):
    """The part of the script that finds MASTER_ADDR, where the name service knows nothing: an error, never localhost."""
    text = (GOLDEN / "leonardo-booster-srun.sbatch").read_text()
    stop = next(line for line in text.splitlines() if line.startswith("stop()"))
    body = f"{stop}\n" + text[text.index("first=$("):text.index("export MASTER_ADDR")]
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho no-such-host-7\n")
    (tmp_path / "scontrol").chmod(0o755)
    done = subprocess.run(["bash", "-c", body], capture_output=True, text=True, check=False,
                          env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "x"})
    assert done.returncode == 2 and "MASTER_ADDR: no-such-host-7 has no IPv4 address" in done.stderr
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho localhost\n")
    done = subprocess.run(["bash", "-c", body], capture_output=True, text=True, check=False,
                          env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "x"})
    assert done.returncode == 2 and "this node itself to each node" in done.stderr
