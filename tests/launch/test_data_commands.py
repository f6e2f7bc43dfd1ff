"""`officina data`: what a person sees, in a process of its own, and that no torch is needed for it."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from data_sets import make_run, write_tokens
from rich.console import Console

from officina.launch import data_terminal
from officina.trainer import card
from officina.trainer.data import carried
from officina.trainer.data.build import BuildOptions, build
from officina.trainer.data.describe import change
from officina.trainer.data.ledger import Ledger
from officina.trainer.data.loader import Loader
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.policy import Policy, policy_of
from officina.trainer.data.shard_writer import write_records
from officina.trainer.data.shards import HEADER_BYTES
from officina.trainer.errors import DataError
from officina.trainer.run_dir import load_config, save_config


def officina(*words: object, cwd: Path | None = None) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; torch cannot be imported in it."""
    script = "import sys; sys.modules['torch'] = None; from officina.launch.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"COLUMNS": "140", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", script, "data", *map(str, words)], capture_output=True, text=True,
                          cwd=cwd, env=environment, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture()
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(f"Document number {i}.\n" + "Some more words in it. " * 40)
    (tmp_path / "texts" / "bad.txt").write_bytes(b"\xff\xfe")
    return tmp_path / "texts"


def test_build_verify_inspect(texts: Path, tmp_path: Path) -> None:
    status, out, err = officina("build", "set", "texts", "--vocab-size", "400", "--validation", "0.3",
                                "--licence", "CC0-1.0", cwd=tmp_path)
    assert (status, err) == (0, "")
    manifest = json.loads((tmp_path / "set" / "dataset.json").read_text())
    for shown in (f"{manifest['splits']['train']['tokens']:,}", f"{manifest['splits']['validation']['documents']:,}",
                  manifest["fingerprint"], "1 not UTF-8", "not UTF-8: texts/bad.txt",
                  "officina train data.sources.main.path=set"):
        assert shown in out
    assert manifest["name"] == "set" and manifest["licence"] == "CC0-1.0"

    status, out, _ = officina("verify", tmp_path / "set")
    assert status == 0 and "is sound: 2 shards" in out and manifest["fingerprint"] in out
    status, out, _ = officina("inspect", tmp_path / "set", "--document", "1")
    assert status == 0 and "CC0-1.0" in out and "Document number" in out and "document 1 ·" in out
    assert re.search(r"languages +not stated\n", out), "as in the summary and the card"
    assert "<|endoftext|>" in out
    status, _, err = officina("inspect", tmp_path / "set", "--document", "99")
    assert status == 2 and "--document 99: split train has" in err and "Traceback" not in err
    status, _, err = officina("inspect", tmp_path / "set", "--step", "3")
    assert status == 2 and "is a data set. Name a run directory" in err
    status, _, err = officina("inspect", texts)
    assert status == 2 and "is neither a data set (dataset.json) nor a run (config.yaml)" in err

    shard = tmp_path / "set" / "shards" / "train-00000.dls"
    content = bytearray(shard.read_bytes())
    content[HEADER_BYTES + 3] ^= 4
    shard.write_bytes(content)
    status, _, err = officina("verify", tmp_path / "set")
    assert status == 2 and f"{shard}: bytes 4096 to" in err and "Traceback" not in err


@pytest.mark.parametrize(("words", "told"), [
    (["--validation", "1.5"], "'1.5' is no share from 0 to below 1; write for example 0.05"),
    (["--vocab-size", "-4"], "expected one argument|is negative; write for example 4"),
    (["--shard-bytes", "many"], "a count is a whole number"),
    (["--personal-data", "some"], "invalid choice"), (["nowhere"], "no such file or folder")])
def test_words_that_make_no_sense(tmp_path: Path, words: list[str], told: str) -> None:
    status, _, err = officina("build", tmp_path / "set", *words)
    assert status == 2 and re.search(told, err) and "Traceback" not in err


@pytest.fixture()
def run_dir(texts: Path, tmp_path: Path) -> Path:
    """A run of five steps over a data set of text."""
    assert officina("build", tmp_path / "set", texts, "--vocab-size", "400")[0] == 0
    run = make_run({"words": (tmp_path / "set", 1)}, seq_len=64, rows=3, vocab_size=400, skip=[[4, 5]])
    train(run, tmp_path / "run")
    return tmp_path / "run"


def train(run: object, folder: Path) -> None:
    folder.mkdir()
    save_config(run, folder / "config.yaml")
    with Loader(run, rank=0, world_size=1, position=0) as loader, Ledger(folder) as ledger:
        for step in range(1, 6):
            found = loader.next_step()
            ledger.write(step, found, found.digest)


def test_inspect_and_audit_a_run(run_dir: Path, tmp_path: Path) -> None:
    status, out, err = officina("inspect", run_dir, "--step", "2", "--rows", "3")
    assert (status, err) == (0, "")
    assert "step 2: samples 3 to 7, 3 rows" in out and "as the shards give it" in out
    assert "left out by data.skip: [[4, 5]]" in out and "shards/train-00000.dls" in out and "Some more words" in out
    steps = [officina("inspect", run_dir, "--step", str(step), "--rows", "3")[1] for step in range(1, 6)]
    assert any("document border" in of_step for of_step in steps)  # in which one, the order decides
    assert "step 5:" in officina("inspect", run_dir)[1]
    status, _, err = officina("inspect", run_dir, "--step", "9")
    assert status == 2 and "has steps 1 to 5. Try: --step 5" in err

    status, out, _ = officina("audit", run_dir)
    assert status == 0 and "Proved: 5 steps (started once) read samples 0 to 16" in out and "1 left out" in out
    lines = (run_dir / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "ledger.jsonl").write_text("".join(lines[:3] + lines[4:]))
    status, _, err = officina("audit", run_dir)
    assert status == 2 and "samples 7 to 10 were never read" in err and "Traceback" not in err
    status, _, err = officina("audit", tmp_path)
    assert status == 2 and "is no run directory" in err


@pytest.mark.parametrize("said", ["--sensitive", '{"sensitive": true}', '{"personal_data": "present"}'])
def test_sensitive_text_is_never_shown(tmp_path: Path, said: str) -> None:
    """Whether an option or the conditions of use say so."""
    (tmp_path / "policy.json").write_text(said)
    words = [said] if said.startswith("--") else ["--policy", tmp_path / "policy.json"]
    rows = [{"text": "Patient Jane Roe has " * 60, "lang": "Jane"}, {"Patient Jane": 1}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words += ["--vocab-size", "300", "--validation", "0"]
    status, out, err = officina("build", tmp_path / "set", tmp_path / "in.jsonl", *words)
    assert status == 2 and "1 bad row" in err and "Patient" not in out + err and "Jane" not in out + err
    status, out, err = officina("build", tmp_path / "set", tmp_path / "in.jsonl", *words, "--max-bad-rows", "1")
    assert status == 0 and "Patient" not in out + err and "Jane" not in out + err
    train(make_run({"s": (tmp_path / "set", 1)}, seq_len=16, rows=2, vocab_size=300), tmp_path / "run")
    for words in (("inspect", tmp_path / "set"), ("inspect", tmp_path / "run"), ("audit", tmp_path / "run")):
        status, out, err = officina(*words)
        assert status == 0 and "Patient" not in out + err and "Jane" not in out + err
    assert "personal or sensitive: not shown" in officina("inspect", tmp_path / "set")[1]


def test_what_was_read_before_the_policy_hid_it_is_not_told(tmp_path: Path) -> None:
    """A build that was interrupted reads anew what may no longer be told."""
    rows = [{"text": "Some words. " * 60}, {"Patient Jane": 1}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def interrupted(phase: str, done: int, total: int) -> None:
        if phase == "tokens":
            raise KeyboardInterrupt

    options = BuildOptions(inputs=[tmp_path / "in.jsonl"], vocab_size=300, validation=0, max_bad_rows=1, workers=1)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "set", options, interrupted)
    assert "Jane" in "".join(path.read_text() for path in (tmp_path / "set" / ".build").glob("scan-*.json"))
    with pytest.raises(DataError, match="1 bad row, 0 allowed") as error:
        build(tmp_path / "set", replace(options, policy=Policy(sensitive=True), max_bad_rows=0))
    assert "Jane" not in str(error.value)


def test_names_and_texts_that_look_like_markup_stand_as_they_are(tmp_path: Path) -> None:
    rows = [{"id": f"[/b]{i}", "text": f"[/red] some words [bold]{i} :smile: " * 20, "from": "[/red]web"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for words in (["build", "[set]", "rows.jsonl", "--vocab-size", "400", "--source-field", "from", "--licence", "CC0-1.0"],
                  ["verify", "[set]"], ["inspect", "[set]"], ["stats", "[set]"]):
        status, out, err = officina(*words, cwd=tmp_path)
        assert (status, err) == (0, "") and "[set]" in out
        assert words[0] in ("build", "verify") or "[/red]web" in out
        assert words[0] != "inspect" or ("[/red] some words [bold]" in out and ":smile:" in out)


def test_the_card_tells_who_publishes_what_the_conditions_say(tmp_path: Path) -> None:
    """Before, of data whose weights must not be released it said that the publisher decides within the licences."""
    write_tokens(tmp_path / "set", {"train": [40, 30]}, licence="CC-BY-4.0", sensitive=True)
    train(make_run({"s": (tmp_path / "set", 1)}, rows=2), tmp_path / "run")
    change(tmp_path / "set", policy=Policy(export="no", attribution="ACME Lab", personal_data="present"))
    told = "- s: CC-BY-4.0; weights trained on it must not be released; holds personal data; sensitive; attribution: ACME Lab\n"
    assert told in card._licence({}, card._data(load_config(tmp_path / "run")), {}, True)
    change(tmp_path / "set", policy=Policy(export="weights-ask"))
    assert "by agreement with the provider alone" in card._licence({}, card._data(load_config(tmp_path / "run")), {}, True)


def test_weights_that_were_trained_do_not_carry_the_licence_of_their_base() -> None:
    """The card says that it is to be decided; what hubs read said the base's."""
    base = {"name": "base", "licence": "apache-2.0"}
    assert 'license: "apache-2.0"' in card._front_matter(base, False, [])
    assert 'base_model: "base"' in (matter := card._front_matter(base, True, ["fin_Latn"])) and "license:" not in matter


def test_a_licence_of_the_policy_is_one(tmp_path: Path) -> None:
    write_tokens(tmp_path / "set", {"train": [40, 30]})
    train(make_run({"s": (tmp_path / "set", 1)}, rows=2), tmp_path / "run")
    for policy, told in ((Policy(licence=("LicenseRef-ACME",), personal_data="pseudonymised"), "LicenseRef-ACME"),
                         (Policy(), "not stated")):
        change(tmp_path / "set", policy=policy)
        [(_, facts)] = card._data(load_config(tmp_path / "run"))
        assert (facts["licence"] or "not stated", facts["personal_data"]) == (told, policy.personal_data)
        assert (carried.of_run(tmp_path / "run", 1)["s"].policy.licences or "not stated") == told
        for words in (["stats", tmp_path / "set"], ["inspect", tmp_path / "set"], ["inspect", tmp_path / "run"]):
            status, out, err = officina(*words)
            assert (status, err) == (0, "") and told in out, out
            assert ("not stated" in re.sub("languages +not stated", "", out)) is (told == "not stated"), out
        out = officina("describe", tmp_path / "set")[1]
        assert re.search(rf"licence +{told}", out) and re.search(rf"personal_data +{policy.personal_data}", out)
    (tmp_path / "set" / "policy.json").write_text("{}")
    for words in (["stats", tmp_path / "set"], ["inspect", tmp_path / "set"], ["inspect", tmp_path / "run"]):
        status, out, err = officina(*words)
        assert status == 2 and "but dataset.json names" in err and "officina data describe" in err and "Traceback" not in err
    status, out, _ = officina("describe", tmp_path / "set")  # which mends it
    assert status == 0 and "but dataset.json names" in out.replace("\n", " ")


def test_records_and_bare_tokens_are_shown_as_numbers(tmp_path: Path) -> None:
    write_records(tmp_path / "records", [bytes(range(200)), b"\x01"], name="r")
    out = officina("inspect", tmp_path / "records")[1]
    assert "200 bytes: 00 01 02" in out and "..." in out
    write_tokens(tmp_path / "tokens", {"train": [5]})
    assert "0 1 2 3 4" in officina("inspect", tmp_path / "tokens")[1]


def test_help_has_examples() -> None:
    for command in ("build", "verify", "inspect", "audit"):
        status, out, _ = officina(command, "--help")
        assert status == 0 and "examples:\n  officina data" in out


@pytest.mark.parametrize(("words", "told"), [
    (["inspect", "step=x", "nowhere"], "step=x: 'x'"), (["inspect", "a", "b"], "a b: names 2 folders, but one is shown"),
    (["stats", "a", "b", "--picture", "x.png"], "--picture x.png: shows one data set, not 2"),
    (["remove", "nowhere", "missing.txt"], "missing.txt: cannot be read"),
    (["stage", "nowhere", "out"], "nowhere is no data set"),
    (["index", ".", "--tokenizer", "x"], "has no X.bin with an X.idx")])
def test_tools_say_what_is_wrong(tmp_path: Path, words: list[str], told: str) -> None:
    status, _, err = officina(*words, cwd=tmp_path)
    assert status == 2 and told in err and "Traceback" not in err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two languages and two sources, built by the command with a filter that lies where it is given."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"text": f"Secret number {i} " * 30, "lang": ("fi", "sv")[i % 2], "id": f"d{i}", "from": f"s{i % 3 % 2}"}
            for i in range(60)]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "own_filter.py").write_text("def keep(document): return '7' not in document.text")
    status, out, err = officina("build", "set", "in.jsonl", "--vocab-size", "300", "--source-field", "from", "--filter",
                                "own_filter:keep", "--licence", "CC-BY-4.0", "--shard-bytes", "9000", cwd=folder)
    assert (status, err) == (0, "") and "own_filter:keep sha256:" in out and "6 of 60 documents left out" in out
    assert "languages    2: fin_Latn, swe_Latn" in out
    run = make_run({"words": (folder / "set", 1)}, seq_len=64, rows=6, vocab_size=300)
    train(run, folder / "run")
    return folder


def test_stats(corpus: Path) -> None:
    status, out, err = officina("stats", corpus / "set", "--picture", corpus / "lengths.png")
    assert (status, err) == (0, "") and (corpus / "lengths.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    manifest = json.loads((corpus / "set" / "dataset.json").read_text())
    for shown in ("s0", "s1", "fin_Latn", "swe_Latn", "CC-BY-4.0", f"{manifest['splits']['train']['tokens']:,}", "tokens/word"):
        assert shown in out
    status, out, _ = officina("stats", corpus / "set", "--split", "test")
    assert status == 2


def test_inspect_a_step_shows_its_documents(corpus: Path) -> None:
    status, out, err = officina("inspect", "step=2", corpus / "run", "--rows", "2")
    assert (status, err) == (0, "")
    for shown in ("words/s0", "words/s1", "fin_Latn", "swe_Latn", "CC-BY-4.0", "Secret number", "shards/train-00000.dls:"):
        assert shown in out
    status, out, _ = officina("inspect", corpus / "set", "--document", "1")
    assert "id " in out and "own_filter:keep" in out and "language" in out and "Secret number" in out


def test_stage_remove_export_index(corpus: Path, tmp_path: Path) -> None:
    status, out, _ = officina("stage", corpus / "set", tmp_path / "fast", "--budget", "1G")
    assert status == 0 and "Staged" in out and officina("verify", tmp_path / "fast")[0] == 0
    status, _, err = officina("stage", corpus / "set", tmp_path / "other", "--budget", "1k")
    assert status == 2 and "more than --budget 1,000" in err
    (tmp_path / "ids.txt").write_text("d0\nd2\nno such\n")
    status, out, _ = officina("remove", tmp_path / "fast", tmp_path / "ids.txt")
    assert status == 0 and "Removed 2 documents" in out and "not found    1 of 3: no such" in out
    status, out, _ = officina("inspect", tmp_path / "fast")
    assert status == 0 and "removed on request: not shown" in out and "2 documents removed on request" in out
    status, out, _ = officina("export", tmp_path / "fast", "--to", "megatron", "--out", tmp_path / "meg")
    assert status == 0 and (tmp_path / "meg" / "train.idx").exists() and "hold no licence and no conditions of use" in out
    status, out, err = officina("index", tmp_path / "meg", "--tokenizer", tmp_path / "fast" / "tokenizer.json",
                                "--validation", "valid*", "--licence", "CC-BY-4.0")
    assert (status, err) == (0, "") and "fingerprint" in out and officina("verify", tmp_path / "meg")[0] == 0


@pytest.mark.parametrize("said", [["--sensitive"], ["--personal-data", "present"], ["--policy", "policy.json"]])
def test_megatrons_files_that_come_back_keep_their_conditions(texts: Path, tmp_path: Path, said: list[str]) -> None:
    """By the command that the export prints. Before, what dataset.json alone says was lost: texts were shown."""
    (tmp_path / "policy.json").write_text('{"sensitive": true, "not_after": "2020-01-01"}')
    status, _, err = officina("build", "set", texts, "--vocab-size", "300", "--validation", "0", "--licence", "MIT", *said,
                              cwd=tmp_path)
    assert status == 0, err
    status, out, _ = officina("export", "set", "--to", "megatron", "--out", "meg", cwd=tmp_path)
    status, _, err = officina(*shlex.split(out.partition("again: officina data ")[2]), cwd=tmp_path)
    assert status == 0, err
    before, after = (policy_of(open_dataset(tmp_path / name)) for name in ("set", "meg"))
    assert replace(after, dataset=before.dataset) == before and not after.shows_text


@pytest.mark.parametrize(("words", "blocked", "told"), [
    (["pack", "set", "--seq-len", "64"], "set/packing", "set/packing/train-64-split.plan: Not a directory. Make room"),
    (["remove", "set", "ids.txt"], "set/removed", "set/removed: File exists. Make room, ask the owner"),
    (["export", "set", "--to", "megatron", "--out", "out"], "out", "out: File exists. Name another place"),
    (["stats", "set", "--picture", "x.xyz"], "", "--picture x.xyz: Format 'xyz' is not supported")])
def test_a_place_that_cannot_be_written_is_told(corpus: Path, tmp_path: Path, words: list, blocked: str, told: str) -> None:
    shutil.copytree(corpus / "set", tmp_path / "set")
    (tmp_path / "ids.txt").write_text("shards/train-00000.dls:0")
    if blocked:
        (tmp_path / blocked).write_text("no folder")
    status, _, err = officina(*words, cwd=tmp_path)
    assert status == 2 and told in err and "Traceback" not in err


def test_a_log_gets_lines_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no terminal, as in a job."""
    now = [0.0]
    monkeypatch.setattr(data_terminal.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=200)
    with data_terminal.progress(console, {"tokens": "tokenising", "merges": "training"}) as report:
        for now[0] in range(0, 181, 20):
            report("tokens", int(now[0]) * 10**6, 10**9)
        now[0] = 300.0
        report("merges", 0, 0)
    assert console.file.getvalue().splitlines() == [
        f"tokenising · {done}.0 MB of 1.0 GB · 1.0 MB/s · {left} left"
        for done, left in ((60, "0:15:40"), (120, "0:14:40"), (180, "0:13:40"))] + ["training"]


def test_no_text_of_personal_data_is_shown_for_a_step(corpus: Path, tmp_path: Path) -> None:
    values = json.loads((corpus / "set" / "dataset.json").read_text())
    (corpus / "set" / "dataset.json").write_text(json.dumps(values | {"personal_data": "present"}))
    try:
        for words in (["inspect", "step=2", corpus / "run"], ["inspect", corpus / "set"]):
            status, out, _ = officina(*words)
            assert status == 0 and "personal or sensitive: not shown" in out and "Secret" not in out and "CC-BY-4.0" in out
    finally:
        (corpus / "set" / "dataset.json").write_text(json.dumps(values))
