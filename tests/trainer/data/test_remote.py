"""Data sets in stores: a real S3 server on this host, and an HTTP server that is slow, cuts off, lies and refuses."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_run, write_tokens

from officina.trainer.data import remote
from officina.trainer.data.chat import CHAT_TEMPLATE
from officina.trainer.data.loader import Loader
from officina.trainer.data.manifest import MANIFEST, open_dataset
from officina.trainer.data.remote import PIECES, REMOTE, TRIES, Pieces, Remote
from officina.trainer.data.removal import remove
from officina.trainer.data.shards import GRANULE_BYTES, HEADER_BYTES
from officina.trainer.data.stage_remote import stage_from_store
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


# ---- S3 ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bucket(corpus: Path) -> Iterator[str]:
    """URL of the data set in a bucket of moto's S3 server."""
    import s3fs
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for key, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "y"), ("AWS_DEFAULT_REGION", "us-east-1")):
            patch.setenv(key, value)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        _, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        system = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}", skip_instance_cache=True)
        system.mkdir("bucket")
        system.put(str(corpus), "bucket/corpus", recursive=True)
        yield "s3://bucket/corpus"
        server.stop()


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
Fault = Callable[[BaseHTTPRequestHandler, bytes], bool]
"""Answers a request for a part of a shard in its own way; False = it leaves that to the server."""


@pytest.fixture
def served(corpus: Path) -> Iterator[tuple[str, list[Fault]]]:
    """URL of the data set on an HTTP server with ranges, and the faults of the next requests for shards."""
    faults: list[Fault] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = corpus.parent / self.path.lstrip("/").split("?")[0]
            if not path.is_file():
                self.send_error(404)
                return
            content, status = path.read_bytes(), 200
            if given := self.headers.get("Range"):
                a, _, b = given.removeprefix("bytes=").partition("-")
                content, status = content[int(a):int(b) + 1], 206
            if status == 206 and path.suffix == ".dls" and faults and faults.pop(0)(self, content):
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/corpus", faults
    server.shutdown()
    server.server_close()


def answer(handler: BaseHTTPRequestHandler, content: bytes, length: int | None = None, status: int = 206) -> bool:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)
    return True


def cut_off(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    answer(handler, content[:len(content) // 2], len(content))
    handler.close_connection = True
    return True


def too_short(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    return answer(handler, content[:-3])


def slow(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    time.sleep(1.5)  # longer than TIMEOUT_S; this is the fault itself, not a wait for something
    return False


def wrong(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    return answer(handler, content[:-1000] + bytes(1000))


def busy(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    return answer(handler, b"", status=503)


def whole(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    return answer(handler, content + content, status=200)


def refused(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    return answer(handler, b"", status=403)


@pytest.mark.parametrize("fault", [cut_off, too_short, slow, wrong, busy])
def test_a_passing_fault_changes_nothing(served: tuple[str, list[Fault]], corpus: Path, tmp_path: Path, fault: Fault) -> None:
    """At the header, at the footer, and at blocks."""
    url, faults = served
    stage_from_store(url, tmp_path / "here", on_demand=True)
    sound: Fault = lambda handler, content: False  # noqa: E731
    faults += [fault, sound, fault, sound, sound, fault, fault]
    assert digests(tmp_path / "here") == digests(corpus)
    assert not faults


def test_a_store_that_refuses_or_is_gone_stops_the_run_with_its_name(served: tuple[str, list[Fault]], tmp_path: Path) -> None:
    url, faults = served
    stage_from_store(url, tmp_path / "here", on_demand=True)
    faults += [whole]
    with pytest.raises(DataError, match=r"this server gives whole files alone"):
        stage_from_store(url, tmp_path / "other", on_demand=True)
    with pytest.raises(DataError, match=r"its shards are in http.*without --on-demand"):
        verify(tmp_path / "here")
    faults += [refused]
    with pytest.raises(DataError, match=r"/corpus/shards/train-0000\d\.dls: the store refuses \(.*403.*credentials"):
        digests(tmp_path / "here")
    faults[:] = [busy] * 1000
    with pytest.raises(DataError, match=r"train-0000\d\.dls: cannot be read after 4 tries .*503.*officina data stage"):
        digests(tmp_path / "here")


def test_a_block_that_is_always_wrong_is_set_aside_and_never_kept(served: tuple[str, list[Fault]], corpus: Path,
                                                                  tmp_path: Path) -> None:
    url, _ = served
    path = corpus / "shards" / "train-00000.dls"
    whole = path.read_bytes()
    stage_from_store(url, tmp_path / "here", on_demand=True)
    try:
        path.write_bytes(whole[:HEADER_BYTES + GRANULE_BYTES + 9] + b"\x55" + whole[HEADER_BYTES + GRANULE_BYTES + 10:])
        with Loader(make_run({"a": (tmp_path / "here", 1)}, seq_len=512, rows=32), rank=0, world_size=1, position=0) as loader:
            lost = [loader.next_step().lost for _ in range(30)]
    finally:
        path.write_bytes(whole)
    assert {str(step["a"]) for step in lost if step} == {"{'shards/train-00000.dls': [1]}"}
    kept = {piece.name for piece in (tmp_path / "here" / PIECES).iterdir()}
    name = open_dataset(corpus).shards[0].sha256[:24]
    assert f"{name}-00001" in kept and f"{name}-00002" not in kept


def test_a_piece_that_stays_wrong_is_asked_for_only_when_it_is_met(served: tuple[str, list[Fault]], tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each row of the sound blocks that it holds beside the wrong one."""
    monkeypatch.setattr(remote, "PIECE_BYTES", 4 * GRANULE_BYTES)
    url, faults = served
    stage_from_store(url, tmp_path / "here", on_demand=True)
    asked: list[str] = []

    def wrong_block(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
        asked.append(handler.path + handler.headers["Range"])
        if not asked[-1].startswith(f"/corpus/shards/train-00000.dlsbytes={HEADER_BYTES}-"):
            return False
        return answer(handler, content[:GRANULE_BYTES + 9] + b"\x55" + content[GRANULE_BYTES + 10:])

    faults += [wrong_block] * 10_000
    with Loader(make_run({"a": (tmp_path / "here", 1)}, seq_len=512, rows=32), rank=0, world_size=1, position=0) as loader:
        lost = [loader.next_step().lost for _ in range(30)]
    assert {str(step["a"]) for step in lost if step} == {"{'shards/train-00000.dls': [1]}"}
    wrong = [each for each in asked if f"bytes={HEADER_BYTES}-" in each and "train-00000" in each]
    assert TRIES <= len(wrong) <= 2 * TRIES


def test_a_store_that_is_changed_under_a_run_stops_it(served: tuple[str, list[Fault]], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that were sound when they were checked, and have gone to make room since."""
    monkeypatch.setattr("officina.trainer.data.stage_remote.LEAST_BUDGET_BYTES", 1)
    url, faults = served
    stage_from_store(url, tmp_path / "here", GRANULE_BYTES, on_demand=True)
    with Loader(make_run({"a": (tmp_path / "here", 1)}, seq_len=512, rows=32, prefetch_batches=1), rank=0, world_size=1,
                position=0) as loader:
        for _ in range(40):  # more than an epoch: every block was checked
            loader.next_step()
        faults += [lambda handler, content: answer(handler, bytes(len(content)))] * 10_000
        with pytest.raises(DataError, match=r"train-0000\d\.dls: bytes \d+ to \d+ are not those any more .*Restore the file"):
            for _ in range(10):
                loader.next_step()


def test_removed_documents_of_a_set_in_a_store_are_not_read(served: tuple[str, list[Fault]], corpus: Path,
                                                            tmp_path: Path) -> None:
    url, _ = served
    asked = Path(shutil.copytree(corpus, corpus.parent / "asked"))
    (asked / CHAT_TEMPLATE).write_text("{{ messages }}")
    remove(asked, [f"shards/train-00000.dls:{i}" for i in range(30)])
    stage_from_store(url.replace("corpus", "asked"), tmp_path / "here", on_demand=True)
    assert digests(tmp_path / "here") == digests(asked) != digests(corpus)
    assert (tmp_path / "here" / CHAT_TEMPLATE).read_text() == "{{ messages }}"


def test_a_piece_damaged_here_is_fetched_again(served: tuple[str, list[Fault]], corpus: Path, tmp_path: Path) -> None:
    url, _ = served
    stage_from_store(url, tmp_path / "here", on_demand=True)
    wanted = digests(tmp_path / "here")
    for first in (0, 1):  # with the header, and without
        assert len(list((tmp_path / "here" / PIECES).iterdir())) == 14  # without a budget, all of them stay
        for path in sorted((tmp_path / "here" / PIECES).glob(f"*-0000[{first}-9]")):
            content = bytearray(path.read_bytes())
            content[72] ^= 1  # of a footer: in the ends of documents
            path.write_bytes(content)
        assert digests(tmp_path / "here") == wanted == digests(corpus)


def test_wrong_files_are_named_when_staged_whole(served: tuple[str, list[Fault]], corpus: Path, tmp_path: Path) -> None:
    url, faults = served
    faults += [wrong]
    with pytest.raises(DataError, match=r"cannot be staged:\n  - .*train-00000\.dls: sha256"):
        stage_from_store(url, tmp_path / "here")
    assert not (tmp_path / "here" / MANIFEST).exists() and not list((tmp_path / "here").rglob("*.tmp"))
    stage_from_store(url, tmp_path / "here")
    shutil.rmtree(tmp_path / "here" / "shards")
    with pytest.raises(DataError, match=r"cannot be opened"):
        digests(tmp_path / "here")  # a whole copy does not go to the store
