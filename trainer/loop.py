"""The training loop, to be read from top to bottom: step, evaluation, saving and stopping stand in plain sight."""

import math
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from officina.trainer.assemble import Job, assemble, peak_memory_bytes
from officina.trainer.checkpoint.content import state_hashes, verify_changed
from officina.trainer.data.loader import StepData
from officina.trainer.errors import EXIT_CONTINUE, EXIT_DONE, EXIT_NO_PROGRESS, EXIT_USER, DataError, NoProgressError
from officina.trainer.evaluate import held_out
from officina.trainer.keys import as_text
from officina.trainer.metrics import StepMetrics, StopMetrics
from officina.trainer.objective import beside, measured
from officina.trainer.ranks import Ranks
from officina.trainer.run_dir import load_config
from officina.trainer.schedule import lr_factor
from officina.trainer.signals import StopRequest
from officina.trainer.state import PARAM
from officina.trainer.step import StepResult, train_step
from officina.trainer.time_left import SUPERVISED


def train(run_dir: Path, ranks: Ranks) -> int:
    """Train the run in `run_dir` on these ranks, from its newest whole checkpoint or from the start.

    Returns EXIT_DONE, or EXIT_CONTINUE when a signal or the time limit stopped it in good order. Raises OfficinaError
    for what the user can mend (DataError, with a checkpoint, when the conditions of use of the data end or too much of it is
    damaged) and NoProgressError where going on is useless; the last good checkpoint is intact.
    """
    began_s = time.monotonic()
    run = load_config(run_dir)
    with StopRequest() as stop, assemble(run_dir, run, ranks, began_s) as job:
        if job.step >= run.steps:
            job.progress.say(f"all {run.steps:,} steps are done; to go on: officina resume {run_dir} steps=N")
            return job.finish("done", EXIT_DONE)
        data = job.loader.next_step()
        step_tokens, stop_votes, late_votes, over_votes, damage = ranks.sum([
            data.loss_tokens, stop.wanted, job.time_left.is_over(), job.use_is_over(), data.damage])
        data = job.know_damage(data, damage)
        may_skip = run.objective.on_spike == "skip"
        clock = time.perf_counter()
        while job.step < run.steps and not (stop_votes or late_votes or over_votes or job.quarantine.is_over):
            factor = lr_factor(run.lr_schedule, job.step, run.steps)
            torch.manual_seed(_seed(run.seed, job.step, ranks.rank))  # dropout follows from the step, not from history
            # The end of a decay to 0 changes nothing, rightly; nor need a step without loss-bearing tokens.
            before = state_hashes(job.trained_state(), slots={PARAM}) if job.unchecked and factor else None
            job.profiler.step(job.step + 1)
            job.watch.step(job.step + 1)
            tokens = max(int(step_tokens), 1)
            skip = {"max_norm": job.norm_spikes.bound(), "is_spike": partial(_is_spike, job, tokens)} if may_skip else {}
            result = train_step(job.engine, data.micros, device=ranks.device, step_tokens=tokens, lr_factor=factor, **skip)
            job.step += 1
            following = job.loader.next_step() if job.step < run.steps else None

            # The one collective of a step beyond the engine's own.
            (loss_sum, digest, next_tokens, stop_votes, late_votes, over_votes, save_votes, peak_bytes, damage,
             *measures) = ranks.sum([
                result.loss_sum_nats, data.digest, following.loss_tokens if following else 0, stop.wanted,
                job.time_left.is_over(), job.use_is_over(), job.saver.pending_vote(), peak_memory_bytes(ranks.device),
                bool(following and following.damage), data.filled_tokens, *result.measured])
            step_time_s = time.perf_counter() - clock
            job.watch.stepped(step_time_s)

            job.position = data.stop_sample
            job.tokens += int(step_tokens) if result.applied else 0
            _record(job, data, result, tokens=int(step_tokens), loss_sum=loss_sum, digest=digest, lr_factor=factor,
                    step_time_s=step_time_s, data_wait_s=following.wait_s if following else 0.0,
                    peak_bytes=int(peak_bytes / ranks.world_size), measures=measures)
            if before is not None and result.applied and result.grad_norm:
                verify_changed(before, state_hashes(job.trained_state(), slots={PARAM}), ranks)
                job.unchecked = False
            job.saved(job.saver.settle(save_votes))

            last = job.step == run.steps
            following = following and job.know_damage(following, damage)
            stopping = stop_votes or late_votes or over_votes or job.quarantine.is_over
            if not stopping and (last or _due(job.step, run.eval.every_steps)):
                evaluate(job)
            if last or stopping or _due(job.step, run.checkpoint.every_steps):
                job.save(wait=bool(last or stopping))
            data, step_tokens = following, next_tokens
            clock = time.perf_counter()

        if job.step < run.steps:
            job.save(wait=True)  # a stop that came before the first step
            if over_votes:
                job.finish("conditions of use", EXIT_USER)
                raise DataError(f"stopped in good order after step {job.step:,}, with a checkpoint: {job.why_over()}")
            if job.quarantine.is_over:
                job.finish("damaged data", EXIT_USER)
                raise DataError(f"stopped in good order after step {job.step:,}, with a checkpoint: {job.why_damaged()}")
            how = "" if os.environ.get(SUPERVISED) else f"; to go on: officina resume {run_dir}"
            why = f"signal {stop.reason}" if stop.reason else "signal to another rank" if stop_votes else "time limit"
            job.progress.say(f"stopped in good order after step {job.step:,} ({why}){how}")
            return job.finish(why, EXIT_CONTINUE)
        return job.finish("done", EXIT_DONE)


def evaluate(job: Job) -> None:
    """Held-out loss of every source that has a validation split; the same rows whatever the number of ranks."""
    job.progress.phase("evaluating")
    references = job.references[job.run.data.validation_split]
    for found in held_out(job.engine, job.run, job.ranks, job.step, job.progress.say, references):
        job.write(found)
    job.progress.phase("")


def _record(job: Job, data: StepData, result: StepResult, *, tokens: int, loss_sum: float, digest: float,
            lr_factor: float, step_time_s: float, data_wait_s: float, peak_bytes: int, measures: Sequence[float]) -> None:
    """Metrics and ledger of one step; raises NoProgressError where going on is useless."""
    objective = job.run.objective
    loss = loss_sum / tokens if tokens else math.nan
    finite = math.isfinite(result.grad_norm) and (math.isfinite(loss) or not tokens)
    spike = tokens > 0 and job.loss_spikes.observe(loss) | job.norm_spikes.observe(result.grad_norm)
    filled, *measures = measures
    tokens_per_s = tokens / step_time_s
    mfu = [None, None]
    if job.flops and job.peak_flops:
        # A token that is only read costs as much as one that is trained on.
        mfu = [filled / step_time_s * flops / (job.peak_flops * job.ranks.world_size) for flops in job.flops]
    job.write(StepMetrics(
        step=job.step, tokens=tokens, loss_nats=loss, grad_norm=result.grad_norm, lr=job.run.optim.lr * lr_factor,
        step_time_s=step_time_s, data_wait_s=data_wait_s, tokens_per_s=tokens_per_s, applied=result.applied,
        spike=spike, filled_tokens=int(filled) or None, filled_tokens_per_s=filled / step_time_s if filled else None,
        mfu_causal=mfu[0], mfu_full=mfu[1], peak_memory_bytes=peak_bytes,
        **measured(beside(objective), measures, tokens)))
    if job.ledger is not None:
        job.ledger.write(job.step, data, digest)

    if not job.nonfinite_in_a_row or job.saved_step == job.step - 1:
        job.nonfinite_from = data.first_sample
    job.nonfinite_in_a_row = 0 if finite else job.nonfinite_in_a_row + 1
    kept = f", and the checkpoint of step {job.saved_step} is intact" if job.saved_step >= 0 else ""
    if job.nonfinite_in_a_row >= objective.max_nonfinite_steps:
        _give_up(
            job, f"loss or gradient norm was not finite in {job.nonfinite_in_a_row} steps in a row (up to step {job.step}, "
            f"loss {loss:g}, gradient norm {result.grad_norm:g}); none of them changed the model{kept}. "
            f"Try: officina resume {job.run_dir} optim.lr={job.run.optim.lr / 2:g}, or leave the samples out: "
            f"{_without(job, job.nonfinite_from, data.stop_sample)}")
    if spike and objective.on_spike == "stop":
        _give_up(
            job, f"step {job.step} is a spike (loss {loss:.4g}, gradient norm {result.grad_norm:.4g}) and "
            f"objective.on_spike=stop{kept}. Try: officina resume {job.run_dir} "
            f"{_without(job, data.first_sample, data.stop_sample)}, or objective.on_spike=flag")


def _give_up(job: Job, why: str) -> NoReturn:
    job.write(StopMetrics(step=job.step, reason="no progress", exit_status=EXIT_NO_PROGRESS))
    raise NoProgressError(why)


def _without(job: Job, first_sample: int, stop_sample: int) -> str:
    """The word that leaves these samples out too."""
    return f"'data.skip={as_text([*job.run.data.skip, [first_sample, stop_sample]])}'"


def _is_spike(job: Job, tokens: int, loss_sum: float) -> bool:
    """Whether the step's loss, of all ranks, is a spike: the same answer on each, for a collective of one number."""
    return job.ranks.sum([loss_sum])[0] / tokens > job.loss_spikes.bound()


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _seed(seed: int, step: int, rank: int) -> int:
    """One seed for each step and rank: splitmix64's finaliser over the three."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB + 1) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63
