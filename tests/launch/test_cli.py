"""The console script: fast, helpful, with the right exit status."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from officina.launch import cli
from officina.trainer.errors import (
    EXIT_CONTINUE,
    EXIT_NO_PROGRESS,
    EXIT_USER,
    CheckpointError,
    LaunchError,
    NoProgressError,
    OfficinaError,
)

OFFICINA = Path(sys.executable).with_name("officina")
COMMANDS = ["train", "resume", "submit", "plan", "jobs", "logs", "cancel", "check", "eval", "data", "report",
            "sites", "demo", "bench"]


@pytest.fixture(autouse=True)
def no_personal_defaults(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_DIRS", "")
    monkeypatch.chdir(tmp_path)


def test_help_is_there_at_once():
    """Half a second on any machine: the fastest of five, since this machine may be busy."""
    times_s = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run([OFFICINA, "--help"], capture_output=True, text=True)
        times_s.append(time.perf_counter() - began)
        assert done.returncode == 0 and all(name in done.stdout for name in [*COMMANDS, "generate"])
    assert min(times_s) < 0.5, times_s


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS), ["data", "build", "--help"]])
def test_help_loads_nothing_heavy(words):
    program = ("import sys\nfrom officina.launch import cli\ntry:\n    cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
               "heavy = {'torch', 'hydra', 'pydantic', 'numpy', 'omegaconf'} & set(sys.modules)\n"
               "sys.exit(str(heavy) if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def examples():
    for name in COMMANDS:
        [command] = [action for action in cli._parser([name])._subparsers._group_actions[0].choices.items()
                     if action[0] == name]
        for line in (command[1].epilog or "").splitlines():
            if line.strip().startswith("officina "):
                yield line.split("  a branch")[0].strip()


@pytest.mark.parametrize("line", list(examples()))
def test_examples_in_the_help_can_be_read(line):
    """Each is a command that the parser takes; those with words also compose."""
    words = shlex.split(line)[1:]
    if words[-1] == "--help":
        return
    args = cli.read_arguments(words)
    run_words = [w for w in getattr(args, "words", []) if "=" in w and not w.startswith(("from=", "experiment=./"))]
    if args.name in ("train", "check") and "from=" not in line:
        from officina.configs.compose import compose_all

        assert compose_all(run_words).problems == []


def test_every_command_shows_examples():
    shown = {line.split()[1] for line in examples()}
    assert shown == set(COMMANDS)


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == EXIT_USER and "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["trian"], ["train", "--nodes", "4"], ["report"], ["report", "a", "b=1"]])
def test_what_is_no_command_line(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == EXIT_USER and "officina" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["trian", "tarin"])
def test_a_command_that_is_misspelt_is_found(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command])
    assert capsys.readouterr().err.endswith(f"there is no command {command}. Try: officina train\n")


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0 and re.fullmatch(r"officina \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("words", [["report", "a" * 5000], ["resume", "a" * 5000], ["check", f"from={'a' * 5000}"],
                                   ["check", "experiment=demo", f"init_from={'a' * 5000}"], ["data", "inspect", "a" * 5000]])
def test_a_path_that_is_too_long_is_no_bug(words, capsys):
    said = "oo long" if sys.version_info < (3, 14) or words[0] in ("report", "resume") else "a" * 5000  # is_dir says no
    assert cli.main(words) == EXIT_USER and said in capsys.readouterr().err


def test_a_name_has_a_length_for_a_folder_and_what_is_named_after_it(data_set, capsys):
    words = ["check", "experiment=demo", f"data.sources.python.path={data_set}"]
    assert cli.main([*words, f"name={'n' * 101}"]) == EXIT_USER
    assert "has 101 characters" in (told := capsys.readouterr().err) and f"Try: name={'n' * 40}\n" in told
    assert cli.main([*words, f"name={'n' * 100}"]) == 0


def test_words_may_stand_after_an_option():
    args = cli.read_arguments(["train", "steps=1", "--runs-dir", "x", "seed=2", "~name"])
    assert (args.words, args.runs_dir) == (["steps=1", "seed=2", "~name"], "x")


@pytest.mark.parametrize(("error", "status"), [
    (OfficinaError("mend this"), EXIT_USER), (CheckpointError("mend this"), EXIT_USER),
    (LaunchError("mend this"), EXIT_USER), (NoProgressError("mend this"), EXIT_NO_PROGRESS), (KeyboardInterrupt(), 130)])
def test_exit_status_of_errors(monkeypatch, capsys, error, status):
    from officina.launch import commands

    def fail(args):
        raise error

    monkeypatch.setattr(commands, "check", fail)
    assert cli.main(["check"]) == status
    told = capsys.readouterr().err
    assert told.startswith("officina check: ") and told.count("\n") == 1 and "Traceback" not in told


def test_a_reader_that_leaves_early_is_no_bug():
    """As in `officina plan ... | head`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([OFFICINA, "plan", "model=tiny"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_it_can_be_called_without_a_place_to_print():
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-m", "officina.launch.cli", "sites",
                           "lumi"], check=False)
    assert done.returncode == 0


def test_a_bug_keeps_its_traceback(monkeypatch):
    from officina.launch import commands

    monkeypatch.setattr(commands, "check", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["check"])


def test_the_status_of_a_command_is_that_of_the_script(monkeypatch):
    from officina.launch import commands

    monkeypatch.setattr(commands, "check", lambda args: EXIT_CONTINUE)
    assert cli.main(["check"]) == EXIT_CONTINUE


# ---- check -------------------------------------------------------------------------------------------------------
def test_check_tells_all_problems_at_once(capsys):
    assert cli.main(["check", "lr=1", "engine=zer02", "steps=0", "model.n_heads=5"]) == EXIT_USER
    told = capsys.readouterr().err
    for part in ("5 problems", "lr=1", "Try: optim.lr=1", "engine=zer02", "steps=0", "model.n_heads=5", "data.sources"):
        assert part in told


def test_a_new_run_has_no_timeline_of_mixtures(data_set, capsys):
    words = ["check", "experiment=demo", f"data.sources.python.path={data_set}",
             "data.timeline=[{from_sample:0,weights:{python:1}}]"]
    assert cli.main(words) == 2
    assert "data.timeline" in capsys.readouterr().err
    assert cli.main([*words[:-1], "data.timeline=[]"]) == 0


def test_check_summarises_a_run_without_problems(data_set, capsys, tmp_path):
    (tmp_path / "officina").mkdir()
    (tmp_path / "officina" / "me.yaml").write_text("site: {account: 1e5}\n")
    assert cli.main(["check", "experiment=demo", f"data.sources.python.path={data_set}"]) == 0
    told = capsys.readouterr().out
    for part in ("2, engine fsdp2", "parameters", "2,048 tokens a step = 8 rows x 256", "640 steps = 1,310,720 tokens",
                 "site.account=1e5", "me.yaml", "runs/demo"):
        assert part in told, part


def test_check_judges_for_any_number_of_ranks(data_set, capsys):
    words = ["check", "experiment=demo", f"data.sources.python.path={data_set}", "engine=hsdp", "engine.shard_size=4"]
    assert cli.main([*words, "--ranks", "16"]) == 0
    assert "in 1 micro-batch of up to 8" in capsys.readouterr().out
    assert cli.main([*words, "--ranks", "6"]) == EXIT_USER
    assert "must divide the number of ranks, 6" in capsys.readouterr().err
    assert cli.main([*words, "--ranks", "0"]) == EXIT_USER


def test_check_prints_the_configuration(data_set, capsys):
    import yaml

    assert cli.main(["check", "experiment=demo", f"data.sources.python.path={data_set}", "--yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["steps"] == 640


def test_bench_outside_a_clone_says_where(monkeypatch, capsys):
    from officina.launch import commands

    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    assert cli.main(["bench"]) == EXIT_USER
    assert "clone" in capsys.readouterr().err


@pytest.fixture
def data_set(tmp_path):
    from officina.trainer.data.manifest import ShardEntry, TokenizerInfo, write_manifest

    folder = tmp_path / "data"
    folder.mkdir()
    shards = [ShardEntry(path=f"shards/{split}.dls", split=split, bytes=1, tokens=1, documents=1, sha256="0" * 64,
                         xxh3="0" * 16)
              for split in ("train", "validation")]
    write_manifest(folder, shards, {}, kind="tokens", dtype="u16", name="test",
                   tokenizer=TokenizerInfo(sha256="a" * 64, vocab_size=2048, eos="<|end|>", eos_id=0))
    return folder


def test_the_environment_is_as_it_was(data_set):
    before = dict(os.environ)
    cli.main(["check", "experiment=demo", f"data.sources.python.path={data_set}"])
    assert dict(os.environ) == before
