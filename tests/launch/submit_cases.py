"""Submissions for the tests: every site in every mode, with accounts that look like the site's."""

from pathlib import Path

from data_sets import tokenizer_info, write_tokens

from officina.launch.submit import Prepared, prepare

NOBODY = {"XDG_CONFIG_HOME": "/nowhere", "XDG_CONFIG_DIRS": "", "HOME": "/home/user", "USER": "user"}
ACCOUNTS = {
    "lumi-g": "project_465000000", "leonardo-booster": "IscrX_officina", "marenostrum5-acc": "ehpc00",
    "jupiter-booster": "officina", "juwels-booster": "officina", "meluxina-gpu": "p200000", "karolina-gpu": "OPEN-00-00",
    "vega-gpu": "", "deucalion-a100": "f00000g", "discoverer-plus": "officina"}
SITES = sorted(ACCOUNTS)
MODES = {
    "srun": ["nodes=2"],
    "torchrun": ["nodes=2", "launcher=torchrun"],
    "mpirun": ["nodes=2", "launcher=mpirun"],
    "image": ["nodes=2", "container=images/officina.sif"],
    "zero": ["nodes=2", "engine=zero2", "launcher=torchrun", "container=images/officina.sif"],
    "chain": ["nodes=1", "jobs=3", "env.extra.NCCL_DEBUG=INFO", "slurm.extra=[--mail-type=END]", "prologue=[nvidia-smi -L]"],
}
EXTRA = {"pyxis": ("deucalion-a100", ["nodes=2", "container=images/officina.sqsh"]),
         "sweep": ("leonardo-booster", ["nodes=2", "optim.lr=1e-3,1e-4", "seed=range(0,2)", "at_once=2", "requeue=true"]),
         "part-of-a-node": ("lumi-g", ["nodes=2", "gpus=2", "partition=small-g"])}
NOT_THERE = {("jupiter-booster", "mpirun"), ("juwels-booster", "image"), ("juwels-booster", "zero")}
"""Modes that a site refuses, or of which nothing is known."""
RUN = ["name=mine", "model=tiny", "engine=fsdp2", "batch.global_tokens=65536", "batch.seq_len=256", "steps=1000",
       "data.sources.text.path=data", "venv=venv"]


def data_set(folder: Path) -> None:
    """A small data set in `folder/data`, as the words above name it."""
    write_tokens(folder / "data", {"train": [300] * 4, "validation": [300]}, tokenizer=tokenizer_info("0" * 64, 2048))


def words(site: str, *more: str, time: str = "2h") -> list[str]:
    """A submission that the site takes, with `more` last."""
    account = [f"account={ACCOUNTS[site]}"] if ACCOUNTS[site] else []
    given = {word.split("=")[0] for word in more}
    base = [*RUN, f"site={site}", *account, f"time={time}"]
    return [*(word for word in base if word.split("=")[0] not in given), *more]


WITH_DATA_QUEUE = ("deucalion-a100", "karolina-gpu", "leonardo-booster", "lumi-g", "marenostrum5-acc", "vega-gpu")
"""Sites of which it is known where jobs without GPUs go."""


def job_of(site: str) -> list[str]:
    """The words of a job alone."""
    return [f"site={site}", *([f"account={ACCOUNTS[site]}"] if ACCOUNTS[site] else []), "time=20m", "venv=venv", "cpus=4"]


def prepared(*given: str, dry_run: bool = True, runs_dir: str = "runs") -> Prepared:
    """The submission as it would be from the folder of this process."""
    return prepare(list(given), Path(runs_dir), dry_run=dry_run, environ=NOBODY)


def cases() -> list[tuple[str, str, list[str]]]:
    """(site, mode, words) of every golden file."""
    found = [(site, mode, words(site, *more)) for site in SITES for mode, more in MODES.items()
             if (site, mode) not in NOT_THERE]
    build = ["data", "build", "corpus", "texts", "--licence", "MIT"]
    found += [(site, "data", [*job_of(site), *build]) for site in WITH_DATA_QUEUE]
    return found + [(site, mode, words(site, *more)) for mode, (site, more) in EXTRA.items()]
