"""`officina data inspect`: what a data set holds, and what one step of a run read. No torch."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from officina.launch.data_terminal import add_parser, console, count, size, table
from officina.trainer.errors import EXIT_DONE, DataError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from officina.trainer.data.manifest import Dataset, Manifest
    from officina.trainer.data.order import Places
    from officina.trainer.data.policy import Policy
    from officina.trainer.data.reader import RowReader
    from officina.trainer.data.stream import Stream

_EXAMPLES = """examples:
  officina data inspect demo/data
  officina data inspect demo/data --split validation --document 12
  officina data inspect step=40 runs/first                  the documents, sources, licences and texts of that batch
"""
_REMOVED = "(removed on request: not shown)"
_NOT_READ = "(removed on request or in a damaged block: not read)"


def add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `officina data inspect`."""
    parser = add_parser(commands, "inspect", "show a data set, or what one step of a run read", _EXAMPLES)
    option = parser.add_argument
    option("words", metavar="DATASET|RUN", nargs="+", help="folder; step=N names a step of a run (default: the last)")
    option("--step", type=count, metavar="N", help="the same as step=N")
    option("--split", default="train", help="split of a data set (default: train)")
    option("--document", type=count, default=0, metavar="N", help="first document to show (default: 0)")
    option("--key", default="", metavar="KEY", help="of a sealed set, to show its texts: file or command:PROGRAM ARGS")
    option("--rows", type=count, default=4, metavar="N", help="rows of a step to show (default: 4)")
    parser.set_defaults(run=inspect)


def inspect(args: argparse.Namespace) -> int:
    """Show the data set or the run's step that is named."""
    from officina.trainer.data.manifest import MANIFEST
    from officina.trainer.run_dir import CONFIG

    folders, step = [word for word in args.words if not word.startswith("step=")], args.step
    for word in args.words:
        if word.startswith("step="):
            step = _step(word)
    if len(folders) != 1:
        raise DataError(f"{' '.join(args.words)}: names {len(folders)} folders, but one is shown. "
                        "Try: officina data inspect step=40 runs/first")
    folder = Path(folders[0])
    if (folder / MANIFEST).exists():
        if step is not None:
            raise DataError(f"--step {step}: {folder} is a data set. Name a run directory, which has {CONFIG}.")
        return _inspect_dataset(folder, args.split, args.document, args.key)
    if (folder / CONFIG).exists():
        return _inspect_step(folder, step, args.rows)
    raise DataError(f"{folder} is neither a data set ({MANIFEST}) nor a run ({CONFIG}). Try: officina data inspect demo/data")


def _step(word: str) -> int:
    try:
        return count(word.removeprefix("step="))
    except argparse.ArgumentTypeError as exc:
        raise DataError(f"{word}: {exc}. Try: step=40") from exc


def _inspect_dataset(folder: Path, split: str, document: int, key: str) -> int:
    import numpy as np

    from officina.trainer.data.contents import describe_document
    from officina.trainer.data.manifest import open_dataset
    from officina.trainer.data.policy import policy_of
    from officina.trainer.data.removal import removed_documents
    from officina.trainer.data.seal import read_seal
    from officina.trainer.data.stream import Stream

    screen, dataset = console(), open_dataset(folder)
    manifest, policy = dataset.manifest, policy_of(dataset)
    if key and manifest.sealed:
        dataset = replace(dataset, seal=read_seal(key, manifest.sealed))
    screen.print(f"{manifest.name} {manifest.version}: {manifest.description or manifest.kind}")
    for label, value in (("licence", policy.licences or "not stated"),
                         ("personal data", policy.personal_data),
                         ("kind", f"{manifest.kind}, {manifest.dtype}"),
                         ("sources", ", ".join(manifest.sources[:20])),
                         ("languages", ", ".join(manifest.languages[:20]) or "not stated"),
                         *((f"step {n}", f"{each.name} {each.version}: {each.documents_in:,} documents in, "
                            f"{each.documents_out:,} out, {each.documents_changed:,} changed")
                           for n, each in enumerate(manifest.steps, 1)),
                         *((each.path, f"{each.documents:,} documents removed on request") for each in manifest.removals),
                         *manifest.provenance.items(), ("fingerprint", manifest.fingerprint)):
        screen.print(f"  {label:<16} {' '.join(value) if isinstance(value, list) else value}")
    rows_shown = table("split", "documents", "tokens" if manifest.tokenizer else "bytes", "shards", "size")
    for name, totals in manifest.splits.items():
        rows_shown.add_row(name, f"{totals.documents:,}", f"{totals.tokens:,}", str(totals.shards), size(totals.bytes))
    screen.print(rows_shown)
    stream = Stream(dataset, split)
    total = int(stream.document_starts[-1])
    if document >= total:
        raise DataError(f"--document {document}: split {split} has {total} documents. Try: --document {total - 1}")
    show = _decoder(dataset, policy)
    removed = removed_documents(dataset)
    for number in range(document, min(document + 3, total)):
        of_shard = int(np.searchsorted(stream.document_starts, number, side="right")) - 1
        inside = number - int(stream.document_starts[of_shard])
        name, id, source, language = describe_document(stream, of_shard, stream.shard(of_shard), inside)
        screen.rule(f"document {number} · {name}", align="left")
        screen.print(f"id {id or 'none'}, source {source}, language {language}", style="dim")
        gone = inside in removed.get(stream.entries[of_shard].path, ())
        shard = stream.shard(of_shard)
        if manifest.sealed and (not key or not policy.shows_text):  # the key is not even used
            why = "personal or sensitive" if not policy.shows_text else "to show it: --key FILE"
            tokens = int(shard.ends[inside]) - (int(shard.ends[inside - 1]) if inside else 0)
            screen.print(f"({tokens} tokens; sealed; {why}: not shown)")
            continue
        content = stream.record(number).content
        if gone or not shard.has_trained or not policy.shows_text:
            screen.print(_REMOVED if gone else show(content)[:1200])
        else:
            start = int(shard.ends[inside - 1]) if inside else 0
            _tell_marked(screen, manifest, content, shard.trained(np.arange(start, int(shard.ends[inside]))), show)
    return EXIT_DONE


def _tell_marked(screen: "Console", manifest: "Manifest", content: bytes, trained: "np.ndarray",
                 show: Callable[[bytes], str]) -> None:
    """A sample with its trained tokens in green; where there are no colours, between ⟦ and ⟧."""
    import numpy as np
    from rich.text import Text

    from officina.trainer.data.shards import DTYPES

    ids, text = np.frombuffer(content, DTYPES[manifest.dtype]), Text()
    edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=2, append=2))
    for a, b in pairwise(edges.tolist()):
        part = show(ids[a:b].tobytes())
        part = f"⟦{part}⟧" if trained[a] and not screen.color_system else part
        text.append(part[:4000], style="bold green" if trained[a] else "")
    screen.print(text)
    first = int(trained[0])  # is no label
    screen.print(f"{int(trained.sum()) - first:,} of {len(trained):,} tokens are trained on", style="dim")


def _decoder(dataset: "Dataset", policy: "Policy") -> Callable[[bytes], str]:
    """Turns a document's bytes in a shard into what a person may see of it."""
    import numpy as np

    from officina.trainer.data.manifest import TOKENIZER
    from officina.trainer.data.shards import DTYPES

    manifest, tokenizer_file = dataset.manifest, dataset.folder / TOKENIZER
    dtype = DTYPES[manifest.dtype]
    if not policy.shows_text:
        unit = "bytes" if manifest.kind == "records" else "tokens"
        return lambda content: f"({len(content) // dtype.itemsize} {unit}; personal or sensitive: not shown)"
    if manifest.kind == "records":
        return lambda content: f"{len(content)} bytes: {content[:64].hex(' ')}{' ...' * (len(content) > 64)}"
    from tokenizers import Tokenizer

    if not tokenizer_file.exists():
        return lambda content: " ".join(map(str, np.frombuffer(content, dtype)[:64]))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return lambda content: tokenizer.decode(np.frombuffer(content, dtype).tolist(), skip_special_tokens=False)


def _inspect_step(folder: Path, step: int | None, rows: int) -> int:
    import numpy as np

    from officina.trainer.data.ledger import read_ledger
    from officina.trainer.data.policy import policy_of
    from officina.trainer.data.reader import RowReader
    from officina.trainer.run_dir import load_config

    run, entries = load_config(folder), {entry.step: entry for entry in read_ledger(folder)[0]}
    if not entries or (step is not None and step not in entries):
        raise DataError(f"--step {step}: the ledger of {folder} has steps {min(entries, default=0)} to "
                        f"{max(entries, default=0)}. Try: --step {max(entries, default=1)}")
    entry = entries[max(entries) if step is None else step]
    reader = RowReader(run, entry.first_sample, entry.removals)
    reader.set_aside(entry.lost)
    policies = {name: policy_of(stream.dataset) for name, stream in reader.streams.items()}
    samples = entry.samples()
    found = reader.digest(samples)
    screen = console()
    screen.print(f"step {entry.step}: samples {entry.first_sample} to {entry.stop_sample}, {len(samples)} rows; digest "
                 f"{entry.digest}, {'as the shards give it' if found == entry.digest else f'but the shards give {found}'}")
    if entry.skipped:
        screen.print(f"left out by data.skip: {entry.skipped}")
    for source, shards in entry.lost.items():
        for shard, blocks in shards.items():
            screen.print(f"damaged, without loss: {source}, {shard}, block{'s' * (len(blocks) > 1)} "
                         f"{', '.join(map(str, blocks))}")
    places = reader.place(samples)
    if not reader.records:
        _tell_documents(screen, reader, places, policies)
    samples = samples[:rows]
    shown = table("sample", "source", "epoch", "row", "shard", "from token")
    for i, sample in enumerate(samples):
        name = reader.order.names[places.source[i]]
        stream, row = reader.streams[name], int(places.row[i])
        starts = stream.document_starts if reader.records else stream.token_starts
        first = row * reader.seq_len if stream.plan is None else int(stream.plan.starts[stream.plan.rows[row]])
        shard = int(np.searchsorted(starts, first, side="right")) - 1
        shown.add_row(str(sample), name, str(places.epoch[i]), str(row), stream.entries[shard].path,
                      str(first - int(starts[shard])))
    screen.print(shown)
    for i, sample in enumerate(samples):
        name = reader.order.names[places.source[i]]
        stream, policy = reader.streams[name], policies[name]
        show = _decoder(stream.dataset, policy)
        screen.rule(f"sample {sample}", align="left")
        if reader.records:
            screen.print(show(reader.read_records(samples[i:i + 1])[0][0].content))
        else:
            _tell_row(screen, reader, samples[i:i + 1], stream, int(places.row[i]), policy, show)
    return EXIT_DONE


def _tell_documents(screen: "Console", reader: "RowReader", places: "Places", policies: "dict[str, Policy]") -> None:
    """The whole batch: documents and tokens by source, language and licence."""
    from officina.trainer.data.contents import extents_of_row

    sums: dict[tuple[str, str, str], list] = {}
    for number, row in zip(places.source, places.row, strict=True):
        name = reader.order.names[number]
        stream = reader.streams[name]
        for each in extents_of_row(stream, int(row), reader.seq_len):
            key = f"{name}/{each.source}", each.language, policies[name].licences or "not stated"
            documents, tokens = sums.setdefault(key, [set(), 0])
            documents.add(each.document)
            sums[key][1] = tokens + each.stop - each.start
    total = sum(tokens for _, tokens in sums.values())
    shown = table("source", "language", "licence", "documents", "tokens", "share")
    for key, (documents, tokens) in sorted(sums.items(), key=lambda item: -item[1][1]):
        shown.add_row(*key, f"{len(documents):,}", f"{tokens:,}", f"{tokens / total:.2%}")
    screen.print(shown)


def _tell_row(screen: "Console", reader: "RowReader", sample: "np.ndarray", stream: "Stream", row: int,
              policy: "Policy", show: Callable[[bytes], str]) -> None:
    """A row, document by document."""
    from officina.trainer.data.contents import extents_of_row
    from officina.trainer.data.shards import DTYPES

    manifest, content = stream.dataset.manifest, reader.read(sample)
    tokens = content.tokens[0].astype(DTYPES[stream.dataset.manifest.dtype])
    for each in extents_of_row(stream, row, reader.seq_len):
        if each.start:
            screen.print("──── document border ────", style="cyan")
        screen.print(f"{each.document}, id {each.id or 'none'}, source {each.source}, language {each.language}, licence "
                     f"{policy.licences or 'not stated'}", style="dim")
        gone = content.removed is not None and content.removed[0, each.start:each.stop].all()
        if content.trained is not None and manifest.samples and policy.shows_text and not gone:
            inside = slice(each.start, each.stop)
            _tell_marked(screen, manifest, tokens[inside].tobytes(), content.trained[0, inside], show)
            continue
        screen.print(_NOT_READ if gone else show(tokens[each.start:each.stop].tobytes())[:2000])
