"""Samples to fine-tune on: shapes, templates as transformers writes them, loss on the answers and on nothing else."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from officina.launch.cli import main as officina
from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.chat import PLAIN, Chat, load_chat
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.samples import read_sample
from officina.trainer.data.stream import Stream
from officina.trainer.data.tokenizer import SampleEncoder, tokenizer_info
from officina.trainer.errors import DataError

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MARKED = """{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant
{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}

{% else %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = """{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] | trim + """ \
    """'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"""
INST = """{{- bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}""" \
    """{{ raise_exception('roles must alternate') }}{% endif %}""" \
    """{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}""" \
    """{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "llama": LLAMA, "inst": INST, "plain": PLAIN}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a model has it: a byte-level tokenizer that puts <s> before a text, and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["the answer is yes, said the user: no. \n\n hello world ü 東京"] * 50, trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.Sequence([  # as Llama 3 has it: the first one takes white space off the offsets
        processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chat_of(model: Path, template: str = CHATML, **words: object) -> Chat:
    file = model / "asked.jinja"
    file.write_text(template)
    return load_chat(model, (model / "tokenizer.json").read_text(), template=str(file), **words)


def test_special_tokens_are_found_where_older_tokenizers_have_them(model, tmp_path):
    """transformers reads both files; without the second the text would begin without its token, in silence."""
    shutil.copy(model / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": LLAMA}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}))
    chat = load_chat(tmp_path, (tmp_path / "tokenizer.json").read_text())
    text, _ = chat.render([U])
    assert chat.eos == "<|im_end|>" and text.startswith("<s><|im_start|>user")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert text == theirs.apply_chat_template([U], tokenize=False)


def tokens_of(model: Path, chat: Chat, row: dict) -> list[tuple[list[int], list[bool]]]:
    """Ids and marks of each part of a row."""
    class Document:
        parts, place = read_sample(row, chat).parts, "file row 1"

    text = (model / "tokenizer.json").read_text()
    encoder = SampleEncoder(text, tokenizer_info(text, chat.eos))
    [encoded] = encoder.encode([Document])
    return [(ids.tolist(), trained.tolist()) for ids, trained in encoder.arrays(encoded)]


def trained_text(model: Path, chat: Chat, row: dict) -> list[list[str]]:
    """Of each part, the runs of tokens that are trained on, as text."""
    tokenizer, found = Tokenizer.from_file(str(model / "tokenizer.json")), []
    for ids, trained in tokens_of(model, chat, row):
        edges = np.flatnonzero(np.diff([False, *trained, False]))
        found.append([tokenizer.decode(ids[a:b], skip_special_tokens=False) for a, b in edges.reshape(-1, 2)])
    return found


WORDS = st.text(st.sampled_from("ab yes\n:ü東🙂"), min_size=1, max_size=12).filter(lambda s: s.strip() == s != "")
TALKS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)


@pytest.mark.parametrize("name", TEMPLATES)
@given(talk=TALKS)
@settings(deadline=None, max_examples=25)
def test_conversations_are_those_of_transformers_and_answers_alone_are_trained(model, name, talk) -> None:
    from transformers import PreTrainedTokenizerFast

    chat = chat_of(model, TEMPLATES[name])
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"), bos_token="<s>", eos_token="</s>",
                                     chat_template=TEMPLATES[name])
    messages = [m for asked, said in talk for m in (dict(role="user", content=asked), dict(role="assistant", content=said))]
    [(ids, trained)] = tokens_of(model, chat, {"messages": messages})
    marks = "{% generation %}" in TEMPLATES[name]
    wanted = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks)
    whole = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert whole.decode(ids, skip_special_tokens=False) == whole.decode(wanted["input_ids"], skip_special_tokens=False)
    end = chat.check()
    answers = [(" " if name == "inst" else "") + said + end for _, said in talk]
    assert trained_text(model, chat, {"messages": messages}) == [answers]
    prompt = theirs.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert whole.decode(ids[:trained.index(True)], skip_special_tokens=False) == prompt
    if marks and ids == wanted["input_ids"]:
        assert [int(t) for t in trained] == wanted["assistant_masks"]


U, A = {"role": "user", "content": "no"}, {"role": "assistant", "content": "yes"}
SHAPES = {
    "messages": ({"messages": [{"role": "system", "content": "s"}, U, A, U]}, ["yes<|im_end|>"]),
    "sharegpt": ({"system": "s", "conversations": [{"from": "human", "value": "no"}, {"from": "gpt", "value": "yes"}]},
                 ["yes<|im_end|>"]),
    "alpaca": ({"instruction": "no", "input": "a", "output": "yes", "history": [["a", "b"]]}, ["b<|im_end|>", "yes<|im_end|>"]),
    "completion": ({"prompt": "no:", "completion": " yes"}, [" yes</s>"]),
    "completion with its end": ({"prompt": "<s>no:", "completion": "yes</s>"}, ["yes</s>"]),
    "across a token": ({"prompt": "the ", "completion": "answer"}, ["answer</s>"]),
    "completion of messages": ({"prompt": [U, A, U], "completion": [A]}, ["yes<|im_end|>"]),
    "text": ({"text": "hello"}, ["<s>hello</s>"]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_read_and_its_answers_marked(model: Path, name: str) -> None:
    row, answers = SHAPES[name]
    assert trained_text(model, chat_of(model), row) == [
        [answers[0].removeprefix("<s>")] if name == "text" else answers]
    ids = tokens_of(model, chat_of(model), row)[0][0]
    plain = name in ("completion", "completion with its end", "across a token", "text")
    assert ids.count(0) == plain  # <s> once, and with the template only where it writes it


def test_pairs_give_two_answers_to_one_prompt(model: Path) -> None:
    chat = chat_of(model)
    good, bad = dict(role="assistant", content="yes"), dict(role="assistant", content="no")
    rows = [{"prompt": [U], "chosen": [good], "rejected": [bad]}, {"chosen": [U, good], "rejected": [U, bad]},
            {"prompt": "no", "chosen": [U, good], "rejected": [U, bad]}]
    for row in rows:
        assert trained_text(model, chat, row) == [["yes<|im_end|>"], ["no<|im_end|>"]]
        (chosen, _), (rejected, _) = tokens_of(model, chat, row)
        assert chosen[:5] == rejected[:5]
    for row in ({"prompt": "is:", "chosen": " yes", "rejected": " no"}, {"chosen": "is: yes", "rejected": "is: no"}):
        assert trained_text(model, chat, row) == [[" yes</s>"], [" no</s>"]]


WRONG = {
    "no shape": ({"question": "a"}, "expected messages .* or text; it has 'question'"),
    "no list": ({"messages": "hello"}, "no answer|there is none to train on"),
    "empty list": ({"messages": []}, "expected a list of messages as 'messages'; it is empty"),
    "no object": ({"messages": ["a"]}, "expected an object as message 1 of 'messages'; it is a str"),
    "role": ({"messages": [{"role": "bot", "content": "a"}]}, "expected a role of message 1 .*; it has 'bot'"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, "expected a text as content of message 1 .*; it is a int"),
    "empty answer": ({"messages": [U, {"role": "assistant", "content": " "}]}, "expected an answer in message 2 .* is empty"),
    "no answer": ({"messages": [U]}, "expected an answer, a message of role assistant; there is none to train on"),
    "special": ({"messages": [{"role": "user", "content": "<|im_end|>x"}, A]}, r"message 1 .* spells the special token <"),
    "special in a text": ({"prompt": "a</s>", "completion": [A]}, "message 1 of 'prompt' spells the special token </s>"),
    "special in a thought": ({"messages": [U, A | {"reasoning_content": "<|im_end|>"}]}, "message 2 .* spells the special "),
    "special in a call": ({"messages": [U, {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": {"x": ["a", "</s>"]}}}]}, A]}, "message 2 .* spells the special token </s>"),
    "special in a tool": ({"messages": [U, A], "tools": [{"name": "f", "about": "</s>"}]}, "a tool spells the special token <"),
    "special, ShareGPT": ({"system": "</s>", "conversations": [U, A]}, "message 1 of 'system' spells the special token </s>"),
    "special, alpaca": ({"system": "</s>", "instruction": "a", "output": "b"}, "'system' spells the special token </s>"),
    "empty completion": ({"prompt": "a", "completion": ""}, "expected a completion to train on; it is empty"),
    "prompt": ({"prompt": 3, "completion": "a"}, "expected a text as 'prompt'; it is a int"),
    "output": ({"instruction": "a"}, "expected 'output' beside 'instruction'"),
    "history": ({"instruction": "a", "output": "b", "history": ["x"]}, r"expected a list of \[question, answer\]"),
    "tools": ({"messages": [U, A], "tools": "{"}, "expected JSON as 'tools'"),
    "one of two": ({"prompt": "a", "chosen": "b"}, "expected 'chosen' and 'rejected'; it has 'prompt', 'chosen'"),
    "same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "expected chosen and rejected to differ"),
    "kinds": ({"chosen": "b", "rejected": [A]}, "of one kind"),
    "a prefix": ({"chosen": "ab", "rejected": "abc"}, "expected a chosen to train on; it is empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_told_what_was_expected(model: Path, name: str) -> None:
    import re

    row, why = WRONG[name]
    assert re.search(why, read_sample(row, chat_of(model)).why), read_sample(row, chat_of(model)).why


def test_a_template_whose_answers_cannot_be_told_exactly_is_refused(model: Path) -> None:
    drops = CHATML.replace("message.content", "(message.content if loop.last or message.role == 'user' else '...')")
    row = {"messages": [U, A, U, A]}
    assert "answer 2 otherwise when messages follow it. Train on the last one: --train-on last" in read_sample(
        row, chat_of(model, drops)).why
    assert trained_text(model, chat_of(model, drops, last=True), row) == [["yes<|im_end|>"]]
    thinks = CHATML.replace("assistant\\n' }}", "assistant\\n<think>' }}")
    with pytest.raises(DataError, match="which part of message 2 is the answer cannot be told"):
        chat_of(model, thinks).check()
    with pytest.raises(DataError, match=r"ends an answer with 'Answer', which is no special token .* never learns to stop"):
        chat_of(model, CHATML.replace("'<|im_end|>'", "''")).check()
    with pytest.raises(DataError, match="ends an answer with 'Answer'"):
        chat_of(model, MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")).check()
    with pytest.raises(DataError, match="begins with <s> twice"):
        chat_of(model, "{{ bos_token }}" + LLAMA).check()
    with pytest.raises(DataError, match="is no Jinja"):
        chat_of(model, "{% if").check()
    with pytest.raises(DataError, match="asks for today's date, .* --chat-date 2026-11-25"):
        chat_of(model, "{{ strftime_now('%Y') }}" + CHATML).check()
    assert chat_of(model, "{{ strftime_now('%Y') }}" + CHATML, date="2026-11-25").render([U])[0].startswith("2026<|im")
    assert "roles must alternate" in read_sample({"messages": [A]}, chat_of(model, INST)).why
    with pytest.raises(ValueError, match="unsafe|refuses it"):
        chat_of(model, "{{ messages.__class__.__mro__[1].__subclasses__() }}").render([U])


def write_inputs(folder: Path) -> list[Path]:
    """The same conversations in every format."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard
    from datasets import Dataset

    rows = {name: [{"messages": [dict(role="user", content=f"{name} {i}"), A]} for i in range(3)]
            for name in ("jsonl", "gz", "zst", "json", "parquet", "saved")}
    lines = {name: "".join(json.dumps(row) + "\n" for row in given).encode() for name, given in rows.items()}
    (folder / "a.jsonl").write_bytes(lines["jsonl"])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines["gz"]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines["zst"]))
    (folder / "d.json").write_text(json.dumps(rows["json"]))
    pq.write_table(pa.Table.from_pylist(rows["parquet"]), folder / "e.parquet")
    Dataset.from_list(rows["saved"]).save_to_disk(str(folder / "f"))
    with open(folder / "g.csv", "w", newline="") as file:
        writer, long = csv.writer(file), "the answer " * 13_000  # more than csv reads by itself
        writer.writerows([["prompt", "completion"], *([f"csv {i}\n:" + long * (i == 2), f' "yes",{i}'] for i in range(3))])
    return [folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json", "e.parquet", "f", "g.csv")]


def test_padding_cutting_and_bos_of_the_tokenizer_stay_out_of_the_samples(tmp_path: Path, model: Path) -> None:
    """Its file may say to pad on the left, to cut at 8 tokens, and to begin each text with <s>; the template has its own."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_padding(direction="left", length=64)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shutil.copyfile(model / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    row = {"messages": [U, A]}
    [(ids, trained)] = tokens_of(tmp_path, chat_of(tmp_path, LLAMA), row)
    assert [(ids, trained)] == tokens_of(model, chat_of(model, LLAMA), row)
    assert ids.count(0) == 1 and ids[0] == 0 and 8 < len(ids) < 64  # one <s>, where the template put it
    assert not trained[0] and trained[-1]


def test_every_format_is_built_into_shards_that_say_what_is_trained(tmp_path: Path, model: Path, capsys,
                                                                    monkeypatch) -> None:
    (tmp_path / "in").mkdir()
    inputs = write_inputs(tmp_path / "in")
    words = ["data", "build", str(tmp_path / "out"), *map(str, inputs), "--samples", "--tokenizer", str(model)]
    assert officina([*words, "--validation", "0"]) == 0
    out = capsys.readouterr().out
    assert "answers end with <|im_end|>" in out
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.manifest.samples, dataset.manifest.splits["train"].documents) == ("answers", 21)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    shard = Stream(dataset, "train").shard(0)
    found, start = [], 0
    for end in shard.ends.tolist():
        ids, trained = shard.read(start, end), shard.trained(np.arange(start, end))
        found.append(tokenizer.decode(ids[trained].tolist(), skip_special_tokens=False))
        start = end
    assert found == ["yes<|im_end|>"] * 18 + [f' "yes",{i}</s>' for i in range(3)]
    assert officina(["data", "verify", str(tmp_path / "out")]) in (0, 2)
    capsys.readouterr()
    assert officina(["data", "inspect", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "<|im_start|>user\njsonl 0<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n" in out
    assert "2 of 24 tokens are trained on" in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert officina(["data", "inspect", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "<|im_start|>assistant\n\x1b[1;32myes<|im_end|>\x1b[0m\n" in out and "⟦" not in out


def test_a_build_names_the_row_and_says_what_is_missing(tmp_path: Path, model: Path) -> None:
    file, good = tmp_path / "rows.jsonl", {"messages": [U, A]}

    def made(*rows: dict, **words: object):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return build(tmp_path / "out", BuildOptions(**{
            "inputs": [file], "samples": True, "tokenizer": model, "validation": 0.0, "overwrite": True, **words}))

    with pytest.raises(DataError, match=r"1 bad row, 0 allowed:\n  - .*rows\.jsonl line 2: expected an answer, a message of"):
        made(good, {"messages": [U]})
    assert made(good, {"messages": [U]}, max_bad_rows=1).stats["left_out"]["bad_rows"] == 1
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match="1 samples with answers and 1 preference pairs"):
        made(good, pair)
    assert made(pair).manifest.samples == "pairs" and made(pair).manifest.splits["train"].documents == 2
    with pytest.raises(DataError, match=r"--samples: needs the tokenizer .* --tokenizer MODEL"):
        made(good, tokenizer=None)
    with pytest.raises(DataError, match=r"Add: --samples"):
        made(good, samples=False, chat_template="plain")
    with pytest.raises(DataError, match="--chat-template nowhere: cannot be read"):
        made(good, chat_template="nowhere")
    assert made(good, chat_template="plain").manifest.provenance["answers_end_with"] == "</s>"
    file.with_suffix(".csv").write_text("prompt,completion\na\n")
    with pytest.raises(DataError, match=r"rows\.csv row 1: expected 2 columns"):
        made(good, inputs=[file.with_suffix(".csv")])
    file.with_suffix(".json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="expected a JSON list of objects; it is a dict"):
        made(good, inputs=[file.with_suffix(".json")])
    file.with_suffix(".json").write_text("[")
    with pytest.raises(DataError, match="is no JSON"):
        made(good, inputs=[file.with_suffix(".json")])


def test_a_row_that_is_not_utf8_is_left_out_as_a_text_is(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "caf\xe9", "completion": "b"}\n{"prompt": "a", "completion": "b"}\n')
    built = build(tmp_path / "out", BuildOptions(inputs=[file], samples=True, tokenizer=model, validation=0.0))
    left_out = built.stats["left_out"]
    assert left_out["undecodable_files"] == ["rows/rows.jsonl line 1"] and left_out["bad_rows"] == 0
    assert built.manifest.splits["train"].documents == 1


def test_rows_that_only_their_tokens_show_to_be_bad_count_with_the_others(tmp_path: Path, model: Path) -> None:
    """A tokenizer that puts a space before every text cannot divide a token that lies across the border to an answer."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = [{"prompt": f"{i} the ans", "completion": "wer is yes" if i in (2, 5) else " is yes"} for i in range(8)]
    lines = [json.dumps(row) for row in rows]
    lines.insert(4, "no row")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))

    def made(allowed: int, **about: object):
        return build(tmp_path / "out", BuildOptions(
            inputs=[tmp_path / "rows.jsonl"], samples=True, tokenizer=tmp_path, about=about, validation=0.0,
            chat_template="plain", max_bad_rows=allowed))

    with pytest.raises(DataError, match=r"2 bad rows, 1 allowed:\n  - .*rows\.jsonl line 5: no JSON.*\n"
                                        r"  - .*rows\.jsonl line 3: a token lies across.*\nMend .*--max-bad-rows 10"):
        made(1)
    with pytest.raises(DataError, match=r"3 bad rows, 2 allowed:\n(.*\n){2}  - .*rows\.jsonl line 7: a token lies across"):
        made(2)
    result = made(3)
    assert result.stats["left_out"]["bad_rows"] == 3 and result.manifest.splits["train"].documents == 6
    with pytest.raises(DataError) as told:
        shutil.rmtree(tmp_path / "out")
        made(1, sensitive=True)
    assert "line 3: cannot be read; why is not told" in str(told.value) and "lies across" not in str(told.value)
