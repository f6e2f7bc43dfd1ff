"""A staged data set is the same one; wrong bytes, too little room and kills leave no data set behind."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_sets import tokenizer_info, write_tokens

from officina.trainer.data.croissant import write_croissant
from officina.trainer.data.describe import change
from officina.trainer.data.integrity import ORIGIN
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.policy import Policy, policy_of
from officina.trainer.data.remote import PIECES, REMOTE
from officina.trainer.data.removal import remove
from officina.trainer.data.stage import stage
from officina.trainer.data.verify import verify
from officina.trainer.errors import DataError


@pytest.fixture()
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "d"
    write_tokens(folder, {"train": [500] * 20, "validation": [90]}, shard_bytes=10_000,
                 tokenizer=tokenizer_info(hashlib.sha256(b"{}").hexdigest(), 10**6))
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "croissant.json").write_bytes(b"{}")
    (folder / ".build").mkdir()
    (folder / ".build" / "rest").write_bytes(b"x")
    remove(folder, ["shards/train-00001.dls:2"])
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and ".build" not in p.parts and p.name != ORIGIN}


def test_a_copy_is_whole_and_done_once(dataset: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = stage(dataset, tmp_path / "fast", progress=lambda done, total: seen.append((done, total)))
    assert content(tmp_path / "fast") == content(dataset) and verify(tmp_path / "fast").faults == []
    assert report.files == len(content(dataset)) and report.kept_bytes == 0
    assert seen[-1][0] == seen[-1][1] == report.copied_bytes and [d for d, _ in seen] == sorted(d for d, _ in seen)
    (tmp_path / "fast" / "shards" / "train-00002.dls").unlink()
    (tmp_path / "fast" / "shards" / "train-00001.dls").write_bytes(
        b"x" * (dataset / "shards" / "train-00001.dls").stat().st_size)  # the right size alone is not enough
    again = stage(dataset, tmp_path / "fast")
    assert content(tmp_path / "fast") == content(dataset)
    two = sum(e.bytes for e in open_dataset(dataset).shards if e.path[-5] in "12" and e.split == "train")
    assert two <= again.copied_bytes < two + 2000 and again.kept_bytes > 0


def test_a_copy_does_not_bring_removed_documents_back(dataset: Path, tmp_path: Path) -> None:
    """The repair from a copy that was made before the request."""
    stage(dataset, tmp_path / "copy")
    remove(dataset, ["shards/train-00000.dls:1"])
    with pytest.raises(DataError, match=r"removed from it on request \(removed/00002\.jsonl\), but not from "
                       rf"{tmp_path / 'copy'}: .*\(officina data remove DATASET IDS\)"):
        stage(tmp_path / "copy", dataset)
    assert len(open_dataset(dataset).manifest.removals) == 2
    remove(tmp_path / "copy", ["shards/train-00000.dls:1"])
    stage(tmp_path / "copy", dataset)
    assert content(dataset) == content(tmp_path / "copy")


def test_a_mended_data_set_goes_on_saying_what_it_says(dataset: Path, tmp_path: Path) -> None:
    """A repair from a copy that was made before licence and conditions of use changed takes neither back."""
    copy, shard = tmp_path / "copy", dataset / "shards" / "train-00001.dls"
    stage(dataset, copy)
    change(dataset, licence="CC-BY-NC-4.0", policy=Policy(not_after="2030-12-31"))
    write_croissant(dataset)
    wanted = content(dataset)
    shard.write_bytes(bytes(shard.stat().st_size))
    assert stage(copy, dataset).own_words == ["policy.json", "croissant.json", "dataset.json"]
    assert content(dataset) == wanted and not (dataset / ORIGIN).exists()
    remove(copy, ["shards/train-00000.dls:1"])  # but what must not be trained on there is not trained on here either
    stage(copy, dataset)
    assert open_dataset(dataset).manifest.removals == open_dataset(copy).manifest.removals and verify(dataset).faults == []
    assert open_dataset(dataset).manifest.licence == "CC-BY-NC-4.0"
    assert stage(dataset, copy).own_words == [] and content(copy) == content(dataset)  # a copy takes on what it is a copy of


@pytest.mark.parametrize("damaged", ["policy.json", "dataset.json", "shards.jsonl", "croissant.json"])
def test_what_a_data_set_says_is_mended_too(dataset: Path, tmp_path: Path, damaged: str) -> None:
    change(dataset, policy=Policy(not_after="2030-12-31"))
    write_croissant(dataset)
    stage(dataset, tmp_path / "copy")
    wanted = content(dataset)
    (dataset / damaged).write_bytes(b"x")
    if damaged == "croissant.json":  # what it says can be told from the rest, and is left alone where that stands
        (dataset / damaged).unlink()
    stage(tmp_path / "copy", dataset)
    assert content(dataset) == wanted and not (dataset / ORIGIN).exists()


def test_a_data_set_that_cannot_be_read_keeps_its_lists_of_removed_documents(dataset: Path, tmp_path: Path) -> None:
    stage(dataset, tmp_path / "copy")
    remove(dataset, ["shards/train-00000.dls:1"])
    (dataset / "dataset.json").write_bytes(b"{")
    with pytest.raises(DataError, match=r"removed from it on request \(removed/00002\.jsonl\), but not from"):
        stage(tmp_path / "copy", dataset)


def test_a_disk_that_is_full_at_any_moment_is_told_and_the_copy_goes_on(dataset: Path, mount: Callable[..., Path]) -> None:
    disk, told = mount("size=40k"), []
    for pages in range(10, 100):
        mount(f"size={4 * pages}k", again=True)
        try:
            stage(dataset, disk / "fast")
            break
        except DataError as full:
            told.append(str(full))
        assert not (disk / "fast" / "dataset.json").exists()
    assert content(disk / "fast") == content(dataset) and verify(disk / "fast").faults == []
    said = "\n".join(told)
    assert "free. Nothing was copied" in said and "cannot be copied to" in said
    assert f"{disk}/fast: cannot be written (No space left on device). Make room there" in said


def test_a_whole_copy_asks_no_store(dataset: Path, tmp_path: Path) -> None:
    """Neither one that was on demand before, nor the copy of a copy."""
    stage(dataset, tmp_path / "fast")
    for folder in (dataset, tmp_path / "fast"):
        (folder / REMOTE).write_text('{"url": "s3://bucket/d", "budget_bytes": 1}')
    (tmp_path / "fast" / PIECES).mkdir()
    stage(dataset, tmp_path / "fast")
    assert not (tmp_path / "fast" / REMOTE).exists() and not (tmp_path / "fast" / PIECES).exists()
    assert verify(tmp_path / "fast").faults == []


def test_wrong_files_are_all_named_and_none_is_copied(dataset: Path, tmp_path: Path) -> None:
    for name in ("train-00000.dls", "train-00003.dls"):
        path = dataset / "shards" / name
        damaged = bytearray(path.read_bytes())
        damaged[5000] ^= 1
        path.write_bytes(damaged)
    (dataset / "shards" / "validation-00000.dls").unlink()
    with pytest.raises(DataError, match=r"cannot be staged:\n.*train-00000\.dls: sha256 .*\n.*train-00003\.dls: sha256 .*\n.*"
                                        r"validation-00000\.dls: cannot be copied"):
        stage(dataset, tmp_path / "fast")
    with pytest.raises(DataError, match=r"is no data set"):
        open_dataset(tmp_path / "fast")
    left = {path.name for path in (tmp_path / "fast" / "shards").iterdir()}
    assert "train-00001.dls" in left and not left & {"train-00000.dls", "train-00003.dls"}
    assert not [name for name in left if name.endswith(".tmp")]


def test_the_budget_and_the_room_are_asked_for_first(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"bytes, more than --budget 1,000\. Nothing was copied\. Try: --budget 1G"):
        stage(dataset, tmp_path / "fast", budget_bytes=1000)
    assert not (tmp_path / "fast").exists()
    free = os.statvfs(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 999, "total": free.f_blocks}))
    with pytest.raises(DataError, match=r"more bytes, but .* has 999 free\. Nothing was copied"):
        stage(dataset, tmp_path / "fast")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be made"):
        stage(dataset, tmp_path / "file" / "fast")


def test_another_data_set_is_not_overwritten(dataset: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "other", {"train": [5]})
    with pytest.raises(DataError, match=r"holds another data set. Name an empty folder"):
        stage(dataset, tmp_path / "other")


def test_what_is_no_part_of_the_data_set_is_not_copied(dataset: Path, tmp_path: Path) -> None:
    """The inputs of a sealed set may lie in its folder, and went with every copy in plain text."""
    before = content(dataset)
    (dataset / "notes.jsonl").write_text('{"text": "what was sealed"}')
    (dataset / "ids.json").write_text("[]")
    stage(dataset, tmp_path / "fast")
    assert content(tmp_path / "fast") == before
    (dataset / "policy.json").write_text("{}")  # not bound: it refuses every use, of a copy too
    stage(dataset, tmp_path / "again")
    with pytest.raises(DataError, match=r"again/policy\.json: dataset\.json does not name this policy"):
        policy_of(open_dataset(tmp_path / "again"))


def test_one_process_stages_at_a_time(dataset: Path, tmp_path: Path) -> None:
    """The tasks of a node begin at the same moment: two that wrote the same file called a copy whole that was not."""
    script = "import sys; from officina.trainer.data.stage import stage; stage(sys.argv[1], sys.argv[2])"
    told: list[str] = []

    def second(done: int, total: int) -> None:
        if not told:
            told.append(subprocess.run([sys.executable, "-c", script, dataset, tmp_path / "fast"], capture_output=True,
                                       text=True, check=False).stderr)

    stage(dataset, tmp_path / "fast", progress=second)
    assert f"{tmp_path / 'fast'} is being built or changed by another process. Wait for it" in told[0]
    assert content(tmp_path / "fast") == content(dataset) and not (tmp_path / "fast" / ".build").exists()


def test_what_is_said_while_it_is_copied_is_not_passed_over(dataset: Path, tmp_path: Path) -> None:
    def changed(done: int, total: int) -> None:
        if len(open_dataset(dataset).manifest.removals) == 1:
            remove(dataset, ["shards/train-00000.dls:1"])

    with pytest.raises(DataError, match=r"dataset\.json was changed while it was copied\. Give the same command again"):
        stage(dataset, tmp_path / "fast", progress=changed)
    assert not (tmp_path / "fast" / "dataset.json").exists()
    stage(dataset, tmp_path / "fast", progress=changed)
    assert len(open_dataset(tmp_path / "fast").manifest.removals) == 2 and verify(tmp_path / "fast").faults == []


def test_a_kill_leaves_no_data_set_and_the_copy_goes_on(tmp_path: Path) -> None:
    write_tokens(tmp_path / "d", {"train": [np.int64(2_000_000)] * 6}, shard_bytes=8_000_000)
    script = ("import sys; from officina.trainer.data.stage import stage; "
              "stage(sys.argv[1], sys.argv[2], None, lambda done, total: print(done, flush=True))")
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "d", tmp_path / "fast"], stdout=subprocess.PIPE,
                               text=True)
    assert any(int(line) > 20_000_000 for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode:
        with pytest.raises(DataError, match=r"is no data set"):
            open_dataset(tmp_path / "fast")
        assert stage(tmp_path / "d", tmp_path / "fast").kept_bytes >= 8_000_000
    assert verify(tmp_path / "fast").faults == []
