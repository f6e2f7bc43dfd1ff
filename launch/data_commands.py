"""`officina data build | verify | inspect | audit`: data sets, and what runs read of them. No torch."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from officina.trainer.errors import EXIT_DONE, EXIT_USER, DataError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from officina.trainer.data.manifest import Manifest

_BUILD_EXAMPLES = """examples:
  officina data build demo/data                          the Python standard library's sources
  officina data build corpus texts/ more.jsonl.gz        a folder and a file of JSON lines
  officina data build corpus texts/ --include '*.tex'    only these files
  officina data build corpus texts/ --tokenizer base/tokenizer.json --licence CC-BY-4.0
"""
_OTHER_EXAMPLES = """examples:
  officina data verify demo/data
  officina data inspect demo/data
  officina data inspect runs/first --step 40
  officina data audit runs/first
"""


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of `officina data`; each sets `args.run` to the function that does it."""
    parser = _parser(commands, "build", "tokenise text into shards with a manifest", _BUILD_EXAMPLES)
    option = parser.add_argument
    option("folder", metavar="OUT", help="folder of the data set to be made")
    option("inputs", metavar="INPUT", nargs="*",
           help="folder of text, text file, or .jsonl(.gz); none: the Python standard library's sources")
    option("--include", action="append", metavar="PATTERN", help="names of the files to read in folders")
    option("--field", default="text", help="field of JSON lines that holds the text (default: text)")
    option("--tokenizer", metavar="FILE", help="tokenizer.json to use (default: train a byte-level BPE)")
    option("--vocab-size", type=_count, default=4096, metavar="N", help="of the trained one (default: 4096)")
    option("--eos", default="", metavar="TOKEN", help="token that ends a document (default: found by name)")
    option("--validation", type=_share, default=0.05, metavar="SHARE", help="share of documents held out (default: 0.05)")
    option("--shard-bytes", type=_count, default=1 << 30, metavar="N", help="size at which a new shard begins (default: 1Gi)")
    option("--name", default="", help="name of the data set (default: the folder's)")
    option("--description", default="", help="what the data is, in a sentence")
    option("--licence", default="", help="SPDX expression, e.g. CC-BY-4.0")
    option("--personal-data", choices=("none", "pseudonymised", "present"), default="none",
           help="with `present`, no text of it is ever shown (default: none)")
    option("--sensitive", action="store_true", help="no text of it is ever shown")
    option("--overwrite", action="store_true", help="replace the data set in OUT")
    parser.set_defaults(run=build)

    parser = _parser(commands, "verify", "check every byte of a data set", _OTHER_EXAMPLES)
    parser.add_argument("folder", metavar="DATASET")
    parser.set_defaults(run=verify)

    parser = _parser(commands, "inspect", "show a data set, or what one step of a run read", _OTHER_EXAMPLES)
    option = parser.add_argument
    option("folder", metavar="DATASET|RUN")
    option("--step", type=_count, metavar="N", help="step of a run (default: the last)")
    option("--split", default="train", help="split of a data set (default: train)")
    option("--document", type=_count, default=0, metavar="N", help="first document to show (default: 0)")
    option("--rows", type=_count, default=4, metavar="N", help="rows of a step to show (default: 4)")
    parser.set_defaults(run=inspect)

    what = "prove from the ledger that every sample was read once and in order"
    parser = _parser(commands, "audit", what, _OTHER_EXAMPLES)
    parser.add_argument("folder", metavar="RUN")
    parser.set_defaults(run=audit)


def _parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, what: str,
            examples: str) -> argparse.ArgumentParser:
    return subparsers.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".",
                                 epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)


def _count(text: str) -> int:
    from officina.trainer.quantities import parse_count

    try:
        number = int(parse_count(text))  # type: ignore[call-overload]
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: {exc}") from exc
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative; write for example 4")
    return number


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to below 1; write for example 0.05")
    return share


# ---- build -------------------------------------------------------------------------------------------------
def build(args: argparse.Namespace) -> int:
    from officina.trainer.data import build as building
    from officina.trainer.data.sources import INCLUDE

    said = {key: getattr(args, key) for key in ("name", "description", "licence") if getattr(args, key)}
    about = said | {"personal_data": args.personal_data, "sensitive": args.sensitive}
    options = building.BuildOptions(
        inputs=args.inputs, include=args.include or INCLUDE, text_field=args.field, tokenizer=args.tokenizer,
        vocab_size=args.vocab_size, eos=args.eos, validation=args.validation,
        shard_bytes=max(args.shard_bytes, 1), overwrite=args.overwrite, about=about)
    console, begun = _console(), time.monotonic()
    with _progress(console, {"tokenizer": "reading for the tokenizer", "merges": "training the tokenizer",
                             "tokens": "tokenising"}) as report:
        result = building.build(args.folder, options, report)
    table = _table("split", "documents", "tokens", "bytes/token", "shards", "size")
    for name, totals in result.manifest.splits.items():
        table.add_row(name, f"{totals.documents:,}", f"{totals.tokens:,}",
                      f"{result.stats[name]['bytes_per_token']:.2f}", str(totals.shards), _size(totals.bytes))
    console.print(table)
    left_out = result.stats["left_out"]
    told = [f"{left_out['undecodable']} not UTF-8", f"{left_out['duplicates']} exact duplicates", f"{left_out['empty']} empty"]
    console.print(f"left out     {', '.join(told)}", markup=False)
    for name in left_out["undecodable_files"][:5]:
        console.print(f"             not UTF-8: {name}", markup=False)
    console.print(f"vocabulary   {result.manifest.tokenizer.vocab_size:,} tokens, documents end with "
                  f"{result.manifest.tokenizer.eos}", markup=False)
    console.print(f"fingerprint  {result.manifest.fingerprint}")
    console.print(f"Built {args.folder} in {time.monotonic() - begun:.1f} s. "
                  f"Train on it: officina train data.sources.main.path={args.folder}", markup=False)
    return EXIT_DONE


# ---- verify ------------------------------------------------------------------------------------------------
def verify(args: argparse.Namespace) -> int:
    from officina.trainer.data import verify as verifying
    from officina.trainer.data.manifest import open_dataset

    total = sum(entry.bytes for entry in open_dataset(args.folder).shards)
    console, begun = _console(), time.monotonic()
    with _progress(console, {"sha256": "comparing sha256"}) as report:
        found = verifying.verify(args.folder, lambda done_bytes: report("sha256", done_bytes, total))
    if found.faults:
        raise DataError(f"{args.folder} is damaged:\n" + "\n".join(f"  - {fault}" for fault in found.faults))
    console.print(f"{args.folder} is sound: {len(found.dataset.shards)} shards, {_size(found.bytes)}, "
                  f"sha256 of each as in its manifest ({time.monotonic() - begun:.1f} s).", markup=False)
    console.print(f"fingerprint  {found.dataset.manifest.fingerprint}")
    return EXIT_DONE


# ---- inspect -----------------------------------------------------------------------------------------------
def inspect(args: argparse.Namespace) -> int:
    from officina.trainer.data.manifest import MANIFEST, TOKENIZER
    from officina.trainer.run_dir import CONFIG

    folder = Path(args.folder)
    if (folder / MANIFEST).exists():
        if args.step is not None:
            raise DataError(f"--step {args.step}: {folder} is a data set. Name a run directory, which has {CONFIG}.")
        return _inspect_dataset(folder, args.split, args.document, folder / TOKENIZER)
    if (folder / CONFIG).exists():
        return _inspect_step(folder, args.step, args.rows)
    raise DataError(f"{folder} is neither a data set ({MANIFEST}) nor a run ({CONFIG}). Try: officina data inspect demo/data")


def _inspect_dataset(folder: Path, split: str, document: int, tokenizer_file: Path) -> int:
    from officina.trainer.data.manifest import open_dataset
    from officina.trainer.data.reader import Stream

    console, dataset = _console(), open_dataset(folder)
    manifest = dataset.manifest
    console.print(f"{manifest.name} {manifest.version}: {manifest.description or manifest.kind}", markup=False)
    for label, value in (("licence", manifest.licence or "not stated"),
                         ("personal data", manifest.personal_data),
                         ("kind", f"{manifest.kind}, {manifest.dtype}"),
                         ("sources", ", ".join(manifest.sources)),
                         *manifest.provenance.items(), ("fingerprint", manifest.fingerprint)):
        console.print(f"  {label:<16} {value}", markup=False)
    table = _table("split", "documents", "tokens" if manifest.tokenizer else "bytes", "shards", "size")
    for name, totals in manifest.splits.items():
        table.add_row(name, f"{totals.documents:,}", f"{totals.tokens:,}", str(totals.shards), _size(totals.bytes))
    console.print(table)
    stream = Stream(dataset, split)
    total = int(stream.document_starts[-1])
    if document >= total:
        raise DataError(f"--document {document}: split {split} has {total} documents. Try: --document {total - 1}")
    show = _decoder(manifest, tokenizer_file)
    for number in range(document, min(document + 3, total)):
        content, where = stream.record(number)
        console.rule(f"document {number} · {where}", align="left")
        console.print(show(content)[:1200], markup=False, highlight=False)
    return EXIT_DONE


def _decoder(manifest: "Manifest", tokenizer_file: Path) -> Callable[[bytes], str]:
    """Turns a document's bytes in a shard into what a person may see of it."""
    import numpy as np

    from officina.trainer.data.shards import DTYPES

    dtype = DTYPES[manifest.dtype]
    if not manifest.shows_text:
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
    from officina.trainer.data.manifest import TOKENIZER
    from officina.trainer.data.reader import RowReader
    from officina.trainer.run_dir import load_config

    run, entries = load_config(folder), {entry.step: entry for entry in read_ledger(folder)[0]}
    if not entries or (step is not None and step not in entries):
        raise DataError(f"--step {step}: the ledger of {folder} has steps {min(entries, default=0)} to "
                        f"{max(entries, default=0)}. Try: --step {max(entries, default=1)}")
    entry = entries[max(entries) if step is None else step]
    reader = RowReader(run, entry.first_sample)
    samples = entry.samples()
    found = reader.digest(samples)
    console = _console()
    console.print(f"step {entry.step}: samples {entry.first_sample} to {entry.stop_sample}, {len(samples)} rows; digest "
                  f"{entry.digest}, {'as the shards give it' if found == entry.digest else f'but the shards give {found}'}",
                  markup=False)
    if entry.skipped:
        console.print(f"left out by data.skip: {entry.skipped}", markup=False)
    samples = samples[:rows]
    places = reader.place(samples)
    table = _table("sample", "source", "epoch", "row", "shard", "from token")
    for i, sample in enumerate(samples):
        name = reader.order.names[places.source[i]]
        stream, row = reader.streams[name], int(places.row[i])
        starts = stream.document_starts if reader.records else stream.token_starts
        first = row * reader.seq_len
        shard = int(np.searchsorted(starts, first, side="right")) - 1
        table.add_row(str(sample), name, str(places.epoch[i]), str(row), stream.entries[shard].path,
                      str(first - int(starts[shard])))
    console.print(table)
    for i, sample in enumerate(samples):
        dataset = reader.streams[reader.order.names[places.source[i]]].dataset
        show = _decoder(dataset.manifest, dataset.folder / TOKENIZER)
        console.rule(f"sample {sample}", align="left")
        if reader.records:
            console.print(show(reader.read_records(samples[i:i + 1])[0][0][0]), markup=False, highlight=False)
            continue
        content = reader.read(samples[i:i + 1])
        cuts = [0, *content.border_columns.tolist(), reader.seq_len + 1]
        tokens = content.tokens[0].astype(f"<u{ {'u8': 1, 'u16': 2, 'u32': 4}[dataset.manifest.dtype] }")
        for a, b in pairwise(cuts):
            if a:
                console.print("──── document border ────", style="cyan")
            console.print(show(tokens[a:b].tobytes())[:2000], markup=False, highlight=False)
    return EXIT_DONE


# ---- audit -------------------------------------------------------------------------------------------------
def audit(args: argparse.Namespace) -> int:
    from officina.trainer.data import ledger

    console = _console()
    with _progress(console, {"steps": "reading every step again"}, unit="steps") as report:
        found = ledger.audit(args.folder, lambda done, total: report("steps", done, total))
    table = _table("source", "rows", "read", "left out", "epochs")
    for name, use in found.sources.items():
        table.add_row(name, f"{use.rows:,}", f"{use.used:,}", f"{use.skipped:,}", f"{use.epochs:.3f}")
    console.print(table)
    if found.faults:
        shown = "\n".join(f"  - {fault}" for fault in found.faults[:20])
        more = f"\n  and {len(found.faults) - 20} more" if len(found.faults) > 20 else ""
        print(f"{args.folder}: {len(found.faults)} faults; the data was not read as planned:\n{shown}{more}", file=sys.stderr)
        return EXIT_USER
    begun = "started once" if found.starts == 1 else f"started {found.starts} times"
    console.print(f"Proved: {found.steps:,} steps ({begun}) read samples {found.first_sample:,} to "
                  f"{found.stop_sample:,}, each exactly once and in order; none twice, none missing; "
                  f"{sum(b - a for a, b in found.skipped):,} left out by data.skip.", markup=False)
    return EXIT_DONE


# ---- terminal ----------------------------------------------------------------------------------------------
def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _table(*columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("split", "source", "shard") else "right")
    return table


def _size(n_bytes: int) -> str:
    from rich.filesize import decimal

    return decimal(n_bytes)


@contextmanager
def _progress(console: "Console", phases: dict[str, str], unit: str = "bytes") -> Iterator[Callable[[str, int, int], None]]:
    """A bar per phase with rate and time left; calls with a total of 0 show that something goes on, without an end."""
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    steps = TextColumn("{task.completed}/{task.total} steps")
    rate: ProgressColumn = TransferSpeedColumn() if unit == "bytes" else steps
    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), rate, remaining,
                  console=console, transient=not console.is_terminal) as bars:
        tasks = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phases[phase], total=total or None)
            bars.update(tasks[phase], completed=done)

        yield report
        for task in tasks.values():  # a phase without a known end is done when the next one is
            if bars.tasks[task].total is None:
                bars.update(task, total=1, completed=1)
