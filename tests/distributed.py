"""Ranks for tests: real processes that talk over gloo, started once and kept, so that a distributed test costs milliseconds.

    pool.run(4, "tests.trainer.parallel.cases:train", config, steps=20)   ->   what each of the four ranks returned

The function is named, not shipped, and gets the rank's `Ranks` first. An exception in a rank comes back with the rank and its
traceback; if all ranks then answer they are kept, if one hangs or died all are started anew. No rank outlives its parent.
"""

import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 3.0
"""How long the other ranks may take to finish once one has failed."""


class RankFailure(AssertionError):
    """A rank raised, died or did not answer; the message names it and holds its traceback."""


class RankPool:
    """Up to `size` rank processes, started when first needed, with `environment` added to ours."""

    def __init__(self, size: int = 4, environment: Mapping[str, str] | None = None) -> None:
        self.size = size
        self._environment = environment or {}
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._ranks: list[tuple[subprocess.Popen, Connection]] = []
        self._world, self._worlds = 0, 0
        """Size of the present world, and how many there were: ranks outside of it must not take an old one for it."""

    def run(self, world_size: int, function: str, *args: Any, timeout_s: float = 300.0, **kwargs: Any) -> list[Any]:
        """Call `package.module:function` with (ranks, *args, **kwargs) on ranks 0 to world_size - 1; their results."""
        if world_size > self.size:
            raise ValueError(f"the pool has {self.size} ranks, {world_size} asked for")
        while len(self._ranks) < world_size:
            self._ranks.append(self._start(len(self._ranks)))
            self._world = 0
        if world_size != self._world:
            self._world, self._worlds = world_size, self._worlds + 1
        store = str(Path(self._folder.name) / f"store-{self._worlds}")
        for _, pipe in self._ranks[:world_size]:
            pipe.send((world_size, store, function, args, kwargs))
        return self._collect(world_size, function, time.monotonic() + timeout_s)

    def close(self) -> None:
        """End all ranks."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
        for process, _ in self._ranks:
            process.wait()
        self._ranks, self._world = [], 0

    def _collect(self, world_size: int, function: str, deadline: float) -> list[Any]:
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks[:world_size])}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        died = False
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    died, ok, value = True, False, f"died with exit status {self._ranks[rank][0].wait()}"
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures or waiting:
            if died or waiting:
                self.close()
            self._world = 0  # where all raised they live on, in a new world
            silent = f"\nno answer from rank {', '.join(map(str, waiting.values()))}" if waiting else ""
            raise RankFailure(f"{function} on {world_size} ranks:" + "".join(
                f"\nrank {rank}: {text}" for rank, text in sorted(failures.items())) + silent)
        return [results[rank] for rank in range(world_size)]

    def _start(self, rank: int) -> tuple[subprocess.Popen, Connection]:
        ours, theirs = Pipe()
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            **self._environment}
        process = subprocess.Popen(
            [sys.executable, "-c", f"from tests.distributed import serve; serve({rank}, {theirs.fileno()})"],
            pass_fds=[theirs.fileno()], env=environment, cwd=ROOT, start_new_session=True)
        theirs.close()
        return process, ours


def serve(rank: int, descriptor: int) -> None:
    """The life of a rank: take calls from the pipe until it is closed."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("tests.kernels.interpreter").remap_once()
    pipe = Connection(descriptor)
    joined = ""
    while True:
        try:
            wanted, store, function, args, kwargs = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if store != joined:
                _join_world(rank, wanted, store)
                joined = store
            answer = True, _resolve(function)(_ranks(rank, wanted), *args, **kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        gc.collect()
        gc.freeze()  # what is left, half a million objects of torch and DeepSpeed, stays: the next collection passes it over
        pipe.send(answer)


def _join_world(rank: int, world_size: int, store: str) -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size,
                                timeout=timedelta(seconds=240))


def _ranks(rank: int, world_size: int):
    import torch

    from officina.trainer.ranks import RankEnv, Ranks

    return Ranks(RankEnv(rank, rank, world_size, world_size, "officina"), torch.device("cpu"))


def _resolve(function: str):
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
