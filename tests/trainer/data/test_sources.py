"""Folders are read as they are: through links, once, with nothing passed over that could not be looked into."""

import json
import os
from pathlib import Path

import pytest

from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.formats import INCLUDE
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.sources import find_sources
from officina.trainer.errors import DataError


@pytest.fixture()
def tree(tmp_path: Path) -> Path:
    for name in ("tree/a.jsonl", "tree/sub/b.jsonl", "tree/sub/deep/c.JSONL", "tree/sub/notes.bin", "tree/.git/d.jsonl",
                 "tree/sub/.hidden.jsonl", "other/fin/e.jsonl", "other/fin/more/f.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return tmp_path / "tree"


def names(folder: Path, include: tuple[str, ...] = INCLUDE) -> list[str]:
    [source] = find_sources([folder], include)
    assert all(path == folder / name for name, path in source.files)
    return [name for name, _ in source.files]


OWN = ["a.jsonl", "sub/b.jsonl", "sub/deep/c.JSONL"]


def test_links_are_followed_and_each_folder_is_read_once_under_its_own_name(tree: Path) -> None:
    assert names(tree) == OWN
    (tree / "aa").symlink_to(tree / "sub")  # named before it
    (tree / "fin").symlink_to(tree.parent / "other" / "fin")
    (tree / "fin again").symlink_to(tree.parent / "other" / "fin")
    (tree.parent / "other" / "fin" / "loop").symlink_to(tree)
    (tree / "sub" / "file.jsonl").symlink_to(tree / "a.jsonl")
    assert names(tree) == ["a.jsonl", "fin/e.jsonl", "fin/more/f.jsonl", "sub/b.jsonl", "sub/deep/c.JSONL", "sub/file.jsonl"]


def test_patterns_are_of_names_or_of_names_in_folders(tree: Path) -> None:
    (tree / "fin").symlink_to(tree.parent / "other" / "fin")
    assert names(tree, ("sub/*.jsonl", "more/*")) == ["fin/more/f.jsonl", "sub/b.jsonl"]
    assert names(tree, ("sub/**/*.JSONL", "*.bin")) == ["sub/deep/c.JSONL", "sub/notes.bin"]


@pytest.mark.parametrize("target", ["nowhere", "gone"], ids=["dangling", "itself"])
def test_a_link_that_leads_nowhere_is_named(tree: Path, target: str) -> None:
    (tree / "sub" / "gone").symlink_to(target)
    with pytest.raises(DataError, match=rf"input {tree}: {tree}/sub/gone cannot be read \((No such|Too many).*Mend its"):
        find_sources([tree])
    (tree / "sub" / "gone").rename(tree / "sub" / ".gone")
    assert names(tree) == OWN


def test_a_folder_that_may_not_be_read_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read any, so the system's refusal is played."""
    scandir = os.scandir

    def refused(path: Path) -> object:
        if path == tree / "sub" / "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=rf"input {tree}: {tree}/sub/deep cannot be read \(Permission denied\)\. Mend its"):
        find_sources([tree])


def test_a_saved_dataset_that_lacks_a_file(tmp_path: Path) -> None:
    (tmp_path / "data-00000-of-00002.arrow").write_bytes(b"")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [
        {"filename": f"data-0000{i}-of-00002.arrow"} for i in (0, 1)]}))
    with pytest.raises(DataError, match=r"its state\.json lists data-00001-of-00002\.arrow, which is not there. Copy"):
        find_sources([tmp_path])


def test_names_that_are_not_utf_8_can_be_told_and_stored(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pq, ipc = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.ipc")
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    table = pyarrow.Table.from_pylist([{"text": "a text in columns " * 9}])
    (folder / "a.txt").write_text("a text " * 9)
    (folder / os.fsdecode(b"\xe8.txt")).write_bytes(b"caf\xe9")
    pq.write_table(table, tmp_path / "a.parquet")
    with ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(pyarrow.Table.from_pylist([{"text": "others " * 9}]))
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).rename(folder / os.fsdecode(b"\xe9-" + name.encode()))
    options = {"vocab_size": 300, "validation": 0, "workers": 1}
    stats = build(tmp_path / "out", BuildOptions(inputs=[folder], **options)).stats
    assert stats["train"]["documents"] == 3 and stats["left_out"]["undecodable_files"] == [r"caf\xe9/\xe8.txt"]
    assert open_dataset(tmp_path / "out").manifest.sources == [r"caf\xe9"]
    for name, content in (("a.jsonl", b"{"), ("a.parquet", b""), ("a.tar", b"x"), ("a.json", b"{"), ("a.json", b"{}"),
                          ("a.csv", b"\xff")):
        path = folder / os.fsdecode(b"\xe8-" + name.encode())
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            build(tmp_path / "bad", BuildOptions(inputs=[path], **options))
        assert rf"caf\xe9/\xe8-{name}" in str(caught.value) and str(caught.value).encode()
    for what in (folder / "x", folder.with_name(folder.name + "x")):
        with pytest.raises(DataError, match=r"caf\\xe9") as caught:
            find_sources([what])
        assert str(caught.value).encode()
