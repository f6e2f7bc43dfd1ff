"""Inside a batch job: run a run's attempts, one step each, and make the job's end true.

    exec python3 RUN/supervise.py RUN --max-attempts 3 [--requeue | --chain] -- srun ... python -m officina.trainer RUN

One file of the standard library in the words of Python 3.6, since it is copied into the run directory and may have to run on
the host around a container. `exec` matters: `--signal=B:USR1@N` reaches the batch shell only, which would die of it.

Each attempt is one step with its own MASTER_PORT, OFFICINA_ATTEMPT (a name no other attempt has) and OFFICINA_END_TIME (when
Slurm ends the job, seconds since 1970). USR1 and TERM become USR1 to the step, which srun and mpirun hand to every process in
it: what stands between them and the trainer must `exec` it, or ignore USR1 as torchrun does not (`trap '' USR1` before it).

What follows from how an attempt ends (RUN/attempts.jsonl keeps it, over all jobs of the run):

    0 done                     the job COMPLETED; the rest of the chain is cancelled
    75 stopped in good order   requeued, or left to the next of the chain: COMPLETED. With neither: exit 75
    2 the user can mend it     exit 2; the rest of the chain is cancelled
    76 no progress             the same
    anything else              crash: tried again at once, until `--max-attempts` of them in a row brought no newer checkpoint.
                               The same error at the same step twice ends it at once with 76
"""

import argparse
import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from typing import NamedTuple

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_CONTINUE, EXIT_NO_PROGRESS = 0, 1, 2, 75, 76
DONE, CONTINUE, LIMIT, ENDED, CRASH, USER, NO_PROGRESS = (
    "done", "to be continued", "killed at the time limit", "ended by Slurm", "crash", "user error", "no progress")
_OF_STATUS = {EXIT_DONE: DONE, EXIT_CONTINUE: CONTINUE, EXIT_USER: USER, EXIT_NO_PROGRESS: NO_PROGRESS}
_HOPELESS = (USER, NO_PROGRESS)
PREEMPTION = "preemption"
"""What stopped an attempt, beside the names of signals."""
ATTEMPTS = "attempts.jsonl"
_POLL_S = 0.05
_LAST_S = 20.0
"""A step that still runs this long before the job's end is killed, so that what follows is ours to say and not Slurm's."""
_KILL_S = 5.0
_CLAIM_S = 60.0
_PATIENCE_S = 60.0
"""For a Slurm that cannot be reached, as while its controller is started anew, where the chain or the requeue hangs on it."""
_FIRST_PORT, _N_PORTS = 20000, 12000
"""Below 32768, where Linux starts to give ports to outgoing connections; the trainer derives its own from the same range."""


class Job(NamedTuple):
    """The Slurm job we are in; empty outside of one."""

    id: str
    """As Slurm takes it for this job alone: `ARRAY_TASK` in an array, whose last task has the number of the whole array."""
    names: tuple
    """The ids under which RUN/jobs.jsonl and RUN/attempts.jsonl may know it: a task of an array has two."""
    restart: int
    """How often it was requeued: SLURM_RESTART_COUNT."""


class Ended(NamedTuple):
    """How an attempt ended."""

    status: int
    """Exit status of its step's command, negative for a signal."""
    stop: str
    """Name of the stop signal that came to us meanwhile, or ""."""
    state: str
    """What Slurm said of the job when SIGTERM came, or ""."""
    cut: bool
    """Did we kill the step, for the job's end was near?"""


def main(argv=None):
    """Supervise until there is nothing more to do; returns the exit status of the batch job."""
    args = _read(sys.argv[1:] if argv is None else argv)
    run_dir, job = args.run_dir, read_job(os.environ)
    if not os.path.isdir(run_dir):
        say(f"{run_dir}: no such run directory. Submit the run anew: officina submit ...")
        return EXIT_USER
    if not os.access(run_dir, os.W_OK):
        say(f"{run_dir} cannot be written by this user. Give it to the group: chmod -R g+w, or copy it")
        return EXIT_USER
    with Signals() as signals, claimed(run_dir) as holder:
        if holder:
            if 0 < job.restart < args.max_jobs and "job {},".format(os.environ.get("SLURM_JOB_ID")) in holder:
                say(f"an earlier start of this job still trains {run_dir} ({holder}), on a node that Slurm has lost")
                if requeue(job.id):
                    return EXIT_DONE
            say(f"{run_dir} is being trained by another start ({holder}), still after {_CLAIM_S:g} s. Wait for it or end it: "
                f"officina cancel {run_dir}")
            return EXIT_USER
        old = stopped_before(run_dir, job)
        if old:
            say("the chain was stopped ({}): {}".format(old["outcome"], old["error"]))
            return old["status"]
        end_s = job_end_s(job.id)
        while True:
            outcome, error, status = attempt(args, job, signals, end_s)
            if outcome != CRASH or status or signals.first:
                return conclude(args, job, outcome, error, status)


def _read(argv):
    words = argv[argv.index("--") + 1:] if "--" in argv else []
    parser = argparse.ArgumentParser(prog="supervise.py", description=__doc__.split("\n")[0],
                                     usage="%(prog)s RUN [options] -- command of one attempt")
    parser.add_argument("run_dir", metavar="RUN", help="run directory")
    parser.add_argument("--max-attempts", type=int, default=3, metavar="N",
                        help="crashes in a row without a newer checkpoint, over all jobs (default: %(default)s)")
    parser.add_argument("--max-jobs", type=int, default=100, metavar="N",
                        help="with --requeue: times the job may run in all (default: %(default)s)")
    follow = parser.add_mutually_exclusive_group()
    follow.add_argument("--requeue", action="store_true", help="at the time limit: scontrol requeue")
    follow.add_argument("--chain", action="store_true", help="at the time limit: leave to the next job of the chain")
    args = parser.parse_args(argv[:argv.index("--")] if "--" in argv else argv)
    if not words:
        parser.error("the command of one attempt is missing: -- srun ... python -m officina.trainer RUN")
    args.words = words
    return args


def say(text):
    """One line into the job's output."""
    print("officina: " + text, file=sys.stderr, flush=True)


# ---- one attempt ---------------------------------------------------------------------------------------------------
def attempt(args, job, signals, end_s):
    """Run one step to its end and judge it: (outcome, error, exit status). Status 0 with CRASH: to be tried again."""
    run_dir, past = args.run_dir, read_attempts(args.run_dir)
    number, newest = 1 + max([a["number"] for a in past] or [0]), newest_checkpoint(run_dir)
    facts = {"number": number, "job": job.id, "restart": job.restart, "from_checkpoint": newest}
    note(run_dir, "begin", facts)
    if past and past[-1]["outcome"] is None and len(in_a_row(past, newest)) >= args.max_attempts:
        error = (f"{args.max_attempts} attempts in a row brought no newer checkpoint than {_of_step(newest)}, and the last "
                 "ended without a word, as when its node dies")
        note(run_dir, "end", dict(facts, outcome=NO_PROGRESS, error=error, status=EXIT_NO_PROGRESS, checkpoint=newest))
        return NO_PROGRESS, error, EXIT_NO_PROGRESS
    for path in glob.glob(os.path.join(run_dir, "logs", "rank-*.failure.json")):
        with contextlib.suppress(OSError):
            os.unlink(path)

    name = f"{job.id or os.getpid()}.{job.restart}.{number}"
    environ = dict(os.environ, MASTER_PORT=str(free_port(name)), OFFICINA_ATTEMPT=name)
    if end_s:
        environ["OFFICINA_END_TIME"] = f"{end_s:.0f}"
    written_bytes = _size(os.path.join(run_dir, "metrics.jsonl"))
    ended = run_step(args.words, environ, signals, end_s, job.id,
                     on_term=lambda state: note(run_dir, "told", dict(facts, state=state)))

    step, left_with = last_words(run_dir, written_bytes)
    outcome, error, signature = judge(ended, first_failure(run_dir), left_with)
    stop = ended.stop or (PREEMPTION if outcome == CONTINUE and preempted(job.id) else "")
    facts.update(step=step, checkpoint=newest_checkpoint(run_dir), stop=stop, outcome=outcome,
                 error=error, signature=signature, status=ended.status)
    if outcome == CRASH:
        clear_steps(job.id)
    outcome, error, status = weigh(past, facts, args.max_attempts)
    note(run_dir, "end", dict(facts, outcome=outcome, error=error, status=status or ended.status))
    if outcome == CRASH and not status:
        say(f"attempt {number}: {error}. Going on from {_of_step(facts['checkpoint'])}")
    if outcome == CONTINUE:
        say(f"attempt {number}: stopped in good order. Its exit code {EXIT_CONTINUE} is no error, though srun may call it one")
    return outcome, error, status


def run_step(words, environ, signals, end_s, job_id, on_term):
    """The command of one attempt, to its end. Stop signals to us become one USR1 to it."""
    step = subprocess.Popen(words, env=environ, stdin=subprocess.DEVNULL)
    told, state, cut_s = False, "", 0.0
    while step.poll() is None:
        now = time.time()
        if signals.first and not told:
            told = True
            say(f"{signals.first}: the ranks finish their step, save and leave")
            with contextlib.suppress(ProcessLookupError):
                step.send_signal(signal.SIGUSR1)  # SIGTERM would make srun kill the tasks
        if signals.term and not state:
            state = job_state(job_id) or "UNKNOWN"
            on_term(state)
        if end_s and now >= end_s - _LAST_S and not cut_s:
            cut_s = now
            say(f"the job ends in {end_s - now:.0f} s and the step still runs: it is killed")
            step.terminate()
        elif cut_s and now >= cut_s + _KILL_S:
            step.kill()
        time.sleep(_POLL_S)
    return Ended(step.returncode, signals.first, state, bool(cut_s))


def judge(ended, failure, left_with=None):
    """(outcome, error, signature) of one attempt. The signature is the same for errors that differ in numbers only.

    left_with: exit status that rank 0 left in good order with, as metrics.jsonl has it. Of its step's we cannot be sure: the
    first rank that leaves with 75 lets srun kill those that are a moment later, and code that calls os._exit(0) ends no run.
    """
    if ended.cut:
        return LIMIT, "the ranks had not left before the job's time limit", ""
    if failure is None and left_with in (EXIT_DONE, EXIT_CONTINUE):
        return _OF_STATUS[left_with], "", ""
    if ended.state == "TIMEOUT":
        return LIMIT, "Slurm ended the job at its time limit before the ranks had left", ""
    if ended.state and ended.state != "RUNNING":  # what dies while Slurm takes the job down says nothing of the training
        return ENDED, "Slurm ended the job: " + ended.state, ""
    number = -ended.status if ended.status < 0 else ended.status - 128 if 128 < ended.status < 160 else 0
    how = "by " + _signal_name(number) if number else f"with exit status {ended.status}"
    if ended.status in (EXIT_DONE, EXIT_CONTINUE):
        how += " before the run had recorded its end"
    if failure is not None:
        first_line = failure["message"].split("\n")[0][:300]
        said = f"rank {failure['rank']} on {failure['host']}: {failure['error']}: {first_line}"
        if failure["consequence"]:  # who only saw that another rank was gone does not know why
            return CRASH, f"a rank was lost and the step ended {how}; {said}", "lost a rank " + how
        if "cannot listen on port" in first_line:  # taken since we looked: the next attempt has another one
            return CRASH, said, "port taken"
        signature = failure["error"] + ": " + re.sub(r"0x[0-9a-fA-F]+|[0-9]+", "#", first_line)
        return _OF_STATUS.get(failure["exit_status"], CRASH), said, signature
    if ended.status in (EXIT_USER, EXIT_NO_PROGRESS):
        return _OF_STATUS[ended.status], "the ranks said why above", ""
    return CRASH, f"the step ended {how}, and no rank said why", how


def weigh(past, now, max_attempts):
    """(outcome, error, exit status) of attempt `now`, given those before it. Status 0 with CRASH: to be tried again."""
    outcome, error = now["outcome"], now["error"]
    if outcome == CRASH:
        row = in_a_row(past, now["checkpoint"])
        if any(a["outcome"] == CRASH and (a["signature"], a["step"]) == (now["signature"], now["step"]) for a in row):
            at = "before the first step" if now["step"] < 0 else f"after step {now['step']}"
            return NO_PROGRESS, f"the same error {at} twice: {error}", EXIT_NO_PROGRESS
        if len(row) + 1 >= max_attempts:
            return CRASH, f"{error} (attempt {len(row) + 1} of {max_attempts} without a newer checkpoint)", EXIT_BUG
        return CRASH, error, 0
    if past and _idle(past[-1]) and _idle(now):
        return NO_PROGRESS, (f"two starts in a row were stopped before they brought a newer checkpoint than "
                             f"{_of_step(now['checkpoint'])}. Ask for more time, or save more often"), EXIT_NO_PROGRESS
    status = {DONE: EXIT_DONE, USER: EXIT_USER, NO_PROGRESS: EXIT_NO_PROGRESS}
    return outcome, error, status.get(outcome, EXIT_CONTINUE)


def _idle(a):
    """Did the attempt stop at its time limit without having brought the run further? A save of step 0 brings nothing."""
    ours = a["outcome"] in (CONTINUE, LIMIT) and a["stop"] not in ("SIGTERM", PREEMPTION)
    return ours and a["checkpoint"] <= max(a["from_checkpoint"], 0)


def in_a_row(past, newest):
    """The latest attempts that crashed or ended without a word, and after which `newest` was the newest checkpoint."""
    row, after = [], newest
    for a in reversed(past):
        silent = a["outcome"] is None
        after = after if silent else a["checkpoint"]
        if after != newest or not (silent or a["outcome"] in (CRASH, ENDED)):
            break
        if a["outcome"] == CRASH or (silent and not a["state"]):
            row.append(a)
        after = a["from_checkpoint"]
    return row


# ---- the end of the job ----------------------------------------------------------------------------------------------
def conclude(args, job, outcome, error, status):
    """What comes after the last attempt of this job; returns the job's exit status."""
    run_dir = args.run_dir
    if outcome == DONE:
        cancel(waiting_members(run_dir, job), "the run is done")
        return EXIT_DONE
    if outcome == ENDED:
        say(error)
        return EXIT_CONTINUE
    if not status or outcome in (CONTINUE, LIMIT):  # a crash while the ranks were stopping is for the next start
        if job_state(job.id) not in ("RUNNING", "", "TIMEOUT"):
            return EXIT_CONTINUE  # Slurm has decided already: cancelled, requeued, preempted
        if preempted(job.id) and requeue(job.id):  # else the job would count as done before Slurm puts it back
            return EXIT_DONE
        if args.chain:
            following = waiting_members(run_dir, job)
            if following:
                say(f"job {following[0]} of the chain goes on")
                return EXIT_DONE
            say("to be continued, and no job of the chain is left. " + _how_to_go_on(run_dir))
        elif args.requeue and job.id:
            if job.restart + 1 >= args.max_jobs:
                say(f"to be continued, but the job ran {job.restart + 1} times, its --max-jobs. " + _how_to_go_on(run_dir))
            elif requeue(job.id):
                return EXIT_DONE
            else:
                say("to be continued. " + _how_to_go_on(run_dir))
        else:
            say("to be continued. " + _how_to_go_on(run_dir))
        return EXIT_CONTINUE
    say(f"{outcome}: {error}")
    cancel(waiting_members(run_dir, job), "going on would not help")
    return status


def _how_to_go_on(run_dir):
    return (f"Go on: officina submit resume {run_dir}, with the words of the job (site, nodes, time and so on) as they stand "
            "at the top of its job.sbatch")


def requeue(job_id):
    """Put this job back into the queue: Slurm then ends us. False if it refuses."""
    done = _slurm("scontrol", "requeue", job_id, patience_s=_PATIENCE_S)
    if done is None or done.returncode:
        say("the job cannot be requeued: {}. Ask for it with `#SBATCH --requeue`, or submit a chain".format(
            done.stdout.strip() if done else "scontrol is not here or does not answer"))
        return False
    say(f"requeued: job {job_id} goes on when Slurm starts it again (it waits about two minutes at least)")
    end = time.time() + 30
    while time.time() < end and job_state(job_id) == "RUNNING":
        time.sleep(0.2)
    return True


def waiting_members(run_dir, job):
    """Jobs of our chain that wait, in their order: what RUN/jobs.jsonl and Slurm say."""
    records = read_lines(os.path.join(run_dir, "jobs.jsonl"))
    own = [r for r in records if r.get("job_id") in job.names]
    chain = (own[-1].get("chain"), own[-1].get("cluster")) if own else (None, None)
    members = [str(r.get("job_id")) for r in records if chain[0] and (r.get("chain"), r.get("cluster")) == chain]
    if not members:
        return []
    shown = _slurm("squeue", "--noheader", "--array", "--user=" + str(os.getuid()), "--states=PENDING", "--format=%i",
                   patience_s=_PATIENCE_S)
    waiting = set(shown.stdout.split()) if shown and not shown.returncode else set()
    return [member for member in members if member in waiting and member not in job.names]


def cancel(jobs, why):
    """End jobs that wait."""
    if jobs:
        say("{}: the chain's other jobs are cancelled ({})".format(why, " ".join(jobs)))
        _slurm("scancel", "--state=PENDING", *jobs)


def stopped_before(run_dir, job):
    """The verdict that stopped our chain while we waited, or None: a member that could not be cancelled must not go on."""
    ends = [line for line in read_lines(os.path.join(run_dir, ATTEMPTS)) if line.get("event") == "end"]
    sent = [r.get("submitted_at", "") for r in read_lines(os.path.join(run_dir, "jobs.jsonl")) if r.get("job_id") in job.names]
    if not ends or ends[-1]["outcome"] not in _HOPELESS or not sent:
        return None
    other = ends[-1]["job"] not in job.names
    return ends[-1] if other and sent[-1] < ends[-1]["time"] else None


# ---- what Slurm says ---------------------------------------------------------------------------------------------------
def read_job(environ):
    """The job that the environment tells of."""
    job, array = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_ARRAY_JOB_ID", "")
    names = ("{}_{}".format(array, environ.get("SLURM_ARRAY_TASK_ID", "")), job) if array else (job,)
    restart = environ.get("SLURM_RESTART_COUNT", "")
    return Job(names[0], names, int(restart) if restart.isdigit() else 0)


def _slurm(*words, patience_s=0.0):
    """A finished client command with its output and errors as text; None if it is not here or does not answer.

    Names of folders are in it, in whatever encoding. patience_s: how long to ask again if the controller cannot be reached.
    """
    end = time.time() + patience_s
    while True:
        try:
            done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                  encoding="utf-8", errors="replace", timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if not done.returncode or time.time() >= end or not re.search("contact|timed out|Unexpected message", done.stdout):
            return done
        time.sleep(1.0)


def job_state(job_id):
    """JobState as Slurm says it, RUNNING for all states of a job that it lets live; "" if nobody says."""
    state = _shown(job_id, "JobState")
    return "RUNNING" if state in ("SIGNALING", "RESIZING", "SUSPENDED", "STOPPED") else state


def preempted(job_id):
    """Is the job in the grace time of a preemption? Then Slurm has sent SIGTERM to the step and not to us; the job runs on."""
    return _shown(job_id, "PreemptTime") not in ("", "None")


def _shown(job_id, field):
    shown = _slurm("scontrol", "show", "job", "--oneliner", job_id) if job_id else None
    match = re.search(rf"\b{field}=(\S+)", shown.stdout) if shown else None
    return match.group(1) if match else ""


def job_end_s(job_id):
    """When Slurm ends the job, seconds since 1970 by this host's clock; 0 if there is no limit or nobody says."""
    shown = _slurm("squeue", "--noheader", "--jobs=" + job_id, "--format=%L") if job_id else None
    left = seconds(shown.stdout.strip()) if shown and not shown.returncode else None
    if left is None:
        given = os.environ.get("SLURM_JOB_END_TIME", "")
        return float(given) if given.isdigit() else 0.0
    return time.time() + left


def seconds(text):
    """Slurm's `2-03:04:05`, `03:04:05` or `4:05` as seconds; None for `UNLIMITED` and the like."""
    match = re.match(r"(?:([0-9]+)-)?(?:([0-9]+):)?([0-9]+):([0-9]+)$", text)
    if not match:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def clear_steps(job_id, patience_s=30.0):
    """End what a dead attempt left of its step: two attempts must never write to one run. Gives up after `patience_s`."""
    end = time.time() + patience_s
    while job_id and time.time() < end:
        shown = _slurm("squeue", "--noheader", "--steps", "--jobs=" + job_id, "--format=%i")
        steps = re.findall(r"^\S+\.[0-9]+$", shown.stdout, re.M) if shown and not shown.returncode else []
        if not steps:
            return
        _slurm("scancel", *steps)
        time.sleep(0.5)


def free_port(name):
    """A port that follows from the attempt's name, and that no program on this host, the first node, listens on."""
    first = zlib.crc32(f"{name}.{os.getpid()}".encode())  # clusters that share a host, as a test's do, have the same job ids
    for i in range(100):
        port = _FIRST_PORT + (first + i) % _N_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    return _FIRST_PORT + first % _N_PORTS


# ---- the run directory -------------------------------------------------------------------------------------------------
def note(run_dir, event, facts):
    """Append one line to RUN/attempts.jsonl. A disk that takes nothing must not end the training."""
    line = dict({"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())}, **facts)
    try:
        with open(os.path.join(run_dir, ATTEMPTS), "a+b") as file:
            file.seek(-min(file.tell(), 1), os.SEEK_END)
            torn = file.read() not in (b"", b"\n")  # by a kill or a full disk: it must not take this line with it
            file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        say(f"{error.filename or ATTEMPTS}: {error.strerror}; the job goes on")


def read_lines(path):
    """The JSON objects of a file, one a line; torn lines are left out."""
    found = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(value)
    return found


def read_attempts(run_dir):
    """All attempts of the run, oldest first; `outcome` is None for one that ended without a word or still runs."""
    found = {}
    for line in read_lines(os.path.join(run_dir, ATTEMPTS)):
        blank = {"job": "", "restart": 0, "from_checkpoint": -1, "outcome": None, "error": "", "signature": "", "status": None,
                 "step": -1, "checkpoint": -1, "stop": "", "state": ""}
        if isinstance(line.get("number"), int):
            found.setdefault(line["number"], blank).update(line)
    return [found[number] for number in sorted(found)]


def newest_checkpoint(run_dir):
    """Step of the newest checkpoint with its commit file, also of one that was being written anew (.old); -1 if none is."""
    found = glob.glob(os.path.join(run_dir, "checkpoints", "step-*", "COMMIT"))
    steps = [re.match(r"step-([0-9]+)(\.old)?$", os.path.basename(os.path.dirname(path))) for path in found]
    return max([int(step.group(1)) for step in steps if step] or [-1])


def last_words(run_dir, since_bytes):
    """Of the part of metrics.jsonl after `since_bytes`: (last step, -1 if there is none; exit status of the stop, or None)."""
    step, left_with = -1, None
    try:
        with open(os.path.join(run_dir, "metrics.jsonl"), "rb") as file:
            file.seek(max(since_bytes, _size(file.name) - 65536))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return step, left_with
    for line in lines:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and "event" not in found:
                step = found.get("step", step)
            elif isinstance(found, dict) and found["event"] == "stop":
                left_with = found.get("exit_status")
    return step, left_with


def first_failure(run_dir):
    """The exception that brought the others down, as `officina.trainer.rank_log.first_failure` picks it."""
    found = []
    for path in glob.glob(os.path.join(run_dir, "logs", "rank-*.failure.json")):
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            found.append(json.load(file))
    return min(found, key=lambda f: (f["consequence"], f["time_s"])) if found else None


@contextlib.contextmanager
def claimed(run_dir):
    """Hold RUN/.claim as `officina.trainer.run_dir.claim` does; gives "", or who holds it after a minute of waiting."""
    with open(os.path.join(run_dir, ".claim"), "a+", encoding="utf-8") as file:
        holder = _lock(file, time.time() + _CLAIM_S)
        if not holder:
            claim = "supervisor {} on {}, job {}, since {}".format(
                os.getpid(), socket.gethostname(), os.environ.get("SLURM_JOB_ID", "none"),
                time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
            with contextlib.suppress(OSError):  # the lock counts, not the note; unbuffered: closing the file would try again
                file.truncate(0)
                os.write(file.fileno(), claim.encode())
        yield holder
        if not holder:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _lock(file, until_s):
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                return ""
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.time() >= until_s:
            file.seek(0)
            return file.read().strip() or "just begun"
        time.sleep(1.0)


class Signals:
    """Stop signals to this process, remembered."""

    def __init__(self):
        self.first, self.term = "", False

    def __enter__(self):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        pass  # the process ends; a late SIGTERM must not change its status

    def _receive(self, number, _frame):
        self.first = self.first or _signal_name(number)
        self.term = self.term or number == signal.SIGTERM


def _signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _size(path):
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _of_step(checkpoint):
    return "the start" if checkpoint < 0 else f"step {checkpoint}"


if __name__ == "__main__":
    sys.exit(main())
