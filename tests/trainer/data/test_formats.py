"""Every input format gives the same rows, a piece of a file gives its own, and what is cut off or missing is said."""

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from officina.trainer.data import formats
from officina.trainer.data.formats import BadRow, Piece, pieces_of, rows
from officina.trainer.data.sources import find_sources
from officina.trainer.errors import DataError

ROWS = [{"text": f"Döcument {i} " + "word " * (i % 7), "id": f"d{i}", "n": i} for i in range(50)]


def read(path: Path, most_bytes: int = 1 << 30) -> list:
    return [row for piece in pieces_of("in", path.name, path, most_bytes) for _, row, _ in rows(piece)]


def json_lines(path: Path) -> Path:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    elif path.name.endswith(".zst"):  # two frames, as tools that compress in parallel write
        zstd = pytest.importorskip("zstandard")
        content = b"".join(zstd.ZstdCompressor().compress(part) for part in (content[:777], content[777:]))
    path.write_bytes(content)
    return path


def parquet(path: Path) -> Path:
    pyarrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=8)
    return path


def arrow(path: Path, form: str) -> Path:
    pyarrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
    table = pyarrow.Table.from_pylist(ROWS)
    with (ipc.new_file if form == "file" else ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith(".gz") else "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "b.arrow"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".arrow"):
        arrow(path, "file" if name.startswith("a") else "stream")
    else:
        parquet(path) if name.endswith(".parquet") else json_lines(path)
    assert read(path) == ROWS
    assert read(path, most_bytes=300) == ROWS  # in pieces where the format has them
    assert (len(pieces_of("in", name, path, 300)) > 1) is (name in ("a.jsonl", "a.parquet"))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_webdataset_samples_are_members_of_one_name(tmp_path: Path, name: str) -> None:
    path = tar(tmp_path / name, [
        ("x/0001.txt", b"first"), ("x/0001.json", b'{"lang": "fi", "text": "not this"}'), ("x/0001.jpg", b"\xff"),
        ("x/0002.json", b'{"text": "second"}'), ("x/0003.jpg", b"\xff"), ("x/0004.json", b"[1]"), ("x/0005.txt", b"fifth")])
    assert read(path) == [{"__key__": "x/0001", "text": b"first", "lang": "fi"}, {"__key__": "x/0002", "text": "second"},
                          BadRow("its .json is no JSON object but a list"), {"__key__": "x/0005", "text": b"fifth"}]


def test_a_member_is_not_taken_for_the_one_before_of_its_name(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [("1.txt", b"first"), ("1.txt", b"second"), ("2.json", b"{}"), ("2.txt", b"third")])
    assert read(path) == [BadRow("there are two members 1.txt"), {"__key__": "2", "text": b"third"}]


def pack(path: Path, content: bytes) -> Path:
    if path.suffix == ".zst":
        content = pytest.importorskip("zstandard").compress(content)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture()
def archive(tmp_path: Path) -> bytes:
    """Four members of 1,024 bytes each, an end mark of two blocks, and zeros that fill the record."""
    content = tar(tmp_path / "whole.tar", [(f"{i}.txt", f"text {i}".encode()) for i in range(4)]).read_bytes()
    assert len(content) == 10240 and not any(content[4096:])
    return content


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.zst"])
def test_a_tar_that_is_cut_or_damaged_anywhere_is_named(tmp_path: Path, archive: bytes, name: str) -> None:
    flipped, zeroed = bytearray(archive), bytearray(archive)
    flipped[1024 + 10] ^= 1
    zeroed[1024:1536] = bytes(512)
    for content, told in (
            (archive[:2048], "at byte 2048 neither a member nor the archive's end: empty header"),
            (archive[:2048 + 300], "at byte 2048 neither a member nor the archive's end: truncated header"),
            (archive[:4096], "at byte 4096 neither a member nor the archive's end: empty header"),
            (flipped, "at byte 1024 neither a member nor the archive's end: bad checksum"),
            (zeroed, "its end mark is at byte 1024, and more follows it; tar --concatenate joins archives"),
            (archive + archive, "its end mark is at byte 4096, and more follows it")):
        with pytest.raises(DataError, match=rf"{name}: cannot be read \({told}"):
            read(pack(tmp_path / name, bytes(content)))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.zst"])
def test_a_tar_ends_with_one_block_of_zeros_or_many(tmp_path: Path, archive: bytes, name: str) -> None:
    for content in (archive[:4096 + 512], archive[:4096 + 1024], archive, archive + bytes(3 << 20)):
        assert [row["text"] for row in read(pack(tmp_path / name, content))] == [b"text 0", b"text 1", b"text 2", b"text 3"]


def test_a_packed_tar_is_read_to_its_end(tmp_path: Path, archive: bytes) -> None:
    path = pack(tmp_path / "a.tar.gz", archive)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"a\.tar\.gz: cannot be read"):
        read(path)


def test_holes_in_json_lines_are_bad_rows(tmp_path: Path) -> None:
    """`json.loads` takes bytes with NULs for UTF-16 or UTF-32."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text":"good one"}\n' + bytes(4097) + b'{"text":"after"}\n' + bytes(64))
    hole = BadRow("no JSON object but NUL bytes: the file has a hole, or is UTF-16")
    assert read(tmp_path / "a.jsonl") == [{"text": "good one"}, hole, hole]
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "\xe9"}\n', encoding="utf-16")
    assert read(tmp_path / "b.jsonl") == [hole] * 3
    (tmp_path / "c.jsonl").write_text('{"text": "\xe9\\u0000"}\n', encoding="utf-8-sig")
    assert read(tmp_path / "c.jsonl") == [{"text": "\xe9\0"}]


@pytest.mark.parametrize("window", ["90", "a8"])
def test_zstd_with_long_windows_is_read(tmp_path: Path, window: str) -> None:
    """As `zstd --long=28` and `--long=31` write it: magic, no size, window, one block as it is."""
    pytest.importorskip("zstandard")
    content = b'{"text": "far back"}'
    frame = bytes.fromhex("28b52ffd" "00" + window) + (len(content) << 3 | 1).to_bytes(3, "little") + content
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    assert read(tmp_path / "a.jsonl.zst") == [{"text": "far back"}]


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(
    inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4), max_leaves=12)
JUNK = [b"\\ud800", b"\\u0000", b"\\x", b"\xed\xa0\x80", b"\xff", b"\x00", b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"inf", b"-0",
        b"01", b"1E400", b".5", b"+1", b"12345678901234567890123", b'"a":1,"a":2,', b"\t", b"\x0c", b",", b"}", b'"',
        b"9" * 5000, b"[" * 3000]


@given(VALUES, st.booleans(), st.lists(st.tuples(st.integers(0, 200), st.sampled_from(JUNK)), max_size=3))
@settings(deadline=None, max_examples=1000)
def test_lines_are_read_as_the_standard_library_reads_them(value: object, ascii: bool, cuts: list) -> None:
    line = json.dumps({"text": value}, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    for at, junk in cuts:
        line = line[:at] + junk + line[at:]

    def told(read) -> str:
        try:
            return repr(read(line))
        except (ValueError, RecursionError) as exc:
            return type(exc).__name__

    assert told(formats._loads) == told(lambda line: json.loads(line.decode("utf-8-sig")))
    assert isinstance(formats._parsed(line), dict | bytes | BadRow)


@given(st.lists(st.text(st.sampled_from("ab\u00e9\U0001f600"), max_size=9), max_size=30), st.integers(1, 60), st.booleans())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_hold_every_line_once_and_know_its_number(tmp_path: Path, texts: list[str], most: int, ended: bool) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"t": text, "line": i}, ensure_ascii=False) for i, text in enumerate(texts, 1))
                    + "\n" * (ended and bool(texts)))
    found = [(row, piece.place(number)) for piece in pieces_of("in", "x.jsonl", path, most)
             for number, row, _ in rows(piece)]
    assert [row["t"] for row, _ in found] == texts
    assert [place for row, place in found] == [f" line {row['line']}" for row, _ in found]


def test_rows_of_later_row_groups_know_their_number(tmp_path: Path) -> None:
    pieces = pieces_of("in", "a.parquet", parquet(tmp_path / "a.parquet"), 300)
    assert [p.place(n) for p in pieces for n, _, _ in rows(p)] == [f" row {i}" for i in range(1, 51)]


@pytest.mark.parametrize(("name", "told"), [
    ("a.jsonl.gz", "cannot be read"), ("a.jsonl.zst", r"cannot be read \(the compressed file ends in the middle"),
    ("a.parquet", "is no Parquet file"), ("a.arrow", "cannot be read"), ("a.tar", "cannot be read")])
def test_files_that_are_cut_off_are_named(tmp_path: Path, name: str, told: str) -> None:
    path = tmp_path / name
    if name == "a.tar":
        tar(path, [(f"{i}.txt", b"x" * 2000) for i in range(9)])
    elif name == "a.arrow":
        arrow(path, "stream")
    else:
        parquet(path) if name == "a.parquet" else json_lines(path)
    path.write_bytes(path.read_bytes()[:-300 if name != "a.tar" else 2500])
    with pytest.raises(DataError, match=rf"{path}: {told}"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.tar.gz"])
def test_a_compressed_file_of_no_bytes_is_cut_off_too(tmp_path: Path, name: str) -> None:
    pytest.importorskip("zstandard")
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="cannot be read .a compressed file is never empty"):
        read(tmp_path / name)


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    for module in ("pyarrow", "pyarrow.parquet", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, package in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")):
        with pytest.raises(DataError, match=rf"needs the package {package}.*pip install 'officina\[data\]'"):
            read(tmp_path / name)


def test_only_the_columns_that_are_asked_for_are_read(tmp_path: Path) -> None:
    for path in (parquet(tmp_path / "a.parquet"), arrow(tmp_path / "a.arrow", "stream")):
        [piece] = pieces_of("in", path.name, path, 1 << 30)
        assert next(rows(piece, ["text", "lang"]))[1] == {"text": ROWS[0]["text"]}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_cells_that_python_cannot_hold(tmp_path: Path, name: str) -> None:
    """A text that is not UTF-8 is that text's bytes, as a line of JSON is; a time beyond Python's is as Arrow writes it."""
    pyarrow, pq, ipc = (pytest.importorskip(module) for module in ("pyarrow", "pyarrow.parquet", "pyarrow.ipc"))
    texts = pyarrow.array([b"caf\xe9", "café".encode(), b"x"])
    times = pyarrow.array([10**15, 10**15, 0], pyarrow.timestamp("ms"))
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers()), "ts": times})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    bad, far, good = read(tmp_path / name)
    assert bad == b"caf\xe9" and (far["text"], good["text"]) == ("café", "x")
    assert isinstance(far["ts"], str) and good["ts"].year == 1970


def test_a_saved_dataset_is_its_listed_files(tmp_path: Path) -> None:
    """As `datasets.Dataset.save_to_disk` writes it, with a cache beside it that is no part of it."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "cache-1234.arrow"):
        arrow(folder / name, "stream")
    (folder / "state.json").write_text(json.dumps({"_data_files": [
        {"filename": f"data-0000{i}-of-00002.arrow"} for i in (0, 1)]}))
    [source] = find_sources([folder])
    assert [name for name, _ in source.files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    (tmp_path / "dict" / "train").mkdir(parents=True)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "dict" / "train" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=rf"saved DatasetDict of train.*Name the splits to read: {tmp_path}/dict/train"):
        find_sources([tmp_path / "dict"])


def test_the_formats_are_told_by_name() -> None:
    names = ("a.jsonl", "a.ndjson.gz", "a.tar.zst", "a.arrow", "a.py", "README", "a.parquet")
    assert [formats.format_of(name) for name in names] == ["json", "json", "tar", "arrow", "text", "text", "parquet"]
    assert Piece("in", "a", "a", "text", 0, 0, 1, 1).place(1) == ""


@pytest.mark.parametrize("name", ["DATA.JSONL", "Data.Jsonl.GZ", "DATA.JSONL.ZST", "DATA.PARQUET", "DATA.ARROW"])
def test_suffixes_may_be_in_upper_case(tmp_path: Path, name: str) -> None:
    lower = tmp_path / name.lower()
    if name.startswith("DATA.JSONL") or name.endswith("GZ"):
        json_lines(lower)
    else:
        parquet(lower) if name.endswith("PARQUET") else arrow(lower, "stream")
    path = lower.rename(tmp_path / name)
    assert read(path) == ROWS
    assert [file for file, _ in find_sources([tmp_path])[0].files] == [name]
