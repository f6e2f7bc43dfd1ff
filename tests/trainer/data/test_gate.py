"""The gate: a matrix of declarations against conditions, each with its verdict, its words, and a remedy that works."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from data_sets import make_run, write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from officina.trainer.config import CustomModelConfig, PlannedStage, TimelineStage, UseConfig
from officina.trainer.data.gate import Judged, deadline, explained, judge, judge_run, use_problems
from officina.trainer.data.licences import choices, options, share_alike_conflict, terms
from officina.trainer.data.odrl import read_odrl
from officina.trainer.data.order import plan_stages
from officina.trainer.data.policy import ACTIONS, Policy, both, parse_policy, write_policy
from officina.trainer.data.reader import validation_streams
from officina.trainer.data.register import Going, Tally
from officina.trainer.errors import DataError

NOW, NOTHING = datetime(2026, 11, 23, 12, tzinfo=UTC), UseConfig()


def offer(*constraints: tuple[str, str, object], action: object = "gen-ai", **more: object) -> dict:
    rule = {"action": action, "constraint": [dict(zip(("leftOperand", "operator", "rightOperand"), c, strict=True))
                                             for c in constraints]}
    return {"@type": "odrl:Offer", "permission": [rule]} | more


def verdict(policy: Policy, use: UseConfig = NOTHING, action: str = "gen-ai", now: datetime = NOW) -> list:
    return [found for found in judge([Judged("s", policy)], use, action, now) if not found.allowed]


U = UseConfig
MATRIX = [
    # what the conditions say (ODRL or a policy), what the run declares, None or the words of the refusal
    ("nothing", Policy(), U(), None),
    ("any use", offer(action="use"), U(), None),
    ("broader action", offer(action="odrl:data-mining"), U(), None),
    ("full address", offer(action={"@id": "http://www.w3.org/ns/odrl/2/use"}), U(), None),
    ("no permission", {"@type": "odrl:Set", "permission": []}, U(), "permits no training at all"),
    ("only display", offer(action="display"), U(), "permits no training at all"),
    ("unknown action", offer(action="fine-tune"), U(), "does not understand refuses every use: action"),
    ("unknown action beside", offer(action=["use", "teleport"]), U(), 'action "teleport"'),
    ("refined action", offer(action={"@id": "use", "refinement": []}), U(), "does not understand"),
    ("prohibited", offer(action="use", prohibition={"action": "ai-training"}), U(), "prohibits ai-training"),
    ("unknown prohibition", offer(action="use", prohibition={"action": "benchmark"}), U(), 'action "benchmark"'),
    ("prohibited on the data", offer(action="use", prohibition={"action": ["sell", "distribute"]}), U(), None),
    ("purpose undeclared", offer(("purpose", "eq", "research")), U(), "the purpose must be research"),
    ("purpose declared", offer(("purpose", "eq", "research")), U(purpose="research"), None),
    ("purpose narrower", offer(("purpose", "isA", "https://w3id.org/dpv#ResearchAndDevelopment")),
     U(purpose="academic-research"), None),
    ("purpose broader", offer(("purpose", "eq", "academic-research")), U(purpose="research"), "must be academic-research"),
    ("purpose wrong", offer(("purpose", "isAnyOf", ["research", "education"])), U(purpose="product"),
     "must be research or education"),
    ("purpose excluded", offer(("purpose", "isNoneOf", ["military"])), U(purpose="military"), "must not be military"),
    ("purpose excluded, undeclared", offer(("purpose", "neq", "military")), U(), "and none is declared"),
    ("purpose not the excluded", offer(("purpose", "neq", "military")), U(purpose="product"), None),
    ("contradiction", offer(("purpose", "eq", "research"), ("purpose", "eq", "education")), U(purpose="research"),
     "no value satisfies this"),
    ("non-commercial purpose", offer(("purpose", "eq", "nonCommercial")), U(commercial=False), None),
    ("non-commercial, commercial", offer(("purpose", "eq", "non-commercial")), U(commercial=True), "must be non-commercial"),
    ("commercialize", offer(action="use", prohibition={"action": "commercialize"}), U(commercial=True),
     "must not be commercial"),
    ("commercialize undeclared", offer(action="use", prohibition={"action": "commercialize"}), U(), "and none is declared"),
    ("prohibition under a purpose", offer(action="use", prohibition={"action": "use", "constraint": {
        "leftOperand": "purpose", "operator": "eq", "rightOperand": "military"}}), U(purpose="military"),
     "must not be military"),
    ("prohibition outside a country", offer(action="use", prohibition={"action": "use", "constraint": {
        "leftOperand": "spatial", "operator": "neq", "rightOperand": "FI"}}), U(country="SE"), "must lie in FI"),
    ("expired", offer(("dateTime", "lteq", "2026-11-22")), U(), "may be used until 2026-11-22"),
    ("last day", offer(("dateTime", "lteq", "2026-11-23")), U(), None),
    ("before the day", offer(("dateTime", "lt", "2026-11-23")), U(), "may be used until 2026-11-22"),
    ("instant passed", offer(("dateTime", "lt", {"@value": "2026-11-23T12:00:00Z", "@type": "xsd:dateTime"})), U(),
     "until 2026-11-23T12:00:00Z"),
    ("other zone", offer(("dateTime", "lt", "2026-11-23T12:30:00+02:00")), U(), "until 2026-11-23T10:30:00Z"),
    ("earliest of two", offer(("dateTime", "lt", "2030-01-01"), ("dateTime", "lteq", "2026-01-01")), U(), "2026-01-01"),
    ("not yet", offer(("dateTime", "gteq", "2026-12-01")), U(), "from 2026-12-01 on"),
    ("no date", offer(("dateTime", "lteq", "next year")), U(), "does not understand"),
    ("in the EU", offer(("spatial", "isPartOf", "EU")), U(country="FI"), None),
    ("country by authority code", offer(("spatial", "eq", "http://publications.europa.eu/resource/authority/country/FIN")),
     U(country="FI"), None),
    ("outside", offer(("spatial", "eq", "EU")), U(country="NO"), "the site must lie in EU"),
    ("EEA", offer(("spatial", "eq", "EEA")), U(country="NO"), None),
    ("both areas", offer(("spatial", "eq", "EU"), ("spatial", "isAnyOf", ["DE", "NO"])), U(country="NO"), "must lie in DE"),
    ("no country", offer(("spatial", "eq", "EU")), U(), "the site must lie in EU"),
    ("unknown place", offer(("spatial", "eq", "Atlantis")), U(country="FI"), "does not understand"),
    ("outside of", offer(("spatial", "isNoneOf", ["US"])), U(country="FI"), "does not understand"),
    ("recipient", offer(("recipient", "eq", "project_465")), U(organisation="Project_465 "), None),
    ("other recipient", offer(("recipient", "eq", "project_465")), U(organisation="other"), "only project_465 may use it"),
    ("assignee", offer(assignee={"@id": "project_465"}, action="use"), U(), "only project_465 may use it"),
    ("party collection", offer(assignee={"@type": "PartyCollection", "refinement": []}, action="use"), U(), "assignee"),
    ("unknown operand", offer(("industry", "eq", "health")), U(), '"industry"'),
    ("unknown operator", offer(("purpose", "hasPart", "research")), U(purpose="research"), '"hasPart"'),
    ("unknown key", offer(("purpose", "eq", "research")) | {"inheritFrom": "x"}, U(purpose="research"), "inheritFrom"),
    ("unit", {"permission": {"action": "use", "constraint": {"leftOperand": "count", "operator": "lteq", "rightOperand": 2,
                                                             "unit": "x"}}}, U(), '"unit"'),
    ("logical or", offer(action="use") | {"permission": {"action": "use", "constraint": {"or": [
        {"leftOperand": "purpose", "operator": "eq", "rightOperand": "research"},
        {"leftOperand": "spatial", "operator": "eq", "rightOperand": "EU"}]}}}, U(purpose="research", country="FI"), '"or"'),
    ("logical and", {"permission": {"action": "use", "constraint": {"odrl:and": {"@list": [
        {"leftOperand": "purpose", "operator": "eq", "rightOperand": "research"}]}}}}, U(purpose="research"), None),
    ("or of one, as EDC writes", {"odrl:permission": {"odrl:action": {"@id": "use"}, "odrl:constraint": {"odrl:or": {
        "odrl:leftOperand": "purpose", "odrl:operator": {"@id": "odrl:eq"}, "odrl:rightOperand": "research"}}}},
     U(purpose="product"), "must be research"),
    ("two permissions alike", {"permission": [{"action": "use"}, {"action": "gen-ai"}]}, U(), None),
    ("two permissions that differ", {"permission": [{"action": "use"}, {"action": "gen-ai", "constraint": {
        "leftOperand": "spatial", "operator": "eq", "rightOperand": "EU"}}]}, U(country="FI"), "a second permission"),
    ("said twice", {"permission": {"action": "use"}, "prohibition": [], "odrl:prohibition": {"action": "use"}}, U(),
     "said twice"),
    ("two targets", {"permission": [{"action": "use", "target": "a"}], "prohibition": [{"action": "sell", "target": "b"}]},
     U(), "several targets"),
    ("rule without action", {"permission": {"action": "use"}, "prohibition": {}}, U(), "a rule without action"),
    ("known duty", offer(action="use", obligation={"action": "attribute"}), U(), None),
    ("unknown duty", offer(action="use", obligation={"action": "sing"}), U(), "duty"),
    ("consent", offer(action="use", obligation={"action": "obtainConsent"}), U(), "asks for the provider's consent"),
    ("consent given", offer(action="use", obligation={"action": "obtainConsent"}), U(agreement="A-7"), None),
    ("delete by", offer(action="use", obligation={"action": "delete", "constraint": {
        "leftOperand": "dateTime", "operator": "lteq", "rightOperand": "2026-01-01"}}), U(), "until 2026-01-01"),
    ("duty under a condition", offer(action="use", obligation={"action": "inform", "constraint": {
        "leftOperand": "dateTime", "operator": "lteq", "rightOperand": "2026-01-01"}}), U(), "duty"),
    ("delete once it is so late", offer(action="use", obligation={"action": "delete", "constraint": {
        "leftOperand": "dateTime", "operator": "gteq", "rightOperand": "2025-01-01"}}), U(), "duty"),
    ("refined duty", offer(action="use", obligation={"action": {"@id": "odrl:delete", "refinement": [
        {"leftOperand": "dateTime", "operator": "lteq", "rightOperand": "2025-01-01"}]}}), U(), "duty"),
    ("a part of the target", {"permission": {"action": "use", "target": {"@id": "a", "refinement": [
        {"leftOperand": "language", "operator": "eq", "rightOperand": "fi"}]}}}, U(), "a target that is more than a name"),
    ("a list of purposes", offer(("purpose", "isNoneOf", {"@list": ["commercial", "military"]})),
     U(purpose="military", commercial=False), "must not be military"),
    ("a set of purposes", offer(("purpose", "isAnyOf", {"@set": ["research", "education"]})), U(purpose="education"), None),
    ("prohibited for a list", offer(action="use", prohibition={"action": "use", "constraint": {
        "leftOperand": "purpose", "operator": "isAnyOf", "rightOperand": {"@list": ["military"]}}}), U(purpose="military"),
     "must not be military"),
    ("a purpose without a name", offer(("purpose", "isNoneOf", {"label": "military"})), U(purpose="military"), "does not"),
    ("a recipient without a name", offer(("recipient", "isAnyOf", [{"label": "ACME"}])), U(), "does not understand"),
    ("an assignee without a name", offer(action="use", assignee={"@type": "odrl:Party"}), U(), "assignee"),
    ("a list of recipients", offer(("recipient", "isAnyOf", {"@list": ["ACME"]})), U(), "only ACME may use it"),
    ("commercial research", offer(action="use", prohibition={"action": "use", "constraint": {
        "leftOperand": "purpose", "operator": "eq", "rightOperand": "https://w3id.org/dpv#CommercialResearch"}}),
     U(purpose="research", commercial=True), "must not be commercial-research"),
    ("research that is not commercial", Policy(not_purpose=("commercial-research",)), U(purpose="research", commercial=False),
     None),
    ("another commercial purpose", Policy(not_purpose=("commercial-research",)), U(purpose="product", commercial=True), None),
    ("research of which kind", Policy(not_purpose=("commercial-research",)), U(purpose="research"), "and none is declared"),
    ("only non-commercial research", Policy(purpose=("non-commercial-research",)), U(purpose="non-commercial-research",
     commercial=True), "must be non-commercial-research"),
    ("non-commercial research", parse_policy({"purpose": ["NonCommercialResearch"]}, "t"),
     U(purpose="research", commercial=False), None),
    ("written by hand", parse_policy({"not_purpose": ["Commercial"]}, "t"), U(commercial=True), "must not be commercial"),
    ("pool", Policy(competition_pool="telecom"), U(), "belongs to the pool telecom"),
    ("weights stay", Policy(export="no"), U(), "must not be released"),
    ("weights stay, declared", Policy(export="no"), U(release=False), None),
    ("weights by agreement", Policy(export="weights-ask"), U(release=True), "by agreement only"),
    ("weights by agreement, not released", Policy(export="weights-ask"), U(release=False), None),
    ("release prohibited", offer(action="use", prohibition={"action": "officina:release-weights"}), U(release=True),
     "must not be released"),
    ("personal data", Policy(personal_data="present"), U(), "which must be allowed"),
    ("personal data without basis", Policy(personal_data="present"), U(allow_personal=True), "needs a legal basis"),
    ("personal data with basis", Policy(personal_data="present"), U(allow_personal=True, legal_basis="public-task"), None),
    ("pseudonymised", Policy(personal_data="pseudonymised"), U(legal_basis="consent"), "which must be allowed"),
    ("NC undeclared", Policy(licence=("CC-BY-NC-4.0",)), U(), "is for non-commercial use"),
    ("NC commercial", Policy(licence=("CC-BY-NC-SA-4.0",)), U(commercial=True), "is for non-commercial use"),
    ("NC declared", Policy(licence=("CC-BY-NC-4.0",)), U(commercial=False), None),
    ("ND released", Policy(licence=("CC-BY-ND-4.0",)), U(release=True), "no derivatives"),
    ("ND kept", Policy(licence=("CC-BY-ND-4.0",)), U(release=False), None),
    ("ND, weights are none", Policy(licence=("CC-BY-ND-4.0",)), U(release=True, weights_derive=False), None),
    ("choice of licences", Policy(licence=("CC-BY-NC-4.0 OR CC-BY-4.0",)), U(commercial=True), None),
    ("both licences", Policy(licence=("CC-BY-4.0 AND CC-BY-NC-4.0",)), U(commercial=True), "is for non-commercial use"),
    ("licence at an unknown address", Policy(licence=("https://example.org/terms",)), U(), "stands for no licence known here"),
    ("licence of its own", Policy(licence=("Terms of the Finnish Broadcasting Company",)), U(), None),
]


@pytest.mark.parametrize(("conditions", "use", "words"), [case[1:] for case in MATRIX], ids=[case[0] for case in MATRIX])
def test_matrix(conditions: Policy | dict, use: UseConfig, words: str | None) -> None:
    policy = conditions if isinstance(conditions, Policy) else read_odrl(conditions)
    refused = verdict(policy, use)
    if words is None:
        assert not refused, explained(refused)
    else:
        assert any(words in found.rule for found in refused), explained(refused)
        assert all(found.answer for found in refused)


def test_a_condition_without_a_word_is_none() -> None:
    for field in ("purpose", "not_purpose", "recipients", "unknown"):
        with pytest.raises(DataError, match=rf"{field}\.0=' '"):
            parse_policy({field: [" "]}, "policy.json")


def test_the_matrix_is_as_large_as_it_should_be() -> None:
    refused = sum(case[3] is not None for case in MATRIX)
    assert len(MATRIX) >= 60 and refused >= 30 and len(MATRIX) - refused >= 25


def test_a_custom_model_is_no_generative_one() -> None:
    assert verdict(Policy(actions=("gen-ai",)), action="ai-training")[0].rule.startswith("permits gen-ai")
    assert not verdict(Policy(actions=("ai-training",)), action="gen-ai")
    assert not verdict(Policy(not_actions=("gen-ai",)), action="ai-training")
    assert verdict(Policy(not_actions=("gen-ai",)), action="gen-ai")


# ---- properties ----------------------------------------------------------------------------------------------------
words = st.sampled_from(["research", "education", "product", "military", "commercial", "non-commercial"])
policies = st.builds(
    Policy, actions=st.sets(st.sampled_from(ACTIONS), max_size=2).map(tuple),
    purpose=st.lists(words, max_size=2, unique=True).map(tuple),
    not_purpose=st.lists(words, max_size=2, unique=True).map(tuple),
    not_after=st.sampled_from(["", "2026-11-22", "2026-11-23", "2027-01-01", "2026-11-23T12:00:01Z"]),
    territory=st.sampled_from([(), ("EU",), ("EEA", "CH"), ("FI",)]),
    export=st.sampled_from(["weights-ok", "weights-ask", "no"]),
    personal_data=st.sampled_from(["none", "pseudonymised", "present"]),
    licence=st.sampled_from([(), ("MIT",), ("CC-BY-NC-4.0",), ("CC-BY-ND-4.0",), ("CC-BY-SA-4.0",), ("ODbL-1.0",)]))
uses = st.builds(UseConfig, purpose=st.sampled_from(["", "research", "academic-research", "product", "military"]),
                 country=st.sampled_from(["", "FI", "NO", "US"]), commercial=st.sampled_from([None, True, False]),
                 release=st.sampled_from([None, True, False]), allow_personal=st.booleans(),
                 agreement=st.sampled_from(["", "A"]), legal_basis=st.sampled_from(["", "consent"]))


@settings(max_examples=300, deadline=None)
@given(a=policies, b=policies, use=uses)
def test_more_data_never_allows_more(a: Policy, b: Policy, use: UseConfig) -> None:
    """A mixture is refused if any of its sources is."""
    refused = [f for f in judge([Judged("a", a), Judged("b", b)], use, "gen-ai", NOW) if not f.allowed]
    alone = [f for p in (a, b) for f in verdict(p, use)]
    assert len(refused) >= len(alone)


FIELDS = {
    "actions": st.sets(st.sampled_from(ACTIONS), max_size=2).map(tuple), "unknown": st.sampled_from([(), ("x",), ("y",)]),
    "not_actions": st.sets(st.sampled_from(ACTIONS), max_size=2).map(tuple),
    "purpose": st.lists(words, max_size=2, unique=True).map(tuple),
    "not_purpose": st.lists(words, max_size=2, unique=True).map(tuple),
    **dict.fromkeys(("not_before", "not_after"), st.sampled_from(
        ["", "2026-11-22", "2026-11-23", "2026-11-24", "2026-11-23T11:59:59Z", "2026-11-23T12:00:00Z"])),
    "territory": st.sampled_from([(), ("EU",), ("EEA", "CH"), ("FI",), ("NO", "US")]),
    "recipients": st.sampled_from([(), ("Lab",), ("ACME",), ("Lab", "ACME")]), "max_runs": st.sampled_from([None, 0, 1, 2, 3]),
    "max_tokens": st.sampled_from([None, 0, 479, 480, 481]), "max_epochs": st.sampled_from([None, 2.9, 3.0, 3.1]),
    "max_days": st.sampled_from([None, 1, 20, 30]), "personal_data": st.sampled_from(["none", "pseudonymised", "present"]),
    "sensitive": st.booleans(), "export": st.sampled_from(["weights-ok", "weights-ask", "no"]),
    "licence": st.sampled_from([(), ("MIT",), ("CC-BY-NC-4.0",), ("CC-BY-ND-4.0",), ("CC-BY-SA-4.0",), ("ODbL-1.0",)]),
    "duties": st.sampled_from([(), ("obtain-consent",), ("inform",)]), "competition_pool": st.sampled_from([None, "p", "q"])}
"""All that can refuse a use, with values on both sides of what the use below is."""
SEVERAL = {"purpose", "recipients", "competition_pool", "licence"}
"""A use may keep both of two conditions and still be refused: one word that both name is asked for, or licences conflict."""
USED = Tally(runs=1, rows=40, planned_rows=20, row_tokens=8, split_rows=20, first="2026-11-01T00:00:00+00:00")


@settings(max_examples=2000, deadline=None)
@given(field=st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), FIELDS[name], FIELDS[name])),
       use=uses, organisation=st.sampled_from(["", "lab", "ACME"]))
def test_two_conditions_together_allow_no_more_than_either(field: tuple, use: UseConfig, organisation: str) -> None:
    name, *values = field
    use = replace(use, organisation=organisation)

    def refused(policy: Policy) -> bool:
        return any(not found.allowed for found in judge([Judged("s", policy, USED)], use, "gen-ai", NOW))

    a, b = (Policy(**{name: value}) for value in values)
    alone, together = refused(a) or refused(b), both(a, b)
    assert refused(together) >= alone and (refused(together) == alone or name in SEVERAL)
    assert together.shows_text == (a.shows_text and b.shows_text)


@settings(max_examples=300, deadline=None)
@given(policy=policies, use=uses, later=st.integers(0, 1000))
def test_an_end_is_final_and_further_conditions_only_narrow(policy: Policy, use: UseConfig, later: int) -> None:
    if verdict(policy, use, now=NOW):
        end = [f for f in verdict(policy, use, now=NOW) if f.rule.startswith("may be used until")]
        assert not end or verdict(policy, use, now=NOW + timedelta(days=later))
        for more in ({"unknown": ("x",)}, {"not_actions": ("use",)}, {"recipients": ("nobody",)}, {"competition_pool": "p"}):
            assert verdict(replace(policy, **more), use)


@settings(max_examples=200, deadline=None)
@given(policy=policies, use=uses)
def test_the_answers_satisfy_the_rules(policy: Policy, use: UseConfig) -> None:
    """Whatever a declaration can satisfy is satisfied by the words that the refusal gives."""
    policy = replace(policy, actions=("use",), not_after="", not_purpose=())
    for found in verdict(policy, use):
        key, _, value = found.answer.split(" ")[0].rstrip(",;").partition("=")
        assert found.key.startswith("use.") and key == found.key
        plain = {"true": True, "false": False}.get(value, value)
        declared = replace(use, **{key.removeprefix("use."): plain})
        assert found.rule not in [f.rule for f in verdict(policy, declared)]


# ---- licences ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("licences", "conflict"), [
    (["CC-BY-SA-4.0", "CC-BY-SA-3.0"], []), (["CC-BY-SA-4.0", "GPL-3.0-only"], []), (["CC-BY-SA-4.0", "MIT", "CC0-1.0"], []),
    (["CC-BY-SA-4.0", "CC-BY-NC-SA-4.0"], ["0", "1"]), (["MIT", "CC-BY-SA-4.0", "ODbL-1.0"], ["1", "2"]),
    (["GPL-2.0-only", "GPL-3.0-only"], ["0", "1"]), (["GPL-2.0-or-later", "GPL-3.0-only"], []),
    (["CC-BY-SA-4.0", "ODbL-1.0 OR MIT"], []), (["GPL-2.0-only AND GPL-3.0-only"], ["0"]), ([], []),
    (["GPL-2.0-or-later OR CC-BY-SA-4.0", "AGPL-3.0-only OR GPL-2.0-only", "EUPL-1.2"], []),
    (["CDLA-Sharing-1.0", "Some terms of our own"], [])])
def test_share_alike(licences: list[str], conflict: list[str]) -> None:
    assert share_alike_conflict({str(i): options([name]) for i, name in enumerate(licences)}) == conflict


def test_a_share_alike_conflict_is_named_only_if_weights_are_released() -> None:
    mixture = [Judged("wiki", Policy(licence=("CC-BY-SA-4.0",))), Judged("maps", Policy(licence=("ODbL-1.0",)))]
    for use in (U(release=True), U()):
        [refused] = [f for f in judge(mixture, use, "gen-ai", NOW) if not f.allowed]
        assert refused.source == "wiki and maps" and "CC-BY-SA-4.0 (wiki) and ODbL-1.0 (maps)" in refused.rule
    for use in (U(release=False), U(release=True, weights_derive=False)):
        assert all(f.allowed for f in judge(mixture, use, "gen-ai", NOW))


def test_a_choice_that_the_use_excludes_does_not_mend_a_conflict() -> None:
    mixture = [Judged("a", Policy(licence=("CC-BY-NC-4.0 OR GPL-2.0-only",))), Judged("b", Policy(licence=("GPL-3.0-only",)))]
    assert any(not f.allowed for f in judge(mixture, U(commercial=True, release=True), "gen-ai", NOW))
    assert all(f.allowed for f in judge(mixture, U(commercial=False, release=True), "gen-ai", NOW))


def test_several_licences_are_told_as_one_expression() -> None:
    assert Policy(licence=("MIT OR CC0-1.0",)).licences == "MIT OR CC0-1.0" and Policy().licences == ""
    assert Policy(licence=("MIT OR CC0-1.0", "CC-BY-4.0")).licences == "(MIT OR CC0-1.0) AND CC-BY-4.0"


def test_spdx_expressions() -> None:
    names = [[licence.name for licence in chosen] for chosen in choices("MIT OR (GPL-3.0-only WITH x AND CC-BY-4.0)")]
    assert names == [["MIT"], ["GPL-3.0-only", "CC-BY-4.0"]]
    for text in ("Terms (2024", "A B", "AND", "MIT OR", "OR MIT", "()", "WITH x"):
        [[licence]] = choices(text)
        assert licence.name == text and not licence.known
    for text in ("cc-by-nc-4.0", "CC BY-NC 4.0", "for Non Commercial use", "LicenseRef-noncommercial"):
        assert terms(text).non_commercial, text
    assert terms("cc-by-sa-4.0").adapted_under == terms("CC-BY-SA-4.0").adapted_under
    assert terms("CC-BY-NC-ND-4.0").non_commercial and terms("CC-BY-NC-ND-4.0").no_derivatives
    assert terms("CC0-1.0").known and not terms("CC0-1.0").attribution


# ---- runs ----------------------------------------------------------------------------------------------------------
def make_set(folder: Path, policy: Policy | None = None, **about: object) -> Path:
    folder.mkdir()
    if policy:
        about["policy_sha256"] = write_policy(folder, policy)
    write_tokens(folder, {"train": [50, 31, 80], "validation": [20]}, **about)  # 20 rows of 8 tokens
    return folder


def test_problems_of_a_run(tmp_path: Path) -> None:
    a = make_set(tmp_path / "a", Policy(purpose=("research",), territory=("EU",)))
    b = make_set(tmp_path / "b", licence="CC-BY-NC-4.0")
    run = make_run({"a": (a, 1), "b": (b, 1)})
    found = {problem.key: str(problem) for problem in use_problems(run, now=NOW)}
    assert set(found) == {"use.purpose", "use.country", "use.commercial"}
    assert "a: the purpose must be research. Try: use.purpose=research if that is true; or leave the source out: " in \
        found["use.purpose"]
    good = UseConfig(purpose="research", country="IT", commercial=False)
    assert not use_problems(replace(run, use=good), now=NOW)
    assert len(judge_run(replace(run, use=good), now=NOW)) == 3
    both = make_run({"a": (a, 1), "c": (make_set(tmp_path / "c", Policy(purpose=("education",))), 1)})
    [purpose] = [p for p in use_problems(both, now=NOW) if p.key == "use.purpose"]
    assert "a: the purpose must be research; c: the purpose must be education" in purpose.rule
    custom = replace(run, model=CustomModelConfig(factory="a:b", loss="a:b", decoder="a:b"),
                     data=replace(run.data, sources={"g": replace(run.data.sources["a"], path=str(
                         make_set(tmp_path / "g", Policy(actions=("gen-ai",)))))}))
    assert "this run is ai-training" in str(use_problems(custom, now=NOW)[0])


def test_a_policy_that_is_not_the_one_named_refuses(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "a", Policy(purpose=("research",)))
    run = make_run({"a": (folder, 1)})
    write_policy(folder, Policy())
    assert "dataset.json names" in str(use_problems(run)[0])
    (folder / "policy.json").unlink()
    assert "No such file or directory, but dataset.json names a policy" in str(use_problems(run)[0])
    other = make_set(tmp_path / "b")
    write_policy(other, Policy())
    assert "does not name this policy" in str(use_problems(make_run({"b": (other, 1)}))[0])


def test_planned_sources_are_judged_from_the_beginning_and_until_they_have_left(tmp_path: Path) -> None:
    old, new = make_set(tmp_path / "old"), make_set(tmp_path / "new", Policy(not_after="2020-01-01"))
    run = make_run({"old": (old, 1), "new": (new, 1)}, stages=[PlannedStage(from_step=0, weights={"old": 1.0}),
                                                               PlannedStage(from_step=2, weights={"new": 1.0})])
    planned = plan_stages(run, 0, 0)
    last = planned.data.timeline[-1].from_sample
    for found in (run, planned):
        assert "may be used until 2020-01-01" in str(use_problems(found)[0])
    assert deadline(planned) == (datetime(2020, 1, 2, tzinfo=UTC), "new") and set(validation_streams(planned)) == {"old", "new"}
    back = plan_stages(replace(run, data=replace(run.data, stages=[PlannedStage(from_step=0, weights={"new": 1.0}),
                                                                   PlannedStage(from_step=2, weights={"old": 1.0})])), 0, 0)
    assert use_problems(back) and not use_problems(back, Going(position=last)) and deadline(back, last) is None
    assert use_problems(back, Going(position=last - 1)) and deadline(back, last - 1) is not None


def test_sources_that_left_the_mixture_are_not_judged(tmp_path: Path) -> None:
    old = make_set(tmp_path / "old", Policy(not_after="2020-01-01"))
    new = make_set(tmp_path / "new")
    stages = [TimelineStage(from_sample=0, weights={"old": 1.0}), TimelineStage(from_sample=8, weights={"new": 1.0})]
    run = make_run({"old": (old, 1), "new": (new, 1)}, timeline=stages)
    assert not use_problems(run) and deadline(run) is None
    assert set(validation_streams(run)) == {"new"}, "nor read for held-out loss"
    run = make_run({"old": (old, 1), "new": (new, 1)})
    assert "may be used until 2020-01-01" in str(use_problems(run)[0])
    assert deadline(run) == (datetime(2020, 1, 2, tzinfo=UTC), "old")
