"""The tokenizer of a build: given or trained, pinned by its hash; and the fastest way from texts to arrays of ids."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from officina.trainer.data.manifest import TokenizerInfo
from officina.trainer.data.shards import DTYPES
from officina.trainer.errors import DataError

EOS = "<|endoftext|>"
EOS_NAMES = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>")
"""Tokens that end a document in known tokenizers, in the order of preference."""


def train_tokenizer(batches: Iterable[list[str]], vocab_size: int, eos: str) -> str:
    """A byte-level BPE (no unknown token, every byte has one) as the text of a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(batches, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[eos or EOS], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), max_token_length=64))
    return tokenizer.to_str(pretty=True)


def given_tokenizer(path: Path) -> str:
    """The text of a tokenizer.json. Raises DataError if it is none."""
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        Tokenizer.from_str(text)
    except Exception as exc:  # tokenizers raises bare Exception
        raise DataError(f"--tokenizer {path}: is no tokenizer.json ({exc}). "
                        "Name a file in the format of Hugging Face tokenizers, or leave the option out.") from exc
    return text


def tokenizer_info(text: str, eos: str) -> TokenizerInfo:
    """What the manifest says of the tokenizer. Raises DataError if it has no token to end documents with."""
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    found = next((name for name in ([eos] if eos else EOS_NAMES) if name in vocabulary), None)
    if found is None:
        raise DataError(f"the tokenizer has no token {eos or ' or '.join(EOS_NAMES)} to end documents with. "
                        "Name the one it has: --eos TOKEN")
    return TokenizerInfo(sha256=hashlib.sha256(text.encode()).hexdigest(),
                         vocab_size=max(vocabulary.values()) + 1, eos=found, eos_id=vocabulary[found])


class Encoder:
    """Texts to token ids, each text ended by the end of document."""

    def __init__(self, text: str, info: TokenizerInfo) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> must not end the document
        self._encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)  # without offsets
        self._eos_id, self.dtype = info.eos_id, dtype_of(info.vocab_size)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Encodings, without the end of document: the part that needs no Python, so that it runs beside it in a thread."""
        return self._encode(texts, add_special_tokens=False)

    def ids(self, encoding: Any) -> np.ndarray:
        """(n + 1,) ids in the shards' dtype."""
        ids = encoding.ids
        out = np.empty(len(ids) + 1, DTYPES[self.dtype])
        out[:-1], out[-1] = ids, self._eos_id
        return out


def dtype_of(vocab_size: int) -> str:
    """The narrowest dtype of shards that holds every id."""
    return "u8" if vocab_size <= 1 << 8 else "u16" if vocab_size <= 1 << 16 else "u32"
