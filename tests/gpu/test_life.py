"""A run's life on one GPU: the real loop, stopped and resumed, and its checkpoints read elsewhere."""

from dataclasses import replace

import pytest
import torch

from officina.benchmarks.workload import synthetic_dataset
from officina.trainer.checkpoint.read import open_checkpoint
from officina.trainer.config import DDPConfig, EngineConfig, FSDP2Config, SingleConfig
from officina.trainer.errors import EXIT_CONTINUE, EXIT_DONE
from officina.trainer.metrics import read_metrics
from officina.trainer.model.build import build_transformer
from officina.trainer.rank_env import LONE
from officina.trainer.ranks import Ranks
from officina.trainer.state import PARAM
from tests.lives import begin, changed, live, losses, plain_run, states

pytestmark = pytest.mark.gpu

ENGINES: dict[str, EngineConfig] = {"single": SingleConfig(), "ddp": DDPConfig(), "fsdp2": FSDP2Config(),
                                    "offloaded": FSDP2Config(cpu_offload=True)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic_dataset(tmp_path_factory.mktemp("data") / "tokens", vocab_size=320, tokens=20_000)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
@pytest.mark.parametrize("engine", ENGINES)
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(ranks, deterministic, data, tmp_path, engine, precision):
    run = plain_run(data, engine=ENGINES[engine], precision=precision, device=ranks.device.type)
    begin(tmp_path / "whole", run)
    assert live(ranks, tmp_path / "whole") == EXIT_DONE
    begin(tmp_path / "parts", run)
    assert live(ranks, tmp_path / "parts", stop_after=4) == EXIT_CONTINUE
    assert live(ranks, tmp_path / "parts") == EXIT_DONE
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ours, theirs = states(tmp_path / "parts", 8), states(tmp_path / "whole", 8)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "in the background"])
def test_a_checkpoint_holds_what_the_device_holds(ranks, data, tmp_path, asynchronous):
    run = plain_run(data, device=ranks.device.type)
    begin(tmp_path / "run", replace(run, checkpoint=replace(run.checkpoint, asynchronous=asynchronous)))
    live(ranks, tmp_path / "run")
    saves = [save for save in read_metrics(tmp_path / "run").saves if save.problem is None]
    assert [save.step for save in saves] == [3, 6, 8]
    state = states(tmp_path / "run", 8)
    assert {slot for _, slot in state} == {"param", "exp_avg", "exp_avg_sq"}
    assert all(torch.isfinite(values).all() for values in state.values())


def test_a_run_goes_on_on_the_processor(ranks, data, tmp_path):
    """And there computes, to rounding, what it would have computed on the GPU."""
    run = plain_run(data, device=ranks.device.type)
    begin(tmp_path / "whole", run)
    live(ranks, tmp_path / "whole")
    begin(tmp_path / "moved", run)
    live(ranks, tmp_path / "moved", stop_after=4)
    changed(tmp_path / "moved", device="cpu", engine=FSDP2Config())
    assert live(Ranks(LONE, torch.device("cpu"), threads=1), tmp_path / "moved") == EXIT_DONE
    theirs = losses(tmp_path / "whole")
    for step, (loss, norm) in losses(tmp_path / "moved").items():
        assert abs(loss - theirs[step][0]) < 1e-5 and abs(norm / theirs[step][1] - 1) < 1e-5


def test_the_record_names_device_and_memory(cuda, ranks, data, tmp_path):
    begin(tmp_path / "run", plain_run(data, device="cuda", precision="bf16"))
    live(ranks, tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    assert metrics.generations[-1].start.device == torch.cuda.get_device_name(cuda)
    assert 0 < metrics.steps[-1].peak_memory_bytes < torch.cuda.get_device_properties(cuda).total_memory
    if metrics.generations[-1].start.peak_flops:
        assert 0 < metrics.steps[-1].mfu_causal <= metrics.steps[-1].mfu_full < 1


def test_decoding_with_a_cache_is_the_whole_forward(device, data, tmp_path, ranks):
    run = plain_run(data, device=ranks.device.type)
    begin(tmp_path / "run", run)
    live(ranks, tmp_path / "run")
    module = build_transformer(run.model).to_empty(device=device).eval().requires_grad_(False)
    with open_checkpoint(tmp_path / "run") as opened:
        for name, parameter in module.named_parameters():
            parameter.copy_(opened.read(name, PARAM, 0, parameter.numel()).view_as(parameter))
    tokens = torch.randint(0, 320, (1, 20), device=device)
    cache = module.new_cache()
    parts = [module(tokens[:, :7], cache=cache), *(module(tokens[:, i:i + 1], cache=cache) for i in range(7, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), module(tokens), atol=1e-4, rtol=1e-4)
