"""How a run is put on a cluster: the words of `officina submit` that are not about the run itself.

Nothing of it reaches a rank or RUN/config.yaml, so that a run can move to another site, account and number of nodes. A person's
or a centre's defaults stand below `submit:` in the files of their configuration folders.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from officina.configs.sites import config_folders
from officina.trainer.config import Positive, config
from officina.trainer.errors import Problem
from officina.trainer.keys import as_text, fields_of
from officina.trainer.quantities import Duration

SUBMIT = "submit"
"""Key of the defaults in a person's or a centre's files."""


@config
class SlurmWords:
    """What goes to Slurm unseen by us."""

    extra: list[str] = field(default_factory=list)
    """Further sbatch options: [--reservation=school,--mail-type=END]."""


@config
class EnvWords:
    """What goes into the job's environment."""

    extra: dict[str, str] = field(default_factory=dict)
    """Variables by name, over those of the site: env.extra.NCCL_DEBUG=INFO."""


@config
class JobConfig:
    """One submission."""

    site: str = ""
    """Id, alias or file of the site; empty = the one this host belongs to."""
    nodes: Positive = 1
    gpus: Positive | None = None
    """GPUs of each node; null = all it has."""
    account: str = ""
    """Project that is charged."""
    partition: str = ""
    qos: str = ""
    queue: Literal["train", "debug", "data"] | None = None
    """Which of the site's queues: partition and qos follow from it unless they are given. null = train, or data for
    commands that need no GPU."""
    time: Duration | None = None
    """Longest time a job may take."""
    launcher: Literal["srun", "torchrun", "mpirun"] = "srun"
    """Who starts the ranks of a node: srun each of them, or one torchrun a node, or mpirun all."""
    container: str = ""
    """Image that the ranks run in (.sif; for pyxis .sqsh or registry#image); empty = none."""
    venv: str = ""
    """Virtual environment with officina, at the site; empty = the one this command runs in, or of an image its own Python."""
    setup: list[str] | None = None
    """Shell lines that load modules; null = those of the site."""
    prologue: list[str] = field(default_factory=list)
    """Shell lines of yours, after everything else is set and before the ranks start."""
    cpus: Positive | None = None
    """CPUs of each rank, or of a command that is no run, as Slurm counts them; null = as the site says."""
    cpu_bind: str = ""
    """srun's --cpu-bind; empty = as the site says."""
    stop_before: Duration = 300.0
    """How long before its limit the job is told to save and leave. Slurm may tell it a minute earlier."""
    attempts: Positive = 3
    """How often ranks that died are started again within a job."""
    requeue: bool = False
    """At its time limit the job queues itself again instead of the next one of a chain taking over."""
    jobs: Positive | None = None
    """Jobs of the chain, each going on where the one before it stopped; null = 1, or as many as `budget` pays for."""
    budget: Annotated[float, Field(gt=0)] | None = None
    """Most that all jobs together may cost, in the site's unit."""
    at_once: Positive | None = None
    """Of a sweep: jobs that run at the same time."""
    tflops: Annotated[float, Field(gt=0)] | None = None
    """Speed of one GPU that the plan should assume, in TFLOP/s of the model's arithmetic."""
    slurm: SlurmWords = field(default_factory=SlurmWords)
    env: EnvWords = field(default_factory=EnvWords)


_OPTIONAL = tuple(part.name for part in fields(JobConfig) if part.default is None)
_NULL = ("null", "Null", "NULL", "~")
_SHARED = ("site",)
"""Words that the run takes too."""


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words of the job, words of the run); `site=` is both."""
    job, run = [], []
    for text in words:
        key = re.split("=", text.lstrip("+~"), maxsplit=1)[0]
        is_word = "=" in text or text.startswith("~")
        mine = is_word and key.split(".")[0] in fields_of(JobConfig) and not key.startswith("site.")
        (job if mine else run).append(text)
        if mine and key in _SHARED:
            run.append(text)
    return job, run


def read_job(words: Sequence[str], environ: Mapping[str, str] = os.environ,
             ) -> tuple[JobConfig, list[Problem], list[tuple[str, str]]]:
    """The job that the words describe, over the defaults of centre and person: job, faults, defaults with their files."""
    problems: list[Problem] = []
    values: dict = {}
    defaults, files = [], {}
    for key, value, origin in _defaults(environ, problems):
        _put(values, key, None if value in _NULL else value)
        defaults.append((f"{key}={as_text(value)}", origin))
        files[key] = origin
    for text in words:
        key, _, raw = text.lstrip("+").partition("=")
        if text.startswith("~"):
            problems.append(Problem(key[1:], None, "a word of the job is left out, not taken away", f"leave {text} out"))
        else:
            _put(values, key, _read(key, raw))
            files.pop(key, None)
    job, faults = _typed(values)
    for fault in faults:  # nobody typed what stands in a file
        origin = next((file for key, file in files.items() if f"{fault.key}.".startswith(f"{key}.")), "")
        problems.append(replace(fault, rule=f"{fault.rule} ({origin})") if origin else fault)
    return job, problems, defaults


def _put(values: dict, key: str, value: object) -> None:
    """None is no value: what lies below is taken away."""
    *stem, leaf = key.split(".")
    here = values
    for part in stem:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            return
    if value is None:
        here.pop(leaf, None)
    else:
        here[leaf] = value


def _read(key: str, raw: str) -> object:
    """Text of one word: lists and sets of names as `[a,b]` and `{A:b}`; everything else as it was typed."""
    if raw in _NULL or (raw.lower() == "none" and key in _OPTIONAL):  # cpu_bind=none, NCCL_NET_PLUGIN=none are values
        return None
    if key.startswith("env.extra."):
        return raw
    if raw[:1] == "[" and raw[-1:] == "]":
        return split_commas(raw[1:-1])
    if raw[:1] == "{" and raw[-1:] == "}":
        return dict(item.partition(":")[::2] for item in split_commas(raw[1:-1]))
    if key in ("slurm.extra", "prologue", "setup"):
        return [raw] if raw else []
    return raw


def split_commas(text: str) -> list[str]:
    """Parts between commas that stand outside quotes and brackets; quotes around a whole part are taken off."""
    parts = [""]
    quote, depth = "", 0
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "[{(":
            depth += 1
        elif c in ")}]":
            depth -= 1
        elif c == "," and not depth:
            parts.append("")
            continue
        parts[-1] += c
    parts = [part.strip() for part in parts]
    return [part[1:-1] if len(part) > 1 and part[0] == part[-1] and part[0] in "'\"" else part for part in parts if part]


def _defaults(environ: Mapping[str, str], problems: list[Problem]):
    for folder in config_folders(environ):
        for path in sorted(folder.glob("*.yaml")):
            try:  # what cannot be read is told where the run's own defaults are read
                values = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) or {}
            except (yaml.YAMLError, OSError, UnicodeDecodeError):
                continue
            below = values.get(SUBMIT, {}) if isinstance(values, dict) else {}
            if not isinstance(below, dict):
                problems.append(Problem(SUBMIT, below, f"must hold keys and values ({path})", "submit: {account: my_project}"))
                continue
            for key, value in flat(below):
                yield key, value, str(path)


def flat(values: Mapping, prefix: str = ""):
    """Dotted key and value of each leaf; `env.extra` of a job, whose keys are a person's own, is one."""
    for name, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" != "env.extra":
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _typed(values: dict) -> tuple[JobConfig, list[Problem]]:
    found: dict[str, Problem] = {}
    for _ in range(100):
        try:
            return _ADAPTER.validate_python(values), list(found.values())
        except ValidationError as error:
            for item in error.errors(include_url=False):
                path = [str(part) for part in item["loc"]]
                while len(path) > 1 and (path[-1].isdigit() or _at(values, path) is _NOTHING):
                    path.pop()
                key = ".".join(path)
                found.setdefault(key, _problem(item, key, _at(values, path)))
                _drop(values, path)
    raise AssertionError(f"these values cannot be mended: {values}")


_ADAPTER = TypeAdapter(JobConfig)
_NOTHING = object()


def _at(values: object, path: list[str]) -> object:
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return _NOTHING
        values = values[part]
    return values


def _drop(values: dict, path: list[str]) -> None:
    for part in path[:-1]:
        values = values[part]
    values.pop(path[-1], None)


_WORKS = {"nodes": "2", "gpus": "4", "time": "8h", "queue": "debug", "launcher": "srun", "stop_before": "5m", "attempts": "3",
          "jobs": "3", "budget": "5000", "at_once": "2", "tflops": "150", "requeue": "true", "cpus": "8",
          "slurm.extra": "[--reservation=NAME]", "env.extra": "{NCCL_DEBUG:INFO}", "setup": "[module load NAME]",
          "prologue": "[ulimit -n 65536]"}


def _problem(item: Mapping, key: str, value: object) -> Problem:
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f"{name}.{inner}" if inner else name for name, t in fields_of(JobConfig).items()
                 for inner in (["extra"] if name in ("slurm", "env") else [""])]
        near = difflib.get_close_matches(key, known, 1, 0.4) or ["slurm.extra"]
        return Problem(key, value, "there is no such key", f"{near[0]}={_WORKS.get(near[0], 'VALUE')}")
    works = f"{key}={_WORKS.get(key, 'VALUE')}"
    if item["type"] == "literal_error":
        return Problem(key, value, f"must be one of {item['ctx']['expected'].replace(chr(39), '')}", works)
    if item["type"] == "value_error":
        return Problem(key, value, str(item["ctx"]["error"]), works)
    message = item["msg"]
    return Problem(key, value, f"{message[:1].lower()}{message[1:]}", works)


def expand(path: str) -> Path:
    """A path as it was typed, made absolute without following links: the site's own names of its file systems stay."""
    return Path(os.path.abspath(os.path.expanduser(os.path.expandvars(path))))
