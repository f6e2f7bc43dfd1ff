"""The pages of docs/sites, from the profiles: python -m officina.launch.site_pages docs/sites"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from officina.configs.job import JobConfig
from officina.configs.sites import GRADES, IDENTITY, Site, announced, find_site, site_ids
from officina.launch.job_request import Request, make_request
from officina.launch.job_rules import example_account
from officina.launch.render import Script, directives
from officina.launch.site_rows import (
    GRADE_WORDS,
    data_words,
    gpus_words,
    limit_words,
    net_words,
    sections,
    time_words,
    unverified_words,
)

_PACKAGED_ONLY = {"XDG_CONFIG_HOME": "/nonexistent", "XDG_CONFIG_DIRS": "/nonexistent"}
_USUAL_S = 8 * 3600.0
_MADE = "<!-- Made from the profile by: python -m officina.launch.site_pages docs/sites -->"


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    found = [find_site(site, _PACKAGED_ONLY) for site in site_ids(_PACKAGED_ONLY)]
    return {"README.md": _index(found)} | {f"{site.id}.md": _page(site) for site in found if site.profile.gpu.per_node}


def _index(found: list[Site]) -> str:
    lines = [_MADE, "# Sites", "",
             "What officina knows of each system, and where it knows it from. The same in a terminal: `officina sites`, and",
             "`officina sites NAME`; on a login node `officina sites probe` compares it with what Slurm says there.", ""]
    head = ("site", "alias", "GPUs a node", "nodes", "largest job", "internet from GPU nodes", "data jobs", "billed in")
    lines += _table(head, [
        (f"[{site.id}]({site.id}.md)", ", ".join(profile.aliases), gpus_words(site), f"{profile.node.count:,}",
         limit_words(site) or "?", net_words(site), data_words(site), profile.billing.unit or "?")
        for site in found if (profile := site.profile).gpu.per_node])
    lines += ["", "`?`: not known, or unverified. `slurm` is any other Slurm cluster: `officina sites new NAME` on its login",
              "node writes a profile of its own. `local` is a machine without a scheduler.", "", "## Announced", "",
              "Not in service: for planning only. All of it is from the press (third party).", ""]
    lines += _table(("system", "where", "AI Factory", "GPUs", "nodes", "expected", "known from", ""), [
        (row.id, row.operator, row.factory, row.gpus, row.nodes, row.expected, f"{row.source}, {row.date}", row.note)
        for row in announced()])
    lines += ["", "## Grades", "", *(f"- **{GRADE_WORDS[grade]}**: {words}" for grade, words in GRADES.items()), "",
              "A profile is laid over by a file of your centre and by one of yours:",
              "[architecture](../architecture.md#site-profiles)."]
    return "\n".join(lines) + "\n"


def _page(site: Site) -> str:
    profile = site.profile
    names = " or ".join(f"`site={name}`" for name in dict.fromkeys([site.id, *profile.aliases]))
    where = " · ".join(filter(None, (profile.operator, profile.factory)))
    lines = [_MADE, f"# {profile.name}", "", f"{where}. Chosen by {names}."]
    if profile.docs:
        lines.append(f"The site's own documentation: <{profile.docs}>.")
    lines += ["", f"Of what follows, {unverified_words(site)}. Where nothing stands, nothing is known. Limits change: on a",
              f"login node, `officina sites probe {site.id}` shows where Slurm says something else.", ""]
    lines += _submitting(site)
    for title, note, rows in sections(site):
        lines += [f"## {title}", ""] + ([f"{note}.", ""] if note else [])
        lines += _table(("", "value", "grade", "source", "date"), [
            (f"`{row.key}`", row.value.replace("  ", ", ") + (f"<br>*{row.note}*" if row.note else ""),
             f"**{GRADE_WORDS[row.fact.grade]}**" if row.fact.grade == "unverified" else GRADE_WORDS[row.fact.grade],
             f"[{row.fact.source.name}]({row.fact.source.url})" if row.fact.source.url else row.fact.source.name, row.fact.date)
            for row in rows])
        lines.append("")
    lines += ["## Sources", "", *_sources(site)]
    return "\n".join(lines) + "\n"


def _submitting(site: Site) -> list[str]:
    """The words, and what sbatch is told then: from the code that renders scripts."""
    profile = site.profile
    account = example_account(profile)
    request = _request(site, account)
    limit = limit_words(site)
    charged = f"account={account} " if request.account else ""
    largest = f"; the largest usual job: {limit}" if limit else ""
    lines = ["## How to submit", "",
             "On a login node; `--dry-run` shows the plan and the whole script, also from elsewhere:", "",
             f"    officina submit experiment=./my_run.yaml site={(profile.aliases or [site.id])[0]} nodes={request.nodes} "
             f"{charged}time={time_words(request.time_s)}", "",
             f"Whole nodes of {profile.gpu.per_node} GPUs, one rank a GPU{largest}. Of such a job sbatch is told:", ""]
    told = directives(Script(request, "mine", Path("RUN"), ()))
    lines += [f"    --{option}{'=' if value else ''}{value}{f'    # {why}' if why else ''}"
              for option, value, why in told if option not in ("output", "chdir")]
    data = profile.queues.data
    where = f"partition {data.partition}" if data.partition else f"qos {data.qos}" if data.qos else ""
    lines += ["", f"Commands that need no GPU (`data build`, `convert`) go to {where}." if where else
              "Where commands without GPUs go is not known: name a `partition=`.",
              f"Images run under {profile.container.runtime}: `container=IMAGE.sif`." if profile.container.runtime else
              "Which program runs images is not known.", ""]
    return lines


def _request(site: Site, account: str) -> Request:
    queue, needed = site.profile.queues.train, "account" in site.profile.request.requires
    limits = (site.profile.partitions.get(queue.partition), site.profile.qos.get(queue.qos))
    longest = min((known.max_time for known in limits if known and known.max_time), default=_USUAL_S)
    return make_request(site, JobConfig(nodes=2, account=account if needed else "", time=min(longest, _USUAL_S)))


def _sources(site: Site) -> Iterator[str]:
    used = dict.fromkeys(fact.source for key, fact in site.facts.items() if key.split(".")[0] not in IDENTITY)
    for source in sorted(used, key=lambda s: s.name):
        yield f"- **{source.name}**: {source.title} ({GRADE_WORDS[source.grade]}, {source.date})" + (
            f" <{source.url}>" if source.url else "")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [_line(head), _line(("---",) * len(head)), *(_line(tuple(cell.replace("|", "\\|") for cell in row)) for row in rows)]


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(folder: Path) -> None:
    """Write every page, and remove those made before of sites that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for path in folder.glob("*.md"):
        if path.name not in made and path.read_text(encoding="utf-8").startswith(_MADE):
            path.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
