"""What a site profile says, as rows of text: shared by the tables of `officina sites` and the pages of docs/sites."""

from dataclasses import dataclass

from officina.configs.site_profile import SiteProfile
from officina.configs.sites import IDENTITY, Fact, Site
from officina.trainer.quantities import parse_duration_s

GRADE_WORDS = {"official": "official", "copy": "copy", "third_party": "third party", "unverified": "? unverified", "own": "own"}
_RECORDS = ("partitions", "qos", "queues", "storage")
"""Sections of small records, which read better in one row than in one row a field."""
_SINGLE = ("hosts", "energy")
"""Values that stand at the top of a profile, with no section of their own."""
_NO_LIMIT = ("quota_gb", "quota_files")


@dataclass(frozen=True, slots=True)
class Row:
    """One value, or some values of one record that share their origin."""

    key: str
    value: str
    note: str
    fact: Fact
    """Of the first value."""


def sections(site: Site) -> list[tuple[str, str, list[Row]]]:
    """(title, note, rows) of each section, in the order of the profile's fields."""
    found: dict[str, list[tuple[str, Fact]]] = {}
    for key, fact in site.facts.items():
        top, _, rest = key.partition(".")
        if top not in IDENTITY:
            found.setdefault("site" if top in _SINGLE else top, []).append((rest or top, fact))
    order = ["site", *SiteProfile.__dataclass_fields__]
    return [(title, site.notes.get(title, ""), _rows(site, title, found[title])) for title in order if title in found]


def _rows(site: Site, title: str, facts: list[tuple[str, Fact]]) -> list[Row]:
    if title not in _RECORDS:
        return [_row(title, key, fact) for key, fact in facts]
    rows: dict[tuple, Row] = {}
    for key, fact in facts:
        name, _, field = key.partition(".")
        said = f"{field}={as_words(field, fact.value)}"
        origin = (name, fact.source, fact.grade, fact.file, fact.date)
        note = f"{field}: {fact.note}" if fact.note else ""
        if (old := rows.get(origin)) is None:
            rows[origin] = Row(name, said, "; ".join(filter(None, (site.notes.get(f"{title}.{name}"), note))), fact)
        else:
            rows[origin] = Row(name, f"{old.value}  {said}", "; ".join(filter(None, (old.note, note))), old.fact)
    return sorted(rows.values(), key=lambda row: [name for name, *_ in rows].index(row.key))


def _row(title: str, key: str, fact: Fact) -> Row:
    name, _, variable = key.partition(".")
    if title == "env" and variable:  # names of variables are too long to stand in a column of their own
        said = f"{variable}: {fact.value}" if name == "forbid" else f"{variable}={fact.value}"
        return Row(name, said, fact.note, fact)
    return Row(key, as_words(key, fact.value), fact.note, fact)


def as_words(key: str, value: object) -> str:
    """A value as people read it; its unit stands in its name."""
    name = key.rpartition(".")[2]
    if name.endswith("_time"):
        return time_words(parse_duration_s(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if name in _NO_LIMIT and value == 0:
        return "no limit"
    if isinstance(value, int | float):
        return f"{value:,}"
    return str(value)


def time_words(seconds: float) -> str:
    """`2d`, `12h`, `1h30m`: as one may write it."""
    parts = [(int(seconds) // 86400, "d"), (int(seconds) % 86400 // 3600, "h"), (int(seconds) % 3600 // 60, "m"),
             (int(seconds) % 60, "s")]
    return "".join(f"{n}{unit}" for n, unit in parts if n) or "0s"


# ---- in one line: `?` behind what nobody confirmed ------------------------------------------------------------------------
def gpus_words(site: Site) -> str:
    """`4x H100 64GB`."""
    gpu = site.profile.gpu
    if not gpu.per_node:
        return ""
    memory = "" if "GB" in gpu.model or not gpu.memory_gb else f" {gpu.memory_gb:g}GB"
    return f"{gpu.per_node}x {gpu.model}{memory}{_doubt(site, 'gpu.per_node', 'gpu.model', 'gpu.memory_gb')}"


def limit_words(site: Site) -> str:
    """What the largest usual job may have: `1024 nodes, 2d`."""
    queue = site.profile.queues.train
    known = {f"qos.{queue.qos}": site.profile.qos.get(queue.qos),
             f"partitions.{queue.partition}": site.profile.partitions.get(queue.partition)}

    def least(field: str) -> tuple[float, str]:
        said = {key: value for key, limits in known.items() if limits and (value := getattr(limits, field))}
        return min(said.values(), default=0), _doubt(site, *(f"{key}.{field}" for key in said))

    (nodes, nodes_doubt), (gpus, gpus_doubt), (time_s, time_doubt) = map(least, ("max_nodes", "max_gpus", "max_time"))
    return ", ".join([*([f"{nodes} node{'s' * (nodes > 1)}{nodes_doubt}"] if nodes else
                        [f"{gpus} GPUs{gpus_doubt}"] if gpus else []),
                      *([time_words(time_s) + time_doubt] if time_s else [])])


def net_words(site: Site) -> str:
    """Do GPU nodes reach the internet?"""
    return {True: "yes", False: "no", None: ""}[site.profile.internet.compute] + (
        "?" if site.profile.internet.compute is None else _doubt(site, "internet.compute"))


def bandwidth_words(site: Site) -> str:
    """GB/s from one node to others."""
    speed = site.profile.network.node_gb_s
    return f"{speed:g}{_doubt(site, 'network.node_gb_s')}" if speed else "?"


def data_words(site: Site) -> str:
    """Where data jobs go."""
    queue = site.profile.queues.data
    return queue.partition or (f"qos {queue.qos}" if queue.qos else "?")


def unverified_words(site: Site) -> str:
    """`4 of 89 values are unverified`."""
    total = sum(key.split(".")[0] not in IDENTITY for key in site.facts)
    found = len(site.unverified())
    return f"{found} of {total} values {'is' if found == 1 else 'are'} unverified"


def _doubt(site: Site, *keys: str) -> str:
    return "?" if any(key in site.facts and site.facts[key].grade == "unverified" for key in keys) else ""
