"""`officina data inspect`: what a data set holds, and what one step of a run read. No torch."""

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from officina.launch.data_terminal import add_parser, console, count, size, table
from officina.trainer.errors import EXIT_DONE, DataError

if TYPE_CHECKING:
    from officina.trainer.data.manifest import Manifest

_EXAMPLES = """examples:
  officina data inspect demo/data
  officina data inspect runs/first step=40
"""


def add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `officina data inspect`."""
    parser = add_parser(commands, "inspect", "show a data set, or what one step of a run read", _EXAMPLES)
    option = parser.add_argument
    option("folder", metavar="DATASET|RUN")
    option("--step", type=count, metavar="N", help="step of a run (default: the last)")
    option("--split", default="train", help="split of a data set (default: train)")
    option("--document", type=count, default=0, metavar="N", help="first document to show (default: 0)")
    option("--rows", type=count, default=4, metavar="N", help="rows of a step to show (default: 4)")
    parser.set_defaults(run=inspect)


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

    screen, dataset = console(), open_dataset(folder)
    manifest = dataset.manifest
    screen.print(f"{manifest.name} {manifest.version}: {manifest.description or manifest.kind}", markup=False)
    for label, value in (("licence", manifest.licence or "not stated"),
                         ("personal data", manifest.personal_data),
                         ("kind", f"{manifest.kind}, {manifest.dtype}"),
                         ("sources", ", ".join(manifest.sources)),
                         *manifest.provenance.items(), ("fingerprint", manifest.fingerprint)):
        screen.print(f"  {label:<16} {value}", markup=False)
    rows_shown = table("split", "documents", "tokens" if manifest.tokenizer else "bytes", "shards", "size")
    for name, totals in manifest.splits.items():
        rows_shown.add_row(name, f"{totals.documents:,}", f"{totals.tokens:,}", str(totals.shards), size(totals.bytes))
    screen.print(rows_shown)
    stream = Stream(dataset, split)
    total = int(stream.document_starts[-1])
    if document >= total:
        raise DataError(f"--document {document}: split {split} has {total} documents. Try: --document {total - 1}")
    show = _decoder(manifest, tokenizer_file)
    for number in range(document, min(document + 3, total)):
        content, where = stream.record(number)
        screen.rule(f"document {number} · {where}", align="left")
        screen.print(show(content)[:1200], markup=False, highlight=False)
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
    screen = console()
    screen.print(f"step {entry.step}: samples {entry.first_sample} to {entry.stop_sample}, {len(samples)} rows; digest "
                  f"{entry.digest}, {'as the shards give it' if found == entry.digest else f'but the shards give {found}'}",
                  markup=False)
    if entry.skipped:
        screen.print(f"left out by data.skip: {entry.skipped}", markup=False)
    samples = samples[:rows]
    places = reader.place(samples)
    rows_shown = table("sample", "source", "epoch", "row", "shard", "from token")
    for i, sample in enumerate(samples):
        name = reader.order.names[places.source[i]]
        stream, row = reader.streams[name], int(places.row[i])
        starts = stream.document_starts if reader.records else stream.token_starts
        first = row * reader.seq_len
        shard = int(np.searchsorted(starts, first, side="right")) - 1
        rows_shown.add_row(str(sample), name, str(places.epoch[i]), str(row), stream.entries[shard].path,
                      str(first - int(starts[shard])))
    screen.print(rows_shown)
    for i, sample in enumerate(samples):
        dataset = reader.streams[reader.order.names[places.source[i]]].dataset
        show = _decoder(dataset.manifest, dataset.folder / TOKENIZER)
        screen.rule(f"sample {sample}", align="left")
        if reader.records:
            screen.print(show(reader.read_records(samples[i:i + 1])[0][0][0]), markup=False, highlight=False)
            continue
        content = reader.read(samples[i:i + 1])
        cuts = [0, *content.border_columns.tolist(), reader.seq_len + 1]
        tokens = content.tokens[0].astype(f"<u{ {'u8': 1, 'u16': 2, 'u32': 4}[dataset.manifest.dtype] }")
        for a, b in pairwise(cuts):
            if a:
                screen.print("──── document border ────", style="cyan")
            screen.print(show(tokens[a:b].tobytes())[:2000], markup=False, highlight=False)
    return EXIT_DONE
