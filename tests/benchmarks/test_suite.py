"""The list of benchmarks, and the tables that are written from their records."""

import importlib.util
import json
from pathlib import Path

import pytest

from officina.benchmarks import suite, table
from officina.benchmarks.record import RESULTS
from officina.trainer.errors import EXIT_BUG, EXIT_DONE, OfficinaError


def test_the_page_is_what_the_records_say():
    """If this fails: python -m officina.benchmarks.table"""
    page = table.PAGE.read_text()
    assert table.fill(page, table.read_records()) == page


def test_every_record_has_a_place_on_the_page_and_every_place_a_benchmark():
    places = [match[1] for match in table._PLACE.findall(table.PAGE.read_text())]
    assert sorted(places) == sorted(table._TABLES) == sorted([*suite.BENCHMARKS, "gpu"])
    assert {path.stem for path in RESULTS.glob("*.json")} <= set(places)


def test_a_changed_record_changes_the_page():
    page = table.PAGE.read_text()
    results = {"1 rank": {"total_s": {"median": 4.2, "min": 4.0, "max": 5.0}, "parts_s": {"group": {"median": 0.25}}}}
    device = {"cpu": "Some CPU", "cores": 2, "accelerators": []}
    commit, versions = {"hash": "abcdef0123", "changed": False}, {"torch": "2.13", "python": "3.12"}
    found = {"start": {"name": "start", "date": "2026-01-02T03:04:05Z", "commit": commit, "device": device, "repeats": 5,
                       "settings": {}, "versions": versions, "results": results}}
    filled = table.fill(page, found)
    assert "| 1 rank | 4.2 (4.0 to 5.0) | 0.25 |" in filled and "commit abcdef012, 5 repeats" in filled
    assert table.fill(filled, found) == filled  # written twice, it stays


def test_a_record_of_shrunken_shapes_is_refused(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps({"settings": {"tiny": True}}))
    with pytest.raises(ValueError, match=r"gpu.json was made with --tiny.*Remove it"):
        table.read_records(tmp_path)


def test_every_benchmark_has_a_module_and_a_line(capsys):
    assert suite.main([]) == suite.main(["list"]) == EXIT_DONE
    shown = capsys.readouterr().out
    for name in suite.BENCHMARKS:
        assert importlib.util.find_spec(f"officina.benchmarks.{name}") and f"\n{name} " in f"\n{shown}"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(OfficinaError, match=r"no benchmark stepp; there are step, engines.*officina bench list"):
        suite.main(["stepp"])


def test_what_is_measured_against_must_be_there(monkeypatch):
    monkeypatch.setattr(suite, "find_spec", lambda name: None if name == "peft" else name)
    monkeypatch.setattr(suite, "run", lambda *_, **__: EXIT_DONE)
    with pytest.raises(OfficinaError, match=r"peft: not installed here.*Try: pip install .*officina\[test\]"):
        suite.main(["engines", "lora"])


@pytest.mark.parametrize("records", [RESULTS, Path("bench-results")])  # of a clone, of an installation
def test_quick_figures_never_go_among_the_records(monkeypatch, records):
    monkeypatch.setattr(suite, "_results", lambda: records)
    with pytest.raises(OfficinaError, match=rf"not for the records in {records}\. Try: officina bench step --quick --out"):
        suite.main(["step", "--quick"])


def test_each_runs_in_its_own_process_and_a_failure_is_the_exit_status(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(suite.BENCHMARKS, "table", suite.Benchmark("stands for one that works", "0", ("--help",)))
    monkeypatch.setitem(suite.BENCHMARKS, "no_such", suite.Benchmark("cannot be imported", "0", ()))
    assert suite.main(["table", "--quick", "--out", str(tmp_path)]) == EXIT_DONE
    assert suite.main(["no_such", "table", "--quick", "--out", str(tmp_path)]) == EXIT_BUG
    assert "failed: no_such" in capfd.readouterr().err
