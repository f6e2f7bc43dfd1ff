"""From text to shards: deterministic, held out by content, nothing half-made, every bad file named."""

import gzip
import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from officina.trainer.data import build as building
from officina.trainer.data.build import EOS, BuildOptions, build
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.stream import Stream
from officina.trainer.data.verify import verify
from officina.trainer.errors import DataError


@pytest.fixture()
def texts(tmp_path: Path) -> Path:
    """Forty small documents in a folder and in JSON lines, and some that must be left out."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for i in range(20):
        (folder / "sub" / f"{i:02}.txt").write_text(f"Document {i}: " + "naïve words and numbers 1234, " * (i + 1))
    (folder / "copy.txt").write_text((folder / "sub" / "07.txt").read_text())
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text(" \n")
    (folder / ".hidden" / "x.txt").write_text("hidden")
    (folder / "not.bin").write_text("other pattern")
    lines = [json.dumps({"text": f"Line {i} says <|endoftext|> and goes on. " * 9, "id": i}) for i in range(20)]
    lines += ['{"text": "half a pair \\ud800"}', ""]
    with gzip.open(folder / "more.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    return folder


OPTIONS = {"vocab_size": 400, "validation": 0.2}


def documents(folder: Path, split: str) -> list[list[int]]:
    stream = Stream(open_dataset(folder), split)
    return [np.frombuffer(stream.record(i).content, np.uint16).tolist() for i in range(int(stream.document_starts[-1]))]


def test_build_reads_all_and_only_what_it_should(texts: Path, tmp_path: Path) -> None:
    result = build(tmp_path / "out", BuildOptions(inputs=[texts], **OPTIONS))
    assert result.stats["left_out"] == {
        "undecodable": 2, "undecodable_files": ["texts/latin.txt", "texts/more.jsonl.gz line 21"], "empty": 1,
        "duplicates": 1, "bad_rows": 0}
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    found = {split: documents(tmp_path / "out", split) for split in ("train", "validation")}
    assert len(found["train"]) + len(found["validation"]) == 40 and 2 <= len(found["validation"]) <= 16
    for document in [*found["train"], *found["validation"]]:
        assert document[-1] == eos and eos not in document[:-1]  # also where the text spells it
    decoded = {tokenizer.decode(d[:-1]) for d in [*found["train"], *found["validation"]]}
    wanted = {p.read_text() for p in (texts / "sub").iterdir()}
    wanted |= {f"Line {i} says <|endoftext|> and goes on. " * 9 for i in range(20)}
    assert decoded == wanted
    manifest = open_dataset(tmp_path / "out").manifest
    assert manifest.sources == ["texts"] and manifest.dtype == "u16" and manifest.tokenizer.eos_id == eos
    assert manifest.tokenizer.vocab_size == tokenizer.get_vocab_size() <= 400
    assert str(tmp_path) not in (tmp_path / "out" / "dataset.json").read_text()
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    for split, of_split in found.items():
        assert stats[split]["tokens"] == manifest.splits[split].tokens == sum(map(len, of_split))
    assert verify(tmp_path / "out").faults == []


def test_the_same_input_gives_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    """In other processes, with other thread numbers and hash seeds, from another place."""
    script = ("import sys; from officina.trainer.data.build import *; "
              "build(sys.argv[1], BuildOptions(inputs=[sys.argv[2]], vocab_size=400, about={'name': 'same'}))")
    moved = tmp_path / "elsewhere" / "texts"
    moved.parent.mkdir()
    contents = []
    for i, threads in enumerate(("1", "2")):
        if i:
            texts.rename(moved)
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        out = tmp_path / f"out{i}"
        subprocess.run([sys.executable, "-c", script, out, moved if i else texts], check=True, env=environment)
        contents.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert len(contents[0]) == 7 and contents[0] == contents[1]


def test_a_given_tokenizer_is_kept_byte_for_byte(texts: Path, tmp_path: Path) -> None:
    build(tmp_path / "one", BuildOptions(inputs=[texts], **OPTIONS))
    given = tmp_path / "one" / "tokenizer.json"
    manifest = build(tmp_path / "two", BuildOptions(inputs=[texts / "sub"], tokenizer=given)).manifest
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert manifest.tokenizer == open_dataset(tmp_path / "one").manifest.tokenizer
    with pytest.raises(DataError, match=r"the tokenizer has no token </end> to end documents with. .*--eos TOKEN"):
        build(tmp_path / "three", BuildOptions(inputs=[texts], tokenizer=given, eos="</end>"))
    with pytest.raises(DataError, match=r"--tokenizer .*latin\.txt: is no tokenizer\.json"):
        build(tmp_path / "three", BuildOptions(inputs=[texts], tokenizer=texts / "latin.txt"))


def test_verify_compares_what_is_said_of_the_tokenizer(texts: Path, tmp_path: Path) -> None:
    """No hash covers it: with another token that ends documents, or another size, a run reads the same shards otherwise."""
    build(tmp_path, BuildOptions(inputs=[texts], **OPTIONS))
    assert verify(tmp_path).faults == []
    said = json.loads((tmp_path / "dataset.json").read_text())
    for name, value in (("eos_id", 7), ("vocab_size", 9_999), ("eos", "</end>")):
        (tmp_path / "dataset.json").write_text(json.dumps(said | {"tokenizer": said["tokenizer"] | {name: value}}))
        [fault] = verify(tmp_path).faults
        assert f"dataset.json: tokenizer.{name}={value}, but " in fault


def test_what_is_held_out_is_not_trained_on_in_other_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that masked data or a filter make equal are on one side."""
    (tmp_path / "one_case.py").write_text("def keep(document): return document.text.lower()")
    monkeypatch.syspath_prepend(tmp_path)
    call = "Write to user{:03}@example.org about the terms of use."
    hplt = {"u": "https://a.example/1", "ts": "1", "pii": [[9, 28]]}
    rows = [hplt | {"text": call.format(i)} for i in range(60)]
    rows += [{"text": f"{word} {i}"} for i in range(30) for word in ("SOME OTHER TEXT", "Some other text", "some Other text")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for filters in ((), ("one_case:keep",)):
        out = tmp_path / f"out{len(filters)}"
        build(out, BuildOptions(inputs=[tmp_path / "rows.jsonl"], vocab_size=300, validation=0.5, filters=filters))
        train, held_out = ({tuple(found) for found in documents(out, split)} for split in ("train", "validation"))
        assert train and held_out and not train & held_out
    sys.modules.pop("one_case", None)


def test_shards_are_cut_between_documents(texts: Path, tmp_path: Path) -> None:
    build(tmp_path / "whole", BuildOptions(inputs=[texts], **OPTIONS))
    build(tmp_path / "cut", BuildOptions(inputs=[texts], shard_bytes=2000, **OPTIONS))
    assert len(open_dataset(tmp_path / "cut").of_split("train")) > 2
    assert documents(tmp_path / "cut", "train") == documents(tmp_path / "whole", "train")


@pytest.mark.parametrize(("name", "content", "told"), [
    ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "a.jsonl line 2: no JSON object with the field 'text'"),
    ("b.jsonl", b'{"text": 3}\n', "b.jsonl line 1: field 'text' is no text"),
    ("c.jsonl", b'{"text": "x"\n', "c.jsonl line 1: no JSON object"),
    ("d.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-9], "d.jsonl.gz: cannot be read"),
    ("e.jsonl.gz", b"no gzip", "e.jsonl.gz: cannot be read")])
def test_a_bad_file_names_itself(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        build(tmp_path / "out", BuildOptions(inputs=[tmp_path / "in"]))
    with pytest.raises(DataError, match=r"is no data set"):
        open_dataset(tmp_path / "out")


def test_what_cannot_be_built(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"input .*nowhere: no such file or folder"):
        build(tmp_path / "out", BuildOptions(inputs=[tmp_path / "nowhere"]))
    with pytest.raises(DataError, match=r"no file matches \*\.tex\. Try: --include"):
        build(tmp_path / "out", BuildOptions(inputs=[texts], include=["*.tex"]))
    with pytest.raises(DataError, match=r"--vocab-size 256: a byte-level tokenizer has 256 bytes.*--vocab-size 4096"):
        build(tmp_path / "out", BuildOptions(inputs=[texts], vocab_size=256))
    with pytest.raises(DataError, match=r"no document is left to train on"):
        build(tmp_path / "out", BuildOptions(inputs=[texts / "empty.txt"]))
    with pytest.raises(DataError, match=r"cannot be made .*Name a folder that you may write"):
        build(texts / "empty.txt" / "out", BuildOptions(inputs=[texts]))
    build(tmp_path / "out", BuildOptions(inputs=[texts], **OPTIONS))
    with pytest.raises(DataError, match=r"holds a data set already.*--overwrite"):
        build(tmp_path / "out", BuildOptions(inputs=[texts]))
    before = open_dataset(tmp_path / "out").manifest
    with pytest.raises(DataError, match=r"no such file or folder"):
        build(tmp_path / "out", BuildOptions(inputs=[tmp_path / "typo"], overwrite=True))
    assert open_dataset(tmp_path / "out").manifest == before  # a slip costs nothing
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"bad\.jsonl line 1"):
        build(tmp_path / "out", BuildOptions(inputs=[texts, tmp_path / "bad.jsonl"], overwrite=True, vocab_size=300))
    with pytest.raises(DataError, match=r"is no data set"):  # half of the new one is not the old one
        open_dataset(tmp_path / "out")
    build(tmp_path / "out", BuildOptions(inputs=[texts / "sub"], overwrite=True, shard_bytes=500, **OPTIONS))
    assert verify(tmp_path / "out").faults == []


def test_inputs_of_one_name_are_told_apart(texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "texts"
    other.mkdir(parents=True)
    (other / "a.txt").write_text("Something else altogether. " * 20)
    result = build(tmp_path / "out", BuildOptions(inputs=[texts, other], validation=0, vocab_size=300))
    assert result.manifest.sources == ["texts", "texts-2"] and "validation" not in result.manifest.splits
    shard = Stream(open_dataset(tmp_path / "out"), "train").shard(0)
    assert shard.source_ids.tolist() == [0] * 40 + [1]


@pytest.fixture()
def words(tmp_path: Path) -> Path:
    """A dozen texts of 20 KB."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    known = np.asarray([f"w{i:x}" for i in range(3000)])
    for i in range(12):
        (tmp_path / "in" / f"{i}.txt").write_text(" ".join(known[rng.integers(0, 3000, 4000)]))
    return tmp_path / "in"


BUILD_AND_TELL = """if True:
    import sys
    from officina.trainer.data import build as b, parts, scan, shard_writer
    if __name__ == "__main__":
        parts.BATCH_CHARACTERS = 40_000
        scan.LEAST_PART_BYTES = int(sys.argv[3])
        close = shard_writer.ShardWriter.close
        def told(self, **how):
            print(self.path.name, flush=True)
            return close(self, **how)
        shard_writer.ShardWriter.close = told
        options = b.BuildOptions(inputs=[sys.argv[2]], vocab_size=1500, shard_bytes=20_000, workers=int(sys.argv[4]))
        b.build(sys.argv[1], options, lambda phase, done, total: print(phase, flush=True))"""


def build_and_tell(out: Path, inputs: Path, part_bytes: int = 16 << 20, workers: int = 1) -> subprocess.Popen:
    """A build in a process of its own that prints the names of phases, and of shards before they are finished."""
    return subprocess.Popen([sys.executable, "-c", BUILD_AND_TELL, out, inputs, str(part_bytes), str(workers)],
                            stdout=subprocess.PIPE, text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("moment", ["reading", "tokenizer", "merges", "tokens", "train-00000-00000.dls",
                                    "train-00000-00002.dls"])
def test_a_killed_build_is_no_data_set_and_goes_on(tmp_path: Path, words: Path, moment: str) -> None:
    """kill -9 while it reads, trains the tokenizer, tokenises or writes: never a data set unless it is whole, and the same
    command makes the same bytes without doing a finished shard again."""
    process = build_and_tell(tmp_path / "out", words)
    assert any(line.strip() == moment for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode == 0:
        pytest.skip("it was quicker than the kill")
    with pytest.raises(DataError, match=r"is no data set.*the same command goes on with it"):
        open_dataset(tmp_path / "out")
    kept = {path.name.replace("part", "train").replace(".json", ".dls")
            for path in (tmp_path / "out" / ".build").glob("part-*.json")}
    if moment not in ("tokens", "train-00000-00000.dls"):  # told as the first shard is begun: the kill may find it finished
        assert bool(kept) is (moment == "train-00000-00002.dls")
    with pytest.raises(DataError, match=r"unfinished build with other .*validation.*--overwrite") if kept else nullcontext():
        build(tmp_path / "out", BuildOptions(inputs=[words], vocab_size=1500, shard_bytes=20_000, validation=0.5))
        return
    again = build_and_tell(tmp_path / "out", words)
    written = {line.strip() for line in again.stdout if line.startswith("train")}
    assert again.wait() == 0 and kept and not written & kept and len(written | kept) > 3
    assert verify(tmp_path / "out").faults == [] and not (tmp_path / "out" / ".build").exists()
    assert build_and_tell(tmp_path / "whole", words).communicate() and content(tmp_path / "whole") == {
        name: part.replace(b'"name": "out"', b'"name": "whole"') for name, part in content(tmp_path / "out").items()}


def test_the_standard_library_is_there() -> None:
    from officina.trainer.data.sources import standard_library
    sources, about = standard_library()
    names = [name for name, _ in sources[0].files]
    assert "json/decoder.py" in names and names == sorted(names) and 5e6 < sources[0].bytes < 40e6
    assert not any(part in f"/{name}" for name in names for part in ("/site-packages/", "/tests/", "/test/"))
    assert about["licence"] == "PSF-2.0"


def test_a_zipped_standard_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"the standard library's sources are not at .*officina data build OUT FOLDER"):
        build(tmp_path / "out", BuildOptions())


def test_the_tokenizer_sees_a_bounded_sample_and_nothing_held_out(
        texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Spy:
        def __init__(self, *args: object) -> None:
            self.inner = Tokenizer(*args)

        def train_from_iterator(self, batches, trainer) -> None:
            batches = [list(batch) for batch in batches]
            seen.extend(text for batch in batches for text in batch)
            self.inner.train_from_iterator(batches, trainer)

        def __setattr__(self, name: str, value: object) -> None:
            object.__setattr__(self, name, value) if name == "inner" else setattr(self.inner, name, value)

        def to_str(self, pretty: bool) -> str:
            return self.inner.to_str(pretty=pretty)

        from_str = staticmethod(Tokenizer.from_str)

    monkeypatch.setattr("tokenizers.Tokenizer", Spy)
    build(tmp_path / "out", BuildOptions(inputs=[texts], **OPTIONS))
    held_out = {tuple(d) for d in documents(tmp_path / "out", "validation")}
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    texts_held_out = {tokenizer.decode(list(d[:-1])) for d in held_out}
    assert len(set(seen)) == 40 - len(held_out) and not texts_held_out & set(seen)
    seen.clear()
    monkeypatch.setattr(building, "SAMPLE_BYTES", 2000)
    build(tmp_path / "small", BuildOptions(inputs=[texts], **OPTIONS))
    assert 0 < sum(map(len, seen)) < 6000
