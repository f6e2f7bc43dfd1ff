"""The held-out loss of a checkpoint: by source and language, in nats, bits per byte, the same on any engine and ranks."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lives import DECODER, begin, plain_run

from officina.trainer.config import DDPConfig, EvalConfig, FSDP2Config, SingleConfig, ZeroConfig
from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.reader import Stream
from officina.trainer.evaluation import Request, read_results, write_request
from officina.trainer.metrics import read_metrics
from officina.trainer.run_dir import save_config

WORDS = {"fin_Latn": "talo metsä järvi yö päivä kuu", "swe_Latn": "hus skog sjö natt dag måne", "ell_Grek": "σπίτι δάσος νύχτα"}


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory) -> Path:
    """A run of three steps on text of three languages."""
    folder = tmp_path_factory.mktemp("eval")
    rng = np.random.default_rng(0)
    with open(folder / "in.jsonl", "w") as file:
        for i in range(300):
            language = list(WORDS)[i % 3]
            text = " ".join(rng.choice(WORDS[language].split(), int(rng.integers(3, 40))))
            file.write(json.dumps({"text": f"{i} {text}", "lang": language}) + "\n")
    build(folder / "d", BuildOptions(inputs=[folder / "in.jsonl"], vocab_size=320, validation=0.3))
    run = replace(plain_run(folder / "d", model=DECODER), steps=3, eval=EvalConfig(max_rows=37))
    begin(folder / "run", run)
    pool.run(1, "tests.lives:live", str(folder / "run"))
    return folder / "run"


def ask(trained: Path, name: str, run=None, **request) -> Path:
    from officina.trainer.run_dir import load_config

    folder = trained / "evals" / name
    folder.mkdir(parents=True)
    save_config(run or load_config(trained), folder)
    write_request(folder, Request(step=3, **request))
    return folder


def reference(trained: Path) -> dict[str, tuple[float, int, int]]:
    """Nats, tokens and bytes by language, document by document, by a plain forward pass over each row."""
    from officina.trainer.checkpoint.read import open_checkpoint
    from officina.trainer.generate import load
    from officina.trainer.run_dir import load_config

    run = load_config(trained)
    with open_checkpoint(trained) as opened:
        module = load(run, opened, torch.device("cpu"))
    dataset = open_dataset(run.data.sources["text"].path)
    stream = Stream(dataset, "validation")
    shard, T = stream.shard(0), run.batch.seq_len
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(dataset.folder / "tokenizer.json"))
    alphabet = {i: len(t) for t, i in tokenizer.get_vocab().items()} | {dataset.manifest.tokenizer.eos_id: 0}
    sums: dict[str, list] = {}
    for row in range(min(37, stream.rows(T))):
        at = row * T
        while at < row * T + T:  # the part of each document that lies in the row stands alone
            document = int(np.searchsorted(shard.ends, at, side="right"))
            end = min(int(shard.ends[document]), row * T + T + 1)
            tokens = torch.tensor(shard.data[at:end].astype(np.int64))[None]
            if end - at > 1:
                logits = module(tokens[:, :-1])[0].double()
                nats = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
                of = sums.setdefault(dataset.manifest.languages[shard.language_ids[document]], [0.0, 0, 0])
                of[0] += nats
                of[1] += end - at - 1
                of[2] += sum(alphabet[t] for t in tokens[0, 1:].tolist())
            at = end
    return sums


def test_any_engine_and_ranks_give_what_a_plain_count_gives(pool, trained: Path) -> None:
    from officina.trainer.run_dir import load_config

    wanted, run = reference(trained), load_config(trained)
    nats, tokens, sizes = (sum(of[i] for of in wanted.values()) for i in range(3))
    for name, engine, n in (("one", SingleConfig(), 1), ("ddp", DDPConfig(), 3), ("fsdp2", FSDP2Config(), 2),
                            ("zero3", ZeroConfig(stage=3, persistence_threshold=0), 2)):
        folder = ask(trained, name, replace(run, engine=engine))
        assert pool.run(n, "tests.trainer.evaluation_cases:evaluate", str(folder)) == [0] * n
        results = read_results(folder)
        [found] = results.held_out
        assert (results.step, results.engine, results.world_size) == (3, engine.kind, n)
        assert (found["source"], found["tokens"], found["text_bytes"]) == ("text", tokens, pytest.approx(sizes))
        assert found["loss_nats"] == pytest.approx(nats / tokens, rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / sizes, rel=1e-5)
        for language, (of_nats, of_tokens, of_bytes) in wanted.items():
            of = found["languages"][language]
            assert (of["tokens"], of["text_bytes"]) == (of_tokens, pytest.approx(of_bytes))
            assert of["loss_nats"] == pytest.approx(of_nats / of_tokens, rel=1e-5)
    [in_the_loop] = read_metrics(trained).evals
    assert in_the_loop.bits_per_byte == pytest.approx(nats / math.log(2) / sizes, rel=1e-5)
    assert set(in_the_loop.languages) == set(wanted)
