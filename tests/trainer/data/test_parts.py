"""A build in parts: the same bytes for any number of processes, counts that add up, nothing left behind by a kill."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from officina.launch.cli import main
from officina.trainer.data import build as build_module
from officina.trainer.data import scan, workers
from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.documents import Fields, document_id
from officina.trainer.data.manifest import MANIFEST, WORK, open_dataset
from officina.trainer.data.parts import count_words
from officina.trainer.data.removal import remove
from officina.trainer.data.shards import Shard
from officina.trainer.data.stream import Stream
from officina.trainer.data.verify import verify
from officina.trainer.data.work_folder import PLAN
from officina.trainer.errors import DataError


@pytest.fixture()
def corpus(tmp_path: Path) -> Path:
    """Two files of JSON lines with languages, ids and sources; every tenth document stands in both."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for name, first in (("a", 0), ("b", 90)):
        lines = []
        for i in range(first, first + 100):
            words = ("\n " * (i % 3) + " ").join(f"w{n}" for n in rng.integers(0, 50, 60))
            words = words if i % 10 else f"the same words {i // 10 % 9} " * 9
            lines.append(json.dumps({"text": words, "lang": ("fi", "swe_Latn", None)[i % 3], "id": f"doc-{name}-{i}",
                                     "from": f"s{i % 4}"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


OPTIONS = {"vocab_size": 300, "validation": 0.2, "shard_bytes": 4000, "fields": Fields(source="from"), "workers": 1}


@pytest.fixture()
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "LEAST_PART_BYTES", 5000)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_any_number_of_processes_gives_the_same_bytes(corpus: Path, tmp_path: Path, small_parts: None) -> None:
    reported: list[tuple[str, int, int]] = []
    for n in (1, 3):
        build(tmp_path / f"out{n}", BuildOptions(inputs=[corpus], about={"name": "x"}, **OPTIONS | {"workers": n}),
              lambda *found: reported.append(found))
    assert content(tmp_path / "out1") == content(tmp_path / "out3")
    assert len(open_dataset(tmp_path / "out1").of_split("train")) > 8 and verify(tmp_path / "out1").faults == []
    for phase in ("reading", "tokens"):  # every byte is reported, in both
        assert sum(done == total for name, done, total in reported if name == phase) >= 2
        assert all(done <= total for name, done, total in reported if name == phase)


def test_documents_keep_their_language_id_source_and_order(corpus: Path, tmp_path: Path, small_parts: None) -> None:
    manifest = build(tmp_path / "out", BuildOptions(inputs=[corpus], **OPTIONS)).manifest
    assert manifest.languages == ["fin_Latn", "swe_Latn", "und"] and manifest.sources == ["s0", "s1", "s2", "s3"]
    rows, seen = [], set()
    for line in [*(corpus / "a.jsonl").open(), *(corpus / "b.jsonl").open()]:
        row = json.loads(line)
        if row["text"] not in seen:
            rows.append(row)
        seen.add(row["text"])
    for split in ("train", "validation"):
        wanted = [row for row in rows if (int(hashlib.sha256(row["text"].encode()).hexdigest()[:12], 16) / 2**48 < 0.2)
                  is (split == "validation")]
        found = []
        stream = Stream(open_dataset(tmp_path / "out"), split)
        for number in range(len(stream.entries)):
            shard = stream.shard(number)
            found += [(bytes(i), manifest.languages[n], manifest.sources[s]) for i, n, s in zip(
                shard.document_ids, shard.language_ids, shard.source_ids, strict=True)]
        code = {"fi": "fin_Latn", "swe_Latn": "swe_Latn", None: "und"}
        assert found == [(document_id(row["id"]), code[row["lang"]], row["from"]) for row in wanted] and found


def test_sums_over_segments_are_those_of_the_shards(corpus: Path, tmp_path: Path, small_parts: None) -> None:
    result = build(tmp_path / "out", BuildOptions(inputs=[corpus], **OPTIONS))
    dataset, texts = open_dataset(tmp_path / "out"), set()
    for line in [*(corpus / "a.jsonl").open(), *(corpus / "b.jsonl").open()]:
        texts.add(json.loads(line)["text"])
    for split, totals in result.manifest.splits.items():
        stats = result.stats[split]
        for name, key in (("documents", "documents"), ("tokens", "tokens")):
            assert stats[name] == sum(group[key] for group in stats["groups"]) == getattr(totals, key)
        lengths = [n for e in dataset.of_split(split) for n in np.diff(Shard(dataset.folder / e.path).ends, prepend=0)]
        bounds = {int(bound): n for bound, n in stats["documents_with_fewer_tokens_than"].items()}
        assert bounds == {b: sum(b / 2 <= n < b for n in lengths) for b in bounds} and sum(bounds.values()) == len(lengths)
    assert sum(s["text_bytes"] for n, s in result.stats.items() if n != "left_out") == sum(len(t.encode()) for t in texts)
    assert sum(s["words"] for n, s in result.stats.items() if n != "left_out") == sum(len(t.split()) for t in texts)
    segments = sum(len([line for line in t.split("\n") if line.strip()]) for t in texts)
    assert sum(s["segments"] for n, s in result.stats.items() if n != "left_out") == segments > len(texts)
    [step] = result.manifest.steps
    assert (step.name, step.documents_in, step.documents_out) == ("exact-duplicates", 200, len(texts))


@pytest.mark.parametrize("text", ["", " ", "a", " a", "a b", "naïve café\n\nx ", "\t\ta  b\r\nc"])
def test_words(text: str) -> None:
    assert count_words(text.encode()) == len(text.split())


def test_steps_of_filters_and_hplt_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None) -> None:
    """Also over segments that end between documents that are left out."""
    (tmp_path / "step_filters.py").write_text("__version__ = '1.2'\ndef odd(d): return int(d.row['n']) % 3 > 0\n"
                                              "def mask(d): return d.text.replace('7', 'X')\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"text": f"Number {i} and some more words.", "n": i, "u": "x", "ts": "1", "filter": "keep" if i % 5 else "bad",
             "allowed": i % 7 != 1} for i in range(300)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stay = [r for r in rows if r["filter"] == "keep" and r["allowed"]]
    manifest = build(tmp_path / "out", BuildOptions(
        inputs=[tmp_path / "in.jsonl"], filters=["step_filters:odd", "step_filters:mask"], vocab_size=300, workers=1,
        shard_bytes=600)).manifest
    found = {s.name: (s.version, s.documents_in, s.documents_out, s.documents_changed) for s in manifest.steps}
    kept = [r for r in stay if r["n"] % 3]
    assert found.pop("hplt-filter")[1:] == (300, 240, 0)
    assert found.pop("hplt-robots")[1:] == (240, len(stay), 0)
    assert found.pop("exact-duplicates")[1:] == (len(stay), len(stay), 0)
    assert found == {"step_filters:odd": ("1.2", len(stay), len(kept), 0),
                     "step_filters:mask": ("1.2", len(kept), len(kept), sum("7" in r["text"] for r in kept))}
    assert len(manifest.splits) == 2 and manifest.splits["train"].shards > 5
    assert sum(totals.documents for totals in manifest.splits.values()) == len(kept)


def test_bad_rows_within_the_budget_are_counted_and_beyond_it_stop(tmp_path: Path, small_parts: None) -> None:
    lines = [json.dumps({"text": f"Number {i} " * 20}) for i in range(100)]
    lines[3] = lines[60] = "{"
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = {"inputs": [tmp_path / "in.jsonl"], "vocab_size": 300, "workers": 1}
    for allowed in (0, 1):
        with pytest.raises(DataError, match=rf"bad rows?, {allowed} allowed:\n  - .*in.jsonl line 4: no JSON object"):
            build(tmp_path / "out", BuildOptions(max_bad_rows=allowed, **options))
    with pytest.raises(DataError, match=r"2 bad rows, 1 allowed:\n.*\n  - .*in.jsonl line 61.*\nMend .*--max-bad-rows 10"):
        build(tmp_path / "out", BuildOptions(max_bad_rows=1, **options))
    assert build(tmp_path / "out", BuildOptions(max_bad_rows=2, **options)).stats["left_out"]["bad_rows"] == 2


def test_too_many_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("officina.trainer.data.build._MOST_NAMES", 3)
    rows = [{"text": f"x{i}", "from": str(i), "lang": str(i)} for i in range(4)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"--source-field from: gives 4 sources, at most 3 are possible"):
        build(tmp_path / "out", BuildOptions(inputs=[tmp_path / "in.jsonl"], vocab_size=300, fields=Fields(source="from")))
    with pytest.raises(DataError, match=r"the language field gives 4 languages, at most 3.*--language-field NAME"):
        build(tmp_path / "out", BuildOptions(inputs=[tmp_path / "in.jsonl"], vocab_size=300))
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"x{i}")
    with pytest.raises(DataError, match=r"4 inputs give as many sources, at most 3 are.*--source-field NAME"):
        build(tmp_path / "out", BuildOptions(inputs=[tmp_path / f"{i}.txt" for i in range(4)], vocab_size=300))


# ---- kills -----------------------------------------------------------------------------------------------------------
PARALLEL = """if True:
    import sys
    from officina.trainer.data import build as b, scan
    if __name__ == "__main__":
        scan.LEAST_PART_BYTES = 5000
        options = b.BuildOptions(inputs=[sys.argv[2]], workers=2, vocab_size=300, validation=0.2, shard_bytes=4000,
                                 fields=b.Fields(source="from"), about={"name": "x"})
        b.build(sys.argv[1], options, lambda *found: print(*found, flush=True))"""


def descendants(pid: int) -> set[int]:
    children = {int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return children.union(*map(descendants, children))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("phase", ["reading", "tokens"])
def test_a_kill_leaves_no_worker_and_the_build_goes_on(corpus: Path, tmp_path: Path, phase: str) -> None:
    command = [sys.executable, "-c", PARALLEL, tmp_path / "out", corpus]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith(phase) for line in process.stdout)
    family = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while any(map(alive, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, family))
    if process.returncode:
        with pytest.raises(DataError, match=r"is no data set"):
            open_dataset(tmp_path / "out")
        assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert subprocess.run([*command[:3], tmp_path / "whole", corpus], stdout=subprocess.DEVNULL).returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole") and verify(tmp_path / "out").faults == []


def _dies(job: int, report: workers.Report) -> int:
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    report(1)
    return job


def _fails(job: int, report: workers.Report) -> int:
    if job == 1:
        raise DataError("job 1 is broken")
    for _ in range(600):
        time.sleep(0.05)
        report(1)
    return job


def test_a_killed_worker_is_said_and_an_error_stops_the_others() -> None:
    with pytest.raises(DataError, match=r"a worker process was killed.*the same command goes on.*--workers 1"):
        workers.run_jobs(_dies, range(6), 2, lambda done: None)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"job 1 is broken"):
        workers.run_jobs(_fails, range(4), 2, lambda done: None)
    assert time.monotonic() - begun < 25


def test_a_full_disk_is_said_and_the_build_goes_on_when_there_is_room(
        corpus: Path, tmp_path: Path, small_parts: None, mount: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    """Wherever it is when the disk is full: there is always a little more room than before."""
    options = BuildOptions(inputs=[corpus], about={"name": "x"}, **OPTIONS)
    build(tmp_path / "whole", options)
    disk, reached, described_last = mount("size=12k"), [], False
    assert main(["data", "build", f"{disk}/cli", str(corpus), "--vocab-size", "300", "--workers", "1"]) == 2
    said = capsys.readouterr().err
    assert f"{disk}/cli: the build stopped (No space left on device). What is finished is kept: make room" in said
    assert "Traceback" not in said
    shutil.rmtree(disk / "cli")
    with pytest.raises(DataError, match=r"the build stopped \(No space left"):  # met by a worker
        build(disk / "pool", replace(options, workers=2))
    shutil.rmtree(disk / "pool")
    for pages in range(3, 1000):
        mount(f"size={4 * pages}k", again=True)
        try:
            build(disk / "out", options, lambda phase, *_: reached.append(phase))
            break
        except DataError as full:
            assert "the build stopped (No space left on device)" in str(full)
        reached.append("full")
        if described_last := (disk / "out" / MANIFEST).exists():  # only croissant.json is missing
            assert verify(disk / "out").faults == []
            plan = (disk / "out" / WORK / PLAN).read_bytes()
        shards = list((disk / "out").rglob("*.dls*"))
        assert not [path for path in shards if path.suffix == ".tmp"]
        assert [fault for path in shards for fault in Shard(path).check_all()] == []
    stopped_in = {before for before, now in pairwise(reached) if now == "full" != before}
    assert stopped_in >= {"reading", "tokens"} and reached.count("full") > 20 and described_last
    assert content(disk / "out") == content(tmp_path / "whole")
    mount("size=64m", again=True)
    (disk / "out" / WORK).mkdir()  # a kill while the work folder was being removed
    (disk / "out" / WORK / PLAN).write_bytes(plan)
    with pytest.raises(DataError, match=r"unfinished build with other validation\. Give the same words"):
        build(disk / "out", replace(options, validation=0.3))
    build(disk / "out", options)
    assert content(disk / "out") == content(tmp_path / "whole")


def test_one_build_at_a_time(corpus: Path, tmp_path: Path) -> None:
    """A second one is refused while the first holds its claim; locks are per process, so the first is another one."""
    (tmp_path / "out" / ".build").mkdir(parents=True)
    hold = ("import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); "
            "sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "out" / ".build" / "claim"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=r"is being built or changed by another process"):
            build(tmp_path / "out", BuildOptions(inputs=[corpus], **OPTIONS))
        holder.communicate()
    build(tmp_path / "out", BuildOptions(inputs=[corpus], **OPTIONS))


def test_a_build_that_was_overtaken_takes_nothing_away(corpus: Path, tmp_path: Path, small_parts: None,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process builds the data set after this one saw that there is none, and before it claims the folder."""
    options, plan = BuildOptions(inputs=[corpus], **OPTIONS), build_module.plan_parts

    def overtaken(*args: object) -> object:
        monkeypatch.setattr(build_module, "plan_parts", plan)
        build(tmp_path / "out", options)
        return plan(*args)

    monkeypatch.setattr(build_module, "plan_parts", overtaken)
    with pytest.raises(DataError, match=r"holds a data set already"):
        build(tmp_path / "out", options)
    assert verify(tmp_path / "out").faults == [] and not (tmp_path / "out" / WORK).exists()


def test_a_kill_while_the_work_folder_is_removed_leaves_a_data_set(corpus: Path, tmp_path: Path, small_parts: None,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path) -> None:
        for path in sorted(folder.iterdir())[:3]:
            path.unlink()
        raise KeyboardInterrupt

    options = BuildOptions(inputs=[corpus], **OPTIONS)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", killed)
        build(tmp_path / "out", options)
    assert any((tmp_path / "out" / WORK).iterdir())
    with pytest.raises(DataError, match=r"holds a data set already"):
        build(tmp_path / "out", options)
    assert verify(tmp_path / "out").faults == []
    build(tmp_path / "out", replace(options, overwrite=True))
    assert verify(tmp_path / "out").faults == []


def test_a_build_does_not_bring_removed_documents_back(corpus: Path, tmp_path: Path, small_parts: None) -> None:
    options = BuildOptions(inputs=[corpus], **OPTIONS)
    build(tmp_path / "out", options)
    remove(tmp_path / "out", ["doc-a-3"])
    with pytest.raises(DataError, match=r"removed from it on request \(removed/00001\.jsonl\), and a build from"):
        build(tmp_path / "out", replace(options, overwrite=True))
    assert len(open_dataset(tmp_path / "out").manifest.removals) == 1 and verify(tmp_path / "out").faults == []
