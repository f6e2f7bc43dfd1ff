"""What is compared computes the same: officina's loop, the plain loops, and transformers' Llama."""

import json
from functools import partial

import pytest
import torch

from officina.benchmarks import gpu
from officina.benchmarks.entrants import hf_trainer, llama_config, officina, plain
from officina.benchmarks.turns import Entrant, race
from officina.benchmarks.workload import synthetic_dataset, write_run
from officina.configs.compose import compose
from officina.trainer.data.ledger import read_ledger
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.verify import verify

WORDS = ["data=joined", "steps=1000", "device=cpu", "threads=1", "checkpoint=at_end", "precision=fp32", "model=tiny",
         "model.n_layers=2", "model.d_model=64", "model.n_heads=4", "model.d_ff=128", "batch.seq_len=32", "batch.micro_rows=2",
         "batch.global_tokens=256", "logging.tensorboard=false", "lr_schedule.warmup_steps=0", "optim.lr=1e-2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic_dataset(tmp_path_factory.mktemp("data") / "tokens", vocab_size=2048, tokens=50_000)


def test_the_synthetic_data_set_is_whole(data):
    dataset = open_dataset(data)
    assert verify(data).faults == [] and dataset.manifest.splits["train"].tokens == 50_000
    assert dataset.manifest.splits["train"].documents > 20


@pytest.mark.parametrize("how, engine, ranks", [("single", "single", 1), ("ddp", "ddp", 2), ("fsdp2", "fsdp2", 2)])
def test_the_plain_loop_trains_what_officina_trains(data, tmp_path, how, engine, ranks):
    path = write_run([*WORDS, f"engine={engine}", f"data.sources.s.path={data}"], tmp_path, ranks)
    found = race({"officina": Entrant(partial(officina, run_dir=path), ranks),
                  "plain": Entrant(partial(plain, run_dir=path, how=how), ranks)},
                 blocks=1, steps=8, lead=0, warmup=0)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    ours = [line["loss_nats"] * line["tokens"] for line in lines if "event" not in line]
    if ranks == 1:
        torch.testing.assert_close(ours, found["plain"][0].facts["losses"], rtol=1e-6, atol=0)
    else:  # a plain rank knows its own rows only
        assert 0.4 < found["plain"][0].facts["losses"][-1] / ours[-1] < 0.6
    assert len(ours) == 8 and 0 < found["officina"][0].facts["engine_s"] < found["officina"][0].seconds


def test_officina_with_data_in_memory_trains_the_first_steps_rows_again_and_again(data, tmp_path):
    found = {}
    for name, in_memory in (("reads", False), ("keeps", True)):
        path = write_run([*WORDS, "optim.lr=1e-30", f"data.sources.s.path={data}"], tmp_path / name)
        race({name: Entrant(partial(officina, run_dir=path, in_memory=in_memory))}, blocks=1, steps=20, lead=0, warmup=0)
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        found[name] = [line["loss_nats"] for line in lines if "event" not in line]
        assert [entry.step for entry in read_ledger(path)[0]] == list(range(1, 21))
    assert found["keeps"][:8] == found["reads"][:8] and found["keeps"][8:16] == found["reads"][:8] != found["reads"][8:16]


def test_transformers_trains_the_same_model(data, tmp_path):
    """hf_trainer itself refuses a model with another number of parameters."""
    path = write_run([*WORDS, f"data.sources.s.path={data}"], tmp_path)
    found = race({"hf": Entrant(partial(hf_trainer, run_dir=path, scratch=tmp_path / "hf"))}, blocks=2, steps=2, lead=1)
    assert len(found["hf"]) == 2
    with pytest.raises(ValueError, match="is no Llama; compare with one"):
        llama_config(compose([*WORDS, "model.qk_norm=head", f"data.sources.s.path={data}"]).model, 32)


def test_the_named_experiments_have_the_published_shapes():
    a, b = compose(["experiment=h200_8b"]), compose(["experiment=h200_1b8"])
    assert (a.batch.seq_len, a.batch.micro_rows, a.batch.micro_steps(1)) == (4096, 4, 2)
    assert (a.precision, a.engine.recompute, a.engine.compile) == ("bf16_pure", "full", True)
    assert (b.batch.seq_len, b.batch.micro_rows, b.batch.micro_steps(1)) == (4096, 8, 1)
    assert (b.precision, b.engine.recompute, b.engine.compile) == ("bf16", "none", True)
    assert not a.data.mask_documents and not b.data.mask_documents
    assert gpu.parameter_count(a.model).total == 8_030_261_248  # meta-llama/Meta-Llama-3-8B
    assert abs(gpu.parameter_count(b.model).total / 1.82e9 - 1) < 0.003
    # 476 TFLOP/s a GPU at 12.70 GFLOP a token are the 37.5 thousand tokens that were published
    assert abs(gpu.flops_per_token(b.model, 4096, causal=False) / 12.70e9 - 1) < 0.003
