"""Fair timing of programs that own their loop: each lives in its own processes, and only one of them runs at a time.

A training loop cannot be called for ten steps and left standing, so each entrant is a whole program that asks at the
beginning of every step whether it may go on. It runs a block of steps, says how long they took, and waits while the
others have their turn. So a slow minute of the machine meets all of them alike, and nothing is rebuilt in between.
"""

import math
import multiprocessing
import multiprocessing.connection
import os
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from officina.trainer.rank_env import LONE, RankEnv

FEWEST = 5
"""Turns without which a ratio has no interval."""
PRELOAD = ["torch", "torch.distributed.fsdp", "officina.trainer.loop"]
"""What entrants on the CPU find imported: a fork from a warm process starts in milliseconds instead of seconds."""


class Finished(Exception):
    """Raised in an entrant's loop, at the beginning of a step, when no further block is wanted."""


class Turns:
    """An entrant's side. `at_step` stands at the beginning of every step of its loop.

    A block is `lead` steps that warm it up again, untimed, and then `steps` timed ones.
    """

    def __init__(self, connection: Connection, *, lead: int, steps: int) -> None:
        self._connection, self._lead, self._steps = connection, lead, steps
        self._count, self._began_s, self._began_cpu_s = 0, 0.0, 0.0
        self.facts: dict[str, Any] = {}
        """What the entrant wants to say of the timed steps so far; emptied when they begin."""

    def at_step(self) -> None:
        """Go on, or wait for the next turn. Raises Finished."""
        place = self._count % (self._lead + self._steps)
        if place == 0:
            if self._count:
                seconds = self._now() - self._began_s
                self._connection.send(("block", seconds, self._own_facts()))
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # room for the others
            else:
                self._connection.send(("ready", 0.0, {}))
            if self._connection.recv() != "go":
                raise Finished
        if place == self._lead:
            self.facts.clear()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self._began_s, self._began_cpu_s = self._now(), time.process_time()
        self._count += 1

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _own_facts(self) -> dict[str, Any]:
        peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}
        # What this process computed, whoever else wants the processor meanwhile.
        return {"cpu_s": time.process_time() - self._began_cpu_s} | peak | self.facts


@dataclass(frozen=True, slots=True)
class Entrant:
    """A program: `work(turns, env)` runs in each of its processes, one a rank, until Finished comes out of it."""

    work: Callable[[Turns, RankEnv], None]
    """Picklable: a function at the top of a module, or a `functools.partial` of one."""
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Block:
    """One timed block of one entrant, as its rank 0 saw it."""

    seconds: float
    facts: dict[str, Any]


def race(entrants: Mapping[str, Entrant], *, blocks: int, steps: int, lead: int = 2, warmup: int = 1,
         alternate: bool = True, timeout_s: float = 600.0) -> dict[str, list[Block]]:
    """Time each entrant for `blocks` blocks of `steps` steps, after `warmup` blocks that do not count.

    alternate: all live at once and take turns, each second round in the opposite order; false: one after the other, where
    memory holds only one. Raises RuntimeError with the traceback of an entrant that failed, TimeoutError after `timeout_s`;
    from FEWEST turns on a slow machine takes fewer instead.
    """
    deadline = time.monotonic() + timeout_s
    if not alternate:
        return {name: race({name: entrant}, blocks=blocks, steps=steps, lead=lead, warmup=warmup,
                           timeout_s=deadline - time.monotonic())[name] for name, entrant in entrants.items()}
    started: dict[str, _Running] = {}
    found: dict[str, list[Block]] = {name: [] for name in entrants}
    try:
        for name, entrant in entrants.items():
            started[name] = _Running(name, entrant, lead, steps)
            started[name].receive(deadline)  # one at a time: starting is heavy
        begun = time.monotonic()
        for turn in range(warmup + blocks):
            needed = (time.monotonic() - begun) / max(1, turn)
            if turn - warmup >= FEWEST and len(started) > 1 and time.monotonic() + 1.5 * needed > deadline:
                break
            for name in list(started)[::-1 if turn % 2 else 1]:
                started[name].tell("go")
                block = started[name].receive(deadline)
                if turn >= warmup:
                    found[name].append(block)
        return found
    finally:
        for running in started.values():
            running.end()


def blocks_in(results: Mapping[str, Mapping[str, Any]]) -> int:
    """Blocks that each entrant has in the results of every precision, for the record."""
    return min(len(speed["values"]) for result in results.values() for speed in result["tokens_per_s"].values())


def compare(found: Mapping[str, list[Block]], ours: str, theirs: str) -> dict[str, Any]:
    """Speed of `ours` relative to `theirs`, block by neighbouring block: > 1 is faster."""
    ratios = [b.seconds / a.seconds for a, b in zip(found[ours], found[theirs], strict=True)]
    low, high = median_interval(ratios)
    return {"median": statistics.median(ratios), "low": low, "high": high, "values": ratios}


def median_interval(values: list[float]) -> tuple[float, float]:
    """Where the true median lies with 90 % confidence (sign test); the extremes if there are fewer than 5 values."""
    ordered, n = sorted(values), len(values)
    k, tail = 0, 2.0**-n  # tail = P(Binomial(n, 1/2) <= k): that of the median lying below the k-th smallest, from 0
    while tail + math.comb(n, k + 1) * 2.0**-n <= 0.05:
        k += 1
        tail += math.comb(n, k) * 2.0**-n
    return ordered[k], ordered[n - 1 - k]


class _Running:
    """The processes of one entrant, from the outside."""

    def __init__(self, name: str, entrant: Entrant, lead: int, steps: int) -> None:
        # CUDA does not outlive a fork; on the CPU a fork from one warm process spares each entrant its imports.
        method = "spawn" if torch.cuda.is_available() else "forkserver"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(PRELOAD)
        self.name, self.connections, self.processes = name, [], []
        envs = _local_envs(entrant.ranks)
        for env in envs:
            mine, its = context.Pipe()
            process = context.Process(target=_child, args=(entrant.work, env, its, lead, steps))
            process.start()
            its.close()
            self.connections.append(mine)
            self.processes.append(process)

    def tell(self, word: str) -> None:
        for connection in self.connections:
            connection.send(word)

    def receive(self, deadline: float) -> Block:
        """Every rank's message; rank 0's is returned."""
        waiting, answers = dict(enumerate(self.connections)), {}
        while waiting:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} did not finish its steps in the time that was left for it")
            ready = multiprocessing.connection.wait(waiting.values(), timeout=1.0)
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                try:
                    kind, seconds, facts = waiting.pop(rank).recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} of {self.name} ended without a word") from None
                if kind == "failed":
                    raise RuntimeError(f"rank {rank} of {self.name} failed:\n{facts['traceback']}")
                answers[rank] = Block(seconds, facts)
        return answers[0]

    def end(self) -> None:
        for connection in self.connections:
            connection.close()  # a waiting entrant reads the end of the pipe and leaves
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _child(work: Callable[[Turns, RankEnv], None], env: RankEnv, connection: Connection, lead: int, steps: int) -> None:
    with open(os.devnull, "w") as nowhere:  # progress lines are part of a run's work, but not of a benchmark's output
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        work(Turns(connection, lead=lead, steps=steps), env)
    except (Finished, EOFError):
        pass
    except BaseException:
        connection.send(("failed", 0.0, {"traceback": traceback.format_exc()}))
    os._exit(0)  # at exit libraries wait for ranks that may be gone


def _local_envs(n: int) -> list[RankEnv]:
    if n == 1:
        return [LONE]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [RankEnv(rank, rank, n, n, "none", master_port=port) for rank in range(n)]
