"""The scripts: golden files for every site and mode, sound shell, and directives that keep the profile's rules."""

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from officina.configs.sites import find_site
from officina.launch.render import directives
from officina.trainer.quantities import parse_duration_s
from tests.launch.submit_cases import ACCOUNTS, NOBODY, SITES, cases, prepared, words

GOLDEN = Path(__file__).parent / "sbatch"
CASES = cases()
NAMES = [f"{site}-{mode}" for site, mode, _ in CASES]


@pytest.fixture(scope="module", autouse=True)
def a_person(project):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "WORK", "FAST", "CINECA_SCRATCH", "PUBLIC"):
            patch.delenv(name, raising=False)
        yield


@cache
def text_of(given: tuple[str, ...], project: Path) -> str:
    found = prepared(*given)
    assert not found.problems, "\n".join(map(str, found.problems))
    return found.text.replace(str(project), "/project/mine")


@pytest.mark.parametrize(("site", "mode", "given"), CASES, ids=NAMES)
def test_scripts_are_as_they_were_looked_at(site, mode, given, project):
    """To renew the files after a change that is wanted: OFFICINA_WRITE_GOLDEN=1, and read the diff."""
    text, file = text_of(tuple(given), project), GOLDEN / f"{site}-{mode}.sbatch"
    if os.environ.get("OFFICINA_WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_no_golden_file_is_left_over():
    assert sorted(NAMES) == sorted(path.stem for path in GOLDEN.glob("*.sbatch"))


def test_scripts_are_sound_shell():
    files = sorted(map(str, GOLDEN.glob("*.sbatch")))
    assert len(files) == len(CASES) > 50
    for file in files:
        done = subprocess.run(["bash", "-n", file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("CI"), "CI needs shellcheck (apt-get install shellcheck)"
        pytest.skip("no shellcheck here (apt-get install shellcheck)")
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("site", "mode", "given"), CASES, ids=NAMES)
def test_directives_keep_the_rules_of_the_profile(site, mode, given, project):
    """Read from the text as Slurm would, and judged by the profile alone."""
    profile = find_site(site, NOBODY).profile
    text = text_of(tuple(given), project)
    lines = text.splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    found = {}
    for i, line in enumerate(lines):
        if match := re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line):
            assert i < first_command, f"Slurm does not read {line}: it stands after a command"
            assert match[1] not in found, f"{match[1]} twice"
            found[match[1]] = match[2]
    assert not [line for line in lines if line.startswith("#SBATCH") and not re.fullmatch(r"#SBATCH --[a-z-]+(=\S.*)?", line)]

    rules = profile.request
    assert set(rules.requires) <= set(found), "mandatory"
    assert not set(rules.forbids) & set(found), "forbidden"
    assert found.get("account", "") == ACCOUNTS[site]
    nodes, tasks = int(found["nodes"]), int(found["ntasks-per-node"])
    seconds = parse_duration_s(found["time"])
    for limits in (profile.partitions.get(found.get("partition")), profile.qos.get(found.get("qos"))):
        if limits:
            assert (limits.gpus is not False) == (mode != "data")
            assert (limits.min_nodes or 1) <= nodes <= (limits.max_nodes or nodes)
            assert seconds <= (limits.max_time or seconds)
    assert "partition" in found or "qos" in found

    assert found["open-mode"] == "append"
    if mode == "data":
        assert not {"gres", "gpus", "gpus-per-node", "gpus-per-task", "signal"} & set(found) and "no-requeue" in found
        assert lines[-1].startswith("exec ") and lines[-1].endswith("data build corpus texts --licence MIT")
        return
    per_node = 2 if mode == "part-of-a-node" else profile.gpu.per_node
    asked = {"gres": lambda v: int(v.rpartition(":")[2]), "gpus-per-node": int, "gpus": lambda v: int(v) // nodes,
             "gpus-per-task": lambda v: int(v) * tasks}
    ways = [name for name in asked if name in found]
    assert ways == [rules.gpus.replace("_", "-")], "GPUs are asked for in the site's one way"
    assert asked[ways[0]](found[ways[0]]) == per_node
    assert tasks == (1 if "launcher=torchrun" in given else per_node)
    cpus = tasks * int(found["cpus-per-task"])
    assert cpus == rules.cpus_per_gpu * per_node <= profile.node.cores * (profile.node.threads_per_core or 1)
    assert ("exclusive" in found) == (rules.exclusive == "always" or (rules.exclusive == "several_nodes" and nodes > 1))
    assert found["signal"] == "B:USR1@300"

    for name, value in profile.env.set.items():
        assert re.search(rf"^export {name}=['\"]?{re.escape(value)}", text, re.MULTILINE), name
    for name in profile.env.forbid:
        assert not re.search(rf"^\s*export.*\b{name}=", text, re.MULTILINE)
        assert f"unset {name}" in lines, "a variable known to be bad does not come from the login shell either"
    assert ("HF_HUB_OFFLINE=1" in text) == (profile.internet.compute is not True)
    assert ("mask_cpu" in text) == (bool(profile.binding.cpu_masks or profile.binding.rank_cores)
                                    and "launcher=torchrun" not in given and per_node == profile.gpu.per_node
                                    and "launcher=mpirun" not in given)
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in lines and "ulimit -c 0" in lines
    assert "localhost" not in text
    if nodes > 1:
        assert "127.0.0.1" not in text and "|| stop" in text[text.index("first="):]


def test_meeting_points_follow_the_site(project):
    def address(site, *more):
        return re.search(r"^(?:export )?MASTER_ADDR=(.*)$", text_of(tuple(words(site, *more)), project), re.MULTILINE)[1]

    assert address("jupiter-booster", "nodes=2").startswith('$(getent ahostsv4 "$first-interconnect-1.jupiter.internal"')
    assert address("juwels-booster", "nodes=2").startswith('$(getent ahostsv4 "${first}i"')
    assert address("leonardo-booster", "nodes=2").startswith('$(getent ahostsv4 "$first"')
    assert address("lumi-g", "nodes=2") == "$first"
    assert address("jupiter-booster", "nodes=1") == "127.0.0.1"


def test_masks_are_those_of_the_ranks(project):
    text = text_of(tuple(words("jupiter-booster", "nodes=1")), project)
    masks = re.search(r"mask_cpu:(\S+)", text)[1].split(",")
    cores = [{i for i in range(288) if int(mask, 16) >> i & 1} for mask in masks]
    assert [(min(c), max(c), len(c)) for c in cores] == [(0, 71, 72), (72, 143, 72), (144, 215, 72), (216, 287, 72)]
    lumi = re.search(r"mask_cpu:(\S+)", text_of(tuple(words("lumi-g", "nodes=1")), project))[1].split(",")
    assert len(lumi) == 8 and sum(bin(int(m, 16)).count("1") for m in lumi) == 56


@pytest.mark.parametrize("site", [site for site in SITES if find_site(site, NOBODY).profile.container.runtime])
def test_an_image_sees_gpus_and_caches(site, project):
    """Of NVIDIA's the driver is the host's, and comes in by a flag only; AMD's devices are seen without."""
    text = prepared(*words(site, "container=images/officina.sif")).text
    assert " cache=/tmp/officina-" in text, "what else is on the node, an image does not see"
    assert (" exec --nv " in text) == (find_site(site, NOBODY).profile.gpu.vendor == "nvidia")


def test_text_of_users_stays_one_word(project):
    """What is typed reaches the shell as text, whatever is in it."""
    nasty = "a b'; $(touch gone) `id` \"#"
    found = prepared(*words("leonardo-booster", "nodes=2", f"env.extra.WANDB_NOTES={nasty}"))
    text = found.text
    line = next(line for line in text.splitlines() if line.startswith("export WANDB_NOTES="))
    shown = subprocess.run(["bash", "-c", f'{line}; printf %s "$WANDB_NOTES"'], capture_output=True, text=True, check=True)
    assert shown.stdout == nasty and not (project / "gone").exists()
    assert all(line.startswith("#") for line in text.split("\n\n")[0].splitlines()), "the words stay within comments"


def test_options_are_said_once_with_a_reason():
    found = list(directives(prepared(*words("leonardo-booster", "nodes=2", "jobs=2")).script))
    assert len({option for option, _, _ in found}) == len(found)
    assert {option for option, _, why in found if why} >= {"signal", "open-mode", "requeue", "dependency"}


def test_folders_and_words_are_taken_as_they_are():
    """Slurm replaces %j in the names of outputs, and the shell would part what has a space."""
    given = words("leonardo-booster", "cpu_bind=map_cpu:0,8;16")
    text = prepared(*given, runs_dir="100%j").text
    assert "/100%%j/mine/logs/slurm-%j.out" in text and "/100%j/mine\n" in text
    assert "--cpu-bind='map_cpu:0,8;16'" in text
    array = prepared(*words("leonardo-booster", "seed=1,2"), runs_dir="100%a").text
    assert "/100%%a/mine-%a/logs/slurm-%A_%a.out" in array
