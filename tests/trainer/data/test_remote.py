"""Data sets in stores, over HTTP and over S3's protocol, from servers that are slow, cut off, lie and refuse."""

import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_run, write_tokens
from stores import Fault, Served, answer, busy, cut_off, over_http, over_s3, refused, slow, sound, too_short, whole, wrong

from officina.trainer.data import remote
from officina.trainer.data.chat import CHAT_TEMPLATE
from officina.trainer.data.croissant import CROISSANT
from officina.trainer.data.describe import change
from officina.trainer.data.integrity import ORIGIN
from officina.trainer.data.loader import Loader
from officina.trainer.data.manifest import MANIFEST, open_dataset
from officina.trainer.data.megatron import export_megatron
from officina.trainer.data.policy import Policy
from officina.trainer.data.remote import PIECES, REMOTE, TRIES, Pieces, Remote
from officina.trainer.data.removal import remove
from officina.trainer.data.shards import GRANULE_BYTES, HEADER_BYTES
from officina.trainer.data.stage_remote import stage_from_store
from officina.trainer.data.stats import statistics
from officina.trainer.data.verify import verify
from officina.trainer.errors import DataError

for needed in ("s3fs", "aiohttp", "moto"):
    pytest.importorskip(needed)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)
    monkeypatch.setattr(remote, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(remote, "PIECE_BYTES", GRANULE_BYTES)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of five blocks each."""
    folder = tmp_path_factory.mktemp("store") / "corpus"
    lengths = np.random.default_rng(2).integers(200, 4000, 300)
    write_tokens(folder, {"train": lengths[np.cumsum(lengths) < 600_000].tolist()}, shard_bytes=1_250_000)
    return folder


def digests(folder: Path, steps: int = 12, **how: object) -> list[int]:
    with Loader(make_run({"a": (folder, 1)}, seq_len=512, rows=32, **how), rank=0, world_size=1, position=0) as loader:
        return [loader.next_step().digest for _ in range(steps)]


def epoch(folder: Path) -> tuple[list[int], set[str], list[str]]:
    """Digests of an epoch's steps, what they name as lost, and what is said of blocks."""
    with Loader(make_run({"a": (folder, 1)}, seq_len=512, rows=32), rank=0, world_size=1, position=0) as loader:
        found = [loader.next_step() for _ in range(37)]
    return ([step.digest for step in found], {str(step.lost["a"]) for step in found if step.lost},
            [text for step in found for text in step.mended])


@pytest.fixture(scope="module")
def stores(corpus: Path) -> Iterator[dict[str, Served]]:
    """The data set in each kind of store."""
    with over_http(corpus) as of_http, over_s3(corpus) as of_s3:
        yield {"http": of_http, "s3": of_s3}


@pytest.fixture(params=["http", "s3"])
def served(request: pytest.FixtureRequest, stores: dict[str, Served]) -> Served:
    """A store without faults so far."""
    stores[request.param].faults.clear()
    return stores[request.param]


only_http = pytest.mark.parametrize("served", ["http"], indirect=True)
"""What no protocol changes."""


@pytest.fixture
def bucket(stores: dict[str, Served]) -> str:
    """URL of the data set in S3."""
    stores["s3"].faults.clear()
    return stores["s3"].url


# ---- S3 ------------------------------------------------------------------------------------------------------------
def test_s3_on_demand_gives_the_same_rows_and_keeps_its_budget(bucket: str, corpus: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("officina.trainer.data.stage_remote.LEAST_BUDGET_BYTES", 1)
    stage_from_store(bucket, tmp_path / "here", 4 * GRANULE_BYTES, on_demand=True)
    assert not (tmp_path / "here" / "shards").exists() and (tmp_path / "here" / REMOTE).exists()
    for block in (1, 64):
        assert digests(tmp_path / "here", shuffle_block=block) == digests(corpus, shuffle_block=block)
        kept = list((tmp_path / "here" / PIECES).iterdir())
        assert 0 < sum(path.stat().st_size for path in kept) <= 4 * GRANULE_BYTES and not any(".tmp" in p.name for p in kept)


def test_s3_staged_whole_is_the_data_set(bucket: str, corpus: Path, tmp_path: Path) -> None:
    first = stage_from_store(bucket, tmp_path / "here")
    assert verify(tmp_path / "here").faults == [] and not (tmp_path / "here" / REMOTE).exists()
    for path in corpus.rglob("*"):
        if path.is_file():
            assert (tmp_path / "here" / path.relative_to(corpus)).read_bytes() == path.read_bytes()
    again = stage_from_store(bucket, tmp_path / "here")
    assert again.kept_bytes > 2_000_000 and again.copied_bytes < first.copied_bytes / 10
    with pytest.raises(DataError, match=r"s3://bucket/nothing is no data set"):
        stage_from_store("s3://bucket/nothing", tmp_path / "other")
    with pytest.raises(DataError, match=r"more than --budget 1,000.*Nothing was copied"):
        stage_from_store(bucket, tmp_path / "small", 1000)
    with pytest.raises(DataError, match=r"--budget 1000.*Try: --budget"):
        stage_from_store(bucket, tmp_path / "small", 1000, on_demand=True)


def test_a_set_that_was_on_demand_and_is_staged_whole_asks_the_store_no_more(bucket: str, corpus: Path, tmp_path: Path) -> None:
    stage_from_store(bucket, tmp_path / "here", on_demand=True)
    digests(tmp_path / "here", 1)
    stage_from_store(bucket, tmp_path / "here")  # as `officina data verify` says
    assert not (tmp_path / "here" / REMOTE).exists() and not (tmp_path / "here" / PIECES).exists()
    assert verify(tmp_path / "here").faults == []


def test_processes_beside_each_other_keep_the_budget_together(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    ranks = [Pieces(tmp_path, Remote(url, 100_000)) for _ in range(8)]
    for number in range(60):
        for rank, pieces in enumerate(ranks):
            pieces.keep(f"{rank}-{number}", bytes(500))
        assert sum(path.stat().st_size for path in pieces.folder.iterdir()) <= 100_000


# ---- faults --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", [cut_off, too_short, slow, wrong, busy])
def test_a_passing_fault_changes_nothing(served: Served, corpus: Path, tmp_path: Path, fault: Fault) -> None:
    """At the header, at the footer, and at blocks."""
    stage_from_store(served.url, tmp_path / "here", on_demand=True)
    served.faults += [fault, sound, fault, sound, sound, fault, fault]
    assert digests(tmp_path / "here") == digests(corpus)
    assert not served.faults


def test_a_store_that_refuses_or_is_gone_stops_the_run_with_its_name(served: Served, tmp_path: Path) -> None:
    stage_from_store(served.url, tmp_path / "here", on_demand=True)
    served.faults += [whole]
    with pytest.raises(DataError, match=r"this server gives whole files alone"):
        stage_from_store(served.url, tmp_path / "other", on_demand=True)
    for reads_all in (verify, statistics, lambda here: remove(here, ["x"]), lambda here: export_megatron(here, tmp_path / "m")):
        with pytest.raises(DataError, match=r"its shards are in (http|s3):.*this reads all of them.*without --on-demand"):
            reads_all(tmp_path / "here")
    served.faults += [refused]
    with pytest.raises(DataError, match=r"/corpus/shards/train-0000\d\.dls: the store refuses \(.*(403|Access Denied).*"
                                        "credentials"):
        digests(tmp_path / "here")
    served.faults[:] = [busy] * 1000
    in_time = "nothing came in time"  # S3's driver asks again by itself for as long as we wait
    with pytest.raises(DataError, match=rf"train-0000\d\.dls: cannot be read after 4 tries .*(503|{in_time}).*data stage"):
        digests(tmp_path / "here")


def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"http://\.\.\.@store\.example: the URL carries credentials") as caught:
        stage_from_store("http://me:secret@store.example/corpus", tmp_path / "out", 2 << 30, on_demand=True)
    assert "secret" not in str(caught.value) and not (tmp_path / "out").exists()


def test_s3_without_credentials_is_told_what_to_give(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in (("HOME", str(tmp_path)), ("AWS_EC2_METADATA_DISABLED", "true")):  # nor where it looks next
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=r"dataset\.json: the store refuses \(NoCredentialsError.*~/\.aws/credentials"):
        stage_from_store(bucket, tmp_path / "here")
    S3FileSystem.clear_instance_cache()


def one_bit_wrong(first_byte: int, at: int) -> tuple[Fault, list[str]]:
    """A fault of every request for the part of the first shard that begins at `first_byte`, and those requests."""
    asked: list[str] = []

    def fault(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
        if "train-00000" not in handler.path or f"bytes={first_byte}-" not in handler.headers["Range"]:
            return False
        asked.append(handler.headers["Range"])
        return answer(handler, content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])

    return fault, asked


def test_a_block_that_is_always_wrong_is_set_aside_and_never_kept(served: Served, corpus: Path, tmp_path: Path) -> None:
    stage_from_store(served.url, tmp_path / "here", on_demand=True)
    served.faults += [one_bit_wrong(HEADER_BYTES + GRANULE_BYTES, 9)[0]] * 10_000
    assert epoch(tmp_path / "here")[1] == {"{'shards/train-00000.dls': [1]}"}
    kept = {piece.name for piece in (tmp_path / "here" / PIECES).iterdir()}
    name = open_dataset(corpus).shards[0].sha256[:24]
    assert f"{name}-00001" in kept and f"{name}-00002" not in kept


def test_a_piece_that_stays_wrong_is_asked_for_only_when_it_is_met(served: Served, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each row of the sound blocks that it holds beside the wrong one."""
    monkeypatch.setattr(remote, "PIECE_BYTES", 4 * GRANULE_BYTES)
    stage_from_store(served.url, tmp_path / "here", on_demand=True)
    fault, asked = one_bit_wrong(HEADER_BYTES, GRANULE_BYTES + 9)
    served.faults += [fault] * 10_000
    assert epoch(tmp_path / "here")[1] == {"{'shards/train-00000.dls': [1]}"}
    assert TRIES <= len(asked) <= 2 * TRIES


@only_http
def test_a_store_that_is_changed_under_a_run_stops_it(served: Served, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that were sound when they were checked, and have gone to make room since."""
    monkeypatch.setattr("officina.trainer.data.stage_remote.LEAST_BUDGET_BYTES", 1)
    stage_from_store(served.url, tmp_path / "here", GRANULE_BYTES, on_demand=True)
    with Loader(make_run({"a": (tmp_path / "here", 1)}, seq_len=512, rows=32, prefetch_batches=1), rank=0, world_size=1,
                position=0) as loader:
        for _ in range(40):  # more than an epoch: every block was checked
            loader.next_step()
        served.faults += [lambda handler, content: answer(handler, bytes(len(content)))] * 10_000
        with pytest.raises(DataError, match=r"train-0000\d\.dls: bytes \d+ to \d+ are not those any more .*Restore the file"):
            for _ in range(10):
                loader.next_step()


@only_http
def test_removed_documents_of_a_set_in_a_store_are_not_read(served: Served, corpus: Path, tmp_path: Path) -> None:
    asked = Path(shutil.copytree(corpus, corpus.parent / "asked"))
    (asked / CHAT_TEMPLATE).write_text("{{ messages }}")
    remove(asked, [f"shards/train-00000.dls:{i}" for i in range(30)])
    stage_from_store(served.url.replace("corpus", "asked"), tmp_path / "here", on_demand=True)
    assert digests(tmp_path / "here") == digests(asked) != digests(corpus)
    assert (tmp_path / "here" / CHAT_TEMPLATE).read_text() == "{{ messages }}"
    (asked / "removed" / "00001.jsonl").unlink()
    with pytest.raises(DataError, match=r"asked/removed/00001\.jsonl: is not there, but belongs to the data set\. Restore it"):
        stage_from_store(served.url.replace("corpus", "asked"), tmp_path / "again")


def test_conditions_and_lists_of_a_store_are_those_that_its_manifest_names(corpus: Path, tmp_path: Path) -> None:
    """A copy that was called whole refused every use."""
    with over_http(shutil.copytree(corpus, tmp_path / "store")) as store:
        change(tmp_path / "store", policy=Policy(purpose=("research",)))
        remove(tmp_path / "store", ["shards/train-00000.dls:3"])
        for name in ("policy.json", "removed/00001.jsonl"):
            sound_content = (tmp_path / "store" / name).read_bytes()
            (tmp_path / "store" / name).write_bytes(sound_content + b"\n")
            for on_demand in (False, True):
                with pytest.raises(DataError, match=rf"{store.url}/{name}: is not the one that dataset\.json names"):
                    stage_from_store(store.url, tmp_path / "here", on_demand=on_demand)
            (tmp_path / "store" / name).write_bytes(sound_content)
        stage_from_store(store.url, tmp_path / "here")
        assert verify(tmp_path / "here").faults == []


def test_what_is_mended_from_a_store_goes_on_saying_what_it_says(served: Served, corpus: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(corpus, tmp_path / "own"))
    change(own, licence="CC-BY-NC-4.0")
    wanted = (own / MANIFEST).read_bytes()
    damage(own, 1)
    assert stage_from_store(served.url, own).own_words == [CROISSANT, MANIFEST]
    assert (own / MANIFEST).read_bytes() == wanted and verify(own).faults == [] and not (own / ORIGIN).exists()
    stage_from_store(served.url, tmp_path / "copy")
    change(tmp_path / "copy", licence="CC-BY-NC-4.0")
    assert stage_from_store(served.url, tmp_path / "copy").own_words == []
    assert (tmp_path / "copy" / MANIFEST).read_bytes() == (corpus / MANIFEST).read_bytes()


@only_http
def test_a_piece_damaged_here_is_fetched_again(served: Served, corpus: Path, tmp_path: Path) -> None:
    stage_from_store(served.url, tmp_path / "here", on_demand=True)
    wanted = digests(tmp_path / "here")
    for first in (0, 1):  # with the header, and without
        assert len(list((tmp_path / "here" / PIECES).iterdir())) == 14  # without a budget, all of them stay
        for path in sorted((tmp_path / "here" / PIECES).glob(f"*-0000[{first}-9]")):
            content = bytearray(path.read_bytes())
            content[72] ^= 1  # of a footer: in the ends of documents
            path.write_bytes(content)
        assert digests(tmp_path / "here") == wanted == digests(corpus)


def test_wrong_files_are_named_when_staged_whole(served: Served, tmp_path: Path) -> None:
    served.faults += [wrong]
    with pytest.raises(DataError, match=r"cannot be staged:\n  - .*train-00000\.dls: sha256"):
        stage_from_store(served.url, tmp_path / "here")
    assert not (tmp_path / "here" / MANIFEST).exists() and not list((tmp_path / "here").rglob("*.tmp"))
    stage_from_store(served.url, tmp_path / "here")
    shutil.rmtree(tmp_path / "here" / "shards")
    with pytest.raises(DataError, match=r"cannot be opened"):
        digests(tmp_path / "here")  # a whole copy does not go to the store


def damage(copy: Path, *blocks: int) -> None:
    """Of the copy's first shard."""
    path = copy / "shards" / "train-00000.dls"
    content = bytearray(path.read_bytes())
    for block in blocks:
        content[HEADER_BYTES + block * GRANULE_BYTES + 77] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("fault", [sound, wrong, cut_off, busy])
def test_a_whole_copy_is_mended_from_its_store(served: Served, corpus: Path, tmp_path: Path, fault: Fault) -> None:
    """Block by block, also by a store that answers badly at first; afterwards the copy is as it was staged."""
    stage_from_store(served.url, tmp_path / "here")
    damage(tmp_path / "here", 1, 3)
    asked: list[str] = []

    def noted(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
        asked.append(handler.headers["Range"])
        return len(asked) == 1 and fault(handler, content)

    served.faults += [noted] * 1000
    found, lost, said = epoch(tmp_path / "here")
    assert found == epoch(corpus)[0] and not lost
    assert len(said) == 2 and all("was taken from the origin of the staged copy" in text for text in said)
    firsts = [HEADER_BYTES + block * GRANULE_BYTES for block in (1, 3)]
    assert set(asked) == {f"bytes={first}-{first + GRANULE_BYTES - 1}" for first in firsts}
    assert verify(tmp_path / "here").faults == []
    asked.clear()
    assert epoch(tmp_path / "here") == (found, set(), []) and not asked


def test_a_block_that_its_store_does_not_give_is_set_aside_and_said_why(served: Served, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    stage_from_store(served.url, tmp_path / "here")
    damage(tmp_path / "here", 2)
    for fault, why in ((refused, r"train-00000\.dls: the store refuses"), (slow, r"cannot be read after 4 tries")):
        monkeypatch.setattr("officina.trainer.data.integrity.STORE_TIMEOUT_S", 0.2)
        served.faults[:] = [fault] * 1000
        _, lost, [said] = epoch(tmp_path / "here")
        assert lost == {"{'shards/train-00000.dls': [2]}"}
        assert re.search(rf"block 2 .*is set aside: its 65,536 tokens give no loss \(from where it was staged .*{why}", said)
    served.faults[:] = [one_bit_wrong(HEADER_BYTES + 2 * GRANULE_BYTES, 9)[0]] * 1000
    _, lost, [said] = epoch(tmp_path / "here")
    assert lost == {"{'shards/train-00000.dls': [2]}"} and said.endswith("tokens give no loss")
    served.faults.clear()  # the store is well again: so is a run that goes on
    assert epoch(tmp_path / "here")[1] == set()
