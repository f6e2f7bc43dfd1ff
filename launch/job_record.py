"""RUN/jobs.jsonl: one line for every job that was submitted for a run, appended by those who submit. Torch-free."""

import json
import os
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from officina.trainer.errors import LaunchError

JOBS = "jobs.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One submitted job."""

    job_id: str
    """As Slurm names it: `1234`, or `1234_5` for one task of an array."""
    what: str
    """The officina command it runs: `train`, `eval`, `data build`, ..."""
    site: str
    """Id of the site's profile, e.g. `lumi-g`."""
    cluster: str = ""
    """What the site's slurm.conf calls itself; "" = not known."""
    submitted_at: str = ""
    """UTC, ISO 8601."""
    script: str = ""
    """File of the sbatch script, relative to the run directory."""
    nodes: int = 1
    chain: str = ""
    """job_id of the chain's first member; "" = a job of its own."""
    place: int = 1
    """Place in the chain, from 1."""
    array_index: int | None = None
    """Task of a sweep's array."""


def append_job(run_dir: Path, record: JobRecord) -> None:
    """Add one line, durably. `submitted_at` is filled in if it is empty. Raises LaunchError if the disk takes nothing."""
    line = asdict(record) | {"submitted_at": record.submitted_at or datetime.now(UTC).isoformat(timespec="seconds")}
    path = Path(run_dir) / JOBS
    try:
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        with open(path, "a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise LaunchError(f"{path}: {error.strerror}, so job {record.job_id} is submitted but not recorded. Cancel it and "
                          f"make room before the next try: scancel {record.job_id}") from error


def read_jobs(run_dir: Path) -> list[JobRecord]:
    """All submitted jobs of the run, oldest first. Torn and foreign lines are left out, keys of later versions ignored.

    Raises LaunchError for a file that cannot be read.
    """
    path, known, found = Path(run_dir) / JOBS, {field.name for field in fields(JobRecord)}, []
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise LaunchError(f"{path} cannot be read: {error.strerror}. Its jobs are those that squeue --me --name="
                          f"{Path(run_dir).name} shows; mend the file's rights or place") from error
    for line in text.splitlines():
        try:
            found.append(JobRecord(**{key: value for key, value in json.loads(line).items() if key in known}))
        except (ValueError, TypeError, AttributeError):
            continue
    return found
