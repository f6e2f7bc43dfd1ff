"""Impossible requests: each is refused before sbatch, under the key at fault, with a word that works."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from officina.configs.sites import announced, find_site
from officina.launch import cli
from officina.launch.job_cost import chain_length
from officina.launch.job_request import make_request
from officina.launch.site_rows import time_words
from officina.trainer.config import RunConfig
from officina.trainer.errors import ConfigError, LaunchError, Problem
from officina.trainer.run_dir import save_config
from tests.launch.submit_cases import ACCOUNTS, NOBODY, SITES, prepared, words


@pytest.fixture(scope="module", autouse=True)
def a_person(project):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("USER", "user"), ("CINECA_SCRATCH", "/scratch/user"), ("WORK", "/work-area/user"),
                            ("HOME", "/homes/user")):
            patch.setenv(name, value)
        yield


def impossible() -> Iterator[tuple[str, str, list[str]]]:
    """(site, key at fault, words) of requests that the profiles rule out, made from the profiles themselves."""
    for site in SITES:
        profile = find_site(site, NOBODY).profile
        queue, rules, per_node = profile.queues.train, profile.request, profile.gpu.per_node
        limits = [q for q in (profile.partitions.get(queue.partition), profile.qos.get(queue.qos)) if q]
        if longest := min((q.max_time for q in limits if q.max_time), default=0):
            yield site, "time", words(site, time=time_words(longest + 60))
        yield site, "time", [word for word in words(site) if not word.startswith("time=")]
        if most := min((q.max_nodes for q in limits if q.max_nodes), default=0):
            yield site, "nodes", words(site, f"nodes={most + 1}")
        elif profile.node.count:
            yield site, "nodes", words(site, f"nodes={profile.node.count + 1}")
        if "account" in rules.requires:
            yield site, "account", [word for word in words(site) if not word.startswith("account=")]
        if rules.account_pattern:
            yield site, "account", words(site, "account=wrong!")
        for option in rules.forbids:
            value = "--mem-per-gpu=60G" if option == "mem-per-gpu" else f"--{option}=1"
            yield site, "slurm.extra", words(site, f"slurm.extra=[{value}]")
            if option == "qos":
                yield site, "qos", words(site, "qos=normal")
        for extra in ("--nodes=4", "-t 5", "--gres=gpu:1", "reservation=x"):
            yield site, "slurm.extra", words(site, f"slurm.extra=[{extra}]")
        for name in profile.env.forbid:
            yield site, f"env.extra.{name}", words(site, f"env.extra.{name}=3")
            yield site, "prologue", words(site, f"prologue=[export {name}=3]")
        yield site, "env.extra.MASTER_ADDR", words(site, "env.extra.MASTER_ADDR=localhost")
        yield site, "gpus", words(site, f"gpus={per_node + 1}")
        yield site, "ranks", words(site, f"ranks={per_node + 2}")
        other = "x86_64" if profile.node.arch == "aarch64" else "aarch64"
        if profile.container.runtime:
            yield site, "container", words(site, f"container=images/pytorch-{other}.sif")
        if not profile.container.pyxis:
            yield site, "container", words(site, "container=nvcr.io#nvidia/pytorch:26.01")
        if profile.slurm.launchers:
            yield site, "launcher", words(site, "launcher=mpirun")
        whole = next((p for p in profile.partitions.values() if p is limits[0] and p.whole_nodes), None) if limits else None
        if whole:
            yield site, "gpus", words(site, "gpus=1")
        yield site, "cpus", words(site, "cpus=1000")
        yield site, "stop_before", words(site, "stop_before=2h")
        if longest >= 72_000:
            yield site, "stop_before", words(site, "stop_before=19h", time="20h")
        for name, partition in profile.partitions.items():
            if partition.gpus is False:
                yield site, "partition", words(site, f"partition={name}", time="20m")
            elif partition.min_nodes and partition.min_nodes > 1:
                yield site, "nodes", words(site, f"partition={name}", f"nodes={partition.min_nodes - 1}")
        for name, qos in profile.qos.items():
            if "{" in name:
                continue
            if qos.min_nodes:
                yield site, "nodes", words(site, f"qos={name}", f"nodes={qos.min_nodes - 1}")
            if qos.max_nodes:
                yield site, "nodes", words(site, f"qos={name}", f"nodes={qos.max_nodes + 1}", time="20m")
            if qos.max_time:
                yield site, "time", words(site, f"qos={name}", time=time_words(qos.max_time + 60))
            if qos.gpus is False:
                yield site, "qos", words(site, f"qos={name}")
        if profile.billing.per_node_hour:
            yield site, "budget", words(site, "budget=0.1")
            yield site, "budget", words(site, "jobs=5", f"budget={profile.billing.per_node_hour * 2}")
        else:
            yield site, "budget", words(site, "budget=100")
        yield site, "engine", words(site, "engine=single")
    yield "lumi-g", "cpu_bind", words("lumi-g", "partition=small-g", "gpus=2", "cpu_bind=mask_cpu:0xfe,0xfe00")
    yield "meluxina-gpu", "jobs", words("meluxina-gpu", "qos=long", "jobs=2")
    yield "discoverer-plus", "nodes", words("discoverer-plus", "qos=normal", time="30s")


CASES = list(impossible())


def test_there_are_enough_of_them():
    assert len(CASES) >= 100
    assert len({key for _, key, _ in CASES}) >= 15


@pytest.mark.parametrize("site", SITES)
def test_impossible_requests_are_refused_with_a_word_that_works(site):
    for _, key, given in [case for case in CASES if case[0] == site]:
        found = prepared(*given).problems
        mine = [problem for problem in found if problem.key == key]
        assert mine, f"{given[-2:]} is not refused under {key}: {found}"
        for problem in mine:
            assert problem.remedy and len(str(problem)) < 400
            if (mended := apply(problem, given)) is not None:
                left = prepared(*mended).problems
                assert not [p for p in left if p.key == key], f"{problem}\n  does not help: {left}"


def apply(problem: Problem, given: list[str]) -> list[str] | None:
    """The request with the first remedy applied; None where it is not a word that can be typed as it stands."""
    remedy = problem.remedy.split(", or ")[0].split(", and say ")[0]
    if match := re.fullmatch(r"leave (\S+|.*) out", remedy):
        gone = match[1]
        return [w for w in given if gone not in w] if any(gone in w for w in given) else None
    new = [word for word in shlex.split(remedy.replace(" (a chain)", "")) if "=" in word]
    if not new or "NAME" in remedy or "./my.yaml" in remedy:
        return None
    keys = {word.split("=")[0] for word in new}
    return [*(w for w in given if w.split("=")[0] not in keys), *new]


def test_what_the_profile_allows_is_not_refused():
    """The other side of each limit: the largest request that is allowed."""
    for site in SITES:
        profile = find_site(site, NOBODY).profile
        queue = profile.queues.train
        limits = [q for q in (profile.partitions.get(queue.partition), profile.qos.get(queue.qos)) if q]
        longest = min((q.max_time for q in limits if q.max_time), default=3600)
        most = min((q.max_nodes for q in limits if q.max_nodes), default=1)
        found = prepared(*words(site, f"nodes={most}", "batch.global_tokens=2097152", time=time_words(longest)))
        assert not found.problems, found.problems


# ---- sites ---------------------------------------------------------------------------------------------------------
def test_announced_and_unknown_sites():
    for name in [row.id for row in announced()]:
        with pytest.raises(ConfigError, match="announced, not in service"):
            prepared(*words("lumi-g", f"site={name}"))
    with pytest.raises(ConfigError, match="there is no such site.*site=lumi"):
        prepared(*words("lumi-g", "site=lumy"))
    with pytest.raises(ConfigError, match="site: is not named"):
        prepared(*[word for word in words("lumi-g") if not word.startswith("site=")])
    assert "no scheduler" in str(prepared(*words("lumi-g", "site=local")).problems[0])


def test_a_site_of_which_nothing_is_known_asks_for_what_it_must_know():
    given = [w for w in words("vega-gpu", "site=slurm")]
    keys = {problem.key for problem in prepared(*given).problems}
    assert keys == {"gpus"}
    keys = {problem.key for problem in prepared(*given, "gpus=4").problems}
    assert keys == {"cpus"}
    assert not prepared(*given, "gpus=4", "cpus=8").problems


def test_a_cluster_without_gpus(project):
    """As `officina sites new` writes it."""
    Path("attic.yaml").write_text("extends: slurm\nname: attic\nrequest: {gpus: none}\npartitions: {small: {gpus: false}}\n"
                                  "queues: {train: {partition: small}, data: {partition: small}}\n")
    given = words("vega-gpu", "site=./attic.yaml")
    [problem] = prepared(*given).problems
    assert problem.key == "device" and "nodes of attic have no GPUs" in problem.rule
    assert not prepared(*given, *problem.remedy.split(",")[0].split()).problems
    evaluation = prepared("eval", "runs/mine", "site=./attic.yaml", "time=1h")
    assert not evaluation.problems and "gpu" not in evaluation.text.lower().replace("gpus: none", "")


# ---- places --------------------------------------------------------------------------------------------------------
def test_runs_under_a_home_with_a_quota(monkeypatch):
    for site, home in (("leonardo-booster", "/homes/user"), ("jupiter-booster", "/e/home"), ("lumi-g", "/users/user"),
                       ("deucalion-a100", "/home")):
        given = words(site, time="1h")
        found = prepared(*given, dry_run=False, runs_dir=f"{home}/project/runs").problems
        mine = [p for p in found if p.key == "--runs-dir"]
        assert mine and re.match(r"--runs-dir [/$]", mine[0].remedy), site
        assert "home of" in mine[0].rule
        seen = prepared(*given, dry_run=True, runs_dir=f"{home}/project/runs")
        assert any("home of" in note for note in seen.notes), "from another host it is only a note"
        assert not seen.problems


def test_caches_in_a_home_with_a_quota():
    for site, home in (("leonardo-booster", "/homes/user"), ("jupiter-booster", "/e/home/user"), ("leonardo-booster", "$HOME")):
        for name in ("TRITON_CACHE_DIR", "HF_HOME", "XDG_CACHE_HOME"):
            found = prepared(*words(site, f"env.extra.{name}={home}/.cache")).problems
            assert [p.key for p in found] == [f"env.extra.{name}"] and "a home of" in found[0].rule, (site, name)
    elsewhere = prepared(*words("leonardo-booster", "env.extra.TRITON_CACHE_DIR=/scratch/user/triton"))
    assert not elsewhere.problems and 'TRITON_CACHE_DIR="$cache' not in elsewhere.text, "what is said counts"


def test_an_image_s_own_header_counts(project):
    head = b"#!/usr/bin/env run-singularity\n\0" + b"SIF_MAGIC\0" + b"01\0" + b"02\0"
    (project / "plain.sif").write_bytes(head)
    found = prepared(*words("jupiter-booster", "container=plain.sif")).problems
    assert "is for x86_64, and the nodes of JUPITER Booster are aarch64" in str(found[0])
    assert not prepared(*words("leonardo-booster", "container=plain.sif")).problems


def test_a_python_for_another_processor(project):
    Path("foreign/bin").mkdir(parents=True)
    Path("foreign/bin/python").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(11) + (183).to_bytes(2, "little") + bytes(44))
    found = prepared(*words("leonardo-booster", "venv=foreign")).problems
    assert found and found[0].key == "venv" and "is for aarch64" in found[0].rule


def test_an_environment_made_in_an_image_is_one(project, monkeypatch):
    """Its python is a link into the image, which leads nowhere outside."""
    Path("within/bin").mkdir(parents=True)
    Path("within/bin/python").symlink_to("/opt/of-the-image/bin/python3")
    Path("there.sif").touch()
    monkeypatch.setenv("IMAGES", str(project))
    found = prepared(*words("lumi-g", "container=$IMAGES/there.sif", "venv=within"), dry_run=False)
    assert not {p.key for p in found.problems} & {"container", "venv"}
    assert f"[ -e {project}/there.sif ] ||" in found.text and f" {project}/there.sif \\\n" in found.text, "as it is at the node"
    assert "venv" in {p.key for p in prepared(*words("lumi-g", "venv=within"), dry_run=False).problems}


def test_an_image_sees_what_the_run_starts_from(project):
    Path("bases/one").mkdir(parents=True)
    save_config(RunConfig(), Path("bases/one"))
    for base in ("bases/one", "bases/one@7"):
        given = words("lumi-g", "container=images/x.sif", f"init_from={base}", "model=from_init")
        assert f",{project}/bases/one," in prepared(*given).text


def test_what_is_not_there_is_refused_where_it_is_submitted():
    found = {p.key: p for p in prepared(*words("lumi-g", "container=nowhere.sif"), dry_run=False).problems}
    assert "there is no such image" in found["container"].rule and "no virtual environment" in found["venv"].rule
    assert "lumi-multitorch" in found["container"].remedy
    assert found["venv"].remedy.startswith("singularity exec nowhere.sif sh -c 'python3 -m venv --system-site-packages venv &&")
    missing = words("lumi-g", "data.sources.text.path=elsewhere")
    assert "is no data set" in str(prepared(*missing, dry_run=False).problems)
    seen = prepared(*missing)
    assert not seen.problems and any("is no data set" in note for note in seen.notes)


# ---- words ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("word", "key", "says"), [
    ("nodes=many", "nodes", "a count is a whole number"), ("nodes=0", "nodes", "greater than or equal to 1"),
    ("time=soon", "time", "a time is written"), ("launcher=ssh", "launcher", "must be one of 'srun', 'torchrun' or 'mpirun'"),
    ("queue=fast", "queue", "must be one of"), ("slurm.extras=[--x]", "slurm.extras", "there is no such key"),
    ("env.extra=3", "env.extra", "valid dictionary"), ("budget=-1", "budget", "greater than 0"),
    ("requeue=perhaps", "requeue", "boolean"), ("~nodes", "nodes", "left out"), ("slurm.extra=[]", "", "")])
def test_words_of_the_job_are_typed(word, key, says):
    found = prepared(*words("lumi-g", word)).problems if not word.startswith("~") else prepared(*words("lumi-g"), word).problems
    assert (not found) if not key else any(p.key == key and says.replace("'", "") in p.rule for p in found), found


def test_a_person_s_defaults(tmp_path):
    (tmp_path / "officina").mkdir()
    (tmp_path / "officina/mine.yaml").write_text(
        "submit:\n  account: project_1\n  nodes: 3\n  env: {extra: {NCCL_DEBUG: INFO}}\n  slurm: {extra: [--mail-type=END]}\n")
    from officina.launch.submit import prepare

    given = [w for w in words("lumi-g") if not w.startswith("account=")]
    found = prepare(given, Path("runs"), dry_run=True, environ=NOBODY | {"XDG_CONFIG_HOME": str(tmp_path)})
    assert not found.problems
    for line in ("#SBATCH --account=project_1", "#SBATCH --nodes=3", "export NCCL_DEBUG=INFO", "#SBATCH --mail-type=END"):
        assert line in found.text
    one = prepare([*given, "nodes=1"], Path("runs"), dry_run=True, environ=NOBODY | {"XDG_CONFIG_HOME": str(tmp_path)})
    assert one.request.nodes == 1


@cache
def request(site: str):
    from officina.configs.job import read_job

    return make_request(find_site(site, NOBODY), read_job([f"account={ACCOUNTS[site]}", "time=1h"], NOBODY)[0])


@pytest.mark.parametrize("site", SITES)
def test_every_command_has_a_queue(site):
    from officina.configs.job import read_job

    job = read_job([f"account={ACCOUNTS[site]}", "time=10m"], NOBODY)[0]
    found = make_request(find_site(site, NOBODY), job, what="data")
    assert found.gpus == 0 and found.ranks_per_node == 1
    assert request(site).gpus == find_site(site, NOBODY).profile.gpu.per_node


# ---- sweeps and other commands ---------------------------------------------------------------------------------------
def test_runs_of_a_sweep_are_judged_each():
    found = prepared(*words("leonardo-booster", "batch.global_tokens=65536,65537", "seed=1,2"))
    assert [p.key for p in found.problems] == ["batch.global_tokens"], "told once, though two runs have it"
    assert [plan.run.name for plan in found.plans] == ["mine-0", "mine-1", "mine-2", "mine-3"]
    varied = prepared(*words("leonardo-booster", "name=one,two"))
    assert [plan.run_dir.name for plan in varied.plans] == ["one-0", "one-1"] and "/runs/one-%a/logs/" in varied.text
    assert {p.key for p in prepared(*words("leonardo-booster", "seed=1,2", "jobs=2")).problems} == {"jobs"}
    assert {p.key for p in prepared(*words("leonardo-booster", "seed=1,2", "nodes=1", "budget=100")).problems} == {"budget"}
    two_each = prepared(*words("leonardo-booster", "seed=1,2", "nodes=1", "budget=128"))
    assert not two_each.problems and chain_length(two_each.request) == 1, "the budget of all runs pays for one job of each"
    assert "singleton" not in two_each.text and "--chain" not in two_each.text
    again = prepared(*words("leonardo-booster", "seed=1,2", "nodes=1", "budget=400", "requeue=true"))
    assert not again.problems and "--max-jobs 3 " in again.text, "400 of 2 x 64"
    for more in (["seed=1,2", "budget=200"], ["seed=1,2", "jobs=4", "budget=400"], ["budget=100"]):
        dear = prepared(*words("leonardo-booster", "nodes=1", "requeue=true", *more)).problems
        assert {p.key for p in dear} == {"budget"}, f"{more}: a job that queues itself again runs twice at least"
    assert "takes 1 of one user" in str(prepared(*words("meluxina-gpu", "qos=long", "seed=1,2")).problems)
    with pytest.raises(LaunchError, match="resume: goes on with one run"):
        prepared("resume", "runs/mine", "seed=1,2", "site=lumi", "time=1h")
    with pytest.raises(LaunchError, match="names no run directory"):
        prepared("resume", "site=lumi", "time=1h")


def test_other_commands():
    found = prepared("data", "build", "corpus", "site=lumi", "account=project_1", "time=1h")
    assert not found.problems and found.request.partition == "small"
    keys = {p.key for p in prepared("data", "build", "corpus", "site=jupiter", "account=a", "time=1h").problems}
    assert keys == {"partition"}, "nobody has told where such jobs go"
    keys = {p.key for p in prepared("data", "build", "corpus", "site=leonardo", "account=a", "time=5h").problems}
    assert keys == {"time"}
    two = prepared("data", "build", "c", "site=lumi", "account=project_1", "time=1h", "nodes=2")
    assert {p.key for p in two.problems} == {"nodes"}
    bench = prepared("bench", "all", "site=lumi", "account=project_1", "time=1h", "gpus=1", "partition=small-g")
    assert "#SBATCH --gpus-per-node=1" in bench.text and not bench.problems
    evaluate = ["eval", "runs/mine", "site=leonardo", "account=a", "time=1h"]
    once = prepared(*evaluate, "budget=1000")
    assert not once.problems and chain_length(once.request) == 1 and "singleton" not in once.text, "not 31 times the same"
    assert {p.key for p in prepared(*evaluate, "jobs=2").problems} == {"jobs"}


def test_after_two_dashes_all_words_are_the_command_s():
    job = ["site=lumi", "account=project_1", "time=1h"]
    assert prepared(*job, "--", "check", "experiment=demo", "--force").script.command == ("check", "experiment=demo", "--force")
    given = prepared("generate", *job, "--", "runs/mine", "time=3")
    assert given.script.command == ("generate", "runs/mine", "time=3") and given.request.time_s == 3600


def test_options_of_submit_and_of_the_command(capsys):
    job = ["site=lumi", "account=project_1", "time=1h"]
    assert cli.main(["submit", *job, "data", "build", "corpus", "texts", "--licence", "MIT", "--dry-run"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("data build corpus texts --licence MIT")
    assert cli.main(["submit", *words("lumi-g"), "--wrong", "--dry-run"]) == 2
    assert "--wrong: is no option of submit" in capsys.readouterr().err
    assert cli.main(["submit", "--dry-run", "--runs-dir", "elsewhere", *words("lumi-g")]) == 0
    assert "/elsewhere/mine/logs/" in capsys.readouterr().out


# ---- words and files of the job --------------------------------------------------------------------------------------
def test_none_is_a_value_where_srun_and_libraries_have_it():
    text = prepared(*words("leonardo-booster", "cpu_bind=none", "env.extra.NCCL_NET_PLUGIN=none", "env.extra.TAGS=[a,b]",
                           "jobs=none")).text
    assert "--cpu-bind=none" in text and "export NCCL_NET_PLUGIN=none" in text and "export TAGS='[a,b]'" in text


@pytest.fixture
def mine(tmp_path):
    """Writes ~/.config/officina/mine.yaml, and reads a job over it."""
    from officina.configs.job import read_job

    def read(text: str, *given: str):
        (tmp_path / "officina").mkdir(exist_ok=True)
        (tmp_path / "officina/mine.yaml").write_text(text)
        return read_job(list(given), {"XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": ""})[:2]

    return read


def test_null_in_the_defaults_of_a_job_is_no_value(mine):
    job, problems = mine("submit:\n  account: null\n  jobs: null\n  setup: ~\n  cpu_bind: none\n")
    assert not problems and (job.account, job.jobs, job.setup, job.cpu_bind) == ("", None, None, "none")
    job, problems = mine("submit:\n  account: project_1\n  jobs: 3\n", "account=null", "jobs=null")
    assert not problems and (job.account, job.jobs) == ("", None), "a word takes a default away"


def test_a_fault_of_a_default_names_its_file(mine):
    text = "submit:\n  acount: x\n  nodes: many\n  time: 1h\n  env: {extra: {A: [1]}}\n"
    said = {p.key: str(p) for p in mine(text)[1]}
    assert said.keys() == {"acount", "nodes", "env.extra.A"} and all("officina/mine.yaml)" in line for line in said.values())
    [typed] = mine("submit:\n  nodes: 2\n", "nodes=many")[1]
    assert "mine.yaml" not in str(typed)


def test_a_speed_of_one_s_own_is_told_as_such(tmp_path):
    from officina.launch.job_plan import plan_lines

    (tmp_path / "my.yaml").write_text("extends: lumi\nspeed: {tflops_per_gpu: 100}\n")
    found = prepared(*words("lumi-g"), f"site={tmp_path}/my.yaml")
    hours = dict(plan_lines(found.planned))["hours"]
    assert "(cited: 100 TFLOP/s a GPU (set in my.yaml, own); this run was not measured)" in hours
