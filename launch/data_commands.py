"""`officina data ...`: data sets, and what runs read of them; `verify` and `audit` are here. No torch."""

import argparse
import sys
import time

from officina.launch.data_build_commands import add_build
from officina.launch.data_inspect_commands import add_inspect
from officina.launch.data_terminal import add_parser, console, progress, size, table
from officina.launch.data_tool_commands import add_tools
from officina.launch.data_use_commands import add_use
from officina.trainer.errors import EXIT_DONE, EXIT_USER, DataError

_EXAMPLES = """examples:
  officina data verify demo/data
  officina data audit runs/first
"""


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of `officina data`; each sets `args.run` to the function that does it."""
    add_build(commands)
    add_inspect(commands)
    add_tools(commands)
    add_use(commands)
    parser = add_parser(commands, "verify", "check every byte of a data set", _EXAMPLES)
    parser.add_argument("folder", metavar="DATASET")
    parser.add_argument("--key", default="", metavar="KEY", help="of a sealed set: open every block too; file or command:...")
    parser.set_defaults(run=verify)

    what = "prove from the ledger that every sample was read once and in order"
    parser = add_parser(commands, "audit", what, _EXAMPLES)
    parser.add_argument("folder", metavar="RUN")
    parser.set_defaults(run=audit)


# ---- verify ----------------------------------------------------------------------------------------------------------
def verify(args: argparse.Namespace) -> int:
    from officina.trainer.data import verify as verifying
    from officina.trainer.data.manifest import open_dataset
    from officina.trainer.data.strict import strict

    total = sum(entry.bytes for entry in open_dataset(args.folder).shards)
    screen, begun = console(), time.monotonic()
    with progress(screen, {"sha256": "comparing sha256"}) as report:
        found = verifying.verify(args.folder, lambda done_bytes: report("sha256", done_bytes, total), key=args.key)
    if found.faults:
        raise DataError(f"{args.folder} is damaged:\n" + "\n".join(f"  - {fault}" for fault in found.faults))
    described = strict(found.dataset)
    if described.faults:
        raise DataError(f"the bytes of {args.folder} are sound, but what is said about them is not:\n"
                        + "\n".join(f"  - {fault}" for fault in described.faults))
    screen.print(f"{args.folder} is sound: {len(found.dataset.shards)} shards, {size(found.bytes)}, "
                  f"sha256 of each as in its manifest ({time.monotonic() - begun:.1f} s).")
    screen.print(f"fingerprint  {found.dataset.manifest.fingerprint}")
    if sealed := found.dataset.manifest.sealed:
        tried = "every block opens" if args.key else "to try every block: --key FILE"
        screen.print(f"sealed       with the key {sealed}; {tried}")
    if described.missing:
        screen.print(f"not stated   {', '.join(described.missing)}: officina data describe {args.folder} --help")
    return EXIT_DONE


# ---- audit -----------------------------------------------------------------------------------------------------------
def audit(args: argparse.Namespace) -> int:
    from officina.trainer.data import ledger

    screen = console()
    with progress(screen, {"steps": "reading every step again"}, unit="steps") as report:
        found = ledger.audit(args.folder, lambda done, total: report("steps", done, total))
    rows_shown = table("source", "rows", "read", "left out", "epochs")
    for name, use in found.sources.items():
        rows_shown.add_row(name, f"{use.rows:,}", f"{use.used:,}", f"{use.skipped:,}", f"{use.epochs:.3f}")
    screen.print(rows_shown)
    if found.faults:
        shown = "\n".join(f"  - {fault}" for fault in found.faults[:20])
        more = f"\n  and {len(found.faults) - 20} more" if len(found.faults) > 20 else ""
        print(f"{args.folder}: {len(found.faults)} faults; the data was not read as planned:\n{shown}{more}", file=sys.stderr)
        return EXIT_USER
    for step, lists in found.removals:
        told = ", ".join(f"{name} by {n} {'list' if n == 1 else 'lists'}" for name, n in lists.items()) or "none"
        screen.print(f"removed on request from step {step} on: {told}")
    for source, shards in found.lost.items():
        for shard, blocks in shards.items():
            screen.print(f"damaged, read without loss: {source}, {shard}, block{'s' * (len(blocks) > 1)} "
                         f"{', '.join(map(str, blocks))}")
    begun = "started once" if found.starts == 1 else f"started {found.starts} times"
    screen.print(f"Proved: {found.steps:,} steps ({begun}) read samples {found.first_sample:,} to "
                  f"{found.stop_sample:,}, each exactly once and in order; none twice, none missing; "
                  f"{sum(b - a for a, b in found.skipped):,} left out by data.skip.")
    return EXIT_DONE
