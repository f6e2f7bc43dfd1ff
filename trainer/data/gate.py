"""Decides whether a run may use its data: what it declares (`use.*`) against the conditions of every data set.

Pure functions of configuration, policies, registers, histories and a date. Every rule that applies gives one `Finding`, allowed
or not, with the rule in words and what satisfies it; `officina check --explain` and `officina data policy` print them all.
A source is never left out silently, since that would change the mixture. Of data that the weights were trained on before, in
this run or in those it comes from, the rules of release and the licences hold on. Declarations are no proof: this is for
people who want to keep the conditions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from officina.trainer.config import RunConfig, UseConfig
from officina.trainer.data.carried import of_begin, of_branch, of_run, source_of
from officina.trainer.data.licences import Terms, options, share_alike_conflict
from officina.trainer.data.manifest import Dataset, open_dataset
from officina.trainer.data.order import sources_in_use
from officina.trainer.data.policy import ACTIONS, AREAS, Policy, begins, countries, ends, policy_of
from officina.trainer.data.register import Going, Tally, is_limited, over_maximum, tally
from officina.trainer.data.seal import KEY_GIVEN, is_key
from officina.trainer.errors import DataError, Problem

_BROADER = {"academic-research": "research", "scientific-research": "research", "public-research": "research",
            "non-commercial-research": "research"}
"""A purpose that is a kind of another. Commercial research is none: conditions for research often exclude it."""
_DUTIES = {
    "attribute": "`officina data summary RUN` prints the attributions", "inform": "tell the provider of the use",
    "delete-after": "remove the data when the conditions end", "compensate": "settle by the receipt of `officina data summary`",
    "accept-tracking": "the ledger and the receipt are the record", "share-alike": "release under the same licence",
}
_ASK = "the agreement with the provider"


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule, judged."""

    source: str
    """Name of the source in the mixture; several, joined by ' and ', for a conflict between them."""
    allowed: bool
    rule: str
    """What the conditions say, in a sentence without a full stop."""
    answer: str
    """What satisfies it; if nothing does, what would."""
    key: str = ""
    """Configuration key to blame; empty = the source's path."""
    value: object = None


@dataclass(frozen=True, slots=True)
class Judged:
    """A source with its conditions, as the gate sees it."""

    name: str
    policy: Policy
    tally: Tally | None = None
    """For data sets with a maximum of use."""


# ---- a run ---------------------------------------------------------------------------------------------------------
def judge_run(run: RunConfig, going: Going | None = None, now: datetime | None = None) -> list[Finding]:
    """Every finding on the data sets that the run reads from now on, and on those that its weights were trained on before.
    Raises DataError if one cannot be opened."""
    now, going = now or datetime.now(UTC), going or Going()
    read = {name: open_dataset(run.data.sources[name].path) for name in sources_in_use(run.data, going.position)}
    judged = [_judged(run, name, dataset, going, now) for name, dataset in read.items()]
    if going.run_dir is None or not (going.step or going.branch):
        before = of_begin(run)
    else:
        before = (of_branch if going.branch else of_run)(going.run_dir, going.step)
    in_use = {(name, dataset.manifest.fingerprint) for name, dataset in read.items()}  # judged in full, by today's conditions
    weights = {label: known.policy for label, known in before.items() if (source_of(label), known.fingerprint) not in in_use}
    return judge(judged, run.use, "ai-training" if run.model.kind == "custom" else "gen-ai", now, weights)


def _judged(run: RunConfig, name: str, dataset: Dataset, going: Going, now: datetime) -> Judged:
    policy = policy_of(dataset)
    return Judged(name, policy, tally(run, name, dataset, going, now) if is_limited(policy) else None)


def use_problems(run: RunConfig, going: Going | None = None, now: datetime | None = None) -> list[Problem]:
    """What stands against the run's use of its data, for `officina.trainer.validate`."""
    if given := [name for name, source in run.data.sources.items() if is_key(source.key)]:
        return [Problem(f"data.sources.{name}.key", None, KEY_GIVEN, f"data.sources.{name}.key=FILE, with the key in the file")
                for name in given]
    try:
        findings = judge_run(run, going, now)
    except DataError as error:
        text, _, remedy = str(error).rpartition(". ")
        return [Problem("data.sources", None, text, remedy.rstrip(".") or "officina data verify DATASET")]
    told: dict[str, Problem] = {}
    in_use = sources_in_use(run.data, going.position if going else 0)
    for found in findings:
        if not found.allowed:
            last = next((name for name in reversed(found.source.split(" and ")) if name in in_use), "")
            where = (f"data.sources.{last}.path", run.data.sources[last].path) if last else ("init_from", run.init_from)
            key, value = (found.key, found.value) if found.key else where
            rule = f"{found.source}: {found.rule}"
            remedy = f"{found.answer}; or " + (f"leave the source out: '~data.sources.{last}'" if last else
                                               "begin with weights that were not trained on it")
            if (known := told.get(key)) is not None:
                rule, remedy = f"{known.rule}; {rule}", known.remedy
            told[key] = Problem(key, value, rule, remedy)
    return list(told.values())


def explained(findings: list[Finding]) -> list[str]:
    """The plan, a line for each rule: is it kept, by which source it is set, what it says, what satisfies it."""
    return [f"{'kept' if found.allowed else 'NOT KEPT':<8}  {found.source}: {found.rule}. "
            f"{'' if found.allowed else 'To keep it: '}{found.answer}" for found in findings]


def deadline(run: RunConfig, position: int = 0) -> tuple[datetime, str] | None:
    """When the run, which stands at sample `position`, must stop using its data, and which source says so; None = never.
    Independent of today's date."""
    ended: list[tuple[datetime, str]] = []
    for name in sources_in_use(run.data, position):
        dataset = open_dataset(run.data.sources[name].path)
        policy = policy_of(dataset)
        if policy.not_after:
            ended.append((ends(policy.not_after), name))
        if policy.max_days is not None:
            first = tally(run, name, dataset, Going(), datetime.now(UTC)).first
            if first:
                ended.append((datetime.fromisoformat(first) + timedelta(days=policy.max_days), name))
    return min(ended, default=None)


# ---- one source after the other, then the mixture ------------------------------------------------------------------
def judge(sources: list[Judged], use: UseConfig, action: str, now: datetime, weights: Mapping[str, Policy] | None = None
          ) -> list[Finding]:
    """All findings on a mixture. action: what the run does, one of `policy.ACTIONS`; weights: conditions that the weights bring
    with them, by name of the data."""
    found: list[Finding] = []
    chosen: dict[str, list[tuple[Terms, ...]]] = {}
    for source in sources:
        found += _source(source, use, action, now)
        licences, chosen[source.name] = _licences(source, use)
        found += licences
    before = [Judged(name, policy) for name, policy in (weights or {}).items()]
    for source in before:
        found += _release(source.name, source.policy, use)
        if use.weights_derive:
            licences, chosen[source.name] = _licences(source, use)
            found += [replace(each, answer="the weights were trained on it") if each.allowed else each for each in licences]
    return found + _share_alike([*sources, *before], chosen, use)


def _source(source: Judged, use: UseConfig, action: str, now: datetime) -> Iterator[Finding]:
    policy, name = source.policy, source.name
    for text in policy.unknown:
        yield Finding(name, False, f"a rule that officina does not understand refuses every use: {text}",
                      "ask the provider for conditions in known terms, then `officina data describe DATASET --policy FILE`")
    yield from _action(name, policy, action)
    yield from _purpose(name, policy, use)
    yield from _time(name, policy, now)
    yield from _place(name, policy, use)
    yield from _agreement(name, policy, use)
    yield from _personal(name, policy, use)
    if not policy.shows_text:
        yield Finding(name, True, "no text of it may be shown", "none is, in no error, log, sample or `officina data inspect`")
    if source.tally is not None:
        yield from _maximum(name, policy, source.tally, now)
    for duty in policy.duties:
        if duty in _DUTIES:
            yield Finding(name, True, f"duty: {duty}", _DUTIES[duty])
    if policy.forbids:
        yield Finding(name, True, f"the data itself: no {', '.join(policy.forbids)}", "a training run does none of it")


def _action(name: str, policy: Policy, action: str) -> Iterator[Finding]:
    included = ACTIONS[:ACTIONS.index(action) + 1]
    if prohibited := [a for a in policy.not_actions if a in included]:
        yield Finding(name, False, f"prohibits {' and '.join(prohibited)}, and this run is {action}", "other data")
    elif not (permitted := [a for a in policy.actions if a in included]):
        yield Finding(name, False, f"permits {' and '.join(policy.actions) or 'no training at all'}, and this run is {action}",
                      "a permission for it from the provider")
    elif policy.actions != ("use",) or policy.not_actions:
        yield Finding(name, True, f"permits {permitted[0]}", f"this run is {action}")


def _purpose(name: str, policy: Policy, use: UseConfig) -> Iterator[Finding]:
    declared = _declared(use)
    shown = ", ".join(sorted(declared))
    if policy.purpose:
        rule = f"the purpose must be {_one_of(policy.purpose)}"
        if fits := sorted(word for word in policy.purpose if _is_for(use, word)):
            yield Finding(name, True, rule, f"declared: {fits[0]}")
        else:
            word = _purpose_words(policy.purpose[0])
            key = word.partition("=")[0]
            yield Finding(name, False, rule, f"{word} if that is true", key,
                          None if getattr(use, key.removeprefix("use.")) == "" else getattr(use, key.removeprefix("use.")))
    for word in policy.not_purpose:
        rule, (commercial, rest) = f"the purpose must not be {word}", _parts(word)
        decided = (commercial is None or use.commercial is not None) and bool(use.purpose or not rest)
        if commercial is None:
            key, value, answer = "use.purpose", use.purpose or None, "use.purpose=research if that is true"
        else:
            key, value = "use.commercial", use.commercial
            answer = f"use.commercial={str(not commercial).lower()} if that is true"
        if _is_for(use, word):
            yield Finding(name, False, rule, answer, key, value)
        elif not decided:
            yield Finding(name, False, f"{rule}, and none is declared", answer, key, value)
        else:
            yield Finding(name, True, rule, f"declared: {shown}")


def _declared(use: UseConfig) -> set[str]:
    """The run's purposes in one word each."""
    commercial = set() if use.commercial is None else {"commercial" if use.commercial else "non-commercial"}
    return ({use.purpose, _BROADER.get(use.purpose, use.purpose)} | commercial) - {""}


def _parts(word: str) -> tuple[bool | None, str]:
    """`commercial-research` -> (True, research), `non-commercial` -> (False, ""), `research` -> (None, research)."""
    for prefix, commercial in (("non-commercial", False), ("commercial", True)):
        if word == prefix or word.startswith(f"{prefix}-"):
            return commercial, word[len(prefix) + 1:]
    return None, word


def _is_for(use: UseConfig, word: str) -> bool:
    """Is the run's use for that purpose?"""
    commercial, rest = _parts(word)
    return (commercial is None or use.commercial is commercial) and (not rest or bool({word, rest} & _declared(use)))


def _purpose_words(word: str) -> str:
    """What declares a purpose on the command line."""
    commercial, rest = _parts(word)
    said = [f"use.purpose={rest}"] * bool(rest) + [f"use.commercial={str(commercial).lower()}"] * (commercial is not None)
    return " ".join(said)


def _time(name: str, policy: Policy, now: datetime) -> Iterator[Finding]:
    today = now.strftime("%Y-%m-%d")
    renew = "new conditions from the provider: officina data describe DATASET --policy FILE"
    if policy.not_before:
        allowed = now >= begins(policy.not_before)
        yield Finding(name, allowed, f"may be used from {policy.not_before} on", f"today is {today}" if allowed else
                      f"wait until {policy.not_before}")
    if policy.not_after:
        allowed = now < ends(policy.not_after)
        yield Finding(name, allowed, f"may be used until {policy.not_after}", f"today is {today}" if allowed else renew)


def _place(name: str, policy: Policy, use: UseConfig) -> Iterator[Finding]:
    if policy.territory:
        allowed = use.country in countries(policy.territory)
        example = next((area for area in policy.territory if area not in AREAS), sorted(countries(policy.territory))[0])
        yield Finding(name, allowed, f"the site must lie in {_one_of(policy.territory)}", f"declared: {use.country}" if allowed
                      else f"use.country={example} if the site is there", "use.country", use.country or None)
    if policy.recipients:
        known = {recipient.casefold().strip() for recipient in policy.recipients}
        allowed = use.organisation.casefold().strip() in known
        yield Finding(name, allowed, f"only {_one_of(policy.recipients)} may use it", f"declared: {use.organisation}" if allowed
                      else f"use.organisation='{policy.recipients[0]}' if that is you", "use.organisation",
                      use.organisation or None)


def _agreement(name: str, policy: Policy, use: UseConfig) -> Iterator[Finding]:
    asks = []
    if "obtain-consent" in policy.duties:
        asks.append("asks for the provider's consent")
    if policy.competition_pool:
        asks.append(f"belongs to the pool {policy.competition_pool} of competitors")
    for rule in asks:
        yield _asked(name, rule, use)
    yield from _release(name, policy, use)


def _asked(name: str, rule: str, use: UseConfig) -> Finding:
    return Finding(name, bool(use.agreement), rule, f"declared: {use.agreement}" if use.agreement else
                   f"use.agreement=ID, {_ASK}", "use.agreement", use.agreement or None)


def _release(name: str, policy: Policy, use: UseConfig) -> Iterator[Finding]:
    if policy.export == "weights-ask" and use.release is not False:
        yield _asked(name, "lets weights be released by agreement only", use)
    if policy.export == "no":
        rule = "weights trained on it must not be released"
        yield Finding(name, use.release is False, rule, "declared: use.release=false" if use.release is False else
                      "use.release=false if that is true", "use.release", use.release)


def _personal(name: str, policy: Policy, use: UseConfig) -> Iterator[Finding]:
    if policy.personal_data == "none":
        return
    rule = "holds personal data" if policy.personal_data == "present" else "holds pseudonymised personal data"
    yield Finding(name, use.allow_personal, f"{rule}, which must be allowed", "use.allow_personal=true",
                  "use.allow_personal", use.allow_personal)
    yield Finding(name, bool(use.legal_basis), f"{rule}, which needs a legal basis (Article 6(1) GDPR)",
                  f"declared: {use.legal_basis}" if use.legal_basis else
                  "use.legal_basis=public-task if that is it; or consent, contract, legal-obligation, vital-interests, "
                  "legitimate-interests",
                  "use.legal_basis", use.legal_basis or None)


def _maximum(name: str, policy: Policy, used: Tally, now: datetime) -> Iterator[Finding]:
    rows = used.rows + used.planned_rows
    for limit in ("max_runs", "max_tokens", "max_epochs"):
        if getattr(policy, limit) is None:
            continue
        only = replace(Policy(), **{limit: getattr(policy, limit)})
        over = over_maximum(only, used.runs + 1, rows, used.row_tokens, used.split_rows)
        told = {"max_runs": f"number {used.runs + 1} of {policy.max_runs} runs",
                "max_tokens": f"{rows * used.row_tokens:,} of {policy.max_tokens or 0:,} tokens with this run",
                "max_epochs": f"{rows / used.split_rows:.3f} of {policy.max_epochs or 0:g} passes with this run"}[limit]
        yield Finding(name, not over, over or f"has a maximum of use ({limit.replace('_', ' ')})",
                      told if not over else _less(policy, used, limit))
    if policy.max_days is not None:
        end = datetime.fromisoformat(used.first) + timedelta(days=policy.max_days) if used.first else None
        allowed = end is None or now < end
        yield Finding(name, allowed, f"may be used for {policy.max_days} days from the first use"
                      + (f", which was on {used.first[:10]}" if used.first else ""),
                      "new conditions from the provider: officina data describe DATASET --policy FILE" if not allowed else
                      f"until {end:%Y-%m-%d}" if end else "this is the first use")


def _less(policy: Policy, used: Tally, limit: str) -> str:
    if limit == "max_runs":
        return "more runs from the provider"
    most = (policy.max_tokens or 0) // used.row_tokens
    if limit == "max_epochs":
        most = int((policy.max_epochs or 0) * used.split_rows)
    return (f"fewer steps or a smaller weight: {max(0, most - used.rows):,} rows are left for this run, and it plans "
            f"{used.planned_rows:,}")


# ---- licences ------------------------------------------------------------------------------------------------------
def _licences(source: Judged, use: UseConfig) -> tuple[list[Finding], list[tuple[Terms, ...]]]:
    """Findings on a data set's licences, and the choices among them that the declared use may take."""
    if not source.policy.licence:
        return [], [()]
    told = " and ".join(source.policy.licence)
    try:
        sets = options(source.policy.licence)
    except DataError as exc:
        rule, _, answer = str(exc).partition(". ")
        return [Finding(source.name, False, rule, answer)], []
    broken = [list(_broken(chosen, use)) for chosen in sets]
    if all(broken):
        return [Finding(source.name, False, f"licence {told}: {rule}", answer, key, value)
                for rule, key, value, answer in min(broken, key=len)], []
    good = [chosen for chosen, faults in zip(sets, broken, strict=True) if not faults]
    taken = good[0]
    demands = (("not commercial", any(t.non_commercial for t in taken)),
               ("weights are not released, or are no derivative", any(t.no_derivatives for t in taken)),
               ("attributed by `officina data summary`", any(t.attribution for t in taken)),
               ("not judged: no rule for it here", not all(t.known for t in taken)))
    answers = [word for word, asked in demands if asked]
    return [Finding(source.name, True, f"licence {told}", "; ".join(answers) or "asks for nothing")], good


def _broken(chosen: tuple[Terms, ...], use: UseConfig) -> Iterator[tuple[str, str, object, str]]:
    """What of the declared use a set of licences does not allow: rule, key, value, what would satisfy it."""
    for licence in chosen:
        if licence.non_commercial and use.commercial is not False:
            yield f"{licence.name} is for non-commercial use", "use.commercial", use.commercial, \
                "use.commercial=false if that is true"
        if licence.no_derivatives and use.weights_derive and use.release is not False:
            yield (f"{licence.name} allows no derivatives to be released, which weights may be", "use.release", use.release,
                   "use.release=false if that is true, or use.weights_derive=false if your reading is that they are none")


def _share_alike(sources: list[Judged], chosen: dict[str, list[tuple[Terms, ...]]], use: UseConfig) -> list[Finding]:
    if not use.weights_derive or use.release is False:
        return []
    names = share_alike_conflict({name: sets for name, sets in chosen.items() if sets})
    if not names:
        return []
    licences = {source.name: " and ".join(source.policy.licence) for source in sources}
    told = " and ".join(f"{licences[name]} ({name})" for name in names)
    return [Finding(" and ".join(names), False, f"share-alike: no licence of released weights satisfies {told} together",
                    "use.release=false if that is true, or use.weights_derive=false if your reading is that weights are no "
                    "derivative", "use.release", use.release)]


def _one_of(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
