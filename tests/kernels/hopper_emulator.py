"""Runs the source of a Gluon kernel for Hopper on the CPU, as far as it can be without one: Gluon has no interpreter.

    with mock.patch.object(flash_attention_hopper, "forward_kernel", Emulated(kernel, seed=1)): ...

Each partition of `warp_specialize` is a thread, of which one runs at a time. At every barrier, copy and product a random one
goes on, or a copy or a product that was begun is carried out: each seed is another order of events that hardware may choose.
Barriers count arrivals, bytes and phases as PTX says (mbarrier). What hardware would let pass in silence is an error:
a buffer overwritten while it is read, or read before it is filled, registers reused under a product, a result used before it is
waited for, a write without the fence between the two proxies, arrivals beyond the count, all waiting for each other.

Numbers are torch's, products are added in fp32. Layouts and registers are not modelled: tests of the compiler see to those.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Emulated:
    """In a kernel's place: `kernel[grid](...)` runs every program. seed: of the order of events."""

    def __init__(self, kernel: Any, seed: int = 0) -> None:
        self.arg_names, self._kernel, self._seed = kernel.arg_names, kernel, seed

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            given = dict(zip(self.arg_names, map(_on_device, arguments), strict=False))
            given |= {name: value for name, value in constants.items() if name in self.arg_names}
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # tiles are small: sharing them out takes longer than the sums
            try:
                for program in range(grid[0]):
                    machine = _Machine(random.Random(f"{self._seed} {program}"))
                    _rebuilt(self._kernel.fn, _language(machine, program, grid[0]), {})(**given)
                    machine.end()
            finally:
                torch.set_num_threads(threads)
        return launch


def _on_device(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _Pointer(argument.view(-1), 0)
    return _Descriptor(argument) if hasattr(argument, "block_shape") else argument


def _rebuilt(function: FunctionType, language: dict[str, Any], done: dict[FunctionType, FunctionType]) -> FunctionType:
    """The function with another language: all that it calls rebuilt too."""
    if function not in done:
        names: dict[str, Any] = {}
        done[function] = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
        for name, value in function.__globals__.items():
            inner = getattr(value, "fn", None)
            names[name] = language.get(name, _rebuilt(inner, language, done) if isinstance(inner, FunctionType) else value)
    return done[function]


class _Stopped(Exception):
    """Another partition has failed."""


class _Machine:
    """Partitions and what they have begun, in an order drawn at random."""

    def __init__(self, order: random.Random) -> None:
        self.order, self.events, self.error = order, [], None
        self._turn, self._local, self._stopped = threading.Semaphore(0), threading.local(), False

    @property
    def me(self) -> Any:
        """The partition that runs."""
        return self._local.task

    def run(self, functions: list[Callable[[], None]]) -> None:
        tasks = [SimpleNamespace(go=threading.Semaphore(0), ready=lambda: True, products=[], stores=0) for _ in functions]
        pairs = zip(tasks, functions, strict=True)
        threads = [threading.Thread(target=self._partition, args=pair, daemon=True) for pair in pairs]
        for thread in threads:
            thread.start()
        live, lazy = list(tasks), self.order.random() < 0.5  # lazy: what was begun is done when nobody can go on
        slow_stores = self.order.random() < 0.5
        while live and self.error is None:
            tasks_able = [task for task in live if task.ready()]
            events_able = [event for event in self.events if event.ready()]
            if slow_stores:
                events_able = [event for event in events_able if not event.is_store] or events_able
            able = tasks_able if lazy and tasks_able else tasks_able + events_able
            if not able:
                self.error = AssertionError("all partitions wait for each other")
                break
            chosen = self.order.choice(able)
            if chosen in self.events:
                self.events.remove(chosen)
                chosen.run()
                continue
            chosen.go.release()
            self._turn.acquire()
            live = [task for task in live if task.ready is not None]
        self._stopped = bool(self.error)
        for task in live:
            task.go.release()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error

    def _partition(self, task: Any, function: Callable[[], None]) -> None:
        self._local.task = task
        try:
            self._wait(task)
            function()
        except _Stopped:
            pass
        except BaseException as error:
            self.error = self.error or error
        task.ready = None
        self._turn.release()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on until `ready`."""
        task = self.me
        task.ready = ready
        self._turn.release()
        self._wait(task)

    def _wait(self, task: Any) -> None:
        task.go.acquire()
        if self._stopped:
            raise _Stopped

    def begin(self, run: Callable[[], None], ready: Callable[[], bool] = lambda: True, is_store: bool = False) -> None:
        self.events.append(SimpleNamespace(run=run, ready=ready, is_store=is_store))
        self.pause()

    def end(self) -> None:
        assert not self.events, "the program ends while a copy or a product is under way"


class _Pointer:
    def __init__(self, values: Tensor, offset: Any) -> None:
        self.values, self.offset = values, offset

    def __add__(self, other: Any) -> _Pointer:
        return _Pointer(self.values, self.offset + other)


class _Descriptor:
    """What a kernel sees of a tensor descriptor, and the tensor behind it."""

    def __init__(self, host: Any) -> None:
        self.tensor = host.base.as_strided(host.shape, host.strides, host.base.storage_offset())
        size = torch.Size(host.block_shape).numel() * host.base.element_size()
        self.block_type = SimpleNamespace(shape=host.block_shape, nbytes=size)
        self.dtype, self.layout = host.base.dtype, host.layout

    def tile(self, place: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where a tile lies in the tensor, and that part within the tile."""
        assert all(type(at) is int and at >= 0 for at in place), f"coordinates {place}"
        assert place[-1] * self.tensor.element_size() % 16 == 0, f"column {place[-1]} does not begin at a multiple of 16 bytes"
        ends = [min(at + n, size) for at, n, size in zip(place, self.block_type.shape, self.tensor.shape, strict=True)]
        lengths = [max(0, end - at) for at, end in zip(place, ends, strict=True)]
        return tuple(slice(at, at + n) for at, n in zip(place, lengths, strict=True)), tuple(slice(0, n) for n in lengths)


class _Shared:
    """Shared memory, or a view of it; `cell` is what is known of the buffer that it lies in."""

    def __init__(self, values: Tensor, cell: Any, cells: list[Any]) -> None:
        self.values, self.cell, self._cells = values, cell, cells
        self.shape, self.dtype = list(values.shape), values.dtype

    def index(self, i: int) -> _Shared:
        return _Shared(self.values[i], self._cells[i], [])

    def reshape(self, shape: list[int]) -> _Shared:
        return _Shared(self.values.view(shape), self.cell, [])

    def permute(self, order: tuple[int, ...]) -> _Shared:
        return _Shared(self.values.permute(order), self.cell, [])

    def store(self, value: Tensor) -> None:
        cell = self.cell
        assert not cell.copies and not cell.readers, "written while it is read or copied to"
        self.values.copy_(value)
        cell.filled = cell.unfenced = True

    def load(self, layout: Any) -> Tensor:
        assert self.cell.filled and not self.cell.copies, "read before it is filled"
        return self.values.clone()


class _Product:
    """A product that was begun."""

    def __init__(self, registers: Tensor | None) -> None:
        self.registers, self.value = registers, None


def _language(machine: _Machine, program: int, programs: int) -> dict[str, Any]:
    """By the names that kernels give them."""
    shared: list[Any] = []

    def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> _Shared:
        cells = [SimpleNamespace(copies=0, readers=0, filled=False, unfenced=False, barrier=None) for _ in range(shape[0])]
        shared.extend(cells)
        return _Shared(torch.zeros(shape, dtype=dtype).fill_(torch.nan if dtype.is_floating_point else 0), None, cells)

    def specialize(partitions: Any, warps: list[int], registers: list[int]) -> None:
        assert len(partitions) == len(warps) + 1 == len(registers) + 1
        machine.run([lambda function=function, given=given: function(*given) for function, given in partitions])

    # -- barriers
    def init(bar: _Shared, count: int) -> None:
        bar.cell.barrier, bar.cell.unfenced = SimpleNamespace(count=count, left=count, bytes=0, phase=0), True

    def step(barrier: Any) -> None:
        assert barrier.left >= 0 and barrier.bytes >= 0, "more arrivals or bytes than a phase has"
        if not barrier.left and not barrier.bytes:
            barrier.phase, barrier.left = barrier.phase + 1, barrier.count

    def arrive(bar: _Shared, *, count: int = 1, n_bytes: int = 0) -> None:
        assert not bar.cell.unfenced
        bar.cell.barrier.left -= count
        bar.cell.barrier.bytes += n_bytes
        step(bar.cell.barrier)
        machine.pause()

    def wait(bar: _Shared, parity: int) -> None:
        assert parity in (0, 1)
        machine.pause(lambda: bar.cell.barrier.phase & 1 != parity)

    # -- copies
    def load_tile(desc: _Descriptor, place: list[int], bar: _Shared, to: _Shared) -> None:
        assert not to.cell.copies and not to.cell.readers and not to.cell.unfenced, "overwritten while in use"
        assert not bar.cell.unfenced and to.shape == list(desc.block_type.shape)
        to.cell.copies, to.cell.filled = 1, False
        there, here = desc.tile(place)

        def copy() -> None:
            to.values.zero_()
            to.values[here] = desc.tensor[there]
            to.cell.copies, to.cell.filled = 0, True
            bar.cell.barrier.bytes -= desc.block_type.nbytes
            step(bar.cell.barrier)
        machine.begin(copy)

    def store_tile(desc: _Descriptor, place: list[int], source: _Shared) -> None:
        cell, task = source.cell, machine.me
        assert cell.filled and not cell.copies and not cell.unfenced, "written out unfinished or without a fence"
        cell.readers, task.stores = cell.readers + 1, task.stores + 1
        there, here = desc.tile(place)

        def copy() -> None:
            desc.tensor[there] = source.values[here]
            cell.readers, task.stores = cell.readers - 1, task.stores - 1
        machine.begin(copy, is_store=True)

    def store_wait(pendings: int) -> None:
        task = machine.me
        machine.pause(lambda: task.stores <= pendings)

    def fence() -> None:
        for cell in shared:
            cell.unfenced = False

    # -- products
    def product(a: Any, b: _Shared, out: Tensor, *, use_acc: bool = True, is_async: bool = False) -> _Product:
        cells, task = [x.cell for x in (a, b) if isinstance(x, _Shared)], machine.me
        for cell in cells:
            assert cell.filled and not cell.copies, "a product of a buffer that is not filled"
            cell.readers += 1
        begun = _Product(a if isinstance(a, Tensor) else None)
        assert is_async and isinstance(out, Tensor) and (begun.registers is None or a.dtype == b.dtype)

        def multiply() -> None:
            left, right = (x.values if isinstance(x, _Shared) else x for x in (a, b))
            begun.value = left.float() @ right.float() + (out if use_acc else 0)
            for cell in cells:
                cell.readers -= 1
        task.products.append(begun)
        machine.begin(multiply, lambda: begun is next(x for x in task.products if x.value is None))  # one after the other
        return begun

    def product_init(value: Tensor) -> _Product:
        done = _Product(None)
        done.value = value
        return done

    def product_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
        task = machine.me
        done = task.products[:len(task.products) - outstanding] if outstanding else task.products
        machine.pause(lambda: all(x.value is not None for x in done))
        for x in done:
            assert x.registers is None or any(x.registers is dep for dep in deps), "registers not kept until their product ends"
        task.products = task.products[len(done):]
        values = [dep.value if isinstance(dep, _Product) else dep for dep in deps]
        assert all(value is not None for value in values), "a result used before its product is done"
        return values[0] if len(values) == 1 else tuple(values)

    # -- numbers
    def load(pointer: _Pointer, mask: Any = True, other: Any = 0) -> Any:
        if isinstance(pointer.offset, int):
            return int(pointer.values[pointer.offset]) if mask else other
        return torch.where(mask, pointer.values[torch.where(mask, pointer.offset, 0)], other)

    def store(pointer: _Pointer, value: Tensor, mask: Tensor) -> None:
        pointer.values[pointer.offset[mask]] = value[mask]

    def atomic_add(pointer: _Pointer, value: int) -> int:
        before = int(pointer.values[pointer.offset])
        pointer.values[pointer.offset] += value
        return before

    def total(x: Tensor, dim: int) -> Any:
        return x.sum(dim) if x.is_floating_point() else int(x.sum(dim))

    def extreme(of_ints: Callable[..., int], of_tensors: Callable[..., Tensor]) -> Callable[..., Any]:
        def choose(a: Any, b: Any) -> Any:
            if isinstance(a, Tensor) or isinstance(b, Tensor):
                return of_tensors(torch.as_tensor(a), torch.as_tensor(b))
            return of_ints(a, b)
        return choose

    gl = SimpleNamespace(
        int32=torch.int32, int64=torch.int64, float32=torch.float32, static_range=range,
        range=lambda a, b, disable_licm: range(a, b),
        program_id=lambda axis: program, num_programs=lambda axis: programs, atomic_add=atomic_add, load=load, store=store,
        cast=lambda x, dtype: x, cdiv=lambda a, b: -(-a // b),
        minimum=extreme(min, torch.minimum), maximum=extreme(max, torch.maximum),
        abs=torch.abs, exp2=torch.exp2, log2=torch.log2, expand_dims=torch.unsqueeze,
        where=lambda c, a, b: torch.where(c, a, b) if isinstance(c, Tensor) else a if c else b,
        max=lambda x, dim: x.amax(dim), sum=total, arange=lambda a, b, layout: torch.arange(a, b),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        convert_layout=lambda x, layout, assert_trivial: x, allocate_shared_memory=allocate, warp_specialize=specialize,
        **dict.fromkeys(("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SwizzledSharedLayout"),
                        lambda *_: None))
    return {"gl": gl, "tl": gl, "fence_async_shared": fence,
            "warpgroup_mma": product, "warpgroup_mma_init": product_init, "warpgroup_mma_wait": product_wait,
            "mbarrier": SimpleNamespace(init=init, arrive=arrive, wait=wait, MBarrierLayout=lambda: None,
                                        expect=lambda bar, n: arrive(bar, n_bytes=n)),
            "tma": SimpleNamespace(async_copy_global_to_shared=load_tile, async_copy_shared_to_global=store_tile,
                                   store_wait=store_wait)}
