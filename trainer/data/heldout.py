"""What a held-out loss is told by: the language of each label, and the bytes of text that it stands for.

Bytes are those of the texts as they were before tokenisation, so that bits per byte compare across tokenizers. A document's are
noted in its shard; within the document a token has the bytes that its entry in the vocabulary spells. Where these do not add up
to the document's (a tokenizer that normalises, or puts a space in front), each gets its share of the document's. The end of a
document has none, and the first token of a document is not predicted: neither its loss nor its bytes count.
"""

import json
from pathlib import Path

import numpy as np

from officina.trainer.data.documents import NO_LANGUAGE
from officina.trainer.data.manifest import TOKENIZER
from officina.trainer.data.stream import Stream


class LabelFacts:
    """Languages and bytes of the labels of a stream's rows."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.languages = stream.dataset.manifest.languages or [NO_LANGUAGE]
        self._table = token_bytes(stream.dataset.folder / TOKENIZER)
        self._scales: dict[tuple[int, int], float] = {}

    def of_labels(self, rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the languages and UTF-8 bytes of `labels` (n, T), those of `rows` (n,): (n, T) int64 and (n, T) float64.

        Labels that are none (below 0) have neither.
        """
        languages, sizes = np.zeros(labels.shape, np.int64), np.zeros(labels.shape)
        counted = np.nonzero(labels >= 0)
        places = self._stream.places(rows, labels.shape[1])[:, 1:][counted]
        of_shard = np.searchsorted(self._stream.token_starts, places, side="right") - 1
        for number in np.unique(of_shard):
            here, shard = of_shard == number, self._stream.shard(int(number))
            cells = counted[0][here], counted[1][here]
            document = np.searchsorted(shard.ends, places[here] - self._stream.token_starts[number], side="right")
            if len(shard.language_ids):
                languages[cells] = shard.language_ids[document]
            if self._table is not None:
                each, nth = np.unique(document, return_inverse=True)
                scales = np.asarray([self._scale(int(number), int(d)) for d in each])
                sizes[cells] = self._table[labels[cells]] * scales[nth]
        return languages, sizes

    def _scale(self, number: int, document: int) -> float:
        """Bytes of the document's text for each byte that its tokens spell; 1 where the shard does not note them."""
        shard = self._stream.shard(number)
        if not len(shard.document_bytes):
            return 1.0
        if (number, document) not in self._scales:
            start = int(shard.ends[document - 1]) if document else 0
            spelled = float(self._table[self._stream.tokens(number, start, int(shard.ends[document]))].sum())
            self._scales[number, document] = int(shard.document_bytes[document]) / spelled if spelled else 0.0
        return self._scales[number, document]


def token_bytes(path: Path) -> np.ndarray | None:
    """(vocabulary,) float64: bytes of text that each token of a tokenizer.json spells; None if there is none to read.

    Byte-level vocabularies (GPT-2's alphabet) write a byte as a character; SentencePiece's write a space as U+2581 and single
    bytes as <0x0A>. Special tokens spell nothing.
    """
    try:
        spec = json.loads(path.read_bytes())
        vocabulary = spec["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(vocabulary, list):  # Unigram: [token, score] by id
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
    added = spec.get("added_tokens") or []
    table = np.zeros(max([*vocabulary.values(), *(token["id"] for token in added)], default=-1) + 1)
    byte_level = "ByteLevel" in json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])
    for token, number in vocabulary.items():
        table[number] = _spelled(token, byte_level)
    for token in added:
        table[token["id"]] = 0 if token.get("special") else len(token["content"].encode())
    return table


def _spelled(token: str, byte_level: bool) -> int:
    if byte_level and all(character in _BYTE_CHARACTERS for character in token):
        return len(token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.removeprefix("##").replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode())


def _byte_characters() -> frozenset[str]:
    """The 256 characters of the byte-level alphabet: printable Latin-1 as it is, the other bytes from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return frozenset(map(chr, [*plain, *range(0x100, 0x100 + 256 - len(plain))]))


_BYTE_CHARACTERS = _byte_characters()
