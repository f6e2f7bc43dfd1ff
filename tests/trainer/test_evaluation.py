"""The held-out loss of a checkpoint: by source and language, in nats, bits per byte, the same on any engine and ranks."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lives import DECODER, begin, plain_run

from officina.trainer.config import DDPConfig, EvalConfig, FSDP2Config, LoraConfig, SingleConfig, ZeroConfig
from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.removal import remove
from officina.trainer.data.stream import Stream
from officina.trainer.evaluation import Request, read_results, write_request
from officina.trainer.metrics import read_metrics
from officina.trainer.run_dir import load_config, save_config

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
    folder = trained / "evals" / name
    folder.mkdir(parents=True)
    save_config(run or load_config(trained), folder)
    write_request(folder, Request(step=3, **request))
    return folder


def reference(trained: Path) -> dict[str, tuple[float, int, int]]:
    """Nats, tokens and bytes by language, document by document, by a plain forward pass over each row."""
    from officina.trainer.checkpoint.read import open_checkpoint
    from officina.trainer.generate import load
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
    wanted, run = reference(trained), load_config(trained)
    nats, tokens, sizes = (sum(of[i] for of in wanted.values()) for i in range(3))
    for name, engine, n in (("single", SingleConfig(), 1), ("ddp", DDPConfig(), 3), ("fsdp2", FSDP2Config(), 2),
                            ("zero3", ZeroConfig(stage=3, persistence_threshold=0), 2)):
        folder = ask(trained, name, replace(run, engine=engine))
        assert pool.run(n, "tests.trainer.evaluation_cases:evaluate", str(folder)) == [0] * n
        results = read_results(folder)
        [found] = results.held_out
        assert (results.step, results.engine, results.world_size) == (3, name, n)
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


def test_held_out_documents_that_were_all_removed_have_no_loss(pool, trained: Path, tmp_path) -> None:
    """And not one of 0, the best there is."""
    run = load_config(trained)
    shutil.copytree(run.data.sources["text"].path, tmp_path / "d")
    held = [shard for shard in open_dataset(tmp_path / "d").shards if shard.split == "validation"]
    remove(tmp_path / "d", [f"{shard.path}:{i}" for shard in held for i in range(shard.documents)])
    moved = replace(run, data=replace(run.data, sources={"text": replace(run.data.sources["text"], path=str(tmp_path / "d"))}))
    for ranks in (1, 2):
        folder = ask(trained, f"removed-{ranks}", replace(moved, engine=DDPConfig() if ranks > 1 else SingleConfig()))
        assert pool.run(ranks, "tests.trainer.evaluation_cases:evaluate", str(folder)) == [0] * ranks
        [found] = read_results(folder).held_out
        assert (found["tokens"], found["loss_nats"], found["bits_per_byte"]) == (0, None, None)


def test_an_adapter_is_evaluated_merged(pool, trained: Path, tmp_path) -> None:
    """The same loss as in the loop, which computes with the adapter beside its frozen weights."""
    run = load_config(trained)
    run = replace(run, name="lora", init_from=f"{trained}@3", adapter=LoraConfig(rank=4, alpha=10, train=["norm"]),
                  optim=replace(run.optim, lr=1e-2))
    begin(tmp_path / "lora", run)
    pool.run(1, "tests.lives:live", str(tmp_path / "lora"))
    [in_the_loop], [before] = read_metrics(tmp_path / "lora").evals, read_metrics(trained).evals
    assert in_the_loop.loss_nats < before.loss_nats - 0.01
    for name, engine, n in (("one", SingleConfig(), 1), ("fsdp2", FSDP2Config(), 2)):
        folder = ask(tmp_path / "lora", name, replace(run, engine=engine))
        assert pool.run(n, "tests.trainer.evaluation_cases:evaluate", str(folder)) == [0] * n
        [found] = read_results(folder).held_out
        assert found["loss_nats"] == pytest.approx(in_the_loop.loss_nats, rel=1e-5) and found["tokens"] == in_the_loop.tokens


# ---- benchmarks ----------------------------------------------------------------------------------------------------
CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A multiple choice, a perplexity and a generation task on a local file."""
    pytest.importorskip("lm_eval", reason="needs officina[eval]")
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{i} talo metsä", "choices": ["järvi yö", "natt", "νύχτα σπίτι δάσος"], "answer": i % 3}
            for i in range(11)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, more in (
            ("own_choice", "multiple_choice", 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'),
            ("own_text", "loglikelihood_rolling", 'doc_to_target: "{{question}} {{choices[0]}}"\nmetric_list:\n'
                                                  "  - metric: bits_per_byte\n"),
            ("own_words", "generate_until", 'doc_to_target: "{{choices[0]}}"\nmetric_list:\n  - metric: exact_match\n'
                                            'generation_kwargs: {until: [" m"], max_gen_toks: 7}\n')):
        text = CHOICE.format(name=name, kind=kind, path=folder / "test.jsonl")
        text = text.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""') if name == "own_text" else text
        (folder / f"{name}.yaml").write_text(text + more)
    return folder


def test_tasks_on_local_files_score_the_same_on_any_engine_and_ranks(pool, trained: Path, tasks: Path) -> None:
    """Against log-probabilities of whole sentences by a plain forward pass."""
    run, names = load_config(trained), ["own_choice", "own_text", "own_words"]
    run = replace(run, batch=replace(run.batch, micro_rows=4))
    found = {}
    for name, engine, n in (("t1", SingleConfig(), 1), ("t2", FSDP2Config(), 2), ("t3", ZeroConfig(stage=3), 2)):
        folder = ask(trained, name, replace(run, engine=engine), tasks=names, tasks_dir=str(tasks))
        assert pool.run(n, "tests.trainer.evaluation_cases:evaluate", str(folder)) == [0] * n
        found[name] = read_results(folder).tasks
    accuracy, nats, size = plain_scores(trained, tasks)
    assert set(found["t1"]) == set(names)
    assert found["t1"]["own_choice"]["acc,none"] == pytest.approx(accuracy)
    assert found["t1"]["own_text"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    for name in ("t2", "t3"):
        for task in names:
            for metric, value in found["t1"][task].items():
                if isinstance(value, float):
                    assert found[name][task][metric] == pytest.approx(value, rel=1e-5), (name, task, metric)


def plain_scores(trained: Path, tasks: Path) -> tuple[float, float, int]:
    from tokenizers import Tokenizer

    from officina.trainer.checkpoint.read import open_checkpoint
    from officina.trainer.generate import load
    with open_checkpoint(trained) as opened:
        module = load(load_config(trained), opened, torch.device("cpu"))
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|endoftext|>")

    def nats(context: list[int], continuation: list[int]) -> float:
        tokens = torch.tensor([context + continuation])
        logits = module(tokens[:, :-1])[0].double()
        return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")[-len(continuation):].sum().item()

    right, total, size = [], 0.0, 0
    for row in map(json.loads, (tasks / "test.jsonl").read_text().splitlines()):
        context = tokenizer.encode(row["question"], add_special_tokens=False).ids
        each = [nats(context, tokenizer.encode(f"{row['question']} {c}", add_special_tokens=False).ids[len(context):])
                for c in row["choices"]]
        right.append(int(np.argmin(each)) == row["answer"])
        text = f"{row['question']} {row['choices'][0]}"
        ids = [eos, *tokenizer.encode(text, add_special_tokens=False).ids]
        for at in range(0, len(ids) - 1, 32):  # windows of batch.seq_len, each with one token of context
            total += nats(ids[at:at + 1], ids[at + 1:at + 33])
        size += len(text.encode())
    return sum(right) / len(right), total, size


def test_standard_errors_need_no_processes_beside_the_rank(pool, trained: Path, tasks: Path) -> None:
    """The harness's own pool hung at its end: a fork of a rank keeps its handler of SIGTERM."""
    text = (tasks / "own_choice.yaml").read_text().replace("multiple_choice", "loglikelihood").replace("own_choice", "own_ppl")
    text = text.replace('doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"', 'doc_to_target: " {{choices[0]}}"')
    (tasks / "own_ppl.yaml").write_text(text + "metric_list:\n  - metric: perplexity\n")
    folder = ask(trained, "p", tasks=["own_ppl"], tasks_dir=str(tasks))
    assert pool.run(1, "tests.trainer.evaluation_cases:evaluate_without_forks", str(folder)) == [0]
    found = read_results(folder).tasks["own_ppl"]
    assert found["perplexity,none"] > 1 and found["perplexity_stderr,none"] > 0


def test_prompts_begin_as_those_of_transformers(tmp_path) -> None:
    """With what the tokenizer puts before a text, once, where the model knows it."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("lm_eval", reason="needs officina[eval]")
    from tokenizers import Tokenizer, processors

    from officina.trainer.data.tokenizer import train_tokenizer
    from officina.trainer.harness import RunModel

    tokenizer = Tokenizer.from_str(train_tokenizer([[" ".join(WORDS.values())]], 300, ""))
    tokenizer.add_special_tokens(["<s>"])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A <|endoftext|>", special_tokens=[
        ("<s>", bos), ("<|endoftext|>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    plain = RunModel(None, plain_run(tmp_path), None, tmp_path)  # from random weights: its data had no <s>
    assert plain.tok_encode("talo") == tokenizer.encode("talo", add_special_tokens=False).ids
    assert plain.prefix_token_id == 0

    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    model = RunModel(None, plain_run(tmp_path), None, tmp_path)
    for text in ("talo", "", "<s>talo"):
        assert model.tok_encode(text) == theirs(text.removeprefix("<s>"))["input_ids"][:-1]
        assert model.tok_encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    assert model.prefix_token_id == bos != model.eot_token_id


@pytest.mark.parametrize("until", ["<end>", ["", "<end>"], ["never", "<end>"]])
def test_a_text_stops_at_a_special_token(tmp_path, until) -> None:
    pytest.importorskip("lm_eval", reason="needs officina[eval]")
    from tokenizers import Tokenizer

    from officina.trainer.data.tokenizer import train_tokenizer
    from officina.trainer.harness import RunModel

    tokenizer = Tokenizer.from_str(train_tokenizer([[" ".join(WORDS.values())]], 300, ""))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = iter(tokenizer.encode("talo<end>metsä").ids)
    engine = SimpleNamespace(infer=lambda compute, batch: torch.nn.functional.one_hot(torch.tensor(next(tokens)), 400).float())
    alone = SimpleNamespace(device=torch.device("cpu"), sum=list)
    model = RunModel(engine, plain_run(tmp_path, model=DECODER), alone, tmp_path)
    assert model._continued("yö", {"until": until, "max_gen_toks": 7}) == "talo"


def test_a_task_that_is_not_known_or_not_here_is_refused(pool, trained: Path, tasks: Path) -> None:
    text = (tasks / "own_choice.yaml").read_text().replace("dataset_path: json", "dataset_path: nobody/nothing")
    (tasks / "elsewhere.yaml").write_text(text.replace("task: own_choice", "task: elsewhere"))
    text = (tasks / "own_words.yaml").read_text().replace("task: own_words", "task: long")
    (tasks / "long.yaml").write_text(text.replace("max_gen_toks: 7", "max_gen_toks: 32"))
    for name, task, message in (("u0", "long", "up to 32 tokens .* leaves nothing for the prompt. Try: batch.seq_len=128"),
                                ("u2", "elsewhere", "its data cannot be loaded, and nothing is downloaded here")):
        folder = ask(trained, name, tasks=[task], tasks_dir=str(tasks))
        [told] = pool.run(1, "tests.trainer.evaluation_cases:refusal", str(folder))
        assert re.search(message, told), told


@pytest.mark.slow  # a name that the folder does not have is looked for among the harness's own thousands of task files
def test_a_misspelt_task_is_told_what_was_meant(pool, trained: Path, tasks: Path) -> None:
    folder = ask(trained, "u1", tasks=["own_choise"], tasks_dir=str(tasks))
    [told] = pool.run(1, "tests.trainer.evaluation_cases:refusal", str(folder))
    assert re.search("own_choise: is no task .* Did you mean own_choice", told), told
