"""Everything that a run is made of, put together on one rank: what `loop.train` works with."""

import hashlib
import json
import math
import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from officina.trainer.checkpoint.content import verify_loaded
from officina.trainer.checkpoint.layout import TrainState
from officina.trainer.checkpoint.read import OpenCheckpoint, open_checkpoint
from officina.trainer.checkpoint.write import SaveOutcome, Saver
from officina.trainer.config import RunConfig
from officina.trainer.data.chat import ANSWER_ENDS, CHAT_TEMPLATE
from officina.trainer.data.gate import deadline, use_problems
from officina.trainer.data.integrity import Quarantine, open_quarantine
from officina.trainer.data.ledger import Ledger
from officina.trainer.data.loader import Loader, StepData
from officina.trainer.data.register import Going, Uses
from officina.trainer.environment import describe, device_facts, rank_facts, write_environment
from officina.trainer.errors import EXIT_DONE, CheckpointError, DataError
from officina.trainer.initial import all_weights, content_of, hex_sums, initial_adapter, initial_weights, keep_tokenizer
from officina.trainer.loggers import Trackers, open_trackers
from officina.trainer.metrics import (
    EvalMetrics,
    MetricsWriter,
    SaveMetrics,
    StartMetrics,
    StepMetrics,
    StopMetrics,
)
from officina.trainer.model.build import Built, build_model
from officina.trainer.model.flops import flops_per_token
from officina.trainer.model.peaks import peak_bf16_flops
from officina.trainer.parallel.engine import Engine, Parts, build_engine, resolve_precision
from officina.trainer.parallel.precision import storage_dtype
from officina.trainer.preference import References, references
from officina.trainer.profile import Profiler
from officina.trainer.progress import Progress
from officina.trainer.ranks import Ranks
from officina.trainer.run_dir import committed_steps, read_history, read_run_id
from officina.trainer.schema import dump_run
from officina.trainer.spikes import SpikeDetector
from officina.trainer.stall import Watch
from officina.trainer.state import Piece
from officina.trainer.time_left import TimeLeft


@dataclass(slots=True)
class Job:
    """One rank's run in progress. Rank 0 alone writes; the others hold the same counters."""

    run: RunConfig
    run_dir: Path
    ranks: Ranks
    engine: Engine
    loader: Loader
    saver: Saver
    profiler: Profiler
    progress: Progress
    metrics: MetricsWriter | None
    ledger: Ledger | None
    uses: Uses | None
    """Registers of data sets with a maximum of use."""
    quarantine: Quarantine
    """Damaged blocks of the data that are set aside."""
    deadline: tuple[datetime, str] | None
    """When the use of the data ends, and the source that says so."""
    trackers: Trackers
    time_left: TimeLeft
    watch: Watch
    loss_spikes: SpikeDetector
    norm_spikes: SpikeDetector
    flops: tuple[float, float] | None
    """Training FLOPs per token, attention counted causally and in full; None for custom models."""
    peak_flops: float | None
    frozen: Mapping[str, str]
    """Frozen weights, which a checkpoint names by the hash of their values."""
    data_fingerprints: Mapping[str, str]
    """Of the data sets that gave rows to the run, or will, by source."""
    references: References
    """DPO: log-probabilities under the model that the run began with."""
    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Loss-bearing tokens trained on."""
    position: int = 0
    """Global sample index of the next sample."""
    nonfinite_in_a_row: int = 0
    nonfinite_from: int = 0
    """Global sample index at which that row of steps begins, or the newest checkpoint within it."""
    saved_step: int = -1
    """Step of the newest checkpoint."""
    unchecked: bool = True
    """No step of this start has yet been seen to change the parameters."""

    def write(self, record: StepMetrics | EvalMetrics | SaveMetrics | StartMetrics | StopMetrics) -> None:
        """To metrics.jsonl, the trackers, the terminal and, of a step, the registers of use; rank 0 only."""
        if self.metrics is None:
            return
        self.metrics.write(record)
        if isinstance(record, StepMetrics | EvalMetrics):
            self.trackers.write(record)
        if isinstance(record, StepMetrics):
            self.progress.update(record)
            self._count_use()
        elif isinstance(record, EvalMetrics):
            self.progress.evaluated(record)
        elif isinstance(record, SaveMetrics) and record.problem:
            self.progress.say(f"checkpoint of step {record.step} was not written, training goes on: {record.problem}")

    def train_state(self) -> TrainState:
        """What a checkpoint holds besides the engine's state."""
        return TrainState(
            step=self.step, tokens=self.tokens, position=self.position, optimizer_steps=self.engine.optimizer_steps,
            loader=self.loader.state(self.position), rng={"scheme": "seed, step and rank", "seed": self.run.seed},
            config_fingerprint=fingerprint(self.run), data_fingerprints=self.data_fingerprints,
            spikes={"loss": self.loss_spikes.state(), "grad_norm": self.norm_spikes.state()}, frozen=self.frozen)

    def trained_state(self) -> Iterator[Piece]:
        """This rank's share of what a checkpoint holds of the engine."""
        return _trained(self.engine, self.frozen)

    def save(self, *, wait: bool) -> None:
        """Write a checkpoint of this step; `wait`: return only when it is committed or has failed."""
        if self.saved_step == self.step:
            return
        self.progress.phase("saving")
        self._count_use(now=True)
        if wait:
            self.saved(self.saver.wait())
        before = None if self.ledger is None else self.ledger.sync
        self.saved(self.saver.save(self.step, self.trained_state(), self.train_state(), before))
        if wait:
            self.saved(self.saver.wait())
        self.progress.phase("")

    def use_is_over(self) -> bool:
        """Has the time ended in which the data may be used?"""
        return self.deadline is not None and datetime.now(UTC) >= self.deadline[0]

    def why_over(self) -> str:
        """What ended, and how the run could go on."""
        moment, source = self.deadline or (datetime.now(UTC), "")
        path = self.run.data.sources[source].path
        return (f"data.sources.{source} may be used until {moment.isoformat()} only. With new conditions from the provider: "
                f"officina data describe {path} --policy FILE, then officina resume {self.run_dir}. Without the source: "
                f"officina resume {self.run_dir} '~data.sources.{source}'")

    def know_damage(self, data: StepData, found: float) -> StepData:
        """`data` with the lost blocks that any rank met in the step; what is new is said once."""
        data, news = self.quarantine.agree(data, found, self.ranks)
        for text in news:
            self.progress.say(text)
        return data

    def why_damaged(self) -> str:
        """Which blocks are lost, and how the run could go on."""
        return self.quarantine.why_over({name: source.path for name, source in self.run.data.sources.items()})

    def _count_use(self, *, now: bool = False, done: bool = False) -> None:
        """Say what was read: at the first step, every few minutes, and `now`."""
        if self.uses is not None:
            try:
                if now:
                    self.uses.record(self.position, done=done)
                else:
                    self.uses.step(self.position)
            except OSError as error:  # the run is worth more than a count that is soon repeated
                self.progress.say(f"the register of use could not be written ({error}); it is tried again later")

    def saved(self, outcome: SaveOutcome | None) -> None:
        """Take in how a save ended; nothing to do while it goes on in the background."""
        if outcome is None or outcome.status == "pending":
            return
        if outcome.status == "saved":
            self.saved_step = outcome.step
            self.time_left.saved(outcome.durable_s)
        if outcome.note:
            self.progress.say(outcome.note)
        self.write(SaveMetrics(
            step=outcome.step, path=f"checkpoints/step-{outcome.step:08d}", bytes=outcome.bytes,
            stall_s=outcome.stall_s, durable_s=outcome.durable_s, problem=outcome.problem))

    def finish(self, reason: str, exit_status: int) -> int:
        """The orderly end. Raises CheckpointError if what was trained could not be saved."""
        self._count_use(now=True, done=exit_status == EXIT_DONE)
        self.write(StopMetrics(step=self.step, reason=reason, exit_status=exit_status))
        self.trackers.close(exit_status)
        if self.saved_step != self.step:
            newest = max(committed_steps(self.run_dir), default=None)
            raise CheckpointError(
                f"step {self.step} could not be saved (the reason is above and in {self.run_dir}/metrics.jsonl); "
                f"the newest checkpoint is {'none' if newest is None else f'of step {newest}'}. "
                f"Mend that, then: officina resume {self.run_dir}")
        return exit_status


@contextmanager
def assemble(run_dir: Path, run: RunConfig, ranks: Ranks, began_s: float) -> Iterator[Job]:
    """Build the job on this rank and load its newest whole checkpoint; take everything down again at the end.

    began_s: time.monotonic() when the training began, from which the run's time limit counts.
    """
    with ExitStack() as stack:
        rank0 = ranks.rank == 0
        precision = resolve_precision(run.precision, ranks.device)
        built = build_model(run)
        shapes = built.shapes  # an engine may hide them
        trained = built.trained
        engine = build_engine(Parts(run, ranks, built.module, built.loss_fn, precision))
        stack.callback(engine.close)

        opened = _newest_checkpoint(run_dir, ranks)
        if opened is not None and opened.passed_over:
            _judge_again(run_dir, run, opened, ranks)
        state, frozen = _fill(engine, run, run_dir, built, shapes, opened, ranks, stack)
        if opened is not None:
            verify_loaded(partial(_trained, engine, frozen), opened, ranks, held=storage_dtype(precision))

        loader = stack.enter_context(Loader(run, rank=ranks.rank, world_size=ranks.world_size, position=state.position,
                                            device=ranks.device))
        _refuse_other_data(loader, ranks)
        if state.loader:
            loader.check_state(dict(state.loader))
        window, sigma = run.objective.spike_window, run.objective.spike_sigma
        spikes = {name: SpikeDetector(window, sigma) for name in ("loss", "grad_norm")}
        for name, values in state.spikes.items():
            spikes[name].load(values)

        progress = stack.enter_context(Progress(run.steps, state.step, enabled=rank0, stream=sys.stdout,
                                                unit="tok" if run.batch_unit == "tokens" else run.batch_unit))
        known = references(run, run_dir, engine, ranks, fresh=opened is None, say=progress.say)
        loader.refer(known[run.data.split])
        metrics = stack.enter_context(MetricsWriter(run_dir, say=progress.say)) if rank0 else None
        job = Job(
            run=run, run_dir=run_dir, ranks=ranks, engine=engine, loader=loader,
            saver=Saver(run_dir, ranks, run.checkpoint, read_run_id(run_dir), damaged=opened.damaged if opened else ()),
            profiler=stack.enter_context(Profiler(run.profile, run_dir, ranks.rank, say=progress.say)),
            progress=progress, metrics=metrics, ledger=stack.enter_context(Ledger(run_dir)) if rank0 else None,
            uses=Uses(run, read_run_id(run_dir), state.position) if rank0 else None,
            quarantine=open_quarantine(run, run_dir, state.step, loader.blocks, ranks),
            deadline=deadline(run, state.position),
            trackers=stack.enter_context(
                open_trackers(run, run_dir, rank=ranks.rank, start_step=state.step, say=progress.say)),
            time_left=TimeLeft(time_limit_s=run.time_limit, began_s=began_s, unknown_save_s=run.site.grace, run_dir=run_dir,
                               launcher=ranks.env.launcher),
            watch=stack.enter_context(
                Watch(run_dir, ranks.env, stall_after_s=run.stall_after, on_gpu=ranks.device.type == "cuda")),
            loss_spikes=spikes["loss"], norm_spikes=spikes["grad_norm"], flops=_flops(run),
            peak_flops=_peak(ranks, precision), frozen=frozen, references=known,
            data_fingerprints=dict(sorted({**state.data_fingerprints, **loader.fingerprints}.items())),
            step=state.step, tokens=state.tokens, position=state.position,
            saved_step=state.step if opened is not None else -1)
        job.saver.prepare(job.trained_state())
        counts = [sum(math.prod(shapes[name]) for name in names) for names in (shapes, trained)]
        _announce(job, precision, *counts, opened)
        if opened is not None:
            opened.close()
        yield job


def _refuse_other_data(loader: Loader, ranks: Ranks) -> None:
    """A path may be another disk on each node, and every rank must read what rank 0 reads. Raises DataError on all of them."""
    content = json.dumps([loader.fingerprints, loader.removals], sort_keys=True).encode()
    everyone = [text.split() for text in ranks.gather_text(f"{hashlib.sha256(content).hexdigest()} {socket.gethostname()}")]
    for rank, (found, host) in enumerate(everyone):
        if found != everyone[0][0]:
            raise DataError(f"data.sources: rank {rank} on {host} finds other data, or other lists of removed documents, at "
                            f"these paths than rank 0 on {everyone[0][1]}. Put the same data sets on both (officina data "
                            "stage), or name paths on a file system that they share")


def _fill(engine: Engine, run: RunConfig, run_dir: Path, built: Built, shapes: Mapping[str, tuple[int, ...]],
          opened: OpenCheckpoint | None, ranks: Ranks, stack: ExitStack) -> tuple[TrainState, Mapping[str, str]]:
    """Fill the engine from the checkpoint, or from the beginning. Returns the train state, and the frozen weights by hash."""
    adapters = built.adapters.fills if built.adapters else {}
    model = {name: shape for name, shape in shapes.items() if name not in adapters}
    frozen = {name: shapes[name] for name in built.frozen}
    trained = {name: shape for name, shape in shapes.items() if name not in frozen}
    if opened is None:
        with initial_weights(run, built.first, run_dir, model, ranks) as base:
            sums = content_of(base, frozen, ranks)
            first = initial_adapter(run, base, built.adapters, sums, trained, ranks) if built.adapters else nullcontext(base)
            with first as values:
                engine.import_state(built.held(values), optimizer_steps=None)
            return TrainState(step=0), hex_sums(sums)
    stack.enter_context(opened)
    state = opened.train_state
    opened.check_fits(trained)
    if not frozen:
        engine.import_state(opened, optimizer_steps=state.optimizer_steps)
        return state, {}
    with all_weights(run_dir, opened, ranks) as source:
        engine.import_state(built.held(source), optimizer_steps=state.optimizer_steps)
    return state, state.frozen


def _trained(engine: Engine, frozen: Mapping[str, str]) -> Iterator[Piece]:
    """The engine's state without the weights that are kept by reference."""
    return engine.export_state(without=frozen)


def _newest_checkpoint(run_dir: Path, ranks: Ranks) -> OpenCheckpoint | None:
    """The newest whole checkpoint of this run; None before the first save."""
    [started] = ranks.sum([float(ranks.rank == 0 and bool(committed_steps(run_dir)))])
    if not started:
        return None
    return open_checkpoint(run_dir, ranks=ranks, run_id=read_run_id(run_dir))


def _judge_again(run_dir: Path, run: RunConfig, opened: OpenCheckpoint, ranks: Ranks) -> None:
    """From an older checkpoint than the one that was planned with, the run reads samples of an earlier mixture again, for which
    nobody asked the conditions of use. Raises DataError on every rank if they are not kept."""
    told, history = "", read_history(run_dir)
    planned = int(history[-1]["step"]) if history else 0
    if ranks.rank == 0 and planned > opened.step:
        going = Going(read_run_id(run_dir), opened.step, opened.train_state.position, run_dir=run_dir)
        if found := use_problems(run, going):
            rules = "\n".join(f"  - {each.rule}" for each in found)
            told = (f"the run goes on from step {opened.step}, not as planned from step {planned} ({opened.passed_over[0]}), "
                    f"and would use data there whose conditions do not allow it:\n{rules}\nRestore the checkpoint from a copy; "
                    "or, with new conditions from the provider (officina data describe DATASET --policy FILE), go on from the "
                    f"older one: officina resume {run_dir}")
    if told := ranks.broadcast_text(told):
        raise DataError(told)


def fingerprint(run: RunConfig) -> str:
    """Hash of the whole configuration: says whether two starts were asked for the same."""
    return hashlib.sha256(json.dumps(dump_run(run), sort_keys=True).encode()).hexdigest()[:16]


def peak_memory_bytes(device: torch.device) -> int:
    """Highest allocation on the GPU so far; on the CPU the highest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _flops(run: RunConfig) -> tuple[float, float] | None:
    if run.model.kind != "decoder":
        return None
    causal, full = (flops_per_token(run.model, run.batch.seq_len, causal=causal, adapter=run.adapter)
                    for causal in (True, False))
    return causal, full


def _peak(ranks: Ranks, precision: str) -> float | None:
    """Peak of one device, for MFU; the table is of bf16 rates, so fp32 runs have none."""
    if ranks.device.type != "cuda" or precision == "fp32":
        return None
    return peak_bf16_flops(torch.cuda.get_device_name(ranks.device))


def _announce(job: Job, precision: str, parameters: int, trained: int, opened: OpenCheckpoint | None) -> None:
    """Say and record what starts here, and on what."""
    run, ranks = job.run, job.ranks
    facts = [json.loads(text) for text in ranks.gather_text(json.dumps(rank_facts(ranks.rank, ranks.env.local_rank)))]
    if ranks.rank != 0:
        return
    modules = []
    if run.model.kind == "custom":
        modules = [path.partition(":")[0] for path in (run.model.factory, run.model.loss, run.model.decoder)]
    write_environment(job.run_dir, describe(
        launcher=ranks.env.launcher, threads=torch.get_num_threads(), device=device_facts(), ranks=facts, modules=modules))
    _keep_tokenizer(job)
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    history = read_history(job.run_dir)
    causal, full = job.flops or (None, None)
    job.write(StartMetrics(
        step=job.step, action=str(history[-1]["action"]) if history else "start", engine=run.engine_name,
        world_size=ranks.world_size, device=device, precision=precision, parameters=parameters, trained_parameters=trained,
        flops_per_token_causal=causal, flops_per_token_full=full, peak_flops=job.peak_flops,
        checkpoint=opened and f"checkpoints/{opened.path.name}", problems=opened.passed_over if opened else ()))
    for problem in opened.passed_over if opened else ():
        job.progress.say(f"not taken: {problem}")
    from_step = f" from step {job.step:,}" if job.step else ""
    why = ""
    if run.precision == "auto":
        why = " (this processor has no bf16 arithmetic)" if precision == "fp32" else " (the hardware has it)"
    part = f" ({trained / 1e6:,.1f}M of them trained)" if trained < parameters else ""
    job.progress.say(f"{run.name}{from_step}: {parameters / 1e6:,.1f}M parameters{part}, {run.engine_name} on "
                     f"{ranks.world_size} rank{'s' * (ranks.world_size > 1)} ({device}), {precision}{why}, "
                     f"{run.batch.rows * run.batch.seq_len:,} {run.batch_unit} a step")


def _keep_tokenizer(job: Job) -> None:
    """Copy the data's tokenizer and chat template beside the run, so that a checkpoint can be used without the data set."""
    templates = [path for source in job.run.data.sources.values() if (path := Path(source.path) / CHAT_TEMPLATE).exists()]
    if templates:
        shutil.copyfile(templates[0], job.run_dir / CHAT_TEMPLATE)
    if ends := job.loader.answer_ends():
        (job.run_dir / ANSWER_ENDS).write_text("\n".join(ends) + "\n", encoding="utf-8")
    for source in job.run.data.sources.values():
        found = Path(source.path) / "tokenizer.json"
        if found.exists():
            shutil.copyfile(found, job.run_dir / "tokenizer.json")
            return
    if problem := keep_tokenizer(job.run_dir):
        job.progress.say(f"the run has no tokenizer: {problem}")
