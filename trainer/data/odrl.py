"""ODRL 2.2 offers, agreements and sets <-> the flat `Policy`.

Reads the compact JSON-LD that data spaces exchange (`permission` or `odrl:permission`, {"@id": ...}, lists or single
values) without resolving anything over the network. Only what is fully understood is taken over: any other operand,
operator, value, action, duty or key goes to `Policy.unknown` in its own words. (The Eclipse connector filters out
constraints that are bound to no function; here they refuse.) Source: https://www.w3.org/TR/odrl-model/, and for AI
the draft profile https://w3c.github.io/odrl/ with data-mining > ai-training > gen-ai.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from officina.trainer.data.jsonld import (
    ambiguous,
    as_list,
    camel,
    get,
    is_plain,
    kebab,
    keys_of,
    local,
    says_nothing,
    shown,
    targets,
    term,
)
from officina.trainer.data.policy import (
    ACTIONS,
    DUTIES,
    Policy,
    begins,
    countries,
    country,
    ends,
    parse_policy,
    purpose_word,
)

ABOUT_THE_DATA = frozenset("distribute sell display present print play lend lease transfer share archive give stream".split())
"""Actions on the data itself, which a training run does not do: prohibited or not, they decide nothing here."""
_NAMES_OF_ACTIONS = {"text-and-data-mining": "data-mining", "train": "ai-training", "machine-learning": "ai-training"}
_NAMES_OF_DUTIES = {"attribution": "attribute", "delete": "delete-after", "obtain-consent": "obtain-consent"}
_OPPOSITE = {"eq": "neq", "isA": "neq", "isAnyOf": "isNoneOf", "isPartOf": "isNoneOf", "neq": "eq", "isNoneOf": "isAnyOf",
             "lt": "gteq", "lteq": "gt", "gt": "lteq", "gteq": "lt"}
_ONE_OF, _NONE_OF = {"eq", "isA", "isAnyOf", "isPartOf"}, {"neq", "isNoneOf"}


@dataclass(slots=True)
class _Draft:
    """What has been understood so far; None = not constrained."""

    values: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def one_of(self, name: str, allowed: list[str], text: str) -> None:
        """Narrow a list: several constraints on it must all hold."""
        before = self.values.get(name)
        if before is not None and name == "territory":
            both = countries(tuple(before)) & countries(tuple(allowed))
        else:
            both = set(allowed) if before is None else set(before) & set(allowed)
        if not both:
            self.unknown.append(f"no value satisfies this together with the other constraints on {name}: {text}")
        self.values[name] = list(dict.fromkeys(allowed)) if before is None else sorted(both)

    def also(self, name: str, more: list[str]) -> None:
        """Add to a list."""
        self.values[name] = list(dict.fromkeys([*self.values.get(name, []), *more]))

    def at_most(self, name: str, limit: float) -> None:
        """Narrow an upper bound."""
        self.values[name] = min(self.values.get(name, limit), limit)


# ---- reading -------------------------------------------------------------------------------------------------------
def is_odrl(document: object) -> bool:
    """Is this an ODRL policy, by its type or its rules?"""
    return isinstance(document, dict) and bool(
        {"permission", "prohibition", "obligation"} & {local(key) for key in document}
        or {local(str(kind)) for kind in as_list(document.get("@type"))} & {"Offer", "Agreement", "Set", "Policy"})


def read_odrl(document: dict[str, Any], base: Policy | None = None) -> Policy:
    """The conditions of an ODRL policy; `base` gives what ODRL does not say (licence, personal data, attribution).

    What `base` says of ODRL's own fields is left aside; `policy.both` joins two policies.

    Several permissions to train must have the same constraints: `Policy` is one conjunction. Prohibitions always
    prevail over permissions, whatever `conflict` says.
    """
    base, draft = base or Policy(), _Draft()
    draft.unknown += ambiguous(document)
    if len(assets := targets(document)) > 1:
        draft.unknown.append(f"rules on several targets, of which one may not be this data set: {', '.join(sorted(assets))}")
    draft.unknown += [f"a target that is more than a name: {asset}" for asset in sorted(assets) if asset.startswith("{")]
    granted: list[str] = []
    first: dict[str, Any] | None = None
    for key, value in document.items():
        name = local(key)
        if name not in {"permission", "prohibition", "obligation", "duty", "assignee"} and not says_nothing(name):
            draft.unknown.append(f"{key}: {shown(value)}")
        if name == "assignee":
            _assignee(draft, value)
        if name in ("obligation", "duty"):
            for rule in as_list(value):
                _duty(draft, rule)
    for rule in _rules(document, "permission"):
        actions = _actions(draft, rule)
        if actions == ["release-weights"]:
            _permission_to_release(draft, rule)
            continue
        if not set(actions) & set(ACTIONS):
            continue  # permits something that is no training, such as display
        trial = _Draft()
        _permission(trial, rule)
        if first is not None and (trial.values, trial.unknown) != first:
            draft.unknown.append(f"a second permission with other constraints, state them as one: {shown(rule)}")
            continue
        if first is None:
            first = (trial.values, trial.unknown)
            _permission(draft, rule)
        granted += [action for action in actions if action in ACTIONS]
    for rule in _rules(document, "prohibition"):
        _prohibition(draft, rule)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in draft.values.items()}
    policy = replace(base, **_EMPTY | values, odrl=f"sha256:{digest}", actions=tuple(dict.fromkeys(granted)),
                     unknown=tuple(dict.fromkeys(draft.unknown)))
    return parse_policy({f.name: getattr(policy, f.name) for f in fields(Policy)}, "the ODRL document")


_EMPTY = {name: Policy.__dataclass_fields__[name].default for name in (
    "not_actions", "purpose", "not_purpose", "not_before", "not_after", "territory", "recipients", "max_runs", "max_tokens",
    "max_epochs", "max_days", "duties", "export", "forbids")}
"""The fields that ODRL decides."""


def _permission(draft: _Draft, rule: dict[str, Any]) -> None:
    for key, value in rule.items():
        name = local(key)
        if name == "constraint":
            for constraint in _constraints(value):
                _constrain(draft, constraint, negated=False)
        elif name == "assignee":
            _assignee(draft, value)
        elif name == "duty":
            for duty in as_list(value):
                _duty(draft, duty)
        elif name != "action" and not says_nothing(name):
            draft.unknown.append(f"{key}: {shown(value)}")


def _permission_to_release(draft: _Draft, rule: dict[str, Any]) -> None:
    rest = keys_of(rule) - {"action"}
    duties = as_list(get(rule, "duty"))
    consent = [kebab(term(get(duty, "action"))) for duty in duties if keys_of(duty) == {"action"}]
    if rest == {"duty"} and consent == ["obtain-consent"] and len(duties) == 1:
        draft.values["export"] = "weights-ask"
    elif rest:
        draft.unknown.append(shown(rule))


def _prohibition(draft: _Draft, rule: dict[str, Any]) -> None:
    """A prohibition under one constraint permits only where the constraint does not hold."""
    actions = _actions(draft, rule)
    constraints = _constraints(get(rule, "constraint"))
    others = keys_of(rule) - {"action", "constraint"}
    trains = [action for action in actions if action in ACTIONS]
    if others or (constraints and (len(constraints) > 1 or not trains or len(trains) < len(actions))):
        draft.unknown.append(f"prohibition: {shown(rule)}")
    elif constraints:
        _constrain(draft, constraints[0], negated=True)
    else:
        draft.also("not_actions", trains)
        if "release-weights" in actions:
            draft.values["export"] = "no"
        if "commercialize" in actions:
            draft.also("not_purpose", ["commercial"])
        draft.also("forbids", [action for action in actions if action in ABOUT_THE_DATA])


def _actions(draft: _Draft, rule: dict[str, Any]) -> list[str]:
    """Names of a rule's actions; what is none that is known is noted."""
    found = []
    for value in as_list(get(rule, "action")):
        name = kebab(term(value)) if is_plain(value) else ""
        name = _NAMES_OF_ACTIONS.get(name, name)
        if name not in {*ACTIONS, *ABOUT_THE_DATA, "release-weights", "commercialize"}:
            draft.unknown.append(f"action {shown(value)} in {shown(rule)}")
        found.append(name)
    if not found:
        draft.unknown.append(f"a rule without action: {shown(rule)}")
    return found


def _assignee(draft: _Draft, value: Any) -> None:
    for party in as_list(value):
        if not is_plain(party) or not term(party):
            draft.unknown.append(f"assignee: {shown(party)}")
            return
    draft.one_of("recipients", [term(party) for party in as_list(value)], f"assignee: {shown(value)}")


def _duty(draft: _Draft, rule: Any) -> None:
    actions = as_list(get(rule, "action") if isinstance(rule, dict) else rule)
    name = kebab(term(actions[0])) if len(actions) == 1 and is_plain(actions[0]) else ""
    name = _NAMES_OF_DUTIES.get(name, name)
    rest = keys_of(rule) - {"action", "constraint"}
    constraints = _constraints(get(rule, "constraint")) if isinstance(rule, dict) else []
    if name not in DUTIES or rest:
        draft.unknown.append(f"duty: {shown(rule)}")
        return
    for constraint in constraints:
        operand, operator = kebab(term(get(constraint, "leftOperand"))), local(term(get(constraint, "operator")))
        if (name, operand) == ("delete-after", "date-time") and operator in ("lt", "lteq"):
            _constrain(draft, constraint, negated=False)  # what must be gone by then cannot be used after it
        else:
            draft.unknown.append(f"duty: {shown(rule)}")
    draft.also("duties", [name])


# ---- constraints ---------------------------------------------------------------------------------------------------
def _constraints(value: Any) -> list[Any]:
    """All constraints of a rule, `and` and lists of one opened."""
    found = []
    for item in as_list(value):
        keys = {local(key): key for key in item} if isinstance(item, dict) else {}
        logical = [name for name in ("and", "andSequence", "or", "xone") if name in keys]
        inner = as_list(item[keys[logical[0]]]) if logical else []
        if logical and (logical[0] == "and" or len(inner) == 1):
            found += _constraints(inner)
        else:
            found.append(item)
    return found


def _constrain(draft: _Draft, constraint: Any, *, negated: bool) -> None:
    text = ("prohibited: " if negated else "") + shown(constraint)
    if not isinstance(constraint, dict) or not keys_of(constraint) <= {"leftOperand", "operator", "rightOperand", "dataType"}:
        draft.unknown.append(text)
        return
    operand = kebab(term(get(constraint, "leftOperand")))
    operator = local(term(get(constraint, "operator")))
    values = [term(value) for value in as_list(get(constraint, "rightOperand"))]
    if negated:
        operator = _OPPOSITE.get(operator, "")
    try:
        understood = bool(values) and all(values) and _take(draft, operand, operator, values, text)
    except (ValueError, OverflowError):
        understood = False
    if not understood:
        draft.unknown.append(text)


def _take(draft: _Draft, operand: str, operator: str, values: list[str], text: str) -> bool:
    """Take a constraint over; False if it is not fully understood. ValueError for a value that is none of its kind."""
    if operator in ("eq", "neq") and len(values) > 1:
        return False
    if operand == "purpose" and operator in _ONE_OF | _NONE_OF:
        words = [purpose_word(value) for value in values]
        if operator in _NONE_OF:
            draft.also("not_purpose", words)
        else:
            draft.one_of("purpose", words, text)
        return True
    if operand == "spatial" and operator in _ONE_OF:
        places = [country(value) for value in values]
        if None in places:
            return False
        draft.one_of("territory", [place for place in places if place], text)
        return True
    if operand == "recipient" and operator in _ONE_OF:
        draft.one_of("recipients", values, text)
        return True
    if len(values) > 1 or operator not in ("lt", "lteq", "gt", "gteq"):
        return False
    if operand == "date-time":
        _take_moment(draft, operator, values[0])
        return True
    if operator in ("gt", "gteq"):
        return False
    below = operator == "lt"
    if operand == "epochs":
        draft.at_most("max_epochs", float(values[0]))
        return not below
    if operand in ("count", "tokens"):
        draft.at_most({"count": "max_runs", "tokens": "max_tokens"}[operand], max(0, int(values[0]) - below))
        return True
    if operand == "elapsed-time" and (match := re.fullmatch(r"P(\d+)([DW])", values[0])):
        draft.at_most("max_days", int(match[1]) * (7 if match[2] == "W" else 1))
        return True
    return False


def _take_moment(draft: _Draft, operator: str, value: str) -> None:
    moment, day = _moment(value)
    step = timedelta(days=1) if day and operator in ("lt", "gt") else timedelta()
    if operator in ("lt", "lteq"):
        new, name, choose, when = _written(moment - step, day), "not_after", min, ends
    else:
        new, name, choose, when = _written(moment + step, day), "not_before", max, begins
    before = draft.values.get(name)
    draft.values[name] = new if before is None else choose(before, new, key=when)


def _moment(value: str) -> tuple[datetime, bool]:
    """A date or time as an instant, and whether it is a date; a time without a zone is UTC."""
    day = bool(re.fullmatch(r"\d{4}-\d\d-\d\d", value))
    found = datetime.fromisoformat(value)
    found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    return found.replace(microsecond=0), day


def _written(moment: datetime, day: bool) -> str:
    return moment.strftime("%Y-%m-%d" if day else "%Y-%m-%dT%H:%M:%SZ")


def _rules(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [rule if isinstance(rule, dict) else {"action": None, "rule": rule} for rule in as_list(get(document, name))]


# ---- writing -------------------------------------------------------------------------------------------------------
def to_odrl(policy: Policy, *, target: str = "", kind: str = "Offer") -> dict[str, Any]:
    """The policy as an ODRL offer in compact JSON-LD with `odrl:` prefixes; `read_odrl` gives the same policy back.

    What could not be understood when the policy was read cannot be written either; the result says so in words.
    """
    rule: dict[str, Any] = {"odrl:action": [{"@id": f"odrl:{action}"} for action in policy.actions]}
    constraints = list(_written_constraints(policy))
    if constraints:
        rule["odrl:constraint"] = constraints
    if policy.duties:
        rule["odrl:duty"] = [{"odrl:action": {"@id": f"odrl:{camel(duty)}"}} for duty in policy.duties]
    offer: dict[str, Any] = {"@type": f"odrl:{kind}"}
    if target:
        offer["odrl:target"] = {"@id": target}
    if policy.actions:
        offer["odrl:permission"] = [rule]
    prohibited = [*policy.not_actions, *policy.forbids]
    prohibitions: list[dict[str, Any]] = [{"odrl:action": {"@id": f"odrl:{action}"}} for action in prohibited]
    if policy.export == "no":
        prohibitions.append({"odrl:action": {"@id": "officina:release-weights"}})
    if policy.export == "weights-ask":
        offer.setdefault("odrl:permission", []).append({
            "odrl:action": {"@id": "officina:release-weights"},
            "odrl:duty": [{"odrl:action": {"@id": "odrl:obtainConsent"}}]})
    if prohibitions:
        offer["odrl:prohibition"] = prohibitions
    if policy.unknown:
        offer["officina:not-understood"] = list(policy.unknown)
    return offer


def _written_constraints(policy: Policy) -> Iterator[dict[str, Any]]:
    def constraint(operand: str, operator: str, value: Any) -> dict[str, Any]:
        name = operand if ":" in operand else f"odrl:{operand}"
        return {"odrl:leftOperand": {"@id": name}, "odrl:operator": {"@id": f"odrl:{operator}"}, "odrl:rightOperand": value}

    for operand, operator, found in (("purpose", "isAnyOf", policy.purpose), ("purpose", "isNoneOf", policy.not_purpose),
                                     ("spatial", "isAnyOf", policy.territory), ("recipient", "isAnyOf", policy.recipients)):
        if found:
            yield constraint(operand, operator, list(found))
    for operator, moment in (("gteq", policy.not_before), ("lteq", policy.not_after)):
        if moment:
            kind = "xsd:dateTime" if "T" in moment else "xsd:date"
            yield constraint("dateTime", operator, {"@value": moment, "@type": kind})
    for operand, limit in (("count", policy.max_runs), ("officina:tokens", policy.max_tokens),
                           ("officina:epochs", policy.max_epochs)):
        if limit is not None:
            yield constraint(operand, "lteq", limit)
    if policy.max_days is not None:
        yield constraint("elapsedTime", "lteq", {"@value": f"P{policy.max_days}D", "@type": "xsd:duration"})
