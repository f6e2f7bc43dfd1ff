import gzip
import json
import pickle

import pytest
import torch

from officina.trainer.config import ProfileConfig
from officina.trainer.profile import Profiler


def run(config: ProfileConfig, run_dir, rank: int = 0, first: int = 1, last: int = 6) -> list[str]:
    said = []
    with Profiler(config, run_dir, rank, say=said.append) as profiler:
        for step in range(first, last + 1):
            profiler.step(step)
            with torch.profiler.record_function(f"work of step {step}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
    return said


def traced_steps(run_dir, name: str) -> list[int]:
    events = json.loads(gzip.open(run_dir / "profile" / name).read())["traceEvents"]
    return [int(e["name"].split()[-1]) for e in events if e.get("name", "").startswith("work of step")]


def test_exactly_the_chosen_steps_of_the_chosen_ranks_are_traced(tmp_path):
    config = ProfileConfig(steps=[3, 4], ranks=[1])
    assert run(config, tmp_path, rank=0) == [] and not (tmp_path / "profile").exists()
    (said,) = run(config, tmp_path, rank=1)
    name = "steps-00000003-00000004.rank-00001.trace.json.gz"
    assert f"profile/{name}" in said
    assert sorted(set(traced_steps(tmp_path, name))) == [3, 4]


def test_a_run_that_ends_or_resumes_inside_the_range_still_leaves_its_trace(tmp_path):
    config = ProfileConfig(steps=[3, 40])
    run(config, tmp_path, first=5, last=6)
    assert sorted(set(traced_steps(tmp_path, "steps-00000003-00000040.rank-00000.trace.json.gz"))) == [5, 6]


def test_nothing_is_recorded_by_default(tmp_path):
    assert run(ProfileConfig(), tmp_path) == [] and not list(tmp_path.iterdir())


def test_a_profile_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    (tmp_path / "profile").write_text("a file is in the way")
    (said,) = run(ProfileConfig(steps=[1, 1]), tmp_path)
    assert "could not be written" in said and "Training goes on" in said


@pytest.mark.gpu
def test_a_gpu_also_leaves_a_memory_snapshot(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with Profiler(ProfileConfig(steps=[1, 1]), tmp_path, 0) as profiler:
        profiler.step(1)
        torch.ones(1024, 1024, device="cuda") @ torch.ones(1024, 1024, device="cuda")
    snapshot = tmp_path / "profile" / "steps-00000001-00000001.rank-00000.memory.pickle"
    assert {"segments", "device_traces"} <= pickle.loads(snapshot.read_bytes()).keys()
