"""`officina data describe, policy, export, summary` and `check --explain`, as a person calls them; no torch is needed."""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_sets import make_run

from officina.configs.compose import compose
from officina.launch import data_use_commands
from officina.launch.cli import main
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.policy import Policy, policy_of
from officina.trainer.data.reader import RowReader
from officina.trainer.run_dir import save_config


def officina(*words: object, cwd: Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as exit_:  # argparse
            status = exit_.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"COLUMNS": "140", "NO_COLOR": "1", "XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": ""}.items():
        monkeypatch.setenv(name, value)


OFFER = {"@type": "Offer", "permission": [{"action": "use", "constraint": [
    {"leftOperand": "purpose", "operator": "eq", "rightOperand": "research"},
    {"leftOperand": "count", "operator": "lteq", "rightOperand": 3}]}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set `demo/data` that has conditions, made on the command line."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "texts").mkdir()
    for i in range(20):
        (folder / "texts" / f"{i:02}.txt").write_text(f"Document number {i}. " + "Some more words in it. " * 30)
    (folder / "offer.jsonld").write_text(json.dumps(OFFER))
    options = ("--vocab-size", "300", "--workers", "1")
    assert officina("data", "build", "demo/data", "texts", *options, "--policy", "offer.jsonld", "--licence", "CC-BY-NC-4.0",
                    cwd=folder)[0] == 0
    for name in ("wiki", "maps"):
        assert officina("data", "build", name, "texts", *options, "--licence", "CC-BY-4.0", cwd=folder)[0] == 0
    return folder


@pytest.fixture()
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it for each test."""
    return shutil.copytree(made, tmp_path / "place")


def test_describe_verify_policy_export(place: Path) -> None:
    status, out, _ = officina("data", "verify", "demo/data", cwd=place)
    assert status == 0 and "not stated   description, creators, url, published, collected" in out
    status, out, _ = officina("data", "describe", "demo/data", "--creator", "ACME", "--creator", "Lab", "--url",
                              "https://example.org", "--description", "Words", "--collected", "2025", "--published",
                              "2026-01-01", cwd=place)
    assert status == 0 and "creators       ACME, Lab" in out and out.count("not stated") == 1  # no language is known
    status, out, _ = officina("data", "verify", "demo/data", cwd=place)
    assert status == 0 and "not stated" not in out
    status, out, _ = officina("data", "export", "demo/data", "--to", "mldcat", "--out", "m.jsonld", cwd=place)
    assert status == 0 and json.loads((place / "m.jsonld").read_text())["dct:title"] == "data"
    (place / "demo/data/croissant.json").unlink()
    status, _, err = officina("data", "verify", "demo/data", cwd=place)
    assert status == 2 and "the bytes of demo/data are sound, but what is said about them is not" in err
    [remedy] = re.findall(r"Write it anew: officina (.*)", err)
    assert officina(*shlex.split(remedy), cwd=place)[0] == 0 and officina("data", "verify", "demo/data", cwd=place)[0] == 0
    status, out, _ = officina("data", "policy", "demo/data", "--odrl", cwd=place)
    assert status == 0 and json.loads(out)["odrl:permission"][0]["odrl:constraint"][1]["odrl:rightOperand"] == 3


def test_the_plan(place: Path) -> None:
    status, out, _ = officina("data", "policy", "demo/data", cwd=place)
    assert status == 2 and "NOT KEPT  demo/data: the purpose must be research. To keep it: use.purpose=research" in out
    assert "2 of 2 rules are not kept" in out and "counted   demo/data: max runs 3" in out
    status, out, _ = officina("data", "policy", "demo/data", "use=research", cwd=place)
    assert status == 0 and "This use is allowed" in out and "kept      demo/data: licence CC-BY-NC-4.0. not commercial" in out
    words = ["check", "model.vocab_size=512", "data.sources.main.path=demo/data"]
    status, out, err = officina(*words, "--explain", cwd=place)
    assert status == 2 and "NOT KEPT  main: the purpose must be research" in out and "use.purpose: main: the purpose" in err
    status, out, _ = officina(*words, "use=research", "--explain", cwd=place)
    assert status == 0 and "kept      main: has a maximum of use (max runs). number 1 of 3 runs" in out
    status, out, _ = officina(*words, "use=research", cwd=place)
    assert status == 0 and "kept" not in out


@pytest.mark.parametrize(("words", "told"), [
    (["policy", "use.purpose=research"], "names no data set"), (["policy", "demo/data", "steps=3"], "only what is declared"),
    (["policy", "demo/data", "use.purpos=x"], "use.purpos=x: there is no such key"), (["policy", "nowhere"], "is no data set"),
    (["policy", "demo/data", "--date", "soon"], "is no date; write for example 2027-12-31"),
    (["policy", "demo/data", "demo/data/../data", "--odrl"], "an offer is of one data set, not of 2"),
    (["export", "demo/data", "--to", "croissant", "--out", "x"], "belongs into the data set"),
    (["export", "demo/data", "--to", "mldcat"], "asks for --description, --url, --collected"),
    (["export", "demo/data", "--to", "nothing"], "invalid choice"),
    (["describe", "demo/data", "--policy", "no"], "no: No such file"),
    (["describe", "demo/data", "--set-version", "1"], "version='1'"), (["summary", "texts"], "is no run directory")])
def test_words_that_make_no_sense(made: Path, words: list[str], told: str) -> None:
    status, _, err = officina("data", *words, cwd=made)
    assert status == 2 and told in err, err


def test_summary(place: Path) -> None:
    run = make_run({"main": (place / "demo/data", 1)}, seq_len=16, rows=2, vocab_size=512)
    (place / "runs" / "demo").mkdir(parents=True)
    save_config(run, place / "runs" / "demo" / "config.yaml")
    rows = RowReader(run, 0).rows["main"]
    (place / "runs" / "demo" / "ledger.jsonl").write_text('{"start":0}\n' + json.dumps({
        "step": 1, "first_sample": 0, "stop_sample": 3 * rows + 1, "digest": 0, "skipped": [],
        "source_rows": {"main": 3 * rows + 1}}) + "\n")
    status, out, _ = officina("data", "summary", "runs/demo", "--receipt", "receipt.json", cwd=place)
    tokens = (3 * rows + 1) * 16
    assert status == 0 and f"{tokens:,} tokens in 1 steps (1 start)" in out and "CC-BY-NC-4.0" in out and "Attribution:" in out
    assert json.loads((place / "receipt.json").read_text())["total"] == tokens and "Wrote receipt.json" in out
    status, out, _ = officina("data", "summary", "runs/demo", "--json", cwd=place)
    assert status == 0 and json.loads(out)["sources"]["main"]["tokens"] == tokens
    status, out, _ = officina("data", "summary", "runs/demo", "--receipt", "-", cwd=place)
    assert status == 0 and json.loads(out)["items"][0]["tokens"] == tokens
    status, _, err = officina("data", "summary", "runs/demo", "--receipt", "no/such/place", cwd=place)
    assert status == 2 and "Name a file that you may write" in err


def test_the_summary_of_what_was_all_removed(place: Path) -> None:
    """Shares of nothing are none; the attribution has the licence, also of the policy alone."""
    shutil.copytree(place / "maps", place / "gone")
    (place / "policy.json").write_text('{"licence": ["CC-BY-SA-4.0"]}')
    assert officina("data", "describe", "gone", "--policy", "policy.json", cwd=place)[0] == 0
    shards = ("shards/train-00000.dls", "shards/validation-00000.dls")
    (place / "ids").write_text("".join(f"{shard}:{i}\n" for shard in shards for i in range(20)))
    assert officina("data", "remove", "gone", "ids", cwd=place)[0] == 0
    run_dir = place / "runs" / "none"
    run_dir.mkdir(parents=True)
    run = make_run({"a": (place / "gone", 1)}, rows=2, seq_len=8)
    save_config(run, run_dir / "config.yaml")
    (run_dir / "ledger.jsonl").write_text('{"start":0,"removals":{"a":1}}\n' + json.dumps(
        {"step": 1, "first_sample": 0, "stop_sample": 2, "digest": 0, "skipped": [], "source_rows": {"a": 2}}) + "\n")
    status, out, err = officina("data", "summary", "runs/none", cwd=place)
    assert status == 0, err
    assert "0 tokens in 1 steps" in out and "0.00%" in out and "maps (CC-BY-4.0 AND CC-BY-SA-4.0)" in out


def test_a_new_offer_does_not_take_back_what_odrl_cannot_say(place: Path) -> None:
    """A provider renews conditions by an offer: before, `sensitive`, personal data and licence of policy.json went with it."""
    until = {"leftOperand": "dateTime", "operator": "lteq", "rightOperand": "2027-12-31"}
    offer = {"@type": "Offer", "permission": [{"action": "use", "constraint": [until]}]}
    fields = {"sensitive": True, "personal_data": "present", "licence": ["CC-BY-NC-4.0"], "competition_pool": "p",
              "attribution": "ACME", "not_after": "2026-01-01", "export": "no"}

    def described(document: dict) -> Policy:
        (place / "policy.json").write_text(json.dumps(document))
        assert officina("data", "describe", "maps", "--policy", "policy.json", cwd=place)[0] == 0
        return policy_of(open_dataset(place / "maps"))

    before, after = described(fields), described(offer)
    assert after.sensitive and after.licences == "CC-BY-4.0 AND CC-BY-NC-4.0"
    for name in ("personal_data", "competition_pool", "attribution"):
        assert getattr(after, name) == getattr(before, name), name
    assert (after.not_after, after.export) == ("2027-12-31", "weights-ok")  # what ODRL says is the offer's alone
    after = described({"odrl": offer, "sensitive": False, "max_runs": 1})
    assert (after.sensitive, after.max_runs, after.personal_data) == (False, 1, "present")
    assert described(fields) == before


def test_the_examples_run_as_they_stand(place: Path) -> None:
    """Every example of --help, but for those on runs, in the order in which they stand."""
    officina("data", "describe", "demo/data", "--description", "Words", "--collected", "2025", "--url", "https://example.org",
             cwd=place)
    texts = [getattr(data_use_commands, f"_{name}_EXAMPLES") for name in ("DESCRIBE", "POLICY", "EXPORT")]
    commands = [line.strip() for text in texts for line in text.splitlines()[1:]]
    assert len(commands) == 10
    for command in commands:
        words = shlex.split(re.split(r"\s{3,}", command)[0])[1:]
        status, _, err = officina(*words, cwd=place)
        assert status in ((0, 2) if words[1] == "policy" else (0,)) and "error" not in err, (command, err)


def test_help_has_examples(tmp_path: Path) -> None:
    for command in ("describe", "policy", "export", "summary"):
        status, out, _ = officina("data", command, "--help", cwd=tmp_path)
        assert status == 0 and f"examples:\n  officina data {command}" in out


def test_no_torch_is_needed(place: Path) -> None:
    """The commands of a login node, in a process where torch cannot be imported."""
    script = ("import sys; sys.modules['torch'] = None; from officina.launch.cli import main\n"
              "for words in (['data', 'verify', 'maps'], ['data', 'policy', 'maps'], ['data', 'describe', 'maps'],\n"
              "              ['data', 'export', 'maps', '--to', 'croissant'],\n"
              "              ['check', 'model.vocab_size=512', 'data.sources.main.path=maps', '--explain']):\n"
              "    assert main(words) == 0, words")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr


def test_use_is_a_group() -> None:
    assert compose(["use=research"]).use.commercial is False and compose(["use=product"]).use.commercial is True
    assert compose([]).use.commercial is None and compose(["use.commercial=true"]).use.commercial is True
