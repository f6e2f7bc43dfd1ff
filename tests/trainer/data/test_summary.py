"""The summary of a run: its totals are those that a plain count over every token of every row gives."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_run
from hypothesis import given, settings
from hypothesis import strategies as st

from officina.trainer.config import CustomModelConfig, RunConfig, SourceConfig, UseConfig
from officina.trainer.data.describe import change
from officina.trainer.data.ledger import read_ledger
from officina.trainer.data.manifest import open_dataset, write_manifest
from officina.trainer.data.order import extend_timeline
from officina.trainer.data.policy import Policy
from officina.trainer.data.reader import RowReader
from officina.trainer.data.removal import remove
from officina.trainer.data.shard_writer import SplitWriter, write_records
from officina.trainer.data.shards import Shard
from officina.trainer.data.summary import receipt, summarise
from officina.trainer.errors import DataError
from officina.trainer.metrics import MetricsWriter, StartMetrics, StopMetrics
from officina.trainer.run_dir import save_config


def write_labelled(folder: Path, documents: list[tuple[int, int, int]], *, n_sources: int = 3, languages: int = 2,
                   **about: object) -> Path:
    """Documents of (length, source, language); several shards."""
    with SplitWriter(folder, "train", dtype="u16", shard_bytes=60) as writer:
        for length, source, language in documents:
            writer.add(np.arange(length), source, language if languages else None)
        entries = writer.close()
    write_manifest(folder, entries, {}, kind="tokens", dtype="u16", name=folder.name,
                   sources=[f"{folder.name}-{i}" for i in range(n_sources)],
                   languages=["fin_Latn", "swe_Latn"][:languages], **about)
    return folder


def read_steps(run_dir: Path, run: RunConfig, step: int, position: int, steps: int) -> int:
    """The ledger of some steps, without a loader."""
    save_config(run, run_dir / "config.yaml")
    reader = RowReader(run, position)
    with open(run_dir / "ledger.jsonl", "a") as ledger:
        ledger.write(json.dumps({"start": step}) + "\n")
        for done in range(step + 1, step + steps + 1):
            samples = reader.skips.indices(position, np.arange(run.batch.rows))
            stop = int(samples[-1]) + 1
            ledger.write(json.dumps({"step": done, "first_sample": position, "stop_sample": stop, "digest": 0,
                                     "skipped": reader.skips.within(position, stop),
                                     "source_rows": reader.source_rows(samples)}) + "\n")
            position = stop
    return position


def recount(run: RunConfig, run_dir: Path) -> dict[str, tuple[Counter, Counter]]:
    """By source of the mixture: tokens by source and language of their documents, looked up one by one."""
    reader = RowReader(run, 0)
    found = {name: (Counter(), Counter()) for name in run.data.sources}
    for entry in read_ledger(run_dir)[0]:
        samples = entry.samples()
        places = reader.place(samples)
        for number, row in zip(places.source, places.row, strict=True):
            name = reader.order.names[number]
            dataset = open_dataset(run.data.sources[name].path)
            labels = [(int(s), int(g)) for e in dataset.of_split("train") for shard in [Shard(dataset.folder / e.path, e)]
                      for s, g, n in zip(shard.source_ids, shard.language_ids, np.diff(shard.ends, prepend=0), strict=True)
                      for _ in range(n)]
            for source, language in labels[row * 8:(row + 1) * 8]:
                found[name][0][dataset.manifest.sources[source]] += 1
                found[name][1][dataset.manifest.languages[language]] += 1
    return found


documents = st.lists(st.tuples(st.integers(1, 25), st.integers(0, 2), st.integers(0, 1)), min_size=4, max_size=12).filter(
    lambda found: sum(length for length, _, _ in found) > 24)


@settings(max_examples=60, deadline=None)
@given(a=documents, b=documents, weight=st.sampled_from([0.3, 0.5, 1.0]), steps=st.integers(1, 12), shuffle=st.booleans(),
       skip=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)).map(lambda t: [t[0], t[0] + t[1]]), max_size=2),
       seed=st.integers(0, 5))
def test_totals_are_those_of_a_plain_count(a, b, weight, steps, shuffle, skip, seed, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("summary")
    run = make_run({"a": (write_labelled(folder / "a", a), weight), "b": (write_labelled(folder / "b", b), 1)}, seed=seed,
                   shuffle=shuffle, skip=skip)
    read_steps(folder, run, 0, 0, steps)
    found, wanted = summarise(folder), recount(run, folder)
    assert found.total == steps * 4 * 8 and found.steps == steps
    for name in "ab":
        used = found.sources.get(name)
        assert (used.by_source if used else {}) == dict(wanted[name][0]) and (used.by_language if used else {}) == dict(
            wanted[name][1])
    assert found.by_language == dict(wanted["a"][1] + wanted["b"][1])


def test_kills_and_new_mixtures_are_counted_as_they_stand(tmp_path: Path) -> None:
    a = write_labelled(tmp_path / "a", [(9, 0, 0), (30, 1, 1), (20, 2, 0)])
    b = write_labelled(tmp_path / "b", [(50, 0, 1), (8, 1, 1)])
    run = make_run({"a": (a, 1)})
    position = read_steps(tmp_path, run, 0, 0, 5)
    changed = replace(run, data=extend_timeline(run.data, position, {
        "a": run.data.sources["a"], "b": SourceConfig(path=str(b), weight=3.0)}))
    read_steps(tmp_path, changed, 5, position, 7)
    read_steps(tmp_path, changed, 8, position + 3 * 4, 4)  # killed after step 12, gone on with from step 8
    found, wanted = summarise(tmp_path), recount(changed, tmp_path)
    assert found.starts == 3 and found.steps == 12 and found.total == 12 * 4 * 8
    assert {name: used.by_source for name, used in found.sources.items()} == {n: dict(w[0]) for n, w in wanted.items()}
    assert found.sources["a"].passes == found.sources["a"].rows / 7


def test_many_passes_are_closed_form(tmp_path: Path) -> None:
    """A million passes take no longer than one, and the sums stay exact."""
    a = write_labelled(tmp_path / "a", [(9, 0, 0), (30, 1, 1), (20, 2, 0)])
    run = replace(make_run({"a": (a, 1)}, rows=10**7), steps=1)
    save_config(run, tmp_path / "config.yaml")
    rows = 7 * 10**6 + 3
    (tmp_path / "ledger.jsonl").write_text('{"start":0}\n' + json.dumps({
        "step": 1, "first_sample": 0, "stop_sample": rows, "digest": 0, "skipped": [], "source_rows": {"a": rows}}) + "\n")
    found = summarise(tmp_path).sources["a"]
    one = Counter({"a-0": 9, "a-1": 30, "a-2": 17})  # 7 rows of 8 of 59 tokens
    rest = RowReader(run, 0).place(np.arange(7 * 10**6, 7 * 10**6 + 3)).row
    labels = ["a-0"] * 9 + ["a-1"] * 30 + ["a-2"] * 20
    expected = Counter({name: n * 10**6 for name, n in one.items()})
    expected.update(label for row in rest for label in labels[row * 8:row * 8 + 8])
    assert found.by_source == dict(expected) and found.tokens == (7 * 10**6 + 3) * 8


def test_records_are_counted_as_records(tmp_path: Path) -> None:
    write_records(tmp_path / "r", [b"x" * n for n in (3, 9, 1, 4)], name="r", licence="MIT")
    run = replace(make_run({"r": (tmp_path / "r", 1)}, seq_len=1, rows=3),
                  model=CustomModelConfig(factory="a:b", loss="a:b", decoder="a:b"))
    read_steps(tmp_path, run, 0, 0, 5)
    found = summarise(tmp_path)
    assert (found.unit, found.total, found.by_licence, found.by_language) == ("records", 15, {"MIT": 15}, {"not stated": 15})


def test_contributors_licences_and_the_receipt(tmp_path: Path) -> None:
    a = write_labelled(tmp_path / "a", [(90, 0, 0)], licence="CC-BY-4.0", n_sources=1)
    b = write_labelled(tmp_path / "b", [(90, 0, 0)], licence="Terms", languages=0)
    change(a, creators=["ACME"], policy=Policy(attribution="ACME, Words (2026)"), url="https://example.org/a")
    change(b, creators=["Lab", "ACME"], url="https://example.org/b")
    run = replace(make_run({"a": (a, 0.75), "b": (b, 0.25)}), name="one",
                  use=UseConfig(purpose="research", organisation="Me", agreement="A-7"))
    read_steps(tmp_path, run, 0, 0, 4)
    with MetricsWriter(tmp_path) as metrics:
        common = dict(step=0, action="start", engine="single", world_size=1, device="cpu", precision="fp32", parameters=1,
                      flops_per_token_causal=None, flops_per_token_full=None, peak_flops=None, checkpoint=None, problems=())
        metrics.write(StartMetrics(**common, time=1_700_000_000.0))
        metrics.write(StopMetrics(step=2, reason="x", exit_status=75, time=1_700_000_060.0))
        metrics.write(StartMetrics(**common | {"step": 2}, time=1_700_086_400.0))
        metrics.write(StopMetrics(step=4, reason="done", exit_status=0, time=1_700_086_430.0))
    found = summarise(tmp_path)
    assert found.by_contributor == {"ACME": 96, "Lab, ACME": 32} and found.by_licence == {"CC-BY-4.0": 96, "Terms": 32}
    assert found.by_language == {"fin_Latn": 96, "not stated": 32}
    assert found.attribution == ["ACME, Words (2026)", "b by Lab, ACME (Terms) https://example.org/b"]
    assert (found.first[:10], found.last[:10], found.duration_s) == ("2023-11-14", "2023-11-15", 90.0)
    slip = json.loads(json.dumps(receipt(found)))
    assert (slip["total"], slip["runs"], slip["agreement"], slip["organisation"]) == (128, 1, "A-7", "Me")
    assert [(item["dataset"], item["tokens"], item["contributors"]) for item in slip["items"]] == [
        ("a 1.0.0", 96, ["ACME"]), ("b 1.0.0", 32, ["Lab", "ACME"])]
    assert str(tmp_path) not in json.dumps(slip)


def test_removed_documents_are_not_consumed(tmp_path: Path) -> None:
    """From the start on that heeds a list; steps before it have read the documents."""
    a = write_labelled(tmp_path / "a", [(24, 0, 0), (16, 1, 1), (24, 0, 1)], n_sources=2)  # 7 rows of 8, and 8 tokens over
    run = make_run({"a": (a, 1)}, rows=7, shuffle=False)
    position = read_steps(tmp_path, run, 0, 0, 2)
    remove(a, [f"{open_dataset(a).shards[1].path}:0"])
    assert summarise(tmp_path).sources["a"].by_source == {"a-0": 2 * 40, "a-1": 2 * 16}
    content = (tmp_path / "ledger.jsonl").read_text()
    read_steps(tmp_path, run, 2, position, 3)
    later = (tmp_path / "ledger.jsonl").read_text()[len(content):].replace('{"start": 2}', '{"start":2,"removals":{"a":1}}')
    (tmp_path / "ledger.jsonl").write_text(content + later)
    found = summarise(tmp_path).sources["a"]
    assert found.by_source == {"a-0": 5 * 40, "a-1": 2 * 16} and found.by_language == {"fin_Latn": 5 * 24,
                                                                                      "swe_Latn": 5 * 16 + 2 * 16}
    assert (found.rows, found.tokens) == (35, 5 * 40 + 2 * 16)


def test_nothing_consumed(tmp_path: Path) -> None:
    save_config(make_run({"a": (write_labelled(tmp_path / "a", [(90, 0, 0)]), 1)}), tmp_path / "config.yaml")
    (tmp_path / "ledger.jsonl").write_text("")
    with pytest.raises(DataError, match=r"has no step yet, so nothing was consumed"):
        summarise(tmp_path)
