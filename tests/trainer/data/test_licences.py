"""Licences in every spelling that catalogues use: identifiers, old and new, addresses, and words."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from data_sets import make_run, write_tokens

from officina.trainer.config import UseConfig
from officina.trainer.data.gate import Judged, explained, judge, use_problems
from officina.trainer.data.licences import options, share_alike_conflict, terms
from officina.trainer.data.policy import Policy
from officina.trainer.errors import DataError

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
CC = "https://creativecommons.org"
SPELLINGS = [
    (f"{CC}/licenses/by-nc/4.0/", "CC-BY-NC-4.0"), (f"{CC}/licenses/by-nd/4.0/", "CC-BY-ND-4.0"),
    (f"{CC}/licenses/by-sa/4.0/", "CC-BY-SA-4.0"), (f"{CC}/licenses/by/4.0/deed.en", "CC-BY-4.0"),
    ("http://www.creativecommons.org/licenses/by-nc-sa/3.0/legalcode", "CC-BY-NC-SA-3.0"),
    ("creativecommons.org/licenses/by-nc-nd/4.0/?ref=chooser-v1", "CC-BY-NC-ND-4.0"),
    (f"{CC}/licenses/by-sa/3.0/de/legalcode", "CC-BY-SA-3.0-DE"), (f"{CC}/licenses/by-nc/3.0/igo", "CC-BY-NC-3.0-IGO"),
    (f"{CC}/publicdomain/zero/1.0/legalcode.fi", "CC0-1.0"), (f"{CC}/publicdomain/mark/1.0/", "CC-PDM-1.0"),
    ("https://spdx.org/licenses/CC-BY-NC-4.0.html", "CC-BY-NC-4.0"), ("http://spdx.org/licenses/MIT", "MIT"),
    ("https://opensource.org/licenses/BSD-3-Clause", "BSD-3-Clause"),
    ("http://publications.europa.eu/resource/authority/licence/CC_BYNCSA_4_0", "CC-BY-NC-SA-4.0"),
    ("https://www.gnu.org/licenses/gpl-3.0.html", "GPL-3.0-only"),
    ("https://gnu.org/licenses/agpl-3.0.en.html#SEC1", "AGPL-3.0-only"),
    ("https://www.gnu.org/licenses/old-licenses/lgpl-2.1.txt", "LGPL-2.1-only"),
    ("GPL-3.0", "GPL-3.0-only"), ("GPL-3.0+", "GPL-3.0-or-later"), ("GPL-2.0", "GPL-2.0-only"), ("GPLv2+", "GPL-2.0-or-later"),
    ("LGPL-3.0", "LGPL-3.0-only"), ("LGPL-2.0+", "LGPL-2.0-or-later"), ("GPL-1.0", "GPL-1.0-only"),
    ("AGPL-3.0", "AGPL-3.0-only"), ("GPL-2.0-with-classpath-exception", "GPL-2.0-only"),
    ("cc_by_nc_4.0", "CC-BY-NC-4.0"), ("CC-BY-NC4.0", "CC-BY-NC-4.0"), ("CC BY-SA 4.0", "CC-BY-SA-4.0"),
    ("ccby4.0", "CC-BY-4.0"), ("cc_by_sa_3.0_de", "CC-BY-SA-3.0-DE"),
    ("Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International", "CC-BY-NC-SA-4.0"),
]


@pytest.mark.parametrize(("name", "identifier"), SPELLINGS)
def test_a_spelling_demands_what_its_identifier_does(name: str, identifier: str) -> None:
    found, wanted = terms(name), terms(identifier)
    assert found.name == name and wanted.known and found.known
    for demand in ("non_commercial", "no_derivatives", "attribution", "adapted_under"):
        assert getattr(found, demand) == getattr(wanted, demand), demand
    marks = {"NC": wanted.non_commercial, "ND": wanted.no_derivatives, "SA": bool(wanted.adapted_under)}
    for mark, demanded in marks.items():
        assert demanded == (mark in identifier.split("-") or (mark == "SA" and "GPL" in identifier)), mark


@pytest.mark.parametrize("name", [*(name for name, identifier in SPELLINGS if {"NC", "ND"} & set(identifier.split("-"))),
                                  "CC-BY-NC/MIT", "MIT/CC-BY-NC-4.0", "MIT/CC-BYNC-4.0", "CC-BY-4.0, CC-BY-NC-4.0",
                                  "CC-BY-ND (any version)",
                                  f"see {CC}/licenses/by-nc/4.0/"])
def test_no_spelling_lets_a_commercial_release_pass(name: str) -> None:
    found = judge([Judged("s", Policy(licence=(name,)))], UseConfig(commercial=True, release=True), "gen-ai", NOW)
    assert not all(each.allowed for each in found), explained(found)


@pytest.mark.parametrize(("licences", "agree"), [
    (["GPL-3.0", "CC-BY-NC-SA-4.0"], False), (["AGPL-3.0", f"{CC}/licenses/by-nc-sa/4.0/"], False),
    (["LGPL-3.0", "ODbL-1.0"], False), (["GPL-2.0", "GPL-3.0"], False), (["GPL-2.0", "LGPL-3.0"], False),
    (["GPL-2.0+", "GPL-3.0"], True), (["LGPL-2.1", "GPL-2.0"], True), (["LGPL-3.0", "AGPL-3.0+", "CC BY-SA 4.0"], True),
    ([f"{CC}/licenses/by-sa/4.0/", "CC-BY-SA-3.0"], True), ([f"{CC}/licenses/by-sa/3.0/de/", "cc_by_sa_3.0_de"], True)])
def test_share_alike_is_seen_in_every_spelling(licences: list[str], agree: bool) -> None:
    found = share_alike_conflict({str(i): options([name]) for i, name in enumerate(licences)})
    assert found == ([] if agree else ["0", "1"])


@pytest.mark.parametrize("name", ["CC-BY-4.0-and-no-war", "Terms of ACME (CC-BY-4.0 style)", "MIT licence of ours", "ACME-1.0"])
def test_other_words_are_not_judged(name: str) -> None:
    assert not terms(name).known


@pytest.mark.parametrize("name", ["https://example.org/terms", f"{CC}/licenses/sampling+/1.0/", "example.org/our/licence",
                                  "https://www.gnu.org/licenses/", f"{CC}/licenses/by-nc/"])
def test_an_address_that_stands_for_no_known_licence_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an address that stands for no licence known here"):
        options([name])
    (tmp_path / "s").mkdir()
    write_tokens(tmp_path / "s", {"train": [50]}, licence=name)
    [problem] = use_problems(make_run({"s": (tmp_path / "s", 1)}))
    assert name in problem.rule and "officina data describe DATASET --licence" in problem.remedy
