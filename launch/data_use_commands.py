"""`officina data describe | policy | export | summary`: what is said about data, what it allows, what runs used. No torch."""

import argparse
import json
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from officina.launch.data_terminal import OWN_COPY, add_parser, console, progress, table, writing
from officina.trainer.errors import EXIT_DONE, EXIT_USER, ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from officina.trainer.data.summary import Summary

EXPORTS = {
    "croissant": ("officina.trainer.data.croissant:write_croissant", "croissant.json of the data set, written anew"),
    "mldcat": ("officina.trainer.data.mldcat:write_mldcat", "MLDCAT-AP 3.1 as JSON-LD, for catalogues"),
    "megatron": ("officina.trainer.data.megatron:write_megatron", "a .bin and .idx per split; --out names their folder"),
}
"""Format -> function(folder[, out]) that returns the path or paths written, and what it is. A new format is one line here."""

_DESCRIBE_EXAMPLES = """examples:
  officina data describe demo/data                                             what is stated, and what is missing
  officina data describe demo/data --creator 'Python Software Foundation' --url https://docs.python.org
  officina data describe demo/data --policy offer.jsonld                       an ODRL offer, or the fields of policy.json
"""
_POLICY_EXAMPLES = """examples:
  officina data policy demo/data                                               which rules hold, with nothing declared
  officina data policy demo/data use=research use.country=FI use.release=true
  officina data policy wiki maps use.commercial=false                          also what the two say together
  officina data policy demo/data --odrl                                        the conditions as an ODRL offer
"""
_EXPORT_EXAMPLES = """examples:
  officina data export demo/data --to croissant
  officina data export demo/data --to mldcat --out catalogue.jsonld
  officina data export demo/data --to megatron --out megatron/
"""
_SUMMARY_EXAMPLES = """examples:
  officina data summary runs/demo
  officina data summary runs/demo --receipt receipt.json
  officina data summary runs/demo --json
"""


def add_use(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parsers of the four commands."""
    what = "state or show licence, creators and conditions of use of a data set"
    parser = add_parser(commands, "describe", what, _DESCRIBE_EXAMPLES)
    option = parser.add_argument
    option("folder", metavar="DATASET")
    option("--policy", metavar="FILE", help="conditions of use: an ODRL offer (JSON-LD) or the fields of policy.json")
    option("--licence", help="SPDX expression, e.g. CC-BY-4.0")
    option("--creator", action="append", dest="creators", metavar="NAME", help="who made the data; may be given several times")
    option("--description", help="what the data is, in a sentence")
    option("--url", help="where it is described")
    option("--published", metavar="DATE", help="2026-11-23")
    option("--collected", metavar="DATE", help="of the newest of the data: 2025, 2025-06 or 2025-06-30")
    option("--set-version", dest="version", metavar="N.N.N", help="version of the data set")
    parser.set_defaults(run=writing(describe, OWN_COPY))

    parser = add_parser(commands, "policy", "judge a use of data sets by their conditions: the plan, rule by rule",
                        _POLICY_EXAMPLES)
    option = parser.add_argument
    option("words", metavar="DATASET|WORD", nargs="+", help="folders, and words such as use.purpose=research")
    option("--date", type=_day, default=None, metavar="DATE", help="judge for this day (default: now)")
    option("--odrl", action="store_true", help="print the conditions of one data set as an ODRL offer")
    parser.set_defaults(run=policy)

    parser = add_parser(commands, "export", "write a data set, or what is said about it, for others", _EXPORT_EXAMPLES)
    option = parser.add_argument
    option("folder", metavar="DATASET")
    formats = "; ".join(f"{name}: {what}" for name, (_, what) in EXPORTS.items())
    option("--to", required=True, choices=sorted(EXPORTS), help=formats)
    option("--out", metavar="PATH", help="where to (default: in the data set)")
    parser.set_defaults(run=writing(export, "Name another place that you may write: --out PATH"))

    parser = add_parser(commands, "summary", "exact tokens a run consumed, by source, contributor, licence and language",
                        _SUMMARY_EXAMPLES)
    option = parser.add_argument
    option("folder", metavar="RUN")
    option("--json", action="store_true", help="print everything as JSON")
    option("--receipt", metavar="FILE", help="also write the receipt that a data pool settles by; - prints it")
    parser.set_defaults(run=summary)


def _day(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is no date; write for example 2027-12-31") from exc
    return found if found.tzinfo else found.replace(tzinfo=UTC)


# ---- describe --------------------------------------------------------------------------------------------------------
def describe(args: argparse.Namespace) -> int:
    """State what was given; show what is stated."""
    from officina.trainer.data import describe as describing
    from officina.trainer.data.manifest import open_dataset
    from officina.trainer.data.policy import policy_of
    from officina.trainer.data.strict import strict

    said = {name: getattr(args, name) for name in describing.CHANGEABLE if getattr(args, name, None) is not None}
    if args.policy:
        said["policy"] = describing.read_policy_file(args.policy, describing.policy_before(args.folder))
    if said:
        describing.change(args.folder, **said)
    dataset, screen = open_dataset(args.folder), console()
    judged = {}
    with suppress(DataError):  # told below, as a fault
        policy = policy_of(dataset)
        judged = {"licence": policy.licences, "personal_data": policy.personal_data, "sensitive": policy.sensitive}
    for name in ("name", *describing.CHANGEABLE, "personal_data", "sensitive", "languages", "policy_sha256", "fingerprint"):
        value = judged.get(name, getattr(dataset.manifest, name))
        shown = ", ".join(value) if isinstance(value, list) else value
        screen.print(f"  {name:<14} {'not stated' if shown in ('', None) else shown}")
    for fault in strict(dataset).faults:
        screen.print(f"  - {fault}")
    return EXIT_DONE


# ---- policy ----------------------------------------------------------------------------------------------------------
def policy(args: argparse.Namespace) -> int:
    """The plan of a use: every rule, kept or not. 2 if one is not kept."""
    from officina.configs.compose import compose_all
    from officina.trainer.data.gate import Judged, explained, judge
    from officina.trainer.data.manifest import open_dataset
    from officina.trainer.data.odrl import to_odrl
    from officina.trainer.data.policy import policy_of

    folders = [Path(word) for word in args.words if "=" not in word]
    words = [word for word in args.words if "=" in word]
    if not folders:
        raise DataError(f"{' '.join(args.words)}: names no data set. Try: officina data policy demo/data {words[0]}")
    if wrong := [word for word in words if not word.startswith(("use.", "use="))]:
        raise DataError(f"{wrong[0]}: only what is declared of the use counts here. Try: use.purpose=research")
    policies = {str(folder): policy_of(open_dataset(folder)) for folder in folders}
    if args.odrl:
        if len(folders) > 1:
            raise DataError(f"--odrl: an offer is of one data set, not of {len(folders)}. "
                            f"Try: officina data policy {folders[0]} --odrl")
        offer = {"@context": {"odrl": "http://www.w3.org/ns/odrl/2/", "officina": "urn:officina:",
                              "xsd": "http://www.w3.org/2001/XMLSchema#"}} | to_odrl(policies[str(folders[0])])
        print(json.dumps(offer, indent=1, ensure_ascii=False))
        return EXIT_DONE
    composed = compose_all(words)
    if composed.problems:
        raise ConfigError(composed.problems)
    found = judge([Judged(name, each) for name, each in policies.items()], composed.run.use, "gen-ai",
                  args.date or datetime.now(UTC))
    print("\n".join(explained(found)) or "no conditions: any use is allowed")
    for name, each in policies.items():
        limits = [f"{limit.replace('_', ' ')} {getattr(each, limit):,g}" for limit in
                  ("max_runs", "max_tokens", "max_epochs", "max_days") if getattr(each, limit) is not None]
        if limits:
            print(f"counted   {name}: {', '.join(limits)}; `officina check` knows what is left")
    refused = sum(not finding.allowed for finding in found)
    print(f"{refused} of {len(found)} rules are not kept." if refused else "This use is allowed.")
    return EXIT_USER if refused else EXIT_DONE


# ---- export ----------------------------------------------------------------------------------------------------------
def export(args: argparse.Namespace) -> int:
    """Write one format."""
    module, function = EXPORTS[args.to][0].split(":")
    write = getattr(import_module(module), function)
    if args.to == "croissant" and args.out:
        raise DataError(f"--out {args.out}: croissant.json belongs into the data set, beside the files that it names. "
                        f"Try: officina data export {args.folder} --to croissant")
    path = write(args.folder, args.out) if args.out else write(args.folder)
    print(f"Wrote {path}")
    if args.to == "megatron":
        from officina.trainer.data.manifest import open_dataset
        from officina.trainer.data.policy import POLICY

        licence, said = open_dataset(args.folder).manifest.licence, path / POLICY
        beside = f" {said} beside them does, and holds for them when they are indexed." if said.exists() else ""
        print(f"These files hold no licence and no conditions of use.{beside} As a data set again: "
              f"officina data index {path} --tokenizer {args.folder} --licence '{licence or 'SPDX'}'")
    return EXIT_DONE


# ---- summary ---------------------------------------------------------------------------------------------------------
def summary(args: argparse.Namespace) -> int:
    """Tables for people, JSON for machines, a receipt for the pool."""
    from dataclasses import asdict

    from officina.trainer.data import summary as summarising
    from officina.trainer.data.manifest import write_whole

    with progress(_errors(), {"rows": "counting rows"}, unit="steps") as report:
        found = summarising.summarise(args.folder, lambda done, total: report("rows", done, total))
    slip = json.dumps(summarising.receipt(found), indent=1, ensure_ascii=False) + "\n"
    if args.receipt == "-":
        print(slip, end="")
        return EXIT_DONE
    if args.receipt:
        try:
            write_whole(Path(args.receipt), slip.encode())
        except OSError as exc:
            raise DataError(f"--receipt {args.receipt}: {exc.strerror}. Name a file that you may write.") from exc
    if args.json:
        print(json.dumps(asdict(found), indent=1, ensure_ascii=False))
        return EXIT_DONE
    _tell(found)
    if args.receipt:
        print(f"Wrote {args.receipt}")
    return EXIT_DONE


def _errors() -> "Console":
    """Progress goes there: stdout may be JSON for a machine."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def _tell(found: "Summary") -> None:
    screen = console()
    when = f", {found.first} to {found.last}, {found.duration_s:,.0f} s of work" if found.first else ""
    screen.print(f"{found.run}: {found.total:,} {found.unit} in {found.steps:,} steps ({found.starts} "
                 f"start{'s' * (found.starts != 1)}{when})")
    shown, total = table("source", "licence", found.unit, "share", "passes"), found.total or 1  # all may have been removed
    for name, used in found.sources.items():
        shown.add_row(f"{name} ({used.dataset})", used.licence, f"{used.tokens:,}", f"{used.tokens / total:.2%}",
                      f"{used.passes:.3f}")
        if len(used.by_source) > 1:
            for inner, tokens in used.by_source.items():
                shown.add_row(f"  {inner}", "", f"{tokens:,}", f"{tokens / total:.2%}", "")
    screen.print(shown)
    for name, used in found.sources.items():
        if used.lost:
            screen.print(f"damaged      {used.lost:,} {found.unit} of {name} lay in damaged blocks: not read, not counted")
    by = {"contributor": found.by_contributor, "licence": found.by_licence, "language": found.by_language}
    for title, counts in by.items():
        shown = table("source", found.unit, "share")
        shown.columns[0].header = title
        for name, tokens in counts.items():
            shown.add_row(name, f"{tokens:,}", f"{tokens / total:.2%}")
        screen.print(shown)
    screen.print("Attribution:")
    for text in found.attribution:
        screen.print(f"  {text}")

