"""`officina sites`: the tables, the pages made from profiles, and what a cluster's own Slurm says against them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from slurm import SlurmCluster

from officina.configs.sites import announced, find_site, site_ids
from officina.launch import cli, site_commands, site_pages, site_probe
from officina.launch.site_probe import COMMANDS, ask_slurm, difference, new_profile, read_probe
from officina.launch.site_rows import as_words, sections, time_words
from officina.trainer.errors import LaunchError

ROOT = Path(__file__).parents[2]
SAYS = Path(__file__).parent / "slurm_says"
"""Outputs of Slurm 22.05 for a small double of Leonardo with some limits changed; qos.txt in the form of sacctmgr 23.11."""
NOBODY = {"XDG_CONFIG_HOME": "/nowhere", "XDG_CONFIG_DIRS": ""}


@pytest.fixture(autouse=True)
def a_person_without_files(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "centre"))
    monkeypatch.chdir(tmp_path)


def recorded(**changed: str) -> dict[str, str]:
    return {name: (SAYS / f"{name}.txt").read_text() for name in COMMANDS} | changed


def read_text(tmp_path: Path, text: str):
    path = tmp_path / "read.yaml"
    path.write_text(text)
    return find_site(str(path), NOBODY)


def shown(capsys, monkeypatch, columns: int, *words: str) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["sites", *words]) == 0
    return capsys.readouterr().out


# ---- tables ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("columns", [80, 120])
def test_the_list_fits_the_terminal_with_a_line_a_site(capsys, monkeypatch, columns):
    lines = shown(capsys, monkeypatch, columns).splitlines()
    assert max(map(len, lines)) <= columns
    for site in site_ids():
        [line] = [line for line in lines if line.startswith(f"{site} ")]
        profile = find_site(site).profile
        if profile.gpu.per_node:
            assert profile.aliases[0] in line and f"{profile.gpu.per_node}x {profile.gpu.model}" in line
    [lumi] = [line for line in lines if line.startswith("lumi-g ")]
    assert lumi.split()[:8] == ["lumi-g", "lumi", "8x", "MI250X", "GCD", "64GB", "2,978", "1024"] and "nodes, 2d" in lumi
    assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in {a.id for a in announced()}] == [
        a.id for a in announced()]
    starts = [line.split()[0] for line in lines if line.strip()]
    assert len([s for s in starts if s in site_ids()]) == len(site_ids())


def test_the_list_marks_what_nobody_confirmed(capsys, monkeypatch):
    lines = {line.split()[0]: line for line in shown(capsys, monkeypatch, 120).splitlines() if line.strip()}
    assert "yes?" in lines["meluxina-gpu"] and "12h?" in lines["juwels-booster"] and "40GB?" in lines["vega-gpu"]
    assert " yes " in lines["lumi-g"] and " no " in lines["jupiter-booster"]


def test_the_list_says_where_one_is(capsys, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "uan03")
    lines = {line.split()[0]: line for line in shown(capsys, monkeypatch, 80).splitlines() if line.strip()}
    assert lines["lumi-g"].rstrip().endswith("here") and lines["vega-gpu"].rstrip().endswith("in use")


@pytest.mark.parametrize("site", ["lumi", "leonardo", "mn5", "jupiter", "meluxina", "discoverer", "slurm", "local"])
def test_a_site_shows_every_value_with_grade_source_and_date(capsys, monkeypatch, site):
    said, found = shown(capsys, monkeypatch, 400, site), find_site(site)
    for title, _, rows in sections(found):
        assert re.search(rf"^{title}\b", said, re.MULTILINE)
        for row in rows:
            [line] = [line for line in said.splitlines() if row.value in line and row.fact.source.name in line
                      and (row.key in line or "  " + row.value in line)][:1]
            assert row.fact.date in line and ("? unverified" in line) == (row.fact.grade == "unverified"), line
            assert row.note in said
    for key, fact in found.facts.items():
        if "." in key:
            assert as_words(key, fact.value) in said, key
            assert fact.source.title in said and fact.source.url in said
    assert said.count("? unverified") >= len(found.unverified()) > 0 or not found.unverified()
    assert str(found.files[0]) in said


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_of_a_site_fits_the_terminal(capsys, monkeypatch, columns):
    for site in site_ids():
        table, _ = shown(capsys, monkeypatch, columns, site).split("\n\n", 1)  # below it, addresses are not broken
        assert len(table.splitlines()) > len(find_site(site).facts) / 2
        assert max(map(len, table.splitlines())) <= columns, site


def test_each_value_tells_its_file(capsys, monkeypatch, tmp_path):
    centre, mine = (tmp_path / folder / "officina" / "sites" / "lumi-g.yaml" for folder in ("centre", "home"))
    for path, text in ((centre, "request: {cpus_per_gpu: 5}\nslurm: {max_jobs: 9}\n"), (mine, "request: {cpus_per_gpu: 6}\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    said = shown(capsys, monkeypatch, 120, "lumi").splitlines()
    assert any(re.search(r"cpus_per_gpu +6 +own .*\[3\]", line) for line in said)
    assert any(re.search(r"max_jobs +9 +own .*\[2\]", line) for line in said)
    assert any(re.search(r"per_node +8 +official +hardware .*\[1\]", line) for line in said)
    assert f"[2] {centre}" in said and f"[3] {mine}" in said


def test_a_file_is_shown_too(capsys, monkeypatch, tmp_path):
    (tmp_path / "my.yaml").write_text("extends: mn5\nslurm: {max_jobs: 7}\n")
    said = shown(capsys, monkeypatch, 120, "./my.yaml")
    assert re.search(r"max_jobs +7 +own .*\[2\]", said) and "[2] my.yaml" in said
    assert "own: chosen by officina, or set in a file of yours" in said


def test_words_for_values():
    assert [time_words(s) for s in (172_800, 43_200, 1_800, 5_400, 90, 0)] == ["2d", "12h", "30m", "1h30m", "1m30s", "0s"]
    assert as_words("storage.home.quota_gb", 0) == "no limit" and as_words("node.local_disk_gb", 0) == "0"
    assert as_words("partitions.a.max_time", "2-00:00:00") == "2d" and as_words("a.b", [1, 2]) == "1, 2"


@pytest.mark.parametrize("line", [line.strip() for line in cli._parser(["sites"])._subparsers._group_actions[0]
                                  .choices["sites"].epilog.splitlines() if line.strip().startswith("officina")][:2])
def test_examples_of_the_help_run(line, capsys):
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0
    assert "leonardo-booster" in (out := capsys.readouterr().out) or "LUMI-G" in out


@pytest.mark.parametrize(("words", "said"), [
    (["lumi", "mn5"], "lumi mn5: is not sites, sites NAME, sites probe [NAME] or sites new NAME. Try: officina sites lumi"),
    (["new"], "Try: officina sites new mycluster"),
    (["new", "a", "b"], "Try: officina sites new mycluster"),
    (["lummi"], "Try: site=lumi"),
    (["new", "my cluster"], "the name of a site is made of letters, digits, - and _, and is not a command's. Try: "),
    (["new", "lumi-g"], "there is such a site already"),
    (["new", "mn5"], "there is such a site already"),
    (["new", "probe"], "is not a command's"),
])
def test_words_that_mean_nothing(words, said, capsys):
    assert cli.main(["sites", *words]) == 2
    assert said in capsys.readouterr().err


# ---- pages -----------------------------------------------------------------------------------------------------------
def test_the_pages_are_as_the_profiles():
    folder = ROOT / "docs" / "sites"
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == site_pages.pages(), \
        "make them anew: python -m officina.launch.site_pages docs/sites"


def test_writing_pages_removes_those_of_sites_that_are_gone_and_nothing_else(tmp_path):
    (tmp_path / "gone.md").write_text(site_pages.pages()["lumi-g.md"])
    (tmp_path / "mine.md").write_text("x")
    site_pages.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".md"} == {"mine.md", *site_pages.pages()}
    page = (tmp_path / "lumi-g.md").read_text()
    for part in ("# LUMI-G", "`site=lumi`", "| `standard-g` |", "max_time=2d", "**? unverified**", "lumig.md", "2024-10-15"):
        assert part in page, part


# ---- reading what Slurm says -----------------------------------------------------------------------------------------
def test_what_slurm_says_is_read():
    probe = read_probe(recorded())
    got = {".".join(key): value for key, value in probe.values.items()}
    expected = {
        "slurm.version": "22.05.8", "slurm.requeue": True, "slurm.kill_on_bad_exit": True,
        "partitions.boost_usr_prod.gpus": True, "partitions.boost_usr_prod.nodes": 3,
        "partitions.boost_usr_prod.max_nodes": 128, "partitions.boost_usr_prod.max_time": "1d",
        "partitions.boost_usr_prod.default_time": "30m",
        "partitions.boost_usr_prod.whole_nodes": False,
        "partitions.boost_fat.min_nodes": 2, "partitions.boost_fat.max_time": "2d", "partitions.boost_fat.whole_nodes": True,
        "partitions.boost_fat.max_gpus": 4, "partitions.boost_fat.max_jobs": 2,  # of the qos that is the partition's own
        "partitions.lrd_all_serial.gpus": False, "partitions.lrd_all_serial.max_time": "4h",
        "node.arch": "x86_64", "node.cores": 32, "node.threads_per_core": 1, "node.slurm_memory_mb": 514_000, "gpu.per_node": 4,
        "qos.boost_qos_dbg.max_time": "30m", "qos.boost_qos_dbg.max_nodes": 2, "qos.boost_qos_dbg.max_running": 2,
        "qos.boost_qos_dbg.max_jobs": 4, "qos.boost_qos_bprod.min_nodes": 65, "qos.boost_qos_lprod.max_gpus": 32}
    assert {key: got.get(key) for key in expected} == expected
    assert not [key for key in got if key.startswith(("partitions.old", "qos.normal"))], "down, and without limits"
    assert probe.gpu_partitions == ["boost_usr_prod", "boost_fat"] and probe.other_partitions == ["lrd_all_serial", "lrd_viz"]
    assert probe.remarks == ["not up, so left out: old"] and probe.cluster == "officina"


@pytest.mark.parametrize(("gres", "gpus"), [
    ("gpu:4", 4), ("gpu:mi250:8(S:0-7)", 8), ("gpu:gh200:4(S:0-3),tmpfs:100", 4),
    ("tmpfs:10,gpu:a100:2,gpu:a100_1g.5gb:14", 16), ("(null)", 0), ("craynetwork:4", 0), ("gpumem:80", 0)])
def test_gpus_of_a_node(gres, gpus):
    node = (f"NodeName=x Arch=aarch64 CoresPerSocket=72 Gres={gres} OS=Linux 5.14 #1 SMP  Sockets=4 CoreSpecCount=8 "
            "Partitions=p \n")
    probe = read_probe(recorded(node=node, partition="PartitionName=p State=UP TotalNodes=1\n", sinfo="", qos=""))
    assert probe.values.get(("gpu", "per_node"), 0) == gpus
    assert (probe.values["node", "cores"], probe.values["node", "arch"]) == (280, "aarch64")


@pytest.mark.parametrize(("said", "whole"), [
    ("OverSubscribe=EXCLUSIVE", True), ("OverSubscribe=NO Exclusive=NODE", True), ("OverSubscribe=NO Exclusive=NO", False),
    ("OverSubscribe=FORCE:4", False), ("", None)])
def test_whole_nodes_in_old_and_new_words(said, whole):
    probe = read_probe(recorded(partition=f"PartitionName=p MinNodes=0 {said} State=UP TotalNodes=1\n", qos=""))
    assert probe.values.get(("partitions", "p", "whole_nodes")) is whole


def test_nodes_that_are_hidden_or_differ():
    hidden = read_probe(recorded(node=""))
    assert hidden.gpu_partitions == ["boost_usr_prod", "boost_fat"] and ("gpu", "per_node") not in hidden.values
    nodes = (SAYS / "node.txt").read_text().replace("RealMemory=514000", "RealMemory=257000", 1)
    probe = read_probe(recorded(node=nodes))
    assert probe.values["node", "slurm_memory_mb"] == 514_000
    assert "nodes of boost_usr_prod differ; this is the shape of 2 of 3" in probe.remarks


# ---- against a profile -----------------------------------------------------------------------------------------------
def test_the_difference_is_a_profile_that_takes_it_away(tmp_path):
    probe, site = read_probe(recorded()), find_site("leonardo")
    text, n = difference(site, probe, "login01")
    assert "    max_nodes: 128  # was 64 (copy, autumn 2026)\n" in text
    assert "    max_nodes: 2  # was 8 (copy, autumn 2026)\n" in text
    assert "# Partitions without GPUs, not in the profile: lrd_viz" in text
    assert "slurm_memory_mb" not in text and "max_time: 1d" not in text, "24h and 1d are the same"
    laid = read_text(tmp_path, text)
    assert laid.id == "leonardo-booster" and laid.profile.partitions["boost_usr_prod"].max_nodes == 128
    assert laid.profile.gpu.model == "A100-SXM-64GB", "what Slurm does not know stays"
    fact = laid.facts["partitions.boost_usr_prod.max_nodes"]
    assert (fact.grade, fact.source.title) == ("official", "officina sites probe on login01, cluster officina")
    again, none = difference(laid, probe, "login01")
    assert n > 15 and none == 0 and "# Nothing differs" in again
    assert read_text(tmp_path, again).profile == find_site("leonardo").profile


def test_partitions_and_qos_that_are_gone_or_empty(tmp_path):
    probe = read_probe(recorded(partition="PartitionName=boost_usr_prod State=UP TotalNodes=3 MaxTime=1-00:00:00\n"))
    text, _ = difference(find_site("leonardo"), probe, "login01")
    assert "  lrd_all_serial: null  # Slurm knows no such partition that is up" in text
    assert "lrd_all_serial" not in read_text(tmp_path, text).profile.partitions
    assert "qos_special" in text and "qos_named_only" not in text, "a qos that limits neither time nor size is left out"


def test_every_shipped_profile_takes_a_difference(tmp_path):
    probe = read_probe(recorded())
    for site in site_ids():
        text, _ = difference(find_site(site), probe, "login01")
        assert difference(read_text(tmp_path, text), probe, "login01")[1] == 0, site


def test_a_new_profile_is_read_and_right(tmp_path):
    text = new_profile("attic", read_probe(recorded()), "login01.attic.org")
    site = read_text(tmp_path, text)
    profile = site.profile
    assert (profile.name, profile.hosts, profile.gpu.per_node, profile.request.gpus) == ("attic", ["login*"], 4, "gres")
    assert (profile.request.cpus_per_gpu, profile.queues.train.partition) == (8, "boost_usr_prod")
    assert profile.queues.data.partition == "lrd_all_serial" and profile.rendezvous.address == "{host}"
    assert difference(site, read_probe(recorded()), "login01")[1] == 0
    alone = new_profile("no", read_probe(recorded(node="", sinfo="", qos="")), "head")
    assert read_text(tmp_path, alone).profile.request.gpus == "none"
    assert 'name: "no"' in alone and "hosts: {value: [head]" in alone


# ---- asking ----------------------------------------------------------------------------------------------------------
def programs(folder: Path, **bodies: str) -> dict[str, str]:
    """An environment in which only these programs exist."""
    folder.mkdir(exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


@pytest.fixture
def slurm_here(tmp_path, monkeypatch):
    """scontrol, sinfo and sacctmgr that say what was recorded."""
    def say(file: str) -> str:
        return f'while IFS= read -r line; do echo "$line"; done <{SAYS}/{file}.txt'

    environ = programs(tmp_path / "bin", sinfo=say("sinfo"), scontrol=(
        'case "$*" in "show config") file=config;; *"show partition") file=partition;; *) file=node;; esac\n' + say("$file")),
        sacctmgr='echo "sacctmgr: error: no accounting here" >&2; exit 1')
    monkeypatch.setenv("PATH", environ["PATH"])


def test_probe_and_new_on_the_command_line(slurm_here, capsys, tmp_path):
    assert cli.main(["sites", "probe", "leonardo"]) == 0
    said = capsys.readouterr()
    assert "# Not known: limits of QOS, for sacctmgr fails: sacctmgr: error: no accounting here" in said.out
    assert "max_nodes: 128" in said.out
    assert re.search(r"[0-9]+ differences to the profile leonardo-booster. Keep them: officina sites probe leonardo-booster "
                     r">my.yaml, then site=./my.yaml", said.err)
    assert cli.main(["sites", "new", "attic"]) == 0
    assert "Look at it: officina sites attic" in capsys.readouterr().out
    assert find_site("attic").profile.gpu.per_node == 4
    assert cli.main(["sites", "probe", "attic"]) == 0
    assert "0 differences to the profile attic. It is as the machine says" in capsys.readouterr().err
    assert cli.main(["sites", "new", "attic"]) == 2
    assert "there is such a site already" in capsys.readouterr().err


def test_probe_finds_the_site_by_the_host(slurm_here, capsys, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "lrdn0042")
    assert cli.main(["sites", "probe"]) == 0
    assert "extends: leonardo-booster" in capsys.readouterr().out


def test_a_host_without_slurm(tmp_path, monkeypatch):
    with pytest.raises(LaunchError, match="scontrol show config: there is no such program here. "
                       "Run the same command of officina on a login node of the cluster$"):
        ask_slurm({"PATH": str(tmp_path)})
    environ = programs(tmp_path / "bin", scontrol="echo 'error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(LaunchError, match="Unable to contact slurm controller"):
        ask_slurm(environ)
    monkeypatch.setattr(site_probe, "_TIMEOUT_S", 0.2)
    environ = programs(tmp_path / "bin", scontrol="read forever </dev/zero")
    with pytest.raises(LaunchError, match=r"scontrol show config: did not answer in 0.2 s"):
        ask_slurm(environ)


def test_a_profile_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(site_commands, "ask_slurm", lambda environ: site_probe.Probe("c", {}, [], ["cpu"], []))
    (tmp_path / "officina").write_text("a file where a folder would be")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert cli.main(["sites", "new", "attic"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/officina" in said and "Try" not in said and "export XDG_CONFIG_HOME=DIR" in said


@pytest.mark.slurm
def test_probe_and_new_on_a_real_slurm(slurm_cluster: SlurmCluster, tmp_path: Path):
    environ = slurm_cluster.environ | {"XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": ""}
    officina = str(Path(sys.executable).with_name("officina"))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return slurm_cluster.run(officina, "sites", *words, env=environ)

    probed = run("probe", "slurm")
    assert probed.returncode == 0, probed.stderr
    text = (tmp_path / "my.yaml")
    text.write_text(probed.stdout)
    test = find_site(str(text), environ).profile.partitions["test"]
    assert (test.nodes, test.max_time, test.gpus) == (4, 3600.0, False)
    assert "# Not known: limits of QOS, for sacctmgr fails: " in probed.stdout, "there is no accounting here, and that is said"
    assert "A profile of this cluster: officina sites new NAME" in probed.stderr
    assert run("new", "here").returncode == 0
    site = find_site("here", environ)
    assert (site.profile.node.cores, site.profile.node.slurm_memory_mb, site.profile.request.gpus) == (4, 4000, "none")
    assert site.profile.queues.data.partition == "test" and site.facts["node.cores"].grade == "official"
    again = run("probe", "here")
    assert again.returncode == 0 and "0 differences" in again.stderr, again.stdout
    assert "test" in run("here").stdout
    assert "A profile of this cluster" not in again.stderr
