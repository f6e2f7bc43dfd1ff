"""Jobs under the supervisor on a real Slurm: nothing is lost, nothing is done twice, and the job's end is true."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from slurm import SlurmCluster, need_slurm, start_cluster

from officina.launch import supervise
from officina.launch.job_record import JobRecord, append_job
from officina.trainer.config import DataConfig, FSDP2Config, SiteConfig, SourceConfig, ZeroConfig
from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.ledger import audit
from officina.trainer.errors import EXIT_DONE
from officina.trainer.metrics import read_metrics
from officina.trainer.run_dir import committed_steps
from tests.lives import begin, changed, losses, plain_run, states

pytestmark = pytest.mark.slurm
HERE = Path(__file__).parent
STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    texts = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (texts / f"m{i:02d}.py").write_text("\n".join(f"def f_{i}_{j}(x):\n    return {i * j}\n" for j in range(3 + i % 5)))
    folder = tmp_path_factory.mktemp("data") / "text"
    build(folder, BuildOptions(inputs=[texts], vocab_size=300))
    return folder


@pytest.fixture(scope="module")
def whole(pool, data, tmp_path_factory) -> Path:
    """The same run, never broken."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    begin(run_dir, plain_run(data, steps=STEPS, engine=FSDP2Config()))
    assert set(pool.run(2, "tests.lives:live", str(run_dir))) == {EXIT_DONE}
    return run_dir


@dataclass(frozen=True)
class Jobs:
    """The jobs of one run directory."""

    cluster: SlurmCluster
    run_dir: Path

    def submit(self, *options: str, held: str = "", supervise_with: tuple[str, ...] = ("--requeue",), env: dict | None = None,
               ranks: int = 2) -> str:
        """What `officina submit` does, in small: the supervisor copied into the run, one srun step of ranks on 2 nodes."""
        copy = self.run_dir / "supervise.py"
        shutil.copyfile(supervise.__file__, copy)
        script = self.run_dir / "job.sh"
        script.write_text("\n".join([
            "#!/bin/bash", "#SBATCH --open-mode=append --requeue --time=5",
            f"exec python3 {copy} {self.run_dir} {' '.join(supervise_with)} -- srun --mpi=none --kill-on-bad-exit=1 "
            f"--wait=60 --nodes=2 --ntasks={ranks} {sys.executable} {HERE / 'held_rank.py'} {self.run_dir}", ""]))
        sent = self.cluster.run(
            "sbatch", "--parsable", "--nodes=2", f"--ntasks={ranks}", f"--output={self.run_dir}/job.out", *options, str(script),
            env=self.cluster.environ | {"HELD": held, "PYTHONSAFEPATH": "1"} | (env or {}))
        assert sent.returncode == 0, sent.stderr
        return sent.stdout.strip()

    def said(self) -> str:
        path = self.run_dir / "job.out"
        return path.read_text() if path.exists() else ""

    def state(self, job: str) -> tuple[str, str]:
        """State and exit code, e.g. ("FAILED", "76:0")."""
        shown = self.cluster.run("scontrol", "show", "job", "-o", job).stdout
        return shown.split("JobState=")[1].split()[0], shown.split("ExitCode=")[1].split()[0]

    def wait(self, happened: Callable[[], object], what: str, timeout_s: float = 150) -> None:
        end = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < end, f"no {what}:\n{self.cluster.run('scontrol', 'show', 'job').stdout}\n{self.said()}"
            time.sleep(0.05)

    def wait_held(self, attempt: int, ranks: int = 2) -> list[tuple[int, str]]:
        """Wait until the ranks are held in that attempt: (pid, node) of each."""
        places = [self.run_dir / f"held-{attempt}-{rank}" for rank in range(ranks)]
        self.wait(lambda: all(place.exists() for place in places), f"the hold of attempt {attempt}")
        return [(int(pid), node) for pid, node, _ in (place.read_text().split() for place in places)]

    def wait_end(self, job: str) -> tuple[str, str]:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.state(job)[0] in ends, f"the end of {job}")
        return self.state(job)

    def end_in(self, job: str, minutes: int) -> None:
        """Give the running job a time limit that is so far away, up to a minute more: Slurm counts whole minutes."""
        hours, passed, _ = map(int, self.cluster.run("squeue", "-h", "-j", job, "-o", "0:%M").stdout.split(":")[-3:])
        done = self.cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={hours * 60 + passed + minutes + 1}")
        assert done.returncode == 0, done.stderr

    def start_requeued(self, job: str, restart: int = 1) -> None:
        """Wait for the requeue, then not the two minutes for which Slurm holds a requeued job; it then has its hour.

        A start within the second of the requeue is refused ("Job credential revoked"): that is what the hold is for.
        """
        def held() -> bool:
            shown = self.cluster.run("scontrol", "show", "job", "-o", job).stdout
            return f"Restarts={restart} " in shown and "JobState=PENDING Reason=BeginTime" in shown
        self.wait(held, f"requeue {restart} of {job}")
        self.cluster.run("scontrol", "update", f"jobid={job}", "starttime=now+2", "timelimit=60")
        self.wait(lambda: any(a["restart"] == restart for a in self.attempts()), f"start {restart} of {job}")

    def attempts(self) -> list[dict]:
        return supervise.read_attempts(str(self.run_dir))

    def outcomes(self) -> list[str | None]:
        return [a["outcome"] for a in self.attempts()]


@pytest.fixture
def jobs(slurm_cluster: SlurmCluster, data: Path, tmp_path: Path) -> Jobs:
    run_dir = tmp_path / "run"
    begin(run_dir, plain_run(data, steps=STEPS, engine=FSDP2Config()))
    return Jobs(slurm_cluster, run_dir)


def assert_is_the_unbroken_run(run_dir: Path, whole: Path) -> None:
    """Bitwise in every parameter and moment, in every loss, and no sample twice or missing."""
    assert losses(run_dir) == losses(whole)
    ours, theirs = states(run_dir, STEPS), states(whole, STEPS)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    found = audit(run_dir)
    assert found.ok, found


def test_time_limit_signal_saves_requeues_and_finishes(jobs, whole):
    """The limit comes near once the ranks are held, however long they took to get there. They do not know of it (their own
    clock has the hour that the job began with): what stops them is Slurm's signal."""
    job = jobs.submit("--time=60", "--signal=B:USR1@180", held="1:3")
    jobs.wait_held(1)
    jobs.end_in(job, minutes=3)
    jobs.start_requeued(job)
    assert jobs.wait_end(job) == ("COMPLETED", "0:0"), jobs.said()
    assert jobs.outcomes() == ["to be continued", "done"] and jobs.attempts()[0]["stop"] == "SIGUSR1"
    assert jobs.attempts()[1]["restart"] == 1 and jobs.attempts()[1]["from_checkpoint"] == 4
    stops = [g.stop for g in read_metrics(jobs.run_dir).generations]
    assert [(s.step, s.reason, s.exit_status) for s in stops] == [(4, "signal SIGUSR1", 75), (8, "done", 0)]
    assert_is_the_unbroken_run(jobs.run_dir, whole)


@pytest.mark.slow
def test_without_a_signal_the_ranks_stop_in_time_by_themselves(jobs, whole):
    changed(jobs.run_dir, site=SiteConfig(grace=5.0))
    job = jobs.submit("--time=1", held="1:1:slow")
    jobs.start_requeued(job)
    assert jobs.wait_end(job) == ("COMPLETED", "0:0"), jobs.said()
    first = jobs.attempts()[0]
    assert (first["outcome"], first["stop"]) == ("to be continued", "")
    assert read_metrics(jobs.run_dir).generations[0].stop.reason == "time limit"
    assert 1 <= first["checkpoint"] < STEPS
    assert_is_the_unbroken_run(jobs.run_dir, whole)


def test_killed_rank_and_killed_step_are_tried_again_in_the_allocation(jobs, whole):
    job = jobs.submit(held="1:4,2:7")
    os.kill(jobs.wait_held(1)[1][0], signal.SIGKILL)
    for pid, _ in jobs.wait_held(2):
        os.kill(pid, signal.SIGKILL)
    assert jobs.wait_end(job) == ("COMPLETED", "0:0"), jobs.said()
    assert jobs.outcomes() == ["crash", "crash", "done"] and [a["restart"] for a in jobs.attempts()] == [0, 0, 0]
    assert [a["from_checkpoint"] for a in jobs.attempts()] == [-1, 3, 6]
    assert "by SIGKILL" in jobs.attempts()[0]["error"]
    assert_is_the_unbroken_run(jobs.run_dir, whole)


def test_same_error_at_the_same_step_twice_fails_the_job_and_ends_its_chain(jobs):
    first = jobs.submit("--job-name=loop", "--dependency=singleton", held="1:5:raise,2:5:raise", supervise_with=("--chain",))
    second = jobs.submit("--job-name=loop", "--dependency=singleton", supervise_with=("--chain",))
    for place, job in enumerate((first, second), 1):
        append_job(jobs.run_dir, JobRecord(job_id=job, what="train", site="test", chain=first, place=place))
    assert jobs.wait_end(first) == ("FAILED", "76:0"), jobs.said()
    assert jobs.outcomes() == ["crash", "no progress"]
    assert "no progress: the same error after step 5 twice: rank " in jobs.said()
    assert "ZeroDivisionError: held at step 5 by pid" in jobs.said()
    assert jobs.wait_end(second)[0] == "CANCELLED"


def test_a_crash_and_what_the_user_can_mend_fail_the_job_with_codes_of_their_own(jobs):
    crash = jobs.submit(held="1:2:raise", supervise_with=("--max-attempts", "1"))
    assert jobs.wait_end(crash) == ("FAILED", "1:0"), jobs.said()
    changed(jobs.run_dir, data=DataConfig(sources={"text": SourceConfig(path="/nowhere")}))
    mended = jobs.submit(supervise_with=("--max-attempts", "5"))
    assert jobs.wait_end(mended) == ("FAILED", "2:0"), jobs.said()
    assert jobs.outcomes() == ["crash", "user error"], "what the user must mend is not tried again"


def test_chain_goes_on_after_a_stop_and_after_a_kill_without_warning(jobs, whole):
    options = ("--job-name=links", "--dependency=singleton")
    members = [jobs.submit(*options, held="1:1,2:4", supervise_with=("--chain",)) for _ in range(4)]
    for place, job in enumerate(members, 1):
        append_job(jobs.run_dir, JobRecord(job_id=job, what="train", site="test", chain=members[0], place=place))
    jobs.wait_held(1)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", members[0])
    assert jobs.wait_end(members[0]) == ("COMPLETED", "0:0"), jobs.said()
    assert f"job {members[1]} of the chain goes on" in jobs.said()
    ranks = [pid for pid, _ in jobs.wait_held(2)]
    supervisor = int((jobs.run_dir / ".claim").read_text().split()[1])
    for pid in (supervisor, *ranks):
        os.kill(pid, signal.SIGKILL)
    assert jobs.wait_end(members[1]) == ("FAILED", "0:9")
    assert jobs.wait_end(members[2]) == ("COMPLETED", "0:0"), jobs.said()
    assert jobs.wait_end(members[3])[0] == "CANCELLED"
    assert jobs.outcomes() == ["to be continued", None, "done"]
    assert [a["from_checkpoint"] for a in jobs.attempts()] == [-1, 2, 3]
    assert_is_the_unbroken_run(jobs.run_dir, whole)


def test_requeue_by_hand_and_a_signal_to_the_ranks(jobs, whole):
    job = jobs.submit(held="1:1,2:4")
    jobs.wait_held(1)
    jobs.cluster.run("scontrol", "requeue", job)  # SIGTERM to all, as a preemption sends it
    jobs.start_requeued(job)
    jobs.wait_held(2)
    jobs.cluster.run("scancel", "--signal=USR1", job)  # to the ranks only
    jobs.start_requeued(job, 2)
    assert jobs.wait_end(job) == ("COMPLETED", "0:0"), jobs.said()
    assert [a["from_checkpoint"] for a in jobs.attempts()] == [-1, 2, 5] and jobs.outcomes()[1:] == ["to be continued", "done"]
    assert jobs.attempts()[0]["state"] != "", "it knew that Slurm ended the job"
    assert_is_the_unbroken_run(jobs.run_dir, whole)


_PREEMPTING = """\
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL MaxTime=60 PriorityTier=1 GraceTime=300
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=2
"""


def test_preempted_job_saves_within_its_grace_time_and_comes_back(data, tmp_path, whole):
    """SIGTERM to the ranks alone, and the job still runs: without a chain and without --requeue it must not end there."""
    need_slurm()
    begin(tmp_path / "run", plain_run(data, steps=STEPS, engine=FSDP2Config()))
    with start_cluster(_PREEMPTING, name="preempting") as cluster:
        jobs = Jobs(cluster, tmp_path / "run")
        job = jobs.submit("--partition=low", held="1:3", supervise_with=())
        jobs.wait_held(1)
        cluster.run("sbatch", "--nodes=4", "--exclusive", "--partition=high", "--output=/dev/null", "--wrap=sleep 1")
        jobs.start_requeued(job)
        assert jobs.wait_end(job) == ("COMPLETED", "0:0"), jobs.said()
    assert jobs.outcomes() == ["to be continued", "done"] and jobs.attempts()[0]["stop"] == "preemption"
    assert jobs.attempts()[1]["from_checkpoint"] == 4
    assert_is_the_unbroken_run(jobs.run_dir, whole)


def test_cancelled_job_does_not_come_back(jobs):
    job = jobs.submit(held="1:1")
    jobs.wait_held(1)
    jobs.cluster.run("scancel", job)
    assert jobs.wait_end(job)[0] == "CANCELLED"
    assert committed_steps(jobs.run_dir) == [2], "its ranks still saved"
    assert "requeued" not in jobs.said()


def test_node_that_dies_is_left_behind(jobs, whole):
    """kill -9 of a node's slurmd, slurmstepd and ranks: Slurm requeues the job, which goes on elsewhere."""
    job = jobs.submit(held="1:4")
    pid, node = jobs.wait_held(1)[1]
    daemon = int((jobs.cluster.root / f"{node}.pid").read_text())
    stepds = subprocess.run(["pgrep", "-f", rf"slurmstepd: \[{job}\."], capture_output=True, text=True, check=True).stdout
    above = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert str(above) in stepds.split()
    try:
        for victim in (daemon, above, pid):
            os.kill(victim, signal.SIGKILL)
        jobs.start_requeued(job)
        assert jobs.wait_end(job) == ("COMPLETED", "0:0"), jobs.said()
        assert jobs.attempts()[-1]["restart"] == 1 and jobs.attempts()[-1]["from_checkpoint"] == 3
        assert_is_the_unbroken_run(jobs.run_dir, whole)
    finally:
        jobs.cluster.start_node(node)
        jobs.wait(lambda: len(jobs.cluster.idle()) == 4, "the node")


def test_a_crash_in_the_last_task_of_an_array_leaves_the_others_alone(slurm_cluster, tmp_path):
    """That task has the number of the whole array as its job id."""
    runs = [tmp_path / f"run-{i}" for i in (0, 1)]
    for run_dir in runs:
        run_dir.mkdir()
    (tmp_path / "stop").write_text('{"event": "stop", "step": 1, "reason": "done", "exit_status": 0}\n')
    script = tmp_path / "job.sh"
    script.write_text(f"""#!/bin/bash
first="touch {runs[0]}/began; until [ -e {runs[1]}/over ]; do sleep 0.1; done; cp {tmp_path}/stop {runs[0]}/metrics.jsonl"
last="until [ -e {runs[0]}/began ]; do sleep 0.1; done; exit 9"
steps=("$first" "$last")
trap 'touch {runs[1]}/over' EXIT
python3 {supervise.__file__} {tmp_path}/run-$SLURM_ARRAY_TASK_ID -- srun bash -c "${{steps[$SLURM_ARRAY_TASK_ID]}}"
""")
    sent = slurm_cluster.run("sbatch", "--parsable", "--array=0-1", "--time=5", f"--output={tmp_path}/%a.out", str(script))
    assert sent.returncode == 0, sent.stderr
    array, first, last = sent.stdout.strip(), *(Jobs(slurm_cluster, run_dir) for run_dir in runs)
    last.wait(lambda: set(last.outcomes()) & {supervise.NO_PROGRESS}, "end of the last task", 60)
    first.wait(lambda: first.outcomes()[-1:] not in ([], [None]), "end of the first task", 60)
    assert last.outcomes() == ["crash", "no progress"] and first.outcomes() == ["done"]
    assert {a["job"] for a in first.attempts()} == {f"{array}_0"} and {a["job"] for a in last.attempts()} == {f"{array}_1"}


@pytest.mark.slow  # test_site_doubles moves one by the user's commands; here its numbers are compared too
def test_run_moves_to_another_site_account_and_path(jobs, data, tmp_path, whole):
    """Stopped on one Slurm; the directory and its data, copied elsewhere, go on as other ranks and engine on another one."""
    job = jobs.submit("--account=EHPC-1", held="1:4", supervise_with=())
    jobs.wait_held(1)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert jobs.wait_end(job) == ("FAILED", "75:0"), "nobody goes on, and that must show"
    there, moved = tmp_path / "elsewhere" / "renamed", tmp_path / "elsewhere" / "data"
    shutil.copytree(jobs.run_dir, there)
    shutil.copytree(data, moved)
    run = plain_run(data)
    source = replace(run.data.sources["text"], path=str(moved))
    changed(there, data=replace(run.data, sources={"text": source}), engine=ZeroConfig(stage=2),
            site=replace(run.site, name="other", account="project_2"))
    with start_cluster(name="other") as other:
        second = Jobs(other, there)
        job = second.submit("--account=project_2", ranks=3)
        assert second.wait_end(job) == ("COMPLETED", "0:0"), second.said()
    assert audit(there).ok
    assert second.outcomes() == ["to be continued", "done"]
    for step, (loss, norm) in losses(whole).items():
        got = losses(there)[step]
        assert got[0] == pytest.approx(loss, abs=1e-5) and got[1] == pytest.approx(norm, rel=1e-5)
