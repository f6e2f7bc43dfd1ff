"""The run directory: its files' names, the strict reading and writing of config.yaml, and the history of its starts.

    RUN/config.yaml        the resolved RunConfig, every key written out: all that a rank reads
    RUN/history.jsonl      one JSON object a start: what was asked for, what changed, with which code, packages and conditions
                           of use of its data
    RUN/environment.json   packages and machine of the newest start
    RUN/code/*.diff        uncommitted code of every start, named by its hash; history.jsonl says which
    RUN/metrics.jsonl, ledger.jsonl, checkpoints/, logs/, report.html, report.json, tensorboard/
    RUN/.claim             locked by the one start that trains here now

Nothing in them depends on user, host or the run's own path. No torch and no Hydra here.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml

from officina.trainer.config import RunConfig
from officina.trainer.errors import ConfigError, LaunchError, OfficinaError
from officina.trainer.schema import dump_run, read_run

CONFIG, HISTORY, CODE, CHECKPOINTS = "config.yaml", "history.jsonl", "code", "checkpoints"
METRICS, LEDGER, CLAIM = "metrics.jsonl", "ledger.jsonl", ".claim"
EVALS, REQUEST, RESULTS = "evals", "request.json", "results.json"
"""RUN/evals/NAME is a run directory of its own, with what is asked of the evaluation and what came out."""
REFERENCE_DIR = "reference"
"""What the model at the beginning made of preference pairs: see preference.py."""

_HEAD = """\
# The whole run, every key written out. Ranks read only this file. To change it: officina resume RUN key=value
"""


class _Dumper(yaml.SafeDumper):
    """Floats as Python writes them with a dot, so that every YAML reader sees a number (1e-05 is text in YAML 1.1)."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Escaped where YAML would read another text back: it takes U+0085 and the like for ends of lines."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _text)


# ---- config.yaml -------------------------------------------------------------------------------------------
def config_text(run: RunConfig) -> str:
    """config.yaml's content: a pure function of the run, so that ranks can tell whether they mean the same one."""
    return _HEAD + yaml.dump(dump_run(run), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def save_config(run: RunConfig, path: Path) -> None:
    """Write the run to `path` (config.yaml, or the run directory that holds it): whole, or not at all."""
    _write_whole(_config_path(path), config_text(run))


def load_config(path: Path) -> RunConfig:
    """The run in `path` (config.yaml, or the run directory that holds it).

    Unknown keys and wrong values raise ConfigError; keys that are missing (written by an older officina) take defaults.
    A missing or unreadable file raises OfficinaError.
    """
    path = _config_path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OfficinaError(f"{path} does not exist, so {path.parent} is no run directory. "
                            "Start a run with `officina train`, or list yours with `ls runs`.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OfficinaError(f"{path} cannot be read: {' '.join(str(error).split())}. Restore the file; "
                            "history.jsonl beside it holds the words the run was started with.") from error
    if not isinstance(values, dict):
        raise OfficinaError(f"{path} holds no run, but {str(values)[:40]!r}. Restore the file; "
                            "history.jsonl beside it holds the words the run was started with.")
    run, problems = read_run(values)
    if problems:
        raise ConfigError(problems, source=str(path))
    return run


def _config_path(path: Path) -> Path:
    path = Path(path)
    return path / CONFIG if path.is_dir() or path.suffix not in (".yaml", ".yml") else path


# ---- history -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a run: a line of history.jsonl."""

    run_id: str
    """The same for all starts of a run and for its branches; checkpoints carry it, and it moves with the directory."""
    action: str
    """`start`, `resume` or `branch`."""
    words: Sequence[str]
    """As typed."""
    step: int
    """Optimizer steps already done."""
    world_size: int | None
    """Ranks; None if the launcher decides later."""
    engine: str
    commit: str | None
    """Commit of officina's code; None if it is not in a git repository."""
    diff: str | None = None
    """File in the run directory with the code's uncommitted changes."""
    versions: dict[str, str] = field(default_factory=dict)
    changes: Sequence[dict[str, object]] = ()
    """`{"key": ..., "old": ..., "new": ...}` against the configuration before."""
    forced: bool = False
    origin: dict[str, object] | None = None
    """branch: `{"name": ..., "run_id": ..., "step": ...}` of the run it comes from."""
    conditions: dict[str, dict[str, object]] | None = None
    """Fingerprint and conditions of use of the data read from here on, by source; see `officina.trainer.data.carried`."""
    carried: dict[str, dict[str, object]] | None = None
    """Conditions of the weights that the run begins with; None for a resume from a checkpoint."""
    time: str = ""
    """UTC, ISO 8601."""


def keep_diff(run_dir: Path, diff: str) -> str | None:
    """Store uncommitted changes of the code under their hash; the file's name below the run directory, None
    if there are none."""
    if not diff:
        return None
    name = f"{CODE}/{hashlib.sha256(diff.encode()).hexdigest()[:12]}.diff"
    (Path(run_dir) / CODE).mkdir(exist_ok=True)
    _write_whole(Path(run_dir) / name, diff)
    return name


def new_run_id() -> str:
    """A new name for a run that no other has."""
    return secrets.token_hex(8)


def append_history(run_dir: Path, start: Start) -> None:
    """Add one line, durably; the time is filled in."""
    line = asdict(start) | {"time": start.time or datetime.now(UTC).isoformat(timespec="seconds")}
    path = Path(run_dir) / HISTORY
    broken_tail = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if broken_tail else "") + json.dumps({"time": line.pop("time"), **line}, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_history(run_dir: Path) -> list[dict[str, object]]:
    """All starts, oldest first; a line cut short by a crash, or damaged since, is left out."""
    path = Path(run_dir) / HISTORY
    starts = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # no JSON, or no text
            if isinstance(start := json.loads(line), dict):
                starts.append(start)
    return starts


def read_run_id(run_dir: Path) -> str:
    """The run's id from its history; empty for a directory that no `officina train` made."""
    return next((str(start["run_id"]) for start in read_history(run_dir) if start.get("run_id")), "")


def split_step(text: str) -> tuple[Path, int | None]:
    """RUN, or RUN@STEP, as path and step; a folder of that very name is one without a step."""
    if not Path(text).is_dir() and (match := re.fullmatch(r"(.+)@(\d+)", text)):
        return Path(match[1]), int(match[2])
    return Path(text), None


def committed_steps(run_dir: Path) -> list[int]:
    """Steps whose checkpoint has its commit file, oldest first. Whether the data is whole is found when it is read.

    `step-N.old` counts, as for every reader: a kill came while step N was being written anew.
    """
    found = (Path(run_dir) / CHECKPOINTS).glob("step-*/COMMIT")
    names = {path.parent.name.removeprefix("step-").removesuffix(".old") for path in found}
    return sorted(int(name) for name in names if name.isdigit())


# ---- one start at a time -----------------------------------------------------------------------------------
@contextlib.contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Be the one start that writes to the run directory; LaunchError names the other one if there is one.

    A POSIX record lock, which Lustre, GPFS and NFS keep over nodes and which a dead process loses; where the file
    system has none, nothing is claimed. The lock counts; who holds it is noted where the disk takes the note.
    """
    run_dir = Path(run_dir)
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(run_dir / CLAIM, "a+", encoding="utf-8"))
        except OSError as error:
            raise unwritable(run_dir, error) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise LaunchError(f"{run_dir} is being trained by another start ({file.read().strip() or 'just begun'}). "
                                  "Wait for it or stop it, or branch from one of its checkpoints: officina train "
                                  f"from={run_dir}@STEP") from None
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        job = os.environ.get("SLURM_JOB_ID")
        note = (f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}, since "
                f"{datetime.now(UTC).isoformat(timespec='seconds')}")
        with contextlib.suppress(OSError):  # unbuffered: closing the file would try again
            file.truncate(0)
            os.write(file.fileno(), note.encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def unwritable(run_dir: Path, error: OSError) -> LaunchError:
    """The error for a run directory that cannot be written."""
    what = f"{error.filename or run_dir}: {error.strerror}, so the run directory cannot be "
    if (run_dir / CONFIG).exists():
        return LaunchError(f"{what}written. Mend that, or copy it to another place and go on there: officina resume COPY")
    return LaunchError(f"{what}made. Choose another place: --runs-dir DIR")


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
