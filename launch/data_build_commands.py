"""`officina data build`: inputs of every kind to a data set. No torch."""

import argparse
import os
import sys
import time

from officina.launch.data_terminal import add_parser, console, count, progress, share, size, table
from officina.trainer.errors import EXIT_DONE

_EXAMPLES = """examples:
  officina data build demo/data --vocab-size 2048          the Python standard library's sources
  officina data build corpus texts/ more.jsonl.zst         a folder and a file of JSON lines
  officina data build corpus texts/ --include '*.tex'      only these files
  officina data build corpus hplt/*.jsonl.zst --tokenizer base/tokenizer.json --licence CC0-1.0
  officina data build corpus crawl/ --filter my_filters:keep --max-bad-rows 100
  officina data build notes notes.jsonl --tokenizer base/tokenizer.json --sensitive --seal ~/.keys/notes.key
  officina data build chats sft.jsonl --samples --tokenizer MODEL
  officina data build pairs prefs.parquet --samples --tokenizer MODEL --licence Apache-2.0
Samples: messages, conversations (ShareGPT), instruction (alpaca), prompt and completion, chosen and rejected, or text.
A build that was stopped, however, goes on when the same command is given again.
"""
_PHASES = {"reading": "reading every row", "tokenizer": "reading for the tokenizer", "merges": "training the tokenizer",
           "tokens": "tokenising"}


def add_build(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parser of `officina data build`."""
    parser = add_parser(commands, "build", "tokenise texts into shards with a manifest", _EXAMPLES)
    option = parser.add_argument
    option("folder", metavar="OUT", help="folder of the data set to be made")
    option("inputs", metavar="INPUT", nargs="*",
           help="folder or file: JSON lines (.jsonl, also .gz or .zst), .json lists, .csv, .parquet, .arrow, a saved Hugging "
           "Face data set, WebDataset .tar, text; none: the Python standard library's sources")
    option("--include", action="append", metavar="PATTERN", help="names of the files to read in folders")
    option("--text-field", default="", metavar="NAME", help="field that holds the text (default: text or content)")
    option("--language-field", default="", metavar="NAME", help="field with the language's code (default: lang or language)")
    option("--source-field", default="", metavar="NAME", help="field that names the source (default: the input is the source)")
    option("--id-field", default="", metavar="NAME", help="field with the document's id (default: id, doc_id or HPLT's u; "
           "without one, the text's hash)")
    option("--filter", action="append", default=[], metavar="MODULE:FUNCTION",
           help="keep(document) -> True, False or the text to take instead; may be given several times")
    option("--max-bad-rows", type=count, default=0, metavar="N", help="rows that may be left out unread (default: 0)")
    option("--samples", action="store_true", help="rows are samples to fine-tune on; only their answers are trained on")
    option("--chat-template", default="", metavar="FILE", help="Jinja, or the word plain (default: the tokenizer's own)")
    option("--chat-date", default="", metavar="DATE", help="for templates that ask for today's date, such as 2026-11-25")
    option("--train-on", choices=("all", "last"), default="all", help="answers of a conversation (default: all)")
    option("--tokenizer", metavar="FILE", help="tokenizer.json, SentencePiece tokenizer.model or tekken.json, or its folder "
           "(default: train a byte-level BPE)")
    option("--vocab-size", type=count, default=4096, metavar="N", help="of the trained one (default: 4096)")
    option("--eos", default="", metavar="TOKEN", help="token that ends a document (default: found by name)")
    option("--validation", type=share, default=0.05, metavar="SHARE", help="share of documents held out (default: 0.05)")
    option("--shard-bytes", type=count, default=1 << 30, metavar="N", help="size at which a new shard begins (default: 1Gi)")
    option("--workers", type=count, default=0, metavar="N", help="processes (default: one per core)")
    option("--name", default="", help="name of the data set (default: the folder's)")
    option("--description", default="", help="what the data is, in a sentence")
    option("--licence", default="", help="SPDX expression, e.g. CC-BY-4.0")
    option("--policy", metavar="FILE", help="conditions of use: an ODRL offer (JSON-LD) or the fields of policy.json")
    option("--personal-data", choices=("none", "pseudonymised", "present"), default="none",
           help="with `present`, no text of it is ever shown (default: none)")
    option("--sensitive", action="store_true", help="no text of it is ever shown")
    option("--seal", default="", metavar="KEY", help="seal the tokens (AES-256-GCM): file with the key, mode 0600, or "
           "'command:PROGRAM ARGS' that prints it")
    option("--overwrite", action="store_true", help="replace the data set, or the unfinished build, in OUT")
    parser.set_defaults(run=build)


def build(args: argparse.Namespace) -> int:
    """Build, and say what was built and what was left out."""
    from officina.trainer.data import build as building
    from officina.trainer.data.describe import read_policy_file
    from officina.trainer.data.documents import Fields
    from officina.trainer.data.formats import INCLUDE, SAMPLE_INCLUDE

    if args.filter and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a filter may lie beside the place of the command
    said = {key: getattr(args, key) for key in ("name", "description", "licence") if getattr(args, key)}
    about = said | {"personal_data": args.personal_data, "sensitive": args.sensitive}
    fields = Fields(text=args.text_field, language=args.language_field, source=args.source_field, id=args.id_field)
    options = building.BuildOptions(
        inputs=args.inputs, include=args.include or (SAMPLE_INCLUDE if args.samples else INCLUDE), fields=fields,
        filters=args.filter,
        max_bad_rows=args.max_bad_rows, tokenizer=args.tokenizer, vocab_size=args.vocab_size, eos=args.eos,
        samples=args.samples, chat_template=args.chat_template, chat_date=args.chat_date, train_on=args.train_on,
        validation=args.validation, shard_bytes=max(args.shard_bytes, 1), workers=args.workers, overwrite=args.overwrite,
        policy=read_policy_file(args.policy) if args.policy else None, seal=args.seal, about=about)
    screen, begun = console(), time.monotonic()
    with progress(screen, _PHASES) as report:
        result = building.build(args.folder, options, report)
    _tell(result, args.folder, screen)
    recipe = {"": "", "answers": "experiment=sft init_from=MODEL ", "pairs": "experiment=dpo init_from=MODEL "}[
        result.manifest.samples]
    screen.print(f"Built {args.folder} in {time.monotonic() - begun:.1f} s. "
                 f"Train on it: officina train {recipe}data.sources.main.path={args.folder}")
    return EXIT_DONE


def _tell(result, folder: str, screen) -> None:
    shown = table("split", "documents", "tokens", "bytes/token", "shards", "size")
    for name, totals in result.manifest.splits.items():
        shown.add_row(name, f"{totals.documents:,}", f"{totals.tokens:,}", f"{result.stats[name]['bytes_per_token']:.2f}",
                      str(totals.shards), size(totals.bytes))
    screen.print(shown)
    left_out = result.stats["left_out"]
    told = [f"{left_out['undecodable']} not UTF-8", f"{left_out['duplicates']} exact duplicates", f"{left_out['empty']} empty"]
    if left_out["bad_rows"]:
        told.append(f"{left_out['bad_rows']} bad rows")
    screen.print(f"left out     {', '.join(told)}")
    for name in left_out["undecodable_files"][:5]:
        screen.print(f"             not UTF-8: {name}")
    for step in result.manifest.steps:
        if step.name != "exact-duplicates":
            changed = f", {step.documents_changed:,} changed" if step.documents_changed else ""
            screen.print(f"step         {step.name} {step.version}: {step.documents_in - step.documents_out:,} of "
                         f"{step.documents_in:,} documents left out{changed}")
    if languages := result.manifest.languages:
        screen.print(f"languages    {len(languages)}: {', '.join(languages[:12])}")
    samples = result.manifest.samples
    ends = f"answers end with {result.manifest.provenance['answers_end_with']}" if samples else (
        f"documents end with {result.manifest.tokenizer.eos}")
    screen.print(f"vocabulary   {result.manifest.tokenizer.vocab_size:,} tokens, {ends}")
    from officina.trainer.data.manifest import open_dataset
    from officina.trainer.data.policy import policy_of

    if not policy_of(open_dataset(folder)).licences:
        screen.print(f"licence      not stated: officina data describe {folder} --licence SPDX")
    if result.manifest.sealed:
        screen.print(f"sealed       with the key {result.manifest.sealed}; a run names it: data.sources.NAME.key=FILE")
    screen.print(f"fingerprint  {result.manifest.fingerprint}")
