"""Bytes and languages of labels, against the texts themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.heldout import LabelFacts, token_bytes
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.stream import Stream

TEXTS = [("fin_Latn", "Mitä kuuluu? Äidin öljylamppu. " * 7), ("swe_Latn", "På svenska: åäö, 1 234 kr.\n" * 5),
         ("jpn_Jpan", "日本語の文章です。😀" * 9), ("fin_Latn", "tab\tand  two spaces \x0b" * 11)]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([text for _, text in TEXTS], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama's: a space in front, U+2581 for spaces, single bytes for what the vocabulary does not have."""
    words = {f"<0x{i:02X}>": i for i in range(256)} | {"</s>": 256, "▁": 257, "M": 258, "▁M": 259, "ä": 260, "i": 261, "t": 262}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[("▁", "M")], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_bytes_and_languages_of_labels(tmp_path: Path, kind) -> None:
    tokenizer = kind()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t, "lang": g}) + "\n" for g, t in TEXTS))
    build(tmp_path / "d", BuildOptions(inputs=[tmp_path / "in.jsonl"], tokenizer=tmp_path / "tokenizer.json", validation=0.0))
    stream = Stream(open_dataset(tmp_path / "d"), "train")
    facts, shard, T = LabelFacts(stream), stream.shard(0), 16
    assert shard.document_bytes.tolist() == [len(t.encode()) for _, t in TEXTS]
    assert facts.languages == ["fin_Latn", "jpn_Jpan", "swe_Latn"]
    rows = np.arange(stream.rows(T))
    languages, sizes = facts.of_labels(rows, stream.gather(rows, T, borders=False).tokens[:, 1:].astype(np.int64))
    flat_languages, flat = languages.ravel(), sizes.ravel()
    start = 0
    for (language, text), end in zip(TEXTS, shard.ends.tolist(), strict=True):
        labels = slice(max(start, 1) - 1, min(end, len(flat) + 1) - 1)  # label j is token j + 1
        assert {facts.languages[i] for i in flat_languages[labels]} == {language}
        if end <= len(flat):
            first = sizes_of_first(facts, shard.data[start:end], len(text.encode())) if start == 0 else 0
            assert flat[labels].sum() + first == pytest.approx(len(text.encode()))
        start = end
    if kind is byte_level:
        [ids] = [tokenizer.encode(TEXTS[0][1]).ids]
        assert flat[:len(ids) - 1].tolist() == [len(tokenizer.decode([i]).encode()) if "\N{REPLACEMENT CHARACTER}" not in
                                                tokenizer.decode([i]) else flat[n] for n, i in enumerate(ids[1:])]


def sizes_of_first(facts: LabelFacts, tokens: np.ndarray, n_bytes: int) -> float:
    table = facts._table
    return table[tokens[0]] * n_bytes / table[tokens].sum()


def test_a_vocabulary_that_cannot_be_read_has_no_bytes(tmp_path: Path) -> None:
    assert token_bytes(tmp_path / "none.json") is None
    (tmp_path / "t.json").write_text("{}")
    assert token_bytes(tmp_path / "t.json") is None
