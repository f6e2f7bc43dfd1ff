"""Fine-tuning runs, whole: built from rows, packed, trained on ranks, stopped, resumed on others, evaluated, audited."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from officina.launch.cli import main
from officina.launch.start import plan_train, write_start
from officina.trainer.config import FSDP2Config, LoraConfig, ObjectiveConfig, RunConfig, SingleConfig, ZeroConfig
from officina.trainer.convert import export_run
from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.chat import PLAIN
from officina.trainer.data.ledger import audit
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.megatron import export_megatron
from officina.trainer.data.stage import stage
from officina.trainer.data.tokenizer import train_tokenizer
from officina.trainer.errors import EXIT_CONTINUE, EXIT_DONE, DataError
from officina.trainer.hf.base import open_base
from officina.trainer.metrics import read_metrics
from tests.distributed import RankFailure
from tests.lives import begin, changed, losses, plain_run, states


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Samples with answers, and preference pairs, of one small tokenizer."""
    root = tmp_path_factory.mktemp("recipes")
    (root / "texts.txt").write_text("what is 1 plus 2? it is 3, the answer. no: wrong. user assistant ### " * 40)
    build(root / "text", BuildOptions(inputs=[root / "texts.txt"], vocab_size=300, validation=0.0))
    chats, pairs = [], []
    for i in range(60):
        asked = {"role": "user", "content": f"{i} plus {i % 7}?"}
        good, bad = ({"role": "assistant", "content": text} for text in (f"{i + i % 7}" + " it is" * (i % 3), "no: wrong"))
        chats.append({"messages": [asked, good] * (1 + i % 2)})
        pairs.append({"prompt": [asked], "chosen": [good], "rejected": [bad]})
    found = {}
    for name, rows in (("answers", chats), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = root / name
        build(root / name, BuildOptions(inputs=[root / f"{name}.jsonl"], samples=True, tokenizer=root / "text",
                                        chat_template="plain", validation=0.2))
    return found


def run_on(folder: Path, **changes) -> RunConfig:
    run = plain_run(folder, **changes)
    return replace(run, batch=replace(run.batch, seq_len=96, global_tokens=3 * 96), steps=5,
                   checkpoint=replace(run.checkpoint, every_steps=2))


def lived(pool, run_dir: Path, world_size: int, **kwargs) -> int:
    [status] = set(pool.run(world_size, "tests.lives:live", str(run_dir), **kwargs))
    return status


def held_out(folder: Path) -> int:
    return open_dataset(folder).manifest.splits["validation"].documents


def close(a: Path, b: Path) -> bool:
    mine, theirs = losses(a), losses(b)
    return mine.keys() == theirs.keys() and np.allclose([mine[k] for k in mine], [theirs[k] for k in mine], atol=1e-5, rtol=0)


def test_fine_tuning_goes_on_on_other_ranks_and_says_how_good_the_answers_are(pool, folders, tmp_path):
    run = run_on(folders["answers"])
    begin(tmp_path / "one", run)
    assert lived(pool, tmp_path / "one", 1) == EXIT_DONE
    begin(tmp_path / "two", replace(run, engine=FSDP2Config()))
    assert lived(pool, tmp_path / "two", 2, stop_after=3) == EXIT_CONTINUE
    changed(tmp_path / "two", engine=SingleConfig())
    assert lived(pool, tmp_path / "two", 1) == EXIT_DONE
    assert close(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == PLAIN
    found, other = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [s.filled_tokens for s in found.steps] == [s.filled_tokens for s in other.steps]
    assert all(s.tokens < s.filled_tokens <= 3 * 96 for s in found.steps)
    assert all(math.isclose(s.filled_tokens_per_s * s.step_time_s, s.filled_tokens) for s in found.steps)
    [held] = found.evals
    assert held.samples == held_out(folders["answers"]) and 0 < held.token_accuracy < 1 and 0 <= held.sample_accuracy <= 1
    assert math.isclose(held.sample_loss_nats, held.loss_nats, rel_tol=0.2) and held.sample_loss_nats != held.loss_nats
    assert audit(tmp_path / "two").faults == []


def test_preference_optimisation_keeps_the_model_it_began_with(pool, folders, tmp_path):
    run = run_on(folders["pairs"], objective=ObjectiveConfig(kind="dpo", beta=0.3))
    begin(tmp_path / "one", run)
    assert lived(pool, tmp_path / "one", 1) == EXIT_DONE
    begin(tmp_path / "two", replace(run, engine=ZeroConfig(stage=3)))
    assert lived(pool, tmp_path / "two", 2, stop_after=3) == EXIT_CONTINUE
    changed(tmp_path / "two", engine=FSDP2Config())
    kept = tmp_path / "two" / "reference" / "text-train.logp"
    written = kept.read_bytes()
    assert lived(pool, tmp_path / "two", 2) == EXIT_DONE
    assert kept.read_bytes() == written and close(tmp_path / "one", tmp_path / "two")
    steps = read_metrics(tmp_path / "one").steps
    assert math.isclose(steps[0].loss_nats, math.log(2), abs_tol=1e-5) and abs(steps[0].reward_margin) < 1e-4
    assert steps[-1].reward_margin > 0 and steps[-1].loss_nats < math.log(2)
    assert all(math.isclose(s.reward_margin, s.reward_chosen - s.reward_rejected, abs_tol=1e-5) for s in steps)
    [held] = read_metrics(tmp_path / "one").evals
    assert held.tokens == held_out(folders["pairs"]) // 2 and 0 <= held.reward_accuracy <= 1
    assert audit(tmp_path / "two").faults == []
    changed(tmp_path / "two", steps=6)
    for content, why in ((written[:-1] + b"\1", "is missing or damaged"), (b"", "is missing or damaged"),
                         (written.replace(b'"pairs": ', b'"pairs": 1'), "is of other data")):
        kept.write_bytes(content)
        with pytest.raises((DataError, RankFailure), match=f"text-train.logp: {why}"):
            lived(pool, tmp_path / "two", 1)


def test_adapters_are_trained_on_preferences_and_a_branch_keeps_the_reference(pool, folders, tmp_path):
    run = run_on(folders["answers"])
    begin(tmp_path / "base", replace(run, steps=2))
    assert lived(pool, tmp_path / "base", 1) == EXIT_DONE
    run = replace(run_on(folders["pairs"], objective=ObjectiveConfig(kind="dpo", beta=0.3)), init_from=f"{tmp_path / 'base'}@2",
                  adapter=LoraConfig(rank=4, alpha=8))
    run = replace(run, batch=replace(run.batch, global_tokens=96))  # one row a step: the second rank has none
    begin(tmp_path / "one", run)
    assert lived(pool, tmp_path / "one", 1) == EXIT_DONE
    begin(tmp_path / "two", replace(run, engine=FSDP2Config()))
    assert lived(pool, tmp_path / "two", 2, stop_after=3) == EXIT_CONTINUE
    assert lived(pool, tmp_path / "two", 2) == EXIT_DONE
    steps = read_metrics(tmp_path / "one").steps
    assert math.isclose(steps[0].loss_nats, math.log(2), abs_tol=1e-5) and steps[-1].reward_margin > 0
    assert close(tmp_path / "one", tmp_path / "two")
    assert {name.rpartition(".")[2] for name, _ in states(tmp_path / "one", 5)} == {"lora_a", "lora_b"}

    plan = plan_train([f"from={tmp_path / 'one'}@2", "name=branch"], tmp_path, world_size=1).checked()
    write_start(plan, 1)
    assert lived(pool, plan.run_dir, 1) == EXIT_DONE
    assert losses(plan.run_dir) == {step: found for step, found in losses(tmp_path / "one").items() if step > 2}
    export_run(str(plan.run_dir), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for told in ('base_model: "base@2"', "| preference pairs |", "step 2, where it left the run life", "chosen answer",
                 "- text of base@2: not stated"):
        assert told in card
    assert "perplexity" not in card


CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def test_an_exported_chat_model_stops_where_its_answers_end(pool, tmp_path, monkeypatch, capsys):
    """The base ends texts with another token than its template ends turns with; what was learnt is to end the turn."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base, question = tmp_path / "base", [{"role": "user", "content": "what?"}]
    tokenizer = Tokenizer.from_str(train_tokenizer([["what? it is 3 user assistant"]], 280, ""))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    size, (eos, end) = tokenizer.get_vocab_size(), map(tokenizer.token_to_id, ("<|endoftext|>", "<|im_end|>"))
    config = transformers.LlamaConfig(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=2, bos_token_id=None, eos_token_id=eos, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": CHATML}))
    answered = {"messages": [*question, {"role": "assistant", "content": "it is 3"}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(answered) + "\n") * 8)
    build(tmp_path / "chats", BuildOptions(inputs=[tmp_path / "chats.jsonl"], samples=True, tokenizer=base, validation=0.0))
    plan = plan_train(["experiment=sft", f"init_from={base}", f"data.sources.chats.path={tmp_path / 'chats'}", "steps=40",
                       "optim.lr=1e-2", "lr_schedule.warmup_steps=2", "batch.seq_len=64", "batch.global_tokens=64",
                       "device=cpu", "logging.tensorboard=false", "checkpoint.every_steps=0"], tmp_path, world_size=1).checked()
    write_start(plan, 1)
    assert lived(pool, plan.run_dir, 1) == EXIT_DONE

    assert main(["convert", "export", str(plan.run_dir), "--to", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [eos, end]
    card = (tmp_path / "out" / "README.md").read_text()
    filled = sum(step.filled_tokens for step in read_metrics(plan.run_dir).steps)
    assert f"| tokens processed, no padding | {filled:,} |" in card and "- base: its card was not beside the weights" in card
    assert filled < 40 * 64
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    exec(code.replace("What can you do?", "what?"), {})
    assert capsys.readouterr().out.endswith("assistant\nit is 3<|im_end|>\n")
    theirs, model = (kind.from_pretrained(tmp_path / "out") for kind in (transformers.AutoTokenizer,
                                                                         transformers.AutoModelForCausalLM))
    asked = theirs.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**asked, max_new_tokens=30, do_sample=False)[0, asked["input_ids"].shape[1]:]
    assert said.tolist() == tokenizer.encode("it is 3<|im_end|>").ids
    prompt = theirs.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert main(["generate", str(plan.run_dir), prompt, "--temperature", "0", "--max-new-tokens", "30"]) == 0
    assert capsys.readouterr().out.endswith("assistant\nit is 3\n")
    assert open_base(str(tmp_path / "out")).model == open_base(str(base)).model  # and it can be started from


def test_marks_of_what_is_trained_are_not_lost_silently(folders, tmp_path):
    with pytest.raises(DataError, match="holds answers, and Megatron's files cannot say which tokens are trained on"):
        export_megatron(folders["answers"], tmp_path)
    stage(folders["answers"], tmp_path / "copy")
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == PLAIN


def test_objective_and_data_must_fit(folders):
    from officina.trainer.data.reader import RowReader

    with pytest.raises(DataError, match="holds pairs, .* cannot train on them. Try: objective.kind=dpo"):
        RowReader(run_on(folders["pairs"]))
    with pytest.raises(DataError, match="holds no preference pairs, .* Try: objective.kind=next_token"):
        RowReader(run_on(folders["answers"], objective=ObjectiveConfig(kind="dpo")))
