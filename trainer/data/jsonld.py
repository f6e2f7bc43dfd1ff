"""The compact forms of ODRL's JSON-LD: `permission` or `odrl:permission`, {"@id": ...} or text, a list or one value.

Nothing is resolved or expanded over the network: an unknown prefix stays part of the name, which then is none we know.
"""

import json
import re
from typing import Any

NAMESPACE = "http://www.w3.org/ns/odrl/2/"
OWN = "urn:officina:"
"""Our few operands and actions that ODRL has no word for: officina:tokens, officina:epochs, officina:release-weights."""
_IGNORED = {"@id", "@type", "@context", "uid", "type", "target", "assigner", "profile", "conflict", "description"}
_WORDS_FOR_PEOPLE = ("dc:", "dct:", "dcterms:", "rdfs:", "schema:")
_CONDITIONS = frozenset("license licence rights accessRights conditionsOfAccess usageInfo valid available expires".split())
"""Their words for what may be done with the data, and until when."""


def local(name: str) -> str:
    """`odrl:permission`, the full address or `permission` -> `permission`; @keys as they are."""
    for prefix in (NAMESPACE, "odrl:", OWN, "officina:"):
        if name.startswith(prefix):
            return name[len(prefix):]
    return name


def says_nothing(name: str) -> bool:
    """Is this a key that constrains nothing, such as an identifier or a title?"""
    return name in _IGNORED or (name.startswith(_WORDS_FOR_PEOPLE) and name.partition(":")[2] not in _CONDITIONS)


def keys_of(node: Any) -> set[str]:
    """Names of a node's keys that say something."""
    return {name for key in node if not says_nothing(name := local(key))} if isinstance(node, dict) else set()


def get(node: Any, name: str) -> Any:
    """Value of a key, whatever its prefix; None if it is not there."""
    return next((value for key, value in node.items() if local(key) == name), None) if isinstance(node, dict) else None


def as_list(value: Any) -> list[Any]:
    """JSON-LD writes a list of one as its only item, and may wrap one in @list or @set."""
    if value is None:
        return []
    if isinstance(value, dict) and set(value) in ({"@list"}, {"@set"}):
        return as_list(*value.values())
    return value if isinstance(value, list) else [value]


def term(value: Any) -> str:
    """Text of a value, {"@id": ...} or {"@value": ...}; empty for anything else."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("@id", "@value", "id", "uid") if key in value), "")
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def kebab(name: str) -> str:
    """`obtainConsent`, `odrl:obtainConsent` -> `obtain-consent`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", local(name)).replace("_", "-").lower()


def camel(name: str) -> str:
    """`obtain-consent` -> `obtainConsent`, as ODRL writes it."""
    name = {"delete-after": "delete"}.get(name, name)
    head, *rest = name.split("-")
    return head + "".join(part.capitalize() for part in rest)


def shown(value: Any) -> str:
    """A rule in its own words, for people."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def ambiguous(node: Any) -> list[str]:
    """Objects that say one thing twice (`permission` and `odrl:permission`), so that a reader could overlook one."""
    if isinstance(node, list):
        return [found for item in node for found in ambiguous(item)]
    if not isinstance(node, dict):
        return []
    names = [local(key) for key in node]
    here = [f"said twice: {shown(node)}"] if len(names) > len(set(names)) else []
    return here + [found for value in node.values() for found in ambiguous(value)]


def is_plain(value: Any) -> bool:
    """Is it a name and nothing else, such as a refinement?"""
    return not isinstance(value, dict) or set(value) <= {"@id", "id", "uid", "@value", "@type"}


def targets(node: Any) -> set[str]:
    """All assets that the rules name; one that is more than a name, in its own words."""
    if isinstance(node, list):
        return set().union(*map(targets, node))
    if not isinstance(node, dict):
        return set()
    own = {(is_plain(value) and term(value)) or shown(value) for value in as_list(get(node, "target"))}
    return own.union(*(targets(value) for key, value in node.items() if local(key) != "target"))
