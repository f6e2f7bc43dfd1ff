"""What Slurm says of jobs now, and why it holds one, in words. The only reader of squeue for `officina jobs` and `cancel`."""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from officina.launch.supervise import seconds
from officina.trainer.errors import LaunchError

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "RESIZING", "SUSPENDED", "STOPPED", "COMPLETING", "REQUEUED",
          "REQUEUE_HOLD", "REQUEUE_FED", "STAGE_OUT")

_REASONS = (  # first match counts; Slurm's names: squeue(1), JOB REASON CODES
    ("BeginTime", "may not start before its begin time; after a requeue Slurm holds a job for about two minutes"),
    ("Dependency", "waits for the job before it"),
    ("DependencyNeverSatisfied", "waits for a job that ended otherwise, and will never start: officina cancel"),
    ("Priority", "others are before it in the queue"),
    ("Resources", "is next, and waits for nodes to become free"),
    ("JobHeldUser", "is held by its owner: scontrol release JOB"),
    ("JobHeldAdmin", "is held by the site: ask its support"),
    ("launch failed requeued held", "could not be started on its nodes and is held: scontrol release JOB"),
    ("ReqNodeNotAvail", "the nodes it could use are down, drained or reserved, as before a maintenance"),
    ("Reservation", "waits for its reservation to begin"),
    ("PartitionTimeLimit", "asks for more time than the partition allows"),
    ("PartitionNodeLimit", "asks for more or fewer nodes than the partition allows"),
    ("Partition(Down|Inactive)", "its partition is closed"),
    ("InvalidAccount", "its account is not valid here"),
    ("InvalidQOS", "its QOS is not valid here"),
    ("(Assoc|QOS)(Max|Grp).*Minutes.*", "the project's budget is used up, reserved by running jobs, or too small for it"),
    ("QOS(Max|Grp|Min).*|Assoc(Max|Grp).*", "a limit of the project or QOS is reached: jobs, nodes or GPUs at a time"),
    ("MaxSubmitJobs.*|.*MaxJobs.*", "as many jobs run as the limit allows"),
    ("JobArrayTaskLimit", "as many jobs of the sweep run as it allows at once"),
    ("Licenses", "waits for a licence, often a file system's"),
    ("BadConstraints", "no node has what it asks for"),
    ("Nodes?Down|NodeDown", "a node it needs is down"),
)


@dataclass(frozen=True, slots=True)
class QueueState:
    """One job as Slurm sees it."""

    state: str
    """E.g. `PENDING`, `RUNNING`, `COMPLETED`."""
    reason: str
    """Slurm's word for why it waits or how it ended; "" = none."""
    left_s: float | None
    """Until its time limit; None = no limit, or it does not run."""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    def words(self) -> str:
        """State and reason for a person."""
        text = {"PENDING": "waiting", "SIGNALING": "running", "CONFIGURING": "starting", "COMPLETING": "ending"}.get(
            self.state, self.state.lower().replace("_", " "))
        why = reason_words(self.reason) if self.state == "PENDING" else ""
        return f"{text}: {why}" if why else text


def reason_words(reason: str) -> str:
    """Why Slurm holds a job; a reason we have no words for is given as Slurm names it."""
    if reason in ("", "None"):
        return ""
    plain = reason.strip("()").split(",")[0]
    for pattern, words in _REASONS:
        if re.fullmatch(pattern, plain):
            return words
    return f"Slurm says {reason}"


def cluster_name() -> str:
    """What the Slurm here calls itself; "" if it does not say. Raises LaunchError as `query` does."""
    shown = ask("scontrol", "show", "config")
    if shown.returncode:  # without the name all recorded jobs would be another cluster's
        raise _silent(shown)
    found = re.search(r"^ClusterName\s*=\s*(\S+)", shown.stdout, re.MULTILINE)
    return found[1] if found else ""


def query(job_ids: Sequence[str]) -> dict[str, QueueState]:
    """States of those of the jobs that Slurm still knows. Raises LaunchError where there is no Slurm, or it does not answer."""
    if not job_ids:
        return {}
    shown = ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(job_ids)}", "--format=%i|%T|%r|%L")
    if shown.returncode and "nvalid job id" not in shown.stderr:
        raise _silent(shown)
    found = {}
    for line in shown.stdout.splitlines():
        if line.startswith("CLUSTER: "):  # where SLURM_CLUSTERS names several
            continue
        job_id, state, reason, left = line.split("|")
        left_s = seconds(left.strip()) if state == "RUNNING" else None
        found[job_id] = QueueState(state, "" if reason == "None" else reason, left_s)
    return found


def _silent(shown: subprocess.CompletedProcess[str]) -> LaunchError:
    return LaunchError(f"Slurm does not answer: {shown.stderr.strip()}. Try again later; squeue --me shows whether it does")


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    """A client command of Slurm with its output as text. Raises LaunchError if it is not here."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise LaunchError(f"{words[0]} is not here, so this is no host of a Slurm cluster. Call this on the login node "
                          "where the jobs were submitted") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{words[0]} has not answered for a minute. Try again later") from None
