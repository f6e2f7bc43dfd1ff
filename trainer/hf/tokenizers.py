"""Tokenizers in the forms models come with, turned into a tokenizer.json: SentencePiece (`tokenizer.model`) and tekken.

Both files are data and are read as such: no class that a model names is ever imported, no code of its folder run. The ids
are those of the libraries that made the files, sentencepiece and mistral-common; the tests compare them. (Of a unigram
model's equally likely splits, one text of `aaaa...`, another may be taken.) Torch-free.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from officina.trainer.errors import OfficinaError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's sign for a space."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json")
"""In the order of preference."""
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_TEKKEN_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
                   "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
                   "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
"""Control tokens of tekken files from before they listed theirs."""


def tokenizer_text(path: Path) -> str:
    """The text of a tokenizer.json for a file of any of the three kinds, or for a folder that holds one.

    Raises OfficinaError if it is none of them.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in TOKENIZER_FILES if (path / name).is_file()), None)
        if found is None:
            raise OfficinaError(f"{path} has no {', '.join(TOKENIZER_FILES[:2])} or {TOKENIZER_FILES[2]}. Name the folder of a "
                                "model or the file itself")
        path = found
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise OfficinaError(f"{path} cannot be read: {error.strerror}. Name a tokenizer.json, tokenizer.model or "
                            "tekken.json") from error
    try:
        if raw[:1] != b"{":
            return _from_sentencepiece(raw, path)
        values = json.loads(raw)
        return _from_tekken(values) if {"config", "vocab"} <= values.keys() else raw.decode()
    except (ValueError, KeyError, TypeError, IndexError, UnicodeDecodeError) as error:
        raise OfficinaError(f"{path}: is no tokenizer.json, SentencePiece model or tekken.json that can be read ({error!r}). "
                            "Copy it anew from where the model came from") from error


# ---- SentencePiece -------------------------------------------------------------------------------------------------
def _from_sentencepiece(raw: bytes, path: Path) -> str:
    """Format: sentencepiece_model.proto of https://github.com/google/sentencepiece."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    fields = _fields(raw)
    pieces = [_piece(_fields(entry)) for entry in fields.get(1, [])]
    trainer, normalizer = (_fields(fields.get(n, [b""])[-1]) for n in (2, 3))
    kind, fallback = _number(trainer, 3, _UNIGRAM), bool(_number(trainer, 35, 0))
    if not pieces or kind not in (_UNIGRAM, _BPE):
        raise OfficinaError(f"{path} is no SentencePiece model of kind BPE or unigram. Copy it anew from its origin")
    symbols = [name for name, _, type_ in pieces if type_ == _USER]
    spaced = any(SPACE in name or " " in name for name in symbols)
    for there, what in ((_number(trainer, 24, 0), "puts the sign of a space behind words (treat_whitespace_as_suffix)"),
                        (spaced, "has symbols with spaces")):
        if there:
            raise OfficinaError(f"{path} {what}, which officina would not encode as sentencepiece does. Take the "
                                "tokenizer.json that belongs to it")
    unknown = next((name for name, _, type_ in pieces if type_ == _UNKNOWN), None)
    if kind == _BPE:
        ids = {name: i for i, (name, _, _) in enumerate(pieces)}
        score = {name: score for name, score, type_ in pieces if type_ == _NORMAL}
        # Best score first; of the ways to the same piece the longest left half, which is what sentencepiece comes to.
        merges = sorted(_splits(score), key=lambda pair: (-score[pair[0] + pair[1]], -len(pair[0])))
        model = models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback,
                           ignore_merges=bool(symbols))  # no merges lead to a symbol; it is a word of its own, see below
    else:
        lowest = min(score for _, score, type_ in pieces if type_ == _NORMAL)
        usable = (_NORMAL, _BYTE, _UNKNOWN, _USER)  # the others stand in no text
        vocabulary = [(name, score if type_ in usable else lowest - 1e6) for name, score, type_ in pieces]
        model = models.Unigram(vocabulary, next((i for i, p in enumerate(pieces) if p[2] == _UNKNOWN), None), fallback)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, dummy = _normalizer(normalizer)
    if symbols:  # they are found before anything else, the longest first
        choice = "|".join(re.escape(name) for name in sorted(symbols, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(choice), "isolated")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if dummy else []))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name, _, type_ in pieces
                                  if type_ in (_UNKNOWN, _CONTROL)])
    return tokenizer.to_str()


def _splits(score: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Every way to make a piece of two others."""
    for name in score:
        for cut in range(1, len(name)):
            if name[:cut] in score and name[cut:] in score:
                yield name[:cut], name[cut:]


def _normalizer(spec: Mapping[int, list]) -> tuple[Any, bool]:
    """What sentencepiece does before it looks for pieces, and whether it puts a space in front of the text."""
    from tokenizers import Regex, normalizers

    charsmap, dummy = spec.get(2, [b""])[-1], bool(_number(spec, 3, 1))
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if _number(spec, 4, 1):
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if dummy:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)]), dummy


def _piece(entry: Mapping[int, list]) -> tuple[str, float, int]:
    import struct

    score = struct.unpack("<f", entry[2][-1])[0] if 2 in entry else 0.0
    return entry[1][-1].decode(), score, _number(entry, 3, _NORMAL)


def _number(fields: Mapping[int, list], key: int, absent: int) -> int:
    return fields[key][-1] if key in fields else absent


def _fields(raw: bytes) -> dict[int, list]:
    """A protocol buffer's fields by number: whole numbers, or bytes. https://protobuf.dev/programming-guides/encoding"""
    found: dict[int, list] = {}
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        if tag & 7 == 0:
            value, at = _varint(raw, at)
        elif tag & 7 in (1, 2, 5):
            size, at = _varint(raw, at) if tag & 7 == 2 else (8 if tag & 7 == 1 else 4, at)
            value, at = raw[at:at + size], at + size
        else:
            raise ValueError(f"a field of wire type {tag & 7} at byte {at}")
        if at > len(raw):
            raise ValueError("it ends within a field")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


# ---- tekken --------------------------------------------------------------------------------------------------------
def _from_tekken(values: Mapping[str, Any]) -> str:
    """Byte-level BPE by ranks: the pair whose whole has the lowest rank is joined first, and ids follow the control tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    config = values["config"]
    n_special = config["default_num_special_tokens"]
    listed = values.get("special_tokens") or [{"rank": i, "token_str": name} for i, name in enumerate(_TEKKEN_SPECIAL)]
    named = {entry["rank"]: entry["token_str"] for entry in listed}
    special = [named.get(i, f"<SPECIAL_{i}>") for i in range(n_special)]
    entries = values["vocab"][:config["default_vocab_size"] - n_special]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
    letters = _byte_letters()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    ids = {name: i for i, name in enumerate(special)} | {text[token]: rank + n_special for token, rank in ranks.items()}
    pairs = sorted(((rank, ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
                    for token, rank in ranks.items() for cut in range(1, len(token))
                    if token[:cut] in ranks and token[cut:] in ranks), key=lambda pair: pair[:3])
    tokenizer = Tokenizer(models.BPE(ids, [(text[left], text[right]) for *_, left, right in pairs], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(config["pattern"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return tokenizer.to_str()


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies. Source: GPT-2's encoder."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
