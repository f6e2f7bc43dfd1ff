"""Sealed sets: rows as of open ones, nothing readable on the disk, no key told, tampering found, and no text in errors."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import make_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from officina.launch.cli import main
from officina.trainer.config import CustomModelConfig, SourceConfig
from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.integrity import ORIGIN
from officina.trainer.data.ledger import Ledger, audit
from officina.trainer.data.loader import Loader, validation_rows
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.reader import RowReader
from officina.trainer.data.seal import Seal, read_seal
from officina.trainer.data.shard_writer import ShardWriter, write_records
from officina.trainer.data.shards import GRANULE_BYTES, HEADER_BYTES, Shard
from officina.trainer.data.stage import stage
from officina.trainer.data.verify import verify
from officina.trainer.errors import DataError
from officina.trainer.run_dir import save_config
from officina.trainer.validate import problems

pytest.importorskip("cryptography", reason="needs officina[sealed]")
KEY = bytes(range(32))
SECRET = "Aino-Kaarina Virtanen-Öhman"


@pytest.fixture()
def key(tmp_path: Path) -> Path:
    path = tmp_path / "my.key"
    path.write_text(KEY.hex() + "\n")
    path.chmod(0o600)
    return path


@given(n=st.integers(1, 3 * GRANULE_BYTES // 4),
       cuts=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 9000)), max_size=5))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_of_a_sealed_shard_is_that_of_an_open_one(tmp_path_factory, n: int, cuts) -> None:
    folder, tokens = tmp_path_factory.mktemp("s"), np.random.default_rng(n).integers(0, 2**31, n).astype("<u4")
    shards = []
    for name, seal in (("open", None), ("sealed", Seal(KEY)), ("again", Seal(KEY))):
        writer = ShardWriter(folder / f"{name}.dls", dtype="u32", seal=seal)
        for part in np.array_split(tokens, min(n, 3)):
            writer.add(part)
        writer.close(relative_to=folder, split="train")
        shards.append(Shard(folder / f"{name}.dls", seal=seal))
    plain, sealed, _ = shards
    assert (folder / "sealed.dls").read_bytes() == (folder / "again.dls").read_bytes()  # the same input, the same bytes
    for a, length in [*cuts, (0, n)]:
        a, b = a % n, min(a % n + length, n)
        assert np.array_equal(sealed.read(a, b), tokens[a:b]) and np.array_equal(plain.read(a, b), tokens[a:b])
    some = np.random.default_rng(1).integers(0, n, 50)
    assert np.array_equal(sealed.data[some], tokens[some])
    content = (folder / "sealed.dls").read_bytes()
    if n > 16:
        assert tokens[:16].tobytes() not in content and sealed.check_all() == []
        with pytest.raises(DataError, match=r"is sealed, and no key is given\. .*--key FILE"):
            Shard(folder / "sealed.dls").read(0, 1)


def test_no_nonce_is_used_for_two_blocks() -> None:
    """Not for equal contents either: equal blocks would be seen to be equal, and under one nonce their tags tell of the key."""
    seal, content = Seal(KEY), bytes(1000)
    places = [(block, before, content) for block in (0, 1, 2) for before in (b"", bytes(28), bytes(27) + b"x")]
    closed = [seal.close(block, content, before) for block, before, content in [*places, (0, b"", content[1:])]]
    assert len({mark[:12] for _, mark in closed}) == len({sealed[:100] for sealed, _ in closed}) == len(closed)
    assert seal.close(0, content, b"") == closed[0]


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_of_another_shard_under_the_same_key_is_found_out(tmp_path: Path, block: int) -> None:
    """Put with its mark where it stood there, and with a checksum that fits."""
    class Kept(Seal):
        def __init__(self, put: dict[int, tuple[bytes, bytes]]) -> None:
            super().__init__(KEY)
            self.put, self.closed = put, []

        def close(self, block: int, content: bytes, before: bytes) -> tuple[bytes, bytes]:
            before = self.closed[-1][1] if self.closed else b""  # what was put came later
            self.closed.append(super().close(block, content, before))
            return self.put.get(block, self.closed[-1])

    def written(name: str, seal: Kept) -> Shard:
        writer = ShardWriter(tmp_path / name, dtype="u8", seal=seal)
        writer.add(np.random.default_rng(len(name)).integers(0, 256, 2 * GRANULE_BYTES).astype("u1"))
        writer.close(relative_to=tmp_path, split="train")
        return Shard(tmp_path / name, seal=Seal(KEY))

    other = Kept({})
    assert written("one.dls", other).check_all() == []
    [fault] = written("other.dls", Kept({block: other.closed[block]})).check_all()
    assert "block 1 has its checksum, but not its seal: somebody changed it" in fault


def test_keys_are_read_from_files_and_commands_and_never_told(key: Path, tmp_path: Path) -> None:
    import base64

    wanted = Seal(KEY).key_id
    assert read_seal(str(key)).key_id == wanted and KEY.hex() not in repr(read_seal(str(key)))
    assert read_seal(f"command:cat {key}").key_id == wanted
    for content in (KEY, base64.b64encode(KEY)):
        key.write_bytes(content)
        assert read_seal(str(key), wanted).key_id == wanted
    secret = "deadbeef" * 7
    for content, word, message in (
            (secret, str(key), r"is no key \(56 bytes\): 64 hexadecimal digits"),
            (KEY[::-1].hex(), str(key), rf"but the data set is sealed with {wanted}\. Name the other key"),
            ("", str(tmp_path / "none"), r"cannot be read \(No such file"),
            ("", "command:false", "ended with exit status 1"), ("", "command:/no/such", r"gives no key \(FileNotFoundError\)"),
            ("", "command:", "gives no key"), (secret, f"command:cat {key}", "is no key"),
            ("", "command:vault 'x", "vault 'x: no closing quotation. Write the command as in a shell")):
        key.write_text(content)
        with pytest.raises(DataError, match=message) as raised:
            read_seal(word, wanted)
        assert secret not in str(raised.value) and KEY[::-1].hex() not in str(raised.value)
    key.chmod(0o640)
    with pytest.raises(DataError, match=rf"others may read the key \(mode 0640\)\. Try: chmod 600 {key}"):
        read_seal(str(key))


def test_a_key_in_the_place_of_its_file_is_kept_and_told_nowhere(pair, tmp_path: Path, capfd) -> None:
    """Before config.yaml is written."""
    import base64

    _, sealed = pair
    for word in (KEY.hex(), base64.b64encode(KEY).decode()):
        with pytest.raises(DataError, match="--key: is a key itself, which would be kept .* Try: --key FILE") as raised:
            read_seal(word)
        assert word not in str(raised.value)
        words = [f"data.sources.a.path={sealed}", f"data.sources.a.key={word}", "model=tiny", "device=cpu", "ranks=1"]
        assert main(["train", *words, f"--runs-dir={tmp_path / 'runs'}"]) == 2
        told = capfd.readouterr().err
        assert "data.sources.a.key: is a key itself" in told and word not in told
        assert not any(path.is_file() for path in (tmp_path / "runs").rglob("*"))


@pytest.fixture()
def pair(tmp_path: Path, key: Path) -> tuple[Path, Path]:
    """The same texts, open and sealed."""
    with open(tmp_path / "in.jsonl", "w") as file:
        for i in range(3000):
            file.write(json.dumps({"text": f"{i} {SECRET} " + "asui talossa numero " * (i % 40), "lang": "fi"}) + "\n")
    build(tmp_path / "base", BuildOptions(inputs=[tmp_path / "in.jsonl"], vocab_size=400))
    how = {"inputs": [tmp_path / "in.jsonl"], "tokenizer": tmp_path / "base" / "tokenizer.json", "workers": 1}
    build(tmp_path / "open", BuildOptions(**how))
    build(tmp_path / "sealed", BuildOptions(**how, seal=str(key), about={"personal_data": "present", "licence": "CC0-1.0"}))
    return tmp_path / "open", tmp_path / "sealed"


def test_a_sealed_set_is_built_verified_staged_trained_on_and_audited(pair, key: Path, tmp_path: Path) -> None:
    plain, sealed = pair
    manifest = open_dataset(sealed).manifest
    assert manifest.sealed == Seal(KEY).key_id and manifest.fingerprint != open_dataset(plain).manifest.fingerprint
    assert manifest.splits["train"].tokens == open_dataset(plain).manifest.splits["train"].tokens
    stage(sealed, tmp_path / "fast")
    tokens = Shard(plain / "shards" / "train-00000.dls").read(0, 64).tobytes()
    for folder in (sealed, tmp_path / "fast"):
        assert verify(folder).faults == [] and verify(folder, key=str(key)).faults == []
        for path in folder.rglob("*"):
            if path.is_file():
                assert not any(each in path.read_bytes() for each in (tokens, SECRET.encode(), KEY, KEY.hex().encode()))
    runs = {}
    for name, folder in (("plain", plain), ("sealed", tmp_path / "fast")):
        run = make_run({"a": (folder, 1)}, seq_len=64, rows=8, shuffle=False, packing="cut")
        source = SourceConfig(path=str(folder), key=f"command:cat {key}" if name == "sealed" else "")
        runs[name] = replace(run, data=replace(run.data, sources={"a": source}))
        (tmp_path / f"run-{name}").mkdir()
        save_config(runs[name], tmp_path / f"run-{name}" / "config.yaml")
        with Loader(runs[name], rank=0, world_size=1, position=0) as loader, Ledger(tmp_path / f"run-{name}") as ledger:
            for step in range(1, 9):
                data = loader.next_step()
                ledger.write(step, data, data.digest)
    digests = [[json.loads(line).get("digest") for line in (tmp_path / f"run-{n}" / "ledger.jsonl").read_text().splitlines()]
               for n in runs]
    assert digests[0] == digests[1] and audit(tmp_path / "run-sealed").faults == []
    planned = replace(runs["sealed"], data=replace(runs["sealed"].data, packing="best_fit"))
    opened = replace(runs["plain"], data=replace(runs["plain"].data, packing="best_fit"))
    assert RowReader(planned).digest(np.arange(40)) == RowReader(opened).digest(np.arange(40))
    without = replace(planned, data=replace(planned.data, sources={"a": SourceConfig(path=str(sealed))}))
    [problem] = [p for p in problems(without) if p.key == "data.sources.a.key"]
    assert "is sealed with the key" in str(problem) and "data.sources.a.key=FILE" in str(problem)
    with pytest.raises(DataError, match=r"data\.sources\.a: .* is sealed with the key .*data\.sources\.a\.key=FILE"):
        RowReader(without)


def test_damage_is_mended_with_ciphertext_and_tampering_stops(pair, key: Path, tmp_path: Path) -> None:
    _, sealed = pair
    stage(sealed, tmp_path / "fast")
    shard = tmp_path / "fast" / "shards" / "train-00000.dls"
    before = shard.read_bytes()

    def write(at: int, value: int) -> None:
        with open(shard, "r+b") as file:
            file.seek(at)
            file.write(bytes([value]))

    write(HEADER_BYTES + 500, before[HEADER_BYTES + 500] ^ 1)
    run = make_run({"a": (tmp_path / "fast", 1)}, seq_len=64, rows=8, packing="cut", shuffle=False)
    run = replace(run, data=replace(run.data, sources={"a": SourceConfig(path=str(tmp_path / "fast"), key=str(key))}))
    with Loader(run, rank=0, world_size=1, position=0) as loader:
        step = loader.next_step()
    assert not step.lost and "origin of the staged copy" in step.mended[0]
    assert shard.read_bytes() == before  # the file is mended, with ciphertext
    (tmp_path / "fast" / ORIGIN).unlink()
    wrong = Seal(KEY[::-1])
    with pytest.raises(DataError, match="has its checksum, but not its seal: somebody changed it"):
        Shard(shard, seal=wrong).read(0, 1)
    with pytest.raises(DataError, match=r"but the data set is sealed with"):
        key.write_text(KEY[::-1].hex())
        verify(sealed, key=str(key))


def test_records_of_a_model_of_ones_own_are_sealed_too(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [f"{i} {SECRET} ".encode() * 999 for i in range(40)]
    for name, seal in (("open", ""), ("sealed", str(key))):
        write_records(tmp_path / name, records[3:], name="notes", shard_bytes=1 << 19, seal=seal, licence="MIT")
        write_records(tmp_path / name, records[:3], name="notes", split="validation", seal=seal)
    assert not any(SECRET.encode() in path.read_bytes() for path in (tmp_path / "sealed").rglob("*") if path.is_file())
    assert verify(tmp_path / "sealed", key=str(key)).faults == []
    seen = {"open": [], "sealed": []}
    module = types.ModuleType("test_seal_decoder")
    module.decode = lambda record: seen[name].append(record) or {"x": torch.tensor(len(record))}
    monkeypatch.setitem(sys.modules, "test_seal_decoder", module)
    runs = {}
    for name in seen:
        run = make_run({"a": (tmp_path / name, 1)}, seq_len=1, rows=5)
        source = SourceConfig(path=str(tmp_path / name), key=str(key) if name == "sealed" else "")
        runs[name] = replace(run, data=replace(run.data, sources={"a": source}),
                             model=CustomModelConfig(factory="m:f", loss="m:l", decoder="test_seal_decoder:decode"))
        with Loader(runs[name], rank=0, world_size=1, position=0) as loader:
            for _ in range(8):
                loader.next_step()
        list(validation_rows(runs[name], 0, 1))
    assert set(seen["open"]) == set(seen["sealed"]) == set(records)
    with pytest.raises(DataError, match=r"data\.sources\.a: .* is sealed with the key .*data\.sources\.a\.key=FILE"):
        source = SourceConfig(path=str(tmp_path / "sealed"))
        RowReader(replace(runs["sealed"], data=replace(runs["sealed"].data, sources={"a": source})))
    with pytest.raises(DataError, match=r"all splits are sealed with one key.*with the key [0-9a-f]{16}: give it, seal=FILE"):
        write_records(tmp_path / "sealed", records, name="notes", split="more")
    with pytest.raises(DataError, match=r"all splits are sealed with one key.*sealed not: leave seal out"):
        write_records(tmp_path / "open", records, name="notes", split="more", seal=str(key))


def test_what_cannot_be_sealed_is_refused(pair, key: Path, tmp_path: Path) -> None:
    plain, sealed = pair
    with pytest.raises(DataError, match=r"--seal: a tokenizer that is trained on the texts .*--tokenizer base/tokenizer\.json"):
        build(tmp_path / "x", BuildOptions(inputs=[tmp_path / "in.jsonl"], seal=str(key)))
    with pytest.raises(DataError, match=r"is not sealed\. Leave the key out"):
        verify(plain, key=str(key))
    assert main(["data", "export", str(sealed), "--to", "megatron", "--out", str(tmp_path / "m")]) == 2


# ---- no text anywhere ----------------------------------------------------------------------------------------------
ROWS = st.one_of(
    st.just({"text": f"x {SECRET}"}), st.just({"text": [SECRET]}), st.just({SECRET: 1}), st.just([SECRET]), st.just(SECRET),
    st.just({"text": SECRET, "lang": SECRET}), st.just({"messages": [{"role": SECRET, "content": SECRET}]}),
    st.just({"prompt": SECRET}), st.just({"text": f"\ud800 {SECRET}"}), st.just({"messages": SECRET}))


@given(rows=st.lists(ROWS, min_size=1, max_size=5), torn=st.booleans(), samples=st.booleans(), sensitive=st.booleans())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_error_of_a_build_tells_a_text(tmp_path_factory, capfd, rows, torn: bool, samples: bool, sensitive: bool) -> None:
    """Rows of every wrong kind: what is printed and what is left in the folder has nothing of them."""
    folder = tmp_path_factory.mktemp("b")
    with open(folder / "in.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.write(f'{{"text": "{SECRET}' if torn else "")
    words = ["data", "build", str(folder / "d"), str(folder / "in.jsonl"), "--workers", "1", "--validation", "0", "--tokenizer",
             str(base_tokenizer(folder)), *(["--samples", "--chat-template", "plain"] if samples else []),
             *(["--sensitive"] if sensitive else ["--personal-data", "present"])]
    status = main(words)
    out = capfd.readouterr()
    assert status in (0, 2) and not tells(out.out + out.err), out
    for path in (folder / "d").rglob("*"):
        if path.is_file():
            assert not tells(path.read_bytes().decode("latin1")), path


def tells(text: str) -> bool:
    return any(word in text for word in ("Aino", "Kaarina", "Virtanen", "hman"))


def base_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_no_command_shows_a_text(pair, key: Path, tmp_path: Path, capfd) -> None:
    _, sealed = pair
    run = make_run({"a": (sealed, 1)}, seq_len=64, rows=8, packing="cut")
    run = replace(run, data=replace(run.data, sources={"a": SourceConfig(path=str(sealed), key=str(key))}))
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(run, folder / "config.yaml")
    with Loader(run, rank=0, world_size=1, position=0) as loader, Ledger(folder) as ledger:
        data = loader.next_step()
        ledger.write(1, data, data.digest)
    for words in (["inspect", str(sealed)], ["inspect", str(sealed), "--key", str(key)], ["inspect", "step=1", str(folder)],
                  ["stats", str(sealed)], ["verify", str(sealed), "--key", str(key)], ["audit", str(folder)],
                  ["summary", str(folder), "--json"], ["describe", str(sealed)],
                  ["inspect", str(sealed), "--document", "99999"]):
        main(["data", *words])
        out = capfd.readouterr()
        assert not tells(out.out + out.err), words
        assert words[0] != "inspect" or "not shown" in out.out or "99999" in out.err
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OFFICINA_KEY": KEY.hex()}  # which nobody reads
    done = subprocess.run([sys.executable, "-m", "officina.launch.cli", "data", "verify", str(sealed)], env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "to try every block: --key FILE" in done.stdout
