"""Records say when, on what and with which code, and nothing about who or where."""

import getpass
import json
import socket

from officina.benchmarks.record import interleaved, record, summary, write_record


def test_record_has_what_makes_a_figure_comparable(tmp_path):
    found = record("x", {"a_s": 1.5}, settings={"ranks": 2}, repeats=3)
    assert found["results"] == {"a_s": 1.5} and found["settings"] == {"ranks": 2} and found["repeats"] == 3
    assert found["versions"]["torch"] and found["versions"]["python"] and found["device"]["cpu"]
    assert found["device"]["memory_bytes"] > 2**28 and set(found["commit"]) == {"hash", "changed"}
    path = write_record(found, tmp_path / "deep" / "x.json")
    assert json.loads(path.read_text()) == found
    text = path.read_text()
    assert str(tmp_path) not in text and socket.gethostname() not in text and f"/{getpass.getuser()}/" not in text


def test_cases_are_measured_in_turn():
    order = []
    cases = {"a": lambda: order.append("a") or len(order), "b": lambda: order.append("b") or len(order)}
    assert interleaved(cases, 2, warmup=1) == {"a": [3, 5], "b": [4, 6]}
    assert order == ["a", "b"] * 3


def test_summary():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}
