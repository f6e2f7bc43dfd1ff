"""What jobs cost in the site's own unit, and how many of them a chain has."""

from collections.abc import Iterator

from officina.launch.job_request import Request
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


def sweep_problems(request: Request, n_runs: int) -> list[Problem]:
    """What an array of `n_runs` jobs must not ask for."""
    job, cost, most = request.job, cost_of_job(request), most_jobs(request)
    found = []
    if n_runs < 2:
        return found
    if job.jobs and job.jobs > 1 and not job.requeue:
        found.append(Problem("jobs", job.jobs, "is a chain, and the runs of a sweep are an array, whose jobs queue themselves",
                             f"jobs={job.jobs} requeue=true"))
    if most and n_runs > most:
        found.append(Problem("jobs", None, f"the sweep is {n_runs} jobs, and {request.profile.name} takes {most} of one user "
                             "at once there", f"a sweep of {most} runs"))
    if job.budget and cost and cost * n_runs > job.budget:
        found.append(Problem("budget", f"{job.budget:g}", f"{n_runs} runs may cost {cost * n_runs:,.0f} "
                             f"{request.profile.billing.unit}s", f"budget={-(-cost * n_runs // 1):.0f}"))
    return found


def chain_length(request: Request) -> int:
    """Jobs of the chain: as said, else as many as the budget pays for."""
    if request.job.jobs:
        return request.job.jobs
    cost = cost_of_job(request)
    if request.job.budget and cost:
        return max(1, min(int(request.job.budget / cost), most_jobs(request) or MOST_JOBS, MOST_JOBS))
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
    elif job.budget and cost and cost * (job.jobs or 1) > job.budget * (1 + 1e-9):
        fits = int(job.budget / cost + 1e-9)
        remedy = f"jobs={fits}" if fits and job.jobs else f"budget={-(-cost // 1):.0f}"
        yield Problem("budget", f"{job.budget:g}", f"{job.jobs or 1} job{'s' * ((job.jobs or 1) > 1)} of "
                      f"{time_words(request.time_s)} may cost {cost * (job.jobs or 1):,.0f} {unit}s", remedy)
    if job.jobs and most and job.jobs > most:
        yield Problem("jobs", job.jobs, f"{request.profile.name} takes {most} job{'s' * (most > 1)} of one user at once there",
                      f"jobs={most}" + (" requeue=true" if most == 1 else ""))
