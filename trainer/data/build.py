"""Builds a data set of tokens from text files and JSON lines: tokenizer, splits, shards, manifest.

The same files give the same bytes: documents are read in the order of their names, the split follows from a
hash of the document, the tokenizer's training is deterministic, and no path, host, user or time is stored.
"""

import hashlib
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from officina.trainer.data.manifest import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    TokenizerInfo,
    write_manifest,
    write_whole,
)
from officina.trainer.data.shards import SHARD_BYTES, SplitWriter
from officina.trainer.data.sources import (
    INCLUDE,
    Document,
    LeftOut,
    Progress,
    TextSource,
    find_sources,
    read_documents,
    standard_library,
)
from officina.trainer.errors import DataError

EOS = "<|endoftext|>"
EOS_NAMES = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>")
"""Tokens that end a document in known tokenizers, in the order of preference."""
TRAIN, VALIDATION = "train", "validation"
SAMPLE_BYTES = 64 << 20
"""Text a tokenizer is trained on at most, chosen by the documents' hashes: merges no longer change much beyond it."""
_BATCH_CHARACTERS = 1 << 21
"""Text tokenised at once, by all cores."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What `officina data build` is asked for."""

    inputs: Sequence[str | Path] = ()
    """Files and folders; none = the standard library of the Python that runs."""
    include: Sequence[str] = INCLUDE
    """Patterns of file names that are read of a folder."""
    text_field: str = "text"
    """Field of JSON lines that holds the text."""
    tokenizer: str | Path | None = None
    """A tokenizer.json to be used; none = a byte-level BPE is trained."""
    vocab_size: int = 4096
    """Size of the trained tokenizer."""
    eos: str = ""
    """Token appended to each document; empty = the first of `EOS_NAMES` that the tokenizer has."""
    validation: float = 0.05
    """Share of documents held out, chosen by a hash of their content."""
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False
    """Replace a data set that is there already."""
    about: dict[str, Any] = field(default_factory=dict)
    """Further fields of dataset.json: name, version, description, licence, personal_data, sensitive."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What was built."""

    manifest: Manifest
    stats: dict[str, Any]
    """As in stats.json."""


def build(folder: str | Path, options: BuildOptions,
          progress: Progress = lambda phase, done, total: None) -> BuildResult:
    """Build the data set in `folder`; it counts as one only when its dataset.json stands, which is written last.

    Raises DataError if `folder` holds a data set already, an input is missing or damaged, or nothing is left to train on.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists() and not options.overwrite:
        raise DataError(f"{folder} holds a data set already. Show it with `officina data inspect {folder}`, "
                        "build into another folder, or replace it with --overwrite.")
    provenance: dict[str, Any] = {"tool": "officina data build", "officina": metadata.version("officina"),
                                  "tokenizers": metadata.version("tokenizers")}
    if options.inputs:
        sources, words = find_sources(options.inputs, options.include), {}
        provenance["include"] = list(options.include)
    else:
        sources, words = standard_library()
        provenance["python"] = platform.python_version()
    about = {key: words[key] for key in ("description", "licence") if key in words} | options.about
    name = folder.resolve().name if options.inputs else sources[0].name
    about = {"name": name} | about
    _prepare(folder)

    if options.tokenizer is None:
        text = _train_tokenizer(sources, options, progress)
        provenance["tokenizer"] = f"byte-level BPE trained on at most {SAMPLE_BYTES} bytes of the train split"
    else:
        text = _given_tokenizer(Path(options.tokenizer))
        provenance["tokenizer"] = "given"
    info = _tokenizer_info(text, options.eos)
    write_whole(folder / TOKENIZER, text.encode())

    dtype = "u8" if info.vocab_size <= 1 << 8 else "u16" if info.vocab_size <= 1 << 16 else "u32"
    how = {"dtype": dtype, "tokenizer_sha256": info.sha256, "shard_bytes": options.shard_bytes}
    left_out, counts = LeftOut(), {TRAIN: SplitCounts(), VALIDATION: SplitCounts()}
    with ExitStack() as stack:
        writers = {name: stack.enter_context(SplitWriter(folder, name, **how)) for name in counts}
        for document, split, tokens in _tokenised(sources, text, info, options, left_out, progress):
            writers[split].add(tokens, document.source_id)
            counts[split].add(document, len(tokens), sources)
        shards = [entry for writer in writers.values() for entry in writer.close()]
    if not counts[TRAIN].documents:
        raise DataError(f"{folder}: no document is left to train on ({counts[VALIDATION].documents} held out, "
                        f"{left_out.empty} empty, {len(left_out.undecodable)} undecodable). Name inputs with more text.")
    stats = {name: c.as_stats() for name, c in counts.items() if c.documents} | {"left_out": {
        "undecodable": len(left_out.undecodable), "undecodable_files": left_out.undecodable[:100],
        "empty": left_out.empty, "duplicates": left_out.duplicates}}
    provenance |= {"validation_share": options.validation, "split_by": "sha256 of the text",
                   "duplicates": "exact ones left out"}
    manifest = write_manifest(folder, shards, stats, kind="tokens", dtype=dtype, tokenizer=info,
                              sources=[s.name for s in sources], provenance=provenance, **about)
    return BuildResult(manifest, stats)


def _prepare(folder: Path) -> None:
    """Make the folder, and clear what an unfinished or replaced build left: its manifest first, then the shards."""
    try:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise DataError(f"{folder}: cannot be made ({exc.strerror}). Name a folder that you may write.") from exc
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in (folder / "shards").glob("*.dls*"):
        path.unlink()


# ---- tokenizer ---------------------------------------------------------------------------------------------
def _train_tokenizer(sources: Sequence[TextSource], options: BuildOptions, progress: Progress) -> str:
    """A byte-level BPE (no unknown token, every byte has one) as the text of a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if options.vocab_size < 257:
        raise DataError(f"--vocab-size {options.vocab_size}: a byte-level tokenizer has 256 bytes and {EOS}. "
                        "Try: --vocab-size 4096")
    total = sum(s.bytes for s in sources)
    keep = min(1.0, SAMPLE_BYTES / max(total, 1))

    def texts() -> Iterator[list[str]]:
        batch, characters, used = [], 0, 0
        for document in read_documents(sources, options.text_field, LeftOut()):
            progress("tokenizer", document.done_bytes, total)
            draw = _draws(document.text)
            if draw[0] < options.validation or draw[1] >= keep or used > SAMPLE_BYTES:
                continue
            batch.append(document.text)
            characters, used = characters + len(document.text), used + len(document.text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        yield batch
        progress("merges", 0, 0)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=options.vocab_size, special_tokens=[options.eos or EOS], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), max_token_length=64))
    return tokenizer.to_str(pretty=True)


def _given_tokenizer(path: Path) -> str:
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        Tokenizer.from_str(text)
    except Exception as exc:  # tokenizers raises bare Exception
        raise DataError(f"--tokenizer {path}: is no tokenizer.json ({exc}). "
                        "Name a file in the format of Hugging Face tokenizers, or leave the option out.") from exc
    return text


def _tokenizer_info(text: str, eos: str) -> TokenizerInfo:
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    found = next((name for name in ([eos] if eos else EOS_NAMES) if name in vocabulary), None)
    if found is None:
        raise DataError(f"the tokenizer has no token {eos or ' or '.join(EOS_NAMES)} to end documents with. "
                        "Name the one it has: --eos TOKEN")
    return TokenizerInfo(sha256=hashlib.sha256(text.encode()).hexdigest(),
                         vocab_size=max(vocabulary.values()) + 1, eos=found, eos_id=vocabulary[found])


# ---- documents ---------------------------------------------------------------------------------------------
def _draws(text: str) -> tuple[float, float, bytes]:
    """Two independent numbers in [0, 1) that depend on the text alone, and its hash."""
    digest = hashlib.sha256(text.encode()).digest()
    return (int.from_bytes(digest[:6]) / (1 << 48), int.from_bytes(digest[6:12]) / (1 << 48), digest[:16])


def _tokenised(sources: Sequence[TextSource], tokenizer_text: str, info: TokenizerInfo, options: BuildOptions,
               left_out: LeftOut, progress: Progress) -> Iterator[tuple[Document, str, np.ndarray]]:
    """Each document once, with its split and its tokens, the end of document included."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> must not end the document
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)  # without offsets
    total = sum(s.bytes for s in sources)
    seen: set[bytes] = set()
    batch: list[tuple[Document, str]] = []
    characters = 0

    def flush() -> Iterator[tuple[Document, str, np.ndarray]]:
        encodings = encode([document.text for document, _ in batch], add_special_tokens=False)
        for (document, split), encoding in zip(batch, encodings, strict=True):
            yield document, split, np.asarray([*encoding.ids, info.eos_id], np.uint32)
        if batch:
            progress("tokens", batch[-1][0].done_bytes, total)

    for document in read_documents(sources, options.text_field, left_out):
        draw, _, digest = _draws(document.text)
        if digest in seen:
            left_out.duplicates += 1
            continue
        seen.add(digest)
        batch.append((document, VALIDATION if draw < options.validation else TRAIN))
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield from flush()
            batch, characters = [], 0
    yield from flush()
    progress("tokens", total, total)


@dataclass(slots=True)
class SplitCounts:
    """Sums over a split's documents for stats.json."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0
    lengths: Counter = field(default_factory=Counter)
    sources: dict[str, Counter] = field(default_factory=dict)

    def add(self, document: Document, tokens: int, sources: Sequence[TextSource]) -> None:
        """Count one document."""
        text_bytes = len(document.text.encode())
        self.documents, self.tokens = self.documents + 1, self.tokens + tokens
        self.bytes, self.characters = self.bytes + text_bytes, self.characters + len(document.text)
        self.lengths[1 << tokens.bit_length()] += 1
        of_source = self.sources.setdefault(sources[document.source_id].name, Counter())
        of_source.update(documents=1, tokens=tokens, bytes=text_bytes)

    def as_stats(self) -> dict[str, Any]:
        """The split's part of stats.json."""
        return {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.bytes,
                "characters": self.characters, "bytes_per_token": round(self.bytes / self.tokens, 4),
                "documents_with_fewer_tokens_than": {str(k): self.lengths[k] for k in sorted(self.lengths)},
                "sources": {name: dict(counts) for name, counts in self.sources.items()}}
