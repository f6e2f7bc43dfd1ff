"""Conditions of use of a data set: policy.json, one flat form of what a licence, an agreement or an ODRL offer says.

Every field narrows what is allowed, an empty one does not; all that are set must hold. What could not be understood
stands in `unknown` and refuses every run, with its own words. `officina.trainer.data.odrl` reads and writes ODRL,
`officina.trainer.data.gate` judges a run. This keeps honest users honest; it is no copy protection.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from officina.trainer.data.jsonld import kebab
from officina.trainer.data.manifest import MANIFEST, Dataset, Manifest, write_whole
from officina.trainer.errors import DataError

POLICY = "policy.json"
Words = tuple[Annotated[str, Field(pattern=r"\S")], ...]
Limit = Annotated[int, Field(ge=0, strict=True)] | None

ACTIONS = ("use", "data-mining", "ai-training", "gen-ai")
"""From the broadest to the narrowest, each includes those after it (ODRL 2.2 and the W3C draft on AI). A decoder's
training is gen-ai, a custom model's is ai-training."""
PERSONAL, EXPORTS = ("none", "pseudonymised", "present"), ("weights-ok", "weights-ask", "no")
"""From the least to the strictest."""
DUTIES = ("attribute", "delete-after", "inform", "compensate", "accept-tracking", "obtain-consent", "share-alike")
EU = frozenset("AT BE BG HR CY CZ DK EE FI FR DE GR HU IE IT LV LT LU MT NL PL PT RO SK SI ES SE".split())
AREAS = {"EU": EU, "EEA": EU | {"IS", "LI", "NO"}, "EFTA": frozenset({"CH", "IS", "LI", "NO"})}
"""Territories of several countries (ISO 3166-1 alpha-2)."""
_ALPHA_3 = dict(zip(
    "AUT BEL BGR HRV CYP CZE DNK EST FIN FRA DEU GRC HUN IRL ITA LVA LTU LUX MLT NLD POL PRT ROU SVK SVN ESP SWE ISL LIE "
    "NOR CHE GBR USA".split(),
    "AT BE BG HR CY CZ DK EE FI FR DE GR HU IE IT LV LT LU MT NL PL PT RO SK SI ES SE IS LI NO CH GB US".split(),
    strict=True))
_NAMES_OF_PURPOSES = {"research-and-development": "research", "noncommercial": "non-commercial",
                      "non-commercial-purpose": "non-commercial", "commercial-purpose": "commercial"}
_DATE, _TIME = re.compile(r"\d{4}-\d\d-\d\d"), re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def country(text: str) -> str | None:
    """ISO 3166-1 alpha-2 code or the name of an area for a code, an area or the address of one; None if it is none."""
    code = re.split(r"[/#:]", text.strip())[-1].upper()
    code = _ALPHA_3.get(code, code)
    return code if code in AREAS or re.fullmatch("[A-Z]{2}", code) else None


def countries(territory: Words) -> frozenset[str]:
    """The countries that a list of countries and areas stands for."""
    return frozenset().union(*(AREAS.get(name, {name}) for name in territory))


def purpose_word(value: str) -> str:
    """A purpose as one lower-case word: `https://w3id.org/dpv#AcademicResearch` -> `academic-research`."""
    word = re.sub(r"\s+", "-", kebab(re.split(r"[/#:]", value.strip())[-1]))
    return _NAMES_OF_PURPOSES.get(word, word)


def _purposes(value: Words) -> Words:
    return tuple(dict.fromkeys(map(purpose_word, value)))


def begins(moment: str) -> datetime:
    """First instant (UTC) of a date `2027-12-31`, or the instant `2027-12-31T12:00:00Z` itself."""
    if _DATE.fullmatch(moment):
        return datetime.combine(date.fromisoformat(moment), datetime.min.time(), UTC)
    return datetime.fromisoformat(moment)


def ends(moment: str) -> datetime:
    """First instant (UTC) after a date, or the instant itself: what is allowed until then is over from it on."""
    return begins(moment) + timedelta(days=1) if _DATE.fullmatch(moment) else begins(moment)


def _moment(value: str) -> str:
    if value:
        if not (_DATE.fullmatch(value) or _TIME.fullmatch(value)):
            raise ValueError("write 2027-12-31, or 2027-12-31T12:00:00Z in UTC")
        begins(value)
    return value


def _territory(value: Words) -> Words:
    for name in value:
        if country(name) != name:
            raise ValueError(f"{name!r} is no ISO 3166-1 alpha-2 code and none of {', '.join(AREAS)}")
    return value


Moment = Annotated[str, AfterValidator(_moment)]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """policy.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    dataset: str = ""
    """Name and version of the data set, for people."""
    odrl: Annotated[str, Field(pattern="^(sha256:[0-9a-f]{64})?$")] = ""
    """Hash of the ODRL document that this was read from; empty if it was written as it is."""
    actions: tuple[Literal[ACTIONS], ...] = ("use",)
    """What is permitted; each includes the narrower ones."""
    not_actions: tuple[Literal[ACTIONS], ...] = ()
    """What is prohibited; each includes the narrower ones."""
    purpose: Annotated[Words, AfterValidator(_purposes)] = ()
    """The run must have one of these; empty = any. `commercial` and `non-commercial` are answered by use.commercial, and so is
    the first part of `commercial-research`."""
    not_purpose: Annotated[Words, AfterValidator(_purposes)] = ()
    not_before: Moment = ""
    """Date or UTC instant from which on."""
    not_after: Moment = ""
    """Last day, or UTC instant of the end."""
    territory: Annotated[Words, AfterValidator(_territory)] = ()
    """The site must lie in one of these countries or areas (EU, EEA, EFTA)."""
    recipients: Words = ()
    """Organisations or projects that may use the data; empty = any."""
    max_runs: Limit = None
    """Runs, over all who share the register of use."""
    max_tokens: Limit = None
    """Tokens read (records of a custom model), over all runs."""
    max_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Passes over a split, over all runs."""
    max_days: Limit = None
    """Days from the first use."""
    personal_data: Literal[PERSONAL] = "none"
    sensitive: bool = False
    """With this, or with personal data present, no text of the data set is ever shown or logged."""
    licence: Words = ()
    """SPDX expressions, all of which apply."""
    attribution: str = ""
    """Whom to name, and how."""
    duties: tuple[Literal[DUTIES], ...] = ()
    export: Literal[EXPORTS] = "weights-ok"
    """May weights trained on the data be released; `weights-ask`: with an agreement (use.agreement)."""
    forbids: Words = ()
    """Prohibitions on the data itself, such as distribute or sell: told, since a training run does none of it."""
    synthetic: bool = False
    """Made by a model."""
    competition_pool: str | None = None
    """Pool of competitors' data: only with an agreement (use.agreement)."""
    unknown: Words = ()
    """Rules that could not be understood, in their own words: each refuses every run."""

    @property
    def shows_text(self) -> bool:
        """May a text of the data set be shown to a person, or stand in an error, log or report?"""
        return self.personal_data != "present" and not self.sensitive

    @property
    def licences(self) -> str:
        """All of `licence` in one expression; empty if none is stated."""
        alone = len(self.licence) == 1
        return " AND ".join(each if alone or " OR " not in each.upper() else f"({each})" for each in self.licence)


_POLICY = TypeAdapter(Policy)


def parse_policy(values: object, where: object) -> Policy:
    """The policy in `values`; DataError names `where`, the field, its value and the rule."""
    try:
        return _POLICY.validate_python(values)
    except ValidationError as exc:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'content'}={e['input']!r}: {e['msg']}" for e in exc.errors())
        raise DataError(f"{where}: no policy ({told}). The fields are: {', '.join(Policy.__dataclass_fields__)}; "
                        "an ODRL offer is read too, if it has @type odrl:Offer, Agreement or Set.") from exc


def both(a: Policy, b: Policy) -> Policy:
    """The conditions of a and of b together: never more is allowed than by either alone.

    Of each field the stricter, or all that both say; what one field cannot say goes to `unknown` with the field's name.
    """
    found, refused = {}, []
    for name, field in Policy.__dataclass_fields__.items():
        x, y = getattr(a, name), getattr(b, name)
        if field.default in (x, y):  # which narrows nothing
            found[name] = y if x == field.default else x
            continue
        found[name] = _STRICTER.get(name, _same)(x, y)
        if found[name] is None:
            told = " and ".join(json.dumps(value, ensure_ascii=False) for value in (x, y))
            refused.append(f"{name}: {told} must both hold, which one field cannot say")
            found[name] = x
    return replace(Policy(**found), unknown=_all_of(found["unknown"], refused))


def _same(x: Any, y: Any) -> Any:
    return x if x == y else None


def _all_of(x: Iterable[str], y: Iterable[str]) -> Words:
    return tuple(dict.fromkeys([*x, *y]))


def _common(x: Words, y: Words) -> Words | None:
    return tuple(word for word in x if word in y) or None


def _common_territory(x: Words, y: Words) -> Words | None:
    common = countries(x) & countries(y)
    return next((each for each in (x, y) if countries(each) == common), tuple(sorted(common))) or None


def _broadest(actions: Words) -> int:
    return min(map(ACTIONS.index, actions), default=len(ACTIONS))


_STRICTER: dict[str, Callable[[Any, Any], Any]] = {
    "actions": lambda x, y: max(x, y, key=_broadest), "purpose": _common, "recipients": _common, "territory": _common_territory,
    "not_before": lambda x, y: max(x, y, key=begins), "not_after": lambda x, y: min(x, y, key=ends),
    "personal_data": lambda x, y: max(x, y, key=PERSONAL.index), "export": lambda x, y: max(x, y, key=EXPORTS.index),
    **dict.fromkeys(("max_runs", "max_tokens", "max_epochs", "max_days"), min),
    **dict.fromkeys(("not_actions", "not_purpose", "licence", "duties", "forbids", "unknown"), _all_of),
}
"""Field -> what two values that narrow it say together; None = one value cannot say it. A field not named: only the same."""


def policy_bytes(policy: Policy) -> bytes:
    """Content of policy.json: the same policy gives the same bytes."""
    return (json.dumps(asdict(policy), indent=1, ensure_ascii=False) + "\n").encode()


def write_policy(folder: Path, policy: Policy) -> str:
    """Write FOLDER/policy.json; returns its sha256, which dataset.json has to name as policy_sha256."""
    content = policy_bytes(policy)
    write_whole(folder / POLICY, content)
    return hashlib.sha256(content).hexdigest()


def place_policy(folder: Path, policy: Policy | None) -> dict[str, str]:
    """Write the policy of a data set that is being built, or remove an older one's; returns the field for dataset.json."""
    (folder / POLICY).unlink(missing_ok=True)
    return {"policy_sha256": write_policy(folder, policy)} if policy is not None else {}


def policy_of(dataset: Dataset) -> Policy:
    """The conditions of a data set: its policy.json, or what dataset.json itself says if it names none.

    Licence and personal data hold if either file says so. Raises DataError if policy.json is not the one that
    dataset.json names.
    """
    manifest, path = dataset.manifest, dataset.folder / POLICY
    if manifest.policy_sha256 is None:
        if path.exists():
            raise DataError(f"{path}: {MANIFEST} does not name this policy, so nobody can tell whether it belongs to the data. "
                            f"Bind it: officina data describe {dataset.folder} --policy {path}, or remove the file.")
        return _of_manifest(Policy(), manifest)
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror}, but {MANIFEST} names a policy. Restore the file from a copy; without its "
                        "conditions the data cannot be used.") from exc
    found = hashlib.sha256(content).hexdigest()
    if found != manifest.policy_sha256:
        raise DataError(f"{path}: sha256 {found}, but {MANIFEST} names {manifest.policy_sha256}. Restore the file from a "
                        f"copy, or bind new conditions: officina data describe {dataset.folder} --policy FILE")
    try:
        values = json.loads(content)
    except ValueError as exc:
        raise DataError(f"{path}: not JSON ({exc}). Restore the file from a copy.") from exc
    return _of_manifest(parse_policy(values, path), manifest)


def _of_manifest(policy: Policy, manifest: Manifest) -> Policy:
    """The policy with what dataset.json says besides it: the stricter of both."""
    said = Policy(licence=(manifest.licence,) if manifest.licence else (), personal_data=manifest.personal_data,
                  sensitive=manifest.sensitive)
    return replace(both(said, policy), dataset=f"{manifest.name} {manifest.version}")
