"""`officina data stats | stage | index | remove | pack`. No torch."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from officina.launch.data_terminal import OWN_COPY, add_parser, console, count, progress, size, table, writing
from officina.trainer.errors import EXIT_DONE, DataError

if TYPE_CHECKING:
    from officina.trainer.data.stats import Counts

_STATS_EXAMPLES = """examples:
  officina data stats demo/data
  officina data stats demo/data --picture lengths.png
  officina data stats wiki laws maps                       several data sets, summed by licence
"""
_STAGE_EXAMPLES = """examples:
  officina data stage /project/data/wiki /scratch/wiki
  officina data stage /project/data/wiki /dev/shm/wiki --budget 200G
  officina data stage s3://bucket/wiki /scratch/wiki                          an object store
  officina data stage s3://bucket/wiki /scratch/wiki --on-demand --budget 200G
The copy is a data set of its own: officina train data.sources.main.path=/dev/shm/wiki. Stopped, it goes on where it was.
"""
_INDEX_EXAMPLES = """examples:
  officina data index megatron/ --tokenizer base/tokenizer.json --validation '*valid*'
The folder with X.bin and X.idx is then a data set: X.dli is written beside them, no token is copied.
"""
_REMOVE_EXAMPLES = """examples:
  officina data remove wiki ids.txt
A line of the file is a document's id as the inputs gave it, its 32 hexadecimal digits, or SHARD:NUMBER, all of which
`officina data inspect` shows. The order of every run stays; the documents give no loss and are not read from its next start on.
"""
_PACK_EXAMPLES = """examples:
  officina data pack chats --seq-len 4096
  officina data pack corpus --seq-len 8192                 documents too: then train with data.packing=best_fit
A run makes the same plan itself when none is stored.
"""


def add_tools(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parsers of the five commands."""
    parser = add_parser(commands, "stats", "tokens by source, language and licence, and the lengths of documents",
                        _STATS_EXAMPLES)
    option = parser.add_argument
    option("folders", metavar="DATASET", nargs="+")
    option("--split", default="train", help="split to count (default: train)")
    option("--picture", metavar="FILE", help="PNG of the lengths of documents (of one data set)")
    parser.set_defaults(run=stats)

    parser = add_parser(commands, "stage", "copy a data set to a faster place, verified, within a budget", _STAGE_EXAMPLES)
    option = parser.add_argument
    option("folder", metavar="DATASET", help="folder, or s3://..., https://... and what else fsspec speaks")
    option("out", metavar="DIR", help="folder that becomes the copy")
    option("--budget", type=count, default=None, metavar="BYTES", help="refuse to copy more, such as 200G")
    option("--on-demand", action="store_true", help="from a store: leave the shards there, fetch and keep what is read, "
                                                    "within the budget")
    parser.set_defaults(run=writing(stage, "Name a folder that you may write, with room for the copy."))

    parser = add_parser(commands, "index", "make Megatron's .bin and .idx a data set where they lie", _INDEX_EXAMPLES)
    option = parser.add_argument
    option("folder", metavar="DIR", help="folder with pairs of X.bin and X.idx")
    option("--tokenizer", required=True, metavar="FILE", help="tokenizer.json that made the tokens")
    option("--eos", default="", metavar="TOKEN", help="token that ends a document (default: found by name)")
    option("--validation", action="append", default=[], metavar="PATTERN", help="names of the files that are held out")
    option("--name", default="", help="name of the data set (default: the folder's)")
    option("--licence", default="", help="SPDX expression, e.g. CC-BY-4.0")
    parser.set_defaults(run=writing(index, "It writes beside the files. In a folder of your own, link to them: ln -s DIR/* ."))

    parser = add_parser(commands, "pack", "store the best-fit plan of which documents share a row", _PACK_EXAMPLES)
    option = parser.add_argument
    option("folder", metavar="DATASET")
    option("--seq-len", type=count, required=True, metavar="T", help="batch.seq_len of the runs")
    option("--overlong", choices=("auto", "split", "truncate", "leave_out", "refuse"), default="auto",
           help="what becomes of documents longer than a row, as data.overlong (default: auto)")
    parser.set_defaults(run=writing(pack, OWN_COPY))

    parser = add_parser(commands, "remove", "remove documents on request, without changing the order of any run",
                        _REMOVE_EXAMPLES)
    option = parser.add_argument
    option("folder", metavar="DATASET")
    option("file", metavar="IDS", help="text file, a document per line")
    parser.set_defaults(run=writing(remove, OWN_COPY))


# ---- stats -----------------------------------------------------------------------------------------------------------
def stats(args: argparse.Namespace) -> int:
    """Tables by source, language and licence; the picture."""
    from officina.trainer.data.policy import policy_of
    from officina.trainer.data.stats import Counts, draw_lengths, statistics

    if args.picture and len(args.folders) > 1:
        raise DataError(f"--picture {args.picture}: shows one data set, not {len(args.folders)}. "
                        f"Try: officina data stats {args.folders[0]} --picture {args.picture}")
    screen, by_licence = console(), {}
    for folder in args.folders:
        found = statistics(folder, args.split)
        manifest, licences = found.dataset.manifest, policy_of(found.dataset).licences or "not stated"
        screen.print(f"{manifest.name} {manifest.version}, {args.split}")
        for title, key in (("source", 0), ("language", 1)):
            screen.print(_shares(title, found.by(key)))
        total = by_licence.setdefault(licences, Counts())
        for counts in found.groups.values():
            total.add(counts)
        lengths = ", ".join(f"{share:.0%} up to {found.quantile_tokens(share):,.0f}" for share in (0.1, 0.5, 0.9, 0.99))
        screen.print(f"lengths in tokens  {lengths}")
        if found.removed:
            screen.print(f"removed            {found.removed:,} documents, counted above; they give no loss")
        if args.picture:
            try:
                draw_lengths(found, args.picture)
            except OSError as exc:
                raise DataError(f"--picture {args.picture}: {exc.strerror}. Name a file that you may write.") from exc
            except ValueError as exc:
                raise DataError(f"--picture {args.picture}: {exc}. Try: --picture lengths.png") from exc
            screen.print(f"Wrote {args.picture}")
    screen.print(_shares("licence", by_licence))
    return EXIT_DONE


def _shares(title: str, counts: dict[str, "Counts"]):
    shown, total = table(title, "documents", "tokens", "share", "bytes/token", "tokens/word"), sum(
        c.tokens for c in counts.values())
    for name, found in counts.items():
        ratios = [f"{value:.3f}" if value else "-" for value in (found.bytes_per_token, found.tokens_per_word)]
        shown.add_row(name, f"{found.documents:,}", f"{found.tokens:,}", f"{found.tokens / total:.2%}", *ratios)
    return shown


# ---- stage, index, remove --------------------------------------------------------------------------------------------
def stage(args: argparse.Namespace) -> int:
    """Copy, and say how much."""
    from officina.trainer.data import stage as staging
    from officina.trainer.data.remote import is_url
    from officina.trainer.data.stage_remote import stage_from_store

    if args.on_demand and not is_url(args.folder):
        raise DataError(f"--on-demand: {args.folder} is a folder, and a run reads it where it is. Leave the option out, or "
                        "name a store, such as s3://bucket/wiki")
    screen, begun = console(), time.monotonic()
    with progress(screen, {"copy": "copying and comparing sha256"}) as report:
        def told(done: int, total: int) -> None:
            report("copy", done, total)

        if is_url(args.folder):
            found = stage_from_store(args.folder, args.out, args.budget, on_demand=args.on_demand, progress=told)
        else:
            found = staging.stage(args.folder, args.out, args.budget, told)
    if args.on_demand:
        screen.print(f"{args.out} reads the shards of {args.folder.split('?')[0]} when they are needed ({found.files} small "
                     f"files copied, {time.monotonic() - begun:.1f} s).")
        return EXIT_DONE
    kept = f", {size(found.kept_bytes)} were there already" if found.kept_bytes else ""
    screen.print(f"Staged {args.folder} to {args.out}: {found.files} files, {size(found.copied_bytes)} copied{kept}, each as "
                 f"in the manifest ({time.monotonic() - begun:.1f} s).")
    if found.own_words:
        screen.print(f"{args.out} was not staged from anywhere, so it goes on saying what it says of itself: "
                     f"{', '.join(found.own_words)} stay, though {args.folder} says something else.")
    return EXIT_DONE


def index(args: argparse.Namespace) -> int:
    """Write the index files and the manifest."""
    from officina.trainer.data.megatron import index_folder

    total = sum(path.stat().st_size for path in Path(args.folder).rglob("*.bin"))
    said = {key: getattr(args, key) for key in ("name", "licence") if getattr(args, key)}
    screen = console()
    with progress(screen, {"index": "hashing tokens where they lie"}) as report:
        manifest = index_folder(args.folder, args.tokenizer, eos=args.eos, validation=args.validation,
                                progress=lambda done: report("index", done, total), **said)
    for name, totals in manifest.splits.items():
        screen.print(f"{name:<12} {totals.documents:,} documents, {totals.tokens:,} tokens in {totals.shards} "
                     f"{'file' if totals.shards == 1 else 'files'}")
    screen.print(f"fingerprint  {manifest.fingerprint}")
    return EXIT_DONE


def remove(args: argparse.Namespace) -> int:
    """Remove the documents of the file."""
    from officina.trainer.data import removal

    try:
        names = Path(args.file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{args.file}: cannot be read ({exc}). Name a text file with a document's id per line.") from exc
    found, screen = removal.remove(args.folder, names), console()
    documents = f"{found.documents:,} {'document' if found.documents == 1 else 'documents'}"
    screen.print(f"Removed {documents} with {found.tokens:,} tokens from {args.folder}; {found.before:,} had been removed "
                 "before. Order and fingerprint are as they were.")
    if found.missing:
        shown = ", ".join(found.missing[:5]) + (", ..." if len(found.missing) > 5 else "")
        screen.print(f"not found    {len(found.missing):,} of {len(names):,}: {shown}")
    screen.print("Runs heed it from their next start on: officina resume RUN")
    return EXIT_DONE


# ---- pack ------------------------------------------------------------------------------------------------------------
def pack(args: argparse.Namespace) -> int:
    """Make and store the plan of every split."""
    from officina.trainer.config import DataConfig
    from officina.trainer.data.manifest import open_dataset
    from officina.trainer.data.packing import plan_path, store_plan
    from officina.trainer.data.stream import Stream, resolve_overlong

    if args.seq_len < 1:
        raise DataError(f"--seq-len {args.seq_len}: a row has at least one token. Try: --seq-len 4096")
    dataset, screen = open_dataset(args.folder), console()
    manifest, overlong = dataset.manifest, resolve_overlong(dataset, args.overlong)
    if manifest.kind != "tokens":
        raise DataError(f"{args.folder} holds records, which are not packed. Name a data set of tokens.")
    shown = table("split", "rows", "filled", "cut off", "left out", "xxh3")
    for split in manifest.splits:
        path = plan_path(dataset.folder, split, args.seq_len, overlong)
        path.unlink(missing_ok=True)
        stream = Stream(dataset, split).lay_out(DataConfig(packing="best_fit", overlong=args.overlong), args.seq_len,
                                                f"split {split} of {args.folder}")
        store_plan(path, stream.plan, manifest.fingerprint)
        plan = stream.plan.facts()
        shown.add_row(split, f"{plan['rows']:,}", f"{plan['filled']:.2%}", f"{plan['truncated']:,}",
                      f"{plan['left_out'] + plan['emptied']:,}", stream.plan.digest)
    screen.print(shown)
    use = "" if manifest.samples else " data.packing=best_fit"
    use += f" data.overlong={args.overlong}" * (args.overlong != "auto")
    screen.print(f"Train on it: officina train data.sources.main.path={args.folder} batch.seq_len={args.seq_len}{use}")
    return EXIT_DONE
