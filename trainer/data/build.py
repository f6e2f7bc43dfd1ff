"""Builds a data set of tokens: every row read and judged, the tokenizer, splits, shards in parallel, the manifest.

The same inputs give the same bytes, whatever the number of processes and interruptions: documents keep the order of their
files, the split follows from a hash of the document, the tokenizer's training is deterministic, and no path, host, user
or time is stored. What is finished lies in OUT/.build, from which the same command goes on.
"""

import hashlib
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from officina.trainer.data.build_sums import stats_of, steps_of
from officina.trainer.data.chat import CHAT_TEMPLATE, Chat, load_chat
from officina.trainer.data.croissant import write_croissant
from officina.trainer.data.documents import NO_LANGUAGE, Fields, Filter, LeftOut, load_filter, read_documents
from officina.trainer.data.duplicates import find_duplicates
from officina.trainer.data.formats import INCLUDE
from officina.trainer.data.manifest import MANIFEST, TOKENIZER, WORK, Manifest, TokenizerInfo, write_manifest, write_whole
from officina.trainer.data.parts import TRAIN, VALIDATION, Writing, is_held_out, write_part
from officina.trainer.data.policy import Policy, place_policy
from officina.trainer.data.scan import Job, Scan, check_bad_rows, plan_parts, scan
from officina.trainer.data.seal import read_seal
from officina.trainer.data.shards import SHARD_BYTES
from officina.trainer.data.sources import Progress, TextSource, find_sources, standard_library
from officina.trainer.data.tokenizer import EOS, dtype_of, given_tokenizer, tokenizer_info, train_tokenizer
from officina.trainer.data.work_folder import (
    PLAN,
    claimed,
    finish,
    full_disk_told,
    place_shards,
    prepare,
    told_of_data_set,
)
from officina.trainer.data.workers import cores, run_jobs
from officina.trainer.errors import DataError

SAMPLE_BYTES = 64 << 20
"""Text a tokenizer is trained on at most, chosen by the documents' hashes: merges no longer change much beyond it."""
_BATCH_CHARACTERS = 1 << 21
_MOST_NAMES = 1 << 16
"""Sources, and languages: their ids are u16."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What `officina data build` is asked for."""

    inputs: Sequence[str | Path] = ()
    """Files and folders; none = the standard library of the Python that runs."""
    include: Sequence[str] = INCLUDE
    """Patterns of file names that are read of a folder."""
    fields: Fields = field(default_factory=Fields)
    filters: Sequence[str] = ()
    """package.module:function of each, in order; see `officina.trainer.data.documents.Filter`."""
    max_bad_rows: int = 0
    """Rows that cannot be read and may be left out."""
    tokenizer: str | Path | None = None
    """A tokenizer.json to be used, or the folder it is in; none = a byte-level BPE is trained."""
    vocab_size: int = 4096
    """Size of the trained tokenizer."""
    eos: str = ""
    """Token appended to each document; empty = the first of `EOS_NAMES` that the tokenizer has."""
    validation: float = 0.05
    """Share of documents held out, chosen by a hash of their content."""
    shard_bytes: int = SHARD_BYTES
    workers: int = 0
    """Processes; 0 = one per core. The result does not depend on it."""
    overwrite: bool = False
    """Replace a data set, or an unfinished build of something else, that is there already."""
    samples: bool = False
    """Rows are samples to fine-tune on, see `officina.trainer.data.samples`; with the tokenizer of the model."""
    chat_template: str = ""
    """A file of Jinja, or `plain`; empty = the tokenizer's own."""
    train_on: str = "all"
    """all or last: which answers of a conversation."""
    chat_date: str = ""
    """What a template gets that asks for today's date."""
    policy: Policy | None = None
    """Conditions of use; none = what `about` says of licence and personal data is all."""
    seal: str = ""
    """Where the key is to seal the tokens with: a file, or `command:PROGRAM ARGS`; none = they lie open."""
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

    Raises DataError if `folder` holds a data set or another unfinished build already, if an input is missing or damaged or
    has more bad rows than allowed, if the disk is full, or if nothing is left to train on.
    """
    folder, workers = Path(folder), options.workers or cores()
    if (folder / MANIFEST).exists() and not (folder / WORK / PLAN).exists() and not options.overwrite:
        raise DataError(told_of_data_set(folder))
    sealed = read_seal(options.seal, what="--seal").key_id if options.seal else ""
    if sealed and options.tokenizer is None:
        raise DataError("--seal: a tokenizer that is trained on the texts lies beside the shards and shows words of theirs. "
                        "Name one that was made from other texts: --tokenizer base/tokenizer.json")
    sources, words = (find_sources(options.inputs, options.include), {}) if options.inputs else standard_library()
    filters = [load_filter(name) for name in options.filters]
    given = None if options.tokenizer is None else given_tokenizer(Path(options.tokenizer))
    chat = _chat(options, given)
    eos = chat.eos if chat else options.eos
    info = None if given is None else tokenizer_info(given, eos)
    parts = plan_parts(sources, options.shard_bytes)
    hides = _hides_text(options)
    with full_disk_told(folder), claimed(folder):
        prepare(folder, _plan(sources, options, filters, info, chat), options.overwrite)
        jobs = [Job(part=i, work=folder / WORK, pieces=pieces, fields=options.fields, filters=tuple(options.filters),
                    max_bad_rows=options.max_bad_rows, chat=chat, hides_text=hides) for i, pieces in enumerate(parts)]
        total = sum(piece.bytes for pieces in parts for piece in pieces)
        scans = run_jobs(scan, jobs, workers, lambda done: progress("reading", done, total))
        bad, bad_rows = _bad(scans)
        check_bad_rows(bad, bad_rows, options.max_bad_rows)
        kind = _kind(scans)
        runs = [(job.part, job.file("digests", f"-{i:03d}"))
                for job, found in zip(jobs, scans, strict=True) for i in range(found.runs)]
        duplicates = find_duplicates(runs, [job.file("drops", "") for job in jobs])
        text = given if given is not None else _trained(folder, jobs, filters, scans, options, progress)
        info = info or tokenizer_info(text, eos)
        if chat and chat.template:
            write_whole(folder / CHAT_TEMPLATE, chat.template.encode())
        write_whole(folder / TOKENIZER, text.encode())
        writing = Writing(tokenizer=text, info=info, sources=_source_ids(sources, scans, options.fields),
                          languages=_language_ids(scans), shard_bytes=options.shard_bytes, validation=options.validation,
                          key=options.seal, max_bad_rows=options.max_bad_rows, bad=bad, bad_rows=tuple(bad_rows))
        total_text = sum(found.bytes for found in scans)
        done = run_jobs(write_part, [(job, writing) for job in jobs], workers,
                        lambda done: progress("tokens", done, total_text))
        segments = [segment for of_part in done for segment in of_part]
        check_bad_rows(bad + sum(segment.bad for segment in segments),
                       [*bad_rows, *(row for segment in segments for row in segment.bad_rows)], options.max_bad_rows)
        stats = stats_of(segments, scans, duplicates)
        if TRAIN not in stats:
            finish(folder)
            held_out, left_out = stats.get(VALIDATION, {}).get("documents", 0), stats["left_out"]
            raise DataError(f"{folder}: no document is left to train on ({held_out} held out, {left_out['empty']} empty, "
                            f"{left_out['undecodable']} undecodable). Name inputs with more text.")
        provenance = _provenance(options, given is not None) | _chat_provenance(chat)
        about = {"name": folder.resolve().name if options.inputs else sources[0].name}
        about |= {key: words[key] for key in ("description", "licence") if key in words} | options.about | {"sealed": sealed}
        about |= place_policy(folder, options.policy)
        manifest = write_manifest(
            folder, place_shards(folder, done), stats, kind="tokens", dtype=dtype_of(info.vocab_size), tokenizer=info,
            samples=kind, sources=list(writing.sources), languages=list(writing.languages),
            steps=[asdict(step) for step in steps_of(scans, duplicates, segments, filters)], provenance=provenance, **about)
        write_croissant(folder)
        finish(folder)
    return BuildResult(manifest, stats)


def _hides_text(options: BuildOptions) -> bool:
    """Must nothing of a text be told? It must not of sealed data, nor if `about` or the policy says so."""
    said = Policy(personal_data=options.about.get("personal_data", "none"), sensitive=bool(options.about.get("sensitive")))
    return bool(options.seal) or not (said.shows_text and (options.policy or Policy()).shows_text)


def _plan(sources: Sequence[TextSource], options: BuildOptions, filters: Sequence[Filter],
          info: TokenizerInfo | None, chat: Chat | None) -> dict[str, Any]:
    """All that the result depends on; an interrupted build goes on only if it is the same."""
    inputs = hashlib.sha256()
    for source in sources:
        for name, path in source.files:
            stat = path.stat()
            inputs.update(f"{source.name}\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    about = {key: value for key, value in sorted(options.about.items())}
    about |= {"sealed": read_seal(options.seal, what="--seal").key_id} if options.seal else {}
    return {"inputs": inputs.hexdigest(), "fields": asdict(options.fields), "filters": [[f.name, f.version] for f in filters],
            "tokenizer": info.sha256 if info else f"trained {options.vocab_size}",
            "eos": options.eos, "chat": asdict(chat) if chat else None,
            "validation": options.validation, "shard-bytes": options.shard_bytes, "about": about,
            "hides-text": _hides_text(options),
            "officina": metadata.version("officina"), "tokenizers": metadata.version("tokenizers")}


# ---- samples ---------------------------------------------------------------------------------------------------------
def _chat(options: BuildOptions, given: str | None) -> Chat | None:
    """How samples are written; none for documents."""
    if not options.samples:
        if options.chat_template or options.chat_date or options.train_on != "all":
            raise DataError("--chat-template, --chat-date and --train-on are about samples to fine-tune on. Add: --samples")
        return None
    if given is None:
        raise DataError("--samples: needs the tokenizer of the model that is to be fine-tuned. Name its folder: "
                        "--tokenizer MODEL, with tokenizer.json and tokenizer_config.json in it")
    path = Path(options.tokenizer or "")
    chat = load_chat(path if path.is_dir() else path.parent, given, template=options.chat_template, eos=options.eos,
                     last=options.train_on == "last", date=options.chat_date)
    chat.check()
    return chat


def _kind(scans: Sequence[Scan]) -> str:
    """answers or pairs; empty for documents."""
    kinds = sorted({kind for found in scans for kind in found.left_out["kinds"]})
    if len(kinds) > 1:
        counts = [sum(found.left_out["kinds"].get(kind, 0) for found in scans) for kind in kinds]
        raise DataError(f"the inputs hold {counts[0]:,} samples with answers and {counts[1]:,} preference pairs, which are "
                        "trained on by different objectives. Build a data set of each.")
    return kinds[0] if kinds else ""


def _bad(scans: Sequence[Scan]) -> tuple[int, list[str]]:
    """How many bad rows were read, and place and reason of the first."""
    return sum(found.left_out["bad"] for found in scans), [row for found in scans for row in found.left_out["bad_rows"]]


def _chat_provenance(chat: Chat | None) -> dict[str, Any]:
    if chat is None:
        return {}
    found = {"answers_end_with": chat.check(), "train_on": "last answer" if chat.last else "all answers"}
    if chat.template:
        found["chat_template_sha256"] = hashlib.sha256(chat.template.encode()).hexdigest()
    return found | ({"chat_date": chat.date} if chat.date else {})


# ---- what goes in ----------------------------------------------------------------------------------------------------
def _trained(folder: Path, jobs: Sequence[Job], filters: Sequence[Filter], scans: Sequence[Scan], options: BuildOptions,
             progress: Progress) -> str:
    """A tokenizer trained on documents of the train split; kept, so that an interrupted build has the same."""
    if options.vocab_size < 257:
        raise DataError(f"--vocab-size {options.vocab_size}: a byte-level tokenizer has 256 bytes and {EOS}. "
                        "Try: --vocab-size 4096")
    kept = folder / WORK / TOKENIZER
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    total = sum(found.bytes for found in scans)

    def texts() -> Iterator[list[str]]:
        batch, characters, used, done_bytes = [], 0, 0, 0
        for job in jobs:
            drops = set(np.fromfile(job.file("drops", ""), "<u8").tolist())
            found = read_documents(job.pieces, job.fields, LeftOut(), all_fields=bool(filters))
            for number, document in enumerate(found):
                done_bytes += document.bytes
                progress("tokenizer", done_bytes, total)
                left = int.from_bytes(document.digest[6:12]) / (1 << 48) >= SAMPLE_BYTES / max(total, 1)
                if left or used > SAMPLE_BYTES or number in drops or not all(keep(document) for keep in filters):
                    continue
                if is_held_out(document.text, options.validation):
                    continue
                batch.append(document.text)
                characters, used = characters + len(document.text), used + len(document.text)
                if characters >= _BATCH_CHARACTERS:
                    yield batch
                    batch, characters = [], 0
        yield batch
        progress("merges", 0, 0)

    text = train_tokenizer(texts(), options.vocab_size, options.eos)
    write_whole(kept, text.encode())
    return text


def _source_ids(sources: Sequence[TextSource], scans: Sequence[Scan], fields: Fields) -> dict[str, int]:
    found = {name for each in scans for name in each.sources}
    names = sorted(found) if fields.source else [source.name for source in sources]
    if len(names) > _MOST_NAMES and not fields.source:
        raise DataError(f"{len(names)} inputs give as many sources, at most {_MOST_NAMES} are possible. Name the folder they "
                        "lie in, which is one, or a field of the rows: --source-field NAME")
    if len(names) > _MOST_NAMES:
        raise DataError(f"--source-field {fields.source}: gives {len(names)} sources, at most {_MOST_NAMES} are possible. "
                        "Name a field with few values, or leave the option out.")
    return {name: i for i, name in enumerate(names)}


def _language_ids(scans: Sequence[Scan]) -> dict[str, int]:
    names = sorted({name or NO_LANGUAGE for each in scans for name in each.languages})
    if len(names) > _MOST_NAMES:
        raise DataError(f"the language field gives {len(names)} languages, at most {_MOST_NAMES} are possible. "
                        "Name the right one: --language-field NAME")
    return {} if names in ([], [NO_LANGUAGE]) else {name: i for i, name in enumerate(names)}


# ---- what is told ----------------------------------------------------------------------------------------------------
def _provenance(options: BuildOptions, given: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"tool": "officina data build", "officina": metadata.version("officina"),
                             "tokenizers": metadata.version("tokenizers")}
    found |= {"include": list(options.include)} if options.inputs else {"python": platform.python_version()}
    found |= {f"{key}_field": name for key, name in asdict(options.fields).items() if name}
    found["tokenizer"] = ("given" if given else
                          f"byte-level BPE trained on at most {SAMPLE_BYTES} bytes of the train split")
    return found | {"validation_share": options.validation, "split_by": "sha256 of the text",
                    "duplicates": "exact ones left out"}
