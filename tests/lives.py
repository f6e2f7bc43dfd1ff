"""Lives of a run inside the rank pool: the real loop on real shards, without starting a process for each."""

import math
import os
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from officina.trainer.config import (
    AdamWConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    LoggingConfig,
    LrScheduleConfig,
    RunConfig,
    SourceConfig,
)
from officina.trainer.run_dir import Start, append_history, load_config, new_run_id, read_run_id, save_config

DECODER = DecoderConfig(vocab_size=320, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64, qk_norm="head",
                        tie_embeddings=True)


def plain_run(data: Path, **changes) -> RunConfig:
    """8 steps of 7 rows: a number that no world size divides evenly."""
    run = RunConfig(
        name="life", steps=8, precision="fp32", device="cpu", threads=1, model=DECODER,
        data=DataConfig(sources={"text": SourceConfig(path=str(data))}),
        batch=BatchConfig(global_tokens=7 * 32, seq_len=32, micro_rows=2), optim=AdamWConfig(lr=1e-3, eps=1e-6),
        lr_schedule=LrScheduleConfig(warmup_steps=2), checkpoint=CheckpointConfig(every_steps=3, keep_last=3),
        logging=LoggingConfig(tensorboard=False))
    return replace(run, **changes)


def begin(run_dir: Path, run: RunConfig) -> None:
    """Make the run directory, or change the configuration of the one that is there, as the command line does."""
    run_dir.mkdir(parents=True, exist_ok=True)
    again = (run_dir / "config.yaml").exists()
    append_history(run_dir, Start(
        run_id=read_run_id(run_dir) or new_run_id(), action="resume" if again else "start", words=[], step=0,
        world_size=None, engine=run.engine.kind, commit=None))
    save_config(run, run_dir)


def live(ranks, run_dir: str, stop_after: int = 0, fault: str = "") -> int:
    """One rank's whole `loop.train`. stop_after: SIGTERM to the last rank during that step; fault: see `inject`."""
    from officina.trainer import loop

    undo = inject(fault, ranks.rank)
    record = loop._record

    def then_stop(job, *args, **kwargs):
        record(job, *args, **kwargs)
        if job.step == stop_after - 1 and ranks.rank == ranks.world_size - 1:
            os.kill(os.getpid(), 15)

    loop._record = then_stop
    try:
        return loop.train(Path(run_dir), ranks)
    finally:
        loop._record = record
        undo()


def live_on_disks_of_their_own(ranks, run_dir: str, folders: list[str]) -> int:
    """Each rank in its own working directory, where a relative path is another folder, as on the disks of nodes."""
    before = os.getcwd()
    os.chdir(folders[ranks.rank])
    try:
        return live(ranks, run_dir)
    finally:
        os.chdir(before)


def inject(fault: str, rank: int):
    """Break something the loop uses; returns the function that mends it."""
    from officina.trainer import assemble, loop, time_left
    from officina.trainer.data import loader
    from officina.trainer.parallel import engine

    if fault == "nan":  # on rank 0, from its third micro-batch on, the loss is no number
        real, calls = engine.build_engine, [0]

        def build(parts):
            def poisoned(module, fields):
                calls[0] += 1
                return parts.loss_fn(module, fields) * (math.nan if rank == 0 and calls[0] > 2 else 1.0)

            return real(replace(parts, loss_fn=poisoned))

        assemble.build_engine = build
        return lambda: setattr(assemble, "build_engine", real)
    if fault == "other weights":  # than the checkpoint's, one of them on rank 0
        real_fill = assemble._fill

        def fill(engine_, *args):
            found = real_fill(engine_, *args)
            if rank == 0:
                next(engine_.module.parameters()).data.view(-1)[0] += 1
            return found

        assemble._fill = fill
        return lambda: setattr(assemble, "_fill", real_fill)
    if fault == "shifted data":  # after a resume the data is one sample late
        real_init = loader.Loader.__init__

        def late(self, *args, **kwargs):
            kwargs["position"] += bool(kwargs["position"])
            real_init(self, *args, **kwargs)

        loader.Loader.__init__ = late
        return lambda: setattr(loader.Loader, "__init__", real_init)
    if fault == "slow data":  # the fifth step's comes 0.2 s after the loop began to wait for it
        real_step, real_next, waited_for = loader.Loader._read_step, loader.Loader.next_step, threading.Event()

        def read_step(self, position):
            if position == 4 * self._run.batch.rows:
                assert waited_for.wait(60)
                time.sleep(0.2)
            return real_step(self, position)

        def next_step(self):
            ready = self._ready
            if self._position == 4 * self._run.batch.rows:
                self._ready = SimpleNamespace(put=ready.put, get=lambda: (waited_for.set(), ready.get())[1])
            try:
                return real_next(self)
            finally:
                self._ready = ready

        loader.Loader._read_step, loader.Loader.next_step = read_step, next_step

        def undo():
            loader.Loader._read_step, loader.Loader.next_step = real_step, real_next

        return undo
    if fault == "conditions end":  # after step 4, and only by the clock of rank 1
        real_clock = assemble.Job.use_is_over
        assemble.Job.use_is_over = lambda job: job.deadline is not None and rank == 1 and job.step >= 4
        return lambda: setattr(assemble.Job, "use_is_over", real_clock)
    if fault == "job ends":  # after step 4, and only by the clock of rank 1
        real_watch = time_left.TimeLeft.is_over

        def is_over(self):
            if rank == 1 and self._turns == 4:
                self._end_s = time.time()
            return real_watch(self)

        time_left.TimeLeft.is_over = is_over
        return lambda: setattr(time_left.TimeLeft, "is_over", real_watch)
    if fault in ("full disk", "no inodes"):  # from step 2 to step 4
        real_record = loop._record

        def record(job, *args, **kwargs):
            real_record(job, *args, **kwargs)
            if rank == 0 and job.step == 1:
                spoil(job.run_dir, fault)
            if rank == 0 and job.step == 4:
                mend(job.run_dir)

        loop._record = record
        return lambda: setattr(loop, "_record", real_record)
    if fault:
        raise ValueError(fault)
    return lambda: None


def spoil(disk: Path, how: str) -> None:
    """Leave a small tmpfs without a free byte or without an inode."""
    with suppress(OSError):
        if how == "full disk":
            with open(disk / "filler", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        for i in range(1 << 16 if how == "no inodes" else 0):
            (disk / f"filler{i}").touch()


def mend(disk: Path) -> None:
    """Undo `spoil`."""
    for path in disk.glob("filler*"):
        path.unlink()


def copy_of(run_dir: Path, new: Path) -> Path:
    """The same run directory somewhere else, as a colleague would have it."""
    shutil.copytree(run_dir, new)
    return new


def changed(run_dir: Path, **changes) -> RunConfig:
    """Write the run's configuration anew with these changes and return it."""
    run = replace(load_config(run_dir), **changes)
    begin(run_dir, run)
    return run


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient norm), as metrics.jsonl has them."""
    from officina.trainer.metrics import read_metrics

    return {m.step: (m.loss_nats, m.grad_norm) for m in read_metrics(run_dir).steps}


def states(run_dir: Path, step: int) -> dict[tuple[str, str], "object"]:
    """(name, slot) -> the whole tensor of a checkpoint."""
    from officina.trainer.checkpoint.read import open_checkpoint

    with open_checkpoint(run_dir, step=step) as opened:
        return {(name, slot): opened.read(name, slot, 0, math.prod(shape))
                for name, (shape, slots) in opened.tensors().items() for slot in slots}

