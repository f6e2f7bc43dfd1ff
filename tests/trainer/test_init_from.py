"""A run that starts from a model that is there: a folder in Hugging Face's form, or another run."""

import json
import shutil
from dataclasses import replace

import pytest
from data_sets import write_tokens
from hf_models import save
from lives import begin, losses, plain_run, states

from officina.configs.compose import compose, compose_all
from officina.launch.start import plan_resume, plan_train
from officina.trainer.checkpoint.verify import Alone
from officina.trainer.config import DDPConfig, FSDP2Config
from officina.trainer.hf.base import open_base
from officina.trainer.hf.source import read_stored
from officina.trainer.init_from import init_problems, pinned
from officina.trainer.initial import open_weights, weights_hash
from officina.trainer.model.build import build_transformer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama in two shards."""
    folder = tmp_path_factory.mktemp("models") / "small-llama"
    save("llama", folder, shard="60KB", vocab_size=320)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "text"
    write_tokens(folder, {"train": [60] * 5})
    return folder


def run_from(llama, data, **changes):
    return plain_run(data, model=open_base(str(llama)).model, init_from=str(llama), steps=2, **changes)


def test_the_weights_are_those_of_the_folder(llama, data, tmp_path, pool):
    run = run_from(llama, data, name="one", engine=DDPConfig())
    run = replace(run, steps=1, optim=replace(run.optim, lr=1e-6))  # a step that moves no weight by more than that
    begin(tmp_path / "one", run)
    assert pool.run(2, "tests.lives:live", str(tmp_path / "one")) == [0, 0]
    found, base = states(tmp_path / "one", 1), open_base(str(llama))
    assert len(base.tensors) == len({name for name, _ in found})
    for name, slot in found:
        if slot == "param":
            stored = base.tensors[base.family.their_name(name)]
            assert (found[name, slot] - read_stored(stored, 0, stored.numel)).abs().max() <= 2e-6, name

    record = json.loads((tmp_path / "one/base/weights.json").read_text())
    assert record["name"] == "small-llama" and record["kind"] == "folder" and record["dtype"] == "BF16"
    assert (tmp_path / "one/base/config.json").read_bytes() == (llama / "config.json").read_bytes()
    assert str(llama) not in (tmp_path / "one/base/weights.json").read_text()


def test_the_hash_is_that_of_the_values(llama, tmp_path):
    base, shapes = open_base(str(llama)), shapes_of(llama)
    in_fp32 = tmp_path / "fp32"
    save("llama", in_fp32, dtype="bfloat16", shard="5GB", vocab_size=320)
    with open_weights(base, shapes, Alone()) as source, open_weights(open_base(str(in_fp32)), shapes, Alone()) as other:
        hash_ = weights_hash(source, shapes, Alone())
        assert weights_hash(other, shapes, Alone()) == hash_  # other files, the same weights
        assert weights_hash(_Changed(source), shapes, Alone()) != hash_
        renamed = {{"norm.weight": "x.weight"}.get(n, n): s for n, s in shapes.items()}
        assert weights_hash(_Renamed(source), renamed, Alone()) != hash_


def shapes_of(folder):
    return {name: tuple(p.shape) for name, p in build_transformer(open_base(str(folder)).model).named_parameters()}


class _Renamed:
    def __init__(self, source):
        self.source = source

    def read(self, name, slot, start, stop):
        return self.source.read("norm.weight" if name == "x.weight" else name, slot, start, stop)


class _Changed:
    """One element of one tensor is another."""

    def __init__(self, source):
        self.source = source

    def read(self, name, slot, start, stop):
        values = self.source.read(name, slot, start, stop).clone()
        if name == "norm.weight" and start <= 7 < stop:
            values[7 - start] += 1e-7
        return values


def test_every_engine_starts_from_the_same_weights(llama, data, tmp_path, pool):
    """The loss of the first step and the hash of the weights do not depend on how many ranks read them."""
    seen = {}
    for name, engine, ranks in (("alone", None, 1), ("ddp", DDPConfig(), 2), ("fsdp2", FSDP2Config(), 2)):
        run = run_from(llama, data, name=name, **({"engine": engine} if engine else {}))
        begin(tmp_path / name, run)
        assert pool.run(ranks, "tests.lives:live", str(tmp_path / name)) == [0] * ranks
        seen[name] = losses(tmp_path / name), json.loads((tmp_path / name / "base/weights.json").read_text())["hash"]
    want, hash_ = seen["alone"]
    for got, other in seen.values():
        assert other == hash_
        assert got == {step: pytest.approx(values, rel=2e-5) for step, values in want.items()}

    # and from the run that came of it
    again = replace(run_from(llama, data), init_from=f"{tmp_path / 'ddp'}@2", name="again")
    begin(tmp_path / "again", again)
    assert pool.run(1, "tests.lives:live", str(tmp_path / "again")) == [0]
    record = json.loads((tmp_path / "again/base/weights.json").read_text())
    assert record["kind"] == "run" and record["base"]["hash"] == hash_ and record["dtype"] == "BF16"
    assert record["hash"] != hash_

    # which goes on training, so the plan of a run that starts from it names the step
    run_dir = str(tmp_path / "ddp")
    assert pinned(run_dir) == f"{run_dir}@2"
    assert [pinned(text) for text in (f"{run_dir}@1", str(llama), "")] == [f"{run_dir}@1", str(llama), ""]
    words = ["model=from_init", f"init_from={run_dir}", f"data.sources.x.path={data}", "device=cpu", "steps=2",
             "batch.seq_len=32", "batch.global_tokens=64", "lr_schedule.warmup_steps=1"]
    assert plan_train(words, tmp_path, world_size=1).checked().run.init_from == f"{run_dir}@2"
    [problem] = plan_train([*words, f"init_from={run_dir}@7"], tmp_path, world_size=1).problems
    assert "no whole checkpoint of step 7; there are: " in problem.rule and problem.remedy == f"init_from={run_dir}@2"
    resumed = plan_resume(tmp_path / "again", ["steps=99", "init_from=nowhere"], world_size=1)
    assert [(p.key, p.rule) for p in resumed.problems] == [("init_from", "nowhere does not exist")]
    assert plan_resume(tmp_path / "again", ["steps=99", f"init_from={tmp_path / 'fsdp2'}@2"], world_size=1).problems == []
    shutil.rmtree(f"{run_dir}/checkpoints")
    [problem] = plan_train(words, tmp_path, world_size=1).problems
    assert problem.key == "init_from" and "no whole checkpoint; there are: none" in problem.rule


def test_the_model_is_taken_from_the_folder(llama):
    run = compose(["model=from_init", f"init_from={llama}", "model.attention_impl=reference"])
    assert run.model == replace(open_base(str(llama)).model, attention_impl="reference")
    assert init_problems(run) == []


@pytest.mark.parametrize(("words", "key", "told"), [
    (["model=from_init"], "model", "names none"),
    (["model=from_init", "init_from=nowhere"], "init_from", "does not exist"),
    (["init_from={llama}"], "init_from", "vocab_size 4096 (there 320)"),
    (["init_from={llama}", "model=from_init", "model.tie_embeddings=true"], "init_from", "tie_embeddings true (there false)"),
    (["init_from={llama}", "model=from_init", "model.rope.theta=1e6"], "model.rope.theta", "--force"),
])
def test_what_does_not_fit_is_refused(llama, tmp_path, words, key, told):
    words = [word.format(llama=llama) for word in words]
    plan = plan_train([*words, "data.sources.x.path=x"], tmp_path, world_size=1)
    assert key in {p.key for p in plan.problems}
    assert told in next(str(p) for p in plan.problems if p.key == key)


def byte_level(*tokens):
    """A tokenizer with these tokens first, then bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate([*tokens, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_data_of_another_tokenizer_are_refused_and_added_tokens_are_not(llama, tmp_path):
    folder, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(llama, folder)
    data.mkdir()
    words = ["model=from_init", f"init_from={folder}", f"data.sources.x.path={data}"]
    byte_level("</s>").save(str(folder / "tokenizer.json"))
    for tokens, fits in ((["</s>"], True), (["<s>"], False), (["<s>", "</s>"], False)):
        byte_level(*tokens).save(str(data / "tokenizer.json"))
        found = init_problems(compose(words))
        assert [p.key for p in found] == ([] if fits else ["data.sources.x"])
        assert fits or "was built with another tokenizer" in str(found[0])
        assert init_problems(compose(words), force=True) == []
    grown = byte_level("</s>")
    grown.add_special_tokens(["<|im_start|>"])
    grown.save(str(data / "tokenizer.json"))
    assert init_problems(compose(words)) == []


def test_positions_may_be_changed_by_force_and_equal_spellings_are_equal(llama):
    words = ["model=from_init", f"init_from={llama}", "model.rope.theta=1e6"]
    assert init_problems(compose(words), force=True) == []
    model = open_base(str(llama)).model
    assert init_problems(compose([*words[:2], "model.head_dim=12", "model.window_pattern=[false]"])) == []
    assert model.head_size == 12


def test_a_custom_model_has_no_init_from(llama):
    run = compose_all(["model=custom", "model.factory=a:b", "model.loss=a:b", "model.decoder=a:b", f"init_from={llama}"]).run
    assert [p.key for p in init_problems(run)] == ["init_from"]
