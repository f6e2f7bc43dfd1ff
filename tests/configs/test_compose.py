"""Words to a run: grammar, traps of quantities, groups in any order, a user's own files and defaults."""

import re

import pytest

from officina.configs.compose import compose, compose_all, options, recompose
from officina.trainer.errors import ConfigError
from officina.trainer.keys import GROUPS
from officina.trainer.run_dir import load_config, save_config
from officina.trainer.validate import problems


@pytest.fixture(autouse=True)
def no_personal_defaults(monkeypatch, tmp_path_factory):
    empty = str(tmp_path_factory.mktemp("empty"))
    monkeypatch.setenv("XDG_CONFIG_HOME", empty)
    monkeypatch.setenv("XDG_CONFIG_DIRS", empty)


def faults(*words):
    return {p.key: p for p in compose_all(words).problems}


# ---- quantities ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("word", "read", "expected"), [
    ("site.account=1e5", lambda run: run.site.account, "1e5"),
    ("site.account=007", lambda run: run.site.account, "007"),
    ("site.account=", lambda run: run.site.account, ""),
    ("site.account=project_465000", lambda run: run.site.account, "project_465000"),
    ("site.account=true", lambda run: run.site.account, "true"),
    ("name=2024-11-05", lambda run: run.name, "2024-11-05"),
    ("batch.global_tokens=512k", lambda run: run.batch.global_tokens, 512_000),
    ("batch.global_tokens=512Ki", lambda run: run.batch.global_tokens, 524_288),
    ("steps=1e3", lambda run: run.steps, 1000),
    ("steps=1_000", lambda run: run.steps, 1000),
    ("steps=10B", lambda run: run.steps, 10_000_000_000),
    ("time_limit=2-00:00:00", lambda run: run.time_limit, 172_800.0),
    ("time_limit=90m", lambda run: run.time_limit, 5400.0),
    ("time_limit=08:00:00", lambda run: run.time_limit, 28_800.0),
    ("time_limit=null", lambda run: run.time_limit, None),
    ("time_limit=none", lambda run: run.time_limit, None),
    ("engine.recompute=none", lambda run: run.engine.recompute, "none"),
    ("optim.lr=1e-3", lambda run: run.optim.lr, 1e-3),
    ("optim.lr=.5", lambda run: run.optim.lr, 0.5),
    ("engine.compile=True", lambda run: run.engine.compile, True),
    ("data.skip=[[0,10],[10k,11k]]", lambda run: run.data.skip, [[0, 10], [10_000, 11_000]]),
    ("model.rope_pattern=[true,false]", lambda run: run.model.rope_pattern, [True, False]),
    ("data.sources={a:{path:x/y,weight:2}}", lambda run: run.data.sources["a"].weight, 2.0),
    ("name='quoted'", lambda run: run.name, "quoted"),
    ("+steps=7", lambda run: run.steps, 7),
    ("++steps=7", lambda run: run.steps, 7),
    ("engine={kind:zero,stage:3}", lambda run: run.engine.stage, 3),
    ("model.local_rope.theta=1e4", lambda run: run.model.local_rope.theta, 1e4),
])
def test_a_word_is_read_as_it_is_written(word, read, expected):
    value = read(compose([word]))
    assert value == expected and type(value) is type(expected)


def test_arguments_of_a_custom_model_keep_the_types_they_look_like():
    run = compose(["model=custom", "model.factory=a:b", "model.loss=a:c", "model.decoder=a:d", "model.args.width=192",
                   "model.args.rate=1e-2", "model.args.deep=true", "model.args.name=vit", "model.args.sizes=[8,16]",
                   "model.args.betas=[0.9,0.95]", "model.args.parts=[a,b]", "model.args.seed=null"])
    assert run.model.args == {"width": 192, "rate": 0.01, "deep": True, "name": "vit", "sizes": [8, 16], "betas": [0.9, 0.95],
                              "parts": ["a", "b"], "seed": None}
    assert type(run.model.args["width"]) is int


def test_a_value_in_the_place_of_named_groups_is_told_where_it_goes():
    assert faults("data.sources=d")["data.sources"].remedy == "data.sources.NAME.path=demo/data"
    assert faults("data.sources.web=d")["data.sources.web"].remedy == "data.sources.web.path=demo/data"


# ---- groups ----------------------------------------------------------------------------------------------------
def test_order_of_words_does_not_matter_between_groups_and_values():
    words = ["engine.stage=3", "engine=zero2", "optim.muon_lr=0.01", "experiment=demo", "optim=muon", "steps=5"]
    assert compose(words) == compose(words[::-1])
    assert compose(words).engine.stage == 3 and compose(words).optim.muon_lr == 0.01


def test_the_last_word_wins():
    run = compose(["steps=1", "engine=ddp", "steps=2", "engine=fsdp2"])
    assert (run.steps, run.engine.kind) == (2, "fsdp2")


def test_a_removed_key_is_back_at_its_default():
    assert compose(["experiment=demo", "~steps"]).steps == compose([]).steps
    assert compose(["data=demo", "~data.sources.python", "data.sources.b.path=x"]).data.sources.keys() == {"b"}
    assert compose(["experiment=demo", "~engine"]).engine.kind == "single"
    assert compose(["~data.skip"]) == compose([])  # stands at its default already


@pytest.mark.parametrize("group", GROUPS)
def test_each_option_is_accepted(group, tmp_path):
    needs = {"custom": ["model.factory=a:b", "model.loss=a:b", "model.decoder=a:b", "batch.seq_len=1"],
             "packed": [], "hsdp": ["engine.shard_size=2"],
             "continued": ["model=tiny", "data.sources.new.path=new", "data.sources.replay.path=old"],  # recipes want a model
             "demo_finetune": ["model=tiny"], "dpo": ["model=tiny"], "sft": ["model=tiny"]}
    for option in sorted({*options(group)} - {"from_init"}):  # which needs a model: tests/trainer/test_init_from.py
        words = [f"{group}={option}", "data.sources.x.path=somewhere", *needs.get(option, [])]
        run = compose(words)
        assert problems(run, None, read_data=False) == []
        save_config(run, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == run


def test_shapes_of_the_anchors():
    from officina.trainer.model.flops import parameter_count

    big, small = compose(["experiment=h200_8b"]), compose(["experiment=h200_1b8"])
    assert parameter_count(big.model).total == 8_030_261_248
    assert round(parameter_count(small.model).total / 1e9, 2) == 1.82
    assert (big.batch.micro_rows, big.batch.micro_steps(1), big.batch.seq_len) == (4, 2, 4096)
    assert (small.batch.micro_rows, small.batch.micro_steps(1)) == (8, 1)
    assert (big.engine.recompute, big.engine.compile, big.precision) == ("full", True, "bf16_pure")


@pytest.mark.parametrize(("option", "billions"), [
    ("eurollm_1b7", 1.66), ("eurollm_9b", 9.15), ("apertus_8b", 8.05), ("teuken_7b", 7.45), ("viking_7b", 7.55),
    ("salamandra_2b", 2.25), ("salamandra_7b", 7.77), ("lucie_7b", 6.71), ("minerva_7b", 7.40), ("smollm3_3b", 3.08),
    ("llama3_8b", 8.03), ("gpt_1b8", 1.82)])
def test_published_sizes_of_open_models(option, billions):
    from officina.trainer.model.flops import parameter_count

    assert parameter_count(compose([f"model={option}"]).model).total / 1e9 == pytest.approx(billions, abs=0.011)


# ---- a user's own files ------------------------------------------------------------------------------------------
def test_an_experiment_of_ones_own(tmp_path):
    path = tmp_path / "my run.yaml"
    path.write_text("defaults:\n  - demo\n  - override /optim: muon\n  - _self_\nsteps: 7\nsite:\n  account: '1e5'\n")
    run = compose([f"experiment={path}", "seed=3"])
    assert (run.steps, run.optim.kind, run.engine.kind, run.seed, run.site.account) == (7, "muon", "fsdp2", 3, "1e5")


def test_a_model_of_ones_own(tmp_path):
    path = tmp_path / "wide.yml"
    path.write_text("kind: decoder\nd_model: 1024\n")
    assert compose([f"model={path}"]).model.d_model == 1024


@pytest.mark.parametrize(("text", "key", "rule"), [
    ("steps: [1", "experiment", "cannot be composed"),
    ("defaults:\n  - nowhere\n", "experiment", "cannot be composed"),
    ("optm:\n  lr: 1\n", "optm", "no such key"),
    ("steps: many\n", "steps", "whole number"),
    ("name: ${oc.env:HOME}\n", "name", "interpolation"),
    ("site:\n  account: 12\n", "site.account", "text"),
    ("hydra:\n  run: {dir: out}\nsteps: 3\n", "experiment", "sets `hydra`"),
])
def test_faults_of_a_file_of_ones_own(tmp_path, text, key, rule):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    found = faults(f"experiment={path}")
    assert rule in found[key].rule and found[key].remedy


@pytest.mark.parametrize(("text", "rule", "remedy"), [
    ("steps: 3\nname: [1", "line 2: ", "mend line 2 of "), ("steps: 3\nsteps: 5\n", "line 2: found duplicate", "mend line 2"),
    ("- 1\n", "must hold keys and values", "mend"), ("a: &a [*a]\n", "holds itself", "mend"),
    ("a.b: 3\n", "'a.b' is no name", "mend"),
    ("defaults: 3\n", "must be a list", "mend"), ("defaults: [override /engine: nope]\n", "engine/nope", "mend")])
def test_a_fault_of_a_file_is_told_by_its_own_lines(tmp_path, text, rule, remedy):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    [problem] = compose_all([f"experiment={path}"]).problems
    assert rule in problem.rule and problem.remedy.startswith(remedy) and "mine.yaml" in problem.remedy
    assert not re.search("of_the_user|hydra|DictConfig|search ?path", problem.rule)


def test_a_file_that_is_no_text_or_no_file(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x9a")
    (tmp_path / "folder.yaml").mkdir()
    assert faults(f"experiment={tmp_path}/mine.yaml")["experiment"].rule == "is not UTF-8 text"
    assert faults(f"experiment={tmp_path}/folder.yaml")["experiment"].rule == "is a folder"
    assert faults(f"experiment={tmp_path}/mien.yaml")["experiment"].remedy == f"experiment={tmp_path}/mine.yaml"
    assert "no such file" in faults(f"experiment={'a' * 5000}.yaml")["experiment"].rule


def test_an_option_that_is_typed_lies_over_the_experiment(tmp_path):
    assert compose(["experiment=demo", "checkpoint=at_end"]).checkpoint.every_steps == 0
    run = compose(["use=research", "experiment=demo", "engine.recompute=full", "engine=zero3", "checkpoint=standard"])
    assert (run.checkpoint.every_steps, run.engine.stage, run.engine.recompute) == (500, 3, "full")
    assert run.optim.lr == compose(["experiment=demo"]).optim.lr == compose(["experiment=demo", "optim=adamw"]).optim.lr
    (tmp_path / "often.yaml").write_text("every_steps: 7\n")
    assert compose(["experiment=demo", f"checkpoint={tmp_path}/often.yaml"]).checkpoint.every_steps == 7


def test_no_experiment():
    assert compose(["experiment=null"]) == compose([])


def test_a_value_that_a_file_leaves_open_is_missing(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data:\n  sources:\n    a:\n      path: ???\n")
    assert faults(f"experiment={path}")["data.sources.a.path"].rule == "is required"


def test_a_missing_file_is_named():
    assert "no such file" in faults("experiment=./nowhere.yaml")["experiment"].rule


# ---- defaults of a person or a centre ------------------------------------------------------------------------------
def write_defaults(folder, text):
    (folder / "officina").mkdir(parents=True)
    (folder / "officina" / "defaults.yaml").write_text(text)
    return str(folder)


def test_personal_defaults_stand_below_the_command_line_and_are_told(tmp_path):
    centre = write_defaults(tmp_path / "centre", "site: {account: everybody, grace: 2m}\nlogging: {tensorboard: false}\n")
    person = write_defaults(tmp_path / "person", "site:\n  account: 1e5\nlogging: wandb\n")
    environ = {"XDG_CONFIG_HOME": person, "XDG_CONFIG_DIRS": centre}
    composed = compose_all(["site.grace=3m"], environ)
    assert composed.problems == []
    assert (composed.run.site.account, composed.run.site.grace, composed.run.logging.wandb) == ("1e5", 180.0, True)
    told = dict(composed.defaults)
    assert told["site.account=1e5"].startswith(person) and told["logging.tensorboard=false"].startswith(centre)


def test_a_persons_path_counts_only_where_the_data_set_is_used(tmp_path):
    person = write_defaults(tmp_path / "p", "data:\n  sources:\n    python: {path: /scratch/py}\n")
    environ = {"XDG_CONFIG_HOME": person, "XDG_CONFIG_DIRS": ""}
    assert compose_all(["experiment=demo"], environ).run.data.sources["python"].path == "/scratch/py"
    assert compose_all([], environ).run.data.sources == {}


@pytest.mark.parametrize(("text", "key"), [
    ("optim: {lr: 1}\n", "optim.lr"), ("model: tiny\n", "model"), ("seed: 3\n", "seed")])
def test_personal_defaults_may_not_change_what_is_computed(tmp_path, text, key):
    environ = {"XDG_CONFIG_HOME": write_defaults(tmp_path / "p", text), "XDG_CONFIG_DIRS": ""}
    [problem] = compose_all([], environ).problems
    assert problem.key == key and "what a run computes" in problem.rule and "experiment" in problem.remedy


def test_a_fault_in_personal_defaults_names_the_file(tmp_path):
    environ = {"XDG_CONFIG_HOME": write_defaults(tmp_path / "p", "site: {grace: soon}\n"), "XDG_CONFIG_DIRS": ""}
    [problem] = compose_all([], environ).problems
    assert problem.key == "site.grace" and "defaults.yaml" in problem.rule
    assert compose_all(["site.grace=1m"], environ).problems == []  # the command line stands above


def test_null_in_personal_defaults_is_no_value(tmp_path):
    centre = write_defaults(tmp_path / "c", "site: {account: everybody}\ntime_limit: 8h\n")
    person = write_defaults(tmp_path / "p", "site: {account: null}\ntime_limit: ~\n")
    composed = compose_all([], {"XDG_CONFIG_HOME": person, "XDG_CONFIG_DIRS": centre})
    assert composed.problems == [] and composed.run.site.account == "" and composed.run.time_limit is None


@pytest.mark.parametrize("text", ["logging: nope\n", "site: {account: '${x}'}\n", "site: {accnt: a}\n"])
def test_a_word_of_personal_defaults_that_cannot_be_read_names_the_file(tmp_path, text):
    [problem] = compose_all([], {"XDG_CONFIG_HOME": write_defaults(tmp_path / "p", text), "XDG_CONFIG_DIRS": ""}).problems
    assert "defaults.yaml" in problem.rule


@pytest.mark.parametrize("text", ["site: [", "- a\n"])
def test_unreadable_personal_defaults_are_named(tmp_path, text):
    environ = {"XDG_CONFIG_HOME": write_defaults(tmp_path / "p", text), "XDG_CONFIG_DIRS": ""}
    [problem] = compose_all([], environ).problems
    assert problem.key.endswith("defaults.yaml")


# ---- saved runs ----------------------------------------------------------------------------------------------------
def test_a_new_option_keeps_what_it_shares_with_the_old_one():
    saved = compose(["experiment=demo", "engine.recompute=full", "engine.reshard_after_forward=false"])
    run = recompose(saved, ["engine=zero2"]).run
    assert (run.engine.kind, run.engine.stage, run.engine.recompute) == ("zero", 2, "full")
    wsd = recompose(saved, ["lr_schedule=wsd", "lr_schedule.decay_steps=50"]).run
    assert (wsd.lr_schedule.warmup_steps, wsd.lr_schedule.decay_steps) == (saved.lr_schedule.warmup_steps, 50)
    assert recompose(wsd, ["lr_schedule=cosine"]).run.lr_schedule.decay_steps == 0


def test_an_experiment_cannot_be_chosen_later():
    [problem] = recompose(compose([]), ["experiment=demo"]).problems
    assert problem.key == "experiment" and "started" in problem.rule


def test_nothing_changes_without_words():
    saved = compose(["experiment=h200_8b", "optim.eps=1e-6"])
    assert recompose(saved, []).run == saved


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        compose(["lr=1", "engine=zer02", "steps=0", "precision=bf61"])
    assert {p.key for p in caught.value.problems} == {"lr", "engine", "steps", "precision"}
    assert str(caught.value).startswith("4 problems in the configuration")
