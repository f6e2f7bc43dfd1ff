"""Site profiles: what is shipped, how files lie over each other, what a mistake in one says."""

import datetime
import re
from pathlib import Path

import pytest
import yaml

from officina.configs.compose import compose, compose_all, recompose
from officina.configs.site_profile import SiteProfile
from officina.configs.sites import FOLDER, GRADES, IDENTITY, announced, detect_site, find_site, site_ids
from officina.trainer.errors import ConfigError

SYSTEMS = ["deucalion-a100", "discoverer-plus", "juwels-booster", "jupiter-booster", "karolina-gpu", "leonardo-booster",
           "lumi-g", "marenostrum5-acc", "meluxina-gpu", "vega-gpu"]
NOBODY = {"XDG_CONFIG_HOME": "/nowhere", "XDG_CONFIG_DIRS": ""}


def shipped(word: str):
    return find_site(word, NOBODY)


def lay(folder: Path, name: str, text: str) -> Path:
    """Put a profile where a centre or a person keeps theirs."""
    path = folder / "officina" / "sites" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---- what is shipped ---------------------------------------------------------------------------------------------
def test_every_system_is_there():
    assert set(SYSTEMS) | {"slurm", "local"} == {path.stem for path in FOLDER.glob("*.yaml")}
    assert site_ids(NOBODY) == [*sorted(SYSTEMS), "slurm", "local"]


@pytest.mark.parametrize("site", SYSTEMS)
def test_every_value_has_a_grade_a_source_and_a_date(site):
    facts = shipped(site).facts
    assert len(facts) > 25
    for key, fact in facts.items():
        if key.split(".")[0] in IDENTITY:
            continue
        assert fact.grade in set(GRADES) - {"own"}, key
        assert fact.source.title and re.search(r"20[0-9]{2}", fact.date), key
        assert fact.file == FOLDER / f"{site}.yaml"
        assert fact.source.url.startswith("https://") or fact.grade != "official", f"{key}: an official page has an address"


@pytest.mark.parametrize("site", SYSTEMS)
def test_what_a_job_needs_is_known(site):
    profile = shipped(site).profile
    assert profile.gpu.per_node and profile.gpu.memory_gb and profile.node.cores and profile.node.arch
    assert profile.request.gpus and profile.request.cpus_per_gpu
    threads = profile.node.cores * (profile.node.threads_per_core or 1)
    assert profile.request.cpus_per_gpu * profile.gpu.per_node <= threads
    for queue in (profile.queues.train, profile.queues.debug, profile.queues.data):
        assert not queue.partition or queue.partition in profile.partitions
        assert not queue.qos or queue.qos in profile.qos
    assert profile.queues.train.partition or profile.queues.train.qos
    for name, qos in profile.qos.items():
        assert not qos.partition or qos.partition in profile.partitions, name
    binding = profile.binding
    for rank_list in (binding.cpu_masks, binding.rank_cores, binding.rank_numa, binding.rank_gpu_numa, binding.rank_nics):
        assert len(rank_list) in (0, profile.gpu.per_node)
    re.compile(profile.request.account_pattern)
    assert not set(profile.env.set) & set(profile.env.forbid)
    assert not set(profile.request.requires) & set(profile.request.forbids)


def test_the_facts_that_jobs_hang_on():
    """Figures of the sites' own pages, typed here a second time."""
    got = {site: shipped(site).profile for site in SYSTEMS}
    hours = {site: {name: limits.max_time / 3600 for name, limits in [*p.partitions.items(), *p.qos.items()] if limits.max_time}
             for site, p in got.items()}
    assert hours["lumi-g"]["standard-g"] == 48 and hours["lumi-g"]["small-g"] == 72 and hours["lumi-g"]["dev-g"] == 3
    assert hours["leonardo-booster"] == {"boost_usr_prod": 24, "lrd_all_serial": 4, "boost_qos_dbg": 0.5, "boost_qos_bprod": 24,
                                         "boost_qos_lprod": 96}
    assert hours["marenostrum5-acc"]["acc_ehpc"] == 72 and hours["jupiter-booster"]["booster"] == 12
    assert hours["discoverer-plus"]["{account}"] == 4 and hours["meluxina-gpu"]["long"] == 144
    assert {s: p.gpu.per_node for s, p in got.items() if p.gpu.per_node != 4} == {
        "lumi-g": 8, "karolina-gpu": 8, "discoverer-plus": 8}
    assert {s for s, p in got.items() if p.node.arch == "aarch64"} == {"jupiter-booster"}
    assert {s for s, p in got.items() if p.internet.compute is False} == {
        "leonardo-booster", "marenostrum5-acc", "jupiter-booster", "karolina-gpu", "deucalion-a100"}
    assert [got["lumi-g"].billing.per_node_hour, got["leonardo-booster"].billing.per_node_hour,
            got["marenostrum5-acc"].billing.per_node_hour, got["jupiter-booster"].billing.per_node_hour] == [4, 32, 80, 288]
    assert got["leonardo-booster"].qos["boost_qos_bprod"].min_nodes == 65
    assert "NCCL_NET_GDR_LEVEL" in got["lumi-g"].env.forbid
    assert got["juwels-booster"].rendezvous.address == "{host}i"
    assert got["marenostrum5-acc"].env.set["NCCL_IB_HCA"] == "mlx5_0,mlx5_1,mlx5_4,mlx5_5"


def test_the_masks_of_lumi_are_seven_cores_each_and_leave_the_reserved_ones():
    masks = [int(mask, 16) for mask in shipped("lumi").profile.binding.cpu_masks]
    reserved = sum(1 << core for core in range(0, 64, 8))
    assert [bin(mask).count("1") for mask in masks] == [7] * 8
    assert sum(masks) == (1 << 64) - 1 - reserved, "together all cores but the reserved, none twice"
    first_cores = [(mask & -mask).bit_length() - 1 for mask in masks]
    assert first_cores == [49, 57, 17, 25, 1, 9, 33, 41], "the one-core form of the LUMI user guide"


def test_aliases_and_hosts_belong_to_one_site():
    aliases = [a for site in site_ids(NOBODY) for a in (site, *shipped(site).profile.aliases)]
    assert len(aliases) == len(set(aliases))
    for alias, site in [("lumi", "lumi-g"), ("leonardo", "leonardo-booster"), ("mn5", "marenostrum5-acc"),
                        ("jupiter", "jupiter-booster"), ("meluxina", "meluxina-gpu"), ("juwels", "juwels-booster")]:
        assert shipped(alias).id == site
    for host, site in [("nid005124", "lumi-g"), ("uan01", "lumi-g"), ("lrdn1234.leonardo.local", "leonardo-booster"),
                       ("alogin2", "marenostrum5-acc"), ("jpbo-003-17", "jupiter-booster"), ("mel2042", "meluxina-gpu"),
                       ("acn01", "karolina-gpu"), ("gnx517", "deucalion-a100"), ("gn12", "vega-gpu")]:
        assert detect_site(host, NOBODY) == site
    for host in ("laptop", "login01", "asus-laptop", "n1", "cn01"):
        assert detect_site(host, NOBODY) is None


def test_announced_systems_are_no_sites():
    assert {a.id for a in announced()} == {"lumi-ai", "meluxina-ai", "hammerhai", "it4lia", "alice-recoque"}
    assert all(a.grade == "third_party" and a.source and a.date for a in announced())
    with pytest.raises(ConfigError, match=r"site=lumi-ai: is announced, not in service \(expected: second half of 2027\)"):
        shipped("lumi-ai")


# ---- in a run --------------------------------------------------------------------------------------------------------
def test_a_run_keeps_the_name_only():
    run = compose(["site=mn5", "site.account=ehpc01", "site.grace=2m"])
    assert (run.site.name, run.site.account, run.site.grace) == ("marenostrum5-acc", "ehpc01", 120.0)
    assert compose([]).site.name == "local"
    assert recompose(run, ["site=leonardo"]).run.site == compose(
        ["site=leonardo", "site.account=ehpc01", "site.grace=2m"]).site


def test_the_site_as_it_was_chosen_is_told(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: lumi\n")
    composed = compose_all([f"site={path}"], NOBODY)
    assert (composed.run.site.name, composed.site, composed.problems) == ("lumi-g", str(path), [])


def test_a_site_among_a_persons_defaults(tmp_path):
    (tmp_path / "officina").mkdir()
    (tmp_path / "officina" / "me.yaml").write_text("site: lumi\n")
    composed = compose_all([], {"XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": ""})
    assert composed.run.site.name == "lumi-g" and composed.defaults == [("site=lumi", str(tmp_path / "officina" / "me.yaml"))]


@pytest.mark.parametrize(("word", "said"), [
    ("lummi", "there is no such site; there are deucalion-a100, "), ("lummi", "Try: site=lumi"),
    ("./nowhere.yaml", "there is no such file"), ("it4lia", "is announced, not in service")])
def test_a_site_that_is_none(word, said):
    [problem] = compose_all([f"site={word}"], NOBODY).problems
    assert problem.key == "site" and said in str(problem)


def test_a_faulty_profile_is_a_problem_of_the_run(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: lumi\ngpu: {per_node: many}\nnode: {corse: 3}\n")
    problems = {p.key: p for p in compose_all([f"site={path}"], NOBODY).problems}
    assert set(problems) == {"gpu.per_node", "node.corse"}
    assert problems["node.corse"].remedy == "node.cores" and f"site={path}" in problems["gpu.per_node"].rule


# ---- files over each other -------------------------------------------------------------------------------------------
def test_the_person_stands_over_the_centre_and_both_over_the_package(tmp_path):
    centre = lay(tmp_path / "centre", "lumi-g", "partitions: {standard-g: {max_nodes: 512, max_time: 1d}}\n")
    person = lay(tmp_path / "person", "lumi", "partitions: {standard-g: {max_nodes: 8}}\n")  # named by the alias
    site = find_site("lumi", {"XDG_CONFIG_HOME": str(tmp_path / "person"), "XDG_CONFIG_DIRS": str(tmp_path / "centre")})
    partition = site.profile.partitions["standard-g"]
    assert (partition.max_nodes, partition.max_time, partition.max_jobs) == (8, 86400, 210)
    origin = {name: site.facts[f"partitions.standard-g.{name}"] for name in ("max_nodes", "max_time", "max_jobs")}
    assert [fact.file for fact in origin.values()] == [person, centre, FOLDER / "lumi-g.yaml"]
    assert [fact.grade for fact in origin.values()] == ["own", "own", "official"]
    assert site.files == (FOLDER / "lumi-g.yaml", centre, person) and site.id == "lumi-g"


def test_null_takes_away_what_a_lower_file_says(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: lumi\npartitions: {bench: null}\nenv: {set: {FI_MR_CACHE_MONITOR: null}, forbid: null}\n")
    site = find_site(str(path), NOBODY)
    assert "bench" not in site.profile.partitions and "standard-g" in site.profile.partitions
    assert list(site.profile.env.set) == ["NCCL_SOCKET_IFNAME"] and site.profile.env.forbid == {}
    assert not [key for key in site.facts if "bench" in key or "forbid" in key]


def test_a_new_site_of_ones_own(tmp_path):
    lay(tmp_path, "attic", "extends: slurm\nname: The attic\naliases: [roof]\nhosts: ['attic*']\n"
        "sources: {me: {grade: official, date: 2026-11-24, title: I built it}}\n"
        "gpu: {source: me, per_node: 2, note: fans are loud}\n"
        "node: {cores: {value: 16, grade: unverified, note: not counted}}\n")
    mine = {"XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": ""}
    site = find_site("roof", mine)
    assert (site.id, site.profile.gpu.per_node, site.profile.request.gpus) == ("attic", 2, "gres")
    assert site.facts["gpu.per_node"].date == "2026-11-24" and site.notes["gpu"] == "fans are loud"
    assert site.unverified() == ["node.cores"] and site.facts["node.cores"].note == "not counted"
    assert detect_site("attic7.example.org", mine) == "attic" and "attic" in site_ids(mine)
    assert compose_all(["site=roof"], mine).run.site.name == "attic"


def test_a_source_that_is_named_further_in_brings_its_own_grade_and_date(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: X\nsources:\n  a: {grade: copy, date: 2026-01, title: A}\n"
                    "  b: {grade: official, date: 2026-02, title: B}\n"
                    "node: {source: a, grade: unverified, date: 2025, cores: 1, cpu: {value: Z80, source: b}}\n")
    facts = find_site(str(path), NOBODY).facts
    assert [(f.grade, f.date, f.source.name) for f in (facts["node.cores"], facts["node.cpu"])] == [
        ("unverified", "2025", "a"), ("official", "2026-02", "b")]


def test_dates_and_durations_are_read_as_people_write_them(tmp_path):
    assert yaml.safe_load("a: 2026-11-24")["a"] == datetime.date(2026, 11, 24), "the trap: YAML makes dates"
    path = tmp_path / "mine.yaml"
    path.write_text("extends: slurm\npartitions: {a: {max_time: 12:30:00}, b: {max_time: 2-00:00:00}, c: {max_time: 90m}}\n")
    partitions = find_site(str(path), NOBODY).profile.partitions
    assert [p.max_time for p in partitions.values()] == [45_000, 172_800, 5_400]


@pytest.mark.parametrize(("text", "said"), [
    ("gpu: [", "cannot be read"),
    ("- a\n", "must hold keys and values"),
    ("extends: nowhere\n", "there is no such site"),
    ("name: X\ngpu: {per_node: 4.5}\n", "gpu.per_node=4.5: 4.5 is 4.5, not a whole number"),
    ("name: X\ngpu: {vendor: intel}\n", "'nvidia' or 'amd'"),
    ("name: X\ngpu: 4\n", "gpu=4: input should be a dictionary or an instance of Gpu"),
    ("name: X\nenv: {set: {A: 1}}\n", 'Try: env.set.A: "1"'),
    ("name: X\nqos: {a: {max_time: soon}}\n", "a time is written 90s"),
    ("name: X\npartitons: {a: {nodes: 1}}\n", "Try: partitions"),
    ("name: X\nnode: {cores: {value: 1, source: me}}\n", "is not among the sources of the file: there are none"),
    ("name: X\nnode: {cores: {value: 1, grade: sure}}\n", "must be one of official, copy"),
    ("name: X\nnode: {cores: {value: 1, wert: 2}}\n", "there is no such key beside value"),
    ("name: X\nnode: {note: large, and: loud}\n", "node.and=loud: there is no such key"),
    ("name: X\nnode: {cpu: fast, quick}\n", "node.quick: there is no such key"),
    ("name: X\nsources: {me: {grade: official, title: a page}}\nnode: {source: me, cores: 1}\n", "needs grade"),
    ("gpu: {per_node: 1}\n", "name: is required. Try: name: My cluster"),
    ("name: X\nbilling: {per_node_hour: -4}\n", "billing.per_node_hour=-4: input should be greater than or equal to 0"),
    ("name: X\nspeed: {tflops_per_gpu: .nan}\n", "speed.tflops_per_gpu=nan: input should be a finite number"),
    ("name: X\nbinding: {rank_cores: [0-3, b-9]}\n", "is no range of cores, such as 72-143"),
    ("name: X\nbinding: {rank_cores: [3-0]}\n", "is no range of cores, such as 72-143"),
    ("name: X\nrequest: {account_pattern: '(('}\n", "is no regular expression: missing ), unterminated subpattern"),
])
def test_what_a_mistake_says(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_site(str(path), NOBODY)
    assert said in str(caught.value) and "mine.yaml" in str(caught.value) and "Try: " in str(caught.value)


@pytest.mark.parametrize("text", ["hosts: 5\n", "hosts: attic*\n", "aliases: 5\n", "aliases: {a: b}\n", "hosts: null\n"])
def test_hosts_and_aliases_that_are_no_lists_hide_no_other_site(tmp_path, text):
    """A plain text was taken for the list of its letters: `*` was every host."""
    lay(tmp_path, "attic", "extends: slurm\n" + text)
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": ""}
    assert detect_site("uan01", environ) == "lumi-g" and find_site("leonardo", environ).id == "leonardo-booster"
    assert detect_site("elsewhere", environ) is None
    assert detect_site("attic1", environ) == ("attic" if "attic" in text else None), "so that its fault is told"


def test_files_that_extend_each_other(tmp_path):
    lay(tmp_path, "a", "extends: b\n")
    lay(tmp_path, "b", "extends: a\n")
    with pytest.raises(ConfigError, match="goes round in a circle, a -> b -> a"):
        find_site("a", {"XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": ""})


def test_a_packaged_value_without_a_source_is_refused(tmp_path, monkeypatch):
    from officina.configs import sites

    path = tmp_path / "x.yaml"
    path.write_text("name: X\ngpu: {per_node: 4}\n")
    monkeypatch.setattr(sites, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match="gpu.per_node=4: has no source"):
        find_site("x", NOBODY)


def test_every_field_of_a_profile_is_used_by_a_site():
    """A field that no shipped profile fills is one that nobody needs."""
    from officina.trainer.keys import fields_of, item_type, variants_of

    def declared(cls, prefix=""):
        for name, annotation in fields_of(cls).items():
            item = item_type(annotation)
            inner = variants_of(item) if item else variants_of(annotation)
            star = ".*" if item else ""
            yield from declared(inner[0], f"{prefix}{name}{star}.") if inner else [f"{prefix}{name}{star}"]

    def general(key):
        parts = key.split(".")
        at = 1 if parts[0] in ("partitions", "qos", "storage", "remarks") else 2 if parts[:2] in (
            ["env", "set"], ["env", "offer"], ["env", "forbid"]) else None
        return ".".join("*" if i == at else part for i, part in enumerate(parts))

    used = {general(key) for site in site_ids(NOBODY) for key in shipped(site).facts}
    assert set(declared(SiteProfile)) == used
