"""The tokenizer of a build: given or trained, pinned by its hash; and the fastest way from texts to arrays of ids."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from officina.trainer.data.manifest import TokenizerInfo
from officina.trainer.data.shards import DTYPES
from officina.trainer.errors import DataError, OfficinaError
from officina.trainer.hf.tokenizers import tokenizer_text

if TYPE_CHECKING:
    from officina.trainer.data.documents import Document
    from officina.trainer.data.samples import Part

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
    """The text of a tokenizer.json, or one made from a tokenizer.model (SentencePiece) or tekken.json; `path` may be their
    folder. Raises DataError if it is none."""
    try:
        text = tokenizer_text(path)
        _parsed(text)
    except OfficinaError as exc:
        raise DataError(f"--tokenizer {exc}, or leave the option out") from exc
    except Exception as exc:  # tokenizers raises bare Exception
        raise DataError(f"--tokenizer {path}: is no tokenizer.json ({exc}). "
                        "Name a file in the format of Hugging Face tokenizers, or leave the option out.") from exc
    return text


def tokenizer_info(text: str, eos: str) -> TokenizerInfo:
    """What the manifest says of the tokenizer. Raises DataError if it has no token to end documents with."""
    vocabulary = _parsed(text).get_vocab(with_added_tokens=True)
    found = next((name for name in ([eos] if eos else EOS_NAMES) if name in vocabulary), None)
    if found is None:
        raise DataError(f"the tokenizer has no token {eos or ' or '.join(EOS_NAMES)} to end documents with. "
                        "Name the one it has: --eos TOKEN")
    return TokenizerInfo(sha256=hashlib.sha256(text.encode()).hexdigest(),
                         vocab_size=max(vocabulary.values()) + 1, eos=found, eos_id=vocabulary[found])


@lru_cache(maxsize=1)
def _parsed(text: str) -> Any:
    """To be asked, not changed: a large vocabulary takes a second to load."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(text)


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

    def arrays(self, encoding: Any) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """(n + 1,) ids in the shards' dtype, all of them trained on."""
        ids = array("I", encoding.ids)  # a third of the time that NumPy takes for a list
        out = np.empty(len(ids) + 1, DTYPES[self.dtype])
        out[:-1], out[-1] = np.frombuffer(ids, np.uint32), self._eos_id
        return [(out, None)]


class SampleEncoder:
    """Samples to token ids and to which of them are trained on: those that begin within an answer.

    Special tokens that the text spells are special tokens. A token never holds a part of a prompt and a part of its answer:
    there the text is divided and each part tokenised by itself.
    """

    def __init__(self, text: str, info: TokenizerInfo) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(text)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.post_processor = None  # some trim white space off the offsets
        self.dtype = dtype_of(info.vocab_size)

    def encode(self, documents: Sequence["Document"]) -> list[Any]:
        """Per document its encodings, with what `arrays` needs beside them."""
        encodings = iter(self._tokenizer.encode_batch([part.text for document in documents for part in document.parts],
                                                      add_special_tokens=False))
        return [(document, [next(encodings) for _ in document.parts]) for document in documents]

    def arrays(self, encoded: Any) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """(n,) ids in the shards' dtype and (n,) bool, for each part. Raises DataError without place and text for a bad row."""
        document, encodings = encoded
        return [self._part(part, encoding) for part, encoding in zip(document.parts, encodings, strict=True)]

    def _part(self, part: "Part", encoding: Any) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = np.asarray(encoding.ids), np.asarray(encoding.offsets).reshape(-1, 2)
        cuts = sorted({a for a, _ in part.spans if ((offsets[:, 0] < a) & (offsets[:, 1] > a)).any()})
        if cuts:
            bounds = [0, *cuts, len(part.text)]
            pieces = [self._tokenizer.encode(part.text[a:b], add_special_tokens=False) for a, b in pairwise(bounds)]
            whole = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            ids = np.concatenate([np.asarray(piece.ids, np.int64) for piece in pieces])
            offsets = np.concatenate([np.asarray(piece.offsets).reshape(-1, 2) + a for piece, a in
                                      zip(pieces, bounds, strict=False)])
            if self._tokenizer.decode(ids.tolist(), skip_special_tokens=False) != whole:
                raise DataError("a token lies across the border of prompt and answer, and this tokenizer gives another text "
                                "when they are tokenised one by one. End the prompt with a line break, or with a template that "
                                "ends it with a special token.")
        trained = np.zeros(len(ids), bool)
        for a, b in part.spans:
            trained |= (offsets[:, 0] >= a) & (offsets[:, 0] < b)
        if not trained[1:].any():
            raise DataError("no token of it is trained on. Leave the row out.")
        return ids.astype(DTYPES[self.dtype]), trained


def dtype_of(vocab_size: int) -> str:
    """The narrowest dtype of shards that holds every id."""
    return "u8" if vocab_size <= 1 << 8 else "u16" if vocab_size <= 1 << 16 else "u32"
