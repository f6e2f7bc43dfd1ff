"""What is said about a data set: read by others' validators without an error, and refused by ours where theirs are lenient."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from data_sets import write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from officina.trainer.data import describe as describing
from officina.trainer.data import mldcat
from officina.trainer.data.croissant import CROISSANT, write_croissant
from officina.trainer.data.describe import change, read_policy_file
from officina.trainer.data.manifest import open_dataset, rewrite_manifest
from officina.trainer.data.mldcat import write_mldcat
from officina.trainer.data.odrl import read_odrl, to_odrl
from officina.trainer.data.policy import ACTIONS, DUTIES, Policy, both, parse_policy, policy_of
from officina.trainer.data.shard_writer import write_records
from officina.trainer.data.strict import strict
from officina.trainer.errors import DataError

FULL = Policy(purpose=("research",), not_purpose=("military",), not_after="2027-12-31", territory=("EU", "NO"),
              recipients=("project_465",), max_runs=3, max_tokens=10**12, max_epochs=2.5, max_days=90, duties=("attribute",),
              export="weights-ask", forbids=("sell",), personal_data="pseudonymised", attribution="ACME (2026)")
SAID = {"creators": ["ACME", "Example Lab"], "url": "https://example.org/d", "published": "2026-11-01", "collected": "2025-06",
        "description": "Words of all kinds."}


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "set", {"train": [50, 31], "validation": [20]}, licence="CC-BY-4.0", sources=["web", "books"],
                 languages=["fin_Latn", "und"], provenance={"tool": "officina data build", "include": ["*.txt", "*.md"]},
                 steps=[{"name": "exact-duplicates", "documents_in": 9, "documents_out": 3}])
    change(tmp_path / "set", policy=FULL, **SAID)
    return tmp_path / "set"


# ---- Croissant -----------------------------------------------------------------------------------------------------
def test_mlcroissant_accepts_it_without_an_error_or_a_warning(folder: Path) -> None:
    mlc = pytest.importorskip("mlcroissant")
    logging.getLogger("absl").setLevel(logging.ERROR)
    found = mlc.Dataset(jsonld=str(folder / CROISSANT)).metadata
    assert not found.ctx.issues.errors and not found.ctx.issues.warnings
    again = found.to_json()
    assert again["usageInfo"]["odrl:permission"] and again["prov:wasGeneratedBy"] and again["conformsTo"][0].endswith("/1.1")
    assert {item.id for item in found.file_objects} == {"shards.jsonl", "stats.json", "policy.json"}
    assert [c.name for c in found.creators] == SAID["creators"] and found.license == ["https://spdx.org/licenses/CC-BY-4.0.html"]


def test_mlcroissant_accepts_what_says_almost_nothing(tmp_path: Path) -> None:
    mlc = pytest.importorskip("mlcroissant")
    write_records(tmp_path / "set", [b"a", b"bc"], name="records")
    assert not mlc.Dataset(jsonld=str(tmp_path / "set" / CROISSANT)).metadata.ctx.issues.errors


def test_it_is_the_same_each_time_and_names_no_place(folder: Path) -> None:
    before = (folder / CROISSANT).read_bytes()
    moved = folder.rename(folder.with_name("moved"))
    assert write_croissant(moved).read_bytes() == before and str(folder.parent).encode() not in before


def test_shards_are_not_listed_one_by_one(tmp_path: Path) -> None:
    write_tokens(tmp_path / "set", {"train": [40] * 60}, shard_bytes=200, licence="MIT")
    document = json.loads(write_croissant(tmp_path / "set").read_text())
    assert len(open_dataset(tmp_path / "set").shards) > 20 and len(document["distribution"]) <= 5


# ---- the strict validator ------------------------------------------------------------------------------------------
def test_a_sound_description(folder: Path) -> None:
    assert strict(open_dataset(folder)).faults == [] and strict(open_dataset(folder)).missing == []
    change(folder, published="", creators=[])
    assert strict(open_dataset(folder)).missing == ["creators", "published"]


def rewritten(**changes: object):
    def apply(folder: Path) -> None:
        document = json.loads((folder / CROISSANT).read_text()) | changes
        (folder / CROISSANT).write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    return apply


def usage(**changes: object):
    def apply(folder: Path) -> None:
        document = json.loads((folder / CROISSANT).read_text())
        document["usageInfo"] |= changes
        (folder / CROISSANT).write_text(json.dumps(document))
    return apply


def files(index: int, **changes: object):
    def apply(folder: Path) -> None:
        document = json.loads((folder / CROISSANT).read_text())
        document["distribution"][index] |= changes
        (folder / CROISSANT).write_text(json.dumps(document))
    return apply


def many_files(folder: Path) -> None:
    document = json.loads((folder / CROISSANT).read_text())
    document["distribution"] += [document["distribution"][0]] * 20
    (folder / CROISSANT).write_text(json.dumps(document))


ADMIRE = {"odrl:permission": {"odrl:action": "odrl:admire"}}
FAULTS = [
    ("no licence", lambda f: change(f, licence=""), "no licence is stated"),
    ("nonsense policy", lambda f: change(f, policy=read_odrl({"permission": {"action": "admire"}})), "are not understood"),
    ("never", lambda f: change(f, policy=replace(FULL, not_before="2028-01-01")), "which is never"),
    ("other policy", lambda f: (f / "policy.json").write_text("{}"), "but dataset.json names"),
    ("no croissant", lambda f: (f / CROISSANT).unlink(), "missing. Write it anew: officina data export"),
    ("no JSON", lambda f: (f / CROISSANT).write_text("{"), "not JSON"),
    ("a list", lambda f: (f / CROISSANT).write_text("[]"), "holds no object"),
    ("other version", rewritten(conformsTo="http://mlcommons.org/croissant/1.0"), "does not name http://mlcommons.org/croissant/1.1"),
    ("no name", rewritten(name=""), "name='', but dataset.json says"),
    ("personal data denied", rewritten(**{"rai:personalSensitiveInformation": ["None."]}), "but the conditions of use say"),
    ("other languages", rewritten(inLanguage=["xyz"]), "inLanguage=['xyz'], but dataset.json says"),
    ("other creator", rewritten(creator=None), "creator=None, but dataset.json says"),
    ("deep", lambda f: (f / CROISSANT).write_text("[" * 100_000), "not JSON (maximum recursion depth"),
    ("licence gone", rewritten(license=None), "license=None, but the conditions"),
    ("other licence", rewritten(license="https://spdx.org/licenses/MIT.html"), "but the conditions of use say"),
    ("no usage", rewritten(usageInfo=None), "usageInfo=None is no odrl:Offer"),
    ("usage in words", rewritten(usageInfo="Be good"), "usageInfo='Be good' is no odrl:Offer"),
    ("nonsense action", usage(**ADMIRE), "usageInfo has a rule that is not understood"),
    ("more is permitted", usage(**{"odrl:permission": {"odrl:action": "odrl:use"}}), "usageInfo says purpose=()"),
    ("wrong hash", files(0, sha256="0" * 64), "says sha256 " + "0" * 64 + " of shards.jsonl"),
    ("file gone", files(1, contentUrl="gone.json"), "lists gone.json, which is not there"),
    ("leaves the folder", files(1, contentUrl="../other"), "leaves the data set's folder"),
    ("absolute", files(1, contentUrl="/etc/passwd"), "leaves the data set's folder"),
    ("no files", rewritten(distribution=[]), "lists no file with its sha256"),
    ("too many files", many_files, "at most 20 make sense"),
]


@pytest.mark.parametrize(("spoil", "told"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_what_is_refused(folder: Path, spoil, told: str) -> None:
    spoil(folder)
    faults = strict(open_dataset(folder)).faults
    assert any(told in fault for fault in faults), faults


def test_mlcroissant_lets_pass_what_ours_refuses(folder: Path) -> None:
    """The reason for a validator of our own; if this fails, ours may become smaller."""
    mlc = pytest.importorskip("mlcroissant")
    for spoil in (rewritten(license=None), usage(**ADMIRE), files(0, sha256="0" * 64)):
        write_croissant(folder)
        spoil(folder)
        assert not mlc.Dataset(jsonld=str(folder / CROISSANT)).metadata.ctx.issues.errors
        assert strict(open_dataset(folder)).faults


# ---- MLDCAT-AP -----------------------------------------------------------------------------------------------------
def conforms(path: Path) -> tuple[bool, str]:
    pyshacl, rdflib = pytest.importorskip("pyshacl"), pytest.importorskip("rdflib")
    data = rdflib.Graph().parse(path, format="json-ld")
    shapes = rdflib.Graph().parse(Path(__file__).with_name("mldcat_shapes.ttl"))
    ok, _, text = pyshacl.validate(data, shacl_graph=shapes)
    targets = {str(kind) for kind in data.objects(None, rdflib.RDF.type)}
    assert {f"http://www.w3.org/ns/dcat#{name}" for name in ("Dataset", "Distribution")} <= targets, "shapes without a target"
    return ok, text


def test_mldcat_is_valid_under_its_shapes(folder: Path) -> None:
    path = write_mldcat(folder)
    ok, text = conforms(path)
    assert ok, text
    document = json.loads(path.read_text())
    assert len(document["dcat:distribution"]) == 2 and "RESTRICTED" in str(document["dct:accessRights"])
    assert document["dct:language"] == [{"@id": "http://publications.europa.eu/resource/authority/language/FIN",
                                         "@type": "dct:LinguisticSystem"}]
    assert read_odrl(document["dcat:distribution"][0]["odrl:hasPolicy"], FULL).not_after == "2027-12-31"


def test_mldcat_of_open_data(tmp_path: Path) -> None:
    write_tokens(tmp_path / "set", {"train": [9]}, licence="Terms of ACME", description="d", url="https://example.org",
                 collected="2024")
    path = write_mldcat(tmp_path / "set", tmp_path / "out.jsonld")
    assert conforms(path)[0] and "PUBLIC" in path.read_text() and "Terms of ACME" in path.read_text()
    with pytest.raises(DataError, match=r"--out FILE"):
        write_mldcat(tmp_path / "set", tmp_path / "nowhere" / "out.jsonld")


@pytest.mark.parametrize("lost", ["it6:collectionDate", "dct:title", "dct:description"])
def test_the_shapes_can_fail(folder: Path, lost: str) -> None:
    path = write_mldcat(folder)
    document = json.loads(path.read_text())
    del document[lost]
    path.write_text(json.dumps(document))
    assert not conforms(path)[0]


def test_mldcat_asks_for_what_is_mandatory(tmp_path: Path) -> None:
    write_tokens(tmp_path / "set", {"train": [9]}, licence="MIT", url="https://example.org")
    with pytest.raises(DataError, match=r"asks for --description, --collected, .*officina data describe .* --description V"):
        mldcat.write_mldcat(tmp_path / "set")


# ---- ODRL and policy files -----------------------------------------------------------------------------------------
names = st.lists(st.sampled_from(["research", "education", "military", "commercial"]), max_size=3, unique=True).map(tuple)
moments = st.sampled_from(["", "2027-12-31", "2024-02-29", "2026-01-01T00:00:00Z", "2030-12-31T23:59:59Z"])
policies = st.builds(
    Policy, actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=2, unique=True).map(tuple),
    not_actions=st.lists(st.sampled_from(ACTIONS), max_size=2, unique=True).map(tuple), purpose=names, not_purpose=names,
    not_before=moments, not_after=moments,
    territory=st.lists(st.sampled_from(["EU", "FI", "CH"]), max_size=2, unique=True).map(tuple),
    recipients=st.lists(st.sampled_from(["a", "B c"]), max_size=2, unique=True).map(tuple),
    max_runs=st.none() | st.integers(0, 10**6), max_tokens=st.none() | st.integers(0, 10**15),
    max_epochs=st.none() | st.floats(0, 100), max_days=st.none() | st.integers(0, 10**4),
    duties=st.lists(st.sampled_from(DUTIES), max_size=3, unique=True).map(tuple),
    export=st.sampled_from(["weights-ok", "weights-ask", "no"]),
    forbids=st.lists(st.sampled_from(["sell", "distribute"]), max_size=2, unique=True).map(tuple),
    personal_data=st.sampled_from(["none", "present"]), licence=st.sampled_from([(), ("MIT",)]), synthetic=st.booleans())


@settings(max_examples=500, deadline=None)
@given(policy=policies)
def test_odrl_says_the_same(policy: Policy) -> None:
    """Written, sent as JSON and read again: the same conditions."""
    assert replace(read_odrl(json.loads(json.dumps(to_odrl(policy))), policy), odrl="") == policy


junk = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) |
                    st.dictionaries(st.sampled_from(["permission", "prohibition", "odrl:action", "constraint", "leftOperand",
                                                     "operator", "rightOperand", "@id", "@value", "duty", "and", "x"]), x,
                                    max_size=4), max_leaves=25)


@settings(max_examples=500, deadline=None)
@given(document=st.dictionaries(st.sampled_from(["permission", "prohibition", "obligation", "assignee", "x"]), junk))
def test_no_document_is_too_strange(document: dict) -> None:
    """Whatever stands in it is understood or refused, never an exception of ours."""
    policy = read_odrl(document)
    assert policy.unknown or policy == replace(read_odrl(json.loads(json.dumps(document))), odrl=policy.odrl)


def test_an_unwritten_rule_is_told(tmp_path: Path) -> None:
    assert to_odrl(Policy(unknown=("x",)))["officina:not-understood"] == ["x"]


@pytest.mark.parametrize(("content", "told"), [
    (None, "No such file or directory"), ("{", "not JSON"), ('{"purpos": ["research"]}', "purpos"), ("[]", "no policy"),
    ('{"not_after": "31.12.2027"}', "write 2027-12-31, or 2027-12-31T12:00:00Z in UTC"),
    ('{"not_after": "2027-02-30"}', "not_after='2027-02-30'"),
    ('{"territory": ["Europe"]}', "'Europe' is no ISO 3166-1 alpha-2 code and none of EU, EEA, EFTA"),
    ("[" * 100_000, "not JSON (maximum recursion depth"),
    ('{"permission": ' + "[" * 900 + "]" * 900 + "}", "nested too deeply"),
    ('{"max_runs": -1}', "max_runs=-1"), ('{"actions": ["fly"]}', "actions.0='fly'"), ('{"max_epochs": "many"}', "max_epochs")])
def test_policy_files_that_are_none(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    with pytest.raises(DataError) as error:
        read_policy_file(tmp_path / "p.json")
    assert told in str(error.value) and "p.json" in str(error.value)


def test_policy_files(folder: Path, tmp_path: Path) -> None:
    offer = {"@context": "http://www.w3.org/ns/odrl.jsonld", "@type": "Offer", "permission": [{"action": "use", "constraint": [
        {"leftOperand": "purpose", "operator": "eq", "rightOperand": "research"}]}]}
    (tmp_path / "offer.json").write_text(json.dumps(offer))
    assert read_policy_file(tmp_path / "offer.json").purpose == ("research",)
    (tmp_path / "both.json").write_text(json.dumps({"odrl": offer, "licence": ["MIT"], "export": "no"}))
    said = read_policy_file(tmp_path / "both.json")
    assert (said.licence, said.purpose, said.export) == (("MIT",), ("research",), "no") and said.odrl.startswith("sha256:")
    change(folder, policy=said)
    again = policy_of(open_dataset(folder))
    assert again.licence == ("CC-BY-4.0", "MIT") and again.dataset == "set 1.0.0"
    assert parse_policy({"purpose": ["a"]}, "here").purpose == ("a",)


OFFER = {"@type": "Offer", "permission": [{"action": "data-mining", "constraint": [
    {"leftOperand": "purpose", "operator": "isAnyOf", "rightOperand": ["research", "education"]},
    {"leftOperand": "spatial", "operator": "eq", "rightOperand": "EU"},
    {"leftOperand": "dateTime", "operator": "gteq", "rightOperand": "2026-01-01"},
    {"leftOperand": "dateTime", "operator": "lteq", "rightOperand": "2027-12-31"},
    {"leftOperand": "count", "operator": "lteq", "rightOperand": 3}], "duty": [{"action": "inform"}]}],
    "prohibition": [{"action": "sell"}], "assignee": "ACME"}
BESIDE = [  # a field beside the offer, and what both say
    ("actions", ["ai-training"], ("ai-training",)), ("actions", ["use"], ("data-mining",)), ("actions", [], ()),
    ("not_actions", ["gen-ai"], ("gen-ai",)), ("purpose", ["education", "product"], ("education",)),
    ("not_purpose", ["military"], ("military",)), ("not_before", "2026-07-01", "2026-07-01"),
    ("not_before", "2025-07-01", "2026-01-01"), ("not_after", "2026-12-31", "2026-12-31"),
    ("not_after", "2028-12-31", "2027-12-31"), ("territory", ["FI", "NO"], ("FI",)), ("territory", ["EEA"], ("EU",)),
    ("recipients", ["Lab", "ACME"], ("ACME",)), ("max_runs", 1, 1), ("max_runs", 0, 0), ("max_runs", 9, 3),
    ("max_tokens", 5, 5), ("max_epochs", 0.5, 0.5), ("max_days", 7, 7), ("personal_data", "present", "present"),
    ("sensitive", True, True), ("licence", ["MIT"], ("MIT",)), ("attribution", "ACME", "ACME"),
    ("duties", ["attribute"], ("inform", "attribute")), ("export", "no", "no"), ("export", "weights-ask", "weights-ask"),
    ("forbids", ["share"], ("sell", "share")), ("synthetic", True, True), ("competition_pool", "p", "p"),
    ("unknown", ["x"], ("x",))]


@pytest.mark.parametrize(("name", "value", "held"), BESIDE)
def test_an_offer_and_a_field_beside_it_both_hold(tmp_path: Path, name: str, value: object, held: object) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"odrl": OFFER, name: value}))
    found = read_policy_file(tmp_path / "p.json")
    assert found == replace(read_odrl(OFFER), **{name: held})


def test_every_field_is_joined_in_a_test() -> None:
    assert {name for name, _, _ in BESIDE} == set(Policy.__dataclass_fields__) - {"dataset", "odrl"}


@pytest.mark.parametrize(("name", "value"), [("purpose", ["product"]), ("territory", ["NO"]), ("recipients", ["Lab"])])
def test_what_one_field_cannot_say_refuses_by_its_name(tmp_path: Path, name: str, value: list[str]) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"odrl": OFFER, name: value}))
    [told] = read_policy_file(tmp_path / "p.json").unknown
    assert told.startswith(f"{name}: [") and f'and ["{value[0]}"] must both hold, which one field cannot say' in told


def test_other_words_for_one_field_refuse_by_its_name() -> None:
    pools = [Policy(competition_pool=name, attribution="ACME") for name in ("a", "b")]
    assert both(*pools).unknown == ('competition_pool: "a" and "b" must both hold, which one field cannot say',)
    assert both(pools[0], pools[0]) == pools[0]


def test_what_is_said_can_change_but_not_what_is_there(folder: Path) -> None:
    before = open_dataset(folder).manifest
    after = change(folder, licence="CC0-1.0", version="1.1.0")
    assert (after.fingerprint, after.licence, after.version) == (before.fingerprint, "CC0-1.0", "1.1.0")
    assert strict(open_dataset(folder)).faults == []
    with pytest.raises(DataError, match="personal_data cannot be changed without building the data set again"):
        change(folder, personal_data="none")
    with pytest.raises(DataError, match=r"version='one'.*officina data describe --help"):
        change(folder, version="one")
    with pytest.raises(DataError, match="is no data set"):
        change(folder.parent)
    for name, value, told in (("published", "01.02.2026", "date. Try: --published 2026-11-23"),
                              ("published", "2026-02-30", "date"), ("collected", "2025-13", "date. Try: --collected 2025-06"),
                              ("collected", "25", "date"), ("url", "a.org/b", "address"),
                              ("url", "our wiki", "address. Try: --url https://example.org/data")):
        with pytest.raises(DataError, match=f"--{name} {value}: is no {told}"):
            change(folder, **{name: value})
    with pytest.raises(DataError, match="--creator: is empty"):
        change(folder, creators=["Lab", " "])
    for value in ("2025", "2025-12", "2024-02-29", ""):
        assert change(folder, collected=value, url="", creators=[]).collected == value


@pytest.mark.parametrize("key", ["dct:license", "dct:accessRights", "schema:expires", "dcterms:valid"])
def test_conditions_in_the_words_of_catalogues_refuse(key: str) -> None:
    offer = {"@type": "Offer", "permission": [{"action": "use"}], "dct:title": "An offer"}
    assert read_odrl(offer).unknown == ()
    assert read_odrl(offer | {key: "x"}).unknown == (f'{key}: "x"',)
    assert read_odrl(offer | {"permission": [{"action": "use", key: "x"}]}).unknown == (f'{key}: "x"',)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_change_that_is_refused_changes_nothing(folder: Path) -> None:
    before = content(folder)
    with pytest.raises(DataError, match=r"version='2\.0'"):
        change(folder, policy=Policy(export="no"), version="2.0")
    assert content(folder) == before and policy_of(open_dataset(folder)).max_runs == 3
    (folder / "policy.json").write_text("{}")
    before = content(folder)
    with pytest.raises(DataError, match=r"but dataset\.json names .* officina data describe"):
        change(folder, url="https://example.org/other")
    assert content(folder) == before


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("killed_in", ["write_policy", "rewrite_manifest", "write_croissant"])
def test_a_change_that_was_killed_is_made_by_the_same_words(folder: Path, monkeypatch, killed_in: str, first: bool) -> None:
    """first: the data set had no policy. Until then it is as it was, or no use is judged."""
    if first:
        (folder / "policy.json").unlink()
        rewrite_manifest(folder, replace(open_dataset(folder).manifest, policy_sha256=None))
    before = policy_of(open_dataset(folder))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(describing, killed_in, killed)
        change(folder, policy=Policy(export="no"), version="2.0.0")
    try:
        assert policy_of(open_dataset(folder)) == before or killed_in == "write_croissant"
    except DataError:
        assert killed_in == "rewrite_manifest"
    change(folder, policy=Policy(export="no"), version="2.0.0")
    assert policy_of(open_dataset(folder)).export == "no" and strict(open_dataset(folder)).faults == []


@pytest.mark.parametrize(("about", "policy", "shown"), [
    ({}, Policy(), True), ({"personal_data": "pseudonymised"}, Policy(personal_data="pseudonymised"), True),
    ({"personal_data": "present"}, Policy(), False), ({"sensitive": True}, Policy(), False),
    ({}, Policy(personal_data="present"), False), ({}, Policy(sensitive=True), False),
    ({"personal_data": "pseudonymised"}, Policy(sensitive=True), False)])
def test_text_is_shown_only_if_both_files_allow_it(tmp_path: Path, about: dict, policy: Policy, shown: bool) -> None:
    write_tokens(tmp_path / "set", {"train": [9]}, **about)
    change(tmp_path / "set", policy=policy)
    assert policy_of(open_dataset(tmp_path / "set")).shows_text is shown


def test_the_stricter_of_policy_and_manifest_holds(tmp_path: Path) -> None:
    write_tokens(tmp_path / "set", {"train": [9]}, licence="MIT", personal_data="present", sensitive=True)
    change(tmp_path / "set", policy=Policy(licence=("CC-BY-NC-4.0",)))
    policy = policy_of(open_dataset(tmp_path / "set"))
    assert (policy.personal_data, policy.sensitive, policy.licence) == ("present", True, ("MIT", "CC-BY-NC-4.0"))
    assert not policy.shows_text
    (tmp_path / "set" / "policy.json").write_text("{")
    with pytest.raises(DataError, match="but dataset.json names"):
        policy_of(open_dataset(tmp_path / "set"))
