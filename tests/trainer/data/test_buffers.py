"""Memory of batches is used again, and never while somebody holds it."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import make_run, write_tokens

from officina.trainer.data import buffers
from officina.trainer.data.buffers import Buffers
from officina.trainer.data.loader import Loader


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    buffers = Buffers()
    array = buffers.take((3, 4), np.int64)
    tensor = torch.from_numpy(array)
    where, view = tensor.data_ptr(), tensor.view(-1)[5:]
    del array, tensor
    assert buffers.take((3, 4), np.int64).ctypes.data != where  # a view of a view still holds it
    del view
    assert buffers.take((3, 4), np.int64).ctypes.data == where
    assert buffers.take((4, 3), np.int64).ctypes.data != where


def test_memory_that_is_held_stays_so_where_python_counts_fewer_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 3.14 does: an argument of a call is borrowed from the variable."""
    count = sys.getrefcount
    monkeypatch.setattr(sys, "getrefcount", lambda array: count(array) - 2)  # one of them is this function's own
    fresh = importlib.util.module_from_spec(buffers.__spec__)
    buffers.__spec__.loader.exec_module(fresh)
    pool = fresh.Buffers()
    held = pool.take((3, 4), np.int64)
    where = held.ctypes.data
    assert pool.take((3, 4), np.int64).ctypes.data != where
    del held
    assert pool.take((3, 4), np.int64).ctypes.data == where


def test_steps_that_are_kept_do_not_change(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a", {"train": [7] * 400})
    run = make_run({"a": (tmp_path / "a", 1)}, rows=4, prefetch_batches=1)
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        kept = [loader.next_step() for _ in range(30)]
        then = [{name: value.clone() for name, value in m.fields.items()} for step in kept for m in step.micros]
        for _ in range(100):
            loader.next_step()  # nobody keeps these
        now = [m.fields for step in kept for m in step.micros]
        pools = loader._memory._buffers._kept.values()
    assert all(torch.equal(a[name], b[name]) for a, b in zip(then, now, strict=True) for name in a)
    assert max(map(len, pools)) <= 64
