"""`officina sites`: what is known of each system, where it comes from, and how it differs from what its Slurm says."""

import argparse
import os
import socket
import sys
from typing import TYPE_CHECKING

from officina.configs.sites import GRADES, IDENTITY, Site, announced, config_folders, detect_site, find_site, site_ids, site_of
from officina.launch.site_probe import ask_slurm, difference, new_profile
from officina.launch.site_rows import (
    GRADE_WORDS,
    bandwidth_words,
    data_words,
    gpus_words,
    limit_words,
    net_words,
    sections,
    unverified_words,
)
from officina.trainer.errors import EXIT_DONE, LaunchError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_WIDE = 110
"""Columns of a terminal from which on more is shown."""


def sites(args: argparse.Namespace) -> int:
    """`sites`, `sites NAME`, `sites probe [NAME]`, `sites new NAME`."""
    words: list[str] = args.words
    if not words:
        return _list()
    if words[0] == "probe" and len(words) <= 2:
        return _probe(words[1] if len(words) > 1 else None)
    if words[0] == "new" and len(words) == 2:
        return _new(words[1])
    if len(words) > 1 or words[0] == "new":
        raise LaunchError(f"{' '.join(words)}: is not sites, sites NAME, sites probe [NAME] or sites new NAME. "
                          f"Try: officina sites {'new mycluster' if words[0] == 'new' else words[0]}")
    return _show(find_site(words[0]))


# ---- tables ----------------------------------------------------------------------------------------------------------
def _list() -> int:
    console, here = _console(), detect_site(socket.gethostname())
    wide = console.width >= _WIDE
    table = _table("site", "alias", "GPUs a node", "nodes", "largest job", "status",
                   *(("GB/s", "net", "data jobs", "billed in") if wide else ()), right=("nodes", "GB/s"))
    for site in site_ids():
        found = find_site(site)
        profile = found.profile
        status = "here" if site == here else "in use" if profile.gpu.per_node else "any"
        limit, more = limit_words(found), ("", "", "", "")
        if profile.gpu.per_node:
            limit = limit or "?"
            more = (bandwidth_words(found), net_words(found), data_words(found), profile.billing.unit or "?")
        table.add_row(_text(site, "bold"), profile.aliases[0] if profile.aliases else "", gpus_words(found),
                      f"{profile.node.count:,}" if profile.node.count else "", limit, status,
                      *(more if wide else ()))
    console.print(table)
    console.print(("GB/s: from one node to others. net: GPU nodes reach the internet. " if wide else "")
                  + "? = not known, or unverified.", style="dim")
    console.print("\nAnnounced, for planning only; no job can be submitted to them", style="bold")
    table = _table("site", "GPUs", "nodes", "expected", *(("where", "known from") if wide else ()))
    for row in announced():
        more = (row.operator, f"{row.source}, {row.date}") if wide else ()
        table.add_row(row.id, row.gpus, row.nodes, row.expected, *more)
    console.print(table)
    console.print("\nEvery value with its source: officina sites lumi\nOn a login node: officina sites probe", style="dim")
    return EXIT_DONE


def _show(site: Site) -> int:
    console, profile = _console(), site.profile
    names = ", ".join(dict.fromkeys([site.id, *profile.aliases]))
    console.print(_text(profile.name, "bold"), _text(f"site={names}", "dim"))
    for line in (" · ".join(filter(None, (profile.operator, profile.factory))), profile.docs):
        if line:
            console.print(line)
    console.print(f"{unverified_words(site)}, marked ?. Where nothing stands, nothing is known.")
    table = _table("", "value", "grade", "source", *(("date",) if console.width >= _WIDE else ()),
                   *(("file",) if len(site.files) > 1 else ()))
    for title, note, rows in sections(site):
        table.add_row(_text(title, "bold"), _text(note, "dim italic"))
        previous = ""
        for row in rows:
            marked = row.fact.grade == "unverified"
            value = _text(row.value, "yellow" if marked else "")
            if row.note:
                value.append(f"\n{row.note}", "dim italic")
            table.add_row(f"  {row.key}" if row.key != previous else "", value,
                          _text(GRADE_WORDS[row.fact.grade], "yellow" if marked else "dim"), row.fact.source.name,
                          *((row.fact.date,) if console.width >= _WIDE else ()),
                          *((f"[{site.files.index(row.fact.file) + 1}]",) if len(site.files) > 1 else ()))
            previous = row.key
        table.add_section()
    console.print(table)
    console.print()
    _show_origins(console, site)
    return EXIT_DONE


def _show_origins(console: "Console", site: Site) -> None:
    """Grades, sources and files that stand in the table."""
    facts = [fact for key, fact in site.facts.items() if key.split(".")[0] not in IDENTITY]
    sources = dict.fromkeys(fact.source for fact in facts if fact.source.name)
    width = max((len(source.name) for source in sources), default=0)
    for source in sorted(sources, key=lambda s: (list(GRADES).index(s.grade), s.name)):
        console.print(_text(f"{source.name:<{width}}", "bold"), f"{GRADE_WORDS[source.grade]}, {source.date}: {source.title}",
                      soft_wrap=True)
        if source.url:
            console.print(f"{'':<{width}} {source.url}", style="dim", soft_wrap=True)
    console.print()
    used = {fact.grade for fact in facts}
    for grade, words in GRADES.items():
        if grade in used:
            console.print(f"{GRADE_WORDS[grade]}: {words}", style="dim")
    numbered = [f"[{i}] {path}" for i, path in enumerate(site.files, 1)] if len(site.files) > 1 else [f"from {site.files[0]}"]
    for line in numbered:
        console.print(line, style="dim", soft_wrap=True)


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def _text(words: str, style: str) -> "RenderableType":
    from rich.text import Text

    return Text(words, style)


def _table(*columns: str, right: tuple[str, ...] = ()) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold",
                         no_wrap=name in ("site", "grade", "date", "file", "source"))
    return table


# ---- probe -----------------------------------------------------------------------------------------------------------
def _probe(word: str | None) -> int:
    host = socket.gethostname()
    site = find_site(word or detect_site(host) or "slurm")
    asked = ask_slurm(os.environ)
    text, n = difference(site, asked, host)
    print(text, end="")
    next_step = f"Keep them: officina sites probe {site.id} >my.yaml, then site=./my.yaml" if n else "It is as the machine says"
    if not site.profile.hosts and site.profile.scheduler == "slurm":  # the profile of any cluster
        next_step = "A profile of this cluster: officina sites new NAME"
    print(f"officina: {n} difference{'s' * (n != 1)} to the profile {site.id}. {next_step}", file=sys.stderr)
    return EXIT_DONE


def _new(name: str) -> int:
    path = config_folders(os.environ)[-1] / "sites" / f"{name}.yaml"
    if not name.replace("-", "").replace("_", "").isalnum() or name in ("new", "probe"):
        raise LaunchError(f"{name}: the name of a site is made of letters, digits, - and _, and is not a command's. "
                          "Try: officina sites new mycluster")
    if there := site_of(name):
        raise LaunchError(f"{name}: there is such a site already, {there}. What differs there: officina sites probe {name}; "
                          f"another name: officina sites new my-{name}")
    text = new_profile(name, ask_slurm(os.environ), socket.gethostname())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"{path}: {error.strerror}. Choose another folder for your files: "
                          "export XDG_CONFIG_HOME=DIR") from None
    print(f"Wrote {path}. Look at it: officina sites {name}")
    return EXIT_DONE
