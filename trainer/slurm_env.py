"""What Slurm tells a process, and whether it is true: variables leak from job to job, the process tree does not."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO of the kernel (include/linux/proc_ns.h): the namespace in which every process is seen."""
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers its batch, interactive and extern steps from here (slurm.h: SLURM_INTERACTIVE_STEP = 0xfffffffa)."""


def expand_hosts(hostlist: str) -> Iterator[str]:
    """Host names of a Slurm hostlist in order: `n[1-2,07],login3` gives n1, n2, n07, login3. Needs no scontrol."""
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hostlist):
        yield from _expand(item.strip())


def _expand(item: str) -> Iterator[str]:
    match = re.search(r"\[([^\]]*)\]", item)
    if match is None:
        yield item
        return
    for part in match[1].split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for rest in _expand(item[match.end():]):
                yield f"{item[:match.start()]}{number:0{len(first)}d}{rest}"


def expand_counts(counts: str) -> list[int]:
    """Numbers per node as Slurm writes them: `4(x2),1` gives [4, 4, 1]."""
    found = re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", counts)
    return [int(number) for number, times in found for _ in range(int(times or 1))]


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """Where this process stands, as the kernel tells; no variable can fake it."""

    step: str | None
    """`JOB.STEP` of the slurmstepd above us, STEP a number, `batch`, `interactive` or `extern`; "" if there is none
    (a login node); None if the process tree cannot be seen (a container with its own PIDs, /proc with hidepid)."""
    on_terminal: bool
    """Is there a controlling terminal? Tasks of srun have none unless it was called with --pty."""
    pid: int


def process_facts(pid: int | None = None) -> ProcessFacts:
    """The facts about process `pid`, by default this one."""
    pid = os.getpid() if pid is None else pid
    return ProcessFacts(_step_above(pid), _stat(pid)[1] != 0, pid)


def _stat(pid: int) -> tuple[int, int]:
    """Parent and terminal (0 = none) of a process; (-1, 0) if it cannot be seen."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1, 0
    return int(after_name[1]), int(after_name[4])


def _step_above(pid: int) -> str | None:
    while pid > 1:
        pid = _stat(pid)[0]
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:
            break
        if match := re.match(r"slurmstepd: \[([0-9]+\.[^\]]+)\]", title):
            return match[1]
    try:
        sees_all = pid == 1 and os.readlink("/proc/self/ns/pid") == _INITIAL_PID_NAMESPACE
    except OSError:
        return None
    return "" if sees_all else None


def is_task(environ: Mapping[str, str], facts: ProcessFacts) -> bool:
    """Is this process a task of the step that SLURM_* describe, one of several that all run the same program?

    No: a login node, an salloc shell, the body of a batch script, a shell under `srun --pty` (all tasks but one of that
    step have ended or sleep), and all of these with variables of another job in the environment.
    """
    job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "")
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES",
              "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    if not (job.isdigit() and step.isdigit()) or any(name not in environ for name in needed):
        return False
    if int(step) >= _FIRST_SPECIAL_STEP:
        return False
    if facts.step is not None and facts.step != f"{job}.{step}":
        return False
    if facts.step is None and _contradicts_itself(environ):
        return False
    # SLURM_PTY_PORT leaks into steps started from a --pty shell, but those have no terminal.
    in_shell = facts.on_terminal and "SLURM_PTY_PORT" in environ and environ.get("SLURM_TASK_PID") != str(facts.pid)
    return not in_shell


def _contradicts_itself(environ: Mapping[str, str]) -> bool:
    """Do step and job variables disagree? Then the step's are another job's. Used where the process tree is hidden."""
    job_hosts = set(expand_hosts(environ.get("SLURM_JOB_NODELIST", "")))
    step_hosts = set(expand_hosts(environ["SLURM_STEP_NODELIST"]))
    n_tasks = environ["SLURM_STEP_NUM_TASKS"]
    return not step_hosts <= job_hosts or environ.get("SLURM_NTASKS", n_tasks) != n_tasks
