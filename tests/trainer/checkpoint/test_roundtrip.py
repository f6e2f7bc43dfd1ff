"""Whatever the layout that wrote a checkpoint, any other reads it, bit for bit."""

import math
import tempfile
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from officina.benchmarks.checkpoint_faults import cut, holds, on_ranks, save_step, state_at
from officina.trainer.checkpoint import stage
from officina.trainer.checkpoint.content import verify_loaded
from officina.trainer.checkpoint.layout import TrainState
from officina.trainer.checkpoint.read import open_checkpoint
from officina.trainer.checkpoint.verify import Alone
from officina.trainer.checkpoint.write import Saver
from officina.trainer.config import CheckpointConfig
from officina.trainer.errors import CheckpointError
from officina.trainer.state import Piece

FAST = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64]
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@st.composite
def layouts(draw, state, max_ranks=4):
    """Pieces of each rank: tensors cut at random places and dealt at random."""
    world = draw(st.integers(1, max_ranks))
    pieces = [[] for _ in range(world)]
    for (name, slot), t in state.items():
        cuts = sorted({0, t.numel(), *draw(st.lists(st.integers(0, t.numel()), max_size=4))})
        for a, b in list(pairwise(cuts)) or [(0, 0)]:
            pieces[draw(st.integers(0, world - 1))].append(Piece(name, slot, tuple(t.shape), a, b, t.reshape(-1)[a:b]))
    return [draw(st.permutations(p)) for p in pieces]


@st.composite
def cases(draw):
    """A state and two layouts of it."""
    state = {}
    for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=4))):
        dtype = draw(st.sampled_from(DTYPES))
        bits = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
        if dtype is torch.bool:
            bits = bits % 2
        state[f"t{i}", "param"] = bits.view(dtype).reshape(shape)
    return state, draw(layouts(state)), draw(layouts(state))


@given(case=cases(), segment_bytes=st.sampled_from([576, 1024, 4096, 1 << 16]), asynchronous=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_layout_to_any_other(case, segment_bytes, asynchronous):
    state, written, wanted = case
    with tempfile.TemporaryDirectory(dir=FAST) as folder, patch.object(stage, "SEGMENT_BYTES", segment_bytes):
        def save(ranks):
            saver = Saver(Path(folder), ranks, CheckpointConfig(asynchronous=asynchronous), "run")
            outcome = saver.save(7, iter(written[ranks.rank]), TrainState(step=7))
            return saver.wait() or outcome

        assert {o.status for o in on_ranks(len(written), save)} == {"saved"}

        def load(ranks):
            with open_checkpoint(Path(folder), ranks=ranks) as opened:
                for p in wanted[ranks.rank]:
                    got = opened.read(p.name, p.slot, p.start, p.stop)
                    assert got.dtype == p.values.dtype
                    assert torch.equal(got.view(torch.uint8), p.values.view(torch.uint8))
                verify_loaded(lambda: iter(wanted[ranks.rank]), opened, ranks)
                assert opened.tensors() == {n: (tuple(t.shape), (s,)) for (n, s), t in state.items()}

        on_ranks(len(wanted), load)


def test_ranges_across_chunks_and_files(tmp_path):
    state = {("w", "param"): torch.arange(5_000_000, dtype=torch.float32)}  # 20 MB: several chunks a file
    save_step(tmp_path, 1, world_size=3, state=state)
    with open_checkpoint(tmp_path) as opened:
        for a, b in [(0, 5_000_000), (1_666_600, 1_666_700), (1_048_570, 3_400_001), (4_999_999, 5_000_000), (9, 9)]:
            assert torch.equal(opened.read("w", "param", a, b), state["w", "param"][a:b])


def test_train_state_comes_back(tmp_path):
    train_state = TrainState(step=3, tokens=10**13, position=7, optimizer_steps=2, loader={"of": {"a": 0.1}},
                             rng={"scheme": "counter", "seed": 5}, config_fingerprint="abc",
                             data_fingerprints={"x": "y"}, spikes={"values": [1e-300, float("inf")]}, extra={"ü": None})
    saver = Saver(tmp_path, Alone(), CheckpointConfig(), "run")
    assert saver.save(3, cut(state_at(3), 0, 1), train_state).status == "saved"
    with open_checkpoint(tmp_path) as opened:
        assert opened.train_state == train_state
        assert (opened.step, opened.run_id, opened.world_size) == (3, "run", 1)


def test_missing_tensor_slot_and_shape_are_named(tmp_path):
    save_step(tmp_path, 1)
    with open_checkpoint(tmp_path) as opened:
        assert opened.has("w", "param") and not opened.has("w", "momentum")
        with pytest.raises(CheckpointError, match=r"has no tensor embedd; did the model change\? It has embed"):
            opened.read("embedd", "param", 0, 1)
        with pytest.raises(CheckpointError, match=r"no momentum of w, only exp_avg, param"):
            opened.read("w", "momentum", 0, 1)
        with pytest.raises(CheckpointError, match=r"norm param is \[257\].*elements 0 to 258"):
            opened.read("norm", "param", 0, 258)
        with pytest.raises(CheckpointError) as e:
            opened.check_fits({"norm": (256,), "w": (349525,), "extra": (1,)})
        assert "norm param is [257]" in str(e.value) and "[256] in the model" in str(e.value)
        assert "rank-00000.bin" in str(e.value) and "extra" in str(e.value) and "w param is" not in str(e.value)
        opened.check_fits({"norm": (257,)})


def test_moved_run_directory_loads(tmp_path):
    save_step(tmp_path / "a", 1)
    (tmp_path / "a").rename(tmp_path / "b")
    with open_checkpoint(tmp_path / "b") as opened:
        assert holds(opened, state_at(1))


def test_cut_short_while_reading_is_an_error_not_a_signal(tmp_path):
    save_step(tmp_path, 1)
    with open_checkpoint(tmp_path) as opened:
        (opened.path / "rank-00001.bin").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"rank-00001\.bin was cut short"):
            opened.read("w", "param", 0, 349525)


@pytest.mark.gpu
def test_state_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    state = {k: v.cuda() for k, v in state_at(5, elements=30_000_000).items()}
    for step, asynchronous in ((1, False), (2, True)):
        def save(ranks, step=step, asynchronous=asynchronous):
            saver = Saver(tmp_path, ranks, CheckpointConfig(asynchronous=asynchronous), "run", pinned=True)
            outcome = saver.save(step, cut(state, 0, 1), TrainState(step=step))
            for t in state.values():
                t += 0  # the copies are done: what follows on the stream must not matter
            return saver.wait() or outcome

        assert on_ranks(1, save)[0].status == "saved"
        with open_checkpoint(tmp_path) as opened:
            assert holds(opened, state_at(5, elements=30_000_000))
            verify_loaded(lambda: cut(state, 0, 1), opened)
