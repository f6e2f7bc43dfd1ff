"""`officina jobs`, `logs` and `cancel`: the jobs of runs, as RUN/jobs.jsonl, Slurm and the supervisor know them."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from officina.launch import report_words
from officina.launch.job_queue import QueueState, ask, cluster_name, query
from officina.launch.job_record import JOBS, JobRecord, read_jobs
from officina.launch.supervise import CONTINUE, read_attempts
from officina.trainer.errors import EXIT_DONE, EXIT_USER, LaunchError, OfficinaError
from officina.trainer.metrics import FILE, StepMetrics, from_line
from officina.trainer.rank_log import log_path
from officina.trainer.run_dir import CONFIG, load_config

_TAIL_BYTES = 64 * 1024
_FOLLOW_S = 0.5
_ASK_SLURM_S = 15.0


@dataclass(frozen=True, slots=True)
class RunJobs:
    """A run directory with its jobs."""

    run_dir: Path
    records: list[JobRecord]
    states: dict[str, QueueState]
    """Of those that Slurm still knows."""
    attempts: list[dict]
    """As the supervisor wrote them down."""

    @property
    def active(self) -> list[JobRecord]:
        """Jobs that wait or run, as they were submitted."""
        return [r for r in self.records if (state := self.states.get(r.job_id)) is not None and state.active]

    @property
    def newest(self) -> JobRecord:
        """The job that ran last; members of its chain that were not needed any more say nothing."""
        last, ran = self.records[-1], {attempt["job"] for attempt in self.attempts}
        chain = [r for r in self.records if r.job_id in ran and r.chain and r.chain == last.chain]
        return chain[-1] if chain else last


def jobs(args: argparse.Namespace) -> int:
    """One line a job: those that wait or run, and where a run has none, its last one. A run whose files are damaged is named,
    with what is still known of its jobs; the status is then 2."""
    folders = [_run_dir(run) for run in args.runs] or sorted(path.parent for path in Path(args.runs_dir).glob(f"*/{JOBS}"))
    if not folders and args.runs_dir != "runs" and not Path(args.runs_dir).is_dir():
        raise OfficinaError(f"--runs-dir {args.runs_dir}: there is no such folder. Name that of your runs: --runs-dir runs")
    if not folders:
        print(f"No jobs: no run in {args.runs_dir} was submitted. Submit one: officina submit experiment=demo ranks=0 "
              "site=NAME nodes=1 time=1h. Runs elsewhere: officina jobs --runs-dir DIR")
        return EXIT_DONE
    lines: list[tuple[str, ...]] = [("run", "job", "step", "loss", "rate", "job ends in", "run ends in", "state")]
    damaged: list[OfficinaError] = []
    for run in _with_states(folders, damaged):
        facts = ("", "", "", "")
        try:
            facts = _progress(run.run_dir)
        except OfficinaError as error:
            damaged.append(error)
        lines += _lines(run, run.records if args.all else run.active or [run.newest], facts)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines if len(lines) > 1 else ():
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for error in damaged:
        print(f"officina jobs: {error}", file=sys.stderr)
    return EXIT_USER if damaged else EXIT_DONE


def _lines(run: RunJobs, shown: Sequence[JobRecord], facts: tuple[str, str, str, str]) -> Iterator[tuple[str, ...]]:
    """A line a job; step, loss and rate stand beside the one that trains, else the last."""
    running = [record for record in run.active if run.states[record.job_id].left_s is not None]
    if not running and facts[3] != "done":
        facts = (*facts[:3], "")  # nothing trains now
    told = next((record for record in shown if record in running), run.newest if run.newest in shown else shown[0])
    for i, record in enumerate(shown):
        state = run.states.get(record.job_id)
        left = report_words.clock(state.left_s) if state and state.left_s is not None else ""
        place = f" ({record.place} of {sum(r.chain == record.chain for r in run.records)})" if record.chain else ""
        what = "" if record.what in ("train", "resume") else f"{record.what}: "
        mine = facts if record is told else ("", "", "", "")
        yield (os.fspath(run.run_dir) if i == 0 else "", record.job_id + place, *mine[:3], left, mine[3],
               what + _state_words(run, record, state))


def logs(args: argparse.Namespace) -> int:
    """What the run's newest job printed, or one rank's log; -f follows it into the jobs that come after."""
    local = args.rank is not None and not args.follow and log_path(Path(args.run), args.rank).exists()
    run_dir = Path(args.run) if local else _run_dir(args.run)  # ranks that no job started have logs too
    path = _log(run_dir, args.rank)
    if path is None and not args.follow:
        where = f"{log_path(run_dir, args.rank)} is not there" if args.rank is not None else "no job of the run has printed yet"
        raise LaunchError(f"{where}. Wait for it: officina logs -f {run_dir}; its jobs: officina jobs {run_dir}")
    try:
        for chunk in _follow(run_dir, args.rank) if args.follow else [path.read_bytes()]:
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
    except BrokenPipeError:  # `officina logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_DONE


def cancel(args: argparse.Namespace) -> int:
    """End all jobs of the runs: those that wait first, so that none starts when the one before it ends."""
    status = EXIT_DONE
    for run in _with_states([_run_dir(run) for run in args.runs]):
        waiting = [r.job_id for r in run.active if run.states[r.job_id].state in ("PENDING", "REQUEUED", "REQUEUE_HOLD")]
        running = [r.job_id for r in run.active if r.job_id not in waiting]
        if not run.active:
            print(f"{run.run_dir}: no job waits or runs")
        for ids in (waiting, running):
            if ids and (done := ask("scancel", *ids)).returncode:
                print(f"officina cancel: {run.run_dir}: scancel: {done.stderr.strip()}. Jobs of another user only that user "
                      f"can end: scancel {' '.join(ids)}", file=sys.stderr)
                status = EXIT_USER
            elif ids:
                what = "will not start" if ids is waiting else "told to save and end"
                print(f"{run.run_dir}: {'jobs' if len(ids) > 1 else 'job'} {', '.join(ids)} {what}")
        if running and not status:
            print(f"  Slurm gives the ranks its KillWait, often 30 s; to go on later: officina submit resume {run.run_dir} ...")
    return status


# ---- what is known -----------------------------------------------------------------------------------------------------
def active_jobs(run_dir: Path) -> list[str]:
    """Ids of the run's jobs that wait or run. Raises LaunchError where Slurm does not say."""
    return [record.job_id for run in _with_states([run_dir]) for record in run.active] if read_jobs(run_dir) else []


def _run_dir(text: str) -> Path:
    run_dir = Path(text)
    if not run_dir.is_dir():
        raise OfficinaError(f"{run_dir}: no such run directory. `officina jobs` lists those with jobs")
    if not read_jobs(run_dir):
        what = "names none" if (run_dir / JOBS).exists() else "is missing"
        ranks = len(list((run_dir / "logs").glob("rank-*.log")))
        local = f"; of ranks started here: officina logs {run_dir} --rank N, 0 to {ranks - 1}" if ranks else ""
        raise OfficinaError(f"{run_dir}: no job was submitted for it ({JOBS} {what}). Submit it: "
                            f"officina submit resume {run_dir} site=NAME nodes=1 time=1h{local}")
    return run_dir


def _with_states(folders: Sequence[Path], damaged: list[OfficinaError] | None = None) -> list[RunJobs]:
    """The runs that have jobs. Those whose list of jobs cannot be read go to `damaged`; without one they end it."""
    records: dict[Path, list[JobRecord]] = {}
    for folder in folders:
        try:
            if not (found := read_jobs(folder)):
                raise LaunchError(f"{folder / JOBS} names no job that can be read. Jobs of its name: squeue --me")
            records[folder] = found
        except OfficinaError as error:
            if damaged is None:
                raise
            damaged.append(error)
    here = cluster_name()
    known = [record for found in records.values() for record in found if record.cluster in ("", here)]
    states = query([record.job_id for record in known])  # a run that moved has ids that mean other jobs here
    return [RunJobs(folder, found, {r.job_id: states[r.job_id] for r in found if r in known and r.job_id in states},
                    read_attempts(os.fspath(folder))) for folder, found in records.items()]


def _state_words(run: RunJobs, record: JobRecord, state: QueueState | None) -> str:
    """What Slurm says; of a job that has ended, what the supervisor wrote down says more."""
    if state is not None and state.active:
        text = state.words().replace(" JOB", f" {record.job_id}")
        if state.reason == "Dependency" and record.chain and record.place > 1:
            text = "waiting: for the job before it in its chain"
        return text
    ended = [a for a in run.attempts if a["job"] == record.job_id]
    if ended and ended[-1]["outcome"]:
        if ended[-1]["outcome"] == CONTINUE and record is run.newest and not run.active:
            return f"{CONTINUE}: officina submit resume {run.run_dir} ..."
        return ended[-1]["outcome"] + (f": {ended[-1]['error']}" if ended[-1]["error"] else "")
    if state is not None:
        return state.words()
    return f"ended; how, only its cluster knows: sacct -j {record.job_id}"


def _progress(run_dir: Path) -> tuple[str, str, str, str]:
    """(step, loss, tokens/s, time to the run's end) by its latest steps; empty before the first one."""
    steps = _last_steps(run_dir / FILE)
    if not (run_dir / CONFIG).exists():
        return "", "", "", ""
    run = load_config(run_dir)
    if not steps:
        return f"0/{run.steps:,}", "", "", ""
    last, rows = steps[-1], steps[-100:]
    pace_s = (last.time - rows[0].time) / (last.step - rows[0].step) if len(rows) > 1 else last.step_time_s
    left = report_words.clock(pace_s * (run.steps - last.step)) if last.step < run.steps else "done"
    unit = "tok" if run.batch_unit == "tokens" else run.batch_unit
    rate = sum(r.tokens for r in rows) / max(sum(r.step_time_s for r in rows), 1e-9)
    return f"{last.step:,}/{run.steps:,}", report_words.loss(last.loss_nats), f"{report_words.count(rate)} {unit}/s", left


def _last_steps(path: Path) -> list[StepMetrics]:
    """The latest steps of one start: what lies before a gap, a step back or a later start says nothing of the pace."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
            lines = file.read().splitlines()
    except OSError:
        return []
    found: list[StepMetrics] = []
    started = True
    for record in map(from_line, lines):
        if isinstance(record, StepMetrics):
            found = [*found, record] if found and not started and record.step == found[-1].step + 1 else [record]
            started = False
        elif record is not None and record.event == "start":
            found, started = [r for r in found[-1:] if r.step <= record.step], True
    return found


# ---- logs --------------------------------------------------------------------------------------------------------------
def _log(run_dir: Path, rank: int | None) -> Path | None:
    """The file to show: the rank's, or that of the newest job that has one."""
    if rank is not None:
        path = log_path(run_dir, rank)
        return path if path.exists() else None
    for record in reversed(read_jobs(run_dir)):
        path = run_dir / "logs" / f"slurm-{record.job_id}.out"
        if path.exists():
            return path
    return None


def _follow(run_dir: Path, rank: int | None) -> Iterator[bytes]:
    """What is there and what comes, until no job of the run waits or runs any more. As long as nothing is, stderr says why."""
    shown, offset, asked_s, over, why = None, 0, -_ASK_SLURM_S, False, ""
    while True:
        path = _log(run_dir, rank)
        if path is not None and path != shown:
            if shown is not None:
                yield from _rest(shown, offset)
                yield f"==== {path.name}\n".encode()
            shown, offset = path, 0
        if shown is not None:
            for chunk in _rest(shown, offset):
                offset += len(chunk)
                yield chunk
        if over:
            return
        if (now := time.monotonic()) - asked_s >= _ASK_SLURM_S:
            first, asked_s = asked_s < 0, now
            try:
                [run] = _with_states([run_dir])
            except LaunchError:
                if first:
                    raise
                continue  # a Slurm that is silent for a while ends no job
            over = not run.active  # then once more: what was printed since the last look
            for record in run.active[:1] if shown is None else ():
                if why != (why := _state_words(run, record, run.states[record.job_id])):
                    print(f"job {record.job_id}: {why}", file=sys.stderr)
        time.sleep(0 if over else _FOLLOW_S)


def _rest(path: Path, offset: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(offset)
        while chunk := file.read(1 << 20):
            yield chunk
