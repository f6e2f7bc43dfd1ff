"""What the licences of data sets demand of a training run, and which of them contradict each other.

Judged are SPDX identifiers, in the spellings and addresses that catalogues write for them; another name has no rule here, and
its terms belong into policy.json. Whether weights are a derivative of the data they were trained on is not settled in law: the
cautious reading, that they are, is the default and one switch (use.weights_derive). No legal advice.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from officina.trainer.errors import DataError

_PERMISSIVE = ("cc0", "cc-pd", "pddl", "odc-by", "cdla-permissive", "mit", "apache-", "bsd-", "0bsd", "isc", "zlib",
               "unlicense", "psf-", "python-", "bsl-1", "ogl-uk", "etalab", "dl-de-by", "dl-de-zero", "nlod", "wtfpl", "x11",
               "postgresql", "ncsa", "ogc-", "mpl-", "artistic-")
_ATTRIBUTION = re.compile(r"cc-by|odc-by|odbl|apache-|mit|bsd-|isc|psf-|ogl|etalab|dl-de-by|nlod|cdla|[al]?gpl|eupl|mpl")
_ADAPTED_UNDER = {
    "CC-BY-SA-2.0": {"CC-BY-SA-2.0", "CC-BY-SA-2.5", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "GPL-3.0", "AGPL-3.0"},
    "CC-BY-SA-2.5": {"CC-BY-SA-2.5", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "GPL-3.0", "AGPL-3.0"},
    "CC-BY-SA-3.0": {"CC-BY-SA-3.0", "CC-BY-SA-4.0", "GPL-3.0", "AGPL-3.0"},
    "CC-BY-SA-4.0": {"CC-BY-SA-4.0", "GPL-3.0", "AGPL-3.0"},
    "CC-BY-NC-SA-2.0": {"CC-BY-NC-SA-2.0", "CC-BY-NC-SA-2.5", "CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0"},
    "CC-BY-NC-SA-2.5": {"CC-BY-NC-SA-2.5", "CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0"},
    "CC-BY-NC-SA-3.0": {"CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0"},
    "CC-BY-NC-SA-4.0": {"CC-BY-NC-SA-4.0"},
    "GPL-1.0-only": {"GPL-1.0"}, "GPL-1.0-or-later": {"GPL-1.0", "GPL-2.0", "GPL-3.0", "AGPL-3.0"},
    "GPL-2.0-only": {"GPL-2.0"}, "GPL-2.0-or-later": {"GPL-2.0", "GPL-3.0", "AGPL-3.0"},
    "GPL-3.0-only": {"GPL-3.0", "AGPL-3.0"}, "GPL-3.0-or-later": {"GPL-3.0", "AGPL-3.0"},
    "LGPL-2.0-only": {"LGPL-2.0", "GPL-2.0", "GPL-3.0", "AGPL-3.0"},
    "LGPL-2.0-or-later": {"LGPL-2.0", "LGPL-2.1", "LGPL-3.0", "GPL-2.0", "GPL-3.0", "AGPL-3.0"},
    "LGPL-2.1-only": {"LGPL-2.1", "GPL-2.0", "GPL-3.0", "AGPL-3.0"},
    "LGPL-2.1-or-later": {"LGPL-2.1", "LGPL-3.0", "GPL-2.0", "GPL-3.0", "AGPL-3.0"},
    "LGPL-3.0-only": {"LGPL-3.0", "GPL-3.0", "AGPL-3.0"}, "LGPL-3.0-or-later": {"LGPL-3.0", "GPL-3.0", "AGPL-3.0"},
    "AGPL-3.0-only": {"AGPL-3.0"}, "AGPL-3.0-or-later": {"AGPL-3.0"},
    "ODbL-1.0": {"ODbL-1.0"}, "CDLA-Sharing-1.0": {"CDLA-Sharing-1.0"},
    "EUPL-1.2": {"EUPL-1.2", "GPL-2.0", "GPL-3.0", "AGPL-3.0", "CC-BY-SA-3.0"},
}
"""Share-alike licence -> licences that an adaptation may carry, as far as its own text or its steward says: later
versions and Creative Commons' list of compatible licences (BY-SA 4.0 -> GPL 3.0), section 13 of GPL 3.0, section 3 of
LGPL 2, the appendix of EUPL 1.2. Where nothing is said, only the licence itself."""

_SHARE_ALIKE = {name.lower(): targets for name, targets in _ADAPTED_UNDER.items()}
_ADDRESS = re.compile(r"\w[\w+.-]*://\S+|[\w.-]+\.[a-z]{2,}/\S+")
_ADDRESSES = tuple((re.compile(rf"(?:https?://)?(?:www\.)?{pattern}/?(?:[?#].*)?"), identifier) for pattern, identifier in (
    (r"creativecommons\.org/licenses/((?:by|nc|nd|sa)(?:-(?:by|nc|nd|sa))*/\d\.\d(?:/[a-z]{2,3})?)"
     r"(?:/(?:deed|legalcode)[\w.-]*)?", r"cc/\1"),
    (r"creativecommons\.org/publicdomain/zero/(\d\.\d)(?:/(?:deed|legalcode)[\w.-]*)?", r"cc0-\1"),
    (r"creativecommons\.org/publicdomain/mark/(\d\.\d)(?:/deed[\w.-]*)?", r"cc-pdm-\1"),
    (r"gnu\.org/(?:licenses|copyleft)/(?:old-licenses/)?([al]?gpl-\d\.\d)[\w.-]*", r"\1"),
    (r"(?:spdx\.org/licenses|opensource\.org/licenses?|publications\.europa\.eu/resource/authority/licence)/([\w+.-]+?)"
     r"(?:\.(?:html|json|txt))?", r"\1")))
"""What an address must be, in lower case, and the identifier that it stands for."""
_WORDS = (("creative.?commons", "cc"), ("attribution", "by"), ("non.?commercial", "nc"), (r"no.?deriv\w*", "nd"),
          ("share.?alike", "sa"), (r"(?<![a-z])(cc)?by(nc)?(nd|sa)?(?![a-z])", r"\1-by-\2-\3"),
          ("(inter|un)?(national|ported|generic)|(public )?licen[cs]e$", ""))
_CC = re.compile(r"cc[^a-z0-9]*((?:(?:by|nc|nd|sa)[^a-z0-9]*)+)(\d?)[^a-z0-9]?(\d?)(.*)")
_GNU = re.compile(r"([al]?gpl)-?v?(\d)(?:\.(\d))?(\+?)(-with-.+)?")


@dataclass(frozen=True, slots=True)
class Terms:
    """What one licence demands."""

    name: str
    known: bool
    non_commercial: bool = False
    no_derivatives: bool = False
    attribution: bool = False
    adapted_under: frozenset[str] = frozenset()
    """Share-alike: what an adaptation may carry; empty = anything."""


def terms(name: str) -> Terms:
    """The demands of one licence. Raises DataError for an address that stands for none that is known."""
    plain = _identifier(name)
    marks = set(re.findall("[a-z]+", plain))
    share = frozenset(_SHARE_ALIKE.get(plain, {plain} if {"cc", "sa"} <= marks else ()))
    known = (plain in _SHARE_ALIKE or bool(re.fullmatch(r"cc(-(by|nc|nd|sa))+-\d\.\d(-[a-z]{2,3})?", plain))
             or (" " not in name and plain.startswith(_PERMISSIVE)))
    return Terms(name, known, "nc" in marks, "nd" in marks, bool(_ATTRIBUTION.match(plain)), share)


def _identifier(name: str) -> str:
    """The SPDX identifier that a name stands for, in lower case, which SPDX does not heed; other words joined by hyphens."""
    plain = name.strip().lower()
    if _ADDRESS.fullmatch(plain):
        matches = ((address.fullmatch(plain), identifier) for address, identifier in _ADDRESSES)
        found = next((match.expand(identifier) for match, identifier in matches if match), None)
        if found is None:
            raise DataError(f"licence {name} is an address that stands for no licence known here, so that nobody can judge its "
                            "terms. Name the licence: officina data describe DATASET --licence SPDX-IDENTIFIER; or, if it has "
                            "none, LicenseRef-NAME with what it demands in --policy FILE")
        plain = found
    for words, mark in _WORDS:
        plain = re.sub(words, f"-{mark}-", plain)
    plain = re.sub(r"[^a-z0-9.+]+", "-", plain).strip("-")
    if match := _CC.fullmatch(plain):
        version = f"{match[2]}.{match[3] or 0}" if match[2] else ""
        return "-".join(filter(None, ["cc", *re.findall("by|nc|nd|sa", match[1]), version, match[4].strip("-")]))
    if match := _GNU.fullmatch(plain):  # SPDX has withdrawn the identifiers without -only and -or-later
        return f"{match[1]}-{match[2]}.{match[3] or 0}-{'or-later' if match[4] else 'only'}"
    return plain


def choices(expression: str) -> list[tuple[Terms, ...]]:
    """The sets of licences that an SPDX expression lets its user choose among; one set of one for any other text.

    `MIT OR (GPL-3.0-only AND CC-BY-4.0)` -> (MIT), (GPL-3.0-only, CC-BY-4.0). `WITH exception` is left aside.
    """
    words = re.findall(r"\(|\)|[^\s()]+", expression)
    try:
        found, rest = _either(words)
    except (IndexError, ValueError):
        found, rest = [], words
    if rest or not found:
        return [(terms(expression.strip()),)]
    return [tuple(terms(name) for name in names) for names in found]


def _either(words: list[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    found, words = _both(words)
    while words and words[0] == "OR":
        more, words = _both(words[1:])
        found += more
    return found, words


def _both(words: list[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    found, words = _one(words)
    while words and words[0] == "AND":
        more, words = _one(words[1:])
        found = [a + b for a, b in product(found, more)]
    return found, words


def _one(words: list[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    if words[0] == "(":
        found, words = _either(words[1:])
        if words[0] != ")":
            raise ValueError
        return found, words[1:]
    if words[0] in ("AND", "OR", "WITH", ")"):
        raise ValueError
    name, words = words[0], words[1:]
    if words[:1] == ["WITH"]:
        words = words[2:]
    return [(name,)], words


def options(licences: Sequence[str]) -> list[tuple[Terms, ...]]:
    """The sets of licences that the user of a data set under all of these expressions may choose among."""
    return [sum(chosen, ()) for chosen in product(*map(choices, licences))]


def share_alike_conflict(sources: Mapping[str, list[tuple[Terms, ...]]]) -> list[str]:
    """Names of sources that no single licence of an adaptation can satisfy together: of two if there are two such.

    sources: name -> the sets of licences that may be chosen among. Empty if some choice has a licence in common.
    """
    binding: dict[str, list[frozenset[str]]] = {}
    for name, sets in sources.items():
        targets = [_targets(chosen) for chosen in sets]
        if None not in targets:
            binding[name] = [found for found in targets if found is not None]
    if _common(list(binding.values())):
        return []
    for size in (1, 2):
        for names in combinations(binding, size):
            if not _common([binding[name] for name in names]):
                return list(names)
    return list(binding)


def _common(targets: list[list[frozenset[str]]]) -> bool:
    """Is there a choice of one set from each list that leaves a licence in common?"""
    reachable = set(targets[0]) if targets else {frozenset({"any"})}
    for sets in targets[1:]:
        reachable = {a & b for a in reachable for b in sets}
    return any(reachable)


def _targets(chosen: tuple[Terms, ...]) -> frozenset[str] | None:
    """What an adaptation may carry under all of these licences; None = anything."""
    shared = [licence.adapted_under for licence in chosen if licence.adapted_under]
    return frozenset.intersection(*shared) if shared else None
