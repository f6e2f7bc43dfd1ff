"""Tokenizers of every kind against the libraries that made them, on real published files and on models trained here."""

import io
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from officina.trainer.errors import OfficinaError
from officina.trainer.hf.tokenizers import tokenizer_text

sentencepiece = pytest.importorskip("sentencepiece")
mistral_common = pytest.importorskip("mistral_common")
PUBLISHED = Path(mistral_common.__file__).parent / "data"

CODE = Path(json.__file__).read_text().split("\n\n") + Path(pytest.__file__).read_text().split("\n\n")
TEXTS = ["", " ", "  two  spaces ", "Hello, world!", "Ærøskøbing äiti Çelebi Łódź", "日本語のテキスト", "emoji 🎉👩‍👩‍👧",
         "tab\tnew\nline\r\n", "é vs é", "<s>text</s>", "ﬁ ligature ½ ㎏", "1234567 3.14159", "\x07 bell", "мир и труд",
         "Ελλάδα", "a" * 300, "don't won't I'LL", "x\u00a0y\u2003z", *(" " * n + "x" for n in range(2, 20)), *CODE]


def ours(path):
    tokenizer = Tokenizer.from_str(tokenizer_text(path))
    tokenizer.encode_special_tokens = True  # as `officina data build` has it: a text cannot spell a control token
    return tokenizer


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3",
                                  "mistral_instruct_tokenizer_241114.model.v7"])
def test_published_sentencepiece_models(name):
    tokenizer = ours(PUBLISHED / name)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(PUBLISHED / name))
    assert tokenizer.get_vocab_size() == reference.get_piece_size()
    pieces = [reference.id_to_piece(i).replace("\N{LOWER ONE EIGHTH BLOCK}", " ") for i in range(0, len(reference), 7)]
    for text in [*TEXTS, "[INST] Hi [/INST]there</s>", "a[INST][INST]  b", *pieces]:
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids)


def test_published_tekken():
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path = PUBLISHED / "tekken_240911.json"
    tokenizer, reference = ours(path), Tekkenizer.from_file(str(path))
    assert tokenizer.get_vocab_size() == reference.n_words == 131_072
    for text in TEXTS:
        ids = reference.encode(text, bos=False, eos=False)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for name in ("<unk>", "<s>", "</s>", "[INST]", "[TOOL_CONTENT]", "<SPECIAL_999>"):
        assert tokenizer.token_to_id(name) == reference.get_special_token(name)


def trained(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines() if line.strip()]), model_writer=model,
        vocab_size=700, minloglevel=2, **options)
    return model.getvalue()


@pytest.mark.parametrize("options", [
    dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
         character_coverage=0.98),
    dict(model_type="bpe", byte_fallback=True, normalization_rule_name="nmt_nfkc", split_digits=True, character_coverage=0.98),
    dict(model_type="bpe", byte_fallback=True, normalization_rule_name="nfkc_cf", add_dummy_prefix=False),
    dict(model_type="bpe", normalization_rule_name="nfkc", character_coverage=0.98),
    dict(model_type="bpe", byte_fallback=True, user_defined_symbols=["self", "json", "se", "<|im_start|>"]),
    dict(model_type="unigram", byte_fallback=True, normalization_rule_name="nmt_nfkc"),
    dict(model_type="unigram", byte_fallback=True, user_defined_symbols=["self", "json"]),
    dict(model_type="unigram", normalization_rule_name="identity", remove_extra_whitespaces=False,
         add_dummy_prefix=False, control_symbols=["<ctrl>"]),
], ids=["bpe-llama", "bpe-nfkc", "bpe-casefold", "bpe-unk", "bpe-symbols", "unigram-nfkc", "unigram-symbols",
        "unigram-identity"])
def test_models_of_every_setting(options, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained(**options))
    tokenizer = ours(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = [text for text in TEXTS if set(text) != {"a"} or options["model_type"] == "bpe"]  # all of its splits tie
    wrong = [text for text in texts if tokenizer.encode(text, add_special_tokens=False).ids != reference.encode(text)]
    assert not wrong


@pytest.mark.parametrize(("options", "told"), [
    (dict(model_type="word"), "no SentencePiece model of kind BPE or unigram"),
    (dict(model_type="unigram", treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix"),
    (dict(model_type="bpe", byte_fallback=True, user_defined_symbols=["  "]), "symbols with spaces"),
])
def test_what_would_be_encoded_otherwise_is_refused(options, told, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained(**options, **({"hard_vocab_limit": False})))
    with pytest.raises(OfficinaError, match=told):
        ours(tmp_path)


def test_a_folder_gives_its_best_file_and_what_is_none_is_refused(tmp_path):
    with pytest.raises(OfficinaError, match=r"has no tokenizer\.json, tokenizer\.model or tekken\.json"):
        tokenizer_text(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((PUBLISHED / "tokenizer.model.v1").read_bytes())
    assert Tokenizer.from_str(tokenizer_text(tmp_path)).get_vocab_size() == 32_000
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    assert tokenizer_text(tmp_path) == '{"model": 1}'
    for damaged in (b"\xff\xff", b"\x0a\x7fabc", b'{"config": {}, "vocab": []}', b"{"):
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(OfficinaError, match="Copy it anew"):
            tokenizer_text(tmp_path / "x")
    with pytest.raises(OfficinaError, match="cannot be read"):
        tokenizer_text(tmp_path / "nothing")
