"""What jobs cost in the site's own unit, and how many of them a chain has."""

from collections.abc import Iterator

from officina.launch.job_request import RANKED, Request
from officina.launch.site_rows import time_words
from officina.trainer.errors import Problem

MOST_JOBS = 50
"""Longest chain that a budget alone makes: one that needs more is better looked at on the way."""


def cost_of_job(request: Request) -> float | None:
    """What one job costs if it takes all of its time, in the site's unit; None where that is not known."""
    rate, profile = request.profile.billing.per_node_hour, request.profile
    if rate is None or not request.gpus:
        return None
    share = 1.0
    if profile.gpu.per_node and not request.partition_limits.whole_nodes and not request.exclusive:
        share = request.gpus / profile.gpu.per_node
        cpus = (profile.node.cores or 0) * (profile.node.threads_per_core or 1)
        if cpus:
            share = min(max(share, request.cpus_per_rank * request.gpus / cpus), 1.0) if share < 1 else 1.0
    return request.nodes * share * rate * request.time_s / 3600


def sweep_problems(request: Request) -> list[Problem]:
    """What an array of jobs must not ask for."""
    job, cost, most, n_runs = request.job, cost_of_job(request), most_jobs(request), request.runs
    found = []
    if n_runs < 2:
        return found
    if job.jobs and job.jobs > 1 and not job.requeue:
        found.append(Problem("jobs", job.jobs, "is a chain, and the runs of a sweep are an array, whose jobs queue themselves",
                             f"jobs={job.jobs} requeue=true"))
    if most and n_runs > most:
        found.append(Problem("jobs", None, f"the sweep is {n_runs} jobs, and {request.profile.name} takes {most} of one user "
                             "at once there", f"a sweep of {most} runs"))
    whole = cost * n_runs * _starts(request) if cost else 0.0
    if job.budget and whole > job.budget:
        found.append(Problem("budget", f"{job.budget:g}", f"{n_runs} runs may cost {whole:,.0f} "
                             f"{request.profile.billing.unit}s", f"budget={-(-whole // 1):.0f}"))
    return found


def _starts(request: Request) -> int:
    """How often each run may start as it was asked for: what queues itself again does so once at least."""
    if request.what not in RANKED:
        return 1
    return max(request.job.jobs or 1, 2 if request.job.requeue else 1)


def chain_length(request: Request) -> int:
    """Jobs of the chain of each run: as said, else as many as the budget pays for. No chain: a command that is no run, which
    would be done over, and runs of a sweep, whose array goes on only by requeueing itself."""
    job, cost = request.job, cost_of_job(request)
    if request.what not in RANKED:
        return 1
    if job.jobs:
        return job.jobs
    if job.budget and cost and (request.runs == 1 or job.requeue):
        return max(1, min(int(job.budget / (cost * request.runs)), most_jobs(request) or MOST_JOBS, MOST_JOBS))
    return 1


def most_jobs(request: Request) -> int:
    """How many jobs the site takes of one user at once; 0 = not known."""
    known = (request.qos_limits.max_jobs, request.partition_limits.max_jobs, request.profile.slurm.max_jobs)
    return min(filter(None, known), default=0)


def money_problems(request: Request) -> Iterator[Problem]:
    job, cost = request.job, cost_of_job(request)
    unit = request.profile.billing.unit
    most = most_jobs(request)
    if job.budget and cost is None:
        yield Problem("budget", f"{job.budget:g}", f"it is not known what a job costs on {request.profile.name}",
                      "leave budget out, and say jobs=3")
    elif job.budget and cost and cost * (starts := _starts(request)) > job.budget * (1 + 1e-9):
        fits, least = int(job.budget / cost + 1e-9), 2 if job.requeue else 1
        remedy = f"jobs={fits}" if fits >= least and job.jobs else f"budget={-(-cost * least // 1):.0f}"
        yield Problem("budget", f"{job.budget:g}", f"{starts} job{'s' * (starts > 1)} of "
                      f"{time_words(request.time_s)} may cost {cost * starts:,.0f} {unit}s", remedy)
    if job.jobs and most and job.jobs > most:
        yield Problem("jobs", job.jobs, f"{request.profile.name} takes {most} job{'s' * (most > 1)} of one user at once there",
                      f"jobs={most}" + (" requeue=true" if most == 1 else ""))
